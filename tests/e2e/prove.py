#!/usr/bin/python3
"""The proving ground: real proxies in front of real servers, through accidents, with a truth that owes nothing to finrace.

Each pairing of a proxy and a server stands at the two ends of a delay line. What happened to a request is known from four
witnesses: the client, the wire on the proxy's side (wire.attempts), the proxy's own log, the application's own log. truth.py
joins them, says for each attempt what it may be called, and holds finrace's verdicts beside that: wrong, missed, on a
success. A check is one accident of one pairing. It fails as well if a proxy's own error has no cause on the wire and none
that the proxy names ("no live upstreams"), or if the witnesses contradict each other. --captures holds the live verdicts
beside finrace's live report, its recording and a capture from each end, and the reports of these (both_ends.py).

  prove.py --list                                       pairings and accidents
  prove.py --pairs 'nginx+uvicorn' --timers short       one pairing, quickly
  prove.py --table table.md                             all of them, with the servers' own idle timers
"""

import argparse
import asyncio
import dataclasses
import fnmatch
import functools
import itertools
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(1, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "live"))
import both_ends  # noqa: E402
import harness  # noqa: E402
import json  # noqa: E402
import reverse_proxies  # noqa: E402
import servers  # noqa: E402
import truth  # noqa: E402
import wire  # noqa: E402
from harness import EnvironmentProblem, Finrace, Wrong, add_options, die_with_parent, main, must, need, wait_for  # noqa: E402
from proxy_lab import listens  # noqa: E402

PATIENCE = 2.0  # seconds that each proxy waits for its upstream; above wire.SILENCE, so that silence can be told
CLIENT_LIMIT = 40.0
SHORT_KEEP_ALIVE = 2
LONGEST_SHORT = 10  # a timer that can't be told and is longer is not waited for with --timers short
DELAY = 0.005
BODY_LIMIT = 65536
# uvicorn: send_400_response() of protocols/http/httptools_impl.py and h11_impl.py.
SERVERS_WORDS = (b"Invalid HTTP request received.",)
# Where a worker takes one request at a time, or few: enough for what runs at once here.
WORKERS = {"gunicorn-sync": 8, "gunicorn-gthread": 4, "puma": 4, "php-fpm": 24}
CROWD = 24  # clients at once where a timer is raced
START_LIMIT = 180.0


# ---- the line, and what stands at its ends -------------------------------------------------------------------------------


class Line:
    """A delay line with addresses of its own: finrace watches the whole host, and others have lines as well."""

    def __init__(self, options):
        net = f"10.{random.randrange(80, 120)}.{random.randrange(1, 256)}."
        self.left_address, self.right_address = net + "1", net + "2"
        self.control = os.path.join(options.folder, "line.sock")
        name = f"finrace-prove-{os.getpid()}"
        self.left, self.right = f"{name}-left", f"{name}-right"
        self.process = subprocess.Popen(
            [options.delay_line, "--left", self.left, "--right", self.right, "--left-address", self.left_address,
             "--right-address", self.right_address, "--delay", f"{DELAY * 1e3:g}ms", "--control", self.control],
            stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
        words = self.process.stdout.readline()
        if not words.startswith("ready"):
            raise EnvironmentProblem(f"{options.delay_line} did not become ready: {words!r}")
        wait_for(lambda: os.path.exists(self.control), "the line's control socket")

    def tell(self, order):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(self.control)
            sock.sendall(order.encode() + b"\n")
            answer = sock.makefile().readline().strip()
        must(answer.startswith("ok"), f"delay-line refused {order!r}: {answer}")

    def path(self, name):
        return f"/run/netns/{name}"

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Clients:
    """An event loop in the proxy's namespace: a namespace belongs to a thread."""

    def __init__(self, path):
        self.loop = asyncio.new_event_loop()
        self.problem = None
        ready = threading.Event()

        def thread():
            try:
                with open(path, "rb") as namespace:
                    harness.checked(harness.libc.setns(namespace.fileno(), harness.CLONE_NEWNET), "setns")
            except OSError as problem:
                self.problem = problem
            finally:
                ready.set()
            if not self.problem:
                self.loop.run_forever()

        self.thread = threading.Thread(target=thread, daemon=True)
        self.thread.start()
        ready.wait()
        if self.problem:
            raise self.problem

    def run(self, coroutine, limit):
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(limit)
        except TimeoutError:
            future.cancel()
            raise Wrong(f"not over within {limit:.0f} s") from None

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)


@dataclass
class Pairing:
    proxy: str
    server: str
    accidents: list | None = None  # None: all that the server is capable of
    upstreams: int = 1
    label: str = ""
    proxy_options: dict = field(default_factory=dict)
    server_flags: tuple = ()  # behind the server's own command

    @property
    def name(self):
        return f"{self.proxy}+{self.server}{self.label}"

    @property
    def kind(self):
        kind = servers.SERVERS[self.server]
        if not self.server_flags:
            return kind
        return dataclasses.replace(kind, prepare=lambda server: [[*one, *self.server_flags] for one in kind.prepare(server)])


