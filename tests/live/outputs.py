#!/usr/bin/python3
"""Where records go: several outputs at once, whose readers come, go, stand still and find no room, and a real syslog daemon.

No output may keep another waiting, none may lose a record without counting it, and each says when it is well again. finrace is
confined as in production, so that what comes back is found from within its own root.
"""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness  # noqa: E402
from harness import LIMIT, Finrace, free_port, host_network, listen, must, need, network, wait_for  # noqa: E402
from robustness import call_in, healthy, make_room, run_finrace, small_disk, unanswered, wait_full  # noqa: E402

SYSLOG = re.compile(rb"<(\d+)>1 (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) (\S+) finrace (\d+) (\w+) - (\{.*\})", re.DOTALL)


def fields_of(entry):
    """Of an entry in the journal's protocol; a list for each name."""
    fields = {}
    while entry:
        name, mark, entry = re.match(rb"([A-Z][A-Z0-9_]{0,63})([=\n])(.*)", entry, re.DOTALL).groups()
        if mark == b"=":
            value, _, entry = entry.partition(b"\n")
        else:
            size = int.from_bytes(entry[:8], "little")
            value, entry = entry[8:8 + size], entry[8 + size:]
            must(entry[:1] == b"\n", f"no end after {name}")
            entry = entry[1:]
        fields.setdefault(name.decode(), []).append(value.decode())
    return fields


class Collector:
    """What listens at the end of an output, in a thread: `kind` is that of --output."""

    def __init__(self, folder, kind):
        self.kind = kind
        self.path = os.path.join(folder, f"{kind}.sock")
        self.output = f"{kind}:{self.path}"
        self.raw = []
        self.stopping = threading.Event()
        self.holds = threading.Event()  # takes nothing while it is set
        self.thread = None

    def start(self, owner=0):
        stream = self.kind == "unix-stream"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM)
        fresh = self.path + ".new"
        listener.bind(fresh)
        listener.settimeout(0.02)
        if stream:
            listener.listen()
        os.chown(fresh, owner, owner)
        os.rename(fresh, self.path)
        self.stopping.clear()
        self.thread = threading.Thread(target=self.work, args=(listener, stream), daemon=True)
        self.thread.start()

    def work(self, listener, stream):
        source, rest = (None, b"") if stream else (listener, b"")
        while not self.stopping.is_set():
            try:
                if source is None:
                    source = listener.accept()[0]
                    source.settimeout(0.02)
                    rest = b""
                if self.holds.is_set():
                    time.sleep(0.02)
                    continue
                data = source.recv(1 << 18)
            except TimeoutError:
                continue
            if not stream:
                self.raw.append(data)
            elif data:
                *lines, rest = (rest + data).split(b"\n")
                self.raw += lines
            else:
                source = None
        if stream and source is not None:
            source.close()
        listener.close()

    def stop(self):
        self.stopping.set()
        self.thread.join(LIMIT)
        os.unlink(self.path)

    def records(self):
        """Those that came as JSON."""
        if self.kind == "syslog":
            return [harness.parse_line(SYSLOG.fullmatch(one)[6]) for one in list(self.raw)]
        return [harness.parse_line(one) for one in list(self.raw)]

    def ports(self, net):
        """The clients' ports of the verdicts on this network's connections."""
        if self.kind == "journald":
            return [int(one["NETWORK_LOCAL_PORT"][0]) for one in map(fields_of, list(self.raw))
                    if "FINRACE_CAUSE" in one and one["NETWORK_LOCAL_ADDRESS"][0].startswith(net.prefix)]
        return [one.at("network.local.port") for one in self.records() if one.name == "finrace.verdict" and net.owns(one)]


def has_said(finrace, *words):
    return any(all(word in text for word in words) for text in finrace.said)


def ports_in(path, net):
    """This host's, of the verdicts in a file of finrace's."""
    with open(path, "rb") as file:
        return [record.at("network.local.port") for record in map(harness.parse_line, file.read().split(b"\n")[:-1])
                if record.name == "finrace.verdict" and net.owns(record)]


