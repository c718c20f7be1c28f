"""Functions that burn CPU, one for each request, so that whose time was seen as whose can be told."""

import time

kept = []


def make(number):
    """A function that no other request has (`own_N`), and what it took so far."""
    source = f"""
def own_{number}(seconds):
    begin = clock()
    while clock() < begin + seconds:
        pass
    burned.append(clock() - begin)
"""
    scope = {"clock": time.thread_time, "burned": []}
    exec(compile(source, "made.py", "exec"), scope)
    # It lives on: a name is read when the request is over.
    kept.append(scope[f"own_{number}"])
    return scope[f"own_{number}"], scope["burned"]


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
