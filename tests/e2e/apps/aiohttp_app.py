"""aiohttp's server with its application: aiohttp_app.py ADDRESS PORT [KEEP-ALIVE]."""

import asyncio
import os
import signal
import sys
import time

from aiohttp import web
from common import LIMIT, MARK, asked, note, pieces, ready


async def handle(request):
    what, argument, name = asked(request.path)
    note(name, "begin")
    try:
        await request.read()
    except web.HTTPRequestEntityTooLarge as refusal:
        refusal.headers["X-App"] = MARK
        note(name, "end")
        raise
    if what == "slow":
        await asyncio.sleep(float(argument))
    elif what == "sleep":
        time.sleep(float(argument))
    elif what == "exit":
        os.kill(os.getpid(), signal.SIGKILL)
    parts = pieces(what, argument)
    response = web.StreamResponse(status=200 if parts else 404, headers={"X-App": MARK})
    parts = parts or [b"unknown\n"]
    response.content_length = sum(len(part) for part in parts)
    await response.prepare(request)
    if request.method != "HEAD":
        for part in parts:
            await response.write(part)
    await response.write_eof()
    note(name, "end")
    return response


async def started(_):
    ready()


app = web.Application(client_max_size=LIMIT)
app.router.add_route("*", "/{path:.*}", handle)
app.on_startup.append(started)
options = {"keepalive_timeout": float(sys.argv[3])} if len(sys.argv) > 3 else {}
web.run_app(app, host=sys.argv[1], port=int(sys.argv[2]), print=None, **options)
