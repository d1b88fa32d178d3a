#!/usr/bin/python3
"""Real proxies through their failures: does finrace name each one's cause, find the client behind it and what it got?

Each proxy stands between clients and an upstream that answers, closes without an answer (once, or always), or keeps silent
until it is let go of; at last nobody listens. The truth is the upstream's own log (each attempt: which request, on which
connection, how it ended) and what each client got. finrace is asked for neither.

What a proxy does on its own (retry, notice that a client has left, answer before or after it lets go of the upstream) is
not prescribed here: it shows in that log.
"""

import argparse
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

sys.path.insert(1, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "live"))
from harness import (  # noqa: E402
    Finrace, LIMIT, Net, add_options, check_schema, die_with_parent, main, must, need, wait_for,
)
import reverse_proxies  # noqa: E402
from reverse_proxies import KINDS  # noqa: E402

PATIENCE = 1.0  # seconds that each proxy waits for its upstream
ABORT_AFTER = 0.3  # seconds that an impatient client waits once its request is with the upstream
# Those that retry, answer and let go as docs/design.md has it.
PROXIES = ("nginx", "haproxy", "apache", "lighttpd", "varnish", "caddy", "node")


# ---- the upstream, a process of its own


def serve(address, port, log):
    """Does what a request's path says; one JSON line in `log` for each attempt, when it is over."""
    seen = set()
    lock = threading.Lock()

    def note(**what):
        with lock:
            log.write(json.dumps(what) + "\n")
            log.flush()

    def attempt(connection, peer, head):
        _, path, *_ = head.split()
        _, what, name = path.decode().split("/")
        begun = time.time()
        with lock:
            first = name not in seen
            seen.add(name)
        if what == "close" or (what == "once" and first):
            connection.close()
            note(name=name, port=peer, end="closed", begun=begun, after=time.time() - begun)
            return False
        if what == "hang":
            note(name=name, port=peer, end="under way", begun=begun, after=0)
            connection.settimeout(LIMIT)
            try:
                end = "left" if connection.recv(1) == b"" else "more"
            except OSError:
                end = "left"
            note(name=name, port=peer, end=end, begun=begun, after=time.time() - begun)
            return False
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n")
        note(name=name, port=peer, end="answered", begun=begun, after=time.time() - begun)
        return True

    def converse(connection, peer):
        waiting = b""
        with connection:
            while True:
                while b"\r\n\r\n" not in waiting:
                    try:
                        part = connection.recv(65536)
                    except OSError:
                        return
                    if not part:
                        return
                    waiting += part
                head, _, waiting = waiting.partition(b"\r\n\r\n")
                try:
                    if not attempt(connection, peer, head):
                        return
                except OSError:
                    return

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(256)
    while True:
        connection, peer = listener.accept()
        threading.Thread(target=converse, args=(connection, peer[1]), daemon=True).start()


# ---- clients


@dataclass
class Asked:
    """A client's request: on which port, and what it got (None: nothing, or it left)."""

    name: str
    what: str
    port: int = 0
    status: int | None = None
    begun: float = 0.0
    left: bool = False


def ask(address, port, asked, under_way=None):
    """The client leaves ABORT_AFTER after `under_way()`, if there is one, was true."""
    with socket.create_connection((address, port), LIMIT) as client:
        asked.port = client.getsockname()[1]
        asked.begun = time.time()
        client.sendall(f"GET /{asked.what}/{asked.name} HTTP/1.1\r\nHost: proxy\r\n\r\n".encode())
        if under_way:
            wait_for(under_way, f"the upstream to have {asked.name}")
            time.sleep(ABORT_AFTER)
            asked.left = True
            return asked
        client.settimeout(LIMIT)
        try:
            answer = client.recv(4096)
        except OSError:
            return asked
        if answer.startswith(b"HTTP/1."):
            asked.status = int(answer.split()[1])
    return asked


# They answer their client before they let go of the upstream; on kernels without bpf_rdonly_cast() that is not seen, and why
# they gave up stays unclassified (docs/design.md).
ANSWER_FIRST = ("haproxy", "lighttpd", "node")
SEES_ANSWERS_FIRST = tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (6, 2)


