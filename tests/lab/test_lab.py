#!/usr/bin/python3
"""Proof that the race lab does what it says: its accidents are looked for on the wire.

tcpdump records both ends of the delay line while lab.py plays every scenario; this script reads the captures itself and
checks, connection by connection, the segments that each scenario must produce: the FIN's acknowledgement number, the RST's
ACK flag and sequence number, and what came before what at the client. The delay line (precision, loss, black hole,
clean-up, bad flags) and `lab.py serve` are tested as well.

  tests/lab/test_lab.py --build BUILD_DIR [--runs 3] [--delay 20ms] [--only PATTERN] [--keep FOLDER]

Needs root, tcpdump and the built delay-line. The last line is `N passed, N failed`; exit 1 when anything failed.
"""

import argparse
import fnmatch
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
LAB = os.path.join(HERE, "..", "..", "tools", "lab.py")
PYTHON = "/usr/bin/python3"
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(LAB))
import lab  # noqa: E402  (the scenarios' names and the way into a namespace)

PATIENCE = 20.0
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
SERVED = 4  # connections to lab.py serve: all of them set up well within its idle timer
MARKER_PORT = 1  # nobody listens there: a refused connection marks the end of the captures
LINKTYPE_RAW = (12, 101)


class Wrong(Exception):
    """What was found is not what must be."""


def must(good, why):
    if not good:
        raise Wrong(why)


# ---- captures ----------------------------------------------------------------------------------------------------------


class Segment:
    def __init__(self, time_ns, source, destination, seq, ack, flags, size):
        self.time_ns, self.source, self.destination = time_ns, source, destination
        self.seq, self.ack, self.flags, self.size = seq, ack, flags, size

    def __repr__(self):
        names = "".join(name for bit, name in ((SYN, "S"), (FIN, "F"), (RST, "R"), (ACK, ".")) if self.flags & bit)
        return f"{self.source[1]}>{self.destination[1]} {names} seq={self.seq} ack={self.ack} len={self.size}"


def parse_packet(time_ns, data):
    version = data[0] >> 4
    if version == 4:
        start = (data[0] & 15) * 4
        protocol, total = data[9], struct.unpack_from(">H", data, 2)[0]
        source, destination = socket.inet_ntop(socket.AF_INET, data[12:16]), socket.inet_ntop(socket.AF_INET, data[16:20])
    elif version == 6:
        start = 40
        protocol, total = data[6], 40 + struct.unpack_from(">H", data, 4)[0]
        source, destination = socket.inet_ntop(socket.AF_INET6, data[8:24]), socket.inet_ntop(socket.AF_INET6, data[24:40])
    else:
        raise Wrong(f"IP version {version} in the capture")
    if protocol != socket.IPPROTO_TCP:
        return None
    source_port, destination_port, seq, ack, offset, flags = struct.unpack_from(">HHIIBB", data, start)
    size = total - start - (offset >> 4) * 4
    return Segment(time_ns, (source, source_port), (destination, destination_port), seq, ack, flags, size)


def read_capture(path):
    with open(path, "rb") as file:
        data = file.read()
    magic = struct.unpack_from("<I", data)[0]
    must(magic in (0xA1B2C3D4, 0xA1B23C4D), f"{path}: no pcap file of this machine's byte order")
    scale = 1000 if magic == 0xA1B2C3D4 else 1
    linktype = struct.unpack_from("<I", data, 20)[0]
    must(linktype in LINKTYPE_RAW, f"{path}: link type {linktype}")
    at, segments = 24, []
    while at + 16 <= len(data):
        secs, fraction, kept, _ = struct.unpack_from("<IIII", data, at)
        if at + 16 + kept > len(data):
            break  # tcpdump is in the middle of writing it
        packet = data[at + 16 : at + 16 + kept]
        at += 16 + kept
        segment = parse_packet(secs * 10**9 + fraction * scale, packet)
        if segment:
            segments.append(segment)
    return segments


