#!/usr/bin/python3
"""finrace where things are odd, many or refused: on this kernel, with one backend, each test one function.

Every accident here is made by two sockets of this process, so what is due is known exactly. The tests run in network and
mount namespaces of their own; finrace runs in the host's network, as it does in production.
"""

import argparse
import ctypes
import errno
import fcntl
import glob
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from contextlib import contextmanager, suppress

sys.dont_write_bytecode = True
import harness  # noqa: E402
import send_calls  # noqa: E402
from harness import LIMIT, Finrace, Net, Pair, checked, free_port, libc, listen, must, network, read_all, wait_for  # noqa: E402

PR_SET_NAME, PR_GET_NAME = 15, 16
MEMORY_BUDGET = 64 << 20  # of userspace, at 100,000 followed connections
OLD_IDLE = 1.1  # above 0.9 s, so that an idle close is thinkable at all
# Longer than a TLS farewell, which is no request.
REQUEST, RESPONSE = b"GET / HTTP/1.1\r\nHost: upstream.example\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"
SHIPPED = os.path.join(harness.ROOT, "packaging", "finrace.toml")
MARKS = (b"trace_", b"cgroup_", b"finrace", b"losses", b"events")


@contextmanager
def renamed(name):
    """This thread, as the kernel names it."""
    before = ctypes.create_string_buffer(16)
    checked(libc.prctl(PR_GET_NAME, before), "prctl")
    checked(libc.prctl(PR_SET_NAME, ctypes.create_string_buffer(name.encode())), "prctl")
    try:
        yield
    finally:
        checked(libc.prctl(PR_SET_NAME, before), "prctl")


def healthy(net, listener, exchanges=1, client_host=None):
    pair = Pair(net, listener, client_host=client_host)
    for _ in range(exchanges):
        pair.exchange()
    pair.client.close()
    must(pair.server.recv(1) == b"", "the client sent more")
    pair.server.close()
    return pair.ends


def unanswered(net, listener):
    """upstream_closed, proven."""
    pair = Pair(net, listener)
    pair.request_unanswered()
    pair.client.close()
    return pair.ends


def stale(net, listener):
    """stale_reuse: an exchange, the server's FIN, then a request."""
    pair = Pair(net, listener)
    pair.exchange()
    reuse_stale(pair)
    return pair.ends


def reuse_stale(pair):
    pair.server.close()
    wait_for(lambda: pair.client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 8, "CLOSE_WAIT")
    pair.client.send(REQUEST)
    try:
        must(pair.client.recv(1) == b"", "the client read a byte")
    except ConnectionResetError:
        pass
    pair.client.close()


# ---- losses --------------------------------------------------------------------------------------------------------------


