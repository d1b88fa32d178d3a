#!/usr/bin/python3
"""The soak: a loaded nginx that races, while all around finrace is reloaded, rotated, filled, killed and started again.

One nginx proxies to two upstreams: a fast one near it (the load, by wrk, at a share of what nginx takes at most, measured first),
and uvicorn behind a delay line (the races, by clients spaced around its timer). finrace writes into a file that logrotate rotates
and syslog-ng sends to ClickHouse, onto a disk that fills, and to two sockets whose readers are killed and stand still. Events come
at random, from a seed. Then all is added up:

* the truth of the races is proxy_lab.py's, from nginx's logs, the clients and a capture; a failure within a time in which finrace
  was not there is left out, and counted;
* a number that an output has not had is a record that finrace says to have dropped there, or that a killed reader took along;
* each record of the file is in ClickHouse once, and the fleet's report equals the local ones, added up;
* in the last run, which no event ends, memory, maps and descriptors stay what they are.

  soak.py --minutes 120                      all of it
  soak.py --minutes 10 --load 0.1            a cut that leaves most of the machine to others
  soak.py --self-test                        that its judges find what is wrong
"""

import argparse
import heapq
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

sys.dont_write_bytecode = True
TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[1:1] = [os.path.join(TESTS, "live"), os.path.join(TESTS, "pipelines")]
import delivery  # noqa: E402
import harness  # noqa: E402
import proxy_lab  # noqa: E402
import soak_ledger  # noqa: E402
from clickhouse import free_ports  # noqa: E402
from collectors import rotate, syslog_ng_files  # noqa: E402
from fleet import added_up, fleet_report, report_of  # noqa: E402
from harness import LIMIT, Finrace, Wrong, must, need, wait_for  # noqa: E402
from proxy_lab import Child, Lab, LabError  # noqa: E402
from robustness import mount, unmount  # noqa: E402
from soak_ledger import Disk, Ledger, Reader, judge_output, missing_at  # noqa: E402

KEEP_ALIVE = 1  # seconds, uvicorn's
WRK_CONNECTIONS = 32
BOUT = 20  # seconds of wrk at one pace, which the next corrects
CHURN = 50  # connections a second to the fast upstream, whatever the load: they make the records
DISK = "size=2m"
UNSETTLED = 3.0  # seconds before a kill whose verdicts may not have been written, and after a start
SHARE_OF_ENDS = 0.35  # of the time: in it finrace is killed and started anew, and never later
PERIOD = 90  # seconds between two comparisons of client, logs and wire
SAMPLE = 2.0  # seconds
ORDERLY, KILLED = "in order", "killed"


def say(text):
    print(f"          {time.strftime('%H:%M:%S')} {text}", flush=True)


# ---- nginx, its upstreams, and what goes through -------------------------------------------------------------------------


class Stage(Lab):
    """The race lab, with a fast upstream beside it behind the same nginx."""

    def __init__(self, options):
        super().__init__("uvicorn", clients=options.clients, keep_alive=KEEP_ALIVE, delay_line=options.delay_line, seed=options.seed)
        self.fast_port = self.port + 20000
        self.requests_each = 1000  # on a connection to the fast upstream
        self.failed, self.raced, self.succeeded, self.trouble, self.unsent = [], 0, 0, [], 0

    def _upstream(self):
        super()._upstream()
        self.write_fast()
        self.fast = self.start_nginx("fast")
        proxy_lab.wait_for("the fast upstream listens", lambda: proxy_lab.listens(self.fast.process.pid, self.fast_port), child=self.fast)

    def start_nginx(self, name):
        return Child(self, name, [proxy_lab.need("nginx", "nginx-light"), "-p", self.directory, "-e", self.directory / f"{name}.log",
                                  "-c", self.directory / f"{name}.conf"], netns=self.left)

    def write_fast(self):
        (self.directory / "fast.conf").write_text(f"""daemon off; user root; worker_processes 1; pid {self.directory}/fast.pid;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_timeout 1h; keepalive_requests {self.requests_each};
  client_body_temp_path {self.directory}/fast-body; proxy_temp_path {self.directory}/fast-proxy;
  fastcgi_temp_path {self.directory}/fast-fastcgi; uwsgi_temp_path {self.directory}/fast-uwsgi; scgi_temp_path {self.directory}/fast-scgi;
  server {{ listen 127.0.0.1:{self.fast_port} backlog=4096; location / {{ return 200 "ok\\n"; }} }}
}}
""")

    def _nginx(self, more="", locations=""):
        # The pool ends first what rests: its races would be mistakes of this configuration. An upstream that counts its
        # connections' requests says so in its last answer.
        super()._nginx(f"""  upstream fast {{ server 127.0.0.1:{self.fast_port}; keepalive {WRK_CONNECTIONS}; keepalive_timeout 5s;
    keepalive_requests 1000000000; }}
  keepalive_requests 1000000000;
""", "    location = /load { access_log off; proxy_pass http://fast; proxy_ignore_client_abort on; }\n")

    def reload(self):
        self.nginx.process.send_signal(signal.SIGHUP)

    def processor_seconds(self):
        """What nginx's workers have run, those that have ended included."""
        def ticks(pid, first, last):
            with open(f"/proc/{pid}/stat", "rb") as file:
                return sum(map(int, file.read().rpartition(b")")[2].split()[first:last]))

        master = self.nginx.process.pid
        total = ticks(master, 13, 15)
        for worker in children(master):
            with suppress(OSError):
                total += ticks(worker, 11, 13)
        return total / os.sysconf("SC_CLK_TCK")

    def wrk(self, seconds, pause):
        """(requests a second, errors) with so many milliseconds between an answer and the connection's next request."""
        script = self.directory / "wrk.lua"
        script.write_text(("local pause = tonumber(os.getenv('PAUSE_MS'))\nfunction delay() return math.floor(pause + math.random()) end\n"
                           if pause > 0 else "") + Path(TESTS, "bench", "report.lua").read_text())
        child = Child(self, f"wrk-{threading.get_ident()}", [
            proxy_lab.need("wrk", "wrk"), "-t1", f"-c{WRK_CONNECTIONS}", f"-d{seconds:.0f}s", "-s", script,
            f"http://127.0.0.1:{self.proxy_port}/load"], netns=self.left, env={**os.environ, "PAUSE_MS": f"{pause:.3f}"})
        child.process.wait(seconds + LIMIT)
        found = re.search(r"RESULT (\{.*\})", child.stdout_path.read_text())
        must(found, lambda: f"wrk: {child.last_words()}")
        result = json.loads(found[1])
        return result["requests"] / result["microseconds"] * 1e6, result["requests"], result["errors"]

    def churn_at(self, rate):
        """So many requests to a connection that CHURN of them end each second. Returns once the connections of before are gone:
        the worker that ends closes them whatever comes on them."""
        self.requests_each = max(2, round(rate / CHURN))
        self.write_fast()
        before = children(self.fast.process.pid)
        self.fast.process.send_signal(signal.SIGHUP)
        proxy_lab.wait_for("the fast upstream's new worker alone", lambda: not before & children(self.fast.process.pid), child=self.fast)
        proxy_lab.wait_for("nginx to see the old worker's connections end",
                           lambda: not proxy_lab.has_connection_to(self.nginx.process.pid, self.fast_port), child=self.nginx)

    # -- races

    def next_period(self):
        """Compares what client, nginx and the wire say of what was; begins a new capture and new logs."""
        self.settle()
        proxy_lab.wait_for("the upstream closes its idle connections", lambda: all(one.peer_close() for one in self.connections()))
        lost = self.capture_losses()
        if lost:
            self.trouble.append(f"the capture missed {lost} packets")
        self.trouble += self.gather()
        self.failed += self.failures
        self.raced += sum(exchange.race for exchange in self.exchanges)
        self.succeeded += sum(not exchange.failed for exchange in self.exchanges)
        self.exchanges = []
        self._capture()
        for name in ("access.log", "error.log"):
            os.rename(self.directory / name, self.directory / f"{name}.1")
        self.nginx.process.send_signal(signal.SIGUSR1)
        proxy_lab.wait_for("nginx opens its logs anew", self.writes_new_logs, child=self.nginx)

    def writes_new_logs(self):
        self.run_clients(self.post(0, False, None))
        return any(self._access_log())


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return set(file.read().split())