class Capture:
    """tcpdump on one end of the line."""

    def __init__(self, namespace, path):
        self.path = path
        command = ["ip", "netns", "exec", namespace, "tcpdump", "-i", "line", "-n", "-U", "--immediate-mode", "-s", "128"]
        command += ["-B", "16384", "-Z", "root", "-w", path, "tcp"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)
        self.text = ""
        deadline = time.monotonic() + PATIENCE
        while "listening on" not in self.text:
            left = deadline - time.monotonic()
            must(left > 0 and self.process.poll() is None, f"tcpdump did not start: {self.text.strip()}")
            if select.select([self.process.stderr], [], [], left)[0]:
                part = os.read(self.process.stderr.fileno(), 4096).decode()
                self.text += part
                must(part, f"tcpdump ended: {self.text.strip()}")

    def wait_for_marker(self):
        """tcpdump may lag behind, and forgets what it has not read when it ends: so a last packet tells that all is there."""
        deadline = time.monotonic() + 3 * PATIENCE
        while not any(MARKER_PORT in (one.source[1], one.destination[1]) for one in read_capture(self.path)[-50:]):
            must(time.monotonic() < deadline, "tcpdump lags too far behind")
            time.sleep(0.5)

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        try:
            _, rest = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise Wrong("tcpdump did not end") from None
        report = rest.decode()
        self.whole = "0 packets dropped by kernel" in report
        self.report = report.strip()

    def segments(self):
        must(self.whole, f"the capture is not whole: {self.report}")
        return read_capture(self.path)


def signed(number):
    return (number + 2**31) % 2**32 - 2**31


class View:
    """The segments of one connection as one end saw them, in order, numbered from the first byte of each direction."""

    def __init__(self, row, segments):
        self.row = row
        client = (row["client_address"], row["client_port"])
        server = (row["server_address"], row["server_port"])
        both = [one for one in segments if {one.source, one.destination} == {client, server}]
        opening = {one.source: one.seq + 1 for one in both if one.flags & SYN}
        self.all = []
        for one in both:
            seq = signed(one.seq - opening.get(one.source, one.seq))  # the SYN's own is -1
            ack = signed(one.ack - opening.get(one.destination, one.ack)) if one.flags & ACK else None
            side = "client" if one.source == client else "server"
            self.all.append((side, one.flags, seq, ack, one.size))
        self.request_end = max((seq + size for side, _, seq, _, size in self.all if side == "client" and size), default=0)
        self.request_start = self.request_end - row["request_bytes"]

    def find(self, side, flag, without=0):
        return [
            (index, one) for index, one in enumerate(self.all) if one[0] == side and one[1] & flag and not one[1] & without
        ]

    def request_segments(self):
        """Data of the last request, each once."""
        found, seen = [], set()
        for index, (side, _, seq, _, size) in enumerate(self.all):
            if side == "client" and size and seq + size > self.request_start and seq not in seen:
                seen.add(seq)
                found.append((index, seq, size))
        return found

    def answer_bytes(self):
        """Of the server, after the last request began."""
        begin = self.request_segments()[0][0]
        return sum(size for index, (side, _, _, _, size) in enumerate(self.all) if side == "server" and index > begin)

    def acknowledged_at(self):
        """Where the server first acknowledges all of the last request."""
        found = [index for index, one in enumerate(self.all) if one[0] == "server" and one[1] & ACK and one[3] == self.request_end]
        must(found, "the request was not acknowledged")
        return found[0]

    def server_fin(self, acks):
        fins = self.find("server", FIN)
        must(fins, "no FIN of the server")
        index, (_, _, seq, ack, size) = fins[0]
        must(ack == acks, f"the FIN acknowledges {ack} bytes of the client, not {acks}")
        return index, seq + size

    def no_server_fin(self):
        must(not self.find("server", FIN), "a FIN of the server")

    def bare_reset(self):
        resets = self.find("server", RST, without=ACK)
        must(resets, "no RST without ACK")
        return resets[0][0], resets[0][1][2]

    def no_bare_reset(self):
        must(not self.find("server", RST, without=ACK), "an RST without ACK")

    def acking_reset(self, acks):
        resets = self.find("server", RST | ACK)
        resets = [one for one in resets if one[1][1] & RST and one[1][1] & ACK]
        must(resets, "no RST with ACK")
        must(resets[0][1][3] == acks, f"the RST acknowledges {resets[0][1][3]} bytes of the client, not {acks}")
        return resets[0][0]

    def no_server_reset(self):
        must(not self.find("server", RST), "an RST of the server")


# ---- what each scenario must look like at the client (near) and at the server (far) ----------------------------------------


