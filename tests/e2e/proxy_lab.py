"""A proxy lab: real nginx in front of a real upstream, many clients near the upstream's idle timer, and the truth.

The end-to-end test (nginx_race.py) and the demo (proxy_demo.py) share this one implementation.

How a failed request is matched with a verdict, exactly: nginx's error log names the request (its `*N` is the access
log's $connection, and each request has a client connection of its own), but not the local port of the upstream
connection. The capture on the proxy's side does: every request carries a unique X-Request-Id through nginx to the
upstream, so the segment that holds it names the connection, all four of its address and port. A verdict and a failed
request belong together when these four are equal and the verdict lies between the close on the wire and nginx
noticing it, with a second of slack at both ends. One case has no segment: the connection was reset before nginx
wrote. Each client has an nginx upstream of its own with room for one idle connection, so that connection is the one
that carried the same client's request before.
"""

import asyncio
import ctypes
import ipaddress
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import wire

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "/usr/bin/python3"

# Pauses end by readiness; these bound them, with room for an emulated machine without KVM.
STARTUP_SECONDS = 180
REQUEST_SECONDS = 60
STOP_SECONDS = 30
POLL_SECONDS = 0.05

MATCH_SECONDS = 1.0
LOCAL_WINDOW = 0.003

TCP_ESTABLISHED, TCP_CLOSE_WAIT, TCP_LISTEN = 1, 8, 10  # Linux, include/net/tcp_states.h

_libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET, PR_SET_PDEATHSIG = 0x40000000, 1


class LabError(Exception):
    """The environment, not what is tested: exit code 2."""


def need(command: str, package: str) -> str:
    path = shutil.which(command, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin")
    if path is None:
        raise LabError(f"{command} was not found: apt-get install {package}")
    return path


def wait_for(what: str, ready, seconds: float = STARTUP_SECONDS, child: "Child | None" = None):
    """Polls until ready() gives something true; a child that ended meanwhile is an error with its last words."""
    end = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        value = ready()
        if value:
            return value
        effort = time.monotonic() - asked
        if child is not None and child.process.poll() is not None:
            raise LabError(f"{child.name} ended with {child.process.returncode} before {what}:\n{child.last_words()}")
        if time.monotonic() > end:
            words = f":\n{child.last_words()}" if child is not None else ""
            raise LabError(f"{what}: not within {seconds:.0f} s{words}")
        time.sleep(max(POLL_SECONDS, 5 * effort))  # asking must not slow down what is waited for


class Child:
    """A process that doesn't outlive this one, with its output in files of the lab's directory."""

    def __init__(self, lab: "Lab", name: str, command: list, netns: str | None = None, stop=signal.SIGTERM,
                 stdin=subprocess.DEVNULL, stdout=None, stderr=None, env=None):
        self.name, self.stop_signal = name, stop
        self.stdout_path, self.stderr_path = lab.directory / f"{name}.out", lab.directory / f"{name}.err"
        if netns is not None:
            command = [need("nsenter", "util-linux"), f"--net={netns}", "--", *command]
        parent = os.getpid()

        def tie_to_parent():  # survives exec; nsenter execs the command
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        with ExitStack() as files:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdin=stdin, env=env, cwd=lab.directory,
                stdout=stdout if stdout is not None else files.enter_context(open(self.stdout_path, "wb")),
                stderr=stderr if stderr is not None else files.enter_context(open(self.stderr_path, "wb")),
                start_new_session=True, preexec_fn=tie_to_parent)
        lab.stack.callback(self.stop)

    def last_words(self) -> str:
        text = ""
        for path in (self.stdout_path, self.stderr_path):
            if path.exists():
                text += path.read_text(errors="replace")
        return "\n".join("  " + line for line in text.splitlines()[-15:]) or "  (it said nothing)"

    def stop(self, seconds: float = STOP_SECONDS) -> int:
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self.process.poll() is None:
            self.process.send_signal(self.stop_signal)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode


@dataclass
class Exchange:
    """One POST through the proxy: what the client asked and got, and what nginx wrote about it."""

    id: str
    client: int
    race: bool  # spaced around the timer; otherwise it opens or warms the connection
    previous: str | None  # the same client's request before
    sent: float = 0.0
    done: float = 0.0
    status: int = 0  # what the client got; 0: no response
    trouble: str = ""
    log: dict = field(default_factory=dict)  # nginx's access log
    error: str = ""  # nginx's error log
    avoided: str = ""  # the same, where nginx noticed before it wrote, and answered from another connection
    evidence: wire.Evidence | None = None

    @property
    def failed(self) -> bool:
        """nginx's own word: an error line about the upstream."""
        return bool(self.error)

    @property
    def connection(self):
        return self.evidence.connection if self.evidence else None

    @property
    def time(self) -> float:
        """When nginx noticed and answered."""
        return float(self.log.get("msec", self.done))

    @property
    def earliest(self) -> float:
        """When the end came to the proxy's host; on a machine that stands still nginx notices much later."""
        return min(self.time, self.evidence.ended or self.time)


@dataclass
class Verdict:
    record: dict

    def get(self, path: str, default=None):
        value = self.record
        for part in path.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def connection(self) -> tuple:
        def address(end):
            text = self.get(f"network.{end}.address", "0.0.0.0")
            parsed = ipaddress.ip_address(text)
            mapped = getattr(parsed, "ipv4_mapped", None)
            return str(mapped or parsed)

        return (address("local"), self.get("network.local.port"), address("peer"), self.get("network.peer.port"))

    @property
    def time(self) -> float:
        return parse_time(self.get("timestamp", "1970-01-01T00:00:00Z"))

    def __str__(self):
        parts = (self.get(f"finrace.{name}") for name in ("cause", "variant", "certainty"))
        return " ".join(str(part) for part in parts if part)