class Background(threading.Thread):
    """Work that goes on until `stopping`; its problem is raised by `finish`."""

    def __init__(self, name, turn, stopping):
        super().__init__(name=name, daemon=True)
        self.turn, self.stopping, self.problem = turn, stopping, None
        self.start()

    def run(self):
        try:
            while not self.stopping.is_set():
                self.turn()
        except BaseException as error:  # told by the thread that waits
            self.problem = error
            self.stopping.set()

    def finish(self):
        self.stopping.set()
        self.join(10 * LIMIT)
        must(not self.is_alive(), f"{self.name} does not end")
        self.check()

    def check(self):
        if self.problem is not None:
            raise Wrong(f"{self.name}: {type(self.problem).__name__}: {self.problem}") from self.problem


# ---- finrace, run after run ----------------------------------------------------------------------------------------------


class Run:
    """One life of finrace."""

    def __init__(self, finrace, recording, begun):
        self.finrace, self.recording, self.begun = finrace, recording, begun
        self.ready = self.ended = self.how = None
        self.id = ""

    def dropped_at_end(self, output):
        """Its last word about that output, which is none if nothing was dropped."""
        for text in reversed(self.finrace.said):
            found = re.search(r"(\d+) records were dropped: (.*) did not take them", text)
            if found and found[2] == output:
                return int(found[1])
        return 0


