"""Answers each request after burning CPU time at the end of a stack of 60 Python functions, no two of them the same.

deep.py PORT
"""

import socket
import sys
import time

SECONDS = 0.4
FRAMES = 60
# The module's, `serve`'s and `burn`'s.
LEVELS = FRAMES - 3


def burn():
    began = time.thread_time()
    total = 0
    while time.thread_time() - began < SECONDS:
        for n in range(2000):
            total += n * n
    return total


SOURCE = """
def level_{n}():
    total = level_{next}()
    return total
"""

level_1 = burn
for n in range(2, LEVELS + 2):
    exec(SOURCE.format(n=n, next=n - 1))
outermost = globals()[f"level_{LEVELS + 1}"]


def serve(listener):
    while True:
        client, _ = listener.accept()
        client.recv(4096)
        outermost()
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        client.close()


serve(socket.create_server(("127.0.0.1", int(sys.argv[1]))))
