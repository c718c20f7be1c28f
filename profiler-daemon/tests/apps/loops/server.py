"""A server that answers each request in a task of its own, as ASGI servers do.

    python server.py PORT [LOOP [CERTIFICATE KEY]]          LOOP: asyncio (default), uvloop

With a certificate it ends TLS itself.

GET /KIND/N burns CPU in functions that no other request has (`own_N`), with awaits in between:

/alone      one task
/gather     three tasks at a time, which have tasks of their own
/thread     in threads of the loop's executor (contexts are copied by hand before 3.9 has to_thread)
/behind     one task, and another that goes on in `own_N` when the response is out
/pool       asks a server by a connection that all requests share; the first one of all has opened it, in its own context,
            and stays for long. What handles the answers burns in `shareds`, which is nobody's

/fetch      asks itself for /inner/N by a new connection with TLS, and burns before and after that
/inner      one task

X-Burned-Ns says how much CPU time it took before the response. All the while a task of nobody's burns in `nobodys`, and
each connection is told about the last one's request by a context variable.
"""

import asyncio
import contextvars
import functools
import pathlib
import socket
import ssl
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from burning import make

STEP = 0.002
STEPS = 6
name = contextvars.ContextVar("name")


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


async def by_tls(burn, number):
    burn(STEP)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
    burn(STEP)
    writer.write(f"GET /inner/{number} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = await reader.readuntil(b"done")
    assert answer.startswith(b"HTTP/1.1 200 "), answer
    burn(STEP)
    writer.close()


class Protocol(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
        self.pending = b""

    def data_received(self, data):
        self.pending += data
        while b"\r\n\r\n" in self.pending:
            head, _, self.pending = self.pending.partition(b"\r\n\r\n")
            # A loop holds no more than a weak reference to it.
            task = asyncio.ensure_future(self.serve(head.split(b" ")[1].decode()))
            kept.add(task)
            task.add_done_callback(kept.discard)

    async def serve(self, path):
        _, kind, number = path.split("/")
        name.set(number)
        burn, burned = make(number if kind != "inner" else f"inner_{number}")
        if kind == "gather":
            await asyncio.gather(*[nested(burn) for _ in range(STEPS // 2)])
        elif kind == "thread":
            await in_threads(burn)
        elif kind == "pool":
            await by_the_shared(burn)
        elif kind == "fetch":
            await by_tls(burn, number)
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


async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Protocol, "127.0.0.1", port, ssl=context)
    kept.add(asyncio.ensure_future(busy()))
    await asyncio.get_running_loop().create_future()
    server.close()


if __name__ == "__main__":
    port, context = int(sys.argv[1]), None
    if sys.argv[2:3] == ["uvloop"]:
        import uvloop

        uvloop.install()
    if len(sys.argv) > 3:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*sys.argv[3:5])
        trusting = ssl.create_default_context(cafile=sys.argv[3])
        trusting.check_hostname = False
    asyncio.run(main())