class Tracer:
    def __init__(self, options, stage, outputs, folder):
        self.options, self.stage, self.outputs, self.folder = options, stage, outputs, folder
        self.runs = []
        self.interval = 1
        self.metrics, = free_ports(1)
        self.path = os.path.join(folder, "log", "finrace.jsonl")
        self.config = os.path.join(folder, "etc", "finrace.toml")
        for name in ("log", "etc", "recordings"):
            os.makedirs(os.path.join(folder, name))
        self.write_config("soak-0")

    @property
    def now(self):
        return self.runs[-1]

    @property
    def finrace(self):
        return self.now.finrace

    @property
    def process(self):
        return self.finrace.process

    def write_config(self, name):
        text = (f'interval = "{self.interval}s"\nupstream_name = ["{self.stage.address}:{self.stage.port}={name}"]\n'
                f'upstream = ["{self.stage.address}:{self.stage.port}", "127.0.0.1:{self.stage.fast_port}"]\n')
        with open(self.config + ".new", "w", encoding="ascii") as file:
            file.write(text)
        os.replace(self.config + ".new", self.config)

    def start(self):
        recording = os.path.join(self.folder, "recordings", f"{len(self.runs)}.rec")
        flags = [flag for output in self.outputs for flag in ("--output", output)]
        begun = time.time()
        finrace = Finrace(self.options, "--flat", "--connections", "--ring-bytes", "64M", "--config", self.config, "--metrics", str(self.metrics), "--record", recording,
                          "--keep", "100", *flags, interval=None, output=self.path)
        run = Run(finrace, recording, begun)
        run.ready = time.time()
        known = {one.id for one in self.runs}
        self.runs.append(run)
        run.id = wait_for(lambda: next((one for one in self.last_runs() if one not in known), None), "the new run's first record")

    def tail(self):
        """The newest records, as far as this file has them."""
        with suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 20)))
            return [line for line in file.read().split(b"\n") if soak_ledger.identity(line)]
        return []

    def last_runs(self):
        return [soak_ledger.identity(line)[0] for line in self.tail()[-3:]]

    def health(self, after=0.0):
        for line in reversed(self.tail()):
            if b'"finrace.health"' in line[:120]:
                record = json.loads(line)
                return record if proxy_lab.parse_time(record["timestamp"]) > after and record["finrace.run"] == self.now.id else None
        return None

    def end(self, how):
        must(self.finrace.alive(), lambda: f"finrace has ended: {self.finrace.words()}")
        self.now.how = how
        self.now.ended = time.time()
        if how == KILLED:
            self.finrace.kill()
        else:
            self.finrace.stop(signal.SIGTERM)

    def reload(self):
        """By a changed configuration. Returns once a summary has come in the new rhythm."""
        self.interval = 3 - self.interval
        self.write_config(f"soak-{time.time():.0f}")
        asked = time.time()
        self.finrace.send(signal.SIGHUP)
        wait_for(lambda: (self.health(asked) or {}).get("finrace.health.interval_ms") == self.interval * 1000,
                 lambda: f"finrace to take the changed interval: {self.finrace.words()}")

    def opened(self, path):
        return sum(text.endswith(f"{path} is opened anew") for text in list(self.finrace.said))

    def away(self):
        """Times in which a failure may have no verdict."""
        return [(before.ended - UNSETTLED, after.ready + UNSETTLED) for before, after in itertools.pairwise(self.runs)]


# ---- samples -------------------------------------------------------------------------------------------------------------


class Samples:
    """What finrace takes, and whether its metrics answer."""

    def __init__(self, tracer):
        self.tracer = tracer
        self.memory, self.descriptors, self.maps = [], [], []  # (time, value), of the run that goes on
        self.scrapes = self.refused = 0
        self.run = None
        self.next_maps = 0.0

    def forget(self):
        self.memory, self.descriptors, self.maps = [], [], []

    def turn(self):
        time.sleep(SAMPLE)
        run = self.tracer.now
        if run.ready is None or run.ended is not None:
            return
        try:
            now, pid = time.time(), run.finrace.process.pid
            memory, descriptors = run.finrace.memory(), len(os.listdir(f"/proc/{pid}/fd"))
            if now > self.next_maps:
                self.next_maps = now + 20
                maps = map_bytes(pid)
                if run.ended is None:
                    self.maps.append((now, maps))
            if run.ended is None:
                self.memory.append((now, memory))
                self.descriptors.append((now, descriptors))
            with urllib.request.urlopen(f"http://127.0.0.1:{self.tracer.metrics}/metrics", timeout=LIMIT) as answer:
                text = answer.read().decode()
            must("finrace_races_total" in text and "finrace_lost_total" in text, f"metrics without what is due: {text[:300]}")
            self.scrapes += 1
        except (OSError, Wrong) as error:
            if run.ended is None:  # else it was just ended
                time.sleep(0.5)
            if run.ended is None:
                raise Wrong(f"finrace can't be asked while it runs: {error}") from error
            self.refused += 1


def map_bytes(pid):
    """Of the kernel's memory, what this process's maps hold."""
    held = {number for kind, number in harness.held_objects([pid]) if kind == "map"}
    done = subprocess.run([need("bpftool", "bpftool"), "-j", "map", "list"], capture_output=True, timeout=LIMIT, check=True)
    return sum(int(one.get("bytes_memlock", 0)) for one in json.loads(done.stdout) if one["id"] in held)


# ---- the soak itself -----------------------------------------------------------------------------------------------------


