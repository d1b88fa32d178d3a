#!/usr/bin/python3
"""The race lab: a scripted client and server that cause each accident on purpose, and log the truth.

One thread plays one run, both ends of it: the client's socket lives in the left network namespace (the proxy host), the
server's in the right one, and one monotonic clock says when each acts. So "the server closes at T, the client sends at
T + delay/2" is two lines of a script, and a scenario reads like the accident it makes.

Every run is checked before it counts: the lab asks both sockets (TCP_INFO, FIONREAD) whether the accident took place as
planned. A run that slipped, because a thread was late or the whole machine stood still, is written as slipped, repeated,
and counted in the summary.

`lab.py serve` is another thing: a plain HTTP/1.1 server whose idle close has a chosen manner, to stand behind a real proxy.
tools/README.md explains the fields of the truth file.
"""

import argparse
import contextlib
import ctypes
import errno
import fcntl
import heapq
import json
import os
import queue
import random
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from datetime import datetime, timezone

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
SIOCOUTQNSD = 0x894B  # linux/sockios.h
LIBC = ctypes.CDLL(None, use_errno=True)

PATIENCE = 10.0  # no single step of a run may take longer
LATE = 50_000_000  # ns: an accident that took so much longer than planned is another accident
STALL = 80_000_000  # ns: a machine that stands still for so long makes timers, segments and their answers late
LONG_STALL = 5 * STALL  # the same for an accident that bytes or whole seconds make, not a timer's moment
MAX_ATTEMPTS = 30  # a run that slips this often is a failure; an emulated machine on a busy host needs many
LEAST_PARALLEL = 4
LEARN_CONNECTIONS = 8
CONNECT_PATIENCE = 2.5  # beyond the first SYN retransmission (1 s), short of a proxy's usual limit
SHORT_IDLE = 0.2  # far below the idle timer
LONG_IDLE = 0.95  # as long as some server's timer
FIRST_CLIENT_PORT, LAST_CLIENT_PORT = 20000, 60000
MIB = 1 << 20

TCP_ESTABLISHED, TCP_SYN_SENT, TCP_CLOSE, TCP_CLOSE_WAIT = 1, 2, 7, 8


class Slip(Exception):
    """The accident did not take place as planned: repeat the run."""


class UsageError(Exception):
    """The environment or the flags do not allow the lab to run."""


def now_ns():
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def wall_time():
    return datetime.now(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


def until(deadline_ns):
    while True:
        left = deadline_ns - now_ns()
        if left <= 0:
            return
        time.sleep(left / 1e9)


def seconds(text):
    """20ms, 1.5s, 500us; a bare number means seconds."""
    for unit, factor in (("us", 1e-6), ("ms", 1e-3), ("s", 1.0), ("", 1.0)):
        if text.endswith(unit):
            try:
                value = float(text[: len(text) - len(unit)]) * factor
            except ValueError:
                break
            if 0 <= value <= 3600:
                return value
            break
    raise argparse.ArgumentTypeError(f"'{text}' is not a duration: use a number with us, ms or s: 20ms, 1.5s")


def enter_namespace(name):
    if name is None:
        return
    try:
        fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"network namespace {name}: {error.strerror}: `ip netns list` shows what exists") from error
    try:
        if LIBC.setns(fd, CLONE_NEWNET) != 0:
            raise UsageError(f"network namespace {name}: {os.strerror(ctypes.get_errno())}: run as root")
    finally:
        os.close(fd)


def in_namespace(name, act, *arguments):
    """Calls act in a network namespace: in a thread of its own, since that can't be left again."""
    failures = []

    def body():
        try:
            enter_namespace(name)
            act(*arguments)
        except (OSError, UsageError) as error:
            failures.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failures:
        raise UsageError(f"network namespace {name}: {failures[0]}")


# ---- what the kernel knows of a socket ---------------------------------------------------------------------------------


class TcpInfo:
    def __init__(self, sock):
        raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
        self.state = raw[0]
        self.total_retransmits = struct.unpack_from("=I", raw, 100)[0]
        # The kernel counts the SYN as an acknowledged byte.
        self.acked_bytes = max(0, struct.unpack_from("=Q", raw, 120)[0] - 1)


def unread_bytes(sock):
    return struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, b"\0\0\0\0"))[0]


def unsent_bytes(sock):
    """Written, but waiting for the window: not on its way yet (tcp(7) has SIOCOUTQ; SIOCOUTQNSD since Linux 2.6.37)."""
    return struct.unpack("i", fcntl.ioctl(sock, SIOCOUTQNSD, b"\0\0\0\0"))[0]


def set_reset_on_close(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# ---- the line between the two ends -------------------------------------------------------------------------------------


class Line:
    """The control socket of delay-line."""

    def __init__(self, path):
        self.lock = threading.Lock()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        try:
            self.sock.connect(path)
        except OSError as error:
            raise UsageError(f"--control {path}: {error.strerror}: is delay-line running with that socket?") from error
        self.reader = self.sock.makefile("r")

    def tell(self, order):
        with self.lock:
            self.sock.sendall(order.encode() + b"\n")
            answer = self.reader.readline().strip()
        if not answer.startswith("ok"):
            raise UsageError(f"delay-line refused `{order}`: {answer}")
        return answer


class OwnLine:
    """A delay-line started by the lab itself."""

    def __init__(self, program, delay):
        self.folder = tempfile.TemporaryDirectory(prefix="finrace-line-")
        self.control = os.path.join(self.folder.name, "line.sock")
        command = [program, "--delay", f"{delay * 1000:g}ms", "--control", self.control]
        try:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )
        except OSError as error:
            self.folder.cleanup()
            raise UsageError(
                f"--delay-line {program}: {error.strerror}: build it first, or use --local for the scenarios without delay"
            ) from error
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        words = self.process.stdout.readline().split() if ready else []
        if len(words) != 3 or words[0] != "ready":
            self.stop()
            raise UsageError(f"{program} did not become ready: see its message above")
        self.left = words[1].partition("=")[2]
        self.right = words[2].partition("=")[2]

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()


# ---- where the two ends live -------------------------------------------------------------------------------------------


class World:
    def __init__(self, options, left, right, line, addresses):
        self.left, self.right, self.line = left, right, line
        self.client_address, self.server_address = addresses
        self.mapped = options.family == "mapped"
        self.family = socket.AF_INET if options.family == "4" else socket.AF_INET6
        self.family_name = options.family
        # Without a line the choreography still needs a unit of time: the slack that a busy machine is given.
        self.delay = options.delay if line else 0.004
        self.keep_alive = options.keep_alive
        self.port_lock = threading.Lock()
        self.behind = None
        self.next_port = random.randrange(FIRST_CLIENT_PORT, LAST_CLIENT_PORT)

    def address_behind(self):
        """Beyond the right end, which is a router from now on."""
        with self.port_lock:
            if self.behind is None:
                in_namespace(self.right, self.forward)
                separator = ":" if ":" in self.server_address else "."
                self.behind = self.server_address.rpartition(separator)[0] + separator + "99"
        return self.behind

    @staticmethod
    def forward():
        """Every packet, and an ICMP error for every one that can't go on."""
        knobs = {"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1", "ipv4/icmp_ratelimit": "0", "ipv6/icmp/ratelimit": "0"}
        for knob, value in knobs.items():
            with open(f"/proc/sys/net/{knob}", "w", encoding="ascii") as file:
                file.write(value)

    def endpoint(self, address, port):
        return ("::ffff:" + address if self.mapped else address, port)

    def socket(self):
        sock = socket.socket(self.family, socket.SOCK_STREAM)
        if self.mapped:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(PATIENCE)
        return sock

    def client_socket(self):
        """Bound to a port that no other connection of this lab has: a row of truth is found by its client port alone."""
        for _ in range(LAST_CLIENT_PORT - FIRST_CLIENT_PORT):
            with self.port_lock:
                port = self.next_port
                self.next_port = port + 1 if port < LAST_CLIENT_PORT else FIRST_CLIENT_PORT
            sock = self.socket()
            try:
                sock.bind(self.endpoint(self.client_address, port))
                return sock, port
            except OSError as error:
                sock.close()
                if error.errno != errno.EADDRINUSE:
                    raise
        raise UsageError("no client port is left")


