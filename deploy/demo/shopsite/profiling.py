"""A cProfile middleware: one `.prof` file per request, as development servers with a profiler write them.

Only the benchmark switches it on, to have the cost of a deterministic profiler beside that of the others.
"""

import cProfile
import itertools
import os
import time

from django.conf import settings


class CProfileMiddleware:
    def __init__(self, get_response):
        self.get_response = get_response
        self.directory = settings.PROFILE_DIR
        self.numbers = itertools.count()

    def __call__(self, request):
        profiler = cProfile.Profile()
        started = time.perf_counter()
        try:
            return profiler.runcall(self.get_response, request)
        finally:
            milliseconds = round((time.perf_counter() - started) * 1000)
            page = request.path.strip("/").replace("/", ".") or "root"
            name = f"{page}.{milliseconds:06d}ms.{os.getpid()}.{next(self.numbers)}.prof"
            profiler.dump_stats(os.path.join(self.directory, name))