class Stage:
    """One proxy, its upstream and a finrace that watches the connections between the two."""

    def __init__(self, options, net, name, load):
        self.options, self.name, self.kind, self.load = options, name, KINDS[name], load
        self.address = net.address()
        self.port, self.upstream = net.next_port(), net.next_port()
        self.folder = os.path.join(options.folder, f"{name}-{int(load)}")
        os.mkdir(self.folder)
        os.chmod(options.folder, 0o755)
        self.log = os.path.join(self.folder, "upstream.jsonl")
        self.processes = []
        self.asked = []
        self.numbers = itertools.count(1)  # clients are threads

    def start(self, command, environment=None):
        output = open(os.path.join(self.folder, "output"), "ab")  # noqa: SIM115
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=die_with_parent,
                                   env={**os.environ, **(environment or {})}, cwd=self.folder, start_new_session=True)
        output.close()
        self.processes.append(process)
        return process

    def listens(self, port):
        def connects():
            try:
                socket.create_connection((self.address, port), LIMIT).close()
                return True
            except OSError:
                return False

        wait_for(connects, f"{self.name} or its upstream to listen on {port}; see {self.folder}", 180)

    def __enter__(self):
        arguments, environment, _ = reverse_proxies.write(self.kind, self.folder, self.address, self.port,
                                                          [(self.address, self.upstream)], PATIENCE, connect=5)
        with open(self.log, "w", encoding="ascii"):
            pass
        self.server = self.start([sys.executable, os.path.abspath(__file__), "--serve", self.address, str(self.upstream),
                                  self.log])
        self.listens(self.upstream)
        self.start([need(self.kind.program, self.kind.package), *arguments], environment)
        self.listens(self.port)
        self.finrace = Finrace(self.options, "--upstream", f"{self.address}:{self.upstream}")
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait(LIMIT)
        self.finrace.kill()

    def ask(self, what, leaves=False):
        asked = Asked(f"{next(self.numbers)}-{what}", what)
        self.asked.append(asked)

        def under_way():
            return any(one["name"] == asked.name for one in self.log_lines())

        return ask(self.address, self.port, asked, under_way if leaves else None)

    def log_lines(self):
        with open(self.log, encoding="ascii") as file:
            return [json.loads(line) for line in file if line.endswith("\n")]

    def attempts(self):
        return [one for one in self.log_lines() if one["end"] != "under way"]


def cause_of(attempt, asked):
    """What the upstream's log says that an attempt died of; None if it did not."""
    if attempt["end"] == "closed":
        return "upstream_closed"
    if attempt["end"] == "left":
        return "client_abort" if asked.left and attempt["after"] < PATIENCE * 0.9 else "proxy_timeout"
    return None


def prove(options, name, load):
    net = Net()
    with Stage(options, net, name, load) as stage:
        done = threading.Event()

        def go_on():  # others' requests, all answered
            while not done.is_set():
                stage.ask("ok")
                time.sleep(0.02)

        others = [threading.Thread(target=go_on, daemon=True) for _ in range(3 if load else 0)]
        for other in others:
            other.start()
        try:
            for _ in range(options.rounds):
                for what in ("ok", "once", "ok", "close", "ok", "hang", "ok"):
                    stage.ask(what)
                stage.ask("hang", leaves=True)
        finally:
            done.set()
            for other in others:
                other.join(LIMIT)
        wait_for(lambda: all(any(one["name"] == asked.name for one in stage.attempts()) for asked in stage.asked),
                 "the upstream to have seen all requests")
        stage.server.kill()
        stage.server.wait()
        down = stage.ask("ok")
        by_name = {asked.name: asked for asked in stage.asked}
        attempts = stage.attempts()
        failures = [(one, cause_of(one, by_name[one["name"]])) for one in attempts]
        failures = [(one, cause) for one, cause in failures if cause]
        unseen = 0
        if name in ANSWER_FIRST and not SEES_ANSWERS_FIRST:
            unseen = sum(1 for _, cause in failures if cause in ("proxy_timeout", "client_abort"))
        stage.finrace.wait_verdicts(net, len(failures) - unseen + 1)
        time.sleep(1)  # for a verdict too many
        stage.finrace.stop()
        check_schema(stage.finrace)
        missed = compare(stage, failures, attempts, by_name, down)
        must(len(missed) <= unseen, f"no verdict on {missed}")
        must(stage.finrace.health().at("finrace.health.unclassified") == len(missed), "other unclassified ends")


