"""The ground-truth application: a WSGI site that knows what a profiler must find in it.

Each of the routes /a, /b, /c, /d and /z burns CPU in functions that no other route calls, nested three deep
(outer, middle, leaf). The work is a fixed count of loop turns, never "until the clock says so": a profiler that
slows the application down then shows in the times and not in the shape of the call tree. Every response names
the worker that made it (X-Pid) and, where the handler is done before the head is sent, the handler's own time by
its own clock (X-Handler-Ns) and its thread's CPU time (X-Cpu-Ns). A body that is streamed is made after the head and
so is not in these times.

The first segment of the path chooses the answer; what follows is the client's own, so that it can give every request
a path of its own (`/a/17`) and find it again.

    gunicorn --chdir profiler-daemon/tests/apps/truth truth:application
    python truth.py --oracle        what the interpreter itself says about these functions, as JSON

| request | answer |
|---|---|
| any method on `/a /b /c /d /z` | 200, `burned a` and a checksum |
| POST `/echo` | 200, the length and the CRC of the body it was sent |
| GET `/chunked?n=N` | N pieces without a Content-Length (default 4); on HTTP/1.1 gunicorn sends them chunked |
| GET `/large` | 1 MiB with a Content-Length |
| GET `/sleep?ms=N` | 200 after N ms off the CPU, at most 10 s |
| GET `/empty` | 204 |
| GET `/kill` | head and first piece are sent, then this worker kills itself: the response never ends |
| anything else | 404 |
"""

import json
import os
import signal
import sys
import time
import zlib
from urllib.parse import parse_qs