class Soak:
    def __init__(self, options, stack):
        self.options = options
        self.random = random.Random(options.seed)
        self.counts = Counter()
        self.later = []  # (time, number, work): what ends an event
        self.numbers = itertools.count()
        self.deck = []
        self.ledger = Ledger()
        self.result = {}
        self.stopping = threading.Event()
        self.rates, self.sent, self.wrk_errors = [], 0, 0
        folder = options.folder
        self.stage = stack.enter_context(Stage(options))
        sockets, disk = os.path.join(folder, "sockets"), os.path.join(folder, "disk")
        for one in (sockets, disk):
            os.makedirs(one)
        mount("tmpfs", disk, "tmpfs", DISK)
        stack.callback(unmount, disk)
        self.disk = Disk(disk)
        self.readers = [Reader(os.path.join(sockets, kind), kind) for kind in ("unix-stream", "unix-dgram")]
        for reader in self.readers:
            reader.start()
            stack.callback(reader.kill)
        self.tracer = Tracer(options, self.stage, [self.disk.output, *(one.output for one in self.readers)], folder)
        stack.callback(lambda: self.tracer.runs and self.tracer.finrace.kill())
        self.samples = Samples(self.tracer)
        self.store = stack.enter_context(delivery.clickhouse(os.path.join(folder, "clickhouse")))
        self.collector = delivery.syslog_ng(os.path.join(folder, "syslog-ng"), self.tracer.path, self.store)
        stack.callback(self.collector.kill)

    # -- load

    def measure(self):
        """What nginx takes at most where finrace and all that reads it run beside it, and connections end as they will."""
        first, _, _ = self.stage.wrk(5, 0)
        self.stage.churn_at(first * self.options.load)
        seconds = max(5, min(60, self.options.minutes * 3 * self.options.load))
        before, begun = self.stage.processor_seconds(), time.monotonic()
        self.most, _, _ = self.stage.wrk(seconds, 0)
        cores = (self.stage.processor_seconds() - before) / (time.monotonic() - begun)
        self.target = self.most * self.options.load
        say(f"nginx takes {self.most:.0f} requests a second at most here (in {seconds:.0f} s; its worker had {cores:.2f} of a core); "
            f"{self.options.load:.0%} of that is {self.target:.0f}")
        self.stage.churn_at(self.target)
        self.pause = WRK_CONNECTIONS / self.target * 1000

    def load(self):
        """A bout. The next makes up for what is missing so far, if nginx takes as much then."""
        rate, requests, errors = self.stage.wrk(BOUT, self.pause)
        self.rates.append(rate)
        self.sent += requests
        self.wrk_errors += errors
        taken = WRK_CONNECTIONS / rate * 1000 - self.pause
        due = min(self.most, max(self.target, self.target * (len(self.rates) + 1) - sum(self.rates)))
        self.pause = max(0.001, WRK_CONNECTIONS / due * 1000 - max(taken, 0))

    def race(self):
        left = self.ends - time.monotonic()
        seconds = min(PERIOD, left)
        if seconds > 5 * KEEP_ALIVE:
            self.stage.race(int(seconds * self.options.clients / (1.3 * KEEP_ALIVE)))
        self.stage.next_period()
        if left <= PERIOD:
            self.stopping.wait()

    # -- events

    def after(self, seconds, work):
        heapq.heappush(self.later, (time.monotonic() + seconds, next(self.numbers), work))

    def due(self):
        while self.later and self.later[0][0] <= time.monotonic():
            heapq.heappop(self.later)[2]()

    def happen(self, name, work, *arguments):
        """An event, unless `work` says that there was nothing to do."""
        if work(*arguments) is not False:
            self.counts[name] += 1
            say(" ".join([name, *(f"({one.kind})" for one in arguments if isinstance(one, Reader))]))

    def kill_reader(self, reader):
        if not reader.alive:
            return False
        reader.kill()
        self.after(self.random.uniform(0, 20), reader.start)
        return True

    def hold_reader(self, reader):
        if not reader.alive or reader.holds.is_set():
            return False
        reader.holds.set()
        self.after(self.random.uniform(5, 150), reader.holds.clear)
        return True

    def rotate(self):
        """Not while syslog-ng is away: what is rotated then, it never reads (docs/pipelines.md)."""
        self.bring_back(self.collector)
        before = self.tracer.opened(self.tracer.path)
        rotate(self.options.folder, self.tracer.path, self.tracer)
        wait_for(lambda: self.tracer.opened(self.tracer.path) > before, "finrace to open its file anew")
        wait_for(self.collector_follows, lambda: f"syslog-ng to follow the new file: {self.collector.words()[-500:]}")
        for path in self.rotated("*.gz"):
            self.ledger.take(path)
            os.unlink(path)

    def collector_follows(self):
        wanted, folder = os.stat(self.tracer.path), f"/proc/{self.collector.process.pid}/fd"
        for fd in os.listdir(folder):
            with suppress(OSError):
                found = os.stat(os.path.join(folder, fd))
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return True
        return False

    def rotated(self, glob):
        return sorted(map(str, Path(self.tracer.path).parent.glob(Path(self.tracer.path).name + "." + glob)))

    def watch_disk(self):
        """Full, it stays so for a while."""
        if self.disk.is_full() and not self.emptying:
            self.emptying = True
            self.counts["disk full"] += 1
            say("disk full")
            self.after(self.random.uniform(2, 60), self.empty_disk)

    def empty_disk(self):
        before = self.tracer.opened(self.disk.path)
        self.disk.move()
        self.tracer.finrace.send(signal.SIGHUP)
        wait_for(lambda: self.tracer.opened(self.disk.path) > before, "finrace to open its file on the small disk anew")
        self.disk.empty()
        self.emptying = False
        say("disk emptied")

    def kill_for_a_while(self, daemon):
        if not daemon.alive():
            return False
        daemon.kill()
        self.after(self.random.uniform(0, 15), lambda: self.bring_back(daemon))
        return True

    @staticmethod
    def bring_back(daemon):
        if not daemon.alive():
            daemon.start()

    def end_finrace(self, how):
        self.tracer.end(how)
        time.sleep(self.random.uniform(0, 3))
        self.tracer.start()

    def whole_deck(self):
        """What may happen at any time: (name, work, its arguments)."""
        deck = [("nginx reloaded", self.stage.reload), ("finrace reloaded", self.tracer.reload), ("log rotated", self.rotate),
                ("syslog-ng killed", self.kill_for_a_while, self.collector), ("ClickHouse killed", self.kill_for_a_while, self.store)]
        return deck + [(name, work, reader) for reader in self.readers for name, work in (
            ("reader killed", self.kill_reader), ("reader stands still", self.hold_reader))]

    def drawn(self):
        """Each kind once, in any order, then again."""
        if not self.deck:
            self.deck = self.whole_deck()
            self.random.shuffle(self.deck)
        return self.deck.pop()

    def overflow(self):
        """All three at once take nothing until records are dropped: what finrace keeps for them is as large then as it gets."""
        for reader in self.readers:
            reader.start()
            reader.holds.set()
        self.emptying = True
        outputs = [self.disk.output, *(reader.output for reader in self.readers)]
        wait_for(lambda: all(any(f"records for {output} are dropped" in text for text in list(self.tracer.finrace.said)) for output in outputs),
                 lambda: f"every output to overflow: {self.tracer.finrace.words()}", 15 * LIMIT, 0.5)
        self.counts["all three outputs overflow"] += 1
        say("all three outputs have overflowed")
        self.empty_disk()
        for reader in self.readers:
            reader.holds.clear()

    def mixed(self, until, ends=()):
        """Events until then; `ends`: [(time, how)] of finrace."""
        ends = list(ends)
        following = time.monotonic() + 2
        while time.monotonic() < until:
            must(self.tracer.finrace.alive(), lambda: f"finrace has ended: {self.tracer.finrace.words()}")
            for background in self.backgrounds:
                background.check()
            for reader in self.readers:
                must(reader.problem is None, f"the reader at {reader.output}: {reader.problem}")
            self.due()
            self.watch_disk()
            if ends and time.monotonic() >= ends[0][0]:
                how = ends.pop(0)[1]
                self.happen(f"finrace {'killed' if how == KILLED else 'started anew'}", self.end_finrace, how)
            elif time.monotonic() >= following:
                self.happen(*self.drawn())
                following = time.monotonic() + min(4 * self.options.pace, self.random.expovariate(1 / self.options.pace))
            time.sleep(0.1)

    def run(self):
        self.emptying = False
        self.bpf_before = set(harness.bpf_objects())
        self.collector.start()
        self.tracer.start()
        self.stage.warm_up(proxy_lab.Records(Path(self.tracer.path)))
        wait_for(lambda: delivery.arrived(self.store), "the first records in ClickHouse")
        self.measure()
        self.begun = time.monotonic()
        self.ends = self.begun + self.options.minutes * 60
        cores = self.stage.processor_seconds()
        self.backgrounds = [Background("load", self.load, self.stopping), Background("races", self.race, self.stopping),
                            Background("samples", self.samples.turn, self.stopping)]
        try:
            seconds = self.options.minutes * 60
            many = max(3, round(self.options.minutes / 10))
            self.mixed(self.begun + seconds * SHARE_OF_ENDS, [
                (self.begun + seconds * SHARE_OF_ENDS * (number + self.random.uniform(0.2, 0.9)) / many, (KILLED, ORDERLY)[number % 2])
                for number in range(many)])
            self.happen("finrace started anew", self.end_finrace, ORDERLY)
            self.overflow()
            self.wait_drained()
            self.samples.forget()
            self.flat_from = time.time()
            self.mixed(self.ends)
            while self.later:
                heapq.heappop(self.later)[2]()
            self.backgrounds[1].check()
            took = time.monotonic() - self.begun
            self.cores = (self.stage.processor_seconds() - cores) / took
            self.minutes = took / 60
            for background in self.backgrounds:
                background.finish()
        finally:
            self.stopping.set()
        self.end()

    def wait_drained(self):
        def drained():
            if self.disk.is_full():  # what waits is more than it holds
                self.empty_disk()
            return self.drained()

        wait_for(drained, "all outputs to take what waits", 5 * LIMIT, 0.2)

    def drained(self):
        health = self.tracer.health()
        # What has just been written always waits a moment.
        return health and all(one["bytes_waiting"] < (64 << 10) and "problem" not in one for one in health["finrace.outputs"])

    def end(self):
        """Everybody takes what there is; finrace ends; what it wrote is in the books."""
        for reader in self.readers:
            reader.start()
            reader.holds.clear()
        self.bring_back(self.collector)
        self.bring_back(self.store)
        self.wait_drained()
        self.tracer.end(ORDERLY)
        for path in [*self.rotated("*.gz"), *(one for one in self.rotated("*") if not one.endswith(".gz")), self.tracer.path]:
            self.ledger.take(path)
        last = self.ledger.seen.last(self.tracer.now.id)
        for reader in self.readers:
            wait_for(lambda reader=reader: reader.seen.has(self.tracer.now.id, last), f"the last record at {reader.output}")
            reader.kill()
        self.disk.book(self.disk.path)

    # -- verdict of it all

    def check_races(self):
        """One verdict for each failure, of a cause that the wire allows, and none else."""
        must(not self.stage.trouble, lambda: f"client, nginx and the wire differ {len(self.stage.trouble)} times: {self.stage.trouble[:5]}")
        judged = judge(self.stage.failed, self.ledger.verdicts, (self.stage.address, self.stage.port), self.tracer.away(),
                       [(run.id, self.ledger.learned.get((run.id, self.stage.address, self.stage.port), float("inf"))) for run in self.tracer.runs])
        self.result.update({name: len(value) if isinstance(value, list) else value for name, value in judged.items()})
        say(f"{self.stage.raced} requests near the timer, {len(self.stage.failed)} failed, {len(self.ledger.verdicts)} verdicts; "
            f"{judged['away']} failed while finrace was away, {judged['unsent']} unsent, {judged['unlearned']} before it knew the timer again, "
            f"{judged['stalled']} at an upstream that stood still")
        problems = [f"{name}: {one}" for name in ("wrong", "missed", "extra") for one in judged[name]]
        must(not problems, lambda: f"{len(problems)} problems: " + "\n          ".join(problems[:10]))
        must(len(self.stage.failed) - judged["away"] >= 5 * self.minutes, f"{len(self.stage.failed)} races in {self.minutes:.0f} minutes prove little")
        for name in ("unsent", "unlearned", "stalled"):
            must(judged[name] * 20 <= len(self.stage.failed), f"{judged[name]} of {len(self.stage.failed)} failures are {name}: too many to be left out")

    def check_events(self):
        """Each kind has happened."""
        wanted = {"finrace killed", "finrace started anew", "disk full", "all three outputs overflow", *(one[0] for one in self.whole_deck())}
        must(wanted == set(self.counts), f"{wanted ^ set(self.counts)}")

    def check_load(self):
        """What was asked for was sent: bouts make up for one another as far as nginx goes along."""
        mean = statistics.mean(self.rates)
        must(mean >= 0.9 * self.target, f"{mean:.0f} requests a second, not {self.target:.0f}")

    def check_file(self):
        """The file holds every number of every run, once."""
        for run in self.tracer.runs:
            numbers = self.ledger.seen.numbers(run.id)
            must(numbers == list(range(1, len(numbers) + 1)), f"run {run.id}: {len(numbers)} records, up to number {numbers[-1]}")
        must(not self.ledger.seen.twice(), lambda: f"twice: {self.ledger.seen.twice()[:5]}")
        must(set(self.ledger.seen.runs) == {run.id for run in self.tracer.runs}, "there are other runs")
        must(self.ledger.torn <= self.kills(), f"{self.ledger.torn} torn lines")
        self.result["records"] = len(self.ledger.seen)
        say(f"{len(self.ledger.seen)} records in {len(self.tracer.runs)} runs: {dict(self.ledger.kinds)}")

    def kills(self):
        return sum(run.how == KILLED for run in self.tracer.runs)

    def check_outputs(self):
        """What is missing there is what was dropped, or what a reader took along."""
        places = [(self.disk.output, self.disk.seen, []), *((one.output, one.seen, [one.taken_along]) for one in self.readers)]
        problems, dropped, along, died = [], Counter(), Counter(), Counter()
        for output, seen, others in places:
            twice = seen.twice()
            if twice:
                problems.append(f"{output}: {len(twice)} came twice: {twice[:3]}")
            for run in self.tracer.runs:
                due, health = self.ledger.seen.last(run.id), self.ledger.health[run.id]
                state = next(one for one in health["finrace.outputs"] if one["name"] == output)
                told = run.dropped_at_end(output) if run.how == ORDERLY else state["dropped"]
                last_seen = max([seen.last(run.id), *(other.last(run.id) for other in others)])
                problem, with_it = judge_output(run.id, due, missing_at(run.id, due, seen, others), last_seen, told, health["finrace.sequence"],
                                                run.how == KILLED)
                if problem:
                    problems.append(f"{output}, run {run.id}, {run.how}: {problem}")
                dropped[output] += told
                died[output] += with_it
            along[output] = sum(len(other) for other in others)
        for reader in self.readers:
            must(len(reader.odd) <= self.counts["reader killed"] + self.kills(), f"{reader.output}: {len(reader.odd)} that are no record: {reader.odd[:2]}")
        for output in dropped:
            say(f"{os.path.basename(output)}: {dropped[output]} dropped and counted, {along[output]} taken along by killed readers, "
                f"{died[output]} waited as finrace was killed")
        self.result["dropped"], self.result["taken_along"], self.result["died"] = (sum(one.values()) for one in (dropped, along, died))
        must(not problems, lambda: f"{len(problems)} problems: " + "; ".join(problems[:6]))
        must(all(dropped.values()), "an output dropped nothing: this proves little")

    def check_losses(self):
        """What was lost in the kernel is counted (what was not is a missed verdict), and a run is complete that lost and dropped nothing."""
        lost = Counter()
        for run, health in self.ledger.health.items():
            of_run = {name.rpartition(".")[2]: value for name, value in health.items()
                      if name.startswith("finrace.health.losses.") and isinstance(value, int)}
            lost.update(of_run)
            nothing = sum(of_run.values()) + health["finrace.output.dropped"] == 0
            must(health["finrace.health.complete"] is nothing, f"run {run} calls itself complete or not, against its own counts: {health}")
        self.result["losses"] = sum(lost.values())
        say(f"lost in the kernel: {dict(lost)}")

    def check_flat(self):
        """Memory, maps and descriptors of the last run."""
        parts = {"memory": self.samples.memory, "maps": self.samples.maps}
        problems = []
        for name, samples in parts.items():
            first, last, problem = soak_ledger.growth(samples)
            self.result[f"{name}_first"], self.result[f"{name}_last"] = first, last
            say(f"{name}: {first / 1e6:.2f} MB at first, {last / 1e6:.2f} MB at last, {len(samples)} samples in "
                f"{(samples[-1][0] - samples[0][0]) / 60:.1f} min")
            problems += [f"{name} {problem}"] if problem else []
        counts = [value for _, value in self.samples.descriptors]
        third = len(counts) // 3
        first, last = statistics.median(counts[:third]), statistics.median(counts[-third:])
        self.result["descriptors_first"], self.result["descriptors_last"] = first, last
        if first != last:
            problems.append(f"descriptors from {first} to {last}")
        must(not problems, "; ".join(problems))
        must(self.samples.scrapes > self.minutes * 60 / SAMPLE / 4, f"{self.samples.scrapes} scrapes of the metrics")
        self.result["scrapes"] = self.samples.scrapes

    def check_kernel(self):
        """Nothing of a finrace that has ended is left."""
        def left():
            held = harness.held_objects()
            return {key: name for key, name in harness.bpf_objects().items() if key not in self.bpf_before and key not in held}

        wait_for(lambda: not left(), lambda: f"left in the kernel: {left()}", pause=0.5)

    def check_store(self):
        """Each record of the file, once."""
        due = self.ledger.keys()
        wait_for(lambda: self.arrived_at_least(len(due)), "all records to arrive", 5 * LIMIT, 1)
        found = delivery.arrived(self.store)
        must(found == due, lambda: delivery.missing(due, found))
        self.result["landed"] = len(found)
        self.result["came_again"] = self.store.value("SELECT count() FROM finrace.arrived") - len(found)
        say(f"{len(found)} records in ClickHouse, {self.result['came_again']} of them came more than once")
        for table, kind in (("verdicts", "finrace.verdict"), ("connections", "finrace.connection")):
            wait_for(lambda: self.store.value(f"SELECT count() FROM finrace.{table} FINAL") == self.ledger.kinds[kind], f"all {table} to be in their table")
            rows = self.store.rows(f"SELECT `host.name` AS host, `finrace.run` AS run, `finrace.sequence` AS number FROM finrace.{table} FINAL")
            keys = {(row["host"], row["run"], row["number"]) for row in rows}
            must(len(keys) == len(rows) and keys <= due, f"{table}: {len(rows)} rows of {len(keys)} records")
        verdicts = {(self.ledger.host, one.get("finrace.run"), one.get("finrace.sequence")) for one in self.ledger.verdicts}
        stored = {tuple(row.values()) for row in self.store.rows("SELECT `host.name`, `finrace.run`, `finrace.sequence` FROM finrace.verdicts FINAL")}
        must(stored == verdicts, lambda: f"{len(stored ^ verdicts)} verdicts differ")
        rejected = Path(self.collector.folder, "rejected.jsonl")
        lines = rejected.read_bytes().splitlines() if rejected.exists() else []
        must(len(lines) <= self.ledger.torn, f"syslog-ng rejected {len(lines)} lines: {lines[:2]}")

    def arrived_at_least(self, count):
        with suppress(OSError):
            return self.store.value("SELECT uniqExact(run, sequence) FROM finrace.arrived") >= count

    def check_reports(self):
        """The fleet's report equals what the records say, and they what each run's local report says."""
        fleet = soak_ledger.told_by_both(added_up([fleet_report(self.options, self.store.url)]))
        records = soak_ledger.told_by_both(self.ledger.sums())
        must(fleet == records, lambda: f"the fleet's report tells {fleet}, the records {records}")
        compared = 0
        for run in self.tracer.runs:
            if run.how != ORDERLY:  # its recording knows more than it could still write
                continue
            files = sorted(map(str, Path(run.recording).parent.glob(Path(run.recording).name + ".*")), key=lambda name: -int(name.rpartition(".")[2]))
            local = soak_ledger.told_by_both(added_up([report_of(self.options, *files, run.recording)]))
            mine = soak_ledger.told_by_both(self.ledger.sums(run.id))
            must(local == mine, lambda: f"run {run.id}: its local report tells {local}, its records {mine}")
            compared += 1
        say(f"the fleet's report and {compared} local ones, added up, agree: {fleet[0]}")


