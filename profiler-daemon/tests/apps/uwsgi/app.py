"""An application that burns 20 ms of CPU time in a function of its own: the test puts its name for NAME."""

import time

SECONDS = 0.02


def burn_NAME():
    began = time.thread_time()
    total = 0
    while time.thread_time() - began < SECONDS:
        for n in range(2000):
            total += n * n
    return total


def application(environ, start_response):
    burn_NAME()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]