def storm(net, listener, count, threads=4):
    """Healthy connections and accidents, one after the other on each of some threads; the accidents' ends."""
    accidents, failures = [], []

    def work(number):
        try:
            own = listen(net)
            for index in range(count // threads):
                if (index + number) % 3 == 0:
                    accidents.append(unanswered(net, own))
                elif (index + number) % 3 == 1:
                    accidents.append(stale(net, own))
                else:
                    healthy(net, own)
            own.close()
        except (OSError, harness.Wrong) as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    must(not failures, lambda: f"the storm itself failed: {failures[0]}")
    return accidents


# What finrace tells of processes that have lost an exchange has its limits in time and number: two tracers may differ there.
OUTCOME_KINDS = ("released", "tried", "client_answered", "client_released", "accept_overflow")


def lifecycle_events(health):
    return health.at("finrace.health.events") - health.at("finrace.health.outcome_events")


def lost_lifecycle_events(health):
    by_kind = health.at("finrace.health.losses.events_by_kind")
    return sum(count for kind, count in by_kind.items() if kind not in OUTCOME_KINDS)


def version_of_kernel():
    return tuple(int(number) for number in re.match(r"(\d+)\.(\d+)", os.uname().release).groups())


def losses_once(options, net):
    """One storm before a finrace with the smallest ring and one with a large ring. Returns what foreign traffic may spoil, how much of
    that there was, and how often the kernel skipped a program."""
    listener = listen(net)
    with Finrace(options, "--connections", "--ring-bytes", "64M", interval="100ms") as large, \
            Finrace(options, "--connections", "--ring-bytes", "4096", interval="100ms") as small:
        before = [one.next_health() for one in (large, small)]
        # The reader stands still, the ring is full at once: the FINs of these accidents are lost for certain.
        small.send(signal.SIGSTOP)
        for _ in range(20):
            healthy(net, listener)
        blind = [Pair(net, listener) for _ in range(10)]
        for pair in blind:
            pair.request_unanswered()
        small.send(signal.SIGCONT)
        small.next_health()
        small.next_health()
        for pair in blind:
            pair.client.close()
        accidents = storm(net, listener, options.storm) + [pair.ends for pair in blind]
        small.next_health()
        small.next_health()
        after_storm, served = [], set()
        while len(served) < 3:
            # One at a time fits even this ring; but the ring is the whole host's, and others may crowd it.
            must(len(after_storm) < 20, f"after the storm {len(served)} of {len(after_storm)} accidents had a verdict")
            after_storm.append(unanswered(net, listener))
            deadline = time.monotonic() + 2
            while after_storm[-1] not in served and time.monotonic() < deadline:
                served |= {one.ends for one in small.verdicts(net)} & set(after_storm)
                time.sleep(0.05)
        # The last connections' ends come a little later, and the two are not read at one moment.
        readings = []
        while len(readings) < 2 or readings[-1] != readings[-2]:
            after = [one.next_health() for one in (large, small)]
            readings.append([(one.at("finrace.health.events"), one.at("finrace.lost_events")) for one in after])
        large.stop()
        small.stop()

    seen, lost = [], []
    for first, last in zip(before, after):
        seen.append(lifecycle_events(last) - lifecycle_events(first))
        lost.append(lost_lifecycle_events(last) - lost_lifecycle_events(first))
    must(lost[0] == 0, f"the large ring lost {lost[0]} events")
    must(lost[1] > 0, "the smallest ring lost nothing: this test has proved nothing")
    foreign = [one for one in large.connections() if not net.owns(one)]

    last = small.health()
    must(last.at("finrace.health.complete") is False, "complete, in spite of losses")
    must(last.at("finrace.lost_events") == last.at("finrace.health.losses.ring_full"), "lost_events is not ring_full")
    by_kind = last.at("finrace.health.losses.events_by_kind")
    must(sum(by_kind.values()) == last.at("finrace.lost_events"), f"losses by kind {by_kind} of {last.at('finrace.lost_events')}")

    truth = {one.ends: one for one in large.verdicts(net)}
    must(set(truth) == set(accidents + after_storm), lambda: f"the large ring gave {len(truth)} verdicts of {len(accidents) + len(after_storm)}")
    found = {one.ends: one for one in small.verdicts(net)}
    must(len(found) == len(small.verdicts(net)), "two verdicts on one connection")
    for ends, one in found.items():
        must(ends in truth, lambda: f"a verdict where none is due: {json.dumps(one)}")
        same = (one.at("finrace.cause"), one.at("finrace.variant")) == \
            (truth[ends].at("finrace.cause"), truth[ends].at("finrace.variant"))
        must(same, lambda: f"with losses {one.verdict}, without {truth[ends].verdict}: {json.dumps(one)}")
        must(bool(one.at("finrace.incomplete")) == (one.at("finrace.lost_events") > 0),
             lambda: f"lost {one.at('finrace.lost_events')} events, incomplete: {one.at('finrace.incomplete')}")
    incomplete = [ends for ends, one in found.items() if one.at("finrace.incomplete")]
    must(incomplete, "no verdict is incomplete, though events of accidents were lost")
    ended = {one.ends for one in small.connections(net) if one.client}
    silent = [ends for ends in truth if ends in ended and ends not in found]
    must(not silent, lambda: f"the end of {len(silent)} accidents was seen, yet no verdict given: {silent[0]}")
    must(any(ends in found and not found[ends].at("finrace.incomplete") for ends in after_storm),
         "all verdicts after the storm are incomplete")
    harness.check_schema(small)
    print(f"          {seen[1]} events seen, {lost[1]} lost, {len(found)} of {len(truth)} verdicts, {len(incomplete)} incomplete")
    skipped = sum(one.health().at("finrace.health.losses.program_skipped") for one in (large, small))
    return seen[1] + lost[1], seen[0], len(foreign), skipped


def test_smallest_ring(options):
    """Every loss is counted: what the smallest ring let through and what it lost are what a large one saw."""
    for _ in range(5):
        with network() as net:
            accounted, due, foreign, skipped = losses_once(options, net)
        if accounted == due:
            return
        # Another's traffic may begin between the readings of the two counters; and what one kprobe misses as it hits within
        # another's handler, nothing counts before Linux 6.7, and no event's kind after (docs/design.md). Else there is no excuse.
        must(foreign or (options.attach == "kprobe" and (version_of_kernel() < (6, 7) or skipped)), f"{accounted} events seen or lost, {due} happened")
    raise harness.Wrong(f"{accounted} events seen or lost, {due} happened (with {foreign} foreign connections on this machine)")


def test_table_full(options):
    """More connections than there is room for: they are counted, finrace goes on, and there is room again once they have ended."""
    if options.backend != "trace" or (options.attach != "kprobe" and version_of_kernel() >= (5, 11)):
        raise harness.Skipped("the accounting lies in the sockets here, and no table can be full")
    room = 64
    with network() as net, Finrace(options, "--connections", "--max-connections", str(room), interval="100ms") as finrace:
        listener = listen(net)
        before = finrace.next_health().at("finrace.health.connections.open_estimate")
        pairs = [Pair(net, listener) for _ in range(4 * room)]
        due = 2 * len(pairs) - 3 * room  # another's may be among those that have room
        wait_for(lambda: finrace.next_health().at("finrace.health.losses.table_full") >= due, lambda: f"word of {due} without room: {finrace.health()}")
        told = finrace.next_health().at("finrace.health.outcome_events")
        for pair in pairs:
            pair.exchange()
            pair.server.close()
            must(pair.client.recv(1) == b"", "the server sent more")
            pair.client.close()
        after = finrace.next_health()
        must(after.at("finrace.health.outcome_events") == told, "upstreams that found no room were taken for clients")
        must(after.at("finrace.health.complete") is False, "complete, in spite of a full table")
        wait_for(lambda: finrace.next_health().at("finrace.health.connections.open_estimate") <= before + 2,
                 lambda: f"as few open as before, {before}: {finrace.health()}")
        due = unanswered(net, listener)
        wait_for(lambda: any(one.ends == due and not one.at("finrace.incomplete") for one in finrace.verdicts(net)), "a verdict once there is room again")
        harness.check_schema(finrace)


def test_listener_that_is_gone(options):
    """Who accepted a connection that is older than finrace is known, though nobody listens on its port any more."""
    if options.backend != "trace":
        raise harness.Skipped("what lists sockets for this backend tells by listening ports alone")
    with network() as net:
        pair = Pair(net)  # its listener has closed
        with Finrace(options, "--connections") as finrace:
            pair.exchange()
            pair.server.close()
            must(pair.client.recv(1) == b"", "the server sent more")
            pair.client.close()
            sides = {(one.ends, one.at("finrace.side")) for one in finrace.wait_connections(net, 2)}
            must(sides == {(pair.ends, "client"), (pair.ends, "server")}, f"the sides are wrong: {sides}")


# ---- names ---------------------------------------------------------------------------------------------------------------

NAMES = [
    b"plain", b'quo"te\\back', b"line\nfeed\r\t", b"\xff\xfe\x80\xc3(", b"caf\xc3\xa9", b"\xf0\x9f\x92\xa5boom", b"cut-in-two-\xe2\x82\xac\xe2\x82",
    b"\x01\x02\x1b[31mred", b"</script>", b"%s%n{}", b"\xed\xa0\x80surrogate", b"\xc0\xafoverlong", b" ", b"\x7f\xc2\x80",
]


@contextmanager
def in_child(work):
    """Forks; gives the child's process id and what `work` returned in it, and keeps the child until the end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            harness.die_with_parent()
            os.write(writer, json.dumps({"result": work()}).encode() + b"\n")
            signal.pause()
        except BaseException as error:  # all of them: this is not the process that reports
            os.write(writer, json.dumps({"error": repr(error)}).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as file:
            answer = json.loads(file.readline())
        must("result" in answer, lambda: f"in a child: {answer}")
        yield pid, answer["result"]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def named_accidents(net):
    """{ends: (process id, name)} of an accident by a process of each of those names."""
    listener = listen(net)
    due = {}
    for name in NAMES:
        def named_accident(name=name):
            checked(libc.prctl(PR_SET_NAME, ctypes.create_string_buffer(name)), "prctl")
            return unanswered(net, listener)

        with in_child(named_accident) as (pid, ends):
            due[tuple(ends)] = (pid, name)
    return due


def test_process_names(options):
    """Names with any bytes in them: valid JSON, the readable part kept, the right process."""
    with network() as net, Finrace(options, "--connections", interval="200ms") as finrace:
        due = named_accidents(net)
        finrace.wait_verdicts(net, len(NAMES))
        finrace.stop()
        harness.check_schema(finrace)
        for one in finrace.verdicts(net):
            pid, name = due[one.ends]
            must(one.at("process.pid") == pid, f"process {one.at('process.pid')}, not {pid}, for {name!r}")
            said = one.at("process.executable.name", "")
            kept = name[:15]
            try:
                must(said == kept.decode(), f"name {said!r}, not {kept!r}")
            except UnicodeDecodeError:
                readable = re.findall(rb"[ -~]+", kept)
                must(all(part.decode() in said for part in readable) and "\ufffd" in said, f"name {said!r} of {kept!r}")


def test_text_for_people(options):
    """Nothing in a process's name steers the terminal of who reads a diagnosis or watches."""
    recording = os.path.join(options.folder, "named")
    with network() as net, Finrace(options, "--record", recording) as finrace:
        watch = subprocess.Popen([options.finrace, "watch", *options.backend_flags], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, preexec_fn=Finrace.enter_host)
        said = harness.wait_said(watch, "finrace: ready")
        named_accidents(net)
        finrace.wait_verdicts(net, len(NAMES))
        finrace.stop()
        watch.send_signal(signal.SIGINT)
        watched, rest = (part.decode("utf-8", "replace") for part in watch.communicate(timeout=LIMIT))
    done = run_finrace(options, ["diagnose", recording])
    must("red" in watched and "upstream_closed" in done.stdout, f"{watched}{done.stdout}")
    for command, text in (("diagnose", done.stdout + done.stderr), ("watch", watched + said + rest)):
        steering = {c for c in text if c == "\ufffd" or unicodedata.category(c).startswith("C")} - {"\n"}
        must(not steering, f"{command}: {steering}: {text[-500:]}")


def test_endless_configuration(options):
    """A process that calls itself nginx and names a pipe, a device, files without end and names without end for its configuration
    keeps no diagnosis, nor makes it large."""
    folder = tempfile.mkdtemp(prefix="f")  # short: the new command line has the room of the old one
    configuration, pipe = os.path.join(folder, "c"), os.path.join(folder, "pipe")
    os.mkfifo(pipe)
    arguments = b"\0".join([b"nginx", b"-c", configuration.encode(), b""])

    def pretend():
        server = listen(net)
        with open(configuration, "w", encoding="ascii") as file:
            file.write("http {{ include {}; include /dev/zero; upstream u {{ server {}:{}; keepalive 2; keepalive_timeout 7s; }}\n"
                       "include /*/*/*/*/*/*/*/*; include {}; include /usr/*/*/*/{}; include {}; include /proc/*/*/{}; }}\n".format(
                           pipe, *server.getsockname(), configuration, 300_000 * "a", 150_000 * "/a", 4000 * "a"))
        checked(libc.prctl(PR_SET_NAME, ctypes.create_string_buffer(b"nginx")), "prctl")
        fields = read_file("/proc/self/stat").rpartition(b")")[2].split()
        begin, end = int(fields[45]), int(fields[46])  # arg_start, arg_end
        must(end - begin >= len(arguments), "no room for other arguments")
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(begin)
            memory.write(arguments.ljust(end - begin, b"\0"))
        return stale(net, server)

    def limited():
        Finrace.enter_host()
        if not options.sanitized:
            resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

    diagnosis = harness.Diagnosis(options, *options.backend_flags, "--for", "1h", preexec_fn=limited)
    try:
        with network() as net:
            diagnosis.wait_ready()
            with in_child(pretend):
                _, report, _ = diagnosis.end(signal.SIGINT)
            ends = [one.get("proxy", {}) for one in report["upstreams"] if one["address"].startswith(net.prefix)]
    finally:
        diagnosis.kill()
        shutil.rmtree(folder)
    must([[present["place"] for present in end.get("present", [])] for end in ends] == [[f"{configuration}:1"]], f"{ends}")


# ---- many ----------------------------------------------------------------------------------------------------------------


class Crowd:
    """Idle connections, more than one process may have descriptors for: children hold them, until told to close them."""

    def __init__(self, net, count):
        soft = harness.raise_file_limit(2 * count + 100)
        each = min(count, (soft - 100) // 2)
        self.ports = []
        self.children = []
        for begin in range(0, count, each):
            listener = listen(net, host=200)
            self.ports.append(listener.getsockname())
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                try:
                    harness.die_with_parent()
                    ours.close()
                    self.hold(net, listener, len(self.children), min(each, count - begin), theirs)
                finally:
                    os._exit(1)
            theirs.close()
            listener.close()
            ours.settimeout(10 * LIMIT)
            self.children.append((pid, ours))

    @staticmethod
    def hold(net, listener, number, count, channel):
        sockets = []
        target = listener.getsockname()
        for index in range(count):
            client = socket.socket()
            client.bind((net.address(1 + number), 20000 + index))
            client.connect(target)
            sockets += [client, listener.accept()[0]]
        channel.sendall(b"o")
        channel.recv(1)
        for sock in sockets:
            sock.close()
        channel.sendall(b"c")
        channel.recv(1)

    def wait(self, what):
        for _, channel in self.children:
            must(channel.recv(1) == what, "a child that holds connections has failed")

    def close_all(self):
        for _, channel in self.children:
            channel.sendall(b"x")
        self.wait(b"c")

    def end(self):
        for pid, channel in self.children:
            channel.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_many_connections(options):
    """As many as asked for open at once, begun before and after finrace: all followed, none lost, memory within its budget."""
    count = options.many
    with network() as net, Finrace(options) as finrace:
        started = time.monotonic()
        crowd = Crowd(net, count)
        try:
            crowd.wait(b"o")
            took = time.monotonic() - started

            def followed():
                health = finrace.next_health()
                return health if health.at("finrace.health.connections.open_estimate") >= count else None

            health = wait_for(followed, f"{count} connections to be followed")
            must(health.at("finrace.health.losses.table_full") == 0, f"{health.at('finrace.health.losses')}")
            must(health.at("finrace.lost_events") == 0, f"{health.at('finrace.lost_events')} events were lost")
            memory = [finrace.memory()]

            started = time.monotonic()
            with Finrace(options) as later:
                ready = time.monotonic() - started
                must(later.adopted() >= count, f"a later finrace took in {later.adopted()} of {count}")
                memory.append(later.memory())
                crowd.close_all()

                def closed(one):
                    last = {}
                    for record in one.records("finrace.upstream"):
                        last[record.peer] = record.at("finrace.upstream.connections.closed")
                    return sum(last.get(target, 0) for target in crowd.ports)

                for one in (finrace, later):
                    wait_for(lambda one=one: closed(one) == count, lambda one=one: f"{count} closed connections, not {closed(one)}",
                             pause=0.5)
                    memory.append(one.memory())
                later.stop()
            finrace.stop()
        finally:
            crowd.end()
        for one in (finrace, later):
            must(one.health().at("finrace.lost_events") == 0, "events were lost at the close")
            must(not one.verdicts(net), lambda: f"a verdict on a healthy connection: {one.verdicts(net)[0]}")
        print(f"          {count} connections opened in {took:.1f} s; a later finrace was ready in {ready:.1f} s; resident memory "
              + ", ".join(f"{size / (1 << 20):.1f} MB" for size in memory))
        must(options.sanitized or max(memory) < MEMORY_BUDGET, f"{max(memory)} bytes of memory")


# ---- older than the tracer -----------------------------------------------------------------------------------------------


def test_older_connections(options):
    """Idle connections that finrace finds when it starts, in two network namespaces, then race."""
    keepers, cases, nets = [], [], []
    rested, idles = {}, {}  # by the connection's ends, (not before, not after): when its rest began, and how long it was
    try:
        for _ in range(2):
            net = Net()
            nets.append(net)
            # A namespace is found through its processes.
            keepers.append(subprocess.Popen(["sleep", "600"], preexec_fn=harness.die_with_parent))
            listener = listen(net)
            race, healthy_one, stale_one, busy = (Pair(net, listener) for _ in range(4))
            v6 = Pair(net, listen(net, "6"), "6")
            for pair in (race, healthy_one, stale_one, v6):
                pair.exchange()
                began = time.monotonic()
                pair.exchange()
                rested[pair.ends] = began, time.monotonic()
            stale_one.server.close()
            busy.client.sendall(REQUEST)
            read_all(busy.server, len(REQUEST))
            cases.append((net, listener, race, healthy_one, stale_one, busy, v6))
        with Finrace(options, "--connections", interval="200ms") as finrace:
            must(finrace.adopted() >= 10, f"{finrace.adopted()} connections were taken in")
            time.sleep(max(0.0, OLD_IDLE - (time.monotonic() - max(end for _, end in rested.values()))))
            for net, _, race, healthy_one, stale_one, busy, v6 in cases:
                for pair in (race, v6):
                    first, last = rested[pair.ends]
                    shortest = time.monotonic() - last
                    pair.client.sendall(REQUEST)
                    idles[pair.ends] = shortest, time.monotonic() - first
                    wait_for(lambda pair=pair: unread(pair.server) == len(REQUEST), "the request's arrival")
                    pair.server.close()  # unread bytes: RST
                    expect_reset(pair.client)
                stale_one.client.send(REQUEST)
                healthy_one.exchange()
                # Not close(): what is left of an orphan in FIN_WAIT2 is no socket, so backend cgroup could not see its end.
                for first, second in ((busy.server, busy.client), (healthy_one.client, healthy_one.server)):
                    first.shutdown(socket.SHUT_WR)
                    must(second.recv(1) == b"", "no end of stream")
                    second.close()
                    must(first.recv(1) == b"", "the other side sent more")
                    first.close()
                for pair in (race, v6, stale_one):
                    pair.client.close()
            for net, *_ in cases:
                finrace.wait_verdicts(net, 4)
                finrace.wait_connections(net, 9)
            finrace.stop()
            harness.check_schema(finrace)
        for net, _, race, healthy_one, stale_one, busy, v6 in cases:
            found = {one.ends: one for one in finrace.verdicts(net)}
            must(len(found) == len(finrace.verdicts(net)), "two verdicts on one connection")
            must(set(found) == {race.ends, v6.ends, stale_one.ends, busy.ends},
                 lambda: f"verdicts: {[(ends, one.verdict) for ends, one in found.items()]}")
            for ends, cause, incomplete in (
                (race.ends, "keepalive_race", False), (v6.ends, "keepalive_race", False),
                (stale_one.ends, "stale_reuse", True), (busy.ends, "upstream_closed", True),
            ):
                one = found[ends]
                must(one.at("finrace.cause") == cause, lambda: f"not {cause}: {json.dumps(one)}")
                must(one.at("finrace.connection.adopted") is True, lambda: f"not marked as older: {json.dumps(one)}")
                must(one.at("finrace.incomplete") is incomplete, lambda: f"incomplete is not {incomplete}: {json.dumps(one)}")
            for ends in (race.ends, v6.ends):
                one = found[ends]
                must(one.at("finrace.variant") == "reset_unread", lambda: f"{one.verdict}")
                must(one.at("finrace.connection.reused") is True, lambda: f"not reused: {json.dumps(one)}")
                idle = one.at("finrace.connection.idle_ms") / 1000
                shortest, longest = idles[ends]
                must(shortest - options.ticks < idle < longest + options.ticks, f"idle {idle:.3f} s, in truth {shortest:.3f} to {longest:.3f} s")
            records = finrace.connections(net)
            # The stale one's server is an orphan in FIN_WAIT2, which the kernel keeps as TIME_WAIT: no socket.
            must(len(records) == 9, f"{len(records)} records of connections")
            for one in records:
                must(one.at("finrace.connection.adopted") is True, lambda: f"not marked as older: {json.dumps(one)}")
                must(not one.client or one.at("process.pid") == os.getpid(), lambda: f"not this process: {json.dumps(one)}")
            sides = {(one.ends, one.at("finrace.side")) for one in records}
            for pair in (race, v6, stale_one, busy, healthy_one):
                due = {(pair.ends, "client")} | ({(pair.ends, "server")} if pair is not stale_one else set())
                must(due <= sides, f"the sides are wrong: {sides}")
    finally:
        for keeper in keepers:
            keeper.kill()
            keeper.wait()
        for net in nets:
            net.close()


def unread(sock):
    answer = fcntl.ioctl(sock, 0x541B, b"\0\0\0\0")  # FIONREAD
    return int.from_bytes(answer, sys.byteorder)


def expect_reset(sock):
    try:
        must(False, f"no reset but {sock.recv(10)!r}")
    except ConnectionResetError:
        pass


# ---- starting and stopping -----------------------------------------------------------------------------------------------


class Load:
    """Child processes that open, use and close healthy connections as fast as they can. Asserts that they did until the end."""

    def __init__(self, net, count=2, pause=0.0):
        self.pids = []
        for number in range(count):
            pid = os.fork()
            if pid == 0:
                try:
                    harness.die_with_parent()
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    listener = listen(net)
                    while True:
                        healthy(net, listener, random.randrange(4), client_host=10 + number)
                        time.sleep(pause)
                finally:
                    os._exit(1)
            self.pids.append(pid)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        by_themselves = [pid for pid in self.pids if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)]
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        must(kind is not None or not by_themselves, f"{len(by_themselves)} of {len(self.pids)} loading processes ended by themselves")


def test_churn_at_start(options):
    """Sockets that come and go while they are listed: no crash, and never a verdict on a healthy connection."""
    with network() as net, Load(net, pause=options.pause):
        for number in range(options.starts // 5):
            with Finrace(options, "--connections", interval="100ms") as finrace:
                finrace.next_health()
                finrace.stop(signal.SIGTERM if number % 2 else signal.SIGINT)
                must(not finrace.verdicts(net), lambda: f"a verdict on a healthy connection: {finrace.verdicts(net)[0]}")
                must(finrace.connections(net), "no connection was seen")
                harness.check_schema(finrace)


def test_answers_at_start(options):
    """Requests that are answered while finrace starts, some between its looks at a socket: their upstream did not close on them."""
    many, older = 100, 0
    with network() as net:
        listener = listen(net)
        for _ in range(5):
            pairs = [Pair(net, listener) for _ in range(many)]
            for pair in pairs:
                pair.client.sendall(REQUEST)
                read_all(pair.server, len(REQUEST))

            def answer(pairs=pairs):
                for pair in pairs:
                    pair.server.sendall(RESPONSE)
                    time.sleep(options.pause)

            finrace = Finrace(options, "--upstream", f"{net.prefix}0/24", interval="100ms", wait=False)
            with finrace:
                answering = threading.Thread(target=answer, daemon=True)
                answering.start()
                finrace.wait_ready()
                answering.join(LIMIT)
                for pair in pairs:
                    read_all(pair.client, len(RESPONSE))
                    pair.server.close()
                    must(pair.client.recv(1) == b"", "a byte came after the answer")
                    pair.client.close()
                older += finrace.adopted()
                finrace.next_health()
                finrace.stop()
                must(not finrace.verdicts(net), lambda: f"{len(finrace.verdicts(net))} verdicts on answered requests: {finrace.verdicts(net)[0]}")
        must(older > 0, "it took no connection in: this test has proved nothing")


def test_start_stop(options):
    """Started and stopped again and again under load, also before it is ready, also killed: nothing stays in the kernel."""
    before = set(harness.bpf_objects())
    with network() as net, Load(net):
        for number in range(options.starts):
            how = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[number % 3]
            hasty = number % 5 == 4
            with Finrace(options, interval="50ms", wait=not hasty) as finrace:
                if hasty:
                    time.sleep(random.uniform(0.0, 0.3))
                    if not finrace.alive():
                        raise harness.Wrong(f"it ended by itself: {finrace.words()}")
                    finrace.send(how)
                    must(finrace.finished.wait(harness.STOP_LIMIT), f"signal {how} did not end it before it was ready")
                    code = finrace.process.returncode
                    must(code in (0, -how), f"signal {how} before it was ready: exit {code}: {finrace.words()}")
                elif how == signal.SIGKILL:
                    finrace.kill()
                else:
                    finrace.stop(how)
                    must(finrace.health().at("finrace.health.last") is True, "no last summary")

    def left():
        return {key: name for key, name in harness.bpf_objects().items() if key not in before and key not in harness.held_objects()}

    # The kernel frees maps and programs after a grace period.
    deadline = time.monotonic() + LIMIT
    while leaked := left():
        must(time.monotonic() < deadline, f"left in the kernel: {leaked}")
        time.sleep(0.5)


def test_signals(options):
    """SIGINT and SIGTERM end it with 0, after a last summary of everything."""
    for number in (signal.SIGINT, signal.SIGTERM):
        with network() as net, Finrace(options, interval="1h") as finrace:
            listener = listen(net)
            unanswered(net, listener)
            finrace.wait_verdicts(net, 1)
            must(not finrace.records("finrace.health"), "a summary before its time")
            finrace.stop(number)
            last = finrace.records()[-1]
            must(last.name == "finrace.health" and last.at("finrace.health.last") is True, f"the last record is {last}")
            must(last.at("finrace.health.verdicts.upstream_closed", 0) >= 1, f"{last.at('finrace.health.verdicts')}")
            upstreams = [one for one in finrace.records("finrace.upstream") if one.peer == listener.getsockname()]
            must(len(upstreams) == 1 and upstreams[0].at("finrace.upstream.verdicts") == {"upstream_closed": 1}, f"{upstreams}")
            harness.check_schema(finrace)


def test_upstreams_that_rest(options):
    """A summary tells of those upstreams that have changed since the one before; the last one of all."""
    with network() as net, Finrace(options, interval="250ms") as finrace:
        listener = listen(net)

        def told():
            return len([one for one in finrace.records("finrace.upstream") if one.peer == listener.getsockname()])

        unanswered(net, listener)
        finrace.wait_verdicts(net, 1)
        for _ in range(2):
            finrace.next_health()
        first = told()
        must(first > 0, "no word of the upstream")
        for _ in range(4):
            finrace.next_health()
        must(told() == first, f"{told() - first} records of an upstream at which nothing happened")
        unanswered(net, listener)
        finrace.wait_verdicts(net, 2)
        for _ in range(2):
            finrace.next_health()
        must(told() > first, "no word of the upstream's change")
        before = told()
        finrace.stop()
        must(told() == before + 1, "the last summary leaves it out")


def test_for(options):
    """--for ends it with 0 as a signal does, after a last summary; it is refused where a recording sets the time."""
    with network() as net, Finrace(options, "--for", "3s", interval="1h") as finrace:
        unanswered(net, listen(net))
        finrace.wait_end()
        must(len(finrace.verdicts(net)) == 1, f"{finrace.verdicts(net)}")
        must(finrace.health().at("finrace.health.last") is True, "no last summary")
    done = run_finrace(options, ["run", "--for", "3s", "--replay", "nothing.rec"])
    must(done.returncode == 2 and "--for" in done.stderr, f"exit {done.returncode}: {done.stderr}")


def test_closed_standard_streams(options):
    """What would be said to a standard stream that was closed before the start is not written between the records."""
    deeper = os.path.join(options.folder, "deeper")
    os.mkdir(deeper)
    for folder in (options.folder, deeper):  # a path is opened step by step: the number that its file gets depends on them
        path = os.path.join(folder, "closed-stream.jsonl")
        command = [options.finrace, "run", *options.backend_flags, *options.unconfined, "--for", "1s", "--output", path]
        done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], timeout=LIMIT, check=False)
        with open(path, "rb") as file:
            lines = file.read().splitlines()
        must(done.returncode == 0 and lines, f"exit {done.returncode}, {len(lines)} lines")
        must(all(line.startswith(b"{") for line in lines), f"{lines}")


