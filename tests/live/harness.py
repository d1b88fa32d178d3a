"""What the live tests share: a running finrace, its records as they arrive, a network of the test's own, and the count.

Each test runs in a fresh network namespace with a random prefix on its loopback device, so a record belongs to the test
if its addresses do: finrace itself watches the whole host, as it does in production, and others may be at work on it.
Nothing sleeps for a fixed time where a condition can be waited for; every wait has a limit and says what did not come.
"""

import argparse
import ctypes
import fnmatch
import json
import multiprocessing
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from datetime import datetime, timezone

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(1, os.path.join(ROOT, "tests"))
try:
    import check_page  # noqa: E402
    import check_records  # noqa: E402
except ImportError as missing:
    print(f"live tests: {missing}: run scripts/setup", file=sys.stderr)
    sys.exit(2)

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
PR_SET_PDEATHSIG = 1
READY_LIMIT = 180.0  # an emulated machine verifies and attaches slowly
STOP_LIMIT = 60.0
LIMIT = 60.0  # of any other wait

libc = ctypes.CDLL(None, use_errno=True)


class EnvironmentProblem(Exception):
    """The machine, not what is tested: exit status 2."""


class Skipped(Exception):
    """What is tested is not to be had here: neither passed nor failed, and said."""


class Wrong(AssertionError):
    """What is tested did not behave."""


def must(good, why):
    if not good:
        raise Wrong(why() if callable(why) else why)


def wait_for(condition, what, limit=LIMIT, pause=0.02):
    """Returns the condition's value once it is true."""
    deadline = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Wrong(f"waited {limit:g} s for {what() if callable(what) else what}")
        time.sleep(pause)


def need(program, package):
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise EnvironmentProblem(f"{program} is missing: install the package {package} (scripts/setup)")
    return path


def checked(result, what):
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def die_with_parent():
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def wall_time(text):
    """Seconds since the epoch of an RFC 3339 time stamp, whose nanoseconds datetime does not take."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    seconds = datetime.strptime(whole, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc).timestamp()
    return seconds + (int(fraction) / 10 ** len(fraction) if fraction else 0.0)


# ---- records -------------------------------------------------------------------------------------------------------------


class Record(dict):
    """One line of finrace's output; `arrived` is the wall time at which it could be read."""

    arrived = 0.0

    def at(self, path, default=None):
        value = self
        for name in path.split("."):
            if not isinstance(value, dict) or name not in value:
                return default
            value = value[name]
        return value

    @property
    def name(self):
        return self.at("event.name")

    @property
    def local(self):
        return self.at("network.local.address"), self.at("network.local.port")

    @property
    def peer(self):
        return self.at("network.peer.address"), self.at("network.peer.port")

    @property
    def client(self):
        return self.at("finrace.side") == "client"

    @property
    def ends(self):
        """(client address, client port, server address, server port), whichever end this record tells of."""
        return self.local + self.peer if self.client else self.peer + self.local

    @property
    def time(self):
        return wall_time(self["timestamp"])

    @property
    def verdict(self):
        """cause, variant, certainty in one word."""
        parts = [self.at("finrace.cause"), self.at("finrace.variant"), self.at("finrace.certainty")]
        return "/".join(str(part) for part in parts if part)


def parse_line(line):
    """A record must be valid UTF-8 and one JSON object; anything else is a failure, wherever it shows."""
    try:
        record = json.loads(line.decode("utf-8", "strict"), object_hook=None)
    except ValueError as error:
        raise Wrong(f"not a line of JSON in UTF-8: {line[:300]!r}: {error}") from error
    must(isinstance(record, dict), f"not an object: {line[:300]!r}")
    return Record(record)


TOLD = (b"finrace.verdict", b"finrace.connection")
NUMBER = re.compile(rb',"run":"[0-9a-f]{16}","sequence":[1-9][0-9]*(?=[,}])')


def replay(options, recordings, flags=(), **more):
    """(lines that tell of connections, what was said) of a recording's replay; asserts that it ends with 0."""
    done = subprocess.run([options.finrace, "run", "--replay", *recordings, *flags], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=LIMIT * 10, **more)
    must(done.returncode == 0, lambda: f"replay: exit {done.returncode}: {done.stderr[-2000:]!r}")
    return told(done.stdout.splitlines()), done.stderr.decode("utf-8", "replace")


