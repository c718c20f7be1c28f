"""Code objects that die and leave their places to others. One thread serves one connection after the other.

server.py PORT
GET /burn/N   compiles a function `burn_N` at line N of a file that is not there, and burns 8 ms of CPU time in it. The
              header X-Code says where its code object is.
GET /clear/N  lets these functions go.
GET /storm/N  compiles and lets go 20,000 code objects.
"""

import socket
import sys
import time

SECONDS = 0.008
SOURCE = """
def burn_{n}():
    began = time.thread_time()
    total = 0
    while time.thread_time() - began < {seconds}:
        for n in range(1000):
            total += n * n
    return total
"""


names = {"time": time}


def clear(number):
    names.clear()
    names["time"] = time
    return number


def burn(number):
    lines = "\n" * number
    exec(compile(lines + SOURCE.format(n=number, seconds=SECONDS), "reused.py", "exec"), names)
    function = names["burn_%d" % number]
    function()
    return id(function.__code__)


def storm(number):
    for _ in range(20000):
        compile("0", "storm", "eval")
    return number


def serve(connection):
    stream = connection.makefile("rwb")
    while True:
        line = stream.readline()
        if not line:
            return
        while stream.readline() not in (b"\r\n", b""):
            pass
        _, route, number = line.split()[1].decode().split("/")
        value = {"burn": burn, "clear": clear, "storm": storm}[route](int(number))
        stream.write(b"HTTP/1.1 200 OK\r\nX-Code: %d\r\nContent-Length: 2\r\n\r\nok" % value)
        stream.flush()


with socket.socket() as listening:
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", int(sys.argv[1])))
    listening.listen()
    while True:
        with listening.accept()[0] as connection:
            serve(connection)