def wait_problem(finrace, output, problem):
    """How that output stands, once its problem is this. The record that is read next may be of just before it was said."""
    def state():
        return next(one for one in finrace.next_health().at("finrace.outputs") if one["name"] == output)

    def found():
        now = state()
        return now if now.get("problem") == problem else None

    return wait_for(found, lambda: f"the problem {problem} of {output}: {state()}")


def test_all_at_once(options):
    """Five outputs: each gets every verdict once, whoever of the others is away; and says when it takes records again."""
    collectors = [Collector(options.folder, kind) for kind in ("unix-stream", "unix-dgram", "syslog", "journald")]
    flags = [flag for one in collectors for flag in ("--output", one.output)]
    with network() as net:
        listener = listen(net)
        # Nobody listens yet: no reason not to start.
        with Finrace(options, *flags, interval="100ms") as finrace:
            due = []

            def lose(count):
                due.extend(unanswered(net, listener)[1] for _ in range(count))
                wait_for(lambda: {one.ends[1] for one in finrace.verdicts(net)} >= set(due), "the file's verdicts")

            lose(2)
            for one in collectors:
                wait_for(lambda one=one: has_said(finrace, f"to {one.output}: No such file"), f"word of {one.output}")
            states = finrace.next_health().at("finrace.outputs")
            must({state["name"]: state.get("problem") for state in states} ==
                 {finrace.path: None, **{one.output: "ENOENT" for one in collectors}}, f"{states}")
            for one in collectors:
                one.start()
            for turn in range(3):
                for one in collectors:
                    wait_for(lambda one=one: sorted(one.ports(net)) == sorted(due), lambda one=one: f"{due} at {one.output}: {one.ports(net)}")
                    wait_for(lambda one=one: has_said(finrace, f"written again to {one.output}"), f"word of {one.output}, again")
                lose(1)
                away = collectors[turn::2]
                for one in away:
                    wait_for(lambda one=one: len(one.ports(net)) == len(due), f"all that was on its way to {one.output}")
                    one.stop()
                lose(3)
                finrace.next_health()  # those that stay get it; of the others' first records one told that they are away
                for one in away:
                    one.start()
            for one in collectors:
                wait_for(lambda one=one: sorted(one.ports(net)) == sorted(due), lambda one=one: f"{due} at {one.output}: {one.ports(net)}")
            # A record that lies in a stream socket as its reader goes is lost to all: so none is sent before all are read.
            finrace.stop()
            wait_for(lambda: all(any(b"last" in raw and b"true" in raw for raw in one.raw) or one.kind == "journald"
                                 for one in collectors), "the last summary")
            for one in collectors:
                one.stop()
                found = one.ports(net)
                must(sorted(found) == sorted(due), f"{one.output}: {len(found)} verdicts of {len(due)}")
                if one.kind != "journald":
                    lines = [SYSLOG.fullmatch(raw)[6] if one.kind == "syslog" else raw for raw in one.raw]
                    found = harness.check_records.complaints(lines)
                    must(not found, lambda: f"{one.output}: {found[0]}")
            last = finrace.health()
            must(last.at("finrace.output.dropped") == 0 and last.at("finrace.health.complete"), f"dropped: {last}")
            must(last.at("finrace.output.written") >= 5 * len(due), f"{last.at('finrace.output')}")
            verdict = next(fields for fields in map(fields_of, collectors[3].raw) if "FINRACE_CAUSE" in fields)
            must(verdict["MESSAGE"][0].startswith("upstream_closed: ") and verdict["PRIORITY"] == ["4"] and
                 verdict["FINRACE_CONNECTION_EXCHANGE"] == ["1"], f"{verdict}")
            head = SYSLOG.fullmatch(next(raw for raw in collectors[2].raw if b"finrace.verdict" in raw))
            must(head[1] == b"28" and int(head[4]) == finrace.process.pid and head[5] == b"verdict", f"{head.groups()[:5]}")