def test_file_size_limit(options):
    """A file that may not grow beyond this process's limit (RLIMIT_FSIZE) is as a full disk: nothing ends by SIGXFSZ."""
    with network() as net, Finrace(options, interval="100ms") as finrace:
        before = resource.prlimit(finrace.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(finrace.process.pid, resource.RLIMIT_FSIZE, (4096, before[1]))
        wait_for(lambda: any("File too large" in line for line in finrace.said), finrace.words)
        due = unanswered(net, listen(net))
        resource.prlimit(finrace.process.pid, resource.RLIMIT_FSIZE, before)
        wait_for(lambda: [one.ends for one in finrace.verdicts(net)] == [due], "the verdict, once there is room")


def test_told_to_end_in_a_flood(options):
    """More events than it takes in at one go wait in the ring when it is told to end: it hands on all of them first."""
    count = 300 if options.small else 1500
    with network() as net, Finrace(options, "--connections", "--ring-bytes", "64M", interval="1h") as finrace:
        listener = listen(net)
        finrace.send(signal.SIGSTOP)
        for _ in range(count):
            healthy(net, listener)
        finrace.send(signal.SIGTERM)
        finrace.send(signal.SIGCONT)
        finrace.wait_end()
        last = finrace.health()
        must(last.at("finrace.health.last") is True, f"the last record is {last}")
        must(last.at("finrace.health.losses.ring_full") == 0, f"events were lost: {last.at('finrace.health.losses')}")
        must(options.small or last.at("finrace.health.events") > 2 * 4096, "too few events: this test has proved nothing")
        records = len(finrace.connections(net))
        must(records == 2 * count, f"{records} records of {2 * count}")


def test_accept_queue_full(options):
    """Requests on connections that the server's kernel holds outside its full accept queue: accept_stalled, once given up.

    By trace the listener itself tells: accept_overflow, and with that the clients' verdicts are proven.
    """
    backlog, request = 4, b"x" * 100
    with network() as net, Finrace(options) as finrace:
        listener = socket.socket()
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)  # a handshake alone fills no queue
        listener.bind((net.address(), net.next_port()))
        listener.listen(backlog)
        clients = []
        for _ in range(2):  # the queue takes one more than its backlog
            wave = [socket.create_connection(listener.getsockname(), LIMIT) for _ in range(backlog)]
            for client in wave:
                client.sendall(request)
            clients += wave
        time.sleep(1.3)
        # The kernel counts the SYN as an acknowledged byte.
        acked = {client: struct.unpack_from("=Q", client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136), 120)[0] - 1
                 for client in clients}
        stalled = [client for client in clients if acked[client] == 0]
        must(len(stalled) == backlog - 1, f"{len(stalled)} connections stalled: {list(acked.values())}")
        due = sorted(client.getsockname() + client.getpeername() for client in stalled)
        for client in clients:
            client.close()
        trace = options.backend == "trace"
        # The listener's come each second that it overflows, as many as the machine is slow.
        found = finrace.wait_verdicts(net, len(due), among=lambda one: one.client)
        stalls = [one for one in found if one.client]
        certainty = "proven" if trace else "likely"
        must({one.verdict for one in stalls} == {f"accept_stalled/gave_up/{certainty}"}, f"{[one.verdict for one in found]}")
        must(sorted(one.ends for one in stalls) == due, "verdicts on other connections")
        overflows = [one for one in found if not one.client]
        must({one.verdict for one in overflows} == ({"accept_overflow/proven"} if trace else set()), f"{overflows}")
        for one in overflows:
            must(one.ends[2:] == listener.getsockname() and one.at("finrace.evidence.accept_queue") == backlog + 1, f"{one}")
        must(not trace or sum(one.at("finrace.evidence.turned_away") for one in overflows) >= 1, "nobody was turned away")
        listener.close()
        finrace.stop()
        must(finrace.health().at("finrace.health.unclassified") >= len(clients) - len(due), "the others were not counted")


def test_log_rotation(options):
    """SIGHUP or SIGUSR1: the output file is opened anew, and no record is lost or torn; without a file it is the end."""
    path = os.path.join(options.folder, "rotated.jsonl")
    with network() as net:
        listener = listen(net)
        with Finrace(options, interval="100ms", output=path) as finrace:
            due = []
            for turn in range(3):
                due.append(unanswered(net, listener))
                wait_for(lambda: os.path.exists(path) and b"finrace.verdict" in read_file(path), "the verdict")
                os.rename(path, f"{path}.{turn}")
                due.append(unanswered(net, listener))  # into the file that was moved, or the new one
                finrace.send((signal.SIGHUP, signal.SIGUSR1)[turn % 2])
                wait_for(lambda: os.path.exists(path), "a new file")
            os.rename(path, f"{path}.3")
            os.mkdir(path)
            finrace.send(signal.SIGHUP)
            wait_for(lambda: any("Is a directory" in text for text in finrace.said), "word of what is in the way")
            due.append(unanswered(net, listener))
            wait_for(lambda: str(due[-1][1]).encode() in read_file(f"{path}.3"), "a verdict in the file of before")
            finrace.stop()
            for turn in range(4):
                data = read_file(f"{path}.{turn}")
                must(data.endswith(b"\n"), f"file {turn} ends within a line")
                finrace.lines += [(0.0, line) for line in data.splitlines()]
            harness.check_schema(finrace)
            found = [one.ends for one in finrace.verdicts(net)]
            must(sorted(found) == sorted(due), f"{len(found)} verdicts of {len(due)}")
        with Finrace(options, interval="1h", output=subprocess.DEVNULL) as finrace:
            finrace.send(signal.SIGHUP)
            finrace.wait_end()


def test_told_timer(options):
    """--idle-timeout: a timer that is told holds from the first connection on; that of another upstream says nothing."""
    with network() as net:
        listener = listen(net)
        flags = ["--idle-timeout", f"{net.prefix}0/24=7s", "--idle-timeout", "192.0.2.1=1s"]
        with Finrace(options, *flags, interval="100ms") as finrace:
            due = stale(net, listener)
            verdict, = finrace.wait_verdicts(net, 1)
            must(verdict.ends == due and verdict.at("finrace.upstream.idle_timeout_ms") == 7000 and verdict.at("finrace.upstream.samples") == 0,
                 lambda: json.dumps(verdict))
            finrace.stop()
        for wrong in ("5s", "192.0.2.1=5", "192.0.2.1=1ms"):
            done = run_finrace(options, ["run", *options.backend_flags, "--idle-timeout", wrong])
            must(done.returncode == 2 and "--idle-timeout" in done.stderr and "accepted" in done.stderr and not done.stdout, done.stderr)


def test_reload(options):
    """SIGHUP reads the configuration file anew, from within its own root: what can change does, and it says what takes a restart."""
    folder = tempfile.mkdtemp(prefix="finrace-configuration-")  # not below an output's
    path = os.path.join(folder, "finrace.toml")

    def configure(*lines, in_place=False):
        text = "\n".join(lines) + "\n"
        if in_place:
            with open(path, "w", encoding="ascii") as file:
                file.write(text)
            return
        with open(path + ".new", "w", encoding="ascii") as file:
            file.write(text)
        os.rename(path + ".new", path)

    def reload(finrace, *words):
        before = len(finrace.said)
        finrace.send(signal.SIGHUP)
        for text in words:
            wait_for(lambda: any(text in said for said in finrace.said[before:]), lambda: f"{text}: {finrace.words()}")

    def armed(finrace):
        """How often its loop wakes by itself, in milliseconds."""
        timers = []
        for descriptor in glob.glob(f"/proc/{finrace.process.pid}/fdinfo/*"):
            with suppress(OSError):  # closed meanwhile
                timers += re.findall(rb"it_interval: \((\d+), (\d+)\)", read_file(descriptor))
        must(len(timers) == 1, f"its timers are {timers}")
        return int(timers[0][0]) * 1000 + int(timers[0][1]) / 1e6

    def flat_lines(finrace):
        return [line for _, line in finrace.lines if b'"event.name":' in line]

    def filtered(finrace):
        """An accident that the filter keeps back: judged by the time of the next summary."""
        unanswered(net, listener)
        finrace.next_health()

    with network() as net:
        listener = listen(net)
        configure('upstream = "192.0.2.1"', 'ring_bytes = "4M"')
        with Finrace(options, "--config", path, interval="100ms") as finrace:
            filtered(finrace)
            configure("upstream = []", f'upstream_name = "{net.prefix}0/24=billing"', 'ring_bytes = "8M"', 'interval = "1h"')
            reload(finrace, "taken anew: upstream, upstream_name", "until a restart: ring_bytes")
            due = unanswered(net, listener)
            wait_for(lambda: [one.ends for one in finrace.verdicts(net)] == [due], "the verdict, which the filter lets through by now")
            must(finrace.verdicts(net)[0].at("peer.service") == "billing", f"{finrace.verdicts(net)}")
            finrace.next_health()  # --interval wins over the file's

            configure("upstream = []", "nonsense = 1")
            reload(finrace, f"{path}:2: nonsense is no key", "all goes on as before")
            os.unlink(path)
            reload(finrace, "No such file", "all goes on as before")
            os.mkfifo(path)
            reload(finrace, "no regular file", "all goes on as before")
            configure("metrics = 1", 'mask_addresses = "all"', "connections = true")
            reload(finrace, "taken anew: upstream_name", "until a restart: connections, mask_addresses, metrics, ring_bytes")
            shown = unanswered(net, listener)
            verdict = finrace.wait_verdicts(net, 2)[1]
            must(verdict.ends == shown and verdict.at("peer.service") is None, f"what takes a restart was taken: {verdict}")
            finrace.stop()
            harness.check_schema(finrace)
            must(not any("warning" in text for text in finrace.said), finrace.words)

        # No connection's state is lost, be it chosen all along or only by the time it races; nor what is known of its upstream.
        configure('upstream = "192.0.2.1"')
        with Finrace(options, "--config", path, interval="100ms") as finrace:
            pairs = [Pair(net, listener)]
            pairs[0].exchange()
            configure('side = "client"')
            reload(finrace, "taken anew: side, upstream")
            pairs.append(Pair(net, listener))
            pairs[1].exchange()
            due = [unanswered(net, listener)]
            finrace.wait_verdicts(net, 1)
            if options.backend == "cgroup":
                configure('side = "server"', "flat = true")
                reload(finrace, "--side server: backend cgroup", "all goes on as before")
                due.append(unanswered(net, listener))
                finrace.wait_verdicts(net, 2)
                must(not flat_lines(finrace), "what was refused was taken")
            else:
                configure('side = "server"')
                reload(finrace, "taken anew: side")
                filtered(finrace)
            configure("flat = true")
            reload(finrace, "taken anew: ")
            wait_for(lambda: flat_lines(finrace), "a flat record")
            configure("")
            reload(finrace, "taken anew: flat")
            for pair in pairs:
                reuse_stale(pair)
            verdicts = finrace.wait_verdicts(net, len(due) + 2)
            must(sorted(one.ends for one in verdicts) == sorted(due + [pair.ends for pair in pairs]), f"{verdicts}")
            for one in verdicts[len(due):]:
                known = [one.at(f"finrace.connection.{name}") for name in ("reused", "exchange", "adopted")]
                must(one.at("finrace.cause") == "stale_reuse" and known == [True, 2, None], f"{one}")
            finrace.stop()
            told = [one for one in finrace.records("finrace.upstream") if one.peer == listener.getsockname()][-1]
            must(told.at("finrace.upstream.verdicts") == {"upstream_closed": len(due), "stale_reuse": 2}, f"{told}")
            finrace.lines = [one for one in finrace.lines if b'"event.name":' not in one[1]]
            harness.check_schema(finrace)

        # Summaries come as often as the file says by now, and an idle finrace wakes no oftener than they take.
        configure('interval = "10s"')
        with Finrace(options, "--config", path, interval=None) as finrace:
            for interval, ms, tick in (("50ms", 50, 50), ("1m", 60000, 200), ("10ms", 10, 10)):
                configure(f'interval = "{interval}"')
                reload(finrace, "taken anew: interval")
                must(armed(finrace) == tick, f"with an interval of {interval} it wakes every {armed(finrace):g} ms")
                wait_for(lambda: finrace.records("finrace.health") and finrace.health().at("finrace.health.interval_ms") == ms, "a summary")
            configure('for = "1s"')
            reload(finrace, "taken anew: for, interval")
            finrace.wait_end()
            must(finrace.health().at("finrace.health.last") is True, "no last summary")

        # A key that is out of reach by now keeps no other change back.
        key = os.path.join(options.folder, "key")
        with open(key, "w", encoding="ascii") as file:
            file.write("k" * 32)
        hashing = ['hash_addresses = "all"', f'hash_key = "{key}"']
        configure(*hashing)
        with Finrace(options, "--config", path, interval="100ms", output=os.path.join(folder, "hashed.jsonl")) as finrace:
            configure(*hashing, f'upstream_name = "{net.prefix}0/24=billing"')
            reload(finrace, "taken anew: upstream_name")
            unanswered(net, listener)
            wait_for(lambda: b"billing" in read_file(os.path.join(folder, "hashed.jsonl")), "the named verdict")
            finrace.stop()
        must(net.prefix.encode() not in read_file(os.path.join(folder, "hashed.jsonl")), "an address is shown")

        # A recording's header tells its filter, which stays; and a file that is a mount of its own, as a container's is, is read.
        configure('upstream = "192.0.2.1"')
        other = os.path.join(folder, "another.toml")
        with open(other, "w", encoding="ascii") as file:
            file.write("")
        checked(libc.mount(path.encode(), other.encode(), None, 4096, None), "mount --bind")
        with Finrace(options, "--config", other, "--record", os.path.join(options.folder, "reloaded.rec"), interval="100ms") as finrace:
            configure('side = "server"', f'upstream_name = "{net.prefix}0/24=billing"', in_place=True)
            reload(finrace, "taken anew: upstream_name", "until a restart: side, upstream")
            filtered(finrace)
            finrace.stop()
            must(not finrace.verdicts(net), f"the filter has changed: {finrace.verdicts(net)}")
            must(not any("warning" in text for text in finrace.said), finrace.words)
        unmount(other)
    shutil.rmtree(folder)