def unnumbered(lines):
    """Without the run's name and their number in it: a replay is a run of its own."""
    return [NUMBER.sub(b"", line) for line in lines]


def told(lines):
    """Those that tell of connections."""
    return [line for line in unnumbered(lines) if any(b'"name":"' + name + b'"' in line[:120] for name in TOLD)]


def check_replay(finrace, recordings, flags=()):
    """What a run made of its events, a replay makes of their recording, byte for byte."""
    live = told([line for _, line in finrace.lines])
    again, said = replay(finrace.options, recordings, flags)
    must(live, "the run told of nothing")
    must(not any(b'"sequence":' in line for line in live), "a record's number is not where it is looked for")
    must("warning" not in said, said)
    different = next((index for index, (one, other) in enumerate(zip(live, again)) if one != other), min(len(live), len(again)))
    must(live == again, lambda: f"{len(live)} lines live, {len(again)} replayed; the first that differ, number {different}:\n"
                                f"          {live[different:different + 1]}\n          {again[different:different + 1]}")


def wait_said(process, what, limit=READY_LIMIT):
    """What a process has said on its standard error, a pipe, once `what` is among it."""
    said, deadline = "", time.monotonic() + limit
    while what not in said:
        left = deadline - time.monotonic()
        ready = left > 0 and select.select([process.stderr], [], [], left)[0]
        part = os.read(process.stderr.fileno(), 4096).decode("utf-8", "replace") if ready else ""
        if not part:
            process.kill()
            process.wait(LIMIT)
            raise Wrong(f"{process.args[0]} did not come to say {what!r}: {said}")
        said += part
    return said


class Diagnosis:
    """`finrace diagnose --json` at work, with a page beside it."""

    def __init__(self, options, *arguments, **more):
        self.folder = tempfile.mkdtemp(dir=options.folder)
        self.page = os.path.join(self.folder, "page.html")
        self.process = subprocess.Popen([options.finrace, "diagnose", "--json", "--html", self.page, *arguments],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)

    def wait_ready(self):
        """Of one that watches this host."""
        wait_said(self.process, "finrace: ready")

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_LIMIT)

    def end(self, number=None):
        """(exit status, report, what was said), `number` being the signal to end it by. Asserts that the report is what the
        schema says, and that the page beside it is sound and says the same."""
        if number is not None:
            self.process.send_signal(number)
        output, said = self.process.communicate(timeout=LIMIT * 10)
        said = said.decode("utf-8", "replace")
        status = self.process.returncode
        must(status in (0, 1, 3), lambda: f"diagnose: exit {status}: {said[-2000:]}")
        report = json.loads(output)
        found = check_records.report_complaints(report)
        must(not found, lambda: f"{len(found)} complaints about the report: {found[0]}")
        must(os.listdir(self.folder) == ["page.html"] and os.stat(self.page).st_mode & 0o777 == 0o600,
             f"beside the page: {os.listdir(self.folder)}")
        with open(self.page, encoding="utf-8") as file:
            found = check_page.complaints(file.read(), report)
        must(not found, lambda: f"{len(found)} complaints about the page: {found[0]}")
        return status, report, said


def diagnose(options, *arguments, **more):
    """What Diagnosis.end() gives of one that ends by itself."""
    return Diagnosis(options, *arguments, **more).end()


def place_of(where):
    return where["address"], where["port"]


def named(verdicts):
    """How often, by cause, certainty and place."""
    found = Counter()
    for record in verdicts:
        where = place_of(record.at(f"network.{'local' if record.at('finrace.side') == 'server' else 'peer'}"))
        found[record.at("finrace.cause"), record.at("finrace.certainty"), *where] += 1
    return found


def findings(report):
    """The same of a report."""
    found = Counter()
    for finding in report["findings"]:
        for certainty, count in finding["certainty"].items():
            found[finding["cause"], certainty, *place_of(finding.get("upstream") or finding["listener"])] += count
    return found


def check_findings(due, report):
    """What was named is found, as often."""
    found = findings(report)
    must(due == found, lambda: f"named, but not found: {due - found}; found, but not named: {found - due}")