def test_addresses_stay_here(options):
    """What is hashed or masked leaves by no output, in no record, by metrics and on standard error neither."""
    collectors = [Collector(options.folder, kind) for kind in ("unix-stream", "unix-dgram", "syslog", "journald")]
    for one in collectors:
        one.start()
    flags = [flag for one in collectors for flag in ("--output", one.output)]
    with network() as net:
        listener = listen(net)
        port = free_port(net)
        with Finrace(options, *flags, "--connections", "--hash-addresses", "all", "--metrics", str(port), interval="100ms") as finrace:
            for _ in range(3):
                unanswered(net, listener)
                healthy(net, listener)
            wait_for(lambda: sum(one.at("finrace.cause") == "upstream_closed" for one in finrace.records("finrace.verdict")) >= 3, "the verdicts")
            wait_for(lambda: any((one.at("network.peer.address") or "").startswith("100::") for one in finrace.records("finrace.upstream")), "the upstream")
            with host_network(net), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT) as answer:
                metrics = answer.read()
            finrace.stop()
        wait_for(lambda: all(any(b"upstream_closed" in raw for raw in one.raw) for one in collectors), "the verdicts at all outputs")
        said = {one.output: b"\n".join(one.raw) for one in collectors}
        with open(finrace.path, "rb") as file:
            said[finrace.path] = file.read()
        for name, text in said.items():
            must(b"100::" in text, f"no pseudonym in {name}")
        must(b'upstream="[100::' in metrics, metrics[-2000:])
        said |= {"metrics": metrics, "standard error": finrace.words().encode()}
        for name, text in said.items():
            at = text.find(net.prefix.encode())
            must(at < 0, f"{name}: an address is shown: {text[max(0, at - 200):at + 100]!r}")

        with Finrace(options, "--connections", "--mask-addresses", "clients", interval="100ms") as finrace:
            ends = healthy(net, listener)
            of_server = wait_for(lambda: [one for one in finrace.connections(net) if not one.client], "the server's record")
            must([one.at("network.peer.address") for one in of_server] == [net.prefix + "0"], f"{of_server}")
            of_client = wait_for(lambda: [one for one in finrace.connections(net) if one.client], "the client's record")
            must([one.ends for one in of_client] == [ends], f"{of_client}")
    for one in collectors:
        one.stop()


def test_one_stands_still(options):
    """A reader that takes nothing costs its own output records, which are counted and told, and the others nothing."""
    folder = os.path.join(options.folder, "stuck")
    os.makedirs(folder)
    stuck = Collector(folder, "unix-stream")
    stuck.holds.set()
    stuck.start()
    count = 6000 if not options.small else 600  # of which one is over the 8 MiB that finrace keeps
    with network() as net:
        listener = listen(net)
        with Finrace(options, "--connections", "--output", stuck.output, interval="100ms") as finrace:
            for number in range(count):
                healthy(net, listener)
                if number % 1000 == 999:  # the ring holds their events, however slow it is
                    finrace.wait_settled()
            finrace.wait_connections(net, 2 * count)  # both ends of each
            if not options.small:
                wait_for(lambda: has_said(finrace, f"records for {stuck.output} are dropped"), "word of it")
            stuck.holds.clear()
            if not options.small:
                wait_for(lambda: has_said(finrace, f"{stuck.output} takes records again"), "word that it is well")
            finrace.stop()
            wait_for(lambda: any(b'"last":true' in raw for raw in stuck.raw[-20:]), "the last summary")
            stuck.stop()
            states = {state["name"]: state for state in finrace.health().at("finrace.outputs")}
            missing = len(finrace.lines) - len(stuck.raw)
            told = states[stuck.output]["dropped"]
            must(states[finrace.path]["dropped"] == 0 and missing == told, f"{missing} are missing there, {told} were dropped")
            must(options.small or told > 0, "nothing was dropped: this test has proved nothing")
            taken = set(stuck.raw)
            must([line for _, line in finrace.lines if line in taken] == stuck.raw, "other lines, or in another order")
            if told:
                again = next(text for text in finrace.said if "takes records again" in text)
                must(f"{told} were dropped" in again, again)
            print(f"          {len(stuck.raw)} of {len(finrace.lines)} records taken, {told} dropped")