class Stage:
    """One proxy, its server(s), a capture between the two and a finrace over both."""

    def __init__(self, options, line, pairing, number):
        self.options, self.line, self.pairing = options, line, pairing
        self.kind = pairing.kind
        self.proxy_kind = reverse_proxies.KINDS[pairing.proxy]
        self.folder = os.path.join(options.folder, re.sub(r"[^\w+.-]", "-", pairing.name))
        self.recording = os.path.join(self.folder, "recording")
        os.mkdir(self.folder)
        os.chmod(options.folder, 0o755)
        os.chmod(self.folder, 0o777)
        self.proxy_port = 18000 + number
        self.ports = [20000 + 4 * number + one for one in range(pairing.upstreams)]
        self.keep_alive = self.kind.default_keep_alive
        self.asked_keep_alive = None
        if options.timers == "short" and "keep_alive" in self.kind.capabilities:
            self.asked_keep_alive = SHORT_KEEP_ALIVE
            self.keep_alive = SHORT_KEEP_ALIVE + self.kind.late * (pairing.server == "node")
        self.random = random.Random(pairing.name)
        self.asks, self.begun, self.processes = [], [], []
        self.numbers = itertools.count(1)
        self.server_numbers = itertools.count(1)
        self.application_logs = []
        self.servers = []
        self.captures = {}
        self.clients = self.finrace = self.diagnosis = None
        self.timer = None  # (shortest, longest) idle time that the wire showed
        self.blocking_calls = ThreadPoolExecutor(1)
        # Its one thread begins here, in the host's namespace, and outlives what it starts (PR_SET_PDEATHSIG).
        self.blocking_calls.submit(lambda: None).result()

    def __enter__(self):
        try:
            self.build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def build(self):
        self.make_servers()
        self.capture()
        # What a proxy opens as it starts is seen as well.
        self.flags = [flag for port in self.ports for flag in ("--upstream", f"{self.line.right_address}:{port}")]
        recorded = []
        if self.options.captures:
            recorded = ["--record", self.recording]
            self.diagnosis = harness.Diagnosis(self.options, *self.options.backend_flags, *self.flags, "--for", "24h",
                                               preexec_fn=die_with_parent)
            self.diagnosis.wait_ready()
        self.finrace = Finrace(self.options, *self.flags, *recorded)
        self.start_proxy()
        self.clients = Clients(self.line.path(self.line.left))

    def __exit__(self, *_):
        if self.clients:
            self.clients.close()
        if self.finrace:
            self.finrace.kill()
        if self.diagnosis:
            self.diagnosis.kill()
        for server in self.servers:
            try:
                self.blocking_calls.submit(server.stop).result(60)
            except Exception as problem:  # the next pairing has ports of its own
                print(f"          {self.pairing.name}: the server did not stop: {problem}", flush=True)
        for process in reversed(self.processes):
            # SIGTERM first: squid would leave shared memory behind.
            for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, harness.LIMIT)):
                try:
                    os.killpg(process.pid, number)
                    process.wait(patience)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    pass
        for capture in self.captures.values():
            capture.kill()
        self.blocking_calls.shutdown(wait=False)

    # -- its parts

    def make_servers(self, **changes):
        def make():
            made = []
            for port in self.ports:
                folder = os.path.join(self.folder, f"server-{next(self.server_numbers)}")
                os.mkdir(folder)
                os.chmod(folder, 0o777)
                server = servers.Server(self.kind, self.line.right_address, port, folder, netns=self.line.path(self.line.right),
                                        keep_alive=self.asked_keep_alive, workers=WORKERS.get(self.kind.name, 1), **changes)
                self.servers.append(server)
                self.application_logs.append(server.log)
                server.start()
                made.append(server)
            return made

        self.servers = []
        self.servers = self.blocking_calls.submit(make).result(START_LIMIT)

    @property
    def server(self):
        return self.servers[0]

    def start(self, command, log="output", environment=None):
        output = open(os.path.join(self.folder, log), "ab")  # noqa: SIM115
        process = subprocess.Popen(
            [need("nsenter", "util-linux"), f"--net={self.line.path(self.line.left)}", "--", *command], stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, preexec_fn=die_with_parent, env={**os.environ, **(environment or {})},
            cwd=self.folder, start_new_session=True)
        output.close()
        self.processes.append(process)
        return process

    def capture(self):
        self.capture_path = Path(self.folder) / "wire.pcap"
        ports = " or ".join(f"tcp port {port}" for port in self.ports)
        # tcpdump's buffer is made of frames of -s bytes, and the line takes no larger packets than 1500 bytes.
        self.captures["left"] = both_ends.Capture(
            self.line.left, self.capture_path, what=f"{ports} or tcp port {both_ends.LAST_PORT}",
            flags=("-s", "1600", "-B", "32768", "--immediate-mode", "--time-stamp-precision=nano"))
        if self.options.captures:
            self.captures["right"] = both_ends.Capture(self.line.right, os.path.join(self.folder, "right.pcap"))

    def text(self, name):
        with open(os.path.join(self.folder, name), encoding="utf-8", errors="replace") as file:
            return file.read()

    def start_proxy(self):
        kind = self.proxy_kind
        arguments, environment, companion = reverse_proxies.write(
            kind, self.folder, "127.0.0.1", self.proxy_port, [(self.line.right_address, port) for port in self.ports], PATIENCE,
            **self.pairing.proxy_options)
        self.proxy = self.start([need(kind.program, kind.package), *arguments], environment=environment)

        def up():
            must(self.proxy.poll() is None, lambda: f"{self.pairing.proxy} ended with {self.proxy.returncode}: "
                                                    f"{self.text('output')[-800:]}")
            return listens(self.proxy.pid, self.proxy_port)

        wait_for(up, f"{self.pairing.proxy} to listen; see {self.folder}", START_LIMIT)
        if companion:
            self.start([need(companion[0], kind.package), *companion[1:]], log="companion")

    # -- what accidents do

    async def blocking(self, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self.blocking_calls, function, *arguments)

    def busy(self, seconds):
        """A path that takes so long, on servers with an application of ours."""
        return f"/slow/{seconds}" if "slow" in self.kind.paths else "/ok"

    async def ask(self, path, method="GET", size=0, leave_after=None):
        """`path` has no id: that is added."""
        name = f"{self.accident}-{next(self.numbers)}"
        ask = truth.Ask(name, self.accident, method, f"{path}/{name}")
        self.asks.append(ask)
        writer = None
        ask.sent = time.time()
        try:
            async with asyncio.timeout(CLIENT_LIMIT):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy_port)
                ask.port = writer.get_extra_info("sockname")[1]
                head = f"{method} {ask.path} HTTP/1.1\r\nHost: lab\r\nX-Request-Id: {name}\r\nConnection: close\r\n"
                if method == "POST":
                    head += f"Content-Length: {size}\r\nContent-Type: application/octet-stream\r\n"
                writer.write(head.encode() + b"\r\n" + b"x" * size)
                if leave_after is not None:
                    done, _ = await asyncio.wait([asyncio.ensure_future(reader.read(1))], timeout=leave_after)
                    if not done:
                        ask.left = time.time()
                        writer.transport.abort()
                        return ask
                answer = await reader.read(-1)
                ask.done = time.time()
                self.understand(ask, answer)
        except (OSError, TimeoutError, ValueError, IndexError, asyncio.IncompleteReadError) as problem:
            ask.done = time.time()
            ask.trouble = f"{type(problem).__name__}: {problem}"
        finally:
            ask.done = ask.done or time.time()
            if writer is not None:
                writer.close()
        return ask

    @staticmethod
    def understand(ask, answer):
        head, found, body = answer.partition(b"\r\n\r\n")
        if not found:
            ask.trouble = "closed without an answer"
            return
        lines = head.lower().split(b"\r\n")
        ask.status = int(lines[0].split(b" ")[1])
        headers = dict(line.partition(b":")[::2] for line in lines[1:])
        ask.application = b"x-app" in headers
        ask.server = any(words in body for words in SERVERS_WORDS)
        if b"content-length" in headers:
            ask.whole = len(body) >= int(headers[b"content-length"])
        elif b"chunked" in headers.get(b"transfer-encoding", b""):
            ask.whole = body.endswith(b"0\r\n\r\n")
        else:
            ask.whole = True

    async def load(self, count, clients=8, path=0.02, pause=0.004, until=None):
        """`count` exchanges, or as many as come until `until` is set, by several clients. `path`: or how long each takes."""
        path = path if isinstance(path, str) else self.busy(path)
        left = itertools.count()

        async def client(number):
            while next(left) < count and not (until and until.is_set()):
                method = ("GET", "POST")[(number + len(self.asks)) % 2]
                ask = await self.ask(path, method, 200 if method == "POST" else 0)
                await asyncio.sleep(pause if ask.application else max(pause, 0.05))  # a server that is down is one accident

        await asyncio.gather(*(client(number) for number in range(clients)))

    async def meanwhile(self, action, before=0.5, after=0.5, **load):
        """`action` in the middle of load."""
        over = asyncio.Event()
        task = asyncio.ensure_future(self.load(100000, until=over, **load))
        try:
            await asyncio.sleep(before)
            await action()
            await asyncio.sleep(after)
        finally:
            over.set()
            await task

    async def revive(self, limit=START_LIMIT):
        """Until the servers are ready again: a guard starts them anew."""
        for server in self.servers:
            await self.blocking(server.wait_ready, limit)

    async def renew(self, **changes):
        """Other servers, in folders of their own."""
        for server in self.servers:
            await self.blocking(server.stop)
        await asyncio.to_thread(self.make_servers, **changes)

    async def prime(self, count, hold=0.3):
        """`count` connections to the upstream that idle from now on."""
        await asyncio.sleep(0)
        return await asyncio.gather(*(self.ask(self.busy(hold)) for _ in range(count)))

    def connections(self):
        found = []
        for port in self.ports:
            found += wire.read(self.capture_path, port)
        return found

    # -- the run

    def play(self, accident, count):
        self.accident = accident.name
        self.begun.append((time.time(), accident.name))
        before = self.unclassified()
        try:
            self.clients.run(accident.run(self, count), accident.limit)
        finally:
            self.line.tell("drop none")
            if accident.renews:
                self.clients.run(self.renew(), START_LIMIT)
        self.settle()
        return self.unclassified() - before

    def settle(self):
        """Until what happened is in finrace's counts: sockets that were let go of end a few round trips later."""
        time.sleep(0.3)
        for _ in range(2):
            self.finrace.next_health()

    def unclassified(self):
        last = {}
        for record in self.finrace.records("finrace.upstream"):
            if record.at("finrace.side", "client") == "client":
                last[record.peer] = int(record.at("finrace.upstream.unclassified", 0))
        return sum(last.values())

    def uncounted(self, joined, verdicts, accident):
        """Findings: what ended, without a verdict, while finrace counted something as unclassified that was not to be."""
        judged = {one.local + one.peer for one in verdicts}
        last, found = {}, []
        for arrived, record in ((one.arrived, one) for one in self.finrace.records("finrace.upstream") if one.client):
            count = int(record.at("finrace.upstream.unclassified", 0))
            if count > last.get(record.peer, 0) and self.accident_at(arrived - 0.5) == accident:
                for connection in joined.connections:
                    if connection.key not in judged and connection.segments and (
                            arrived - 2.5 <= connection.segments[-1].time <= arrived + 0.1):
                        attempt = next(reversed(joined.on[id(connection)]), None)
                        if attempt is None or not joined.expected(attempt).unclassified:
                            found.append(truth.Finding("unclassified, perhaps", "\n    ".join(
                                [str(attempt or connection.key), *truth.segments(connection, connection.segments[-1].time)])))
            last[record.peer] = count
        return found

    def accident_at(self, when):
        return next((name for begun, name in reversed(self.begun) if when >= begun - 0.05), self.begun[0][1])

    def end(self):
        """Stops everything whose words are evidence; (Truth, verdicts)."""
        time.sleep(truth.LATE)
        if self.options.captures:
            # They do not end at one moment: what idles closes before.
            time.sleep(1.5 * self.asked_keep_alive + self.kind.late if self.asked_keep_alive else 0)
            both_ends.tell_the_time(self.line.left, self.line.right_address)
            time.sleep(0.5)
            _, self.report, _ = self.diagnosis.end(signal.SIGINT)
        self.finrace.stop()
        for capture in self.captures.values():
            capture.stop()
        self.flush_logs()
        application = []
        for path in self.application_logs:
            if os.path.exists(path):
                with open(path, encoding="utf-8", errors="replace") as file:
                    application += [json.loads(line) for line in file if line.endswith("\n")]
        joined = truth.Truth(self.asks, self.connections(), application, list(self.proxy_kind.read_log(self.folder)),
                             backend=self.options.backend, keep_alive=self.keep_alive if self.kind.persists else None,
                             logs_begin=self.kind.logs_begin, late=self.kind.late, patience=PATIENCE,
                             violent=[one.name for one in ACCIDENTS.values() if one.violent],
                             killing={one.name: one.kills for one in ACCIDENTS.values()}, purges=self.kind.purges,
                             calls_off=self.proxy_kind.calls_off, disconnects=self.proxy_kind.disconnects)
        verdicts = [one for one in self.finrace.verdicts() if one.client and one.local[0] == self.line.left_address
                    and one.peer[1] in self.ports]
        return joined, verdicts

    def flush_logs(self):
        """A proxy's log may lag: until the last requests that got an answer stand in it, or a moment has passed."""
        wanted = {ask.id for ask in self.asks if ask.status}
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if wanted <= {name for name, _ in self.proxy_kind.read_log(self.folder)}:
                return
            time.sleep(0.1)


