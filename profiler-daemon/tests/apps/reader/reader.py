"""A server that reads its connections as if they were files: with read() or readv(), and answers with write().

    python reader.py PORT read|readv

It keeps every connection, serves each in a thread of its own, and answers every request with 200 and the number of
bytes of its body; a request for /large with 4 MiB in one write, which has to wait for the client to read. What it reads
arrives in the pieces that the client sent it in, as far as the kernel keeps them apart.
"""

import os
import socket
import sys
import threading

PIECE = 65_536
LARGE = b"x" * (4 << 20)


def read(fd):
    return os.read(fd, PIECE)


def readv(fd):
    buffers = [bytearray(16), bytearray(PIECE)]
    count = os.readv(fd, buffers)
    return bytes(b"".join(buffers)[:count])


def content_length(head):
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def serve(connection, receive):
    fd = connection.fileno()
    pending = b""
    while True:
        while b"\r\n\r\n" not in pending:
            piece = receive(fd)
            if not piece:
                connection.close()
                return
            pending += piece
        head, _, pending = pending.partition(b"\r\n\r\n")
        length = content_length(head)
        while len(pending) < length:
            pending += receive(fd)
        pending = pending[length:]
        body = LARGE if head.startswith(b"GET /large ") else b"%d\n" % length
        os.write(fd, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


def main(port, receive):
    listener = socket.create_server(("127.0.0.1", port))
    # Inherited by what is accepted: a large answer does not fit.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection, receive), daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), {"read": read, "readv": readv}[sys.argv[2]])
