"""/wait/N in a coroutine, /burn/N in a thread of the pool."""

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse

import burning

app = FastAPI()


@app.api_route("/wait/{number}", methods=["GET", "POST"])
async def wait(number: int, request: Request):
    await request.body()
    return JSONResponse({}, headers=await burning.with_waits(number))


async def read(request: Request):
    await request.body()


@app.api_route("/burn/{number}", methods=["GET", "POST"], dependencies=[Depends(read)])
def burn(number: int):
    return JSONResponse({}, headers=burning.at_once(number))