# ---- accidents -----------------------------------------------------------------------------------------------------------


@dataclass
class Accident:
    name: str
    run: object
    text: str
    needs: tuple = ()  # capabilities of the server
    reuses: bool = False  # needs a proxy that keeps connections
    default: bool = True  # for every pairing
    renews: bool = False  # leaves a server with other settings behind
    violent: bool = False  # ends servers' connections, idle ones as well, at any time
    kills: bool | None = False  # the servers' processes, which close nothing themselves; None: perhaps
    fails: bool = False  # at least one request to the server, whatever proxy and server: else the accident did not happen
    limit: float = 300.0


ACCIDENTS = {}


def accident(text, **more):
    def register(function):
        name = function.__name__.replace("_", "-")
        ACCIDENTS[name] = Accident(name, function, text, **more)
        return function
    return register


@accident("healthy load: GET and POST, small and large, from many clients at once")
async def healthy(stage, count):
    left = itertools.count()

    async def client(number):
        while (turn := next(left)) < count:
            what = (turn + number) % 5
            if what == 0:
                await stage.ask("/big/100000")
            elif what == 1:
                await stage.ask("/ok", "POST", 20000)
            elif what == 2:
                await stage.ask(stage.busy(0.05))
            else:
                await stage.ask("/ok", ("GET", "POST")[what - 3], (0, 300)[what - 3])

    await asyncio.gather(*(client(number) for number in range(16)))


