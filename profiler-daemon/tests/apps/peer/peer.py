"""A server whose routes go through C on their way to where they burn CPU time.

| route | between the route's function and the leaf |
|---|---|
| /by_sorted | `sorted`, which calls back |
| /by_generator | `sum` over a generator |
| /by_regex | the C part of `re`, which calls back |
| /by_repr | string formatting, a list's `repr`, a method |
| /by_zlib | C alone: the leaf is in zlib |

    python peer.py PORT
"""

import re
import socket
import sys
import time
import zlib

SECONDS = 0.3
DATA = bytes(range(256)) * 4000


def burn():
    began = time.thread_time()
    total = 0
    while time.thread_time() - began < SECONDS:
        for n in range(20000):
            total += n * n
    return total


def by_sorted():
    called = []

    def key(number):
        if not called:
            called.append(number)
            burn()
        return number

    return sorted([3, 1, 2], key=key)


def numbers():
    yield burn()


def by_generator():
    return sum(numbers())


def by_regex():
    return re.sub("a", lambda match: str(burn()), "xa")


class Shown:
    def __repr__(self):
        return str(burn())


def by_repr():
    return "%r" % [Shown()]


def by_zlib():
    began = time.thread_time()
    while time.thread_time() - began < SECONDS:
        zlib.compress(DATA, 6)


def serve(listener):
    while True:
        client, _ = listener.accept()
        request = client.recv(4096)
        if not request:
            client.close()
            continue
        globals()[request.split()[1].decode().split("/")[1]]()
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        client.close()


serve(socket.create_server(("127.0.0.1", int(sys.argv[1]))))