def crossed(near, far, segments=1, acks=None, said=0):
    """`said`: bytes that the server sent before its FIN, and that crossed the request as well."""
    index, number = near.server_fin(near.request_start if acks is None else acks)
    data = near.request_segments()
    data = data if acks is None else [one for one in data if one[1] + one[2] > acks]
    must(len(data) == segments, f"{len(data)} crossing segments, not {segments}")
    must(data[-1][0] < index, "at the client, the FIN came before the request left")
    _, reset_number = near.bare_reset()
    must(reset_number == number - said, f"the RST's number is {reset_number}, the FIN's {number}")
    must(near.answer_bytes() == said, f"{near.answer_bytes()} bytes before the FIN, not {said}")
    far_fin = far.find("server", FIN)[0][0]
    must(far_fin < far.request_segments()[-1][0], "at the server, the request came before the FIN left")


def reset_unread(near, far):
    near.no_server_fin()
    must(near.request_segments()[-1][0] < near.acking_reset(near.request_end), "the RST came before the request left")


def reset_closed(near, far):
    near.no_server_fin()
    must(not [one for one in near.find("server", RST) if one[1][1] & ACK], "the server's RST was not lost")
    index, _ = near.bare_reset()
    must(near.request_segments()[-1][0] < index, "the RST came before the request left")
    must(far.acking_reset(far.request_start) < far.request_segments()[0][0], "the request came before the server's RST left")


def reset_crossed(near, far):
    near.no_server_fin()
    must(near.request_segments()[-1][0] < near.acking_reset(near.request_start), "the RST came before the request left")
    must(far.acking_reset(far.request_start) < far.request_segments()[0][0], "the request came before the RST left")


def fin_lingering(near, far):
    index, _ = near.server_fin(near.request_end)
    must(near.request_segments()[-1][0] < index, "the FIN came before the request left")
    near.no_server_reset()


def stale(near, far):
    index, number = near.server_fin(near.request_start)
    must(index < near.request_segments()[0][0], "the request left before the FIN came")
    _, reset_number = near.bare_reset()
    must(reset_number == number + 1, f"the RST's number is {reset_number}, not one above the FIN's {number}")


def closed_unanswered(near, far):
    index, _ = near.server_fin(near.request_end)
    must(near.request_segments()[-1][0] < index, "the FIN came before the request left")
    must(near.answer_bytes() == 0, "the request was answered")
    near.no_server_reset()


def on_accept(near, far):
    must(near.request_start == 0, "not the first request")
    crossed(near, far)


def reset_unanswered(near, far):
    near.no_server_fin()
    near.acking_reset(near.request_end)
    must(near.answer_bytes() == 0, "the request was answered")


def cut(near, far, size):
    near.no_server_fin()
    near.acking_reset(near.request_end)
    must(near.answer_bytes() == size, f"{near.answer_bytes()} bytes of the answer, not {size}")


def silent(near, far):
    number = near.request_segments()[0][1]
    sent = [index for index, (side, _, seq, _, size) in enumerate(near.all) if side == "client" and size and seq == number]
    heard = [index for index, one in enumerate(near.all) if one[0] == "server" and index > sent[0]]
    in_vain = [index for index in sent if not heard or index < heard[0]]
    must(len(in_vain) >= 3, f"the request left {len(in_vain)} times before anything came")
    must(near.answer_bytes() == 0, "the request was answered")


def given_up(near, far):
    must(near.answer_bytes() == 0, "the request was answered")
    must(near.acknowledged_at() < near.find("client", FIN)[0][0], "the request was not acknowledged before the client's FIN")


def probed(near, far):
    must(near.answer_bytes() == 0, "the request was answered")
    probes = [one for one in near.all[near.acknowledged_at() :] if one[0] == "client" and one[4] == 0 and one[2] == near.request_end - 1]
    must(probes, "no keep-alive probe")
    must(near.find("client", RST), "no RST of the client's kernel")


def refused(near, far):
    must(len(near.all) == 2 and near.all[1][1] & (RST | ACK) == RST | ACK, "not SYN and RST with ACK")


def unanswered_syns(near, least, most):
    count = len(near.find("client", SYN))
    must(least <= count <= most, f"{count} SYNs")
    must(not [one for one in near.all if one[0] == "server"], "the server answered")


def interrupted(near, far):
    near.no_server_fin()
    resets = near.find("server", RST)
    must(resets, "no RST of the server")
    sent = near.request_end - near.all[resets[0][0]][3] if near.all[resets[0][0]][1] & ACK else 1
    must(sent > 0, "the RST acknowledges the whole body")


def clean(near, far):
    must(near.find("server", FIN) and near.find("client", FIN), "a FIN is missing")
    # After both, an RST only answers what a stalled machine sent twice.
    over = max(near.find(side, FIN)[0][0] for side in ("server", "client"))
    must(all(index > over for side in ("server", "client") for index, _ in near.find(side, RST)), "an RST")