def writes_of(finrace):
    """How often it has called write(), in vain included."""
    with open(f"/proc/{finrace.process.pid}/io", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("syscw:"))


def test_full_disk_beside(options):
    """Two outputs' disk is full: another gets what comes at once, they get the same once there is room, and nothing spins meanwhile."""
    with small_disk(options) as folder, network() as net:
        paths = [os.path.join(folder, name) for name in ("records.jsonl", "others.jsonl")]
        listener = listen(net)
        with Finrace(options, "--connections", "--output", paths[0], "--output", paths[1], interval="100ms") as finrace:
            for _ in range(100):
                healthy(net, listener)
            wait_full(finrace)
            accident = unanswered(net, listener)
            wait_for(lambda: [one.ends for one in finrace.verdicts(net)] == [accident], "the verdict in the other file")
            wait_for(lambda: all(one.get("problem") == errno.errorcode[errno.ENOSPC] for one in finrace.next_health().at("finrace.outputs")[1:]),
                     "word of both")
            before = writes_of(finrace), len(finrace.lines)
            for _ in range(10):
                finrace.next_health()
            writes, lines = writes_of(finrace) - before[0], len(finrace.lines) - before[1]
            must(writes < 20 * lines, f"{writes} write() for {lines} records, in vain most of them")
            make_room(finrace, folder)
            finrace.stop()
            for path in paths:
                with open(path, "rb") as file:
                    *lines, rest = file.read().split(b"\n")
                must(rest == b"" and lines == [line for _, line in finrace.lines], f"{path}: {len(lines)} of {len(finrace.lines)} lines")


class StuckDisk:
    """A file system of its own that can be made to take nothing, and to keep whoever writes to it waiting (fsfreeze)."""

    def __init__(self, options):
        self.image = os.path.join(options.folder, "stopping.img")
        self.folder = os.path.join(options.folder, "stopping")

    def __enter__(self):
        with open(self.image, "wb") as file:
            file.truncate(16 << 20)
        subprocess.run([need("mkfs.ext4", "e2fsprogs"), "-q", "-F", self.image], check=True, timeout=LIMIT)
        os.makedirs(self.folder)
        subprocess.run([need("mount", "mount"), "-o", "loop", self.image, self.folder], check=True, timeout=LIMIT)
        # Whoever waits for it can't be killed: it ends with this test, however that ends.
        self.guard = subprocess.Popen(["sh", "-c", 'read -r _; fsfreeze --unfreeze "$0"', self.folder], stdin=subprocess.PIPE,
                                      stderr=subprocess.DEVNULL)
        return self

    def freeze(self):
        subprocess.run([need("fsfreeze", "util-linux"), "--freeze", self.folder], check=True, timeout=LIMIT)

    def thaw(self):
        subprocess.run([need("fsfreeze", "util-linux"), "--unfreeze", self.folder], check=True, timeout=LIMIT)

    def __exit__(self, *_):
        self.guard.communicate()
        subprocess.run(["umount", self.folder], check=True, timeout=LIMIT)