class Listener:
    """One server port: accepts, and hands each connection to the run that opened it."""

    def __init__(self, world, port):
        self.connections = {}
        self.ready = threading.Condition()
        self.closed = False
        self.failure = None
        self.thread = threading.Thread(target=self.serve, args=(world, port), daemon=True)
        started = threading.Event()
        self.started = started
        self.thread.start()
        if not started.wait(PATIENCE):
            raise UsageError(f"the listener on port {port} did not start")
        if self.failure:
            raise UsageError(f"listen on {world.server_address} port {port}: {self.failure}")

    def serve(self, world, port):
        try:
            enter_namespace(world.right)
            self.sock = world.socket()
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.sock.bind(world.endpoint(world.server_address, port))
            self.sock.listen(1024)
            self.sock.settimeout(0.5)
        except (OSError, UsageError) as error:
            self.failure = error
            self.started.set()
            return
        self.started.set()
        while not self.closed:
            try:
                connection, peer = self.sock.accept()
            except TimeoutError:
                continue
            accepted_at = now_ns()
            connection.settimeout(PATIENCE)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.ready:
                self.connections[peer[1]] = (connection, accepted_at)
                self.ready.notify_all()
        self.sock.close()

    def take(self, client_port):
        with self.ready:
            if not self.ready.wait_for(lambda: client_port in self.connections, PATIENCE):
                raise Slip("the server accepted nothing")
            return self.connections.pop(client_port)

    def stop(self):
        self.closed = True
        self.thread.join(PATIENCE)


# ---- one run -----------------------------------------------------------------------------------------------------------


