"""The same application as asgi.py's, as FastAPI's users write it; the log and the limit are a middleware."""

import asyncio
import os
import signal
import time

from common import LIMIT, MARK, asked, note, pieces, ready
from fastapi import FastAPI, Request, Response

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
app = FastAPI()


class Notes:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        what, argument, name = asked(scope["path"])
        note(name, "begin")
        length = next((int(value) for key, value in scope["headers"] if key == b"content-length"), 0)
        if LIMIT and length > LIMIT:
            await Response("too large\n", 413, headers={"X-App": MARK})(scope, receive, send)
        else:
            await self.app(scope, receive, send)
        if what != "close" or argument == "after":
            note(name, "end")


app.add_middleware(Notes)


def transport_of(request):
    return request.receive.__self__.transport


class Closing(Response):
    """Closes the connection's transport by itself: before, between or after the parts of the response."""

    def __init__(self, when, request):
        super().__init__("ok\n", headers={"X-App": MARK})
        self.when, self.request = when, request

    async def __call__(self, scope, receive, send):
        if self.when == "between":
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        elif self.when == "after":
            await super().__call__(scope, receive, send)
        transport_of(self.request).close()


def ok():
    return Response("ok\n", headers={"X-App": MARK})


@app.api_route("/ok/{name}", methods=METHODS)
async def at_once(name: str, request: Request):
    await request.body()
    return ok()


@app.api_route("/slow/{seconds}/{name}", methods=METHODS)
async def slow(seconds: float, name: str, request: Request):
    await request.body()
    await asyncio.sleep(seconds)
    return ok()


@app.api_route("/sleep/{seconds}/{name}", methods=METHODS)
async def sleep(seconds: float, name: str, request: Request):
    await request.body()
    time.sleep(seconds)
    return ok()


@app.api_route("/exit/{name}", methods=METHODS)
async def leave(name: str, request: Request):
    await request.body()
    os.kill(os.getpid(), signal.SIGKILL)


@app.api_route("/big/{size}/{name}", methods=METHODS)
async def big(size: int, name: str, request: Request):
    await request.body()
    return Response(b"".join(pieces("big", size)), headers={"X-App": MARK})


@app.api_route("/close/{when}/{name}", methods=METHODS)
async def close(when: str, name: str, request: Request):
    await request.body()
    return Closing(when, request)


ready()