def compare(stage, failures, attempts, by_name, down):
    """The failures without a verdict; raises on any wrong one."""
    verdicts = stage.finrace.verdicts()
    refused = [one for one in verdicts if one.at("finrace.cause") == "connect_refused"]
    verdicts = [one for one in verdicts if one not in refused]
    problems, missed = [], []
    found_clients = found_statuses = without_status = 0
    for attempt, cause in failures:
        asked = by_name[attempt["name"]]
        matching = [one for one in verdicts if one.local[1] == attempt["port"] and
                    attempt["begun"] - 0.5 < one.time < attempt["begun"] + attempt["after"] + 1]
        what = f"{asked.name} on {attempt['port']}, {cause}"
        if not matching:
            missed.append(what)
            continue
        if len(matching) != 1:
            problems.append(f"{what}: {len(matching)} verdicts")
            continue
        verdict = matching[0]
        verdicts.remove(verdict)
        if verdict.at("finrace.cause") != cause:
            problems.append(f"{what}: named {verdict.verdict}")
        outcome = verdict.at("finrace.outcome", {})
        later = [one for one in attempts if one["name"] == asked.name and one["begun"] > attempt["begun"]]
        if "retried" in outcome and outcome["retried"] != bool(later):
            problems.append(f"{what}: retried {outcome['retried']}, but there were {len(later)} later attempts")
        if "client_port" in outcome:
            found_clients += 1
            if outcome["client_port"] != asked.port:
                problems.append(f"{what}: client {outcome['client_port']}, but it was {asked.port} ({outcome})")
        status = verdict.at("http.response.status_code")
        if status is not None and not asked.left:
            found_statuses += 1
            if status != asked.status:
                problems.append(f"{what}: status {status}, but the client got {asked.status}")
        if status is None and not asked.left and asked.status is not None:
            without_status += 1
            print(f"          {what}: no status; {outcome}", flush=True)
    problems += [f"a verdict on no failure: {one.local[1]} {one.verdict} {one.at('finrace.message')}" for one in verdicts]
    statuses = [one.at("http.response.status_code") for one in refused]
    if down.status is None or down.status not in statuses or any(one not in (None, down.status) for one in statuses):
        problems.append(f"down: {len(refused)} refused, statuses {statuses}, the client got {down.status}")
    print(f"          {len(stage.asked)} requests, {len(failures)} failed attempts, {found_clients} clients and "
          f"{found_statuses} statuses found; down: {statuses}", flush=True)
    must(not problems, lambda: "\n          ".join([f"{len(problems)} problems", *problems[:12]]))
    if not stage.load:
        without = len(failures) - len(missed) - found_clients
        must(without == 0, f"{without} failures without their client")
        must(without_status == 0, f"{without_status} failures without the status that their client got")
    return missed


def test(options, results):
    for name in options.proxies.split(","):
        for load in (False, True):
            results.run(f"{name}{', among others' if load else ''}", prove, options, name, load)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    add_options(parser)
    parser.add_argument("--proxies", default=",".join(PROXIES), help="of " + ", ".join(KINDS))
    parser.add_argument("--rounds", type=int, default=3, help="of all failures")
    parser.add_argument("--only", default="*", help="tests by name, with * and ?")
    options = parser.parse_args()
    unknown = [name for name in options.proxies.split(",") if name not in KINDS]
    if unknown:
        parser.error(f"--proxies {unknown[0]}: unknown; accepted: {', '.join(KINDS)}")
    return options


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        with open(sys.argv[4], "a", encoding="ascii") as its_log:
            serve(sys.argv[2], int(sys.argv[3]), its_log)
    sys.exit(main("proxies", parse, test))
