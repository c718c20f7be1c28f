"""The server of the recorded conversation: every byte of its answers is known beforehand.

One thread, one connection at a time, the standard library's own HTTP server without the headers that change from run
to run. So whoever reads this file can work out by hand what a recording of it must say. A handler that answers in
pieces writes each with a call of its own.

    python3.11 server.py

On its standard output it says, a line each: what a reader of the recording needs to know (JSON: its port and pid, and
where the code objects of the burning functions are), and `waiting` when it has read the request for /wait.

| request | answer |
|---|---|
| GET, HEAD `/plain` | 200, `plain` |
| GET `/first`, `/second` | 200, `first` or `second` |
| GET `/chunked` | 200, three chunks and the last one, each written by itself |
| DELETE `/item/7` | 204 |
| POST `/upload` | 200, the length of the body it was sent |
| GET `/burn/a`, `/burn/b` | 200 after work in functions that the other does not call |
| GET `/wait` | waits until the client is gone, then tries to answer |
| GET `/cut` | 200, announces 1,000 bytes, sends 4 and closes |
| GET `/kill` | 200, announces 1,000 bytes, sends 5 and kills itself |
| anything else | 404, `missing` |
"""

import json
import os
import select
import signal
from http.server import BaseHTTPRequestHandler, HTTPServer


def burn_a():
    return burn_a_leaf(3_000_000)


def burn_a_leaf(turns):
    value = 1
    for i in range(turns):
        value = (value * 31 + i) % 1_000_003
    return value


def burn_b():
    return burn_b_leaf(3_000_000)


def burn_b_leaf(turns):
    value = 1
    for i in range(turns):
        value = (value * 17 + i) % 1_000_033
    return value


BURNERS = [burn_a, burn_a_leaf, burn_b, burn_b_leaf]


def say(text):
    print(text, flush=True)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def parse_request(self):
        # An empty line before a request is to be ignored (RFC 9112, 2.2); the library takes it for the end.
        if self.raw_requestline == b"\r\n":
            self.raw_requestline = self.rfile.readline(65537)
        return super().parse_request()

    def head(self, status, *headers):
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def text(self, body, status=200):
        self.head(status, ("Content-Length", len(body)))
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if path in ("/plain", "/first", "/second"):
            self.text(f"{path[1:]}\n".encode())
        elif path == "/chunked":
            self.head(200, ("Transfer-Encoding", "chunked"))
            for part in (b"one\n", b"two\n", b"three\n", b""):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        elif path == "/burn/a":
            burn_a()
            self.text(b"a\n")
        elif path == "/burn/b":
            burn_b()
            self.text(b"b\n")
        elif path == "/wait":
            self.wait_until_alone()
            self.text(b"too late\n")
        elif path == "/cut":
            self.head(200, ("Content-Length", 1000))
            self.wfile.write(b"cut\n")
            self.close_connection = True
        elif path == "/kill":
            self.head(200, ("Content-Length", 1000))
            self.wfile.write(b"last\n")
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            self.text(b"missing\n", 404)

    do_HEAD = do_GET

    def do_DELETE(self):
        self.head(204)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.text(f"{len(body)}\n".encode())

    def wait_until_alone(self):
        poll = select.poll()
        poll.register(self.connection, select.POLLHUP | select.POLLERR)
        say("waiting")
        poll.poll()


class Server(HTTPServer):
    # /wait fails, as it should.
    def handle_error(self, *_):
        pass


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    code = {function.__name__: id(function.__code__) for function in BURNERS}
    say(json.dumps({"port": server.server_port, "pid": os.getpid(), "code": code}))
    server.serve_forever()