def test_stuck_disk_beside(options):
    """A disk keeps whoever writes to it waiting: neither tracing nor the other output waits with it, not at a rotation either; and
    it gets all of it once it takes it."""
    with StuckDisk(options) as disk, network() as net:
        path, recording = (os.path.join(disk.folder, name) for name in ("records.jsonl", "recording"))
        listener = listen(net)
        with Finrace(options, "--connections", "--output", path, "--record", recording, interval="100ms") as finrace:
            healthy(net, listener)
            wait_for(lambda: finrace.next_health().at("finrace.outputs")[1]["written"], "records on the disk")
            disk.freeze()
            try:
                due = [unanswered(net, listener)]
                wait_for(lambda: [one.ends for one in finrace.verdicts(net)] == due, "the verdict in the other file")
                wait_for(lambda: all(one["bytes_waiting"] for one in finrace.next_health().at("finrace.outputs")[1:]), "word of what waits")
                finrace.send(signal.SIGHUP)
                wait_for(lambda: has_said(finrace, path, "is not taken yet"), "word of the rotation")
                due.append(unanswered(net, listener))
                wait_for(lambda: [one.ends for one in finrace.verdicts(net)] == due, "the verdict after that")
            finally:
                disk.thaw()
            wait_for(lambda: has_said(finrace, f"{path} is opened anew"), "the rotation")
            wait_for(lambda: not any(one["bytes_waiting"] > 65536 or "problem" in one for one in finrace.next_health().at("finrace.outputs")[1:]),
                     lambda: f"both to take what waits: {finrace.next_health().at('finrace.outputs')}")
            finrace.stop()
            with open(path, "rb") as file:
                *lines, rest = file.read().split(b"\n")
            must(rest == b"" and lines == [line for _, line in finrace.lines], f"{len(lines)} of {len(finrace.lines)} lines")
            must(finrace.health().at("finrace.health.complete"), f"{finrace.health()}")
        again = run_finrace(options, ["run", "--connections", "--replay", recording])
        replayed = [harness.parse_line(line) for line in again.stdout.encode().splitlines()]
        must([one.ends for one in replayed if one.name == "finrace.verdict" and net.owns(one)] == due, again.stdout[-2000:])


def test_reader_leaves(options):
    """The reader of one leaves for good: that is told, and the others go on; once all have left, it ends."""
    fifo = os.path.join(options.folder, "fifo")
    os.mkfifo(fifo)
    with network() as net:
        listener = listen(net)
        fifo_reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        with Finrace(options, "--output", fifo, interval="100ms") as finrace:
            os.close(fifo_reader)
            wait_for(lambda: has_said(finrace, f"nobody reads {fifo} any more"), finrace.words)
            due = [unanswered(net, listener)]
            wait_for(lambda: [one.ends for one in finrace.verdicts(net)] == due, "the verdict")
            of_fifo = finrace.next_health().at("finrace.outputs")[1]
            must(of_fifo["dropped"] > 0, "what nobody reads is not counted")
            must(of_fifo.get("problem") == "EPIPE", f"nobody is said to read: {of_fifo}")
            fifo_reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
            finrace.send(signal.SIGHUP)
            wait_for(lambda: has_said(finrace, f"{fifo} is opened anew"), finrace.words)
            due.append(unanswered(net, listener))
            seen = b""

            def read_along():
                nonlocal seen
                with suppress(BlockingIOError):
                    seen += os.read(fifo_reader, 1 << 20)
                return b"finrace.verdict" in seen

            wait_for(read_along, "the verdict at the new reader")
            finrace.stop()
            os.close(fifo_reader)
        reader, writer = os.pipe()
        fifo_reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        with Finrace(options, "--output", "-", "--output", fifo, interval="100ms", output=writer) as finrace:
            os.close(writer)
            os.close(fifo_reader)
            wait_for(lambda: has_said(finrace, f"nobody reads {fifo} any more"), finrace.words)
            must(finrace.alive(), "it ended though one of its readers was there")
            os.close(reader)
            finrace.wait_end()


