#!/usr/bin/python3
"""What scripts/bench measures on this machine's own kernel, where time is time: always as ratios or medians of many rounds.

throughput  requests a second of a saturated nginx, alternating without a tracer, with finrace, with tcpdump
rate        processor time and memory of each tracer at a fixed request rate
latency     from the end of a connection to the line on finrace's output
storm       connections opened and closed a second, more and more, until finrace loses an event

Prints one JSON object on standard output and talks on standard error.
"""
import argparse
import calendar
import contextlib
import json
import multiprocessing
import os
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

sys.dont_write_bytecode = True
import measure  # noqa: E402
from measure import CGROUP, PROXY, UPSTREAM, BenchError, Load, say  # noqa: E402

STORM_PORT, LATENCY_PORT = 9000, 9001
LATENCY_ROUNDS = 5


def tcpdump(folder):
    return measure.Tracer(["tcpdump", "-i", "lo", "-n", "-Z", "root", "-w", "/dev/null", f"tcp port {UPSTREAM}"], folder,
                          ready="^tcpdump: listening", evidence=r"^[1-9]\d* packets captured")


def tracers(arguments, folder):
    return {"none": contextlib.nullcontext, "finrace": lambda: measure.finrace(arguments.finrace, folder, *arguments.options),
            "tcpdump": lambda: tcpdump(folder)}


# --- throughput ------------------------------------------------------------------------------------------------------------


def throughput(arguments, folder):
    known = tracers(arguments, folder)
    rounds = []
    with Load(folder) as load:
        load.run(PROXY, 1)
        names = list(known)
        for number in range(arguments.rounds):
            figures = {}
            # Each tracer comes first, second and last equally often: what grows or fades over a round evens out.
            for name in names[number % 3:] + names[:number % 3]:
                with known[name]():
                    load.run(PROXY, 0.3)
                    requests, microseconds = load.run(PROXY, arguments.seconds)
                figures[name] = requests / microseconds * 1e6
            rounds.append(figures)
            say(f"throughput, round {number + 1}: " + ", ".join(f"{name} {rate:.0f}/s" for name, rate in figures.items()))
    return rounds


# --- processor time and memory at a fixed rate -----------------------------------------------------------------------------


class Pace:
    """A client that sends requests at a fixed rate over keep-alive connections, each when it is due."""

    REQUEST = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{PROXY}\r\n\r\n".encode()

    def __init__(self, connections):
        self.selector = selectors.DefaultSelector()
        self.idle = []
        for _ in range(connections):
            client = socket.create_connection(("127.0.0.1", PROXY))
            client.setblocking(False)
            self.selector.register(client, selectors.EVENT_READ)
            self.idle.append(client)

    def run(self, rate, seconds):
        """Requests answered."""
        answered = sent = 0
        start = time.monotonic()
        while (now := time.monotonic()) < start + seconds:
            while self.idle and sent < (now - start) * rate:
                self.idle[-1].sendall(self.REQUEST)
                self.idle.pop()
                sent += 1
            for key, _ in self.selector.select(max(0.0, start + (sent + 1) / rate - time.monotonic())):
                if not (answer := key.fileobj.recv(65536)).startswith(b"HTTP/1.1 200"):
                    raise BenchError(f"the proxy answered {answer[:80]!r}")
                answered += 1
                self.idle.append(key.fileobj)
        return answered

    def close(self):
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()
        self.selector.close()


def fixed_rate(arguments, folder):
    known = tracers(arguments, folder)
    results = {}
    with Load(folder):
        for name in ("finrace", "tcpdump"):
            with known[name]() as tracer:
                pace = Pace(50)
                pace.run(arguments.rate, 1)
                before = measure.processor_ns(tracer.process.pid)
                answered = pace.run(arguments.rate, arguments.seconds * 3)
                own = measure.processor_ns(tracer.process.pid) - before
                programs = 0
                if name == "finrace":
                    # A second time for the programs in the kernel: counting them costs time, too.
                    with measure.statistics_on():
                        first = measure.programs()
                        pace.run(arguments.rate, arguments.seconds)
                        programs = sum(spent - first.get(program, (0, 0))[1]
                                       for program, (_, spent) in measure.programs().items()) / arguments.seconds
                resident = measure.resident_kb(tracer.process.pid)
                pace.close()
            results[name] = {"requests_per_second": answered / (arguments.seconds * 3),
                             "own_percent": own / (arguments.seconds * 3) / 1e7, "programs_percent": programs / 1e7,
                             "resident_kb": resident}
            say(f"rate: {name} {results[name]}")
    return {"rate": arguments.rate, "tracers": results}