def closed_first(near, far, who):
    clean(near, far)
    fins = {side: near.find(side, FIN)[0][0] for side in ("client", "server")}
    must(min(fins, key=fins.get) == who, f"the {who} did not close first")


def half_closed(near, far):
    closed_first(near, far, "client")
    must(near.answer_bytes() > 0, "no answer")


def half_closed_in_vain(near, far):
    closed_first(near, far, "client")
    must(near.answer_bytes() == 0, f"{near.answer_bytes()} bytes of an answer")


def answered(near, far, least, who):
    closed_first(near, far, who)
    must(near.answer_bytes() >= least, f"{near.answer_bytes()} bytes of the answer")


def late_body(near, far):
    fin = near.find("server", FIN)[0][0]
    sent = [index for index, (side, _, _, _, size) in enumerate(near.all) if side == "client" and size]
    must(sent[-1] > fin, "the body left before the FIN came")
    must(near.answer_bytes() > 0, "no answer")


def idle_reset(near, far):
    near.no_server_fin()
    near.acking_reset(near.request_end)
    must(near.answer_bytes() > 0, "no answer")


def never_used(near, far):
    clean(near, far)
    must(near.server_fin(0) and near.request_end == 0, "bytes were sent")


CHECKS = {
    "race_fin_crossed": crossed,
    "race_fin_crossed_multi_segment": lambda near, far: crossed(near, far, segments=3),
    "race_fin_crossed_preconnected": on_accept,
    "race_fin_crossed_pipelined": lambda near, far: crossed(near, far, segments=2),
    "race_reset_unread": reset_unread,
    "race_reset_closed": reset_closed,
    "race_reset_crossed": reset_crossed,
    "race_fin_lingering": fin_lingering,
    "race_fin_crossed_tls": lambda near, far: crossed(near, far, said=24),
    "stale_response": lambda near, far: crossed(near, far, said=51),
    "stale_reuse": stale,
    "closed_first_exchange": closed_unanswered,
    "handshake_unanswered": closed_unanswered,
    "closed_reused": closed_unanswered,
    "closed_after_think": closed_unanswered,
    "closed_on_accept": on_accept,
    "closed_last_byte": closed_unanswered,
    "reset_first_exchange": reset_unanswered,
    "reset_first_unread": reset_unanswered,
    "reset_reused": reset_unanswered,
    "cut_by_reset": lambda near, far: cut(near, far, 1000),
    "cut_one_byte": lambda near, far: cut(near, far, 1),
    "silence_until_client_gives_up": silent,
    "silence_until_client_shuts_down": silent,
    "silence_until_kernel_gives_up": silent,
    "silence_until_bare_reset": lambda near, far: (silent(near, far), near.bare_reset()),
    "silence_after_acknowledgement": probed,
    "acknowledged_then_given_up": given_up,
    "connect_refused": refused,
    "connect_unreachable": lambda near, far: unanswered_syns(near, 1, 1),
    "connect_timeout": lambda near, far: unanswered_syns(near, 2, 9),
    "connect_abandoned": lambda near, far: unanswered_syns(near, 1, 1),
    "fin_all_but_last_byte": lambda near, far: crossed(near, far, acks=near.request_end - 1),
    "body_10mb_interrupted": interrupted,
    "half_closed_answered": half_closed,
    "half_closed_unanswered": half_closed_in_vain,
    "pipelined_answered": lambda near, far: answered(near, far, 100, "client"),
    "body_after_answer": late_body,
    "response_one_byte_then_fin": lambda near, far: answered(near, far, 1, "server"),
    "idle_close": lambda near, far: answered(near, far, 50, "server"),
    "idle_close_reset": idle_reset,
    "idle_close_local": lambda near, far: answered(near, far, 50, "client"),
    "complete_close": lambda near, far: answered(near, far, 50, "server"),
    "never_used": never_used,
    "healthy": lambda near, far: closed_first(near, far, "client"),
}


# ---- the test's frame ------------------------------------------------------------------------------------------------------


class Results:
    def __init__(self, only):
        self.only = only
        self.passed = self.failed = 0

    def wanted(self, name):
        return fnmatch.fnmatch(name, self.only)

    def note(self, name, error=None):
        if error is None:
            self.passed += 1
            print(f"ok      {name}", flush=True)
        else:
            self.failed += 1
            print(f"FAILED  {name}: {error}", flush=True)

    def run(self, name, test, *arguments):
        if not self.wanted(name):
            return
        try:
            test(*arguments)
        except (Wrong, OSError, subprocess.SubprocessError, lab.UsageError, ValueError, KeyError) as error:
            self.note(name, f"{type(error).__name__}: {error}")
        else:
            self.note(name)


