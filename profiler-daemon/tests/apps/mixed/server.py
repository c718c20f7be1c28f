"""A single thread that speaks HTTP on some connections and lines of text on others.

usage: server.py PORT

An HTTP request is answered when somebody sends the line `answer` on another connection. Any line costs CPU time and is
echoed.
"""

import selectors
import socket
import sys
import time

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"
BURN = 0.1


def burn():
    end = time.thread_time() + BURN
    while time.thread_time() < end:
        pass


def main():
    ready = selectors.DefaultSelector()
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    ready.register(listener, selectors.EVENT_READ)
    waiting = []
    while True:
        for key, _ in ready.select():
            if key.fileobj is listener:
                ready.register(listener.accept()[0], selectors.EVENT_READ)
                continue
            data = key.fileobj.recv(4096)
            if not data:
                ready.unregister(key.fileobj)
                key.fileobj.close()
            elif data.endswith(b"\r\n\r\n"):
                waiting.append(key.fileobj)
            else:
                burn()
                if data == b"answer\n":
                    for client in waiting:
                        client.sendall(ANSWER)
                    waiting.clear()
                key.fileobj.sendall(data)


main()
