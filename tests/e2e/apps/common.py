"""What the Python applications here share: their log, their readiness, and what a path asks for.

A line of the log is one write to a descriptor in append mode, so that the lines of several workers never mix.
"""

import json
import os
import time

LIMIT = int(os.environ.get("APP_BODY_LIMIT") or 0)  # bytes; 0: none
MARK = "1"  # of X-App, which a proxy's own error page lacks
PIECE = b"x" * 65536

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_log = os.open(os.environ["APP_LOG"], APPEND, 0o644)


def note(name, event):
    os.write(_log, (json.dumps({"time": time.time(), "id": name, "event": event}) + "\n").encode())


def ready():
    """This process has loaded its application: it is a worker."""
    file = os.open(os.environ["APP_LOG"] + ".workers", APPEND, 0o644)
    os.write(file, f"{os.getpid()}\n".encode())
    os.close(file)


def asked(path):
    """/WHAT/ID or /WHAT/ARGUMENT/ID: (what, argument, id)."""
    what, *rest = path.strip("/").split("/")
    return what, rest[0] if len(rest) > 1 else "", rest[-1] if rest else ""


def pieces(what, argument):
    """The body that answers a path, in parts; None for a path that is not known."""
    if what in ("ok", "slow", "sleep", "close", "exit"):
        return [b"ok\n"]
    if what == "big":
        whole, rest = divmod(int(argument), len(PIECE))
        return [PIECE] * whole + [PIECE[:rest]] * bool(rest)
    return None