# --- from the end to the line ----------------------------------------------------------------------------------------------


def parse_timestamp(text):
    """Nanoseconds since 1970 of an RFC 3339 time in UTC."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    return calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) * 10**9 + int(fraction.ljust(9, "0"))


def read_control(source, sink, results):
    """The control: how late another process is when woken by a pipe, with nothing else to do."""
    os.close(sink)
    with os.fdopen(source, "rb", 0) as pipe:
        results.send([(time.time_ns() - int.from_bytes(data, "little")) / 1000 for data in iter(lambda: pipe.read(8), b"")])


def read_verdicts(source, sink, results):
    """Microseconds from each verdict's own time to its arrival. Nothing but reading while they come."""
    os.close(sink)
    chunks = []
    while data := os.read(source, 1 << 16):
        chunks.append((time.time_ns(), data))
    delays, rest = [], b""
    for now, data in chunks:
        *lines, rest = (rest + data).split(b"\n")
        for record in map(json.loads, lines):
            if record["event"]["name"] == "finrace.verdict" and record["network"]["peer"]["port"] == LATENCY_PORT:
                delays.append((now - parse_timestamp(record["timestamp"])) / 1000)
    results.send(delays)


class Reader:
    """A process of its own that reads a pipe by `read`, and says at its end what it has measured."""

    def __init__(self, read):
        source, self.sink = os.pipe()
        self.results, results = multiprocessing.Pipe(duplex=False)
        self.process = multiprocessing.get_context("fork").Process(target=read, args=(source, self.sink, results), daemon=True)
        self.process.start()
        os.close(source)

    def close(self):
        if self.sink >= 0:
            os.close(self.sink)
        self.sink = -1

    def delays(self):
        self.close()
        if not self.results.poll(10):
            raise BenchError("a reading process said nothing within 10 s")
        return self.results.recv()


