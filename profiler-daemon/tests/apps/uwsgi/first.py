"""An application that burns 20 ms of CPU time in a function of its own name."""

import time

SECONDS = 0.02


def burn_first():
    began = time.thread_time()
    total = 0
    while time.thread_time() - began < SECONDS:
        for n in range(2000):
            total += n * n
    return total


def application(environ, start_response):
    burn_first()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]