@accident("requests around the server's idle timer", needs=("timer",), reuses=True, limit=900)
async def idle(stage, count):
    since = time.time()
    await stage.prime(16)

    def closed():
        found = [connection for connection in stage.connections() if (connection.peer_close() is not None and
                                                                      connection.peer_close().time > since)]
        return [one for one in (connection.idle_before_close() for connection in found) if one is not None and
                one > stage.keep_alive / 2]

    deadline = time.monotonic() + stage.keep_alive * 1.2 + 5
    idles = []
    while time.monotonic() < deadline and len(idles) < 8:
        await asyncio.sleep(0.25)
        idles = await stage.blocking(closed)
    if len(idles) < 4:
        raise Wrong(f"the server closed {len(idles)} of its idle connections within {stage.keep_alive * 1.2 + 5:.1f} s")
    await asyncio.sleep(0.3)
    idles = sorted(await stage.blocking(closed))
    shortest, longest = idles[len(idles) // 8], idles[-1 - len(idles) // 8]
    stage.timer = shortest, longest

    async def one(number, low, high):
        await asyncio.sleep(0.002 * number)
        primed = await stage.ask(stage.busy(0.3))
        await asyncio.sleep(max(0.0, primed.done + stage.random.uniform(low, high) - time.time()))
        # Busy for a while, so that the next request takes another of the idle connections.
        method = ("POST", "POST", "GET")[number % 3]
        return await stage.ask(stage.busy(0.3), method, 120 if method == "POST" else 0)

    low, high = shortest - 2 * DELAY - 0.02, longest + 0.005
    for _ in range(max(1, round(count / CROWD))):
        await asyncio.gather(*(one(number, low, high) for number in range(CROWD)))


@accident("a worker dies: killed from outside, and by its own hand", needs=("crash",), violent=True, kills=True, fails=True)
async def crash(stage, _):
    async def kill():
        await stage.blocking(stage.server.kill_worker)
        await asyncio.sleep(0.3)
        await stage.revive()

    async def itself():
        if "exit" in stage.kind.paths:
            await stage.ask("/exit")
        await asyncio.sleep(0.3)
        await stage.revive()

    for _ in range(2):
        await stage.meanwhile(kill, path=0.05)
        await stage.meanwhile(itself, path=0.05)


# A second SIGTERM meets Python with the signal's default handler, as it ends (gunicorn).
@accident("a graceful reload under load, or a stop and a start where there is none", violent=True, kills=None)
async def reload(stage, _):
    async def again():
        await stage.blocking(stage.server.reload if "reload" in stage.kind.capabilities else stage.server.restart)
        await asyncio.sleep(0.5)
        try:
            await stage.revive(4)
        except servers.ServerError:
            pass  # it goes on with its busy connections for as long as these are busy (Node.js)

    for path in ("/ok", 0.05, 0.3):
        await stage.meanwhile(again, path=path, before=0.6)
        await stage.revive()


@accident("workers that end themselves after so many requests", needs=("max_requests",), renews=True, violent=True)
async def recycling(stage, count):
    await stage.renew(max_requests=30)
    await stage.load(max(120, min(count, 300), 45 * WORKERS.get(stage.kind.name, 1)), pause=0.02)
    await stage.revive()


@accident("bodies beyond the server's limit", needs=("body_limit",), renews=True, violent=True)
async def too_large(stage, _):
    await stage.renew(body_limit=BODY_LIMIT)
    for size in (BODY_LIMIT * 2, 1000000, 3000000):
        await asyncio.gather(*(stage.ask("/ok", "POST", size) for _ in range(3)), stage.ask("/ok", "POST", 1000))


@accident("handlers that take longer than the proxy waits", needs=("slow",), fails=True)
async def timeout(stage, _):
    await asyncio.gather(*(stage.ask(f"/slow/{PATIENCE + 2}", ("GET", "POST")[number % 2], 100 * (number % 2))
                           for number in range(6)), stage.load(20))
    await asyncio.sleep(2.5)


@accident("clients that leave before the answer", needs=("slow",))
async def leaving(stage, _):
    await stage.prime(8, 0.1)
    await asyncio.gather(*(stage.ask("/slow/1.2", ("GET", "POST")[number % 2], 100 * (number % 2), leave_after=0.3)
                           for number in range(8)), stage.load(20))
    await asyncio.sleep(1.5)


@accident("nobody listens", violent=True, kills=None, fails=True)
async def down(stage, _):
    async def out():
        for server in stage.servers:
            await stage.blocking(server.stop)
        await asyncio.sleep(0.3)
        await stage.renew()

    await stage.meanwhile(out, clients=4, pause=0.05)


@accident("the path swallows idle connections, and new ones", reuses=True, fails=True)
async def black_hole(stage, _):
    await stage.prime(6)
    await asyncio.sleep(1.0)
    for port in stage.ports:
        await stage.blocking(stage.line.tell, f"drop both port {port}")
    await asyncio.gather(*(stage.ask("/ok", ("GET", "POST")[number % 2], 100 * (number % 2)) for number in range(6)))
    await asyncio.sleep(0.5)
    await stage.blocking(stage.line.tell, "drop none")
    await asyncio.sleep(1.0)


def closing(when):
    async def run(stage, _):
        for number in range(6):
            await asyncio.gather(stage.ask(f"/close/{when}", ("GET", "POST")[number % 2], 100 * (number % 2)), stage.load(4))
    return run


for _when, _what in (("before", "before its answer begins"), ("between", "between an answer's head and its body"),
                     ("after", "right after its answer")):
    ACCIDENTS[f"close-{_when}"] = Accident(f"close-{_when}", closing(_when), f"a handler closes its transport {_what}",
                                           needs=("close",), fails=_when != "after")


@accident("a synchronous sleep past the proxy's time-out holds the whole loop", default=False, fails=True)
async def sleeping(stage, _):
    await asyncio.gather(stage.ask(f"/sleep/{PATIENCE + 1.5}"), stage.load(12, pause=0.2))
    await asyncio.sleep(2)


@accident("more requests at once than the proxy has connections for", default=False)
async def too_many(stage, _):
    await asyncio.gather(*(stage.ask("/slow/0.6") for _ in range(40)))


@accident("more requests at once than the server takes", default=False)
async def saturated(stage, _):
    await asyncio.gather(*(stage.ask("/slow/0.5", ("GET", "POST")[number % 2], 100 * (number % 2)) for number in range(40)))


@accident("connections wait in the server's accept queue, and do not get into it", default=False)
async def queueing(stage, _):
    await asyncio.gather(stage.ask(f"/sleep/{PATIENCE * 2 + 0.5}"), *(stage.ask("/ok", "POST", 100) for _ in range(40)))
    await asyncio.sleep(PATIENCE + 1)


@accident("bursts, with pauses shorter and longer than the server's timer", default=False, needs=("timer",), limit=900)
async def sparse(stage, count):
    await stage.prime(12)
    await asyncio.sleep(stage.keep_alive + 1.5)
    for _ in range(max(4, count // 12)):
        burst = await asyncio.gather(*(stage.ask("/slow/0.1", "POST", 64) for _ in range(12)))
        pause = stage.keep_alive * stage.random.choice((0.3, 0.8, 1.0, 1.0, 1.0, 1.5))
        await asyncio.sleep(max(0.0, burst[-1].done + pause + stage.random.uniform(-4, 0) * DELAY - time.time()))


@accident("two raced requests bench both upstreams", default=False, needs=("timer",), limit=900)
async def benched(stage, _):
    await idle(stage, CROWD * 2)
    for _ in range(20):
        await stage.ask("/ok")
        await asyncio.sleep(0.05)


# ---- pairings ------------------------------------------------------------------------------------------------------------


def pairings():
    found = {}

    def add(*arguments, **more):
        pairing = Pairing(*arguments, **more)
        found.setdefault(pairing.name, pairing)

    for proxy in reverse_proxies.KINDS:
        add(proxy, "uvicorn")
    for proxy in ("nginx", "haproxy"):
        for server in servers.SERVERS:
            add(proxy, server)
    incident = ["close-before", "close-between", "close-after", "sleeping", "leaving"]
    if "fastapi" in servers.SERVERS:
        add("nginx", "fastapi", incident, label=" closing")
    add("nginx", "uvicorn", ["too-many"], label=" few-connections", proxy_options={"connections": 40})
    add("nginx", "uvicorn", ["saturated"], label=" limited", server_flags=("--limit-concurrency", "8"))
    for proxy in ("nginx", "haproxy"):
        add(proxy, "uvicorn", ["queueing"], label=" short-queue", server_flags=("--backlog", "4"))
    add("haproxy", "uvicorn", ["sparse"], label=" no-idle-limit")
    if "gunicorn-uvicorn" in servers.SERVERS:
        add("haproxy", "gunicorn-uvicorn", ["sparse"], label=" no-idle-limit")
    add("nginx", "uvicorn", ["benched"], upstreams=2, label=" benched", proxy_options={"benching": "max_fails=1"})
    return found


def accidents_of(pairing, options):
    kind, wanted = servers.SERVERS[pairing.server], options.accidents
    capabilities = set(kind.capabilities | kind.paths)
    short = options.timers == "short"
    timer = kind.default_keep_alive
    if kind.persists and (short and "keep_alive" in capabilities or timer is not None and not (short and timer > LONGEST_SHORT)):
        capabilities.add("timer")
    for name in pairing.accidents or [name for name, one in ACCIDENTS.items() if one.default]:
        one = ACCIDENTS[name]
        if (wanted is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)) and (
                set(one.needs) <= capabilities) and not (one.reuses and not reverse_proxies.KINDS[pairing.proxy].reuses):
            yield one


# ---- seen in other ways --------------------------------------------------------------------------------------------------


def check_recorded(stage, results):
    """The live verdicts beside the live report, the recording and its report, each capture and its report."""
    def check(name, function, *arguments, **more):
        results.run(f"{stage.pairing.name}, {name}", functools.partial(function, *arguments, **more))

    options, flags = stage.options, stage.flags
    live = [one for one in stage.finrace.verdicts() if one.client]
    named = harness.named(live)
    if live:
        check("recorded: judged again, byte for byte", harness.check_replay, stage.finrace, [stage.recording], flags)
    _, recorded, said = harness.diagnose(options, *flags, stage.recording)
    must("warning" not in said, said)
    check("recorded: what was named is in its report", harness.check_findings, named, recorded)
    check("live: what was named is in the report", harness.check_findings, named, stage.report)
    check("live: the same pools as recorded", both_ends.check_pools, recorded, stage.report)
    # A server may speak to itself, as Tomcat does to end: that does not come to the proxy's end.
    own = stage.line.right_address
    alone = sum(connection.key[0] == own and connection.established is not None
                for port in stage.ports for connection in wire.read(Path(stage.captures["right"].path), port))
    connections = stage.connections()
    riding = [connection.key for connection in connections for _ in wire.behind_uploads(wire.attempts(connection))]
    both_reset = {connection.key for connection in connections
                  if {segment.outgoing for segment in connection.segments if segment.flags & wire.RST} == {True, False}}
    compared = 0
    seen_better = set()
    for end in both_ends.ENDS:
        where, path = f"captured at the {both_ends.WHOSE[end]}", stage.captures[end].path
        lines, _ = both_ends.records_of(options, path, flags)
        captured = both_ends.verdicts_of(lines)
        due = [one for one in live if end == "right" or one.local[0] != own]
        found = both_ends.compare(both_ends.by_connection(due), captured, end, riding, both_reset)
        compared += found.same + len(found.excused)
        seen_better |= found.seen_better()
        check(f"{where}: the same verdicts", both_ends.check_same, found)
        print(f"          {found}", flush=True)
        _, report, _ = harness.diagnose(options, *flags, path)
        check(f"{where}: what was named is in its report", harness.check_findings,
              harness.named(itertools.chain(*captured.values())), report)
        check(f"{where}: the same pools as recorded", both_ends.check_pools, recorded, report, found.unseen(), seen_better,
              found.counted_apart(), alone if end == "left" else 0, len(riding))
        check(f"{where}: whole, and taken there", both_ends.check_place, report, end)
    must(compared or not live, "nothing was compared")


# ---- the table -----------------------------------------------------------------------------------------------------------


COLUMNS = ("exchanges", "failures", "verdicts", "wrong", "missed", "on success", "unclassified", "not observable",
           "without a cause")


def cells(tally):
    return [tally.exchanges, tally.failures, tally.verdicts, tally.wrong, tally.missed, tally.on_success, tally.unclassified,
            tally.unobservable, tally.unexplained]


def counts(found):
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items(), key=lambda one: -one[1])) or "none"