class DelayLine:
    def __init__(self, program, *flags):
        self.folder = tempfile.mkdtemp(prefix="finrace-line-test-")
        self.control = os.path.join(self.folder, "line.sock")
        self.process = subprocess.Popen([program, "--control", self.control, *flags], stdout=subprocess.PIPE, text=True)
        ready = self.process.stdout.readline().split() if select.select([self.process.stdout], [], [], PATIENCE)[0] else []
        if len(ready) != 3:
            self.stop(signal.SIGKILL)
            raise Wrong("delay-line did not become ready")
        self.left, self.right = (word.partition("=")[2] for word in ready[1:])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def tell(self, order):
        return lab.Line(self.control).tell(order)

    def stop(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(PATIENCE)
        self.process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.process.returncode

    def traces(self):
        return [name for name in (self.left, self.right) if os.path.exists(f"/run/netns/{name}")]


def in_namespace(name, call):
    """Runs call() in a thread of that namespace."""
    outcome = {}

    def body():
        try:
            lab.enter_namespace(name)
            outcome["value"] = call()
        except Exception as error:  # handed to the caller's thread
            outcome["error"] = error

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    must(not thread.is_alive(), "a step took too long")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


# ---- tests of the delay line -----------------------------------------------------------------------------------------------


def udp_pair(line, family=socket.AF_INET, address="10.77.0.2", port=7000):
    def server():
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.bind((address, port))
        sock.settimeout(0.5)
        return sock

    def client():
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.connect((address, port))
        sock.settimeout(0.5)
        return sock

    return in_namespace(line.left, client), in_namespace(line.right, server)


def timer_lateness():
    """What this machine itself adds to a wait of 20 ms: microseconds on real hardware, milliseconds in an emulated one."""
    late = []
    for _ in range(50):
        start = time.monotonic()
        time.sleep(0.02)
        late.append((time.monotonic() - start - 0.02) * 1000)
    return sum(late) / len(late)


def test_precision(program, family, address):
    """Never early, and exact to 1 ms beside what the machine's own timers take."""
    machine = timer_lateness()
    with DelayLine(program, "--delay", "20ms") as line:
        client, server = udp_pair(line, family, address)
        times = []
        for number in range(100):
            sent = time.monotonic()
            client.send(b"%d" % number)
            must(server.recv(100) == b"%d" % number, "packets out of order")
            times.append((time.monotonic() - sent) * 1000)
        client.close()
        server.close()
        stats = line.tell("stats")
    times.sort()
    late = int(stats.partition("late_mean_us=")[2].split()[0]) / 1000
    print(f"        one-way in ms: min {times[0]:.3f} median {times[50]:.3f} max {times[-1]:.3f}")
    print(f"        late by {late:.3f} ms on average, this machine's own timers by {machine:.3f} ms")
    must(times[0] >= 20, f"a packet arrived after {times[0]:.3f} ms")
    # The median is immune to a stall of the whole machine; the line's own account, to a receiver that wakes late.
    exact = min(times[50] - 20, late)
    must(exact < 1 + machine, f"packets are {exact:.3f} ms late, timers here are {machine:.3f} ms late")


def test_loss(program):
    """The loss is near its share, and the same again with the same seed."""

    def lost(seed):
        with DelayLine(program, "--delay", "1ms", "--loss", "10%", "--seed", str(seed)) as line:
            client, server = udp_pair(line)
            arrived = []
            server.settimeout(0.1)
            for start in range(0, 1000, 100):  # few enough at a time for the receiver's buffer
                for number in range(start, start + 100):
                    client.send(b"%d" % number)
                try:
                    while True:
                        arrived.append(int(server.recv(100)))
                except TimeoutError:
                    pass
            client.close()
            server.close()
            must(arrived == sorted(arrived), "packets out of order")
            return sorted(set(range(1000)) - set(arrived))

    first, again, other = lost(7), lost(7), lost(8)
    must(50 < len(first) < 150, f"{len(first)} of 1000 packets lost at 10 %")
    must(first == again, "the same seed loses other packets")
    must(first != other, "another seed loses the same packets")


def test_black_hole(program):
    with DelayLine(program, "--delay", "1ms") as line:
        client, server = udp_pair(line)

        def arrives():
            client.send(b"x")
            try:
                server.recv(10)
                return True
            except TimeoutError:
                return False

        must(arrives(), "nothing arrives without a black hole")
        for order, expected in (
            ("drop left-to-right", False),
            ("drop right-to-left", True),
            ("drop both", False),
            ("drop none", True),
            ("drop both port 7000", True),  # for TCP alone
        ):
            line.tell(order)
            must(arrives() == expected, f"after `{order}` a packet {'did not arrive' if expected else 'arrived'}")
        for order in ("drop up", "delay 5", "loss 3", "drop both port 0", "drop both port x", "hello", ""):
            try:
                line.tell(order)
            except lab.UsageError:
                continue
            raise Wrong(f"`{order}` was accepted")
        must("dropped=2" in line.tell("stats"), f"two packets were dropped, not {line.tell('stats')}")
        client.close()
        server.close()


def test_bad_flags(program):
    for flags, words in (
        (["--delay", "20"], ["--delay", "ms"]),
        (["--delay", "61s"], ["--delay", "60s"]),
        (["--loss", "101%"], ["--loss", "100"]),
        (["--drop", "up"], ["--drop", "left-to-right"]),
        (["--left", "a/b"], ["--left", "letters"]),
        (["--left-address", "10.77.0.300"], ["--left-address", "IPv4"]),
        (["--right-address6", "10.77.0.3"], ["--right-address6", "IPv6"]),
        (["--left", "same", "--right", "same"], ["--left", "--right"]),
        (["--bogus"], ["--bogus"]),
        (["--"], ["command"]),
    ):
        done = subprocess.run([program, *flags], capture_output=True, text=True, timeout=PATIENCE)
        must(done.returncode == 2, f"{flags}: exit {done.returncode}")
        must(all(word in done.stderr for word in words), f"{flags}: {done.stderr.strip()}")


def test_clean_up(program):
    for number, expected in ((signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, -9)):
        line = DelayLine(program)
        must(len(line.traces()) == 2, "no namespaces")
        must(line.stop(number) == expected, f"exit {line.process.returncode} on signal {number}")
        deadline = time.monotonic() + PATIENCE
        while line.traces() and time.monotonic() < deadline:
            time.sleep(0.02)
        must(not line.traces(), f"signal {number} left {line.traces()} behind")


def test_command(program):
    script = 'test -e "/run/netns/$FINRACE_LEFT" && ip -n "$FINRACE_RIGHT" addr | grep -q "$FINRACE_RIGHT_ADDRESS6" && exit 7'
    for command, expected in ((["sh", "-c", script], 7), (["sh", "-c", "kill -9 $$"], 137), (["/no/such"], 127)):
        done = subprocess.run([program, "--", *command], capture_output=True, text=True, timeout=PATIENCE)
        must(done.returncode == expected, f"{command}: exit {done.returncode}, not {expected}: {done.stderr.strip()}")
        left = done.stdout.split()[1].partition("=")[2]
        must(not os.path.exists(f"/run/netns/{left}"), f"{command} left {left} behind")
    process = subprocess.Popen([program, "--", "sleep", "100"], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    must(process.wait(PATIENCE) == 143, f"interrupted with a command: exit {process.returncode}")
    process.stdout.close()


# ---- tests of the scenarios ------------------------------------------------------------------------------------------------


def mark():
    time.sleep(0.2)  # the last segments are still under way
    with socket.socket() as sock:
        sock.settimeout(PATIENCE)
        must(sock.connect_ex(("10.77.0.2", MARKER_PORT)) != 0, "somebody listens on the marker's port")


def play(line, folder, family, runs, names, delay):
    """All scenarios with both ends recorded: rows of truth, and segments of both ends."""
    truth = os.path.join(folder, f"family-{family}.jsonl")
    captures = [Capture(line.left, os.path.join(folder, f"family-{family}-left.pcap"))]
    try:
        captures.append(Capture(line.right, os.path.join(folder, f"family-{family}-right.pcap")))
        command = [PYTHON, LAB, "--scenario", ",".join(names), "--runs", str(runs), "--parallel", "20", "--family", family]
        command += ["--left", line.left, "--right", line.right, "--control", line.control]
        command += ["--delay", delay, "--truth", truth]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=570)
        if done.returncode != 0:
            print(done.stderr, end="")
            raise Wrong(f"lab.py: exit {done.returncode}: its summary is above")
        in_namespace(line.left, mark)
        for capture in captures:
            capture.wait_for_marker()
    finally:
        for capture in captures:
            capture.stop()
    print(f"        {done.stderr.strip().splitlines()[-1]}")
    with open(truth, encoding="utf-8") as file:
        return [json.loads(text) for text in file], [capture.segments() for capture in captures]


def by_connection(segments):
    table = {}
    for one in segments:
        table.setdefault(frozenset((one.source, one.destination)), []).append(one)
    return table


def judge_rows(name, rows, near_table, far_table, runs):
    kept = 0
    for row in rows:
        if row["scenario"] != name or row["phase"] != "run" or row.get("slipped"):
            continue
        key = frozenset(((row["client_address"], row["client_port"]), (row["server_address"], row["server_port"])))
        must(key in near_table, f"run {row['run']} is not in the capture")
        near, far = View(row, near_table[key]), View(row, far_table.get(key, []))
        try:
            CHECKS[name](near, far)
        except (Wrong, IndexError) as error:
            listing = "\n            ".join(map(str, near.all[-8:]))
            raise Wrong(f"run {row['run']} port {row['client_port']}: {error}\n            {listing}") from error
        kept += 1
    must(kept == runs, f"{kept} runs kept, not {runs}")


def judge_learning(rows, near_table):
    for row in rows:
        if row["phase"] != "learn" or row.get("slipped"):
            continue
        key = frozenset(((row["client_address"], row["client_port"]), (row["server_address"], row["server_port"])))
        must(row["expected"] is None, f"{row['scenario']}: a learning row expects a verdict")
        clean(View(row, near_table[key]), None)
        must(abs(row["idle_ms"] - row["keep_alive_ms"]) < 60, f"{row['scenario']}: idle for {row['idle_ms']} ms")


def test_scenarios(results, program, folder, family, runs, delay):
    names = [name for name in lab.SCENARIOS if results.wanted(f"scenario {name} {family}")]
    if not names:
        return
    try:
        with DelayLine(program) as line:
            rows, segments = play(line, folder, family, runs, names, delay)
        near_table, far_table = map(by_connection, segments)
    except (Wrong, OSError, subprocess.SubprocessError) as error:
        for name in names:
            results.note(f"scenario {name} {family}", error)
        return
    for name in names:
        results.run(f"scenario {name} {family}", judge_rows, name, rows, near_table, far_table, runs)
    results.run(f"learning {family}", judge_learning, rows, near_table)


def test_local(folder):
    truth = os.path.join(folder, "local.jsonl")
    names = [name for name, chosen in lab.SCENARIOS.items() if not chosen.needs_line]
    command = [PYTHON, LAB, "--local", "--runs", "2", "--parallel", "20", "--truth", truth]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300)
    must(done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}")
    with open(truth, encoding="utf-8") as file:
        rows = [json.loads(text) for text in file]
    kept = [row["scenario"] for row in rows if row["phase"] == "run" and not row.get("slipped")]
    must(sorted(kept) == sorted(names * 2), "not two runs of each scenario")