LARGE_BYTES = 1 << 20
LONGEST_SLEEP_MS = 10_000
MOST_PIECES = 1_000
# Looks random enough that zlib has to work for its output, and is the same in every process.
ZLIB_INPUT = bytes((i * i * 31 + i // 7) % 251 for i in range(1 << 18))


# /a: nothing but a loop.
def burn_a():
    return burn_a_middle(3)


def burn_a_middle(rounds):
    total = 0
    for number in range(rounds):
        total += burn_a_leaf(20_000 + number)
    return total


def burn_a_leaf(turns):
    value = 1
    for i in range(turns):
        value = (value * 31 + i) % 1_000_003
    return value


# /b: a list comprehension, which is a frame of its own up to Python 3.11.
def burn_b():
    return burn_b_middle(4)


def burn_b_middle(rounds):
    return sum(
        burn_b_leaf(number)
        for number in range(rounds)
    )


def burn_b_leaf(salt):
    squares = [
        (i * i + salt) % 977
        for i in range(25_000)
    ]
    return len(squares)


# /c: a generator, suspended and resumed for every value.
def burn_c():
    return burn_c_middle(40_000)


def burn_c_middle(count):
    total = 0
    for value in burn_c_leaf(count):
        total ^= value
    return total


def burn_c_leaf(count):
    for i in range(count):
        step = i * 7
        step ^= i >> 3
        yield step % 8191


# /d: the longest one; a method, a nested function and a dictionary comprehension.
class BurnD:
    def middle(self, rounds):
        def leaf(base):
            table = {
                key: key ^ base
                for key in range(30_000)
            }
            return len(table) + max(table.values())

        return sum(map(leaf, range(rounds)))


def burn_d():
    return BurnD().middle(2)


# /z: the time is in a C extension; the Python frames above it say which route's.
def burn_z():
    return burn_z_middle(6)


def burn_z_middle(level):
    size = 0
    for start in range(2):
        size += burn_z_leaf(start, level)
    return size


def burn_z_leaf(start, level):
    # A view: copying would be time outside zlib.
    return len(zlib.compress(memoryview(ZLIB_INPUT)[start:], level))


BURNERS = {"/a": burn_a, "/b": burn_b, "/c": burn_c, "/d": burn_d, "/z": burn_z}


def burn(name, environ):
    checksum = BURNERS[name]()
    return "200 OK", [f"burned {name[1:]} {checksum}\n".encode()]


def echo(name, environ):
    body = environ["wsgi.input"].read()
    return "200 OK", [f"{len(body)} {zlib.crc32(body)}\n".encode()]


def large(name, environ):
    return "200 OK", [b"x" * LARGE_BYTES]


def sleep(name, environ):
    time.sleep(min(number(environ, "ms", 10), LONGEST_SLEEP_MS) / 1000)
    return "200 OK", [b"slept\n"]


def empty(name, environ):
    return "204 No Content", []


def missing(name, environ):
    return "404 Not Found", [b"no such page\n"]


def chunked(name, environ):
    return "200 OK", (b"piece %d\n" % i for i in range(min(number(environ, "n", 4), MOST_PIECES)))


def kill(name, environ):
    return "200 OK", kill_after_first_piece()


def kill_after_first_piece():
    yield b"the last words of this worker\n"
    os.kill(os.getpid(), signal.SIGKILL)


HANDLERS = dict.fromkeys(BURNERS, burn) | {
    "/echo": echo,
    "/large": large,
    "/sleep": sleep,
    "/empty": empty,
    "/chunked": chunked,
    "/kill": kill,
}


def number(environ, key, default):
    """A whole number from the query string; anything else is the default."""
    value = parse_qs(environ.get("QUERY_STRING", "")).get(key, [""])[0]
    return int(value) if value.isascii() and value.isdigit() else default


def application(environ, start_response):
    started = time.perf_counter_ns()
    cpu_started = time.thread_time_ns()
    name = "/" + environ["PATH_INFO"].split("/")[1]
    status, body = HANDLERS.get(name, missing)(name, environ)
    headers = [("Content-Type", "text/plain")]
    # A list is complete: its length is known. A generator is not, and is sent without one.
    if isinstance(body, list) and not status.startswith("204"):
        headers.append(("Content-Length", str(sum(map(len, body)))))
    # A response to HEAD announces the length and carries no body.
    if environ["REQUEST_METHOD"] == "HEAD":
        body = []
    headers.append(("X-Pid", str(os.getpid())))
    headers.append(("X-Cpu-Ns", str(time.thread_time_ns() - cpu_started)))
    headers.append(("X-Handler-Ns", str(time.perf_counter_ns() - started)))
    start_response(status, headers)
    return body


def code_objects(code):
    """The code object and all those nested in it: comprehensions, generator expressions, inner functions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            yield from code_objects(constant)


def oracle():
    """For every function of this file, what CPython's own tables say: the truth that a profiler is held to."""
    with open(__file__, "rb") as source:
        module = compile(source.read(), os.path.abspath(__file__), "exec")
    return [
        {
            # 3.11 and later; the line table below is 3.10 and later.
            "co_qualname": getattr(code, "co_qualname", None),
            "co_name": code.co_name,
            "co_filename": code.co_filename,
            "co_firstlineno": code.co_firstlineno,
            "lines": sorted({line for _, _, line in code.co_lines() if line}),
        }
        for code in code_objects(module)
        if code.co_name != "<module>"
    ]


def burner_timings():
    """How long each burner takes on this machine, in ms: for tuning the loop counts by hand."""
    timings = {}
    for name, burner in BURNERS.items():
        times = []
        for _ in range(15):
            started = time.perf_counter_ns()
            burner()
            times.append(time.perf_counter_ns() - started)
        timings[name] = sorted(times)[7] / 1e6
    return timings


if __name__ == "__main__":
    if sys.argv[1:] == ["--oracle"]:
        json.dump({"python": sys.version.split()[0], "functions": oracle()}, sys.stdout, indent=1)
    elif sys.argv[1:] == ["--timings"]:
        json.dump(burner_timings(), sys.stdout, indent=1)
    else:
        sys.exit("usage: truth.py --oracle | --timings")
    print()