def test_confined(options):
    """With a socket among its outputs it may connect to UNIX sockets again, in their folders alone; and to nothing else."""
    folder, elsewhere = (os.path.join(options.folder, name) for name in ("listened", "elsewhere"))
    os.makedirs(folder)
    os.makedirs(elsewhere)
    collector, other = Collector(folder, "unix-stream"), Collector(elsewhere, "unix-stream")
    collector.start()
    other.start()

    def address(path):  # struct sockaddr_un, as gdb takes a string
        return '"\\001\\000' + path + '"', 3 + len(path)

    with network() as net, Finrace(options, interval="100ms", output=collector.output) as finrace:
        wait_for(lambda: collector.raw, "a record")
        granted = ["(int)socket(1, 2, 0)"]
        filtered = ["(int)socket(2, 1, 0)", "(int)socket(10, 2, 0)", "(int)socket(16, 3, 0)", "(int)socket(17, 3, 0)"]
        values = call_in(finrace, granted + filtered)
        wrong = [f"{call} = {value}, errno {error}" for index, (call, (value, error)) in enumerate(zip(granted + filtered, values))
                 if (value < 0 if index < len(granted) else value != -1 or error != errno.EPERM)]
        must(not wrong, "; ".join(wrong))
        number = values[0][0]
        text, size = address(other.path)
        # By its number: gdb takes what a prototype would make a struct sockaddr * for an address in that process.
        call = {"x86_64": 42, "aarch64": 203}[os.uname().machine]
        (value, error), = call_in(finrace, [f"(int)syscall({call}, {number}, {text}, {size})"])
        must(value == -1 and error == errno.ENOENT, f"another socket: {value}, errno {error}")
        text, size = address(collector.path)
        (value, error), = call_in(finrace, [f"(int)syscall({call}, {number}, {text}, {size})"])
        must(value == -1 and error == errno.EPROTOTYPE, f"its own, by a datagram: {value}, errno {error}")
        must(not has_said(finrace, "warning"), finrace.words)
        due = unanswered(net, listen(net))
        wait_for(lambda: collector.ports(net) == [due[1]], "the verdict")
        finrace.stop()
    collector.stop()
    other.stop()


STRANGER = 65534  # nobody's number


def test_strangers(options):
    """In a folder that everybody may write to, nothing that another user has put there is written to, at the start and later."""
    folder, own = (os.path.join(options.folder, name) for name in ("shared", "own"))
    for path, mode in ((folder, 0o777), (own, 0o700)):  # not sticky: there the kernel has no rules of its own
        os.makedirs(path)
        os.chmod(path, mode)
    target, path = os.path.join(own, "target"), os.path.join(folder, "records.jsonl")
    text = b"as it was\n"
    with open(target, "wb") as file:
        file.write(text)

    def socket_at(where):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(where)

    def file_at(where):
        with open(where, "wb") as file:
            file.write(text)

    planted = [
        ("file", file_at, path), ("fifo", os.mkfifo, path), ("link", lambda where: os.symlink(target, where), path),
        ("dangling link", lambda where: os.symlink(os.path.join(own, "new"), where), path),
        ("second name", lambda where: os.link(target, where), path), ("socket", socket_at, f"unix-stream:{path}"),
        ("socket", socket_at, f"syslog:{path}"), ("link to a folder", lambda where: os.symlink(own, where), f"{path}/new"),
        ("folder", os.mkdir, f"{path}/new"), ("link to a folder", lambda where: os.symlink(own, where), f"unix-dgram:{path}/new"),
    ]
    for name, plant, output in planted[::4] if options.small else planted:
        plant(path)
        if name != "second name":  # that one is root's: whose it is tells nothing
            os.lchown(path, STRANGER, STRANGER)
        for command in (["run", *options.backend_flags, "--output", output], ["record", *options.backend_flags, "--output", output]):
            if command[0] == "record" and ":" in output:
                continue
            reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if name == "fifo" else None
            done = run_finrace(options, [*command, "--for", "1s"])
            must(done.returncode == 2 and f"{path} is " in done.stderr and "others may write to" in done.stderr,
                 f"{command[0]} to another's {name}: exit {done.returncode}: {done.stderr}")
            if reader is not None:
                must(os.read(reader, 1) == b"", "the pipe's reader got something")
                os.close(reader)
        with open(target, "rb") as file:
            must(file.read() == text and os.listdir(own) == ["target"], f"{name}: written to: {os.listdir(own)}")
        if name == "file":
            with open(path, "rb") as file:
                must(file.read() == text, "another's file was written to")
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)

    collectors = [Collector(folder, kind) for kind in ("unix-stream", "unix-dgram")]
    for one in collectors:
        one.start()  # root's, as finrace is
    flags = [flag for one in collectors for flag in ("--output", one.output)]
    with network() as net, Finrace(options, *flags, "--output", path, interval="100ms") as finrace:
        listener = listen(net)
        due = [unanswered(net, listener)[1]]
        wait_for(lambda: all(one.ports(net) == due for one in collectors), "the verdict")
        for one in collectors:
            one.stop()
            one.start(STRANGER)
        os.rename(path, path + ".moved")
        os.symlink(target, path)
        finrace.send(signal.SIGHUP)
        wait_for(lambda: has_said(finrace, f"{path} is a symbolic link"), finrace.words)
        due.append(unanswered(net, listener)[1])
        for one in collectors:
            wait_for(lambda one=one: has_said(finrace, f"to {one.output}: Permission denied"), finrace.words)
        must(all(one.ports(net) == due[:1] for one in collectors), "a stranger got records")
        for one in collectors:
            wait_problem(finrace, one.output, "EACCES")
        for one in collectors:
            os.chown(one.path, 0, 0)
        wait_for(lambda: all(one.ports(net) == due for one in collectors), lambda: f"{due}: {[one.ports(net) for one in collectors]}")
        ports = ports_in(path + ".moved", net)
        must(ports == due, f"in the file that was open before: {ports}")
        finrace.stop()
        must(finrace.health().at("finrace.output.dropped") == 0, f"dropped: {finrace.health()}")
    for one in collectors:
        one.stop()
    with open(target, "rb") as file:
        must(file.read() == text, "the link's target was written to")