def cgroup_mount():
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if after.startswith("cgroup2 "):
                return before.split(" ")[4]
    raise harness.EnvironmentProblem("cgroup v2 is mounted nowhere")


class Placed:
    """A process in a control group, which loses a request there when told to."""

    def __init__(self, net, listener):
        self.orders, self.ends = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                while os.read(self.orders[0], 1) == b"x":
                    os.write(self.ends[1], b"%d\n" % unanswered(net, listener)[1])
            finally:
                os._exit(1)
        os.close(self.orders[0])
        os.close(self.ends[1])

    def lose_from(self, group):
        """The client's port."""
        with open(os.path.join(group, "cgroup.procs"), "w", encoding="ascii") as file:
            file.write(str(self.pid))
        os.write(self.orders[1], b"x")
        told = os.read(self.ends[0], 16)
        must(told, "the process in the control group has failed")
        return int(told)

    def end(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.orders[1])
        os.close(self.ends[0])


def test_containers(options):
    """Whose a connection is: the container, pod and unit of its owner, told of in the record and in its replay alike."""
    container, pod = "".join(random.choices("0123456789abcdef", k=64)), "0c9a2d6e-41b7-4f6b-9d0e-6a2c3b1f5e77"
    root = cgroup_mount()
    slices = os.path.join(root, "kubepods.slice"), f"kubepods-pod{pod.replace('-', '_')}.slice", f"cri-containerd-{container}.scope"
    contained, served = os.path.join(*slices), os.path.join(root, "finrace-test.service")
    folders = ["/var/log/pods", f"/var/log/pods/shop_billing-5d9c_{pod}", *(os.path.join(*slices[:count]) for count in (1, 2, 3)), served]
    recording = os.path.join(options.folder, "containers.rec")
    made, processes = [], []
    try:
        for path in folders:
            if not os.path.exists(path):
                os.mkdir(path)
                made.append(path)
        with network() as net, Finrace(options, "--record", recording, interval="100ms") as finrace:
            listener = listen(net)
            processes += [Placed(net, listener), Placed(net, listener)]
            ports = []
            for process, group in ((0, contained), (1, served), (0, served), (0, root)):
                time.sleep(1.1)  # what was read of a process holds for a second
                ports.append(processes[process].lose_from(group))
                finrace.wait_verdicts(net, len(ports))
            in_pod, in_unit, moved, nowhere = ({one.at("network.local.port"): one for one in finrace.verdicts(net)}[port] for port in ports)
            must((in_pod.at("container.id"), in_pod.at("k8s.pod.uid"), in_pod.at("k8s.pod.name"), in_pod.at("k8s.namespace.name")) ==
                 (container, pod, "billing-5d9c", "shop"), f"{in_pod}")
            must(in_pod.at("process.linux.cgroup") == contained.removeprefix(root), f"{in_pod}")
            for one in (in_unit, moved):
                must(one.at("finrace.systemd_unit") == "finrace-test.service" and one.at("container.id") is None, f"{one}")
            must(nowhere.at("finrace.systemd_unit") is None and nowhere.at("container") is None, f"{nowhere}")
            finrace.stop()
            harness.check_schema(finrace)
            harness.check_replay(finrace, [recording])
            must(not any("warning" in text for text in finrace.said), finrace.words)
    finally:
        for process in processes:
            process.end()
        for path in reversed(made):
            wait_for(lambda path=path: not remains(path), f"the end of {path}")


def remains(folder):
    """Removes it, once its processes are gone."""
    with suppress(OSError):
        os.rmdir(folder)
    return os.path.exists(folder)