def judge(failures, verdicts, upstream, away, learned):
    """What is wrong with these verdicts: {"wrong": [...], "missed": [...], "extra": [...], and counts of what is left out}."""
    of_upstream, elsewhere = [], []
    for one in verdicts:
        (of_upstream if one.get("finrace.side") == "client" and one.connection[2:] == upstream else elsewhere).append(one)
    pairs, missing, extra = proxy_lab.match(failures, of_upstream)
    found = {"wrong": [], "missed": [], "extra": [f"{one} on {one.connection} at {one.time:.3f}" for one in extra + elsewhere],
             "away": 0, "unsent": 0, "unlearned": 0, "stalled": 0}
    for failure in missing:
        if any(begin <= failure.time and failure.earliest <= end for begin, end in away):
            found["away"] += 1
        elif proxy_lab.never_sent(failure):
            found["unsent"] += 1
        else:
            found["missed"].append(f"{failure.id} at {failure.time:.3f} on {failure.connection}: {failure.error}; wire: {failure.evidence.kind}")
    when = dict(learned)
    for failure, verdict in pairs:
        why = proxy_lab.disagreement(failure, verdict)
        if why is not None and (verdict.time < when.get(verdict.get("finrace.run"), 0) or verdict.get("finrace.connection.adopted")):
            found["unlearned"] += 1
        elif why is not None:
            found["wrong"].append(f"{verdict} at {verdict.time:.3f} on {verdict.connection}: {why}; nginx: {failure.error}")
        elif proxy_lab.stalled(failure, verdict):
            found["stalled"] += 1
    return found


