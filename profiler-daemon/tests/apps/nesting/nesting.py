"""A server of the standard library alone that knows how its own calls are nested, on CPython 3.8 to 3.14.

Each route burns CPU at the end of one chain of calls, in which every function has a single call site:

| route | on the way to its leaf |
|---|---|
| /calls | plain calls |
| /sorted | `sorted` with a key function, twice: C that calls Python |
| /generator | a generator that delegates to another, and a `for` over it |
| /extension | a C extension that calls back (`json` with an object hook) |
| /made | an `__init__`, called so often that calls of it are specialised |
| /deep | 200 calls of one function |
| /deepest | 235 calls of one function, 256 frames in all at most |
| /released | zlib, which lets go of the GIL while it works |

`GET /ROUTE/N` burns and answers with what came of it. `GET /truth/ROUTE` answers, as JSON, with the chain of frames as the
interpreter itself sees it in that route's leaf, outermost first, and for each the lines that its function has. Every
connection is served by a thread of its own.

Further routes are no honest stacks. `/bottomless` calls one function 700 times; the others write, while their leaf burns,
something else in the place of the link from its frame to its caller's, where frames are linked:

| route | the link leads |
|---|---|
| /cyclic | back to the leaf's own frame |
| /wild | to where nothing is |
| /shims | to the interpreter's own frame between the leaf and C, and from there to itself (3.12 and later) |

`/native` goes from Python into a C function that calls itself 400 times: a library for that may be named.

    python nesting.py PORT [LIBRARY]
"""

import dis
import gc
import itertools
import json
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DEPTH = 200
DEEPEST = 235
NATIVE = 400
BOTTOMLESS = 700
TURNS = 40_000
# Looks random enough that zlib has to work for its output.
ZLIB_INPUT = bytes((i * i * 31 + i // 7) % 251 for i in range(1 << 19))
TEXT = json.dumps({"outer": {"inner": 1}})

# Set in a thread whose next leaf is to say how it was reached.
asked = threading.local()


def lines_of(code):
    if hasattr(code, "co_lines"):
        return {line for _, _, line in code.co_lines() if line}
    return {line for _, line in dis.findlinestarts(code)}


def reached():
    """Called by a leaf: remembers its chain of callers if that was asked for."""
    if not getattr(asked, "wanted", False):
        return
    frame, chain = sys._getframe(1), []
    while frame is not None:
        code = frame.f_code
        chain.append(
            {
                "name": getattr(code, "co_qualname", code.co_name),
                "file": code.co_filename,
                "first_line": code.co_firstlineno,
                "line": frame.f_lineno,
                "lines": sorted(lines_of(code) | {code.co_firstlineno}),
            }
        )
        frame = frame.f_back
    asked.chain = chain[::-1]
    asked.wanted = False


def calls():
    return calls_middle()


def calls_middle():
    return calls_leaf()


def calls_leaf():
    """Byte code that the interpreter's loop runs without calling anything, but for the iterator."""
    reached()
    one, two = 1, 2
    for _ in itertools.repeat(None, TURNS * 6):
        one, two = two, one
    return one


def by_sorting():
    return sorted([1], key=sorted_outer)


def sorted_outer(item):
    return sorted([item], key=sorted_leaf)


def sorted_leaf(item):
    reached()
    value = item
    for i in range(TURNS):
        value = (value * 31 + i) % 1_000_003
    return value


def generated():
    total = 0
    for value in generator_outer():
        total += value
    return total


def generator_outer():
    yield from generator_leaf()


def generator_leaf():
    reached()
    value = 1
    for i in range(TURNS):
        value = (value * 31 + i) % 1_000_003
    yield value


class Hook:
    def __call__(self, found):
        if "inner" in found:
            return self.leaf()
        return found

    def leaf(self):
        reached()
        value = 1
        for i in range(TURNS):
            value = (value * 31 + i) % 1_000_003
        return value


def extended():
    return json.loads(TEXT, object_hook=Hook())


class Made:
    def __init__(self):
        self.value = made_leaf()


def made_leaf():
    reached()
    value = 1
    for i in range(400):
        value = (value * 31 + i) % 1_000_003
    return value


def made():
    value = 0
    for _ in range(TURNS // 400):
        value += Made().value
    return value


def deep():
    return descend(DEPTH)


def deepest():
    return descend(DEEPEST)


def bottomless():
    return descend(BOTTOMLESS)


def descend(left):
    if left:
        return descend(left - 1)
    return deep_leaf()


def deep_leaf():
    reached()
    value = 1
    for i in range(TURNS):
        value = (value * 31 + i) % 1_000_003
    return value


def released():
    return released_leaf()


def released_leaf():
    reached()
    return len(zlib.compress(ZLIB_INPUT, 6))


def native():
    return native_leaf()


def native_leaf():
    reached()
    return library.descend(NATIVE)


def linked(frame):
    """Address of a frame that the interpreter walks by, and of the word in it that leads to the caller's."""
    address = id(frame)
    if sys.version_info < (3, 11):
        return address, address + 24
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(address + 24)
        inner = int.from_bytes(memory.read(8), sys.byteorder)
    return inner, inner + (48 if sys.version_info < (3, 12) else 8)


def cyclic():
    address, link = linked(sys._getframe())
    return burn_with(link, address)


def burn_with(link, value):
    """Burns with a word of memory changed that leads to this frame's caller's caller."""
    gc.disable()
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(link)
        honest = memory.read(8)
        memory.seek(link)
        memory.write(value.to_bytes(8, sys.byteorder))
        result = 1
        for i in range(TURNS):
            result = (result * 31 + i) % 1_000_003
        memory.seek(link)
        memory.write(honest)
    gc.enable()
    return result


def wild():
    _, link = linked(sys._getframe())
    return burn_with(link, 16)


def shims():
    return sorted([1], key=shims_leaf)


def shims_leaf(_):
    _, link = linked(sys._getframe())
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(link)
        shim = int.from_bytes(memory.read(8), sys.byteorder)
    return burn_with(shim + 8, shim)


ROUTES = {
    "calls": calls,
    "sorted": by_sorting,
    "generator": generated,
    "extension": extended,
    "made": made,
    "deep": deep,
    "deepest": deepest,
    "released": released,
}
FORGED = {"bottomless": bottomless, "cyclic": cyclic, "wild": wild, "shims": shims}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        first, second = self.path.strip("/").split("/")
        wanted = first == "truth"
        if wanted:
            asked.wanted = True
        route = second if wanted else first
        body = str(self.burn(ROUTES.get(route) or FORGED[route])).encode()
        if wanted:
            body = json.dumps(asked.chain).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def burn(self, route):
        return route()

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    if len(sys.argv) > 2:
        import ctypes

        library = ctypes.CDLL(sys.argv[2])
        ROUTES["native"] = native
    # Calls are specialised before anything is measured.
    for function in ROUTES.values():
        for _ in range(3):
            function()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