def test_rsyslog(options):
    """A real rsyslog reads it as RFC 5424, and what was said while it was away comes after."""
    program = need("rsyslogd", "rsyslog")
    folder = os.path.join(options.folder, "rsyslog")
    os.makedirs(folder)
    path, log, configuration = (os.path.join(folder, name) for name in ("log", "messages", "rsyslog.conf"))
    with open(configuration, "w", encoding="ascii") as file:
        file.write(f'''
global(workDirectory="{folder}" maxMessageSize="64k")
module(load="imuxsock" SysSock.Use="off")
input(type="imuxsock" Socket="{path}" UseSpecialParser="off" IgnoreTimestamp="off")
template(name="parts" type="string" string="%syslogfacility-text% %syslogseverity-text% %hostname% %app-name% %procid% %msgid% %timestamp:::date-rfc3339% %msg%\\n")
action(type="omfile" file="{log}" template="parts")
''')

    def start():
        process = subprocess.Popen([program, "-n", "-f", configuration, "-i", os.path.join(folder, "pid")], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=Finrace.enter_host)
        wait_for(lambda: os.path.exists(path) or process.poll() is not None, "rsyslog's socket")
        must(process.poll() is None, lambda: f"rsyslogd: {process.stderr.read()[-2000:]}")
        return process

    def told():
        if not os.path.exists(log):
            return []
        with open(log, encoding="utf-8") as file:
            return [line.split(" ", 7) for line in file.read().split("\n")[:-1]]

    def ports():
        verdicts = [harness.Record(json.loads(parts[7])) for parts in told() if parts[5] == "verdict"]
        return sorted(one.at("network.local.port") for one in verdicts if net.owns(one))

    daemon = start()
    with network() as net:
        listener = listen(net)
        with Finrace(options, interval="100ms", output=f"syslog:{path}") as finrace:
            due = [unanswered(net, listener)[1]]
            wait_for(lambda: ports() == sorted(due), lambda: f"{due}: {told()}")
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(LIMIT)
            due += [unanswered(net, listener)[1] for _ in range(3)]
            wait_for(lambda: has_said(finrace, "cannot write records"), "word that it is away")
            daemon = start()
            wait_for(lambda: ports() == sorted(due), lambda: f"{due}: {told()}")
            finrace.stop()
            verdict = next(parts for parts in told() if parts[5] == "verdict")
            must(verdict[:2] == ["daemon", "warning"] and verdict[3:5] == ["finrace", str(finrace.process.pid)], f"{verdict}")
            record = json.loads(verdict[7])
            must(record["host"]["name"] == verdict[2] and record["timestamp"][:26] == verdict[6][:26], f"{verdict}")
    daemon.kill()
    daemon.wait(LIMIT)