def parse_time(text: str) -> float:
    """RFC 3339 with up to nine digits of a second; datetime knows six."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)", text)
    if not match:
        raise ValueError(f"not an RFC 3339 time: {text!r}")
    zone = "+00:00" if match[3] == "Z" else match[3]
    return datetime.fromisoformat(match[1] + zone).timestamp() + float(match[2] or 0)


def match(failures: list, verdicts: list, seconds: float = MATCH_SECONDS):
    """Pairs by connection and time; returns (pairs, failures without a verdict, verdicts without a failure)."""
    left = {}
    for verdict in sorted(verdicts, key=lambda verdict: verdict.time):
        left.setdefault(verdict.connection, []).append(verdict)
    pairs, missing = [], []
    for failure in sorted(failures, key=lambda failure: failure.time):
        candidates = left.get(failure.connection, [])
        near = [verdict for verdict in candidates
                if failure.earliest - seconds <= verdict.time <= failure.time + seconds]
        if near:
            best = min(near, key=lambda verdict: abs(verdict.time - failure.time))
            candidates.remove(best)
            pairs.append((failure, best))
        else:
            missing.append(failure)
    return pairs, missing, [verdict for rest in left.values() for verdict in rest]


def never_sent(exchange: Exchange) -> bool:
    """nginx's write met a connection that had been reset: no byte of the request reached the wire.

    Rare (the reset must come within one turn of nginx's event loop). A backend that sees packets can't know of such a
    request, so a verdict on it is right but can't be demanded; the callers count and show these.
    """
    return exchange.evidence is not None and exchange.evidence.kind == "unsent"


# What finrace may call what the wire shows: cause, and the beginning of the variant (None: any).
ALLOWED = {
    "crossed": [("keepalive_race", "fin_crossed")],
    "stale": [("stale_reuse", None)],
    "fin_acknowledged": [("keepalive_race", "fin_lingering")],
    "reset_crossed": [("keepalive_race", "reset_crossed")],
    "reset_unread": [("keepalive_race", "reset_unread")],
    "reset_bare": [("keepalive_race", "reset_closed")],
    "unsent": [("keepalive_race", "reset_"), ("stale_reuse", None)],
}


# Where the request was acknowledged, only the idle time tells a race from an upstream that failed; see stalled().
OTHERWISE = {"fin_acknowledged": "upstream_closed", "reset_unread": "upstream_reset"}


def disagreement(exchange: Exchange, verdict: Verdict) -> str | None:
    """Why this verdict does not fit the wire's evidence, or None."""
    kind = exchange.evidence.kind
    cause, variant = verdict.get("finrace.cause"), verdict.get("finrace.variant") or ""
    if not any(cause == name and (start is None or variant.startswith(start)) for name, start in ALLOWED.get(kind, [])):
        return None if stalled(exchange, verdict) else f"the wire shows {kind}"
    if variant.endswith("_crossed") and verdict.get("finrace.certainty") != "proven":
        return "a crossing that is not proven"
    return None


def stalled(exchange: Exchange, verdict: Verdict) -> bool:
    """The machine stood still: the upstream closed over an acknowledged request at a moment that its timer can't explain.

    Such a close looks like a failing application to anyone on the proxy's host, so naming it that way is right, as long
    as it is not called proven. Or the path did, for so long that the request was retransmitted, before the FIN came that had
    crossed it. Happens on emulated and overloaded machines; the callers show how often.
    """
    evidence = exchange.evidence
    if evidence.kind == "crossed" and verdict.get("finrace.cause") == "path_dropped":
        return evidence.after > wire.SILENCE and verdict.get("finrace.certainty") != "proven"
    if verdict.get("finrace.cause") != OTHERWISE.get(evidence.kind) or verdict.get("finrace.certainty") == "proven":
        return False
    learned = verdict.get("finrace.upstream.idle_timeout_ms")
    round_trip = verdict.get("finrace.evidence.srtt_us", 0) / 1e6
    return evidence.after > 0.1 + 2 * round_trip or (
        learned is not None and abs(evidence.rested - learned / 1e3) > 0.05 + 2 * round_trip)


class Records:
    """finrace's JSON lines."""

    def __init__(self, path: Path):
        self.path = path

    def all(self) -> list:
        if not self.path.exists():
            return []
        found = []
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], 1):
            try:
                found.append(Verdict(json.loads(line)))
            except ValueError as error:
                raise LabError(f"{self.path}:{number}: not JSON ({error}): {line[:200]!r}") from error
        return found

    def named(self, name: str) -> list:
        return [record for record in self.all() if record.get("event.name") == name]

    def lost_events(self) -> int:
        return max((int(record.get("finrace.lost_events", 0)) for record in self.all()), default=0)

    def learned(self, address: str, port: int):
        """(idle timeout in ms, samples) of the upstream as last reported, or None."""
        last = None
        for record in self.named("finrace.upstream"):
            timeout = record.get("finrace.upstream.idle_timeout_ms")
            if (record.connection[2:] == (address, port) and timeout is not None
                    and record.get("finrace.side", "client") == "client"):
                last = (float(timeout), int(record.get("finrace.upstream.samples", 0)))
        return last


NGINX = """\
daemon off;
user root;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/error.log info;
events {{ worker_connections 4096; }}
http {{
  log_format exchange escape=json '{{"id":"$http_x_request_id","msec":$msec,"status":$status,"connection":"$connection",'
    '"upstream_addr":"$upstream_addr","upstream_status":"$upstream_status",'
    '"upstream_connect_time":"$upstream_connect_time","upstream_header_time":"$upstream_header_time",'
    '"request_time":"$request_time"}}';
  access_log {directory}/access.log exchange;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  proxy_http_version 1.1;
  proxy_set_header Connection "";
{upstreams}
  server {{
    listen 127.0.0.1:{port};
{locations}
  }}
}}
"""