# ---- that its judges can fail --------------------------------------------------------------------------------------------


def test_a_leak_is_found():
    """A record's memory a second, over as long as a soak's last run takes; and the same without it."""
    noise = random.Random(1)
    for seconds in (70 * 60, 30 * 60):
        flat = [(at, 16_000_000 + noise.randrange(100_000)) for at in range(0, seconds, 2)]
        must(soak_ledger.growth(flat)[2] is None, "what is flat is called a leak")
        leak = [(at, value + at * soak_ledger.RECORD_BYTES) for at, value in flat]
        must(soak_ledger.growth(leak)[2] is not None, f"a leak in {seconds} s is not found")


def test_a_loss_is_found():
    seen = soak_ledger.Seen()
    for number in (1, 2, 3, 6, 7, 8):
        seen.note("a", number)
    missing = missing_at("a", 8, seen)
    must(missing == [4, 5], f"{missing}")
    must(judge_output("a", 8, missing, 8, 2, 8, False) == (None, 0), "two dropped, two missing")
    must(judge_output("a", 8, missing, 8, 1, 8, False)[0], "one is not counted")
    must(judge_output("a", 8, missing, 8, 3, 8, False)[0], "one is counted that came")
    must(judge_output("a", 8, missing, 8, 1, 7, True)[0], "the same of a run that was killed")
    must(judge_output("a", 12, missing_at("a", 12, seen), 8, 2, 7, True) == (None, 4), "four waited as it was killed")
    must(judge_output("a", 12, missing_at("a", 12, seen), 8, 1, 10, True)[0], "more is missing than waited")
    seen.note("a", 3)
    must(seen.twice() == [("a", 3)], "a record that came twice")