def test_bad_lab_flags(folder):
    truth = os.path.join(folder, "none.jsonl")
    for flags, word in (
        (["--scenario", "nosuch", "--truth", truth], "race_fin_crossed"),
        (["--scenario", "race_fin_crossed", "--local", "--truth", truth], "delay line"),
        (["--local"], "--truth"),
        (["--delay-line", "/no/such", "--truth", truth], "--local"),
        (["--left", "x", "--truth", truth], "--control"),
        (["--delay", "5x", "--truth", truth], "ms"),
    ):
        done = subprocess.run([PYTHON, LAB, *flags], capture_output=True, text=True, timeout=PATIENCE)
        must(done.returncode == 2, f"{flags}: exit {done.returncode}")
        must(word in done.stderr, f"{flags}: {done.stderr.strip()}")


# ---- tests of lab.py serve ---------------------------------------------------------------------------------------------------


def read_answer(sock):
    data = b""
    while b"\r\n\r\n" not in data:
        part = sock.recv(65536)
        must(part, f"the server ended after {data!r}")
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split()[0])
    while len(body) < length:
        part = sock.recv(65536)
        must(part, "the server ended in the body")
        body += part
    must(head.startswith(b"HTTP/1.1 200 "), f"{head!r}")
    return head, body[length:]