# The calls that nginx names when it could not write: the one case of a failed request that the capture can't hold.
WRITE_FAILED = ("writev() failed", "send() failed", "sendfile() failed", "connect() failed")
UPSTREAM_FAILED = re.compile(r"^\S+ \S+ \[(\w+)\] \d+#\d+: \*(\d+) (.*?)(?:, client: .*)$")


class Lab:
    """Namespaces, capture, upstream and nginx as a context; everything ends with it."""

    def __init__(self, upstream: str, *, clients: int, keep_alive: int, family: int = 4, delay: str = "20ms",
                 delay_line: Path = ROOT / "build/delay-line", seed: int = 1, logs: Path | None = None):
        self.upstream, self.clients, self.keep_alive, self.family = upstream, clients, keep_alive, family
        self.delay, self.delay_line, self.seed, self.logs = delay, delay_line, seed, logs
        self.local = upstream == "local-uvicorn"
        # finrace watches the whole host: ports of this run's own keep another lab's records out of ours.
        self.port = 10000 + os.getpid() % 10000
        self.proxy_port = self.port + 10000
        self.stack = ExitStack()
        self.keep_directory = False
        self.exchanges: list[Exchange] = []
        self.tracers: dict[str, Child] = {}
        self._task = None

    def __enter__(self):
        if os.geteuid() != 0:
            raise LabError("this makes network namespaces and loads BPF programs: run it as root")
        self.directory = Path(tempfile.mkdtemp(prefix="finrace-lab-"))
        try:
            self.stack.callback(self._remove_directory)
            self._namespaces()
            self._capture()
            self._upstream()
            self._nginx()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *_):
        self.stack.close()

    def _remove_directory(self):
        if not self.keep_directory:
            shutil.rmtree(self.directory, ignore_errors=True)
        elif self.logs is not None:
            shutil.copytree(self.directory, self.logs / self.directory.name)
            shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def kept_in(self) -> Path:
        return self.logs / self.directory.name if self.logs is not None else self.directory

    # --- the parts -------------------------------------------------------------------------------------------------

    def _namespaces(self):
        if self.local:
            # The namespace lives as long as this process, which ends when its input does.
            holder = Child(self, "loopback", [need("unshare", "util-linux"), "--net", "sh", "-c",
                                              "ip link set lo up && echo ready && exec cat"], stdin=subprocess.PIPE)
            wait_for("the loopback namespace", lambda: "ready" in holder.stdout_path.read_text(), child=holder)
            self.left = self.right = f"/proc/{holder.process.pid}/ns/net"
            self.address = "127.0.0.1" if self.family == 4 else "::1"
            self.device = "lo"
            return
        if not self.delay_line.exists():
            raise LabError(f"{self.delay_line} is missing: build it with "
                           "cmake --preset release && cmake --build --preset release")
        name = f"finrace-lab-{os.getpid()}"
        line = Child(self, "delay-line", [self.delay_line, "--left", f"{name}-left", "--right", f"{name}-right",
                                          "--delay", self.delay, "--", "sh", "-c",
                                          "env | grep ^FINRACE_; echo ready; exec cat"], stdin=subprocess.PIPE)
        wait_for("the delay line", lambda: "\nready\n" in line.stdout_path.read_text(), child=line)
        facts = dict(re.findall(r"^(FINRACE_\w+)=(.*)$", line.stdout_path.read_text(), re.MULTILINE))
        self.left, self.right = f"/run/netns/{facts['FINRACE_LEFT']}", f"/run/netns/{facts['FINRACE_RIGHT']}"
        self.address = facts["FINRACE_RIGHT_ADDRESS" if self.family == 4 else "FINRACE_RIGHT_ADDRESS6"]
        self.device = "any"

    def _capture(self):
        # -Z root: tcpdump would give up root and then may not write into the lab's directory.
        self.capture_path = self.directory / "wire.pcap"
        self.tcpdump = Child(self, "tcpdump", [need("tcpdump", "tcpdump"), "-i", self.device, "-n", "-U", "-Z", "root",
                                               "-B", "16384", "--immediate-mode", "--time-stamp-precision=nano",
                                               "-s", "512", "-w", self.capture_path, f"tcp port {self.port}"],
                             netns=self.left, stop=signal.SIGINT)
        wait_for("tcpdump", lambda: "listening on" in self.tcpdump.stderr_path.read_text(), child=self.tcpdump)

    def _upstream(self):
        if self.upstream in ("uvicorn", "local-uvicorn"):
            command = [need("uvicorn", "uvicorn"), "--app-dir", Path(__file__).parent, "--host", self.address, "--port",
                       self.port, "--timeout-keep-alive", self.keep_alive, "--no-access-log", "--lifespan", "on",
                       "--log-level", "info", "asgi_app:app"]
        else:
            command = [PYTHON, ROOT / "tools/lab.py", "serve", "--address", self.address, "--port", self.port, "--mode",
                       self.upstream, "--keep-alive", f"{self.keep_alive}s"]
        env = dict(os.environ, PYTHONDONTWRITEBYTECODE="1", PYTHONUNBUFFERED="1")
        self.server = Child(self, "upstream", command, netns=self.right, env=env, stop=signal.SIGINT)
        wait_for("the upstream listens", lambda: listens(self.server.process.pid, self.port), child=self.server)

    def _nginx(self, more: str = "", locations: str = ""):
        """`more` goes into nginx's http block, `locations` into its server."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        keep = max(60, self.keep_alive * 4)  # nginx lets its connections idle far longer than the upstream does
        (self.directory / "nginx.conf").write_text(NGINX.format(
            directory=self.directory, port=self.proxy_port,
            upstreams="".join(f"  upstream client{n} {{ server {host}:{self.port}; keepalive 1; "
                              f"keepalive_timeout {keep}s; }}\n" for n in range(self.clients)) + more,
            locations="".join(f"    location = /{n} {{ proxy_pass http://client{n}; }}\n" for n in range(self.clients)) + locations))
        self.nginx = Child(self, "nginx", [need("nginx", "nginx-light"), "-p", self.directory, "-e",
                                           self.directory / "error.log", "-c", self.directory / "nginx.conf"],
                           netns=self.left)
        wait_for("nginx listens", lambda: listens(self.nginx.process.pid, self.proxy_port), child=self.nginx)

    def start_finrace(self, finrace: Path, options: list, name: str = "finrace") -> Records:
        if not finrace.exists():
            raise LabError(f"{finrace} is missing: build it with "
                           "cmake --preset release && cmake --build --preset release")
        output = self.directory / f"{name}.json"
        child = Child(self, name, [finrace, "run", *options, "--output", output, "--interval", "1s"], stop=signal.SIGINT)
        wait_for(f"{name} is ready", lambda: any(line.startswith("finrace: ready") for line in
                                                 child.stderr_path.read_text(errors="replace").splitlines()), child=child)
        self.tracers[name] = child
        return Records(output)

    @property
    def finrace(self):
        return self.tracers.get("finrace")

    # --- traffic ---------------------------------------------------------------------------------------------------

    def run_clients(self, main):
        """Runs a coroutine in the proxy's namespace, on a thread of its own: a namespace belongs to a thread."""
        outcome = {}

        async def guarded():
            self._task = asyncio.current_task()
            outcome["value"] = await main

        def thread():
            try:
                with open(self.left, "rb") as namespace:
                    if _libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), f"setns {self.left}")
                loop_holder["loop"] = loop = asyncio.new_event_loop()
                loop.run_until_complete(guarded())
                loop.close()
            except asyncio.CancelledError:
                pass
            except BaseException as error:  # handed to the caller's thread
                outcome["error"] = error

        loop_holder = {}
        worker = threading.Thread(target=thread, daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(0.2)
        finally:
            if worker.is_alive() and self._task is not None:
                loop_holder["loop"].call_soon_threadsafe(self._task.cancel)
                worker.join(5)
        if "error" in outcome:
            raise outcome["error"]
        return outcome.get("value")

    async def post(self, client: int, race: bool, previous: Exchange | None) -> Exchange:
        exchange = Exchange(f"{'race' if race else 'warm'}-{client:02d}-{len(self.exchanges):04d}", client, race,
                            previous.id if previous else None)
        self.exchanges.append(exchange)
        body = b"finrace" * 8
        head = (f"POST /{client} HTTP/1.1\r\nHost: lab\r\nX-Request-Id: {exchange.id}\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n").encode()
        writer = None
        exchange.sent = time.time()
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy_port)
                writer.write(head + body)
                answer = await reader.read(65536)
                exchange.done = time.time()
                exchange.status = int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0
                while await reader.read(65536):
                    pass
        except (OSError, TimeoutError, ValueError, IndexError) as error:
            exchange.done = time.time()
            exchange.trouble = f"{type(error).__name__}: {error}"
        finally:
            if writer is not None:
                writer.close()
        return exchange

    def connections(self) -> list:
        return wire.read(self.capture_path, self.port)

    def warm_up(self, records: Records | None, rounds: int = 4):
        """Lets idle closes happen, so that the upstream's timeout can be learned, and measures it on the wire."""
        jitter = random.Random(self.seed)

        async def prime_all():
            async def one(client, pause):
                await asyncio.sleep(pause)
                return await self.post(client, False, None)

            return await asyncio.gather(*(one(client, jitter.uniform(0, 0.5)) for client in range(self.clients)))

        for number in range(1, rounds + 1):
            bad = [exchange for exchange in self.run_clients(prime_all()) if exchange.status != 200]
            if bad:
                raise LabError(f"{len(bad)} of {self.clients} first requests failed, the first with status "
                               f"{bad[0].status} {bad[0].trouble}: the proxy or its upstream is not well")
            wait_for("the upstream closes its idle connections",
                     lambda: all(connection.peer_close() for connection in self.connections()),
                     self.keep_alive * 3 + STARTUP_SECONDS)
            if records is None or self._learned(records):
                break
        idles = self.idle_times()
        trips = [connection.established - connection.opened for connection in self.connections()
                 if connection.established]
        if len(idles) < 2 or not trips:
            raise LabError("the capture shows no idle close: is tcpdump allowed to see the namespace?")
        # A loaded machine only makes them longer, so the shorter ones are nearer to the truth.
        self.idle_timeout, self.round_trip = statistics.quantiles(idles, n=5)[0], statistics.median(trips)
        return number

    def idle_times(self) -> list:
        """Seconds, in order, that the upstream let its connections idle, as the wire shows them."""
        return sorted(idle for idle in (connection.idle_before_close() for connection in self.connections())
                      if idle is not None)

    def _learned(self, records: Records) -> bool:
        end = time.monotonic() + 3  # an interval of health and upstream records is one second
        while time.monotonic() < end:
            if records.learned(self.address, self.port):
                return True
            time.sleep(POLL_SECONDS)
        return False

    def window(self) -> tuple:
        """When to send, counted from the last response: from well before the timer's FIN to well after it."""
        if self.local:
            return self.idle_timeout - LOCAL_WINDOW / 2, self.idle_timeout + LOCAL_WINDOW / 2
        return self.idle_timeout - self.round_trip - 0.03, self.idle_timeout + 0.04

    def race(self, requests: int, enough: int = 1):
        """`requests` POSTs near the timer, from all clients at once; up to three times as many until `enough` have raced.

        After each batch the aim is corrected by how many came too early and too late: a loaded machine is late by itself,
        and on one host the window is narrower than the clients' own lateness. There they also come as a crowd, which keeps
        the upstream busy closing.
        """
        low, high = self.window()
        spread, rounds = (0, 2) if self.local else (self.keep_alive / 2, 5)
        done = 0
        while done < requests or (done < 3 * requests and self._failed() < enough):
            batch = min(max(requests - done, self.clients), rounds * self.clients)
            before = len(self.exchanges)
            self.run_clients(self._race(batch, low, high, spread))
            done += batch
            early, late = self._early_and_late(self.exchanges[before:])
            shift = (early - late) / max(1, early + late) * (high - low) / 2
            low, high = low + shift, high + shift

    def _failed(self) -> int:
        return sum(exchange.race and exchange.status != 200 for exchange in self.exchanges)

    async def _race(self, requests: int, low: float, high: float, spread: float):
        async def client(number, quota, jitter):
            last, done, bad = None, 0, 0
            await asyncio.sleep(jitter.uniform(0, spread))
            while done < quota:
                if last is None or last.status != 200:
                    last = await self.post(number, False, last)
                    bad = bad + 1 if last.status != 200 else 0
                    if bad > 20:
                        raise LabError(f"client {number}: 20 requests in a row failed: {last.status} {last.trouble}")
                    continue
                await asyncio.sleep(max(0.0, last.done + jitter.uniform(low, high) - time.time()))
                last = await self.post(number, True, last)
                done += 1

        share, rest = divmod(requests, self.clients)
        sent = len(self.exchanges)
        await asyncio.gather(*(client(number, share + (number < rest), random.Random(f"{self.seed} {sent} {number}"))
                               for number in range(self.clients)))

    def _early_and_late(self, exchanges: list) -> tuple:
        """Of the requests that succeeded: how many on the connection of the request before, how many on a new one."""
        carrier = {request.id: connection.key for connection in self.connections() for request in connection.requests}
        same = [carrier.get(exchange.id) == carrier.get(exchange.previous) for exchange in exchanges
                if exchange.race and exchange.status == 200 and exchange.id in carrier]
        return same.count(True), same.count(False)

    # --- the truth -------------------------------------------------------------------------------------------------

    def settle(self):
        """Waits until what nginx did is in its logs and in the capture: tcpdump drops what it has not written at its end."""
        for _ in range(5):  # once a last request's answer is there, everything before it is
            mark = self.run_clients(self.post(0, False, next((exchange for exchange in reversed(self.exchanges)
                                                              if exchange.client == 0), None)))
            if mark.status == 200:
                break
        else:
            raise LabError(f"five last requests in a row failed: {mark.status} {mark.trouble}")
        wanted = {exchange.id for exchange in self.exchanges if exchange.status}
        wait_for("nginx's access log has every request", lambda: wanted <= {line["id"] for line in self._access_log()})
        answered = {exchange.id for exchange in self.exchanges if exchange.status == 200}
        wait_for("the capture has every answered request", lambda: answered <= {
            request.id for connection in self.connections() for request in connection.requests
            if wire.evidence(connection, request).kind == "answered"})
        time.sleep(MATCH_SECONDS)  # a verdict may take that long, and a second after it is a second too late

    def _access_log(self) -> list:
        path = self.directory / "access.log"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]  # the last may be half written

    def gather(self):
        """Joins client, nginx's two logs and the wire. Returns lines of trouble: what can't be explained."""
        by_id = {exchange.id: exchange for exchange in self.exchanges}
        by_connection, trouble = {}, []
        for line in self._access_log():
            if line["id"] in by_id:
                by_id[line["id"]].log = line
                by_connection[line["connection"]] = by_id[line["id"]]
        for line in (self.directory / "error.log").read_text(errors="replace").splitlines():
            found = UPSTREAM_FAILED.match(line)
            if found and found[1] not in ("debug", "info", "notice") and "upstream" in line and found[2] in by_connection:
                by_connection[found[2]].error = found[3]
            elif re.search(r"\[(warn|error|crit|alert|emerg)\]", line):
                trouble.append(f"nginx: {line}")
        carried, by_key = {}, {}
        for connection in self.connections():
            by_key.setdefault(connection.key, []).append(connection)
            for request in connection.requests:
                carried[request.id] = (connection, request)
        for exchange in self.exchanges:
            if exchange.id in carried:
                exchange.evidence = wire.evidence(*carried[exchange.id])
            elif exchange.previous in carried and exchange.error.startswith(WRITE_FAILED):
                connection = carried[exchange.previous][0]
                close = connection.peer_close()
                exchange.evidence = wire.Evidence(
                    "unsent", "never sent" + (f", the connection's close came {(exchange.time - close.time) * 1e3:.1f} ms "
                                              "before nginx's answer" if close else ""), connection.key)
            if exchange.error.startswith("connect() failed") and exchange.status == 200:
                # nginx saw the reset when it took the connection, before it wrote: no request failed.
                exchange.error, exchange.avoided = "", exchange.error
            if exchange.failed != (exchange.status != 200):
                trouble.append(f"{exchange.id}: the client got {exchange.status or exchange.trouble}, nginx's error log "
                               f"says {exchange.error or 'nothing'}")
            if exchange.failed and exchange.evidence is None:
                trouble.append(f"{exchange.id}: failed, and the capture does not know its connection")
            elif exchange.failed and exchange.evidence.kind in ("answered", "open"):
                trouble.append(f"{exchange.id}: nginx failed it, the wire shows: {exchange.evidence.text}")
            elif not exchange.failed and (exchange.evidence is None or exchange.evidence.kind != "answered"):
                trouble.append(f"{exchange.id}: succeeded, the wire shows: "
                               f"{exchange.evidence.text if exchange.evidence else 'nothing'}")
        return trouble

    def capture_losses(self) -> int:
        """Ends the capture; the number of packets that it missed."""
        self.tcpdump.stop()
        found = re.search(r"(\d+) packets? dropped by kernel", self.tcpdump.stderr_path.read_text())
        return int(found[1]) if found else -1

    @property
    def failures(self) -> list:
        return [exchange for exchange in self.exchanges if exchange.failed]

    def verdicts(self, records: Records):
        """(verdicts on upstream connections, verdicts on the clients' connections to nginx: always false)."""
        found = [verdict for verdict in records.named("finrace.verdict") if verdict.get("finrace.side") == "client"]
        return ([verdict for verdict in found if verdict.connection[2:] == (self.address, self.port)],
                [verdict for verdict in found if verdict.connection[2:] == ("127.0.0.1", self.proxy_port)])