def test_a_verdict_too_many_or_few_is_found():
    place = ("10.0.0.2", 80)

    def failure(port, at):
        one = proxy_lab.Exchange(f"race-{port}", 0, True, None, done=at, error="upstream prematurely closed connection")
        one.evidence = proxy_lab.wire.Evidence("crossed", "", ("10.0.0.1", port, *place))
        return one

    def verdict(port, at, cause="keepalive_race"):
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + ".000000000Z"
        return proxy_lab.Verdict({"timestamp": stamp, "network": {"local": {"address": "10.0.0.1", "port": port}, "peer": {"address": place[0], "port": 80}},
                                  "finrace": {"side": "client", "cause": cause, "variant": "fin_crossed", "certainty": "proven", "run": "a"}})

    def tally(failures, verdicts, away=()):
        found = judge(failures, verdicts, place, away, [("a", 0)])
        return tuple(len(found[name]) for name in ("wrong", "missed", "extra"))

    must(tally([failure(1, 100)], [verdict(1, 100)]) == (0, 0, 0), "one of each")
    must(tally([failure(1, 100)], []) == (0, 1, 0), "a missed one")
    must(tally([failure(1, 100)], [], [(99, 101)]) == (0, 0, 0), "one while finrace was away")
    must(tally([], [verdict(1, 100)]) == (0, 0, 1), "one on a success")
    must(tally([failure(1, 100)], [verdict(1, 100), verdict(1, 100)]) == (0, 0, 1), "two for one")
    must(tally([failure(1, 100)], [verdict(1, 100, "upstream_closed")]) == (1, 0, 0), "of another cause")
    must(tally([failure(1, 100)], [verdict(1, 200)]) == (0, 1, 1), "at another time")


