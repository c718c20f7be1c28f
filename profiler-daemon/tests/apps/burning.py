"""Functions that burn CPU, one for each request, so that whose time was seen as whose can be told."""

import time

kept = []
# Where the clock jumps further, the host has taken the CPU: that counts for the thread, but nothing ran, and no sample can
# have been taken.
JUMP = 0.003


def make(name):
    """A function that no other request has (`own_NAME`), and how much CPU time each of its calls took."""
    source = f"""
def own_{name}(seconds):
    begin = last = clock()
    jumped = 0
    while last < begin + seconds:
        now = clock()
        if now - last > JUMP:
            jumped += now - last
        last = now
    burned.append(last - begin - jumped)
"""
    scope = {"clock": time.thread_time, "burned": [], "JUMP": JUMP}
    exec(compile(source, "made.py", "exec"), scope)
    # It lives on: a name is read when the request is over.
    kept.append(scope[f"own_{name}"])
    return scope[f"own_{name}"], scope["burned"]


def told(burned):
    return {"X-Burned-Ns": str(int(sum(burned) * 1e9))}


async def with_waits(number):
    import asyncio

    burn, burned = make(number)
    for _ in range(5):
        burn(0.002)
        await asyncio.sleep(0.001)
    return told(burned)


def at_once(number):
    burn, burned = make(number)
    burn(0.010)
    return told(burned)
