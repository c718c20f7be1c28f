"""/wait/N in a coroutine, /burn/N too; python with_aiohttp.py PORT"""

import sys

from aiohttp import web

import burning


async def wait(request):
    await request.read()
    return web.Response(text="done", headers=await burning.with_waits(request.match_info["number"]))


async def burn(request):
    await request.read()
    return web.Response(text="done", headers=burning.at_once(request.match_info["number"]))


app = web.Application()
app.add_routes([web.route("*", "/wait/{number}", wait), web.route("*", "/burn/{number}", burn)])
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