def test_serve(program, folder, mode):
    log = os.path.join(folder, f"serve-{mode}.jsonl")
    with DelayLine(program, "--delay", "5ms") as line:
        command = [PYTHON, LAB, "serve", "--namespace", line.right, "--port", "8080", "--mode", mode, "--keep-alive", "3s"]
        server = subprocess.Popen([*command, "--log", log], stderr=subprocess.PIPE, text=True)
        try:
            must("serving" in server.stderr.readline(), "the server did not start")

            def client():
                socks = []
                for _ in range(SERVED):
                    sock = socket.create_connection(("10.77.0.2", 8080), timeout=5)
                    sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                    read_answer(sock)
                    sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100000)
                    read_answer(sock)
                    socks.append(sock)
                # Two requests at once on one of them.
                socks[0].sendall(2 * b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                _, rest = read_answer(socks[0])
                if not rest:
                    read_answer(socks[0])
                saw = []
                for sock in socks:
                    try:
                        saw.append("eof" if sock.recv(100) == b"" else "bytes")
                    except ConnectionResetError:
                        saw.append("reset")
                if mode == "lingering":
                    # A request after the server's FIN is acknowledged and discarded, not answered by an RST.
                    socks[0].sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                    time.sleep(0.1)
                    must(lab.TcpInfo(socks[0]).state == lab.TCP_CLOSE_WAIT, "no lingering close")
                for sock in socks:
                    sock.close()
                last = socket.create_connection(("10.77.0.2", 8080), timeout=5)
                last.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                head, _ = read_answer(last)
                must(b"Connection: close" in head and last.recv(10) == b"", "Connection: close was not obeyed")
                last.close()
                return saw

            saw = in_namespace(line.left, client)
            expected = "reset" if mode == "reset" else "eof"
            must(saw == [expected] * SERVED, f"the clients saw {saw}")
        finally:
            server.terminate()
            server.wait(PATIENCE)
            server.stderr.close()
    with open(log, encoding="utf-8") as file:
        rows = [json.loads(text) for text in file]
    timers = [row for row in rows if row["by"] == "timer"]
    must(len(timers) == SERVED and len(rows) == SERVED + 1, f"{len(timers)} closes by the timer, {len(rows)} in all")
    for row in timers:
        must(row["how"] == expected.replace("eof", "fin"), f"{row}")
        must(3000 <= row["idle_ms"] < 3300, f"idle for {row['idle_ms']} ms")


def main():
    parser = argparse.ArgumentParser(description="Tests of the race lab.")
    parser.add_argument("--build", required=True, help="folder with delay-line in it")
    parser.add_argument("--runs", type=int, default=3, help="of each scenario")
    parser.add_argument("--delay", default="20ms", help="one way; choose 40ms and more on a slow machine (default %(default)s)")
    parser.add_argument("--only", default="*", help="pattern of test names: 'scenario race_* 4', 'serve *'")
    parser.add_argument("--keep", help="folder for captures and truth")
    options = parser.parse_args()
    program = os.path.join(options.build, "delay-line")
    for good, problem in (
        (os.geteuid() == 0, "not root: run it with sudo"),
        (os.access(program, os.X_OK), f"{program} is missing: build it first"),
        (shutil.which("tcpdump"), "tcpdump is missing: install the package tcpdump"),
        (shutil.which("ip"), "ip is missing: install the package iproute2"),
    ):
        if not good:
            print(f"test_lab.py: {problem}", file=sys.stderr)
            return 2
    folder = options.keep or tempfile.mkdtemp(prefix="finrace-wire-")
    os.makedirs(folder, exist_ok=True)
    results = Results(options.only)
    try:
        missing = set(lab.SCENARIOS) ^ set(CHECKS)
        results.note("every scenario has its check", f"not {missing}" if missing else None)
        results.run("delay-line bad flags", test_bad_flags, program)
        results.run("delay-line command", test_command, program)
        results.run("delay-line clean-up", test_clean_up, program)
        results.run("delay-line precision 4", test_precision, program, socket.AF_INET, "10.77.0.2")
        results.run("delay-line precision 6", test_precision, program, socket.AF_INET6, "fd77::2")
        results.run("delay-line loss", test_loss, program)
        results.run("delay-line black hole", test_black_hole, program)
        results.run("lab bad flags", test_bad_lab_flags, folder)
        for mode in ("fin", "lingering", "reset"):
            results.run(f"serve {mode}", test_serve, program, folder, mode)
        for family in ("4", "6", "mapped"):
            test_scenarios(results, program, folder, family, options.runs, options.delay)
        results.run("lab local", test_local, folder)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{results.passed} passed, {results.failed} failed")
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
