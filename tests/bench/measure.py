#!/usr/bin/python3
"""What scripts/bench measures, part by part, on the kernel that it runs on.

requests  time for a proxied request and for a connection, beside each tracer
programs  each BPF program's time a run, beside empty programs
memory    finrace's, and the kernel's, for many connections

Meant for the virtual machine with --icount, where a nanosecond is an instruction. Prints one JSON object on standard output and
talks on standard error. By hand, once scripts/bench has built its objects:
  scripts/vm 6.12 --icount -- tests/bench/measure.py programs
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

HERE = os.path.dirname(os.path.realpath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PROXY, UPSTREAM, CLOSED = 8080, 8081, 9
LOSS_WINDOW = 1.3  # seconds after a lost exchange, and some more, for which finrace looks at more of what processes do
LIMIT = 120  # seconds of virtual time that anything may take to start or stop
WRK_CONNECTIONS = 16


class BenchError(Exception):
    pass


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def wait_until(condition, what, limit=LIMIT):
    deadline = time.monotonic() + limit
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not within {limit} s")
        time.sleep(0.02)
    return result


# --- load ------------------------------------------------------------------------------------------------------------------

NGINX = """
worker_processes 1;
error_log {folder}/{name}.error warn;
pid {folder}/{name}.pid;
daemon off;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    keepalive_timeout 1h;
    keepalive_requests 1000000000;
    client_body_temp_path {folder}/{name}.body;
    proxy_temp_path {folder}/{name}.proxy;
    fastcgi_temp_path {folder}/{name}.fastcgi;
    uwsgi_temp_path {folder}/{name}.uwsgi;
    scgi_temp_path {folder}/{name}.scgi;
    {body}
}}
"""
PROXY_BODY = f"""
    upstream fast {{
        server 127.0.0.1:{UPSTREAM};
        keepalive 64;
        keepalive_timeout 1h;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{PROXY} reuseport;
        location / {{
            proxy_pass http://fast;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
        location = /lost {{ proxy_pass http://127.0.0.1:{CLOSED}; }}
    }}
"""
UPSTREAM_BODY = f"""
    server {{
        listen 127.0.0.1:{UPSTREAM} backlog=4096;
        location / {{ return 200 "ok\\n"; }}
    }}
"""


def port_answers(port):
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex(("127.0.0.1", port)) == 0


def catches_interrupt(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return int(re.search(r"^SigCgt:\s+(\w+)", file.read(), re.M)[1], 16) >> (signal.SIGINT - 1) & 1


class Load:
    """nginx as a proxy in front of nginx as a fast upstream, and wrk as the client; one worker each."""

    def __init__(self, folder):
        self.folder = folder
        self.servers = []

    def __enter__(self):
        for name, body, port in (("upstream", UPSTREAM_BODY, UPSTREAM), ("proxy", PROXY_BODY, PROXY)):
            if port_answers(port):
                raise BenchError(f"port {port} of this machine is in use; the benchmark needs {PROXY} and {UPSTREAM}")
            path = os.path.join(self.folder, f"{name}.conf")
            with open(path, "w", encoding="ascii") as file:
                file.write(NGINX.format(folder=self.folder, name=name, body=body))
            server = subprocess.Popen(["nginx", "-p", self.folder, "-c", path, "-e", os.path.join(self.folder, f"{name}.error")],
                                      stdin=subprocess.DEVNULL, stdout=sys.stderr)
            self.servers.append(server)
            wait_until(lambda port=port: port_answers(port), f"nginx as {name}")
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.send_signal(signal.SIGQUIT if server.poll() is None else 0)
            try:
                server.wait(LIMIT)
            except subprocess.TimeoutExpired:
                server.kill()

    def run(self, port, seconds, *, keep_alive=True, connections=WRK_CONNECTIONS):
        """Requests and microseconds; not while finrace looks after what an earlier run's end broke off."""
        time.sleep(LOSS_WINDOW)
        header = [] if keep_alive else ["-H", "Connection: close"]
        command = ["wrk", "-t1", f"-c{connections}", "-d1h", *header, "-s", os.path.join(HERE, "report.lua"),
                   f"http://127.0.0.1:{port}/"]
        # wrk counts whole seconds only; an interrupt ends it sooner, and it reports the time that it really took.
        wrk = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            # Virtual time leaps while nobody runs, as when a program is still being read from disk.
            wait_until(lambda: wrk.poll() is not None or catches_interrupt(wrk.pid), "wrk to begin")
            time.sleep(seconds)
            wrk.send_signal(signal.SIGINT)
            output = wrk.communicate(timeout=LIMIT)[0]
        finally:
            if wrk.poll() is None:
                wrk.kill()
                wrk.wait()
        found = re.search(r"^RESULT (.*)$", output, re.M)
        if not found:
            raise BenchError(f"wrk failed ({wrk.returncode}): {output}")
        figures = json.loads(found[1])
        if figures["errors"] or not figures["requests"]:
            raise BenchError(f"wrk had errors: {figures}")
        return figures["requests"], figures["microseconds"]


# --- tracers ---------------------------------------------------------------------------------------------------------------


def processor_ns(pid):
    """What all threads of a process have run, to the nanosecond."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/schedstat", encoding="ascii") as file:
            total += int(file.read().split()[0])
    return total


def resident_kb(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return int(re.search(r"^VmRSS:\s+(\d+) kB", file.read(), re.M)[1])


def watches_kernel(pid):
    """Whether a process holds what watches the kernel: a BPF link, a perf event, or a packet socket."""
    with contextlib.suppress(FileNotFoundError):
        with open("/proc/net/packet", encoding="ascii") as file:
            packet_sockets = {line.split()[-1] for line in file}
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
                if "bpf_link" in target or "perf_event" in target or "bpf-link" in target:
                    return True
                if target.startswith("socket:[") and target[8:-1] in packet_sockets:
                    return True
    return False


class Tracer:
    """A program that watches. Its output goes to a file; `evidence` must be in it at the end, or it saw nothing."""

    def __init__(self, command, folder, *, ready=None, evidence=None, stop=signal.SIGINT, name=None):
        self.name = name or os.path.basename(command[0])
        self.command, self.ready, self.evidence, self.stop = command, ready, evidence, stop
        self.out = os.path.join(folder, "tracer.out")
        self.err = os.path.join(folder, "tracer.err")
        self.process = None

    def words(self):
        text = ""
        for path in (self.out, self.err):
            with open(path, encoding="utf-8", errors="replace") as file:
                text += file.read()
        return text

    def __enter__(self):
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        wait_until(self.is_ready, f"{self.name} to be ready")
        return self

    def is_ready(self):
        if self.process.poll() is not None:
            raise BenchError(f"{self.name} ended at once with {self.process.returncode}:\n{self.words()}")
        if self.ready:
            return re.search(self.ready, self.words(), re.M)
        if not watches_kernel(self.process.pid):
            return False
        # It says nothing: it is ready once it has nothing more to do.
        before = processor_ns(self.process.pid)
        time.sleep(0.5)
        return processor_ns(self.process.pid) - before < 20_000_000

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            self.process.send_signal(self.stop)
        try:
            self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            if kind is None:
                raise BenchError(f"{self.name} did not end on {self.stop.name}")  # noqa: B904
        if kind is None and self.evidence and not re.search(self.evidence, self.words(), re.M):
            raise BenchError(f"{self.name} saw nothing of the traffic; its output:\n{self.words()[-2000:]}")


def finrace(binary, folder, *arguments):
    output = os.path.join(folder, "finrace.jsonl")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(output)
    return Tracer([binary, "run", "--output", output, *arguments], folder, ready="^finrace: ready")


def finrace_health(folder):
    """finrace's last finrace.health record."""
    last = None
    with open(os.path.join(folder, "finrace.jsonl"), encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            if record["event"]["name"] == "finrace.health":
                last = record
    if last is None:
        raise BenchError("finrace wrote no finrace.health record")
    return last


TRACE_FENTRY = ("--backend", "trace", "--attach", "fentry")
TRACE_KPROBE = ("--backend", "trace", "--attach", "kprobe")
CGROUP = ("--backend", "cgroup")


def tracers(arguments, folder):
    """By name, what is compared: a function each, since a tracer runs more than once."""
    binary = arguments.finrace
    return {
        "none": None,
        "finrace trace, fentry": lambda: finrace(binary, folder, *TRACE_FENTRY),
        "finrace trace, kprobe": lambda: finrace(binary, folder, *TRACE_KPROBE),
        "finrace cgroup": lambda: finrace(binary, folder, *CGROUP),
        "finrace trace, fentry, --connections": lambda: finrace(binary, folder, *TRACE_FENTRY, "--connections"),
        "an empty fentry program": lambda: bare(arguments, folder, "empty_fentry"),
        "an empty kprobe program": lambda: bare(arguments, folder, "empty_kprobe"),
        "empty cgroup programs": lambda: bare(arguments, folder, "empty_cgroup", cgroup_root()),
        "the least by fentry": lambda: bare(arguments, folder, "least_fentry"),
        "the least by kprobe": lambda: bare(arguments, folder, "least_kprobe"),
        "the least by cgroup": lambda: bare(arguments, folder, "least_cgroup", cgroup_root()),
        "tcpstates": lambda: Tracer(["/usr/sbin/tcpstates"], folder, evidence=rf"\b{UPSTREAM}\b"),
        "tcplife": lambda: Tracer(["/usr/sbin/tcplife"], folder, evidence=rf"\b{UPSTREAM}\b"),
        "bpftrace script": lambda: Tracer(["bpftrace", os.path.join(HERE, "watch.bt")], folder, evidence=r"^@closes: [1-9]"),
        "tcpdump": lambda: Tracer(["tcpdump", "-i", "lo", "-n", "-Z", "root", "-w", "/dev/null", f"tcp port {UPSTREAM}"], folder,
                                  ready="^tcpdump: listening", evidence=r"^[1-9]\d+ packets captured"),
    }


# --- A: instructions for a request, and for a connection -------------------------------------------------------------------

def settled_ns(pid):
    """What a process has run once it has nothing more to do."""
    before, now = -1, processor_ns(pid)
    for _ in range(100):
        time.sleep(0.3)
        before, now = now, processor_ns(pid)
        if now - before < 1_000_000:
            return now
    raise BenchError(f"process {pid} never has nothing to do")


def measure_load(load, arguments, tracer, repeat):
    """For each kind of load and each repetition: instructions for one, and those that the tracer's process ran itself. What it
    puts off until the load has ended counts as well."""
    figures = {"request": [], "request_own": [], "connection": [], "connection_own": [], "resident_kb": None}
    kinds = [("request", PROXY, True, arguments.seconds)]
    if arguments.connections:
        kinds.append(("connection", UPSTREAM, False, arguments.seconds / 2))
    for kind, port, keep_alive, seconds in kinds:
        load.run(port, 0.1, keep_alive=keep_alive)
        for _ in range(repeat):
            before = settled_ns(tracer.process.pid) if tracer else 0
            requests, microseconds = load.run(port, seconds, keep_alive=keep_alive)
            at_end = processor_ns(tracer.process.pid) if tracer else 0
            after = settled_ns(tracer.process.pid) if tracer else 0
            figures[kind].append((microseconds * 1000 + after - at_end) / requests)
            if tracer:
                figures[f"{kind}_own"].append((after - before) / requests)
    if tracer:
        figures["resident_kb"] = resident_kb(tracer.process.pid)
    return figures


def requests_part(arguments, folder):
    """The tracers one by one, and before, between and after them none: what drifts over the run drifts for both."""
    known = tracers(arguments, folder)
    order = arguments.tracers.split(";") if arguments.tracers else list(known)[1:]
    for name in order:
        if name not in known:
            raise BenchError(f"unknown tracer '{name}'; accepted: {'; '.join(known)}")
    rounds = []
    with Load(folder) as load:
        load.run(PROXY, 0.3)
        load.run(UPSTREAM, 0.2, keep_alive=False)
        for name in ["none", *(name for tracer in order for name in (tracer, "none"))]:
            make = known[name]
            with make() if make else contextlib.nullcontext() as tracer:
                figures = measure_load(load, arguments, tracer, arguments.repeat if tracer else max(1, arguments.repeat // 2))
            if name.startswith("finrace"):
                figures["lost"] = finrace_health(folder)["finrace"]["lost_events"]
            figures["tracer"] = name
            rounds.append(figures)
            say(f"{name}: a request {statistics.mean(figures['request']):.0f}"
                + (f", a connection {statistics.mean(figures['connection']):.0f}" if arguments.connections else ""))
    return {"rounds": rounds}


# --- B: each program's cost a run ------------------------------------------------------------------------------------------


def programs():
    result = subprocess.run(["bpftool", "-j", "prog", "show"], capture_output=True, check=True)
    return {program["name"]: (program.get("run_cnt", 0), program.get("run_time_ns", 0))
            for program in json.loads(result.stdout) if "name" in program}


@contextlib.contextmanager
def statistics_on():
    path = "/proc/sys/kernel/bpf_stats_enabled"
    with open(path, encoding="ascii") as file:
        before = file.read()
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write("1")
        yield
    finally:
        with open(path, "w", encoding="ascii") as file:
            file.write(before)


def bare(arguments, folder, name, *cgroup):
    """The programs of a file of their own."""
    os.makedirs(os.path.join(folder, name), exist_ok=True)
    command = [os.path.join(HERE, "attach.py"), os.path.join(arguments.build, f"{name}.bpf.o"), *cgroup]
    return Tracer(command, os.path.join(folder, name), ready="^attach.py: ready", stop=signal.SIGTERM)


def cgroup_root():
    with open("/proc/mounts", encoding="ascii") as file:
        for line in file:
            if line.split()[2] == "cgroup2":
                return line.split()[1]
    raise BenchError("no cgroup v2 hierarchy is mounted: none of type cgroup2 in /proc/mounts")


@contextlib.contextmanager
def losses():
    """The proxy's upstream refuses five times a second: finrace looks for what the proxy does next all the time."""
    over = threading.Event()

    def refuse():
        while not over.wait(0.2):
            with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(f"http://127.0.0.1:{PROXY}/lost", timeout=5):
                pass

    worker = threading.Thread(target=refuse)
    worker.start()
    try:
        yield
    finally:
        over.set()
        worker.join()


def per_program(load, arguments, folder, options, which, after_loss):
    """Runs and time a run of each BPF program under keep-alive load, above nothing; the empty ones among them."""
    cgroup = [cgroup_root()] if which == "cgroup" else []
    with finrace(arguments.finrace, folder, *options), bare(arguments, folder, f"empty_{which}", *cgroup):
        # One connection: a packet for each request and each answer, acknowledgements ride along.
        load.run(PROXY, max(0.1, arguments.seconds / 4), connections=1)
        with statistics_on():
            before = programs()
            with losses() if after_loss else contextlib.nullcontext():
                load.run(PROXY, arguments.seconds, connections=1)
            after = programs()
    costs = {}
    for name, (count, spent) in after.items():
        count_before, spent_before = before.get(name, (0, 0))
        if count - count_before >= 100:
            costs[name] = {"runs": count - count_before, "ns": (spent - spent_before) / (count - count_before)}
    return costs


WAYS = {"fentry": (TRACE_FENTRY, "fentry"), "kprobe": (TRACE_KPROBE, "kprobe"), "cgroup": (CGROUP, "cgroup")}


def programs_part(arguments, folder):
    results = []
    with Load(folder) as load:
        for way in arguments.ways.split(","):
            options, which = WAYS[way]
            for follow, after_loss in (("clients", False), ("clients", True), ("all", False)):
                more = ("--connections",) if follow == "all" else ()
                costs = per_program(load, arguments, folder, (*options, *more), which, after_loss)
                what = f"{follow}, after a loss" if after_loss else follow
                say(f"{way}, following {what}: " + ", ".join(f"{name} {cost['ns']:.0f} ({cost['runs']} runs)"
                                                              for name, cost in costs.items()))
                results.append({"way": way, "follow": what, "costs": costs})
    return {"programs": results}


# --- D: memory -------------------------------------------------------------------------------------------------------------


def slabs():
    """Bytes in use by slab cache."""
    found = {}
    with open("/proc/slabinfo", encoding="ascii") as file:
        for line in file:
            fields = line.split()
            if len(fields) > 6 and fields[1].isdigit():
                found[fields[0]] = int(fields[1]) * int(fields[3])
    return found


HOLD = 8000  # connections, two sockets each, that one process keeps open: the usual limit of open files is 20,000 or more


def hold_connections(address, count, done):
    """Opens connections of this process with itself, says so, and keeps them until it is terminated."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * count + 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    listener = socket.create_server((address, 9000), backlog=4096)
    held = []
    for _ in range(count):
        client = socket.create_connection((address, 9000))
        client.sendall(b"x")
        held += [client, listener.accept()[0]]
    done.set()
    signal.pause()


@contextlib.contextmanager
def many_connections(count):
    """That many connections, each process with a loopback address of its own."""
    holders = []
    try:
        for number in range(-(-count // HOLD)):
            done = multiprocessing.Event()
            holder = multiprocessing.Process(target=hold_connections, daemon=True,
                                             args=(f"127.1.0.{number + 1}", min(HOLD, count - number * HOLD), done))
            holder.start()
            holders.append(holder)
            wait_until(lambda done=done, holder=holder: done.is_set() or holder.exitcode is not None, "connections", 600)
            if not done.is_set():
                raise BenchError(f"a process that holds connections ended with {holder.exitcode}")
        yield
    finally:
        for holder in holders:
            holder.terminate()
            holder.join(LIMIT)


def memory_part(arguments, folder):
    count = arguments.count
    results = []
    for way in ["none", *arguments.ways.split(",")]:
        with finrace(arguments.finrace, folder, *WAYS[way][0]) if way != "none" else contextlib.nullcontext() as tracer:
            before, idle_kb = slabs(), resident_kb(tracer.process.pid) if tracer else 0
            with many_connections(count):
                time.sleep(1)
                after = slabs()
                growth = {name: size - before.get(name, 0) for name, size in after.items()}
                figures = {"way": way, "slab": growth, "idle_kb": idle_kb, "maps": {}}
                if tracer:
                    figures["resident_kb"] = resident_kb(tracer.process.pid)
                    shown = subprocess.run(["bpftool", "-j", "map", "show"], capture_output=True, check=True)
                    figures["maps"] = {entry["name"]: entry.get("bytes_memlock", 0) for entry in json.loads(shown.stdout)
                                       if "name" in entry}
            time.sleep(2)  # for the kernel to give the sockets' memory back
        if tracer and finrace_health(folder)["finrace"]["health"]["connections"]["begun"] < count:
            raise BenchError(f"finrace did not see all {count} connections: {finrace_health(folder)}")
        say(f"{way}: finrace {figures.get('resident_kb', 0)} kB resident, slab {sum(growth.values()) / count:.0f} bytes a connection")
        results.append(figures)
    return {"count": count, "memory": results}


PARTS = {"requests": requests_part, "programs": programs_part, "memory": memory_part}


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--build", default=os.path.join(ROOT, "build/bench"), help="the folder with the empty programs' objects")
    parser.add_argument("--finrace", default=os.path.join(ROOT, "build/finrace"), help="the binary")
    parser.add_argument("--seconds", type=float, default=0.5, help="of virtual time, for each figure")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tracers", help="for requests: which, in this order, separated by semicolons")
    parser.add_argument("--no-connections", dest="connections", action="store_false", help="keep-alive requests only")
    parser.add_argument("--ways", default="fentry,kprobe,cgroup", help="for programs and memory")
    parser.add_argument("--count", type=int, default=100_000, help="for memory: connections")
    arguments = parser.parse_args()
    folder = os.path.join("/tmp", f"finrace-bench-{os.getpid()}")
    os.mkdir(folder)
    os.chmod(folder, 0o755)
    # Who starts us in the background may have had SIGINT ignored, for our children as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        report = PARTS[arguments.part](arguments, folder)
        report["kernel"] = os.uname().release
        print(json.dumps(report))
        return 0
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        say(str(error))
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
