"""A server with a thread for each connection that ends TLS itself.

server.py PORT CERTIFICATE KEY

| target | answer |
|---|---|
| `/burn/N` | burns CPU in a function that no other request has |
| `/fetch/N` | the same, in between asks itself for `/inner/N`, by TLS |
| `/inner/N` | burns too |
| `/sized/N` | `N` bytes |

X-Burned-Ns says how much CPU time a request took before its response.
"""

import http.client
import http.server
import pathlib
import ssl
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from burning import make, told

port, certificate, key = int(sys.argv[1]), sys.argv[2], sys.argv[3]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        # Here and not where it is accepted: the handshake is made by the first read.
        self.request = context.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
        super().setup()

    def do_GET(self):
        kind, number = self.path[1:].split("/")
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body, burned = b"ok", []
        if kind == "sized":
            body = b"x" * int(number)
        else:
            burn, burned = make(number if kind != "inner" else f"inner_{number}")
            burn(0.006)
            if kind == "fetch":
                fetch(f"/inner/{number}")
                burn(0.006)
        self.send_response(200)
        self.send_header("Content-Length", len(body))
        for name, value in told(burned).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass


def fetch(target):
    client = http.client.HTTPSConnection("127.0.0.1", port, context=trusting)
    client.request("GET", target)
    answer = client.getresponse()
    assert (answer.status, answer.read()) == (200, b"ok")
    client.close()


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
trusting = ssl.create_default_context(cafile=certificate)
trusting.check_hostname = False
Server(("127.0.0.1", port), Handler).serve_forever()