def spread(delays):
    delays = sorted(delays)
    return {"p50_us": delays[len(delays) // 2], "p99_us": delays[len(delays) * 99 // 100], "max_us": delays[-1]}


def latency(arguments, folder):
    """The median of some rounds: one burst of a neighbour's on this machine is a round's whole hundredth."""
    rounds = [latency_round(arguments, folder) for _ in range(LATENCY_ROUNDS)]

    def medians(of):
        return {key: statistics.median(one[key] for one in of) for key in ("p50_us", "p99_us", "max_us")}

    p99 = [one["p99_us"] for one in rounds]
    return {"verdicts": sum(one["verdicts"] for one in rounds), "rounds": len(rounds), "p99_us_range": [min(p99), max(p99)],
            **medians(rounds), "control": medians([one["control"] for one in rounds])}


def latency_round(arguments, folder):
    """Requests that a server reads and answers with nothing but its FIN: a verdict each, due at once."""
    control = Reader(read_control)
    verdicts = Reader(read_verdicts)
    with open(os.path.join(folder, "latency.err"), "w+b") as err:
        process = subprocess.Popen([arguments.finrace, "run", *arguments.options], stdin=subprocess.DEVNULL,
                                   stdout=verdicts.sink, stderr=err)
        verdicts.close()
        try:
            measure.wait_until(lambda: b"finrace: ready" in os.pread(err.fileno(), 65536, 0), "finrace to be ready", 30)
            with socket.create_server(("127.0.0.1", LATENCY_PORT)) as server:
                for _ in range(arguments.accidents):
                    with socket.create_connection(("127.0.0.1", LATENCY_PORT)) as client:
                        accepted = server.accept()[0]
                        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
                        accepted.recv(100)
                        accepted.close()
                        client.recv(100)
                    time.sleep(0.002)
                    os.write(control.sink, time.time_ns().to_bytes(8, "little"))
                    time.sleep(0.002)
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            process.wait(30)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    delays = verdicts.delays()
    if len(delays) != arguments.accidents:
        raise BenchError(f"{arguments.accidents} accidents, but {len(delays)} verdicts")
    figures = {"verdicts": len(delays), **spread(delays), "control": spread(control.delays())}
    say(f"latency: {figures}")
    return figures


# --- connections until the first loss --------------------------------------------------------------------------------------


def serve_storm(address):
    with socket.create_server((address, STORM_PORT), backlog=4096) as server:
        while True:
            server.accept()[0].close()


def open_and_close(address, rate, seconds, result):
    done = 0
    start = time.monotonic()
    while (now := time.monotonic()) < start + seconds:
        if done >= (now - start) * rate:
            time.sleep(0.0005)
            continue
        with socket.socket() as client:
            client.connect((address, STORM_PORT))
            client.recv(1)  # the server's FIN: it closes first, so the port is free again at once
        done += 1
    result.value = done


def storm_round(arguments, folder, rate, seconds, *options):
    """Connections a second as reached, and what finrace lost of their events."""
    with measure.finrace(arguments.finrace, folder, *arguments.options, *options):
        clients = []
        for number in range(2):
            result = multiprocessing.Value("L", 0)
            clients.append((multiprocessing.Process(target=open_and_close,
                                                    args=(f"127.2.0.{number + 1}", rate / 2, seconds, result)), result))
        for client, _ in clients:
            client.start()
        for client, _ in clients:
            client.join(seconds + 30)
            if client.exitcode != 0:
                raise BenchError(f"the storm's client ended with {client.exitcode}")
    health = measure.finrace_health(folder)["finrace"]
    reached = sum(result.value for _, result in clients)
    if health["health"]["connections"]["begun"] < reached:
        raise BenchError(f"finrace saw {health['health']['connections']['begun']} connections begin, there were {reached}")
    return {"asked": rate, "reached": reached / seconds, "events": health["health"]["events"], "lost": health["lost_events"]}


def storm(arguments, folder):
    servers = [multiprocessing.Process(target=serve_storm, args=(f"127.2.0.{number + 1}",), daemon=True) for number in range(2)]
    for server in servers:
        server.start()
    steps = []
    try:
        for number in range(2):
            measure.wait_until(lambda number=number: reachable(f"127.2.0.{number + 1}"), "the storm's server", 10)
        for rate in (1000, 2000, 4000, 8000, 16000, 32000, 64000):
            steps.append(storm_round(arguments, folder, rate, arguments.seconds))
            say(f"storm: {steps[-1]}")
            if steps[-1]["lost"] or steps[-1]["reached"] < rate * 0.7:
                break
        # The other end of the scale: a ring of 17 events.
        smallest = storm_round(arguments, folder, rate, arguments.seconds, "--ring-bytes", "4k")
        say(f"storm, smallest ring: {smallest}")
    finally:
        for server in servers:
            server.terminate()
            server.join(10)
    return {"steps": steps, "smallest_ring": smallest}


def reachable(address):
    with socket.socket() as client:
        return client.connect_ex((address, STORM_PORT)) == 0


PARTS = {"throughput": throughput, "rate": fixed_rate, "latency": latency, "storm": storm}


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--finrace", default=os.path.join(measure.ROOT, "build/finrace"), help="the binary")
    parser.add_argument("--seconds", type=float, default=2, help="for each figure")
    parser.add_argument("--rounds", type=int, default=12, help="of throughput")
    parser.add_argument("--rate", type=int, default=2000, help="requests a second")
    parser.add_argument("--accidents", type=int, default=1000, help="for latency")
    arguments = parser.parse_args()
    arguments.options = CGROUP
    folder = os.path.join("/tmp", f"finrace-bench-{os.getpid()}")
    os.mkdir(folder)
    os.chmod(folder, 0o755)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        print(json.dumps({"figures": PARTS[arguments.part](arguments, folder), "kernel": os.uname().release}))
        return 0
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        say(str(error))
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