def test_rotation_fails(options):
    """A new file can't be opened after a rotation: the old one goes on, that is told, and tried until it works."""
    path = os.path.join(options.folder, "rotated.jsonl")
    recording = os.path.join(options.folder, "rotated.rec")
    with network() as net, Finrace(options, "--output", path, "--record", recording, interval="100ms") as finrace:
        listener = listen(net)
        os.chmod(path, 0o644)
        os.rename(path, path + ".1")
        os.mkdir(path)
        finrace.send(signal.SIGHUP)
        wait_for(lambda: has_said(finrace, path, "Is a directory", "tried again"), finrace.words)
        due = [unanswered(net, listener)[1]]
        wait_for(lambda: ports_in(path + ".1", net) == due, "the verdict in the file that was open before")
        wait_problem(finrace, path, "EISDIR")
        must(wait_problem(finrace, "record:" + recording, None)["written"] > 0, "the recording's lines are not told")
        os.rmdir(path)
        wait_for(lambda: has_said(finrace, f"{path} is opened anew"), finrace.words)
        due.append(unanswered(net, listener)[1])
        wait_for(lambda: ports_in(path, net) == due[1:], "the verdict in the new file")
        wait_problem(finrace, path, None)
        must(os.stat(path).st_mode & 0o777 == 0o644, "the new file has not the old one's mode")
        finrace.stop()


REFUSALS = [
    (["unix-stream"], ["'unix-stream'", "unix-stream:PATH"]),
    (["unix-dgram:relative/path"], ["relative/path"]),
    (["syslog:/no/such/folder/log"], ["/no/such/folder"]),
    (["journald:/etc/passwd"], ["/etc/passwd", "no socket"]),
    ([""], ["''", "journald"]),
    (["-", "-"], ["--output -", "the same"]),
    (["unix-stream:/tmp/a", "unix-stream:/tmp/a"], ["unix-stream:/tmp/a", "the same"]),
]


def test_refusals(options):
    """Exit 2, what was named, and what is accepted. What may pass is exit 70: the service is started again."""
    for outputs, words in REFUSALS:
        flags = [flag for one in outputs for flag in ("--output", one)]
        done = run_finrace(options, ["run", *options.backend_flags, *flags])
        must(done.returncode == 2 and not done.stdout and all(word in done.stderr for word in words),
             f"{outputs}: exit {done.returncode}: {done.stderr}")
    with small_disk(options, "nr_inodes=1") as folder:
        done = run_finrace(options, ["run", *options.backend_flags, "--output", os.path.join(folder, "new.jsonl")])
        must(done.returncode == 70 and "No space left" in done.stderr, f"no room: exit {done.returncode}: {done.stderr}")


TESTS = [
    test_refusals, test_all_at_once, test_addresses_stay_here, test_one_stands_still, test_full_disk_beside, test_stuck_disk_beside, test_reader_leaves, test_strangers, test_confined,
    test_rotation_fails, test_rsyslog,
]


def test(options, results):
    print(f"outputs: backend {options.backend_name}", flush=True)
    harness.leave_mounts()
    tests = TESTS
    if options.sanitized:
        print("  confinement is tested without sanitizers: LeakSanitizer needs what it takes away", flush=True)
        tests = [one for one in TESTS if one is not test_confined]
    results.run_each(tests, options)


def parse():
    parser = harness.parser_of(__doc__)
    parser.add_argument("--small", action="store_true", help="fewer connections, for a slow machine")
    parser.add_argument("--sanitized", action="store_true", help="the binary has sanitizers")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(harness.main("outputs", parse, test))
