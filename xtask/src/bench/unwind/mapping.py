"""Maps the files that its standard input names, a path a line, as code; prints how many, and waits."""

import mmap
import signal
import sys

kept = []
for path in sys.stdin.read().split("\n"):
    try:
        with open(path, "rb") as file:
            prot = mmap.PROT_READ | mmap.PROT_EXEC
            kept.append(mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=prot))
    except (OSError, ValueError):
        pass
print(len(kept), flush=True)
signal.pause()
