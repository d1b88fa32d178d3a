"""The soak's books: which records each output has had, what finrace's own file holds, and the sums over it.

A record is told by (run, sequence); `finrace run --flat` numbers a run's records 1, 2, 3, ... for all of its outputs together.
So a number that an output has not had is a loss, and finrace must have counted it.
"""

import gzip
import json
import os
import re
import socket
import statistics
import sys
import threading
import time
from collections import Counter

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[1:1] = [os.path.join(TESTS, "live"), os.path.join(TESTS, "pipelines")]
from fleet import nested  # noqa: E402
from harness import LIMIT  # noqa: E402
from proxy_lab import Verdict, parse_time  # noqa: E402

IDENTITY = re.compile(rb'"finrace\.run":"([0-9a-f]{16})","finrace\.sequence":(\d+)[,}]')
NAME = re.compile(rb'^\{"timestamp":"[^"]*","event\.name":"(finrace\.\w+)"')
RACES = ("keepalive_race", "stale_response", "stale_reuse")
RECORD_BYTES = 1000  # the least that a record takes; so much a second is a leak
SAMPLE_NOISE = 512 << 10  # bytes by which resident memory moves in a few minutes without any leak


def identity(line):
    """(run, number) of a whole record, None of anything else."""
    found = IDENTITY.search(line)
    return (found[1].decode(), int(found[2])) if found and NAME.match(line) and line.endswith(b"}") else None


class Seen:
    """Which numbers of which runs have come, and how often."""

    def __init__(self):
        self.runs = {}  # run: a count for each number

    def note(self, run, number):
        counts = self.runs.setdefault(run, bytearray())
        if len(counts) <= number:
            counts.extend(bytes(number + 1024 - len(counts)))
        counts[number] = min(counts[number] + 1, 255)

    def take(self, line):
        """The same of a line; False if it is no whole record."""
        found = identity(line)
        if found is None:
            return False
        self.note(*found)
        return True

    def has(self, run, number):
        counts = self.runs.get(run, b"")
        return number < len(counts) and counts[number] > 0

    def numbers(self, run):
        return [number for number, count in enumerate(self.runs.get(run, b"")) if count]

    def last(self, run):
        return max(self.numbers(run), default=0)

    def twice(self):
        return [(run, number) for run, counts in self.runs.items() for number, count in enumerate(counts) if count > 1]

    def __len__(self):
        return sum(len(counts) - counts.count(0) for counts in self.runs.values())


def lines_of(path):
    """A file's complete lines; what follows the last one comes last, if it is not empty."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        for line in file:
            yield line.rstrip(b"\n")


class Ledger:
    """What finrace's file holds, its rotated parts included: they are read here once, and what is needed is kept."""

    def __init__(self):
        self.seen = Seen()
        self.host = ""
        self.kinds = Counter()
        self.torn = 0
        self.verdicts = []  # records, nested
        self.pools = {}  # (run, address, port, network namespace, other): the last record of that upstream
        self.health = {}  # run: the last one
        self.learned = {}  # (run, address, port): when its idle timeout was told first

    def take(self, path):
        for line in lines_of(path):
            if not self.seen.take(line):
                self.torn += line != b""
                continue
            kind = NAME.match(line)[1].decode()
            self.kinds[kind] += 1
            if kind == "finrace.connection":
                continue
            record = json.loads(line)
            self.host = record["host.name"]
            if kind == "finrace.verdict":
                self.verdicts.append(Verdict(nested(record)))
            elif kind == "finrace.health":
                self.health[record["finrace.run"]] = record
            elif record.get("finrace.side", "client") == "client":
                place = record["network.peer.address"], record["network.peer.port"]
                self.pools[(record["finrace.run"], *place, record.get("finrace.upstream.netns"), record.get("finrace.upstream.other", False))] = record
                if "finrace.upstream.idle_timeout_ms" in record:
                    self.learned.setdefault((record["finrace.run"], *place), parse_time(record["timestamp"]))

    def keys(self):
        return {(self.host, run, number) for run in self.seen.runs for number in self.seen.numbers(run)}

    def sums(self, run=None):
        """(findings, pools) of all runs, or one, as fleet.added_up() has them, but only what verdicts and upstreams' records tell."""
        findings, pools = {}, {}
        for verdict in self.verdicts:
            if run not in (None, verdict.get("finrace.run")):
                continue
            into = findings.setdefault((verdict.get("finrace.cause"), *verdict.connection[2:]), Counter())
            into["verdicts"] += 1
            into[f"certainty {verdict.get('finrace.certainty')}"] += 1
        for (of_run, address, port, *_), record in self.pools.items():
            if run not in (None, of_run):
                continue
            into = pools.setdefault((address, port), Counter())
            into["connections"] += record["finrace.upstream.connections.closed"]
            into["requests"] += record["finrace.upstream.exchanges"]
            into["unclassified"] += record["finrace.upstream.unclassified"]
            into["races"] += sum(record.get(f"finrace.upstream.verdicts.{cause}", 0) for cause in RACES)
        return findings, pools


def told_by_both(added):
    """Of fleet.added_up(), what Ledger.sums() tells as well, without zeros."""
    findings, pools = added

    def cut(counts, wanted):
        return {key: {name: value for name, value in one.items() if value and wanted(name)} for key, one in counts.items()}

    return (cut(findings, lambda name: name == "verdicts" or name.startswith("certainty ")),
            {key: one for key, one in cut(pools, lambda name: True).items() if one})


# ---- outputs -------------------------------------------------------------------------------------------------------------


