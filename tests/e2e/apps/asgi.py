"""The ASGI application, behind uvicorn (alone or as gunicorn's worker), hypercorn and daphne."""

import asyncio
import os
import signal
import time

from common import LIMIT, MARK, asked, note, pieces, ready

ready()


async def lifespan(receive, send):
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def body_read(receive):
    """False if the client left before its body's end."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return False
        if not message.get("more_body"):
            return True


async def begin_answer(send, status, length):
    await send({"type": "http.response.start", "status": status, "headers": [
        (b"content-type", b"text/plain"), (b"content-length", str(length).encode()), (b"x-app", MARK.encode())]})


async def answer(send, scope, status, parts):
    await begin_answer(send, status, sum(len(part) for part in parts))
    if scope["method"] != "HEAD":
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def transport_of(receive):
    """uvicorn's own transport of this request's connection: ASGI has no word for it, applications find it like this."""
    return receive.__self__.transport


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    what, argument, name = asked(scope["path"])
    note(name, "begin")
    length = next((int(value) for key, value in scope["headers"] if key == b"content-length"), 0)
    if LIMIT and length > LIMIT:
        await answer(send, scope, 413, [b"too large\n"])
        return note(name, "end")
    if not await body_read(receive):
        return None
    if what == "slow":
        await asyncio.sleep(float(argument))
    elif what == "sleep":
        time.sleep(float(argument))
    elif what == "exit":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "close" and argument != "after":
        if argument == "between":
            await begin_answer(send, 200, 3)
        return transport_of(receive).close()
    parts = pieces(what, argument)
    await answer(send, scope, 200 if parts else 404, parts or [b"unknown\n"])
    note(name, "end")
    if what == "close":
        transport_of(receive).close()
    return None