def check_diagnosis(finrace, recordings):
    """What a run named, `diagnose` of its recording finds."""
    verdicts = finrace.records("finrace.verdict")
    status, report, said = diagnose(finrace.options, *recordings)
    must("warning" not in said, said)
    must(verdicts and status == 1, f"exit {status} with {len(verdicts)} verdicts")
    check_findings(named(verdicts), report)


def check_schema(finrace):
    """Every line that this finrace wrote, against docs/record.schema.json."""
    must(finrace.lines, "it wrote no record at all")
    found = check_records.complaints([line for _, line in finrace.lines])
    must(not found, lambda: f"{len(found)} complaints about {len(finrace.lines)} records: {found[0]}")


# ---- finrace -------------------------------------------------------------------------------------------------------------

_host_network = None  # descriptor of the namespace in which finrace runs


class Finrace:
    """A running `finrace run`. Its standard error and its records are read as they come, by threads of this process."""

    def __init__(self, options, *flags, interval="1s", output=None, wait=True, environment=None, container=None):
        """`output`: None for a file that is read along, else where records go (a path, or a descriptor as stdout).
        `container`: the whole command that runs it elsewhere, whose standard output is read along."""
        self.options = options
        self.lines = []  # (wall time, bytes), complete lines alone
        self.rest = b""
        self.said = []
        self.ready = threading.Event()
        self.finished = threading.Event()
        self.path = None
        command = [options.finrace, "run", *options.backend_flags, *options.unconfined]
        command += ["--interval", interval] if interval else []  # none: as a configuration says
        stdout = subprocess.DEVNULL
        if output is None:
            handle, self.path = tempfile.mkstemp(prefix="records-", suffix=".jsonl", dir=options.folder)
            if container:
                stdout, command = handle, list(container)
            else:
                os.close(handle)
                command += ["--output", self.path]
        elif isinstance(output, int):
            stdout = output
        else:
            command += ["--output", output]
        command += flags
        self.command = command
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, preexec_fn=self.enter_host,
            env={**os.environ, **(environment or {})},
        )
        if container:
            os.close(stdout)
        self.watchers = [threading.Thread(target=self.listen, daemon=True)]
        if self.path:
            self.watchers.append(threading.Thread(target=self.follow, daemon=True))
        for watcher in self.watchers:
            watcher.start()
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.kill()
                raise

    @staticmethod
    def enter_host():
        die_with_parent()
        # Who starts these tests in the background may have SIGINT ignored, and that is inherited.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if _host_network is not None:
            checked(libc.setns(_host_network, CLONE_NEWNET), "setns")

    def listen(self):
        for line in self.process.stderr:
            text = line.decode("utf-8", "replace").rstrip("\n")
            self.said.append(text)
            if text.startswith("finrace: ready"):
                self.ready.set()
        self.process.wait()
        self.finished.set()
        self.ready.set()

    def follow(self):
        with open(self.path, "rb") as file:
            while True:
                last = self.finished.is_set()
                data = file.read()
                if data:
                    now = time.time()
                    *lines, self.rest = (self.rest + data).split(b"\n")
                    self.lines += [(now, line) for line in lines]
                elif last:
                    return
                else:
                    time.sleep(0.02)

    def wait_ready(self):
        must(self.ready.wait(READY_LIMIT), f"not ready after {READY_LIMIT:g} s; it said: {self.words()}")
        must(self.process.poll() is None and not self.finished.is_set(),
             f"ended with {self.process.poll()} before it was ready: {self.words()}")

    def words(self):
        return " | ".join(self.said[-20:]) or "nothing"

    def adopted(self):
        """Of the ready line: connections taken in."""
        for text in self.said:
            if text.startswith("finrace: ready"):
                return int(text.rsplit("connections taken in", 1)[0].split()[-1])
        raise Wrong("no ready line")

    def alive(self):
        return self.process.poll() is None

    def send(self, number):
        self.process.send_signal(number)

    def stop(self, number=signal.SIGINT):
        """Ends it, and asserts that it was alive before."""
        must(self.alive(), lambda: f"ended by itself with {self.process.poll()}: {self.words()}")
        self.send(number)
        self.wait_end()

    def wait_end(self):
        """Asserts that it ends in time and with 0."""
        must(self.finished.wait(STOP_LIMIT), f"did not end within {STOP_LIMIT:g} s")
        for watcher in self.watchers:
            watcher.join(LIMIT)
        must(self.process.returncode == 0, lambda: f"ended with {self.process.returncode}: {self.words()}")
        must(not self.rest, lambda: f"the output ends within a line: {self.rest[-200:]!r}")

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.finished.wait(STOP_LIMIT)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    # -- what it wrote

    def records(self, name=None, start=0):
        found = []
        for arrived, line in self.lines[start:]:
            record = parse_line(line)
            record.arrived = arrived
            if name is None or record.name == name:
                found.append(record)
        return found

    def verdicts(self, net=None):
        return [one for one in self.records("finrace.verdict") if net is None or net.owns(one)]

    def connections(self, net=None):
        return [one for one in self.records("finrace.connection") if net is None or net.owns(one)]

    def health(self):
        """The last health record."""
        found = self.records("finrace.health")
        must(found, "no health record")
        return found[-1]

    def next_health(self, limit=LIMIT):
        """A health record that was written after this call."""
        start = len(self.lines)
        return wait_for(lambda: next(iter(self.records("finrace.health", start)), None), "a health record", limit)

    def wait_verdicts(self, net, count, limit=LIMIT, among=lambda verdict: True):
        """All verdicts, once there are as many among those that count."""
        def enough():
            found = self.verdicts(net)
            return found if sum(map(among, found)) >= count else None

        return wait_for(enough, lambda: f"{count} verdicts; there are {[one.verdict for one in self.verdicts(net)][:20]}",
                        limit)

    def wait_connections(self, net, count, limit=LIMIT):
        def enough():
            found = self.connections(net)
            return found if len(found) >= count else None

        return wait_for(enough, lambda: f"{count} connections' records; there are {len(self.connections(net))}", limit)

    def processor_seconds(self):
        """What all its threads have run."""
        with open(f"/proc/{self.process.pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_settled(self):
        """Until it has taken in what there is: it hardly runs any more."""
        def rests(pause=0.3):
            before = self.processor_seconds()
            time.sleep(pause)
            return self.processor_seconds() - before < pause / 5

        wait_for(rests, "it to come to rest")

    def memory(self):
        """Resident memory now, in bytes."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
        raise Wrong("no VmRSS")


# ---- a network of the test's own -----------------------------------------------------------------------------------------


class Net:
    """The calling process's new network namespace: loopback alone, with 10.x.y.0/24 and fd66:x:y::/64 on it."""

    def __init__(self):
        global _host_network
        if _host_network is None:
            _host_network = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        checked(libc.unshare(CLONE_NEWNET), "unshare")
        self.ns = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        first, second = random.randrange(128, 250), random.randrange(1, 256)  # IPv6 text leaves zeros out
        self.prefix = f"10.{first}.{second}."
        self.prefix6 = f"fd66:{first:x}:{second:x}:"
        # IPv6 takes a route for local, but does not bind to its addresses without this.
        with open("/proc/sys/net/ipv6/ip_nonlocal_bind", "w", encoding="ascii") as file:
            file.write("1")
        self.ports = multiprocessing.Value("i", 1024)
        ip = need("ip", "iproute2")
        for command in (
            ["link", "set", "lo", "up"],
            ["address", "add", f"{self.prefix}1/24", "dev", "lo"],
            ["-6", "route", "add", "local", f"{self.prefix6}:/64", "dev", "lo"],
        ):
            done = subprocess.run([ip, *command], capture_output=True, text=True, timeout=LIMIT)
            if done.returncode != 0:
                raise EnvironmentProblem(f"ip {' '.join(command)}: {done.stderr.strip()}")

    def next_port(self):
        """Never the same twice, in children neither: a record is found by its ports."""
        with self.ports.get_lock():
            self.ports.value += 1
            must(self.ports.value < 32768, "no port is left")
            return self.ports.value

    def address(self, host=1, family="4"):
        if family == "6":
            return f"{self.prefix6}:{host:x}"
        return f"{self.prefix}{host}"

    def owns(self, record):
        address = record.at("network.local.address") or record.at("network.peer.address") or ""
        return address.startswith(self.prefix) or address.startswith(self.prefix6)

    def close(self):
        checked(libc.setns(_host_network, CLONE_NEWNET), "setns")
        os.close(self.ns)


@contextmanager
def network():
    net = Net()
    try:
        yield net
    finally:
        net.close()


@contextmanager
def host_network(net):
    """finrace listens there, as it runs there; these tests have a network of their own."""
    checked(libc.setns(_host_network, CLONE_NEWNET), "setns")
    try:
        yield
    finally:
        checked(libc.setns(net.ns, CLONE_NEWNET), "setns")


def free_port(net):
    """One of that host's, for what finrace serves."""
    with host_network(net), socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Pair:
    """A connection with both ends in this process. Unless `client_host` is given, no other has its ports in this network."""

    def __init__(self, net, listener=None, family="4", client_host=None):
        own = listener is None
        self.listener = listener or listen(net, family)
        mapped = "::ffff:" if family == "mapped" else ""
        self.client = socket.socket(socket.AF_INET if family == "4" else socket.AF_INET6)
        self.client.settimeout(LIMIT)
        self.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host, port = (1, net.next_port()) if client_host is None else (client_host, 0)
        self.client.bind((mapped + net.address(host, "4" if mapped else family), port))
        self.client.connect(self.listener.getsockname()[:2])
        self.server, _ = self.listener.accept()
        self.server.settimeout(LIMIT)
        if own:
            self.listener.close()
        self.ends = self.client.getsockname()[:2] + self.client.getpeername()[:2]
        if mapped:
            self.ends = tuple(end[7:] if isinstance(end, str) else end for end in self.ends)

    def exchange(self, request=b"GET / HTTP/1.1\r\n\r\n", response=b"HTTP/1.1 204 No Content\r\n\r\n"):
        self.client.sendall(request)
        self.serve(len(request), response)

    def serve(self, size, response):
        """The server reads a request of that size and answers; the client reads the answer."""
        read_all(self.server, size)
        self.server.sendall(response)
        read_all(self.client, len(response))

    def request_unanswered(self, size=50):
        """The server reads the request and closes: upstream_closed."""
        self.client.sendall(b"x" * size)
        read_all(self.server, size)
        self.server.close()
        must(self.client.recv(1) == b"", "the client read a byte")

    def close(self):
        self.client.close()
        self.server.close()


def listen(net, family="4", host=1, backlog=4096):
    sock = socket.socket(socket.AF_INET if family == "4" else socket.AF_INET6)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.settimeout(LIMIT)
    if family == "mapped":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::ffff:" + net.address(host, "4"), 0))
    else:
        sock.bind((net.address(host, family), 0))
    sock.listen(backlog)
    return sock


def read_all(sock, size):
    while size > 0:
        part = sock.recv(min(size, 1 << 16))
        must(part, "end of stream where bytes were due")
        size -= len(part)


def raise_file_limit(wanted):
    """As far as this process may; the limit of open files that it has then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limits in ((wanted, max(wanted, hard)), (min(wanted, hard), hard)):
        if limits[0] <= soft:
            break
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            break
        except (ValueError, OSError):
            continue
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


# ---- what is in the kernel -----------------------------------------------------------------------------------------------


def bpf_objects():
    """{(kind, id): name} of all programs, maps and links."""
    bpftool = need("bpftool", "bpftool")
    found = {}
    for kind in ("prog", "map", "link"):
        done = subprocess.run([bpftool, "-j", kind, "list"], capture_output=True, timeout=LIMIT)
        must(done.returncode == 0, f"bpftool {kind} list: {done.stderr.decode()}")
        for one in json.loads(done.stdout or b"[]"):
            found[kind, one["id"]] = one.get("name", one.get("type", ""))
    return found


def held_objects(pids=None):
    """Those of them that these processes, or any living one, hold by a descriptor."""
    held = set()
    for pid in pids or filter(str.isdigit, os.listdir("/proc")):
        try:
            for fd in os.listdir(f"/proc/{pid}/fdinfo"):
                with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as file:
                    held |= {(kind, int(number)) for kind, number in re.findall(r"^(prog|map|link)_id:\s*(\d+)", file.read(), re.M)}
        except OSError:
            continue  # gone meanwhile
    return held


# ---- running tests -------------------------------------------------------------------------------------------------------


class Results:
    def __init__(self, only="*"):
        self.patterns = only.split(",")
        self.passed = self.failed = self.skipped = 0

    def wanted(self, name):
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)

    def note(self, name, problem, seconds=None):
        took = "" if seconds is None or seconds < 0.1 else f"  ({seconds:.1f} s)"
        if problem is None:
            self.passed += 1
            print(f"  pass  {name}{took}", flush=True)
        else:
            self.failed += 1
            print(f"  FAIL  {name}{took}\n          {problem}", flush=True)

    def run(self, name, test, *arguments):
        if not self.wanted(name):
            return
        started = time.monotonic()
        problem = None
        try:
            test(*arguments)
        except EnvironmentProblem:
            raise
        except Skipped as why:
            self.skipped += 1
            print(f"  SKIP  {name}: {why}", flush=True)
            return
        except (Wrong, OSError, subprocess.SubprocessError) as error:
            where = traceback.extract_tb(error.__traceback__)
            lines = [f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in where][-3:]
            problem = f"{error}\n          at {' > '.join(lines)}"
        self.note(name, problem, time.monotonic() - started)

    def run_each(self, tests, *arguments):
        """Functions named test_...: each is a test of that name."""
        for test in tests:
            self.run(test.__name__.removeprefix("test_").replace("_", " "), test, *arguments)

    def end(self):
        if self.skipped:
            print(f"{self.skipped} skipped, see above", flush=True)
        print(f"{self.passed} passed, {self.failed} failed", flush=True)
        return 1 if self.failed else 0


def add_options(parser):
    parser.add_argument("--finrace", default=os.path.join(ROOT, "build", "finrace"), help="the binary (default: build/finrace)")
    parser.add_argument("--backend", choices=("trace", "cgroup"), default="cgroup")
    parser.add_argument("--attach", choices=("fentry", "kprobe"), help="of backend trace")
    parser.add_argument("--logs", help="folder to copy to what a failed run leaves")


def parser_of(description):
    """Of a test whose parts may be chosen."""
    parser = argparse.ArgumentParser(description=description.split("\n", maxsplit=1)[0], allow_abbrev=False)
    add_options(parser)
    parser.add_argument("--only", default="*", help="patterns of test names, with commas")
    return parser


def prepare(options, name):
    if os.geteuid() != 0:
        raise EnvironmentProblem("not root: run it with sudo")
    options.finrace = os.path.abspath(options.finrace)
    if not os.access(options.finrace, os.X_OK):
        raise EnvironmentProblem(f"{options.finrace} is missing: build it first (cmake --preset release)")
    options.unconfined = ["--unconfined"] if getattr(options, "sanitized", False) else []  # LeakSanitizer needs what confining takes
    options.backend_flags = ["--backend", options.backend]
    if options.attach:
        options.backend_flags += ["--attach", options.attach]
    options.backend_name = options.backend + (f" by {options.attach}" if options.attach else "")
    options.folder = tempfile.mkdtemp(prefix=f"finrace-{name}-")


def leave_mounts():
    """From now on this process's mounts are its own."""
    checked(libc.unshare(CLONE_NEWNS), "unshare")
    checked(libc.mount(None, b"/", None, 1 << 18 | 1 << 14, None), "mount --make-rprivate /")  # MS_PRIVATE, MS_REC


def neither_file_nor_folder(folder, names):
    """Of these names in a folder: a server's sockets and pipes, which can't be copied."""
    return [name for name in names if not os.path.isfile(os.path.join(folder, name)) and not os.path.isdir(os.path.join(folder, name))]


def main(name, parse, test):
    """`test(options, results)` under the rules that all live tests share: exit 0, 1 or 2, traces kept only of a failure."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parse()
    failed = True
    try:
        prepare(options, name)
        results = Results(getattr(options, "only", "*"))
        test(options, results)
        status = results.end()
        failed = status != 0
        return status
    except EnvironmentProblem as problem:
        print(f"{name}: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        failed = False
        return 130
    finally:
        folder = getattr(options, "folder", None)
        if folder and failed:
            if options.logs:
                # A share of a virtual machine is slow to write to, and only it outlives the machine.
                kept = shutil.copytree(folder, os.path.join(options.logs, os.path.basename(folder)), dirs_exist_ok=True,
                                       ignore=neither_file_nor_folder)
                shutil.rmtree(folder, ignore_errors=True)
                folder = kept
            print(f"{name}: logs are kept in {folder}", file=sys.stderr)
        elif folder:
            shutil.rmtree(folder, ignore_errors=True)
