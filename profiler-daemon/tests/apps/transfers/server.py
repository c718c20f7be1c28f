"""A server that transfers as servers seldom do, each connection in a thread of its own.

    python server.py PORT FILE

/duplex     sends with one thread what it receives with another, in small calls
/vector     answers with one writev() of 47 elements, /chunked with one of 905
/fclose     answers, closes with fclose(), and reads FILE by the same descriptor
/dup2       the same, closed by dup2()
Anything else is answered with its path, /after/... when a file was read.
"""

import ctypes
import os
import socket
import sys
import threading

CALLS = 20_000
read = threading.Semaphore(0)
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
libc.fclose.argtypes = [ctypes.c_void_p]


def head(fields):
    return b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n\r\n"


def duplex(connection, pending):
    def send():
        for _ in range(CALLS - 1):
            connection.sendall(b"zzzzzzz")

    connection.sendall(head(b"Content-Length: %d" % (7 * CALLS)))
    sender = threading.Thread(target=send)
    sender.start()
    left = 5 * CALLS - len(pending)
    while left > 0:
        left -= len(connection.recv(min(left, 5)))
    sender.join()
    # A request is over with its response, so the last of that comes when all was received.
    connection.sendall(b"zzzzzzz")


def reuse(connection, file, how):
    connection.sendall(head(b"Content-Length: 0\r\nConnection: close"))
    fd = connection.detach()
    if how == "fclose":
        libc.fclose(libc.fdopen(fd, b"r+"))
        while os.open(file, os.O_RDONLY) != fd:
            pass
    else:
        os.dup2(os.open(file, os.O_RDONLY), fd)
    os.read(fd, 65_536)
    os.close(fd)
    read.release()


def serve(connection, file):
    pending = b""
    while True:
        while b"\r\n\r\n" not in pending.lstrip(b"\r\n"):
            piece = connection.recv(65_536)
            if not piece:
                connection.close()
                return
            pending += piece
        request, _, pending = pending.lstrip(b"\r\n").partition(b"\r\n\r\n")
        path = request.split(b" ")[1]
        if path == b"/duplex":
            duplex(connection, pending)
            pending = b""
        elif path == b"/vector":
            os.writev(connection.fileno(), [head(b"Content-Length: 460"), *[b"0123456789"] * 46])
        elif path == b"/chunked":
            chunks = [b"1", b"\r\n", b"x", b"\r\n"] * 225
            os.writev(connection.fileno(), [head(b"Transfer-Encoding: chunked"), *chunks, b"0", b"\r\n", b"\r\n", b""])
        elif path in (b"/fclose", b"/dup2"):
            reuse(connection, file, path[1:].decode())
            return
        else:
            if path.startswith(b"/after/"):
                read.acquire()
            connection.sendall(head(b"Content-Length: %d" % len(path)) + path)


def main(port, file):
    listener = socket.create_server(("127.0.0.1", port))
    # A blocking accept() takes the lowest free descriptor before it waits, and that may be the one just closed by
    # reuse(), which would then wait for it for ever. With a timeout Python asks poll() first.
    listener.settimeout(600)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection, file), daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