class Run:
    """One client connection and what is known of it. Scenarios are scripts over the methods of this class."""

    def __init__(self, world, listener, port, number):
        self.world = world
        self.listener = listener
        self.server_port = port
        self.number = number
        self.delay = int(world.delay * 1e9)
        self.keep_alive = int(world.keep_alive * 1e9)
        self.server_address = world.server_address
        self.client = None
        self.server = None
        self.client_port = 0
        self.exchanges = 0  # complete ones
        self.sent_bytes = 0  # by the client, all requests
        self.last_byte_at = None  # end of the last exchange: when the server wrote its answer, and when the client had it
        self.quiet_since = None
        self.truth = {
            "opened_at": None,
            "opened_at_wall": None,
            "exchange": 0,
            "request_bytes": 0,
            "server_read_bytes": 0,
            "server_unread_bytes": 0,
            "server_closed_at": None,
            "server_close_how": "none",
            "client_sent_at": None,
            "client_saw": None,
            "client_ended_at": None,
            "idle_ms": None,
        }

    # -- opening

    def begin_connect(self):
        self.client, self.client_port = self.world.client_socket()
        self.truth["opened_at"] = now_ns()
        self.truth["opened_at_wall"] = wall_time()

    def server_endpoint(self):
        return self.world.endpoint(self.server_address, self.server_port)

    def open(self):
        self.begin_connect()
        self.client.connect(self.server_endpoint())
        self.quiet_since = now_ns()
        self.server, self.last_byte_at = self.listener.take(self.client_port)

    # -- bytes

    def request(self, body=100):
        head = (
            f"POST /run/{self.number} HTTP/1.1\r\nHost: lab\r\nContent-Type: application/octet-stream\r\n"
            f"Content-Length: {body}\r\n\r\n"
        )
        return head.encode() + b"x" * body

    @staticmethod
    def response(body=20):
        return f"HTTP/1.1 200 OK\r\nContent-Length: {body}\r\n\r\n".encode() + b"y" * body

    @staticmethod
    def read(sock, size):
        got = 0
        while got < size:
            part = sock.recv(min(MIB, size - got))
            if not part:
                raise Slip(f"end of stream after {got} of {size} bytes")
            got += len(part)

    def send(self, data):
        """The client sends (a part of) the request of the exchange that is to fail, or that counts."""
        if self.truth["exchange"] != self.exchanges + 1:
            self.truth.update(exchange=self.exchanges + 1, request_bytes=0, server_read_bytes=0)
        self.truth["client_sent_at"] = now_ns()
        if self.quiet_since is not None:
            self.truth["idle_ms"] = round((self.truth["client_sent_at"] - self.quiet_since) / 1e6, 3)
            self.quiet_since = None
        self.client.sendall(data)
        self.sent_bytes += len(data)
        self.truth["request_bytes"] += len(data)

    def server_read(self, size):
        self.read(self.server, size)
        self.truth["server_read_bytes"] += size

    def answer(self, data):
        self.server.sendall(data)
        self.last_byte_at = now_ns()

    def client_read(self, size):
        self.read(self.client, size)
        self.quiet_since = now_ns()
        self.truth["client_saw"] = "response"

    def exchange(self, count=1, idle=0.0):
        """Complete exchanges, each after an idle time."""
        for _ in range(count):
            if idle:
                until(now_ns() + int(idle * 1e9))
            request, response = self.request(), self.response()
            self.send(request)
            self.server_read(len(request))
            self.answer(response)
            self.client_read(len(response))
            self.exchanges += 1

    def idle(self, duration=SHORT_IDLE):
        until(now_ns() + int(duration * 1e9))

    # -- the server's end

    def idle_timer(self):
        """When the server's idle timer fires: counted from its last answer, or from accept()."""
        return self.last_byte_at + self.keep_alive

    def server_ends(self, how, unread=0, closing=True):
        """close(), or shutdown(SHUT_WR) when not closing, after a look at what lies unread."""
        lying = unread_bytes(self.server)
        if how == "reset":
            set_reset_on_close(self.server)
        self.truth["server_closed_at"] = now_ns()
        if closing:
            self.server.close()
        else:
            self.server.shutdown(socket.SHUT_WR)
        if self.quiet_since is not None and self.truth["idle_ms"] is None:
            self.truth["idle_ms"] = round((self.truth["server_closed_at"] - self.quiet_since) / 1e6, 3)
        self.truth["server_close_how"] = how
        self.truth["server_unread_bytes"] = lying
        self.check(lying == unread, f"{lying} bytes lay unread in the server's socket, not {unread}")

    def timer_closes(self, how="fin"):
        """A harmless idle close: nothing is under way."""
        self.truth["idle_ms"] = None
        timer = self.idle_timer()
        until(timer)
        self.server_ends(how)
        self.truth["idle_ms"] = round((self.truth["server_closed_at"] - timer + self.keep_alive) / 1e6, 3)
        self.on_timer()

    def on_timer(self):
        late = self.truth["server_closed_at"] - self.idle_timer()
        self.check(late < self.keep_alive // 20, "the idle timer fired late")

    # -- the client's end

    def client_ends(self, *expected, patience=PATIENCE):
        """Reads until the connection's end, as a proxy that waits for its answer does."""
        self.client.settimeout(patience)
        try:
            data = self.client.recv(65536)
            saw = "response" if data else "eof"
        except ConnectionResetError:
            saw = "ECONNRESET"
        except BrokenPipeError:
            saw = "EPIPE"
        except TimeoutError:
            saw = "timeout"
        self.truth["client_saw"] = saw
        self.truth["client_ended_at"] = now_ns()
        self.check(saw in expected, f"the client saw {saw}, not {' or '.join(expected)}")

    def linger(self):
        """A proxy closes at once, or a little later, when the RST that follows a FIN has come: both must be known."""
        if self.number % 2 == 0:
            until(now_ns() + 4 * self.delay)

    # -- checks

    @staticmethod
    def check(good, why):
        if not good:
            raise Slip(why)

    def becomes(self, true, otherwise):
        deadline = now_ns() + int(PATIENCE * 1e9)
        while not true() and now_ns() < deadline:
            time.sleep(0.001)
        self.check(true(), otherwise)

    def client_state(self):
        return TcpInfo(self.client).state

    def check_not_ended(self):
        """Asked right after a send: the peer's FIN or RST had not arrived when the bytes left."""
        state = self.client_state()
        self.check(state == TCP_ESTABLISHED, f"the client's socket was in state {state} already when it sent")

    def check_acked(self, count):
        acked = TcpInfo(self.client).acked_bytes
        self.check(acked == count, f"{acked} of {self.sent_bytes} request bytes were acknowledged, not {count}")

    # -- shared scripts

    def spread(self):
        """From -delay/2 to +delay/2, another value for each run."""
        return (self.number % 5 - 2) * self.delay // 4

    def crossing(self, *parts, how="fin", saw="eof", says=b""):
        """The server ends the connection at its idle timer, or says something and ends it; the client's request is under way."""
        timer, send_at = self.idle_timer(), self.idle_timer() + self.spread()
        before = self.sent_bytes

        def send():
            until(send_at)
            for part in parts:
                self.send(part)
            self.check_not_ended()

        def close():
            until(timer)
            if says:
                self.server.sendall(says)
            self.server_ends(how)

        for act in (send, close) if send_at < timer else (close, send):
            act()
        self.client_ends(saw)
        if how == "fin":
            self.check_acked(before)
        self.on_timer()
        self.linger()

    def shakes_hands(self):
        """What TLS 1.3 looks like from outside; all of it belongs to the first exchange (RFC 8446 2, 5.1)."""
        for side, other, record, size in (
            (self.client, self.server, b"\x16\x03\x01", 512), (self.server, self.client, b"\x16\x03\x03", 3000),
            (self.client, self.server, b"\x14\x03\x03", 80), (self.server, self.client, b"\x17\x03\x03", 500),
        ):
            side.sendall(tls_record(record, size))
            self.read(other, size)
            self.sent_bytes += size if side is self.client else 0
        self.last_byte_at = self.quiet_since = now_ns()

    def closes_after_reading(self, how="fin", think=0.0):
        request = self.request()
        self.send(request)
        self.server_read(len(request))
        if think:
            until(now_ns() + int(think * 1e9))
        self.server_ends(how)
        self.client_ends("eof" if how == "fin" else "ECONNRESET")
        if how == "fin":
            self.check_acked(self.sent_bytes)

    def cut(self, sent):
        """A response stops after `sent` bytes, by RST."""
        self.exchange(self.number % 2)
        request, response = self.request(), self.response(2000)
        self.send(request)
        self.server_read(len(request))
        self.answer(response[:sent])
        self.client_read(sent)
        self.server_ends("reset")
        self.client_ends("ECONNRESET")

    def drop(self, direction, port):
        self.world.line.tell(f"drop {direction} port {port}")

    @contextlib.contextmanager
    def black_hole(self, direction="both"):
        """Nothing of this connection passes in that direction."""
        self.drop(direction, self.client_port)
        try:
            yield
        finally:
            self.drop("none", self.client_port)

    def into_silence(self, patience, ends=None):
        """A request into a black hole, until the client's patience or its kernel's has an end."""
        self.exchange(1 + self.number % 2)
        self.idle(LONG_IDLE)
        before = self.sent_bytes
        with self.black_hole():
            self.send(self.request())
            self.client_ends("timeout", patience=patience)
            self.check_acked(before)
            self.check(TcpInfo(self.client).total_retransmits > 1, "the request was not retransmitted")
            (ends or self.client.close)()

    def finish(self):
        for sock in (self.client, self.server):
            if sock is not None:
                sock.close()

    def row(self, scenario, phase, slipped):
        row = {
            "scenario": scenario.name,
            "run": self.number,
            "phase": phase,
            "family": self.world.family_name,
            "client_address": self.world.client_address,
            "client_port": self.client_port,
            "server_address": self.server_address,
            "server_port": self.server_port,
            "keep_alive_ms": round(self.keep_alive / 1e6, 3),
            "stall_ms": round(scenario.stall / 1e6, 3),
            "expected": None if phase == "learn" else scenario.expected,
        }
        if scenario.accept_variants and phase == "run":
            row["accept_variants"] = scenario.accept_variants
        if slipped:
            row["slipped"] = slipped
            row["expected"] = {"anything": True}
            row.pop("accept_variants", None)
        row.update(self.truth)
        return row


# ---- the scenarios -----------------------------------------------------------------------------------------------------

SCENARIOS = {}
UNCLASSIFIED = {"unclassified": True}


class Scenario:
    def __init__(self, play, expected, accept_variants, needs_line, learn, listens, stall):
        self.name = play.__name__
        self.play = play
        self.expected = expected
        self.accept_variants = accept_variants
        self.needs_line = needs_line
        self.learn = learn
        self.listens = listens
        self.stall = stall


def scenario(expected, accept=None, line=False, learn=True, listens=True, stall=STALL):
    def register(play):
        SCENARIOS[play.__name__] = Scenario(play, expected, accept, line, learn, listens, stall)
        return play

    return register


def cause(name, variant=None, certainty=None):
    expected = {"cause": name, "variant": variant}
    if certainty:
        expected["certainty"] = certainty
    return expected


def tls_record(start, size):
    return start + (size - 5).to_bytes(2, "big") + b"t" * (size - 5)


def race(variant, certainty=None):
    return cause("keepalive_race", variant, certainty)


@scenario(race("fin_crossed", "proven"), line=True)
def race_fin_crossed(run):
    """A request on a reused connection crosses the FIN of the server's idle close."""
    run.open()
    run.exchange(1 + run.number % 3)
    run.crossing(run.request())


@scenario(race("fin_crossed", "proven"), line=True)
def race_fin_crossed_multi_segment(run):
    """The same with a request of three segments."""
    run.open()
    run.exchange()
    run.crossing(run.request(body=3600))


@scenario(race("fin_crossed", "proven"), line=True)
def race_fin_crossed_preconnected(run):
    """The first request on a connection that was opened ahead and sat idle."""
    run.open()
    run.crossing(run.request())


@scenario(race("fin_crossed", "proven"), line=True)
def race_fin_crossed_pipelined(run):
    """Two requests, one after the other without an answer between, cross the FIN."""
    run.open()
    run.exchange()
    run.crossing(run.request(), run.request())


@scenario(race("reset_unread"))
def race_reset_unread(run):
    """The request lies unread in the server's socket when its idle timer fires: close() then sends RST with ACK."""
    run.open()
    run.exchange(1 + run.number % 3)
    request, timer = run.request(), run.idle_timer()
    until(timer - run.delay * (6 + run.number % 3) // 4)
    run.send(request)
    until(timer)
    run.server_ends("reset" if run.number % 4 == 3 else "fin", unread=len(request))
    run.truth["server_close_how"] = "reset"  # unread bytes turn the FIN of close() into an RST
    run.client_ends("ECONNRESET")
    run.on_timer()


@scenario(race("reset_closed"), line=True)
def race_reset_closed(run):
    """The server's end of the connection is gone and its RST was lost: the request is answered by a bare RST."""
    run.open()
    run.exchange(1 + run.number % 2)
    timer = run.idle_timer()
    until(timer - run.delay)
    with run.black_hole("right-to-left"):
        until(timer)
        run.server_ends("reset")
        until(run.truth["server_closed_at"] + run.delay)
    until(timer + (4 + run.number % 4) * run.delay // 2)
    run.check(run.client_state() == TCP_ESTABLISHED, "the server's RST was not lost")
    run.send(run.request())
    run.client_ends("ECONNRESET")
    run.on_timer()


@scenario(race("reset_crossed"), line=True)
def race_reset_crossed(run):
    """The server resets at its idle timer, and that RST crosses the request."""
    run.open()
    run.exchange(1 + run.number % 3)
    run.crossing(run.request(), how="reset", saw="ECONNRESET")


@scenario(race("fin_lingering"))
def race_fin_lingering(run):
    """shutdown(SHUT_WR) at the idle timer, the request unread in the kernel: the FIN acknowledges what nobody handles."""
    run.open()
    run.exchange(1 + run.number % 3)
    request, timer = run.request(), run.idle_timer()
    until(timer - run.delay * (10 + run.number % 3) // 8)
    run.send(request)
    until(timer)
    run.server_ends("fin", unread=len(request), closing=False)
    run.read(run.server, len(request))  # lingering close: read and discard
    run.client_ends("eof")
    run.check_acked(run.sent_bytes)
    run.on_timer()
    run.client.close()
    run.check(run.server.recv(1) == b"", "the client sent more")


@scenario(race("fin_crossed", "proven"), line=True)
def race_fin_crossed_tls(run):
    """TLS as it looks from outside: the handshake is no exchange, and a farewell (close_notify) before the FIN no answer."""
    run.open()
    run.shakes_hands()
    if run.number % 2:
        request, response = tls_record(b"\x17\x03\x03", 200), tls_record(b"\x17\x03\x03", 300)
        run.send(request)
        run.server_read(len(request))
        run.answer(response)
        run.client_read(len(response))
        run.exchanges += 1
    run.crossing(tls_record(b"\x17\x03\x03", 200), saw="response", says=tls_record(b"\x17\x03\x03", 24))


@scenario(cause("stale_response", certainty="proven"), line=True)
def stale_response(run):
    """The server says 408 as its idle timer fires, and closes; the request that crosses it takes that for its answer."""
    run.open()
    run.exchange(1 + run.number % 3)
    run.crossing(run.request(), saw="response", says=b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")


@scenario(cause("stale_reuse"))
def stale_reuse(run):
    """The client's kernel has had the FIN for 5, 50 or 300 ms when the client sends."""
    run.open()
    run.exchange(1 + run.number % 2)
    until(run.idle_timer())
    run.server_ends("fin")
    run.becomes(lambda: run.client_state() == TCP_CLOSE_WAIT, "the FIN had not arrived")
    run.idle((0.005, 0.05, 0.3)[run.number % 3])
    run.check(run.client_state() == TCP_CLOSE_WAIT, "the FIN had not arrived")
    run.send(run.request())
    run.client_ends("eof", "EPIPE")
    run.on_timer()
    run.linger()


@scenario(cause("upstream_closed"))
def closed_first_exchange(run):
    """The server reads the first request and closes without an answer."""
    run.open()
    run.closes_after_reading()


@scenario(cause("handshake_failed", certainty="proven"))
def handshake_unanswered(run):
    """TLS to a server that does not speak it: it reads the first part of the handshake and closes."""
    run.open()
    hello = tls_record(b"\x16\x03\x01", 512)
    run.send(hello)
    run.server_read(len(hello))
    run.server_ends("fin")
    run.client_ends("eof")


@scenario(cause("upstream_closed"))
def closed_reused(run):
    """The same on exchange 3, idle far below the timer."""
    run.open()
    run.exchange(2, idle=SHORT_IDLE)
    run.idle()
    run.closes_after_reading()


@scenario(cause("upstream_closed"))
def closed_after_think(run):
    """The server reads the request, thinks for 300 ms and closes."""
    run.open()
    run.exchange(run.number % 2)
    run.idle()
    run.closes_after_reading(think=0.3)


@scenario(cause("upstream_closed", "on_accept"), line=True)
def closed_on_accept(run):
    """The server closes what it accepts; the first request crosses on a connection one round trip old: no race."""
    run.open()
    run.server_ends("fin")
    run.send(run.request())
    run.check_not_ended()
    run.client_ends("eof")
    run.check_acked(0)
    run.check(run.truth["server_closed_at"] - run.truth["opened_at"] < 4 * run.delay + LATE, "the server closed late")
    run.linger()


@scenario(cause("upstream_closed"))
def closed_last_byte(run):
    """The request's last byte comes late, the server reads it and closes: the pair of fin_all_but_last_byte."""
    run.open()
    run.exchange()
    run.idle()
    request = run.request()
    run.send(request[:-1])
    run.server_read(len(request) - 1)
    run.send(request[-1:])
    run.server_read(1)
    run.server_ends("fin")
    run.client_ends("eof")
    run.check_acked(run.sent_bytes)


@scenario(cause("upstream_reset"))
def reset_first_exchange(run):
    """The server reads the first request and aborts (SO_LINGER 0)."""
    run.open()
    run.closes_after_reading("reset")


@scenario(cause("upstream_reset"))
def reset_first_unread(run):
    """The server closes with the first request unread: RST, but on a fresh connection no race."""
    run.open()
    request = run.request()
    run.send(request)
    for _ in range(1000):
        if unread_bytes(run.server) == len(request):
            break
        time.sleep(0.001)
    run.server_ends("reset", unread=len(request))
    run.client_ends("ECONNRESET")


@scenario(cause("upstream_reset"))
def reset_reused(run):
    """The server reads the third request and aborts, idle far below the timer."""
    run.open()
    run.exchange(2, idle=SHORT_IDLE)
    run.idle()
    run.closes_after_reading("reset")


@scenario(cause("response_cut"))
def cut_by_reset(run):
    """Half the response, then RST."""
    run.open()
    run.cut(1000)


@scenario(cause("response_cut"))
def cut_one_byte(run):
    """One byte of the response, then RST."""
    run.open()
    run.cut(1)


@scenario(cause("path_dropped", "gave_up", "likely"), line=True, stall=LONG_STALL)
def silence_until_client_gives_up(run):
    """The path has dropped the connection; the client closes after 1.3 s."""
    run.open()
    run.into_silence(1.3)


@scenario(cause("path_dropped", "gave_up"), line=True, stall=LONG_STALL)
def silence_until_client_shuts_down(run):
    """The client gives up by shutdown(), as Varnish does; the path heals before its close(), or after."""
    run.open()
    run.into_silence(1.3, ends=lambda: run.client.shutdown(socket.SHUT_RDWR))
    if run.number % 2:
        run.client.close()
    run.becomes(lambda: unread_bytes(run.server) > 0, "the path did not heal")
    run.truth["client_ended_at"] = now_ns()  # until a retransmission came through, its kernel went on
    run.client.close()


@scenario(cause("path_dropped", certainty="likely"), line=True, stall=LONG_STALL)
def silence_until_kernel_gives_up(run):
    """The same, but it is the client's kernel that ends it (TCP_USER_TIMEOUT)."""
    run.open()
    run.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1200)
    run.into_silence(PATIENCE)


@scenario(cause("path_dropped", certainty="likely"), line=True, stall=LONG_STALL)
def silence_until_bare_reset(run):
    """The server's end goes while the path is silent; when it speaks again, a retransmission meets no socket."""
    run.open()
    run.exchange(1 + run.number % 2)
    run.idle(LONG_IDLE)
    with run.black_hole():
        run.send(run.request())
        run.server_ends("reset")
        until(run.truth["client_sent_at"] + int(1.1e9))
    run.client_ends("ECONNRESET")


@scenario(cause("path_dropped", "unanswered_probes"), line=True)
def silence_after_acknowledgement(run):
    """The server's kernel has the request; then the path is silent, to keep-alive probes too."""
    run.open()
    run.client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
        run.client.setsockopt(socket.IPPROTO_TCP, option, 1)
    run.exchange(1 + run.number % 2)
    run.idle()
    request = run.request()
    run.send(request)
    run.server_read(len(request))
    until(now_ns() + 2 * run.delay + LATE)
    run.check_acked(run.sent_bytes)
    with run.black_hole():
        run.client_ends("timeout")
        run.client.close()


@scenario(UNCLASSIFIED)
def acknowledged_then_given_up(run):
    """The server has the request and thinks; the client closes after 1.3 s: the pair of silence_until_client_gives_up."""
    run.open()
    run.exchange(1 + run.number % 2)
    run.idle()
    request = run.request()
    run.send(request)
    run.server_read(len(request))
    run.client_ends("timeout", patience=1.3)
    run.check_acked(run.sent_bytes)


@scenario(cause("connect_refused"), learn=False, listens=False)
def connect_refused(run):
    """Nobody listens."""
    run.begin_connect()
    try:
        run.client.connect(run.server_endpoint())
        raise Slip("somebody listened")
    except ConnectionRefusedError:
        run.truth["client_saw"] = "refused"


EARLY = int(0.4e9)  # nanoseconds; whoever gives up sooner has not found that nobody answers


def abandon_connect(run, patience):
    run.begin_connect()
    run.client.setblocking(False)
    run.check(run.client.connect_ex(run.server_endpoint()) == errno.EINPROGRESS, "connect() did not wait")
    until(now_ns() + int(patience * 1e9))
    info = TcpInfo(run.client)
    run.check(info.state == TCP_SYN_SENT, f"the client's socket was in state {info.state}")
    run.truth["client_saw"] = "timeout"
    return info.total_retransmits


@scenario(cause("connect_unreachable"), line=True, learn=False, listens=False)
def connect_unreachable(run):
    """A router on the way lets the SYN go no further (its hops are used up) and says so."""
    run.server_address = run.world.address_behind()
    run.begin_connect()
    if run.world.family_name == "6":
        run.client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 1)
    else:
        run.client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
    try:
        run.client.connect(run.server_endpoint())
        raise Slip("somebody listened")
    except OSError as error:
        run.check(error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH), f"connect() failed otherwise: {error}")
    run.truth.update(client_saw="unreachable", client_ended_at=now_ns())
    # One ICMP error is lost on a socket that its process has locked: a later SYN meets the next. And after half a second an
    # ICMP error looks to cgroup like a process that gave up.
    run.check(run.truth["client_ended_at"] - run.truth["opened_at"] < EARLY, "the first SYN's answer got lost, or was late")


@scenario(cause("connect_timeout"), line=True, learn=False, listens=False)
def connect_timeout(run):
    """SYNs into a black hole, at least one retransmitted, until the client gives up."""
    run.drop("left-to-right", run.server_port)
    retransmits = abandon_connect(run, CONNECT_PATIENCE)
    run.check(retransmits > 0, "no SYN was retransmitted")


@scenario(UNCLASSIFIED, line=True, learn=False, listens=False)
def connect_abandoned(run):
    """The client gives up its connect after 100 ms: too early to say anything of the upstream."""
    run.drop("left-to-right", run.server_port)
    retransmits = abandon_connect(run, 0.1)
    run.client.close()
    run.check(retransmits == 0, "the SYN was retransmitted")
    run.check(now_ns() - run.truth["opened_at"] < EARLY, "it waited for too long")


@scenario(race("fin_crossed", "likely"), line=True)
def fin_all_but_last_byte(run):
    """The server has read all of the request but its last byte, which crosses its close."""
    run.open()
    run.exchange()
    request, timer = run.request(), run.idle_timer()
    until(timer - 3 * run.delay)
    begun = now_ns()
    run.send(request[:-1])
    run.server_read(len(request) - 1)
    run.crossing(request[-1:])
    run.check(run.truth["server_closed_at"] - begun < 3 * run.delay + LATE, "the request took too long for one flight")


@scenario(cause("request_rejected", certainty="likely"), line=True, stall=LONG_STALL)
def body_10mb_interrupted(run):
    """The server reads 1 MB of a request of 10 MB and closes, with more on its way; the client goes on until it can't."""
    run.open()
    run.exchange()
    run.idle()
    request = memoryview(run.request(body=10_000_000))
    run.send(b"")
    run.client.setblocking(False)
    deadline = now_ns() + int(PATIENCE * 1e9)
    sent = departed = 0
    asked_at = now_ns()
    on_its_way_until = 0
    while run.truth["server_read_bytes"] < MIB or not on_its_way_until:
        run.check(now_ns() < deadline, "the body did not move")
        _, writable, _ = select.select([], [run.client] if sent < len(request) else [], [], run.delay / 4e9)
        lying = unread_bytes(run.server)
        if lying > 1:  # what is unread as it closes makes that a reset
            run.truth["server_read_bytes"] += len(run.server.recv(lying - 1))
        if writable:
            sent += run.client.send(request[sent : sent + 65536])
        # A window that was shut, or a late thread, leaves nothing on its way: then all that was sent is acknowledged.
        earlier, since, asked_at = departed, asked_at, now_ns()
        departed = sent - unsent_bytes(run.client)
        run.check(departed < len(request), "the whole body has left")
        on_its_way_until = since + run.delay if departed > earlier and asked_at < since + run.delay // 2 else 0
    # Bytes still on the wire are unread bytes as well once they arrive, so there is no exact count to ask for.
    run.truth["server_unread_bytes"] = unread_bytes(run.server)
    # How much had been written by then depends on buffers.
    run.truth.update(server_closed_at=now_ns(), server_close_how="reset", request_bytes=0)
    run.server.close()
    run.check(now_ns() < on_its_way_until, "the last that was on its way may have arrived before the close")
    while now_ns() < deadline:
        _, writable, _ = select.select([], [run.client], [], 1.0)
        if not writable:
            continue
        try:
            sent += run.client.send(request[sent : sent + 65536])
        except ConnectionResetError:
            run.truth["client_saw"] = "ECONNRESET"
            break
        except BrokenPipeError:
            run.truth["client_saw"] = "EPIPE"
            break
        run.check(sent < len(request), "the whole body was taken")
    run.check(run.truth["client_saw"] in ("ECONNRESET", "EPIPE"), "the client saw no reset")
    run.sent_bytes += sent


@scenario(None)
def half_closed_answered(run):
    """The client half-closes after its request and gets its answer."""
    run.open()
    run.exchange(run.number % 2)
    request, response = run.request(), run.response()
    run.send(request)
    run.client.shutdown(socket.SHUT_WR)
    run.server_read(len(request))
    run.check(run.server.recv(1) == b"", "the client sent more")
    run.answer(response)
    run.server_ends("fin")
    run.client_read(len(response))
    run.client_ends("eof")
    run.truth["client_saw"] = "response"


@scenario(UNCLASSIFIED)
def half_closed_unanswered(run):
    """The client half-closes after its request; the server reads to the end and closes without a word, as it may do then."""
    run.open()
    run.exchange(run.number % 2)
    request = run.request()
    run.send(request)
    run.client.shutdown(socket.SHUT_WR)
    run.server_read(len(request))
    run.check(run.server.recv(1) == b"", "the client sent more")
    run.server_ends("fin")
    run.client_ends("eof")


@scenario(None)
def pipelined_answered(run):
    """Two requests in a row, both answered."""
    run.open()
    run.exchange()
    request, response = run.request(), run.response()
    run.send(request)
    run.send(request)
    run.server_read(2 * len(request))
    run.answer(response)
    run.answer(response)
    run.client_read(2 * len(response))
    run.exchanges += 2


@scenario(None)
def body_after_answer(run):
    """The server answers a request's head with 413 and closes; the client writes the small body all the same."""
    run.open()
    run.exchange(run.number % 2)
    request = run.request()
    head = request.index(b"\r\n\r\n") + 4
    answer = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    run.send(request[:head])
    run.server_read(head)
    run.answer(answer)
    run.server_ends("fin")
    run.client_read(len(answer))
    run.becomes(lambda: run.client_state() == TCP_CLOSE_WAIT, "the FIN had not arrived")
    run.idle((0.0, 0.02, 0.3)[run.number % 3])
    run.send(request[head:])
    run.client_ends("eof", "EPIPE", "ECONNRESET")
    run.truth["client_saw"] = "response"
    run.linger()


@scenario(None)
def response_one_byte_then_fin(run):
    """A response of one byte, then FIN: nothing known to be wrong."""
    run.open()
    run.exchange(run.number % 2)
    request = run.request()
    run.send(request)
    run.server_read(len(request))
    run.answer(b"y")
    run.server_ends("fin")
    run.client_read(1)
    run.client_ends("eof")
    run.truth["client_saw"] = "response"


@scenario(None)
def idle_close(run):
    """The server's idle timer closes, nothing under way."""
    run.open()
    run.exchange(1 + run.number % 3)
    run.timer_closes()
    run.client_ends("eof")


@scenario(None)
def idle_close_reset(run):
    """The same by RST."""
    run.open()
    run.exchange(1 + run.number % 3)
    run.timer_closes("reset")
    run.client_ends("ECONNRESET")


@scenario(None)
def idle_close_local(run):
    """The client closes an idle connection."""
    run.open()
    run.exchange(1 + run.number % 3)
    run.idle(0.3)
    run.client.close()
    run.check(run.server.recv(1) == b"", "the client sent more")


@scenario(None)
def complete_close(run):
    """The response, then FIN at once."""
    run.open()
    run.exchange(run.number % 2)
    request, response = run.request(), run.response()
    run.send(request)
    run.server_read(len(request))
    run.answer(response)
    run.server_ends("fin")
    run.client_read(len(response))
    run.client_ends("eof")
    run.truth["client_saw"] = "response"


@scenario(None)
def never_used(run):
    """A connection without any byte, closed by the server's timer."""
    run.open()
    run.timer_closes()
    run.client_ends("eof")


@scenario(None)
def healthy(run):
    """Twenty exchanges, then the client closes."""
    run.open()
    run.exchange(20)
    run.client.close()
    run.check(run.server.recv(1) == b"", "the client sent more")


def learn(run):
    """One exchange, then the server's idle timer closes: what an idle timeout is learned from."""
    run.open()
    run.exchange()
    run.timer_closes()
    run.client_ends("eof")


# ---- playing them all --------------------------------------------------------------------------------------------------


class Tally:
    def __init__(self):
        self.kept = self.slipped = self.failed = 0
        self.reasons = {}


class Pulse:
    """Notes when nobody ran, as on an emulated machine whose host was busy: no socket shows that, and it moves every accident."""

    BEAT = 0.01

    def __init__(self, stopping):
        self.stopping = stopping
        self.longest = 0
        self.stalls = []  # (when it was over, how long it was), ns
        self.beat_at = now_ns()
        threading.Thread(target=self.beat, daemon=True).start()

    def beat(self):
        while not self.stopping.is_set():
            self.beat_at = now_ns()
            time.sleep(self.BEAT)
            late = self.late()
            self.longest = max(self.longest, late)
            if late > STALL:
                self.stalls.append((now_ns(), late))

    def late(self):
        return now_ns() - self.beat_at - int(self.BEAT * 1e9)

    def check(self, since, most):
        if self.late() > most or any(at > since and late > most for at, late in self.stalls):
            raise Slip("the machine stood still")


class Gate:
    """How many runs may be under way: fewer after each slip, slowly more again, so that a slow machine keeps its timing."""

    def __init__(self, most):
        self.most = self.limit = most
        self.active = 0
        self.changed = threading.Condition()

    def __enter__(self):
        with self.changed:
            self.changed.wait_for(lambda: self.active < self.limit)
            self.active += 1

    def __exit__(self, *_):
        with self.changed:
            self.active -= 1
            self.changed.notify_all()

    def note(self, slipped):
        with self.changed:
            if slipped:
                self.limit = max(min(self.most, LEAST_PARALLEL), self.limit * 0.8)
            else:
                self.limit = min(self.most, self.limit + 0.25)


class Lab:
    def __init__(self, options, world, names, truth):
        self.options, self.world, self.truth = options, world, truth
        self.names = names
        self.ports = {name: options.port_base + index for index, name in enumerate(SCENARIOS)}
        self.tallies = {name: Tally() for name in names}
        self.lock = threading.Lock()
        self.gate = Gate(options.parallel)
        self.stopping = threading.Event()
        self.pulse = Pulse(self.stopping)
        self.failure = None
        self.listeners = {
            name: Listener(world, self.ports[name]) for name in names if SCENARIOS[name].listens
        }

    def attempt(self, run, script, stall):
        """None, or why it slipped."""
        begun = now_ns()
        try:
            script(run)
            self.pulse.check(begun, stall)
        except Slip as reason:
            return str(reason)
        except OSError as error:
            if run.client is None:
                raise
            return f"{type(error).__name__}: {error}"
        finally:
            run.finish()
        return None

    def play(self, name, number, phase):
        chosen = SCENARIOS[name]
        script = learn if phase == "learn" else chosen.play
        for _ in range(MAX_ATTEMPTS):
            if self.stopping.is_set():
                return
            run = Run(self.world, self.listeners.get(name), self.ports[name], number)
            with self.gate:
                slipped = self.attempt(run, script, STALL if phase == "learn" else chosen.stall)
            self.gate.note(slipped)
            row = json.dumps(run.row(chosen, phase, slipped))
            with self.lock:
                self.truth.write(row + "\n")
                self.truth.flush()
                tally = self.tallies[name]
                if slipped is None:
                    tally.kept += 1
                else:
                    tally.slipped += 1
                    tally.reasons[slipped] = tally.reasons.get(slipped, 0) + 1
            if slipped is None:
                return
        with self.lock:
            self.tallies[name].failed += 1

    def work(self, jobs, pause):
        try:
            enter_namespace(self.world.left)
            time.sleep(pause)
            while not self.stopping.is_set():
                try:
                    job = jobs.get_nowait()
                except queue.Empty:
                    return
                self.play(*job)
                time.sleep(0.001)  # what a thread does without having slept is taken for one piece of work: for another try
        except Exception as error:  # a worker's end must not pass unseen: the lab fails with it
            self.failure = error
            self.stopping.set()

    def play_all(self, jobs):
        waiting = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        count = min(self.options.parallel, len(jobs))
        workers = []
        for index in range(count):
            # Spread over one idle time, so that the timers of parallel runs do not all fire at one instant.
            pause = self.world.keep_alive * index / max(count, 1)
            workers.append(threading.Thread(target=self.work, args=(waiting, pause), daemon=True))
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(0.5)
        if self.failure:
            raise self.failure

    def play_scenarios(self):
        # Closes at one instant teach as much as one: a scenario's own are apart.
        learning = [
            (name, number, "learn")
            for number in range(LEARN_CONNECTIONS)
            for name in self.names
            if SCENARIOS[name].learn
        ]
        runs = [(name, number, "run") for name in self.names for number in range(self.options.runs)]
        random.Random(self.options.seed).shuffle(runs)
        if learning:
            self.play_all(learning)
        self.play_all(runs)

    def stop(self):
        self.stopping.set()
        for listener in self.listeners.values():
            listener.closed = True
        for listener in self.listeners.values():
            listener.stop()
        if self.world.line:
            self.world.line.tell("drop none")

    def summary(self):
        for name in self.names:
            tally = self.tallies[name]
            print(f"{name:32} kept {tally.kept:5}  slipped {tally.slipped:4}  failed {tally.failed:3}", file=sys.stderr)
            for reason, count in sorted(tally.reasons.items()):
                print(f"    slipped {count} times: {reason}", file=sys.stderr)
        totals = [sum(getattr(tally, field) for tally in self.tallies.values()) for field in ("kept", "slipped", "failed")]
        print(f"lab: nobody ran for {self.pulse.longest / 1e6:.0f} ms at most", file=sys.stderr)
        print(f"lab: {totals[0]} connections kept, {totals[1]} slipped and repeated, {totals[2]} failed", file=sys.stderr)
        return totals[2] == 0


def choose(options):
    if options.scenario == "all":
        return [name for name, chosen in SCENARIOS.items() if not (options.local and chosen.needs_line)]
    names = options.scenario.split(",")
    for name in names:
        if name not in SCENARIOS:
            raise UsageError(f"--scenario {name}: unknown: use all, or one or more of (with commas): {', '.join(SCENARIOS)}")
        if options.local and SCENARIOS[name].needs_line:
            raise UsageError(f"--scenario {name} needs a delay line: leave --local out")
    return names


def list_scenarios():
    for name, chosen in SCENARIOS.items():
        expected = json.dumps(chosen.expected) if chosen.expected else "no verdict"
        print(f"{name:32} {expected}{'' if chosen.needs_line else '  (also --local)'}\n    {chosen.play.__doc__}")


def addresses(options):
    if options.local:
        return ("::1", "::1") if options.family == "6" else ("127.0.0.1", "127.0.0.1")
    if options.family == "6":
        return (os.environ.get("FINRACE_LEFT_ADDRESS6", "fd77::1"), os.environ.get("FINRACE_RIGHT_ADDRESS6", "fd77::2"))
    return (os.environ.get("FINRACE_LEFT_ADDRESS", "10.77.0.1"), os.environ.get("FINRACE_RIGHT_ADDRESS", "10.77.0.2"))


def run_lab(options):
    names = choose(options)
    own = None
    if options.local:
        left = right = line = None
    elif options.left or options.right or options.control:
        if not (options.left and options.right and options.control):
            raise UsageError("--left, --right and --control belong together: give all three, or none to start a delay line")
        left, right, line = options.left, options.right, Line(options.control)
        line.tell(f"delay {options.delay * 1000:g}ms")
    else:
        own = OwnLine(options.delay_line, options.delay)
        left, right, line = own.left, own.right, Line(own.control)
    try:
        with open(options.truth, "w", encoding="utf-8") as truth:
            lab = Lab(options, World(options, left, right, line, addresses(options)), names, truth)
            try:
                lab.play_scenarios()
            finally:
                lab.stop()
            return 0 if lab.summary() else 1
    finally:
        if own:
            own.stop()


# ---- lab.py serve: an HTTP server whose idle close has a chosen manner ---------------------------------------------------

MAX_HEAD = 65536
DRAIN = 2.0  # seconds of a lingering close


class Peer:
    def __init__(self, sock, address):
        self.sock = sock
        self.address = address
        self.buffer = bytearray()
        self.out = bytearray()
        self.body_left = 0
        self.in_body = False
        self.exchanges = 0
        self.bytes_read = 0
        self.quiet_since = now_ns()  # of the idle time
        self.timer = 0  # the valid entry of the heap; an older one is void
        self.pending = 0  # answers that wait for --delay-answer
        self.draining = False
        self.end_at = None
        self.drained = 0
        self.last = False  # the client asked for Connection: close


class Server:
    """HTTP/1.1 with keep-alive on one thread: enough for a proxy's upstream, and nothing more."""

    def __init__(self, options, log):
        self.options, self.log = options, log
        self.keep_alive = int(options.keep_alive * 1e9)
        self.selector = selectors.DefaultSelector()
        self.timers = []
        self.order = 0
        self.stopping = False
        family = socket.AF_INET6 if ":" in options.address else socket.AF_INET
        self.listener = socket.socket(family, socket.SOCK_STREAM)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((options.address, options.port))
        self.listener.listen(4096)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)

    def set_timer(self, peer, due, act):
        self.order += 1
        if act in (self.on_idle, self.on_drained):
            peer.timer = self.order
        heapq.heappush(self.timers, (due, self.order, peer, act))

    def start_idle(self, peer):
        peer.quiet_since = now_ns()
        self.set_timer(peer, peer.quiet_since + self.keep_alive, self.on_idle)

    def report(self, peer, by, how, unread):
        row = {
            "event": "close",
            "at": now_ns(),
            "wall": wall_time(),
            "client_address": peer.address[0],
            "client_port": peer.address[1],
            "server_port": self.options.port,
            "by": by,
            "how": how,
            "idle_ms": round((now_ns() - peer.quiet_since) / 1e6, 3),
            "exchanges": peer.exchanges,
            "read_bytes": peer.bytes_read,
            "unread_bytes": unread,
        }
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()

    def drop(self, peer):
        peer.timer = -1
        try:
            self.selector.unregister(peer.sock)
        except (KeyError, ValueError):
            pass
        peer.sock.close()

    def on_idle(self, peer):
        unread = unread_bytes(peer.sock)
        mode = self.options.mode
        if mode == "reset":
            set_reset_on_close(peer.sock)
        how = "reset" if mode == "reset" or (mode == "fin" and unread) else "fin"
        self.report(peer, "timer", how, unread)
        if mode != "lingering":
            self.drop(peer)
            return
        peer.draining = True
        try:
            peer.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.drop(peer)
            return
        self.set_timer(peer, now_ns() + int(DRAIN * 1e9), self.on_drained)

    def on_drained(self, peer):
        self.drop(peer)

    def on_answer(self, peer):
        body = f"read {peer.bytes_read}\n".encode()
        ending = b"Connection: close\r\n" if peer.last else b""
        peer.out += b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n" + ending
        peer.out += f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        peer.pending -= 1
        peer.exchanges += 1
        self.flush(peer)

    def flush(self, peer):
        while peer.out:
            try:
                sent = peer.sock.send(peer.out)
            except BlockingIOError:
                self.selector.modify(peer.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, peer)
                return
            except OSError:
                self.report(peer, "peer", "reset", 0)
                self.drop(peer)
                return
            del peer.out[:sent]
        self.selector.modify(peer.sock, selectors.EVENT_READ, peer)
        if peer.pending:
            return
        if peer.last:
            self.report(peer, "request", "fin", 0)
            self.drop(peer)
        elif not peer.in_body and not peer.buffer:
            self.start_idle(peer)

    def request_done(self, peer):
        peer.in_body = False
        peer.pending += 1
        self.set_timer(peer, now_ns() + int(self.options.delay_answer * 1e9), self.on_answer)

    def parse(self, peer):
        while True:
            if peer.in_body:
                take = min(peer.body_left, len(peer.buffer))
                del peer.buffer[:take]
                peer.body_left -= take
                if peer.body_left:
                    return True
                self.request_done(peer)
            end = peer.buffer.find(b"\r\n\r\n")
            if end < 0:
                return len(peer.buffer) <= MAX_HEAD
            head = bytes(peer.buffer[:end]).decode("latin-1").split("\r\n")
            del peer.buffer[: end + 4]
            headers = {}
            for field in head[1:]:
                key, _, value = field.partition(":")
                headers[key.strip().lower()] = value.strip()
            length = headers.get("content-length", "0")
            if "transfer-encoding" in headers or not length.isdigit() or len(head[0].split(" ")) != 3:
                return False
            connection = headers.get("connection", "").lower()
            old = head[0].endswith("HTTP/1.0")
            peer.last = "close" in connection or (old and "keep-alive" not in connection)
            peer.body_left = int(length)
            peer.in_body = True

    def on_readable(self, peer):
        try:
            data = peer.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            if not peer.draining:
                self.report(peer, "peer", "reset", 0)
            self.drop(peer)
            return
        if not data:
            if not peer.draining:
                self.report(peer, "peer", "fin", 0)
            self.drop(peer)
            return
        if peer.draining:
            return  # read and discard
        peer.timer = -1
        peer.bytes_read += len(data)
        peer.buffer += data
        if not self.parse(peer):
            self.report(peer, "bad_request", "fin", 0)
            self.drop(peer)

    def accept(self):
        for _ in range(64):
            try:
                sock, address = self.listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = Peer(sock, address)
            self.selector.register(sock, selectors.EVENT_READ, peer)
            self.start_idle(peer)

    def serve(self):
        while not self.stopping:
            timeout = 0.5
            if self.timers:
                timeout = min(timeout, max(0.0, (self.timers[0][0] - now_ns()) / 1e9))
            for key, events in self.selector.select(timeout):
                if key.data is None:
                    self.accept()
                    continue
                if events & selectors.EVENT_WRITE:
                    self.flush(key.data)
                if events & selectors.EVENT_READ and key.data.sock.fileno() >= 0:
                    self.on_readable(key.data)
            while self.timers and self.timers[0][0] <= now_ns():
                _, order, peer, act = heapq.heappop(self.timers)
                if peer.sock.fileno() >= 0 and (act == self.on_answer or peer.timer == order):
                    act(peer)


def run_server(options):
    enter_namespace(options.namespace)
    log = open(options.log, "w", encoding="utf-8") if options.log else sys.stdout
    try:
        server = Server(options, log)
    except OSError as error:
        raise UsageError(f"listen on {options.address} port {options.port}: {error.strerror}") from error

    def stop(*_):
        server.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print(f"serving {options.address} port {options.port}: idle close by {options.mode}", file=sys.stderr, flush=True)
    server.serve()
    return 0


# ---- command line ------------------------------------------------------------------------------------------------------


def server_arguments():
    parser = argparse.ArgumentParser(prog="lab.py serve", description="HTTP/1.1 keep-alive server with a chosen idle close.")
    parser.add_argument("--address", default="0.0.0.0", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--namespace", help="network namespace to listen in")
    parser.add_argument("--mode", choices=("fin", "lingering", "reset"), default="fin", help="how an idle connection ends")
    parser.add_argument("--keep-alive", type=seconds, default=1.0, help="idle timer (default 1s)")
    parser.add_argument("--delay-answer", type=seconds, default=0.0, help="time that each answer takes")
    parser.add_argument("--log", help="file for one JSON line a close (default: standard output)")
    return parser


def lab_arguments():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(
        prog="lab.py",
        description="Causes each accident on purpose and logs the truth. `lab.py serve --help`: the HTTP server.",
    )
    parser.add_argument("--scenario", default="all", help="a name, names with commas, or all; --list shows them")
    parser.add_argument("--list", action="store_true", help="the scenarios and what finrace must call each")
    parser.add_argument("--runs", type=int, default=100, help="runs of each scenario (default %(default)s)")
    parser.add_argument("--parallel", type=int, default=50, help="runs at a time (default %(default)s)")
    parser.add_argument("--delay", type=seconds, default=0.02, help="one-way delay (default 20ms)")
    parser.add_argument("--keep-alive", type=seconds, default=1.0, help="the servers' idle timer (default 1s)")
    parser.add_argument("--family", choices=("4", "6", "mapped"), default="4")
    parser.add_argument("--port-base", type=int, default=9100, help="first server port (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the order of the runs")
    parser.add_argument("--left", default=os.environ.get("FINRACE_LEFT"), help="namespace of the client")
    parser.add_argument("--right", default=os.environ.get("FINRACE_RIGHT"), help="namespace of the server")
    parser.add_argument("--control", default=os.environ.get("FINRACE_CONTROL"), help="control socket of a running delay-line")
    parser.add_argument("--delay-line", default=os.path.join(here, "..", "build", "delay-line"), help="program to start")
    parser.add_argument("--local", action="store_true", help="no delay line: both ends on loopback")
    parser.add_argument("--truth", help="file for the truth, a JSON line for each connection")
    return parser


def main(arguments):
    if arguments[:1] == ["serve"]:
        return run_server(server_arguments().parse_args(arguments[1:]))
    parser = lab_arguments()
    options = parser.parse_args(arguments)
    if options.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has seen enough is no error
        list_scenarios()
        return 0
    if not options.truth:
        parser.error("--truth FILE is needed: it is what the lab is for")
    if options.runs < 1 or options.parallel < 1:
        parser.error("--runs and --parallel: use a number from 1")
    return run_lab(options)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as problem:
        print(f"lab.py: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