# ---- all of it -----------------------------------------------------------------------------------------------------------


def test(options, results):
    results.run_each([test_a_leak_is_found, test_a_loss_is_found, test_a_verdict_too_many_or_few_is_found])
    if options.self_test:
        return
    print(f"soak: {options.minutes:g} minutes, backend {options.backend_name}, seed {options.seed}", flush=True)
    syslog_ng_files()
    need("wrk", "wrk")
    harness.leave_mounts()
    try:
        with ExitStack() as stack:
            soak_and_judge(options, results, stack)
    finally:
        # Thousands of files, and nothing that a failed run needs.
        shutil.rmtree(os.path.join(options.folder, "clickhouse", "data"), ignore_errors=True)


def soak_and_judge(options, results, stack):
    soak = None

    def go_on():
        try:
            soak.run()
        except LabError as error:
            raise Wrong(str(error)) from error

    try:
        soak = Soak(options, stack)
        results.run("the soak runs to its end", go_on)
        if results.failed == 0:
            for check in (soak.check_load, soak.check_events, soak.check_file, soak.check_races, soak.check_outputs, soak.check_losses, soak.check_flat, soak.check_store,
                          soak.check_reports, soak.check_kernel):
                results.run(check.__name__.removeprefix("check_"), check)
            tell(options, soak, results)
    except LabError as error:
        raise harness.EnvironmentProblem(str(error)) from error
    finally:
        if soak is not None and results.failed:
            shutil.copytree(soak.stage.directory, os.path.join(options.folder, "lab"), ignore=harness.neither_file_nor_folder)


def tell(options, soak, results):
    """What is measured, for people and, by --table, for scripts/prove."""
    rate = statistics.mean(soak.rates)
    found = {"minutes": round(soak.minutes, 1), "load": options.load, "most": round(soak.most), "rate": round(rate), "cores": round(soak.cores, 2),
             "requests": soak.sent + soak.stage.raced, "near_the_timer": soak.stage.raced, "failures": len(soak.stage.failed),
             "verdicts": len(soak.ledger.verdicts), "events": dict(sorted(soak.counts.items())), "runs": len(soak.tracer.runs),
             "passed": results.passed, "failed": results.failed, **soak.result}
    say(f"load: {rate:.0f} requests a second on average, {rate / soak.most:.0%} of the most; nginx's worker had {soak.cores:.2f} of a core; "
        f"{soak.wrk_errors} broken connections at wrk")
    say(f"events: {found['events']}")
    if options.table:
        with open(options.table, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    harness.add_options(parser)
    parser.add_argument("--minutes", type=float, default=120, help="how long (default: 120; fewer than 8 leave no time to tell a leak)")
    parser.add_argument("--load", type=float, default=0.8, metavar="SHARE", help="of the requests a second that nginx takes at most here (default: 0.8)")
    parser.add_argument("--clients", type=int, default=10, help="that race (default: 10)")
    parser.add_argument("--pace", type=float, default=0, metavar="SECONDS", 
                        help="between two events, on average (default: 8, and 20 in a soak of an hour or more)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--delay-line", type=Path, default=proxy_lab.ROOT / "build/delay-line")
    parser.add_argument("--table", metavar="FILE", help="write what was measured there, as JSON")
    parser.add_argument("--self-test", action="store_true", help="only whether its judges find what is wrong")
    options = parser.parse_args()
    options.pace = options.pace or (8 if options.minutes < 60 else 20)
    options.delay_line = options.delay_line.resolve()
    if not 0 < options.load <= 1:
        parser.error(f"--load {options.load:g}: accepted: more than 0, up to 1")
    if options.minutes < 3:
        parser.error(f"--minutes {options.minutes:g}: accepted: 3 or more")
    return options


if __name__ == "__main__":
    sys.exit(harness.main("soak", parse, test))