class Reader:
    """A collector at the end of a UNIX socket. Killed, it takes what lay in its socket with it, which is noted: nobody could count it."""

    def __init__(self, path, kind):
        self.path, self.kind, self.output = path, kind, f"{kind}:{path}"
        self.stream = kind == "unix-stream"
        self.seen, self.taken_along = Seen(), Seen()
        self.holds, self.dying = threading.Event(), threading.Event()
        self.thread = None
        self.odd = []  # what came and is no record
        self.problem = None

    @property
    def alive(self):
        return self.thread is not None

    def start(self):
        """Takes what comes from now on, if it does not already."""
        if self.alive:
            return
        self.holds.clear()
        self.dying.clear()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if self.stream else socket.SOCK_DGRAM)
        sock.bind(self.path + ".new")
        if self.stream:
            sock.listen()
        os.rename(self.path + ".new", self.path)
        self.thread = threading.Thread(target=self.guarded, args=(sock,), daemon=True)
        self.thread.start()

    def guarded(self, sock):
        try:
            self.work(sock)
        except (OSError, ValueError) as error:
            self.problem = error

    def work(self, sock):
        sock.settimeout(0.05)
        source, rest = (None, b"") if self.stream else (sock, b"")
        while not self.dying.is_set():
            if self.holds.is_set():
                time.sleep(0.05)
                continue
            try:
                if source is None:
                    source, rest = sock.accept()[0], b""
                    source.settimeout(0.05)
                data = source.recv(1 << 18)
            except TimeoutError:
                continue
            except ConnectionResetError:
                data = b""
            if data == b"" and self.stream:
                source = self.end_of(source, rest)
                continue
            rest = self.book(rest + data, self.seen)
        # Nobody can connect any more from here on, and nothing more comes: what is there is what dies with the reader.
        os.unlink(self.path)
        if not self.stream:
            self.drain(sock, b"")
            return
        while True:
            if source is not None:
                self.drain(source, rest)
            sock.settimeout(0)
            try:
                source, rest = sock.accept()[0], b""
            except BlockingIOError:
                break
        sock.close()

    def end_of(self, source, rest):
        """finrace has left: only a kill leaves a part of a line."""
        source.close()
        if rest:
            self.odd.append(rest)

    def drain(self, source, rest):
        source.shutdown(socket.SHUT_RD)
        source.settimeout(0)
        while True:
            try:
                data = source.recv(1 << 18)
            except (BlockingIOError, ConnectionResetError):
                break
            if not data:
                break
            rest = self.book(rest + data, self.taken_along)
        source.close()

    def book(self, data, seen):
        """What is left of it is the beginning of a line."""
        *lines, rest = data.split(b"\n") if self.stream else (data, b"")
        self.odd += [line for line in lines if not seen.take(line)]
        return rest

    def kill(self):
        if self.thread is not None:
            self.dying.set()
            self.thread.join(LIMIT)
            self.thread = None


class Disk:
    """An output on a small file system, which fills; it is emptied by moving the file away, as rotation does, and removing it."""

    def __init__(self, folder):
        self.folder = folder
        self.path = self.output = os.path.join(folder, "records.jsonl")
        self.seen = Seen()
        self.torn = 0
        self.moved = self.path + ".1"

    def is_full(self):
        room = os.statvfs(self.folder)
        return room.f_bavail * room.f_frsize < 4096

    def move(self):
        os.rename(self.path, self.moved)

    def book(self, path):
        for line in lines_of(path):
            self.torn += line != b"" and not self.seen.take(line)

    def empty(self):
        """Once finrace writes elsewhere."""
        self.book(self.moved)
        os.unlink(self.moved)


def missing_at(run, due, seen, others=()):
    """Numbers of 1 to `due` that have not come there."""
    return [number for number in range(1, due + 1) if not seen.has(run, number) and not any(other.has(run, number) for other in others)]


def judge_output(run, due, missing, last_seen, told, told_at, killed):
    """(why the count is wrong, or None; how many died with finrace). `told`: what finrace says to have dropped, in record number
    `told_at` of a run that was killed; what waited then for a reader that stood still is told by nobody."""
    if not killed:
        return (None if len(missing) == told else f"{len(missing)} of {due} are missing, {told} told"), 0
    before = [number for number in missing if number <= told_at]
    after = len(missing) - len(before)
    if last_seen > told_at:  # what was written before has come, or was dropped
        return (None if len(before) == told else f"{len(before)} of the first {told_at} are missing, {told} told"), after
    waiting = [number for number in before if number > last_seen]
    if len(before) - len(waiting) <= told <= len(before):
        return None, after + len(before) - told
    return f"{len(before)} of the first {told_at} are missing, {len(waiting)} of them at the end, {told} told", 0


# ---- what must stay as it is ---------------------------------------------------------------------------------------------


def growth(samples, each_second=RECORD_BYTES, noise=SAMPLE_NOISE):
    """(bytes at first, at last, why that is not flat or None) of [(seconds, bytes)]: medians of the first third and the last.
    A leak of a record's memory a second is beyond the bound, if the time is long enough to tell it from noise."""
    begin, end = samples[0][0], samples[-1][0]
    third = (end - begin) / 3
    first = statistics.median(value for at, value in samples if at <= begin + third)
    last = statistics.median(value for at, value in samples if at >= end - third)
    allowed = max(noise, each_second * 2 * third * 0.9)
    problem = None if last - first <= allowed else f"from {first:.0f} to {last:.0f} bytes in {2 * third:.0f} s; {allowed:.0f} more were allowed"
    return first, last, problem
