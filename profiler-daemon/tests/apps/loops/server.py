"""A server that answers each request in a task of its own, as ASGI servers do.

    python server.py PORT [LOOP]          LOOP: asyncio (default), uvloop

GET /KIND/N burns CPU in functions that no other request has (`own_N`), with awaits in between:

/alone      one task
/gather     three tasks at a time, which have tasks of their own
/thread     in threads of the loop's executor (contexts are copied by hand before 3.9 has to_thread)
/behind     one task, and another that goes on in `own_N` when the response is out
/pool       asks a server by a connection that all requests share; the first one of all has opened it, in its own context,
            and stays for long. What handles the answers burns in `shareds`, which is nobody's

X-Burned-Ns says how much CPU time it took before the response. All the while a task of nobody's burns in `nobodys`, and
each connection is told about the last one's request by a context variable.
"""

import asyncio
import contextvars
import functools
import socket
import sys
import threading
import time

STEP = 0.002
STEPS = 6
name = contextvars.ContextVar("name")


def make(number):
    """A function that burns CPU, and adds up how much."""
    source = f"""
def own_{number}(seconds):
    begin = clock()
    until = begin + seconds
    while clock() < until:
        pass
    burned.append(clock() - begin)
"""
    burned = []
    scope = {"clock": time.thread_time, "burned": burned}
    exec(compile(source, "made.py", "exec"), scope)
    # It lives on: a name is read when the request is over.
    kept.add(scope[f"own_{number}"])
    return scope[f"own_{number}"], burned


async def rounds(burn, count):
    for _ in range(count):
        burn(STEP)
        await asyncio.sleep(0.001)


async def nested(burn):
    await asyncio.gather(rounds(burn, 1), asyncio.ensure_future(rounds(burn, 1)))


async def in_threads(burn):
    loop = asyncio.get_running_loop()
    for _ in range(STEPS):
        context = contextvars.copy_context()
        await loop.run_in_executor(None, functools.partial(context.run, burn, STEP))


async def behind(burn):
    await asyncio.sleep(0.005)
    await rounds(burn, STEPS)


class Shared(asyncio.Protocol):
    """The connection that all share."""

    transport = None
    waiting = []

    def connection_made(self, transport):
        Shared.transport = transport

    def data_received(self, data):
        for _ in data:
            shareds(STEP / 2)
            self.waiting.pop(0).set_result(None)


def echo(listener):
    connection, _ = listener.accept()
    while data := connection.recv(4096):
        connection.sendall(data)


async def by_the_shared(burn):
    loop = asyncio.get_running_loop()
    opened = Shared.transport is None
    if opened:
        Shared.transport = False
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=echo, args=(listener,), daemon=True).start()
        await loop.create_connection(Shared, *listener.getsockname())
    for _ in range(STEPS):
        burn(STEP)
        while not Shared.transport:
            await asyncio.sleep(0.001)
        Shared.waiting.append(loop.create_future())
        Shared.transport.write(b"x")
        await Shared.waiting[-1]
    if opened:
        await asyncio.sleep(2)


class Protocol(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
        self.pending = b""

    def data_received(self, data):
        self.pending += data
        while b"\r\n\r\n" in self.pending:
            head, _, self.pending = self.pending.partition(b"\r\n\r\n")
            asyncio.ensure_future(self.serve(head.split(b" ")[1].decode()))

    async def serve(self, path):
        _, kind, number = path.split("/")
        name.set(number)
        burn, burned = make(number)
        if kind == "gather":
            await asyncio.gather(*[nested(burn) for _ in range(STEPS // 2)])
        elif kind == "thread":
            await in_threads(burn)
        elif kind == "pool":
            await by_the_shared(burn)
        else:
            await rounds(burn, STEPS)
        assert name.get() == number
        body = b"done"
        taken = int(sum(burned) * 1e9)
        if kind == "behind":
            kept.add(asyncio.ensure_future(behind(burn)))
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nX-Burned-Ns: {taken}\r\n\r\n"
        self.transport.write(head.encode() + body)


kept = set()


def shareds(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def nobodys(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


async def busy():
    while True:
        nobodys(STEP / 2)
        await asyncio.gather(asyncio.sleep(0.004), asyncio.sleep(0.001))


async def main(port):
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Protocol, "127.0.0.1", port)
    kept.add(asyncio.ensure_future(busy()))
    await asyncio.get_running_loop().create_future()
    server.close()


if __name__ == "__main__":
    if sys.argv[2:] == ["uvloop"]:
        import uvloop

        uvloop.install()
    asyncio.run(main(int(sys.argv[1])))
