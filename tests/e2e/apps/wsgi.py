"""The WSGI application, behind gunicorn's sync and gthread workers."""

import os
import signal
import time

from common import LIMIT, MARK, asked, note, pieces, ready

ready()


def app(environ, start_response):
    what, argument, name = asked(environ["PATH_INFO"])
    note(name, "begin")
    status, parts = "200 OK", pieces(what, argument)
    if LIMIT and int(environ.get("CONTENT_LENGTH") or 0) > LIMIT:
        status, parts = "413 Request Entity Too Large", [b"too large\n"]
    else:
        while environ["wsgi.input"].read(65536):
            pass
        if what == "slow":
            time.sleep(float(argument))
        elif what == "exit":
            os.kill(os.getpid(), signal.SIGKILL)
        if parts is None:
            status, parts = "404 Not Found", [b"unknown\n"]
    start_response(status, [("Content-Type", "text/plain"), ("X-App", MARK),
                            ("Content-Length", str(sum(len(part) for part in parts)))])

    def body():
        yield from [b""] if environ["REQUEST_METHOD"] == "HEAD" else parts
        note(name, "end")  # the server asks for more only after it has written all before

    return body()