def table(rows):
    lines = ["| pairing | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    whole = truth.Tally()
    for name, tally in rows:
        whole.add(tally)
        lines.append(f"| {name} | " + " | ".join(map(str, cells(tally))) + " |")
    lines.append("| **all** | " + " | ".join(f"**{count}**" for count in cells(whole)) + " |")
    return "\n".join(lines)


def run_pairing(options, line, pairing, number, results):
    accidents = list(accidents_of(pairing, options))
    whole = truth.Tally()
    if not accidents:
        return whole
    started = time.monotonic()
    tallies = {one.name: truth.Tally() for one in accidents}
    problems, took = {}, {}
    try:
        with Stage(options, line, pairing, number) as stage:
            for one in accidents:
                begun = time.monotonic()
                try:
                    tallies[one.name].counted = stage.play(one, options.exchanges)
                except (Wrong, OSError, subprocess.SubprocessError, servers.ServerError) as problem:
                    problems[one.name] = f"{type(problem).__name__}: {problem}"
                    if options.verbose:
                        traceback.print_exc()
                    stage.clients.run(stage.renew(), START_LIMIT)
                took[one.name] = time.monotonic() - begun
            joined, verdicts = stage.end()
            truth.judge(joined, verdicts, tallies, stage.accident_at)
            for name, tally in tallies.items():
                if tally.counted is not None and tally.counted > tally.highest:
                    tally.findings += stage.uncounted(joined, verdicts, name)
    except EnvironmentProblem:
        raise
    except (Wrong, OSError, subprocess.SubprocessError, servers.ServerError) as problem:
        where = traceback.extract_tb(problem.__traceback__)[-1]
        results.note(pairing.name, f"{type(problem).__name__}: {problem}\n          at "
                                   f"{os.path.basename(where.filename)}:{where.lineno}")
        return whole
    for one in accidents:
        tally = tallies[one.name]
        whole.add(tally)
        harmless = "no request failed: the accident did not happen" if one.fails and not tally.failures else None
        problem = "; ".join(filter(None, (problems.get(one.name), harmless, tally.problem())))
        results.note(f"{pairing.name}, {one.name}", problem or None, took.get(one.name))
        print(f"          clients: {counts(tally.statuses)}\n          truth: {counts(tally.kinds)}\n"
              f"          finrace: {counts(tally.causes)}; unclassified {tally.counted}; {tally.clients} clients named, "
              f"{tally.answers} answers"
              + (f"; {tally.benched} clients by upstream_benched" if tally.benched else "")
              + (f"\n          the proxy's own failures: {counts(tally.explained)}" if tally.explained else ""), flush=True)
        for finding in tally.findings[:options.details]:
            print(f"    -- {finding.what}: {finding.text}", flush=True)
    print(f"{pairing.name}: " + ", ".join(f"{count} {name}" for name, count in zip(COLUMNS, cells(whole)))
          + f"  ({time.monotonic() - started:.0f} s)", flush=True)
    if options.captures:
        results.run(f"{pairing.name}, recorded and captured", check_recorded, stage, results)
        whole.compared = len(stage.finrace.verdicts())
    return whole


def test(options, results):
    chosen = [one for name, one in pairings().items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in
                                                              options.pairs.split(","))]
    if not chosen:
        raise EnvironmentProblem(f"--pairs {options.pairs}: no such pairing; see --list")
    if not os.access(options.delay_line, os.X_OK):
        raise EnvironmentProblem(f"{options.delay_line} is missing: build it first (cmake --preset release)")
    print(f"prove: {len(chosen)} pairings, {options.timers} timers, finrace by {options.backend_name}", flush=True)
    rows, compared = [], 0
    line = Line(options)
    try:
        for number, pairing in enumerate(chosen):
            tally = run_pairing(options, line, pairing, number, results)
            if not tally.exchanges:
                continue  # it did not come to its end, which is a failure; a row of zeros would look like a success
            rows.append((pairing.name, tally))
            compared += tally.compared
            if options.table:  # at once: a run of hours may be ended before its time
                Path(options.table).write_text(table(rows) + "\n", encoding="utf-8")
    finally:
        line.close()
        if rows:
            print("\n" + table(rows) + "\n", flush=True)
    if options.captures:
        results.note(f"{compared} verdicts were held beside captures", None if compared else "no accident was named at all")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    add_options(parser)
    parser.add_argument("--delay-line", default=os.path.join(harness.ROOT, "build", "delay-line"))
    parser.add_argument("--pairs", default="*", help="of --list, with * and ?, separated by commas (default: all)")
    parser.add_argument("--accidents", help="of --list, with * and ?, separated by commas (default: all that fit)")
    parser.add_argument("--exchanges", type=int, default=300, help="healthy ones for each pairing (default: 300)")
    parser.add_argument("--timers", choices=("default", "short"), default="default",
                        help=f"the servers' own idle timers, or {SHORT_KEEP_ALIVE} s where they can be told")
    parser.add_argument("--captures", action="store_true",
                        help="hold the live report, a recording and a capture from each end beside the live verdicts")
    parser.add_argument("--table", help="file for the table, in Markdown")
    parser.add_argument("--details", type=int, default=6, help="findings shown for each check")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--list", action="store_true", help="show pairings and accidents, run nothing")
    options = parser.parse_args()
    if options.captures and options.backend != "cgroup":
        parser.error("--captures: trace sees more than packets tell; accepted with --backend cgroup")
    options.accidents = options.accidents.split(",") if options.accidents else None
    if options.list:
        for name, pairing in pairings().items():
            print(f"{name:38}  {' '.join(one.name for one in accidents_of(pairing, options))}")
        print()
        for one in ACCIDENTS.values():
            print(f"{one.name:14} {one.text}")
        sys.exit(0)
    return options


if __name__ == "__main__":
    sys.exit(main("prove", parse, test))
