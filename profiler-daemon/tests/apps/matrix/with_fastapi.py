"""/wait/N in a coroutine, /burn/N in a thread of the pool."""

from fastapi import FastAPI
from fastapi.responses import JSONResponse

import burning

app = FastAPI()


@app.get("/wait/{number}")
async def wait(number: int):
    return JSONResponse({}, headers=await burning.with_waits(number))


@app.get("/burn/{number}")
def burn(number: int):
    return JSONResponse({}, headers=burning.at_once(number))