def test_recording(options):
    """A recording, in parts and whole, tells what the run told; of one that is cut or damaged, all that is whole."""
    path = os.path.join(options.folder, "recorded")
    with network() as net, Finrace(options, "--connections", "--record", path, "--rotate", "64k", "--keep", "1000") as finrace:
        listener = listen(net)
        due = 0
        while len(glob.glob(f"{path}*")) < 4:  # a part ends as finrace has looked, however much it took in at once
            for _ in range(10):
                unanswered(net, listener)
                stale(net, listener)
                healthy(net, listener, 2)
                due += 2
            must(due < 2000, f"{len(glob.glob(f'{path}*'))} parts after {due} verdicts")
            finrace.wait_verdicts(net, due)
        finrace.wait_connections(net, 2 * due)
        finrace.stop()
    parts = sorted(glob.glob(f"{path}*"))
    must(all(os.stat(part).st_mode & 0o777 == 0o600 for part in parts), "a part that others can read")
    random.shuffle(parts)
    harness.check_replay(finrace, parts, ["--connections"])
    whole, _ = harness.replay(options, parts, ["--connections"])

    some, said = harness.replay(options, [part for part in parts if part != f"{path}.2"], ["--connections"])
    must("is not here" in said and 0 < len(some) < len(whole), f"{len(some)} lines without a part: {said}")
    some, said = harness.replay(options, [f"{path}.1"], ["--connections"])
    must("what came before is missing" in said and "still being written" in said, said)

    status, report, said = harness.diagnose(options, *parts)
    found = sum(finding["verdicts"] for finding in report["findings"])
    must(status == 1 and report["lost"] == 0 and found == due and "warning" not in said, f"exit {status}, {found} verdicts: {said}")
    _, report, _ = harness.diagnose(options, *(part for part in parts if part != f"{path}.2"))
    must(report["lost"] > 0, "a diagnosis without a part counts nothing as missing")

    data = read_file(f"{path}.1")
    cut = os.path.join(options.folder, "cut")
    with open(cut, "wb") as file:
        file.write(data[: len(data) // 2])
    less, said = harness.replay(options, [cut], ["--connections"])
    must("cut short" in said and set(less) < set(some), f"{len(less)} lines of a half: {said}")
    must(harness.diagnose(options, cut)[1]["lost"] > 0, "a diagnosis of a half counts nothing as missing")
    with open(cut, "rb") as file:
        must(harness.replay(options, ["-"], ["--connections"], stdin=file)[0] == less, "standard input gives something else")
    broken = bytearray(data)
    broken[len(data) // 2] ^= 0xFF
    with open(cut, "wb") as file:
        file.write(broken)
    less, said = harness.replay(options, [cut], ["--connections"])
    must("damaged lines" in said and less, said)

    foreign = os.path.join(options.folder, "foreign")
    with open(foreign, "w", encoding="ascii") as file:
        file.write("milk, bread\n")
    twice = os.path.join(options.folder, "twice")
    shutil.copy(path, twice)
    refusals = [
        (["run", "--replay", path, twice], "the same part"),
        (["run", "--replay", path, "--output", path], "one of the files that are read"),
        (["run", "--record", "-", "--output", "-"], "are the same"),
        (["run", "--record", cut, "--output", cut], "are the same"),
        (["run", "--rotate", "1M"], "--record"),
        (["run", "--keep", "1"], "--record"),
        (["record", "--output", foreign], "name another file"),
        (["run", "--replay", os.path.join(options.folder, "nothing")], "No such file"),
        (["run", "--replay", "/dev/null"], "is empty"),
        (["run", "--replay", "-", "-"], "name it once"),
        (["run", "--replay", finrace.path], "is JSON: "),
        (["diagnose", os.path.join(harness.ROOT, "README.md")], "is no recording"),
        (["run", "--replay", path, "--record", cut], "--record"),
        (["run", "--replay", path, "--backend", "cgroup"], "--backend"),
        (["run", "--replay", f"{path}.1", "--output", "/dev/full"], "No space left"),  # the newest part may have just begun
        (["diagnose", "30s"], "to watch for so long: --for 30s"),
        (["diagnose", "--for", "5s", path], "leave it out where files are read"),
        (["diagnose", "10.0.0.5:8000"], "--upstream 10.0.0.5:8000"),
        (["record"], "--output"),
        (["record", "--output", os.path.join(options.folder, "nothing", "x")], "No such file"),
        (["record", "--output", cut, "--rotate", "1k"], "'1k' is too small"),
        (["record", "--output", cut, "--keep", "-1"], "--keep"),
    ]
    for arguments, words in refusals:
        done = run_finrace(options, arguments)
        must(done.returncode == 2 and words in done.stderr, f"{arguments}: exit {done.returncode}, {done.stderr}")


# What check_page must find.
PAGE_DEFECTS = [
    ("<main>", "<main><script>1</script>"), ("<main>", "<main><img src='http://192.0.2.1/'>"), ("</svg>", ""),
    ("<main>", "<main><p onclick='1'></p>"), ("Content-Security-Policy", "Content-Policy"), ("<main>", "<main><a href='http://a/'>a</a>"),
    ("color-scheme: light dark", "background: url(a)"), ("--soft: #535e6a", "--soft: #939eaa"), ("<desc", "<text"),
    ("class=\"finding\"", "class=\"lost\""), ("upstream_closed</code>", "closed</code>"), ("<h2>", "<h1>"), ("</html>", "&lt;<b"),
]


def test_page(options):
    """diagnose --html: a page that is whole or not there, told before the watching if it can't be; a signal ends that alone."""
    folder = os.path.join(options.folder, "pages")
    os.makedirs(os.path.join(folder, "folder"))
    page, recording = os.path.join(folder, "page.html"), os.path.join(options.folder, "for-a-page")
    name = "<b>\"&'</script>"[:15]
    with network() as net, Finrace(options, "--record", recording) as finrace:
        listener = listen(net)
        with renamed(name):
            unanswered(net, listener)
            finrace.wait_verdicts(net, 1)
        finrace.stop()
    _, report, _ = harness.diagnose(options, recording)
    must(len(report["findings"]) == 1, f"{report}")

    with open(page, "w", encoding="ascii") as file:
        file.write("<!DOCTYPE html>old")
    os.chmod(page, 0o644)
    link = os.path.join(folder, "link")
    os.symlink(page, link)
    before = sorted(os.listdir(folder))
    refusals = [
        ("-", "name a file"), ("", "name a file"), (link, "is a symbolic link"), ("/dev/null", "is no plain file"),
        (recording, "holds no page"), (os.path.join(folder, "folder"), "is a directory"), (os.path.join(folder, "nothing", "x"), "No such file"),
    ]
    for path, words in refusals:  # at once, not after an hour
        done = run_finrace(options, ["diagnose", *options.backend_flags, "--for", "1h", "--html", path])
        must(done.returncode == 2 and words in done.stderr and not done.stdout, f"{path}: exit {done.returncode}, {done.stderr}")
    must(stat.S_ISCHR(os.stat("/dev/null").st_mode) and read_file(page) == b"<!DOCTYPE html>old", "what was there is not as it was")
    must(sorted(os.listdir(folder)) == before, f"left behind: {os.listdir(folder)}")

    done = run_finrace(options, ["diagnose", recording, "--html", page])
    text = read_file(page).decode("utf-8")
    must(done.returncode == 1 and "upstream_closed" in done.stdout and text.endswith("</html>\n"), f"exit {done.returncode}: {done.stderr}")
    must(os.stat(page).st_mode & 0o777 == 0o600, "others can read the page")
    must("&lt;b&gt;&quot;&amp;&#39;&lt;" in text and not harness.check_page.complaints(text, report), "a name got into the page")
    must(sorted(os.listdir(folder)) == before, f"left behind: {os.listdir(folder)}")

    for sound, broken in PAGE_DEFECTS:
        must(sound in text and harness.check_page.complaints(text.replace(sound, broken, 1), report), f"{broken!r} is not found")

    with subprocess.Popen([options.finrace, "diagnose", *options.backend_flags, "--for", "1h", "--html", page],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as watching:
        while "ready" not in (line := watching.stderr.readline()):
            must(line, "it never became ready")
        must(read_file(page).decode("utf-8") == text, "the page changed before its time")
        watching.send_signal(signal.SIGINT)
        must(watching.wait(LIMIT) in (0, 1, 3), f"exit {watching.returncode}")
    must(not harness.check_page.complaints(read_file(page).decode("utf-8")) and read_file(page).decode("utf-8") != text,
         "no page of what was seen until the signal")

    full = os.path.join(folder, "folder")
    checked(libc.mount(b"none", full.encode(), b"tmpfs", 0, b"size=4k"), "mount tmpfs")
    done = run_finrace(options, ["diagnose", recording, "--html", os.path.join(full, "page.html")])
    must(done.returncode == 2 and "No space left" in done.stderr and "upstream_closed" in done.stdout, f"exit {done.returncode}: {done.stderr}")
    must(not os.listdir(full), f"left behind: {os.listdir(full)}")


def test_filter_that_nothing_matches(options):
    """diagnose with a filter beside the traffic: says so, and what there is; of a recording as well, where no more comes."""
    recording = os.path.join(options.folder, "elsewhere")
    with network() as net, Finrace(options, "--record", recording) as finrace:
        listener = listen(net)
        ends = [healthy(net, listener) for _ in range(3)]
        unanswered(net, listener)
        finrace.wait_verdicts(net, 1)
        finrace.stop()
    address, port = ends[0][2:]
    beside = ["--upstream", "192.0.2.1", "--side", "client"]
    status, report, _ = harness.diagnose(options, recording, *beside)
    must(status == 3 and report["state"] == "inconclusive" and report["filter"] == " ".join(beside), f"{report}")
    seen = [one["connections"] for one in report["elsewhere"] if (one["address"], one["port"]) == (address, port)]
    must(seen == [4], f"{address}:{port} is not in {report['elsewhere']}")
    text = " ".join(run_finrace(options, ["diagnose", recording, *beside]).stdout.split())
    must("matched --upstream 192.0.2.1 --side client; choose among" in text and "Seen: " in text and "longer" not in text, text)
    _, report, _ = harness.diagnose(options, recording, "--upstream", f":{port}")
    mine = [one["connections"] for one in report["upstreams"] if (one["address"], one["port"]) == (address, port)]
    must(mine == [4] and all(one["port"] == port for one in report["upstreams"]), f"a port alone: {report}")


def test_recording_lives_on(options):
    """The disk is full, the reader leaves: what could not be written is counted, and the recorder goes on or ends as it should."""
    command = [options.finrace, "record", *options.backend_flags, *options.unconfined, "--for", "1s"]
    full = subprocess.run([*command, "--output", "/dev/full"], capture_output=True, text=True, timeout=LIMIT)
    must(full.returncode == 0 and "No space left" in full.stderr and "lines of the recording are missing" in full.stderr,
         f"exit {full.returncode}: {full.stderr}")
    recorder = subprocess.Popen([*command[:-2], "--output", "-"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    must(recorder.stdout.read(18) == b"finrace-recording ", "what else comes out of it?")
    recorder.stdout.close()
    must(recorder.wait(LIMIT) == 0, "it did not end when its reader had left")

    path = os.path.join(options.folder, "lives-on")
    with network() as net, Finrace(options, "--record", path) as finrace:
        listener = listen(net)
        unanswered(net, listener)
        finrace.wait_verdicts(net, 1)
        os.rename(path, f"{path}.moved")
        wait_for(lambda: os.path.exists(path), "a new file in the moved one's place")
        unanswered(net, listener)
        finrace.wait_verdicts(net, 2)
        finrace.stop()
    harness.check_replay(finrace, [path, f"{path}.moved"])
    # Whoever reads a replay may leave.
    reader = subprocess.Popen([options.finrace, "run", "--replay", path, f"{path}.moved"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reader.stdout.close()
    must(reader.wait(LIMIT) == 0, "a replay whose reader left did not end with 0")
    reader.stderr.close()


def test_recorder_through_a_pipe(options):
    """Under load, through a pipe: it is read as fast as it comes, and nothing is missing."""
    recorder = subprocess.Popen([options.finrace, "record", *options.backend_flags, *options.unconfined, "--output", "-"], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, preexec_fn=Finrace.enter_host)
    path = os.path.join(options.folder, "piped")
    with network() as net, open(path, "wb") as file:
        said = []

        def listen_to():
            for line in recorder.stderr:
                said.append(line)
                if b"ready" in line:
                    ready.set()

        ready = threading.Event()
        threads = [threading.Thread(target=shutil.copyfileobj, args=(recorder.stdout, file)), threading.Thread(target=listen_to)]
        for thread in threads:
            thread.start()
        must(ready.wait(harness.READY_LIMIT), lambda: f"the recorder did not start: {said}")
        listener = listen(net)
        for _ in range(20):
            healthy(net, listener, 100)
            unanswered(net, listener)
        recorder.send_signal(signal.SIGTERM)
        must(recorder.wait(LIMIT) == 0, "the recorder did not end with 0")
        for thread in threads:
            thread.join(LIMIT)
    lines, warned = harness.replay(options, [path])
    must("missing" not in warned and b"missing" not in b"".join(said), f"{warned} {said}")
    verdicts = [line for line in lines if b"finrace.verdict" in line[:120] and net.prefix in line.decode("utf-8", "replace")]
    must(len(verdicts) >= 20, f"{len(verdicts)} verdicts of 20")


def read_file(path):
    with open(path, "rb") as file:
        return file.read()


def test_two_at_once(options):
    """Two of them side by side see the same."""
    with network() as net, Finrace(options, "--connections") as one, Finrace(options, "--connections") as two:
        listener = listen(net)
        due = set()
        for _ in range(options.storm // 30):
            due |= {unanswered(net, listener), stale(net, listener)}
            healthy(net, listener, 2)
        views = []
        for finrace in (one, two):
            finrace.wait_verdicts(net, len(due))
            finrace.wait_connections(net, len(due) * 3)
            finrace.stop()
            views.append((
                sorted((found.ends, found.verdict, found.at("finrace.connection.exchange"), found.at("finrace.response.bytes"))
                       for found in finrace.verdicts(net)),
                sorted((found.ends, found.at("finrace.side"), found.at("finrace.connection.exchanges"),
                        found.at("finrace.connection.bytes_sent"), found.at("finrace.connection.bytes_received"))
                       for found in finrace.connections(net)),
            ))
        must({ends for ends, *_ in views[0][0]} == due and len(views[0][0]) == len(due), "not the verdicts that were due")
        must(views[0][0] == views[1][0], f"verdicts differ: {set(views[0][0]) ^ set(views[1][0])}")
        must(views[0][1] == views[1][1], f"connections differ: {set(views[0][1]) ^ set(views[1][1])}")


# ---- sends ---------------------------------------------------------------------------------------------------------------


def run_send_calls(options, results):
    """Two exchanges by each system call and address family; one result for each."""
    names = [(call, family) for call in send_calls.CALLS for family in ("4", "6", "mapped")
             if results.wanted(f"sends by {call}, {family}")]
    if not names:
        return
    pairs = {}
    refused = {}
    sizes = (100, 2000)
    with network() as net, Finrace(options, "--connections") as finrace:
        listeners = {family: listen(net, family) for family in ("4", "6", "mapped")}
        for call, family in names:
            pair = Pair(net, listeners[family], family)
            try:
                for size in sizes:
                    send_calls.CALLS[call](pair.client, b"x" * size)
                    pair.serve(size, RESPONSE)
                pairs[call, family] = pair
            except OSError as error:
                refused[call, family] = error
            pair.client.close()
            must(call in str(refused) or pair.server.recv(1) == b"", "the client sent more")
            pair.server.close()
        finrace.wait_connections(net, 2 * len(pairs))
        finrace.stop()
        harness.check_schema(finrace)
        records = {(one.ends, one.client): one for one in finrace.connections(net)}

    def judge(call, family):
        error = refused.get((call, family))
        if error is not None:
            # The kernel's own refusal is no failure of finrace, but it must not pass for a test that ran.
            must("io_uring" in call and error.errno in (errno.ENOSYS, errno.EPERM), f"{call}: {error}")
            raise harness.Skipped(f"this kernel refuses {call} ({error})")
        ends = pairs[call, family].ends
        for client in (True, False):
            one = records.get((ends, client))
            must(one is not None, f"no record of the {'client' if client else 'server'}'s end")
            sent, received = sum(sizes), 2 * len(RESPONSE)
            due = (2, sent, received) if client else (2, received, sent)
            said = tuple(one.at(f"finrace.connection.{name}") for name in ("exchanges", "bytes_sent", "bytes_received"))
            must(said == due, f"{'client' if client else 'server'}: exchanges, bytes sent and received {said}, not {due}")
            must(one.at("network.type") == ("ipv6" if family == "6" else "ipv4"), f"network.type {one.at('network.type')}")
            must(one.at("finrace.close.by") == ("local" if client else "peer"), f"closed by {one.at('finrace.close.by')}")

    for call, family in names:
        results.run(f"sends by {call}, {family}", judge, call, family)


# ---- how connections end --------------------------------------------------------------------------------------------------

LINGER_ZERO = struct.pack("ii", 1, 0)


def end_by_fin(closer, other):
    closer.close()
    must(other.recv(1) == b"", "no end of stream")
    other.close()


def end_by_linger(closer, other):
    closer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
    closer.close()
    expect_reset(other)
    other.close()


def end_by_unread(closer, other):
    other.sendall(REQUEST)
    wait_for(lambda: unread(closer) == len(REQUEST), "the bytes' arrival")
    closer.close()
    expect_reset(other)
    other.close()


def end_by_half_close(closer, other):
    closer.shutdown(socket.SHUT_WR)
    must(other.recv(1) == b"", "no end of stream")
    other.sendall(b"late")
    read_all(closer, 4)
    other.close()
    must(closer.recv(1) == b"", "no end of stream")
    closer.close()


ENDINGS = {end_by_fin: "fin", end_by_linger: "reset", end_by_unread: "reset", end_by_half_close: "fin"}


def test_who_closed_and_how(options):
    """Each way to end a connection, from either side, IPv4 and IPv6: both ends' records say who was first, and how."""
    with network() as net, Finrace(options, "--connections") as finrace:
        due = {}
        for family in ("4", "6"):
            listener = listen(net, family)
            for ending, how in ENDINGS.items():
                for client_first in (True, False):
                    pair = Pair(net, listener, family)
                    pair.exchange()
                    ending(*((pair.client, pair.server) if client_first else (pair.server, pair.client)))
                    for client in (True, False):
                        due[pair.ends, client] = ("local" if client == client_first else "peer", how, ending.__name__)
        finrace.wait_connections(net, len(due))
        finrace.stop()
        harness.check_schema(finrace)
        found = {(one.ends, one.client): one for one in finrace.connections(net)}
        must(len(found) == len(finrace.connections(net)), "two records of one end")
        wrong = []
        for key, (by, how, name) in due.items():
            one = found.get(key)
            said = one and (one.at("finrace.close.by"), one.at("finrace.close.how"))
            if said != (by, how):
                wrong.append(f"{name}, {'client' if key[1] else 'server'}'s record: {said}, not {(by, how)}: {json.dumps(one)}")
        must(not wrong, lambda: f"{len(wrong)} of {len(due)} wrong:\n          " + "\n          ".join(wrong[:6]))


def close_together(net, listener, count):
    """So many connections in use whose ends, a process and a CPU each, close within microseconds of each other."""
    turns = mmap.mmap(-1, 16)

    def turn(who):
        return struct.unpack_from("=Q", turns, 8 * who)[0]

    def ready(who, number):
        struct.pack_into("=Q", turns, 8 * who, number)
        while turn(1 - who) < number:
            pass

    cpus = sorted(os.sched_getaffinity(0))
    server = os.fork()
    if server == 0:
        try:
            harness.die_with_parent()
            os.sched_setaffinity(0, cpus[-1:])
            for number in range(1, count + 1):
                end = listener.accept()[0]
                for _ in range(2):
                    read_all(end, len(REQUEST))
                    end.sendall(RESPONSE)
                ready(1, number)
                end.close()
        finally:
            os._exit(0)
    os.sched_setaffinity(0, cpus[:1])
    try:
        for number in range(1, count + 1):
            end = socket.create_connection(listener.getsockname()[:2])
            for _ in range(2):
                end.sendall(REQUEST)
                read_all(end, len(RESPONSE))
            ready(0, number)
            for _ in range(random.randrange(400)):
                pass
            end.close()
    finally:
        os.sched_setaffinity(0, cpus)
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def test_closes_that_meet(options):
    """Both ends close at once, so that a FIN leaves on one CPU as the other's is looked at on another: nothing is wrong with that."""
    must(len(os.sched_getaffinity(0)) > 1, "this takes two CPUs")
    count = options.many * 2 // (50 if options.sanitized else 5)  # the programs in the kernel have no sanitizers
    with network() as net, Finrace(options) as finrace:
        listener = listen(net)
        close_together(net, listener, count)
        due = unanswered(net, listener)
        finrace.wait_verdicts(net, 1)
        finrace.next_health()
        found = finrace.verdicts(net)
        must([one.ends for one in found] == [due], lambda: f"{len(found) - 1} verdicts on {count} healthy connections: {found[0]}")


def test_requests_in_use(options):
    """Requests on connections that are open still are in the report, though no event has told of them; what waits for an
    answer does not rest, though its request followed the answer before at once."""
    with network() as net:
        diagnosis = harness.Diagnosis(options, *options.backend_flags, "--upstream", net.address(), "--for", "1h",
                                      preexec_fn=Finrace.enter_host)
        diagnosis.wait_ready()
        listener = listen(net)
        pairs = [Pair(net, listener) for _ in range(2)]
        for pair in pairs:
            for _ in range(3):
                pair.exchange()
                time.sleep(0.05)  # a tick of any kernel's: each is a request of its own
        waits = Pair(net, listener)
        waits.exchange()
        waits.client.sendall(REQUEST)
        time.sleep(0.05)
        _, report, _ = diagnosis.end(signal.SIGINT)
        for pair in [*pairs, waits]:
            pair.close()
    pools = [one for one in report["upstreams"] if one.get("address") == net.address()]
    must(len(pools) == 1 and pools[0]["requests"] == 0, f"{report['upstreams']}")
    resting = pools[0]["resting"]["connections"]
    if options.backend == "trace" and "in_use" not in pools[0]:
        # By kprobe, and on 5.10, the accounting is in no socket's storage: times alone tell, to a tick.
        must(resting in (2, 3), f"{pools[0]}")
    else:
        must(resting == 2 and pools[0]["in_use"] == {"connections": 3, "requests": 8}, f"{pools[0]}")


def test_rest_at_close(options):
    """How long a connection had rested when this host closed it counts from the answer, however late that was."""
    late, rest = 0.6, 0.2
    with network() as net:
        diagnosis = harness.Diagnosis(options, *options.backend_flags, "--upstream", net.address(), "--for", "1h",
                                      preexec_fn=Finrace.enter_host)
        diagnosis.wait_ready()
        listener = listen(net)
        rested, servers = [], []
        for _ in range(10):
            pair = Pair(net, listener)
            servers.append(pair.server)  # which do not close
            pair.client.sendall(REQUEST)
            time.sleep(late)
            pair.serve(len(REQUEST), RESPONSE)
            answered = time.monotonic()
            time.sleep(rest)
            pair.client.close()
            rested.append(time.monotonic() - answered)
        _, report, _ = diagnosis.end(signal.SIGINT)
        for server in servers:
            server.close()
    limits = [pool["own_idle_limit"]["ms"] for pool in report["upstreams"] if "own_idle_limit" in pool]
    must(len(limits) == 1, f"{limits} of {report['upstreams']}")
    must(limits[0] < (max(rested) + late / 2) * 1000, f"{limits[0]} ms, of rests up to {max(rested) * 1000:.0f} ms")


# ---- where records go ----------------------------------------------------------------------------------------------------


def test_moved_sockets(options):
    """A connection that one process opens and another uses: a forked one, or one that was handed it (SCM_RIGHTS).

    The exchange's end is judged as ever; the process named is the one that opened the connection.
    """
    with network() as net, Finrace(options) as finrace:
        inherited, handed = Pair(net), Pair(net)
        for pair in (inherited, handed):
            pair.exchange()

        def use_inherited():
            inherited.client.sendall(REQUEST)

        here, there = socket.socketpair()
        socket.send_fds(here, [b"x"], [handed.client.fileno()])

        def use_handed():
            handed.client.close()
            _, descriptors, _, _ = socket.recv_fds(there, 1, 1)
            with socket.socket(fileno=descriptors[0]) as moved:
                moved.sendall(REQUEST)

        for pair, use in ((inherited, use_inherited), (handed, use_handed)):
            with in_child(use):
                read_all(pair.server, len(REQUEST))
            pair.server.close()
            must(pair.client.recv(1) == b"", "the client read a byte")
        finrace.wait_verdicts(net, 2)
        finrace.stop()
        found = {one.ends: one for one in finrace.verdicts(net)}
        must(set(found) == {inherited.ends, handed.ends}, lambda: f"verdicts: {[one.verdict for one in found.values()]}")
        for one in found.values():
            # trace may see the server's end as well: not if it answered and was asked anew within a tick.
            must(one.at("finrace.cause") == "upstream_closed", one.verdict)
            must(one.at("finrace.connection.exchange") == 2, lambda: f"{json.dumps(one)}")
            must(one.at("finrace.request.bytes") == len(REQUEST), lambda: f"{json.dumps(one)}")
            must(one.at("process.pid") in (None, os.getpid()), lambda: f"not the process that opened it: {json.dumps(one)}")
            must(one.at("process.pid") or options.backend == "cgroup", "no process")


def test_slow_reader(options):
    """A pipe that nobody reads does not stall it: what finds no room is dropped and counted, nothing is lost in the kernel."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, 1031, 4096)  # F_SETPIPE_SZ
    # Two records a connection, about 1 kB each: more than the 8 MiB that finrace keeps.
    count = 6000 if not options.small else 600
    with network() as net:
        listener = listen(net)
        with Finrace(options, "--connections", interval="100ms", output=writer) as finrace:
            os.close(writer)
            for number in range(count):
                healthy(net, listener)
                if number % 1000 == 999:  # the ring holds their events, however slow it is
                    finrace.wait_settled()
            finrace.wait_settled()
            must(finrace.alive(), lambda: f"ended: {finrace.words()}")
            lines = []

            def drain():
                with os.fdopen(reader, "rb") as file:
                    for line in file:
                        lines.append((time.time(), line.rstrip(b"\n")))

            drainer = threading.Thread(target=drain, daemon=True)
            drainer.start()
            finrace.lines = lines
            finrace.next_health()
            late = unanswered(net, listener)
            wait_for(lambda: any(one.ends == late for one in finrace.verdicts(net)), "a verdict after the pause")
            finrace.stop()
            drainer.join(LIMIT)
            harness.check_schema(finrace)
            last = finrace.health()
            dropped = last.at("finrace.output.dropped")
            records = len(finrace.connections(net))
            must(last.at("finrace.health.losses.ring_full") == 0, f"events were lost: {last.at('finrace.health.losses')}")
            must(options.small or dropped > 0, "nothing was dropped: this test has proved nothing")
            must((dropped == 0) == last.at("finrace.health.complete"), "complete, though records were dropped")
            must(records + dropped >= 2 * count, f"{records} records and {dropped} dropped are less than {2 * count}")
            must(options.small or records < 2 * count + 2, "no record is missing")
            print(f"          {records} connections' records written, {dropped} records dropped")


def test_reader_that_never_comes_back(options):
    """A last summary that nobody reads does not keep it from ending; a reader that has left ends it."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, 1031, 4096)
    with network() as net:
        listener = listen(net)
        with Finrace(options, "--connections", interval="100ms", output=writer) as finrace:
            os.close(writer)
            for _ in range(50):
                healthy(net, listener)
            time.sleep(0.5)
            started = time.monotonic()
            finrace.stop()
            must(time.monotonic() - started < 10, "it took more than 10 s to end")
        os.close(reader)
        reader, writer = os.pipe()
        with Finrace(options, interval="100ms", output=writer) as finrace:
            os.close(writer)
            os.close(reader)
            must(finrace.finished.wait(LIMIT), "it goes on, though nobody can read it")
            must(finrace.process.returncode == 0, lambda: f"exit {finrace.process.returncode}: {finrace.words()}")


@contextmanager
def small_disk(options, *more):
    """A folder on a disk of its own, of 64 kB."""
    folder = os.path.join(options.folder, "disk")
    os.makedirs(folder, exist_ok=True)
    mount("tmpfs", folder, "tmpfs", ",".join(("size=64k", *more)))
    try:
        yield folder
    finally:
        unmount(folder)


def wait_full(finrace):
    wait_for(lambda: any("cannot write records" in text for text in finrace.said), "word of the full disk")
    must(any("No space left" in text for text in finrace.said), finrace.words)


def make_room(finrace, folder):
    mount("tmpfs", folder, "tmpfs", "size=64m", remount=True)
    wait_for(lambda: any("written again" in text for text in finrace.said), "word of the room")


def test_full_disk(options):
    """No room on the disk: it says so, goes on, and writes all that waits once there is room, with no line torn."""
    with small_disk(options) as folder:
        path = os.path.join(folder, "records.jsonl")
        with network() as net:
            listener = listen(net)
            with Finrace(options, "--connections", interval="100ms", output=path) as finrace:
                for _ in range(100):
                    healthy(net, listener)
                wait_full(finrace)
                accident = unanswered(net, listener)
                time.sleep(0.5)
                must(finrace.alive(), lambda: f"ended: {finrace.words()}")
                make_room(finrace, folder)
                finrace.stop()
            with open(path, "rb") as file:
                *finrace.lines, finrace.rest = [(0.0, line) for line in file.read().split(b"\n")]
            must(finrace.rest[1] == b"", "the file ends within a line")
            harness.check_schema(finrace)
            must(len(finrace.connections(net)) == 202, f"{len(finrace.connections(net))} of 202 records")
            must([one.ends for one in finrace.verdicts(net)] == [accident], f"verdicts {finrace.verdicts(net)}")
            must(finrace.health().at("finrace.output.dropped") == 0, "records were dropped")
        done = run_finrace(options, ["run", "--backend", options.backend, "--output", os.path.join(folder, "no", "file")])
        must(done.returncode == 2 and os.path.join(folder, "no") in done.stderr, f"{done.returncode}: {done.stderr}")


def fill_with_torn_line(folder):
    """A file for records on a small disk, which a line that does not end has filled; its path."""
    path = os.path.join(folder, "records.jsonl")
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while file.write(b"torn"):
            pass
    return path


def test_full_disk_at_start(options):
    """A disk that is full, behind a torn line, is no reason not to start: a daemon that died there would stay away."""
    with small_disk(options) as folder:
        path = fill_with_torn_line(folder)
        with network() as net, Finrace(options, interval="100ms", output=path) as finrace:
            wait_full(finrace)
            make_room(finrace, folder)
            accident = unanswered(net, listen(net))
            finrace.stop()
            with open(path, "rb") as file:
                torn, *lines, rest = file.read().split(b"\n")
            must(set(torn) == set(b"torn") and rest == b"", f"{torn[-20:]} ... {rest}")
            finrace.lines = [(0.0, line) for line in lines]
            harness.check_schema(finrace)
            must([one.ends for one in finrace.verdicts(net)] == [accident], f"verdicts {finrace.verdicts(net)}")


def test_full_disk_all_along(options):
    """A disk that is full from start to end, behind a torn line: what it has not taken is counted to the record."""
    with small_disk(options) as folder:
        path = fill_with_torn_line(folder)
        with Finrace(options, "--output", path, interval="100ms") as finrace:
            wait_full(finrace)
            finrace.next_health()
            finrace.stop()
            due = f"{len(finrace.lines)} records were dropped: {path} did not take them"
            must(any(text.endswith(due) for text in finrace.said), lambda: f"not {due!r}: {finrace.words()}")


def mount(source, target, kind, data, remount=False):
    flags = 32 if remount else 0  # MS_REMOUNT
    checked(libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()), f"mount {target}")


def unmount(target):
    checked(libc.umount2(target.encode(), 2), f"umount {target}")  # MNT_DETACH


# ---- a service -----------------------------------------------------------------------------------------------------------

KEPT = {"CAP_DAC_OVERRIDE"}  # for a file that was rotated into another user's hands
BPF_FOR_ALL = (5, 19)  # since then the counters can be read without CAP_BPF, whatever kernel.unprivileged_bpf_disabled says


def call_in(finrace, calls):
    """What these C calls return in that process, which gdb stops for a moment, and errno after each. They are this test's, the refusals the
    kernel's: nothing of finrace has a say in them. libc's symbols will do: debug information takes an emulated machine minutes."""
    gdb = harness.need("gdb", "gdb")
    command = [gdb, "-nx", "--readnever", "-batch", "-iex", "set sysroot /", "-iex", "set auto-load off", "-p", str(finrace.process.pid)]
    for call in calls:
        command += ["-ex", f"print {call}", "-ex", "print *(int *)__errno_location()"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT * 3)
    values = [int(value) for value in re.findall(r"^\$\d+ = (-?\d+)$", done.stdout, re.M)]
    must(len(values) == 2 * len(calls), lambda: f"{len(values)} of {len(calls)} calls: {done.stdout[-2000:]} {done.stderr[-2000:]}")
    return list(zip(values[::2], values[1::2]))


def test_confinement(options):
    """Once it watches, it has no file but its outputs, hardly a capability, and no system call that would get it more."""
    folder = os.path.join(options.folder, "confined")
    for name in ("records", "links"):
        os.makedirs(os.path.join(folder, name))
    path = os.path.join(folder, "records", "records.jsonl")
    link = os.path.join(folder, "links", "records.jsonl")  # followed now, and still as the file is opened anew
    os.symlink(path, link)
    kernel = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    kept = KEPT | (set() if kernel >= BPF_FOR_ALL else {"CAP_BPF"})
    with network() as net, Finrace(options, interval="100ms", output=link) as finrace:
        listener = listen(net)
        due = [unanswered(net, listener)]
        wait_for(lambda: b"finrace.health" in read_file(path), "a summary")
        *lines, _ = read_file(path).split(b"\n")
        told = next(json.loads(line)["finrace"]["health"]["confinement"] for line in lines if b"finrace.health" in line)
        told["capabilities"] = set(told["capabilities"])
        must(told == {"files": True, "system_calls": True, "capabilities": kept}, f"it says {told}")
        with open(f"/proc/{finrace.process.pid}/status", encoding="ascii") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file)
        for name, bits in (("CapInh", 0), ("CapBnd", 0), ("CapAmb", 0)):
            must(int(status[name], 16) == bits, f"{name} is {status[name]}")
        must(int(status["CapPrm"], 16).bit_count() == len(kept), f"CapPrm is {status['CapPrm']}")
        must(status["NoNewPrivs"] == "1" and status["Seccomp"] == "2", f"NoNewPrivs {status['NoNewPrivs']}, Seccomp {status['Seccomp']}")
        threads = os.listdir(f"/proc/{finrace.process.pid}/task")
        must(len(threads) == 2, f"{len(threads)} threads")
        for thread in threads:
            with open(f"/proc/{finrace.process.pid}/task/{thread}/status", encoding="ascii") as file:
                other_status = dict(line.rstrip("\n").split(":\t", 1) for line in file)
            differ = [name for name in status if (name.startswith("Cap") or name in ("NoNewPrivs", "Seccomp")) and status[name] != other_status[name]]
            must(not differ, f"thread {thread} differs in {differ}")

        # Of root's processes one that has no more capabilities than finrace, so that ptrace(2)'s rules keep it from nothing.
        setpriv = harness.need("setpriv", "util-linux")
        other = subprocess.Popen([setpriv, "--inh-caps=-all", "--bounding-set=-all", "sleep", "600"], preexec_fn=harness.die_with_parent)
        wait_for(lambda: read_file(f"/proc/{other.pid}/comm") == b"sleep\n", "a process without capabilities")
        create = os.O_WRONLY | os.O_CREAT
        granted = [f'(int)open("{folder}/records/other", {create}, 0600)', '(int)open("/proc/1/comm", 0)']
        refused = [
            f'(int)open("{folder}/intruder", {create}, 0600)', f'(int)open("/etc/finrace-intruder", {create}, 0600)',
            f'(int)open("/tmp/finrace-intruder", {create}, 0600)', '(int)open("/etc/passwd", 0)', f'(int)open("{options.finrace}", 0)',
            '(int)open("/proc/sys/kernel/core_pattern", 0)',
        ]
        if libc.syscall(444, None, 0, 1) > 0:  # landlock_create_ruleset(): its version
            refused += [f'(int)open("/proc/{other.pid}/{name}", 0)' for name in ("root/etc/passwd", "cwd")]
        else:
            must(kernel < (6, 1) or not os.uname().release.endswith("-amd64"), "Debian's kernel has Landlock")
            print(f"          {os.uname().release} has no Landlock: the files of root's processes without capabilities stay in reach")
        # None of these needs a capability.
        filtered = [
            "(int)socket(2, 1, 0)", "(int)socket(1, 2, 0)", "(int)fork()", '(int)execve("/nothing", 0, 0)', "(int)setuid(0)",
            "(int)kill(1, 0)", "(int)tgkill(1, 1, 0)", f"(int)prlimit({other.pid}, 7, 0, 0)", "(int)fcntl(2, 8, 1)",
            '(int)sendto(2, "", 0, 0, "xxxxxxxxxxxxxxxx", 16)', "(int)unshare(0x200)", "(int)syscall(-1)", '(int)memfd_create("", 0)',
            "(int)mprotect((long)$sp & ~4095, 4096, 7)", "(int)(long)mmap(0, 4096, 5, 34, -1, 0)", "(int)ptrace(0, 0, 0, 0)",
        ]
        if os.uname().machine == "x86_64":
            filtered += ["(int)syscall(321, 2, 0, 0)", "(int)syscall(321, 4, 0, 0)"]  # bpf(): update, next key
        values = call_in(finrace, granted + refused + filtered)
        other.kill()
        other.wait()
        wrong = [f"{call} = {value}, errno {error}" for index, (call, (value, error)) in
                 enumerate(zip(granted + refused + filtered, values))
                 if (value < 0 if index < len(granted) else value != -1 or
                     error not in ((errno.ENOENT, errno.EROFS, errno.EACCES) if index < len(granted + refused) else (errno.EPERM,)))]
        must(not wrong, "; ".join(wrong))

        os.rename(path, path + ".1")
        with open(path, "wb"):
            os.chmod(path, 0o600)
            os.chown(path, 65534, 65534)
        finrace.send(signal.SIGHUP)
        wait_for(lambda: any("is opened anew" in text for text in finrace.said), finrace.words)
        due.append(unanswered(net, listener))
        wait_for(lambda: b"finrace.verdict" in read_file(path), "a verdict in the new file")
        finrace.stop()
        must(not any("warning" in text for text in finrace.said), finrace.words)
        finrace.lines = [(0.0, line) for line in (read_file(path + ".1") + read_file(path)).splitlines()]
        must([one.ends for one in finrace.verdicts(net)] == due, f"{finrace.verdicts(net)}")
    # Who answers whoever connects still connects to nobody, and listens nowhere else.
    with network() as net, Finrace(options, "--metrics", str(free_port(net)), interval="100ms") as finrace:
        filtered = ["(int)socket(2, 1, 0)", "(int)socket(1, 1, 0)", "((int (*)(int, void *, int))connect)(0, 0, 0)", "(int)bind(0, 0, 0)", "(int)listen(0, 1)",
                    "(int)setsockopt(0, 1, 2, 0, 0)", "(int)sendmsg(0, 0, 0x20000000)", '(int)sendto(2, "", 0, 0, "xxxxxxxxxxxxxxxx", 16)',
                    "(int)fork()"]
        values = call_in(finrace, filtered)
        wrong = [f"{call} = {value}, errno {error}" for call, (value, error) in zip(filtered, values) if value != -1 or error != errno.EPERM]
        must(not wrong, "; ".join(wrong))
        finrace.stop()
    with network() as net, Finrace(options, "--unconfined", interval="100ms") as finrace:
        wait_for(lambda: finrace.records("finrace.health"), "a summary")
        must(finrace.health().at("finrace.health.confinement") is None, f"{finrace.health()}")
        finrace.stop()


def notified(options, address):
    """One run under a service manager that listens at `address`."""
    output = os.path.join(options.folder, "notified.jsonl")
    environment = {"NOTIFY_SOCKET": address.replace("\0", "@"), "WATCHDOG_USEC": "500000"}
    signs_of_life = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(harness.READY_LIMIT)

        def wait_told(*wanted):
            """The next message that has these lines; signs of life and of its state may come before."""
            nonlocal signs_of_life
            while True:
                lines = manager.recv(4096).decode().split("\n")
                signs_of_life += lines[0] == "WATCHDOG=1"
                if all(any(line.startswith(word) for line in lines) for word in wanted):
                    return
                must(lines[0] == "WATCHDOG=1" or lines[0].startswith("STATUS="), f"{lines} before {wanted}")

        began = time.monotonic()
        # Bound by now: an abstract name belongs to a network namespace, and finrace runs in the host's.
        with network() as net, Finrace(options, interval="20ms", output=output, wait=False, environment=environment) as finrace:
            first = manager.recv(4096).decode().split("\n")
            must(first[0] == "READY=1" and first[1].startswith("STATUS=backend "), f"first {first}")
            due = unanswered(net, listen(net))
            wait_for(lambda: str(due[1]).encode() in read_file(output), "the verdict on what came once it was ready")
            manager.settimeout(LIMIT)
            for _ in range(6):
                wait_told("WATCHDOG=1")
            wait_told("STATUS=backend ")
            # Half the manager's patience lies between two of them. What waited in the socket counts from the start: however
            # late this test reads, no more can have been sent than that time allows.
            must(signs_of_life <= 1 + (time.monotonic() - began) / 0.25, f"alive {signs_of_life} times: more often than it should")
            finrace.send(signal.SIGHUP)
            wait_told("RELOADING=1", "MONOTONIC_USEC=")
            wait_told("READY=1")
            finrace.send(signal.SIGTERM)
            wait_told("STOPPING=1")
            finrace.wait_end()


def test_service_manager(options):
    """systemd's side of sd_notify(3): ready once it watches, alive as long as its loop turns, reloads and its end told of."""
    path = os.path.join(options.folder, "notify")
    for address in (path, "\0" + path):
        notified(options, address)
    for address in ("", "nowhere", os.path.join(options.folder, "nobody"), "/" + 120 * "x"):
        done = run_finrace(options, ["run", *options.backend_flags], prefix=["env", f"NOTIFY_SOCKET={address}"])
        must(done.returncode == 2 and f"NOTIFY_SOCKET={address}:" in done.stderr, f"{address!r}: {done.returncode} {done.stderr}")


# ---- refusals ------------------------------------------------------------------------------------------------------------


def run_finrace(options, arguments, prefix=(), program=None):
    return subprocess.run([*prefix, program or options.finrace, *arguments], capture_output=True, text=True, errors="replace",
                          stdin=subprocess.DEVNULL, timeout=harness.READY_LIMIT)


def doctor_says(options, prefix=(), program=None, status=0):
    done = run_finrace(options, ["doctor", "--json"], prefix, program)
    must(done.returncode == status and done.stdout.startswith("{"), f"doctor: {done}")
    return json.loads(done.stdout)


REFUSALS = [
    ([], ["see finrace --help"]),
    (["nosuch"], ["nosuch"]),
    (["run", "--nosuch"], ["--nosuch"]),
    (["run", "--backend", "bogus"], ["--backend", "'bogus'", "trace", "cgroup", "auto"]),
    (["run", "--attach", "bogus"], ["--attach", "'bogus'", "fentry", "kprobe"]),
    (["run", "--backend", "cgroup", "--attach", "fentry"], ["--attach"]),
    (["run", "--interval", "5"], ["--interval", "'5'", "unit"]),
    (["run", "--interval", "soon"], ["--interval", "'soon'", "250ms"]),
    (["run", "--interval", "0s"], ["--interval", "'0s'"]),
    (["run", "--interval", "-1s"], ["--interval", "-1s"]),
    (["run", "--ring-bytes", "7"], ["--ring-bytes", "'7'", "4k"]),
    (["run", "--max-connections", "7"], ["--max-connections", "7", "64", "16777216"]),
    (["run", "--ring-bytes", "lots"], ["--ring-bytes", "'lots'"]),
    (["run", "--upstream", "300.1.2.3"], ["--upstream", "300.1.2.3", "accepted"]),
    (["run", "--upstream", "http://10.0.0.5:8000/"], ["--upstream", "write 10.0.0.5:8000", "accepted", ":8080"]),
    (["run", "--upstream", "app.example:80"], ["--upstream", "app.example", "no names", "getent"]),
    (["run", "--upstream", "10.0.0.0/40"], ["--upstream", "10.0.0.0/40", "32"]),
    (["run", "--upstream", "10.0.0.1:99999"], ["--upstream", "10.0.0.1:99999", "65535"]),
    (["run", "--process", ""], ["--process"]),
    (["run", "--process", "a-name-that-is-too-long"], ["--process", "a-name-that-is-too-long", "15"]),
    (["run", "--process", "0"], ["--process", "'0'"]),
    (["run", "--output"], ["--output"]),
    (["run", "--config", "/nowhere"], ["--config /nowhere", "No such file"]),
    (["run", "--config", ""], ["--config", "No such file"]),
    (["run", "--config", "/dev/zero"], ["--config /dev/zero", "too large"]),
    (["run", "--config", "/etc/passwd"], ["/etc/passwd:1"]),
    (["run", "--check-config"], ["--check-config", "--config"]),
    (["run", "extra"], ["extra"]),
    (["watch", "--upstream", "x:y"], ["--upstream", "x:y"]),
    (["watch", "--for", "5"], ["--for", "'5'", "unit"]),
    (["run", "--for", "10ms"], ["--for", "'10ms'", "1s and more"]),
    (["record", "--output", "-", "--for", "0s"], ["--for", "'0s'", "1s and more"]),
    (["diagnose", "--for", "5s", "127.0.0.1:8000"], ["to choose an upstream: --upstream 127.0.0.1:8000"]),
    (["explain", "nosuch"], ["nosuch", "keepalive_race", "restart"]),
]


def test_refusals(options):
    """Wrong flags: exit 2, the input named with the accepted forms, nothing on standard output."""
    wrong = []
    for arguments, words in REFUSALS:
        done = run_finrace(options, arguments)
        missing = [word for word in words if word not in done.stderr]
        if done.returncode != 2 or missing or done.stdout:
            wrong.append(f"finrace {' '.join(map(repr, arguments))}: exit {done.returncode}, not said: {missing}, "
                         f"stdout {done.stdout[:100]!r}, stderr {done.stderr.strip()[:400]!r}")
    for arguments in (["doctor"], ["doctor", "--json"], ["explain"], ["--help"]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run([options.finrace, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=LIMIT)
        if done.returncode != 2 or "No space left" not in done.stderr:
            wrong.append(f"finrace {' '.join(arguments)} to a full disk: exit {done.returncode}, stderr {done.stderr[:400]!r}")
    found = doctor_says(options)
    backends = found["backends"]
    for one in backends:
        if one["backend"] == "trace" and not one["works"]: # what was asked for by name is never replaced
            done = run_finrace(options, ["run", "--attach", one["attach"]])
            words = ["backend trace", "--backend cgroup", *(["lockdown=confidentiality"] if found["lockdown"] == "confidentiality" else [])]
            if done.returncode != 2 or any(word not in done.stderr for word in words):
                wrong.append(f"finrace run --attach {one['attach']}: exit {done.returncode}, stderr {done.stderr[:400]!r}, not {words}")
    if not any(one["works"] for one in backends if one["backend"] == "trace"):
        done = run_finrace(options, ["run", *options.unconfined, "--for", "1s"])
        if done.returncode != 0 or "warning: backend trace" not in done.stderr or "backend cgroup works here and is taken" not in done.stderr:
            wrong.append(f"finrace run without trace: exit {done.returncode}, stderr {done.stderr[:400]!r}")
        done = run_finrace(options, ["run", "--side", "server"])
        if done.returncode != 2 or "doesn't tell what servers do" not in done.stderr:
            wrong.append(f"finrace run --side server without trace: exit {done.returncode}, stderr {done.stderr[:400]!r}")
    must(not wrong, lambda: f"{len(wrong)} of {len(REFUSALS)}:\n          " + "\n          ".join(wrong))


# What a file says, and where and what of it is wrong.
BAD_CONFIGURATIONS = [
    ('flat = true\nupstrem = "10.0.0.5"\n', ["{path}:2: upstrem is no key; accepted: upstream, process, side, idle_timeout, backend"]),
    ("[run]\nflat = true\n", ["{path}:1: run is no key"]),
    ('config = "x"\n', ["{path}:1: config is no key"]),
    ("flat = true\n\ncheck_config = true\n", ["{path}:3: check_config is no key"]),
    ('replay = "f.rec"\n', ["{path}:1: replay is no key"]),
    ('# the kernel\n\nbackend = "ebpf"\n', ["{path}:3: backend: 'ebpf' is not known; accepted: auto, trace, cgroup"]),
    ("ring_bytes = 7\n", ["{path}:1: ring_bytes: '7' is out of range; accepted: 4k to 1G"]),
    ('upstream = ["10.0.0.5", "app.example:80"]\n', ["{path}:1: upstream: 'app.example:80'", "accepted: 10.0.0.5, "]),
    ('interval = "soon"\n', ["{path}:1: interval: 'soon'", "250ms"]),
    ('connections = "yes"\n', ["{path}:1: connections takes no such value; accepted: true or false"]),
    ("metrics = [9735, 9736]\n", ['{path}:1: metrics takes no such value; accepted: "[ADDR:]PORT"']),
    ("flat = true\nflat = false\n", ["{path}:2: "]),
    ("flat = true\noutput =\n", ["{path}:2: "]),
    # Of a combination the flags are named, behind the place of the first.
    ('backend = "cgroup"\nside = "server"\n', ["{path}:2: side: --side server: backend cgroup"]),
    ('hash_addresses = "clients"\nmask_addresses = "clients"\n', ["{path}:2: mask_addresses: --mask-addresses and --hash-addresses: give one of them"]),
    ('hash_key = "/dev/zero"\n', ["{path}:1: hash_key: --hash-key: that is for --hash-addresses"]),
    ('hash_addresses = "all"\nhash_key = "/dev/null"\n', ["{path}:2: hash_key: --hash-key /dev/null: 0 bytes are too few; accepted: "]),
    ('mask_addresses = "all"\nmetrics = 9735\n', ["{path}:2: metrics: --metrics: masked upstreams look alike"]),
    ('mask_addresses = "clients"\nrecord = "{folder}/f.rec"\n', ["{path}:2: record: --record: a recording has addresses as they are"]),
    ("keep = 7\n", ["{path}:1: keep: --keep says how to keep what --record records: give both"]),
]
# What a file says, flags beside it, and what is wrong with both together; None: nothing.
OVERRIDES = [
    ('backend = "cgroup"\nside = "server"\n', ["--backend", "trace"], None),
    ('backend = "trace"\nside = "server"\n', ["--backend", "cgroup"], "--side server: backend cgroup"),
    ('mask_addresses = "all"\nmetrics = 9735\n', ["--mask-addresses", "clients"], None),
    ('metrics = "192.0.2.1:9735"\n', [], None),  # no address of this host: nothing is to listen
    ('mask_addresses = "all"\n', ["--metrics", "9735"], "--metrics: masked upstreams look alike"),
    ("metrics = 9735\n", ["--metrics", "0"], "--metrics: '0'"),
    ("flat = true\n", ["--replay", "f.rec"], "--replay"),
]


def check_config(options, path, *flags, prefix=()):
    return run_finrace(options, ["run", "--config", path, "--check-config", *flags], prefix)


def test_check_config(options):
    """A wrong file: exit 2, its place, its key and what is accepted, as of a start with it. Flags win over what it says."""
    folder = os.path.join(options.folder, "configurations")
    os.makedirs(folder)
    path = os.path.join(folder, "f.toml")

    def configure(text):
        with open(path, "w", encoding="ascii") as file:
            file.write(text.replace("{folder}", folder))

    wrong = []
    for text, words in BAD_CONFIGURATIONS:
        configure(text)
        done = check_config(options, path)
        missing = [word for word in words if word.replace("{path}", path) not in done.stderr]
        start = run_finrace(options, ["run", "--config", path])
        if done.returncode != 2 or missing or done.stdout or (start.returncode, start.stdout, start.stderr) != (2, "", done.stderr):
            wrong.append(f"{text!r}: exit {done.returncode}, not said: {missing}, stdout {done.stdout[:100]!r}, stderr {done.stderr!r}; "
                         f"at a start exit {start.returncode}, stderr {start.stderr!r}")
    for text, words in (('output = ["-", "{folder}/none/f.jsonl"]\n', f"--output {folder}/none/f.jsonl: there is no folder {folder}/none here"),
                        ('record = "{folder}/none/f.rec"\n', f"--record {folder}/none/f.rec: there is no folder {folder}/none here")):
        configure(text)
        done = check_config(options, path)
        start = run_finrace(options, ["run", "--config", path])
        if (done.returncode, done.stdout) != (0, f"{path} is good\n") or words not in done.stderr or start.returncode != 2 or f"{folder}/none" not in start.stderr:
            wrong.append(f"{text!r}: {done}, not {words!r}; at a start {start}")
    for text, flags, words in OVERRIDES:
        configure(text)
        done = check_config(options, path, *flags)
        due = (2, "") if words else (0, f"{path} is good\n")
        if (done.returncode, done.stdout) != due or (words or "") not in done.stderr or bool(words) != bool(done.stderr):
            wrong.append(f"{text!r} beside {flags}: exit {done.returncode}, stdout {done.stdout!r}, stderr {done.stderr!r}")
    must(not wrong, lambda: f"{len(wrong)} wrong:\n          " + "\n          ".join(wrong))
    must(os.listdir(folder) == ["f.toml"], f"left behind: {os.listdir(folder)}")


def test_shipped_configuration(options):
    """The packaged file is good as it is, and with whatever it offers in comments; to say so takes no rights and starts nothing."""
    with open(SHIPPED, encoding="utf-8") as file:
        shipped = file.read()
    folder = os.path.join(options.folder, "shipped")
    os.makedirs(folder)
    path, key = os.path.join(folder, "finrace.toml"), os.path.join(folder, "key")
    with open(key, "w", encoding="ascii") as file:
        file.write("k" * 32)
    offered = re.findall(r"^#([a-z_]+) = ", shipped, re.M)
    # The file says of them that they exclude each other.
    apart = [{"mask_addresses"}, {"hash_addresses", "hash_key"}, {"record"}]
    must(len(offered) > 10 and len(offered) == len(set(offered)) and set().union(*apart) <= set(offered), f"offered: {offered}")

    def configure(taken):
        text = shipped
        for one in taken:
            text = text.replace(f"#{one} = ", f"{one} = ")
        text = text.replace("/etc/finrace/hash.key", key).replace("/var/log/finrace", folder)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return text

    powerless = [harness.need("setpriv", "util-linux"), "--bounding-set", "-all", "--inh-caps", "-all"]
    with network() as net, socket.socket() as taken_port:
        taken_port.bind(("127.0.0.1", 9735))  # where metrics are offered
        taken_port.listen()
        done = check_config(options, SHIPPED, prefix=powerless)
        must((done.returncode, done.stdout) == (0, f"{SHIPPED} is good\n"), f"as shipped: {done}")
        must(done.stderr == "" if os.path.isdir("/var/log/finrace") else "no folder /var/log/finrace here" in done.stderr, f"as shipped: {done}")
        for kept in apart:
            configure(set(offered) - set().union(*apart) | kept)
            done = check_config(options, path, prefix=powerless)
            must((done.returncode, done.stdout, done.stderr) == (0, f"{path} is good\n", ""), f"with {kept}: {done}")
        # None of that would do for a start.
        start = run_finrace(options, ["run", *options.backend_flags], powerless)
        must(start.returncode == 2 and "CAP_" in start.stderr, f"started without rights: {start}")
        must(sorted(os.listdir(folder)) == ["finrace.toml", "key"], f"made: {os.listdir(folder)}")
        start = run_finrace(options, ["run", "--config", path, "--for", "1s", "--unconfined"])  # LeakSanitizer needs what is given up
        must(start.returncode == 0 and "in use" in start.stderr, f"started at a port that is in use: {start}")
        made = set(os.listdir(folder)) - {"finrace.toml", "key"}
        must(made == {"finrace.jsonl", "finrace.rec"}, f"made by a start: {made}")

        text = configure(offered)
        done = check_config(options, path)
        must(done.returncode == 2 and "--mask-addresses and --hash-addresses" in done.stderr, f"with all of it: {done}")
        for one in offered:
            lines = [f"{one} = {{}}" if line.startswith(f"{one} = ") else line for line in text.splitlines()]
            with open(path, "w", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
            done = check_config(options, path)
            place = f"{path}:{lines.index(f'{one} = {{}}') + 1}: {one} takes no such value; accepted: "
            must(done.returncode == 2 and place in done.stderr, f"{one}: {done}, not {place!r}")


def test_not_root(options):
    """Without the capabilities: exit 2, and which ones are missing."""
    setpriv = harness.need("setpriv", "util-linux")
    os.chmod(options.folder, 0o755)
    program = shutil.copy(options.finrace, os.path.join(options.folder, "finrace-of-nobody"))
    os.chmod(program, 0o755)
    backend = ["--backend", options.backend]
    for prefix, missing in (
        (["--reuid", "65534", "--regid", "65534", "--clear-groups"], ["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"]),
        (["--bounding-set", "-net_admin,-sys_admin"], ["CAP_NET_ADMIN"]),
        (["--bounding-set", "-bpf,-sys_admin"], ["CAP_BPF"]),
        (["--bounding-set", "-perfmon,-sys_admin"], ["CAP_PERFMON"]),
    ):
        due = f"takes {', '.join(missing)}, which this process (user {65534 if '--reuid' in prefix else 0}) does not have"
        # Copied to where that user can reach it; a test folder in a closed place would hide the refusal.
        for command in (["run", *backend], ["watch", *backend]):
            done = run_finrace(options, command, [setpriv, *prefix], program)
            must(done.returncode == 2 and due in done.stderr, f"{prefix} {command}: exit {done.returncode}: {done.stderr}, not {due!r}")
            must(not done.stdout, f"on standard output: {done.stdout[:200]}")
        found = doctor_says(options, [setpriv, *prefix], program, status=2)
        must(found["missing_capabilities"] == missing and due in found.get("refusal", ""), f"{prefix} doctor: {found}")
    os.unlink(program)


def test_no_cgroup_root(options):
    """No cgroup v2 hierarchy: backend cgroup says where it looked; trace does not care."""
    script = ("grep -F ' - cgroup2 ' /proc/self/mountinfo | cut -d' ' -f5 | sort -r | while read -r at; do umount -l \"$at\"; done;"
              ' exec "$0" "$@"')
    prefix = ["unshare", "-m", "--propagation", "private", "/bin/sh", "-c", script]
    done = run_finrace(options, ["run", "--backend", "cgroup"], prefix)
    must(done.returncode == 2, f"exit {done.returncode}: {done.stderr}")
    for word in ("cgroup v2", "/proc/self/mountinfo", "mount"):
        must(word in done.stderr, f"no word of {word}: {done.stderr}")
    done = run_finrace(options, ["doctor"], prefix)
    must("cgroup v2" in done.stdout + done.stderr, f"doctor: {done.stdout} {done.stderr}")
    if options.backend == "trace":
        done = run_finrace(options, ["run", *options.backend_flags, *options.unconfined, "--for", "1s"], prefix)
        must(done.returncode == 0 and "finrace: ready (backend trace" in done.stderr, f"trace: {done}")


def test_no_btf(options):
    """A kernel that does not hand out its types: trace says so, and cgroup names accidents as ever."""
    hidden = ["unshare", "-m", "--propagation", "private", "/bin/sh", "-c", 'mount -t tmpfs none /sys/kernel/btf && exec "$0" "$@"']
    for attach in ("fentry", "kprobe"):
        done = run_finrace(options, ["run", "--backend", "trace", "--attach", attach], hidden)
        must(done.returncode == 2, f"exit {done.returncode}: {done.stderr}")
        for word in ("backend trace", "/sys/kernel/btf/vmlinux is missing", "--backend cgroup needs none"):
            must(word in done.stderr, f"no word of {word}: {done.stderr}")
    found = doctor_says(options, hidden)
    must(found["btf"] is False and found["choice"] == {"backend": "cgroup"}, f"doctor: {found}")
    command = [*hidden, options.finrace, "run", "--backend", "cgroup", *options.unconfined, "--interval", "1s"]
    with network() as net, Finrace(options, container=command) as finrace:
        listener = listen(net)
        due = [unanswered(net, listener), stale(net, listener)]
        finrace.wait_verdicts(net, len(due))
        must(sorted(one.ends for one in finrace.verdicts(net)) == sorted(due), f"{finrace.verdicts(net)}, not {due}")


def test_doctor(options):
    """doctor says beforehand what run finds: which hooks, which backend, and what this kernel hides."""
    found = doctor_says(options)
    works = {(one["backend"], one.get("attach")): one for one in found["backends"] if one["works"]}
    must(found["choice"] == {name: value for name, value in zip(("backend", "attach"), next(iter(works))) if value}, f"{found['choice']} of {list(works)}")
    one = works.get((options.backend, options.attach))
    must(one is not None, f"{options.backend_name} works here, and doctor says that it does not: {found}")
    with Finrace(options) as finrace:
        health = finrace.next_health()
    absent = sorted(hook["name"] for hook in one["hooks"] if not hook["attached"])
    must(absent == sorted(hook["name"] for hook in health.at("finrace.health.missing_hooks", [])), f"doctor: without {absent}; health: {health}")
    if options.backend != "trace":
        return
    names = {hook["name"] for hook in one["hooks"]}
    kernel = version_of_kernel()
    due = {f"{options.attach}/{name}" for name in ("tcp_sendmsg_locked", "tcp_close", "tcp_reset", "tcp_rcv_state_process", "tcp_send_active_reset",
                                                   "tcp_conn_request", "tcp_check_req")} | {"tp_btf/inet_sock_set_state", "iter/tcp"}
    due |= {f"{options.attach}/do_tcp_sendpages"} if kernel < (6, 5) else set()
    due |= {f"{options.attach}/tcp_rcv_established"} if kernel < (5, 11) else set()
    must(names == due, f"hooks {sorted(names)}, not {sorted(due)}")
    has_mptcp = os.path.exists("/proc/sys/net/mptcp/enabled")  # Debian's 5.10 is built without
    for mptcp, fast_open in ((0, 0), (has_mptcp, 3)):
        switch = f"echo {int(mptcp)} >/proc/sys/net/mptcp/enabled && " if has_mptcp else ""
        hides = ["unshare", "-n", "/bin/sh", "-c", f'{switch}echo {fast_open} >/proc/sys/net/ipv4/tcp_fastopen && exec "$0" "$@"']
        unseen = " ".join(next(way.get("unseen", []) for way in doctor_says(options, hides)["backends"] if way.get("attach") == options.attach))
        must(("MPTCP" in unseen) == bool(mptcp) and ("Fast Open" in unseen) == bool(fast_open), f"{mptcp} {fast_open}: {unseen}")
        must(("uncounted" in unseen) == (options.attach == "kprobe" and kernel < (6, 7)), f"{kernel}: {unseen}")


def test_healthy_requests(options):
    """A healthy request makes no event: of a thousand on one connection, that opens and closes, a few."""
    exchanges = 1000
    for _ in range(3):
        with network() as net, Finrace(options, "--connections", interval="100ms") as finrace:
            listener = listen(net)
            before = finrace.next_health().at("finrace.health.events")
            ends = healthy(net, listener, exchanges)
            record = wait_for(lambda: next((one for one in finrace.connections(net) if one.client), None), "the connection's record")
            must(record.ends == ends and record.at("finrace.connection.exchanges") == exchanges, f"{record}")
            events = finrace.next_health().at("finrace.health.events") - before
            must(events >= 2, f"{events} events")
            if events < exchanges // 10:
                return
            foreign = [one for one in finrace.connections() if not net.owns(one)]
            must(foreign, f"{events} events of {exchanges} exchanges")
    raise harness.Wrong(f"{events} events of {exchanges} exchanges (with {len(foreign)} foreign connections on this machine)")


# ---- all of them ---------------------------------------------------------------------------------------------------------

TESTS = [
    test_refusals, test_check_config, test_shipped_configuration, test_not_root, test_no_cgroup_root, test_no_btf, test_doctor, test_healthy_requests, test_signals, test_for, test_closed_standard_streams, test_file_size_limit, test_upstreams_that_rest,
    test_told_to_end_in_a_flood, test_log_rotation, test_told_timer, test_reload, test_containers, test_recording, test_page, test_filter_that_nothing_matches,
    test_recording_lives_on, test_recorder_through_a_pipe, test_accept_queue_full, test_two_at_once, test_process_names, test_text_for_people,
    test_endless_configuration, test_moved_sockets, test_who_closed_and_how, test_rest_at_close, test_closes_that_meet, test_requests_in_use,
    test_older_connections, test_listener_that_is_gone, test_smallest_ring, test_table_full,
    test_service_manager, test_confinement, test_slow_reader, test_reader_that_never_comes_back, test_full_disk, test_full_disk_at_start,
    test_full_disk_all_along, test_answers_at_start, test_churn_at_start, test_start_stop,
    test_many_connections,
]


def test(options, results):
    print(f"robustness: backend {options.backend_name}, {options.many} connections at once, {options.starts} starts", flush=True)
    harness.leave_mounts()
    run_send_calls(options, results)
    tests = TESTS
    if options.sanitized:
        print("  confinement is tested without sanitizers: LeakSanitizer needs what it takes away", flush=True)
        tests = [one for one in TESTS if one is not test_confinement]
    results.run_each(tests, options)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    harness.add_options(parser)
    parser.add_argument("--only", default="*", help="patterns of test names, with commas: 'sends*,full disk'")
    parser.add_argument("--small", action="store_true", help="for an emulated machine: a tenth of everything")
    parser.add_argument("--sanitized", action="store_true", help="the binary has sanitizers: its memory is not judged")
    options = parser.parse_args()
    options.many = 100000
    options.starts = 50
    options.storm = 600
    options.pause = 0.002
    options.ticks = 0.02  # the kernel tells in ticks, of 10 ms at most, since when a connection rests
    if options.small or options.sanitized:
        options.many, options.starts, options.storm = 5000, 10, 150
        options.pause = 0.05
        options.ticks = 0.1  # a machine that has to wait for its CPU loses some
    return options


if __name__ == "__main__":
    sys.exit(harness.main("robustness", parse, test))