def sockets(pid: int):
    """(local port, remote port, state) of the TCP sockets in the process's network namespace, without opening a connection."""
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            parts = line.split()
            yield *(int(part.rsplit(":", 1)[1], 16) for part in parts[1:3]), int(parts[3], 16)


def listens(pid: int, port: int) -> bool:
    """Whether a socket listens on the port there."""
    return any(local == port and state == TCP_LISTEN for local, _, state in sockets(pid))


def has_connection_to(pid: int, port: int) -> bool:
    """Whether a connection to the port is open there, at the end that opened it, or only its process has yet to close it."""
    return any(remote == port and state in (TCP_ESTABLISHED, TCP_CLOSE_WAIT) for _, remote, state in sockets(pid))


def unwind_on_signals():
    """SIGTERM and SIGHUP end like Ctrl-C: through every context's end."""
    def interrupt(number, _):
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)  # the clean-up is not to be interrupted in its turn
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


class Paint:
    """Colour on a terminal only."""

    def __init__(self, stream=None):
        self.on = (stream or sys.stdout).isatty() and "NO_COLOR" not in os.environ

    def __call__(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.on else text

    def good(self, text):
        return self("32", text)

    def bad(self, text):
        return self("31", text)

    def dim(self, text):
        return self("2", text)

    def bold(self, text):
        return self("1", text)
