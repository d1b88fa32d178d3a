#!/usr/bin/python3
"""finrace --connections beside libbpf-tools' tcplife and tcpstates, on the same scripted traffic.

Two processes, a client and a server, in each of three network namespaces open about a hundred connections and end them in
every way that TCP knows; each step waits until the kernel says that the one before has taken effect, so the script knows what
each socket did. Then four accounts must agree, socket by socket: the script's own, tcplife's, tcpstates' and finrace's.

What the two tools say, and finrace says otherwise, is compared by these rules:

tcpstates  Its lines of one socket address, from CLOSE or LISTEN to CLOSE, are one socket's life.
           CLOSE -> LISTEN is a listening socket: no connection.
           CLOSE -> SYN_SENT comes before the kernel has filled in the ports: the tuple is that of the life's last line.
           LISTEN -> SYN_RECV is an accepted socket as a copy of its listener; it is that only for as long as the kernel needs
           to set it up (the handshake itself happens on a request socket, which no tool shows). finrace lists SYN_RECV
           without a time.
           Neither shows TIME_WAIT: the socket goes to CLOSE, and what stays behind is no socket.
tcplife    TX_KB and RX_KB are bytes_acked and bytes_received over 1024 with two decimals, and those count sequence numbers, not
           bytes: a SYN that this socket sent (one more in TX for the side that connected), a FIN that it sent, once
           acknowledged (TX), and a FIN that it received as a full socket (RX; not one that met TIME_WAIT's or FIN_WAIT2's small
           stand-in). finrace counts payload alone. The decimals hide ten bytes: so the sizes 3 to 6 lie around the first
           step (5.12 bytes), where a single one too many shows.
           PID and COMM are the owner's for sockets that were in SYN_SENT or LAST_ACK. For others tcplife prints the process that
           happens to run when the socket closes, which is wrong where a packet closes it; finrace's owner is never that.
           MS is the time from ESTABLISHED (or SYN_SENT, if it came to no more) to CLOSE, as finrace's age_ms.

Durations may differ by a tick. Made for `scripts/vm KERNEL --icount`, where time counts instructions: elsewhere a busy machine
may stand still between two programs on one tracepoint.
"""

import argparse
import collections
import ctypes
import errno
import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback

sys.dont_write_bytecode = True
import harness  # noqa: E402
from harness import EnvironmentProblem, Finrace, Wrong, libc, must, need, wait_for  # noqa: E402

PR_SET_NAME = 15
CROSSING_DELAY = "200ms"  # one way, where both ends must close at once
CLOCK_MONOTONIC_COARSE = 6
TICK_MS = 1000 * time.clock_getres(CLOCK_MONOTONIC_COARSE)
IDLE = 0.3
STATES = {1: "ESTABLISHED", 4: "FIN_WAIT1", 5: "FIN_WAIT2", 8: "CLOSE_WAIT"}
ADDRESSES = {"4": "127.0.0.1", "6": "::1", "mapped": "::ffff:127.0.0.1"}


# ---- the two ends: processes that do as they are told ----------------------------------------------------------------------


class Deeds:
    """What an end can do, in its own process. Sockets have the number of their connection."""

    def __init__(self):
        self.sockets = {}
        self.listeners = {}

    def listen(self, family, port):
        sock = socket.socket(socket.AF_INET6 if family != "4" else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == "mapped":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.settimeout(harness.LIMIT)
        sock.bind((ADDRESSES[family], port))
        sock.listen(64)
        self.listeners[port] = sock

    def unlisten(self, port):
        self.listeners.pop(port).close()

    def accept(self, key, port):
        self.sockets[key], _ = self.listeners[port].accept()
        self.sockets[key].settimeout(harness.LIMIT)
        self.sockets[key].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connect(self, key, family, own_port, port):
        sock = self.sockets.get(key)
        if sock is None:
            sock = self.sockets[key] = socket.socket(socket.AF_INET6 if family != "4" else socket.AF_INET)
            sock.settimeout(harness.LIMIT)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.bind((ADDRESSES[family], own_port))
        # Blocking, or the kernel would want to tell of a refusal twice before this socket may be used again.
        sock.settimeout(None)
        try:
            sock.connect((ADDRESSES[family], port))
        except OSError as error:
            return errno.errorcode[error.errno]
        finally:
            sock.settimeout(harness.LIMIT)
        return None

    def disconnect(self, key):
        """connect() to no address: the one way to reset and keep the socket."""
        address = struct.pack("=H14x", socket.AF_UNSPEC)
        if libc.connect(self.sockets[key].fileno(), address, len(address)) != 0:
            raise OSError(ctypes.get_errno(), "connect(AF_UNSPEC)")

    def send(self, key, size):
        self.sockets[key].sendall(bytes(size))

    def receive(self, key, size):
        harness.read_all(self.sockets[key], size)

    def end_of_stream(self, key):
        must(self.sockets[key].recv(1) == b"", "a byte where the end of the stream was due")

    def be_reset(self, key):
        try:
            got = self.sockets[key].recv(1)
        except ConnectionResetError:
            return
        raise Wrong(f"{got!r} where ECONNRESET was due")

    def shutdown(self, key):
        self.sockets[key].shutdown(socket.SHUT_WR)

    def close(self, key):
        self.sockets.pop(key).close()

    def reset(self, key):
        self.sockets[key].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close(key)

    def acknowledged(self, key):
        """Until the peer has acknowledged all that was sent."""
        queued = lambda: struct.unpack("i", fcntl.ioctl(self.sockets[key], termios.TIOCOUTQ, bytes(4)))[0]  # noqa: E731
        wait_for(lambda: queued() == 0, "the send queue to empty", pause=0.002)

    def unread(self, key, size):
        waiting = lambda: struct.unpack("i", fcntl.ioctl(self.sockets[key], termios.FIONREAD, bytes(4)))[0]  # noqa: E731
        wait_for(lambda: waiting() == size, f"{size} unread bytes", pause=0.002)

    def state(self, key, state):
        now = lambda: STATES.get(self.sockets[key].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[0])  # noqa: E731
        wait_for(lambda: now() == state, f"state {state}", pause=0.002)

    def be_gone(self, key):
        """Until it has been reset, whatever error the next call would give."""
        gone = lambda: self.sockets[key].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[0] == 7  # noqa: E731
        wait_for(gone, "CLOSE", pause=0.002)
        self.close(key)

    def stand_in(self, own_port, port, states):
        """Until what the kernel keeps of a closed socket is in one of these states (include/net/tcp_states.h)."""

        def there():
            for path in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
                with open(path, encoding="ascii") as file:
                    for line in file.readlines()[1:]:
                        _, own, peer, state = line.split()[:4]
                        ports = int(own.rsplit(":", 1)[1], 16), int(peer.rsplit(":", 1)[1], 16)
                        if ports == (own_port, port) and int(state, 16) in states:
                            return True
            return False

        wait_for(there, f"port {own_port} in state {states}", pause=0.005)


class Actor:
    """A process of its own name and namespace that carries out one deed at a time."""

    def __init__(self, name, enter):
        self.name = name
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            self.live(theirs, enter)
        theirs.close()
        self.line.settimeout(harness.LIMIT * 2)
        self.netns = self.take()

    def live(self, line, enter):
        status = 1
        try:
            self.line.close()
            harness.die_with_parent()
            libc.prctl(PR_SET_NAME, self.name.encode(), 0, 0, 0)
            enter()
            # One processor for all of it: what loopback delivers and timers do there as well, so the tools, which keep a
            # buffer for each processor, print in order.
            os.sched_setaffinity(0, {0})
            deeds = Deeds()
            line.send(json.dumps({"value": os.stat("/proc/self/ns/net").st_ino}).encode())
            while request := line.recv(4096):
                deed, arguments = json.loads(request)
                try:
                    answer = {"value": getattr(deeds, deed)(*arguments)}
                except Exception as error:  # noqa: BLE001 (it is passed on)
                    answer = {"problem": f"{type(error).__name__}: {error}"}
                line.send(json.dumps(answer).encode())
            status = 0
        except BaseException:  # noqa: BLE001 (a child must not run on as its parent)
            traceback.print_exc()
        finally:
            os._exit(status)

    def ask(self, deed, *arguments):
        self.line.send(json.dumps([deed, arguments]).encode())

    def take(self):
        data = self.line.recv(4096)
        must(data, f"{self.name} died")
        answer = json.loads(data)
        must("problem" not in answer, lambda: f"{self.name}: {answer['problem']}")
        return answer["value"]

    def do(self, deed, *arguments):
        self.ask(deed, *arguments)
        return self.take()

    def end(self):
        self.line.shutdown(socket.SHUT_RDWR)  # close() would not do: actors forked later hold it as well
        self.line.close()
        deadline = time.monotonic() + harness.LIMIT
        while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise Wrong(f"{self.name} did not end")
            time.sleep(0.01)


def command(*words):
    done = subprocess.run(words, capture_output=True, text=True, timeout=harness.LIMIT)
    if done.returncode != 0:
        raise EnvironmentProblem(f"{' '.join(words)}: {done.stderr.strip()}")


class World:
    """A network namespace with a client and a server in it."""

    def __init__(self, name, new=True, delay=None):
        def enter_new():
            if new:
                harness.checked(libc.unshare(harness.CLONE_NEWNET), "unshare")
                command(need("ip", "iproute2"), "link", "set", "lo", "up")
            if delay:
                command(need("tc", "iproute2"), "qdisc", "add", "dev", "lo", "root", "netem", "delay", delay)

        self.name = name
        self.server = Actor("mix-server", enter_new)

        def enter_same():
            with open(f"/proc/{self.server.pid}/ns/net", "rb") as file:
                harness.checked(libc.setns(file.fileno(), harness.CLONE_NEWNET), "setns")

        self.client = Actor("mix-client", enter_same)


# ---- the script ------------------------------------------------------------------------------------------------------------


class Truth:
    """What one socket did, as the script knows."""

    def __init__(self, script, side, actor, own, peer):
        self.script, self.side, self.actor, self.own, self.peer = script, side, actor, own, peer
        self.owner = (actor.pid, actor.name)
        self.netns = actor.netns
        self.sent = self.received = 0  # payload: acknowledged by the peer; received
        self.syn = 0  # sequence numbers that are no bytes
        self.fin_acknowledged = self.fin_counted = 0
        self.close = None  # (by, how) of the first close
        self.exchanges = None  # checked where a script sets it
        self.failed = False

    @property
    def ends(self):
        return self.own + self.peer


class Link:
    """One connection of the script: both ends, and what becomes true of each."""

    def __init__(self, mix, name, world, family="4", port=None):
        self.mix, self.world, self.family = mix, world, family
        self.key = mix.next_key()
        self.own_port, self.port = mix.next_port(), port or mix.port(world, family)
        self.name = f"{name}, {world.name}, {dict(zip(ADDRESSES, ('IPv4', 'IPv6', 'IPv4-mapped')))[family]}"
        address = ADDRESSES["4" if family == "mapped" else family]
        own, peer = (address, self.own_port), (address, self.port)
        self.c = Truth(self.name, "client", world.client, own, peer)
        self.s = Truth(self.name, "server", world.server, peer, own)

    def open(self, accept=True):
        self.mix.truths += [self.c, self.s]
        failed = self.world.client.do("connect", self.key, self.family, self.own_port, self.port)
        must(failed is None, f"{self.name}: connect: {failed}")
        self.c.syn = 1
        if accept:
            self.world.server.do("accept", self.key, self.port)

    def client(self, deed, *arguments):
        return self.world.client.do(deed, self.key, *arguments)

    def server(self, deed, *arguments):
        return self.world.server.do(deed, self.key, *arguments)

    def do(self, end, deed, *arguments):
        return end.actor.do(deed, self.key, *arguments)

    def other(self, end):
        return self.s if end is self.c else self.c

    def move(self, sender, size, read=True):
        """`size` bytes from one end to the other, until they are read (or lie there unread) and acknowledged."""
        if size == 0:
            return
        receiver = self.other(sender)
        sender.actor.ask("send", self.key, size)
        receiver.actor.ask("receive" if read else "unread", self.key, size)
        sender.actor.take()
        receiver.actor.take()
        self.do(sender, "acknowledged")
        sender.sent += size
        receiver.received += size

    def close_and_wait(self, end):
        """close(), until the FIN is acknowledged: the peer's FIN will meet a stand-in then, and does not count."""
        self.do(end, "close")
        end.actor.do("stand_in", end.own[1], end.peer[1], [5])
        end.fin_acknowledged = 1
        self.other(end).fin_counted = 1
        self.closed_by(end, "fin")

    def closed_by(self, end, how):
        end.close = ("local", how)
        self.other(end).close = ("peer", how)


def one_closes(first):
    def script(link, up, down):
        link.open()
        end = getattr(link, first)
        link.move(link.c, up)
        link.move(link.s, down)
        link.close_and_wait(end)
        other = link.other(end)
        link.do(other, "end_of_stream")
        link.do(other, "close")
        other.fin_acknowledged = 1  # in LAST_ACK

    return script


def half_closed(first):
    """The first to close goes on reading, and gets the bytes of the other way after its close."""

    def script(link, up, down):
        link.open()
        end = getattr(link, first)
        other = link.other(end)
        link.move(end, up if end is link.c else down)
        link.do(end, "shutdown")
        link.do(end, "state", "FIN_WAIT2")
        link.do(other, "end_of_stream")
        link.move(other, down if end is link.c else up)
        link.do(other, "close")
        link.do(end, "end_of_stream")
        link.do(end, "close")
        link.closed_by(end, "fin")
        for one in (link.c, link.s):
            one.fin_acknowledged = one.fin_counted = 1

    return script


def one_resets(first, unread=False):
    def script(link, up, down):
        link.open()
        end = getattr(link, first)
        link.move(link.c, up, read=not (unread and end is link.s))
        link.move(link.s, down, read=not (unread and end is link.c))
        link.do(end, "close" if unread else "reset")
        link.do(link.other(end), "be_reset")
        link.do(link.other(end), "close")
        link.closed_by(end, "reset")

    return script


def refused(link):
    link.mix.truths.append(link.c)
    link.c.failed = True
    link.c.close = ("peer", "reset")
    must(link.world.client.do("connect", link.key, link.family, link.own_port, link.port) == "ECONNREFUSED", "not refused")
    link.client("close")


def refused_then_open(link):
    """One socket, two connections."""
    first = Link(link.mix, "refused, socket used again", link.world, link.family, port=link.mix.silent_port)
    first.key, first.own_port, first.c.own = link.key, link.own_port, link.c.own
    link.mix.truths.append(first.c)
    first.c.failed = True
    first.c.close = ("peer", "reset")
    must(first.world.client.do("connect", first.key, first.family, first.own_port, first.port) == "ECONNREFUSED",
         "not refused")
    one_closes("c")(link, 5, 6)


def idle_between(link):
    link.open()
    for _ in range(3):
        link.move(link.c, 7)
        link.move(link.s, 9)
        time.sleep(IDLE)
    link.c.exchanges = 3
    link.close_and_wait(link.s)
    link.client("end_of_stream")
    link.client("close")
    link.c.fin_acknowledged = 1


def never_accepted(link):
    """The listener closes while the connection waits to be accepted: the kernel resets it, and nobody ever owned it."""
    link.world.server.do("listen", link.family, link.port)
    link.open(accept=False)
    link.client("send", 4)
    link.client("acknowledged")
    link.c.sent = link.s.received = 4
    link.world.server.do("unlisten", link.port)
    link.client("be_reset")
    link.client("close")
    link.closed_by(link.s, "reset")
    link.s.owner = None


def connected_to_itself(link):
    """Simultaneous open: SYN_SENT -> SYN_RECV -> ESTABLISHED, and a FIN that meets itself."""
    link.port = link.own_port
    link.c.peer = link.c.own
    link.mix.truths.append(link.c)
    must(link.world.client.do("connect", link.key, link.family, link.own_port, link.own_port) is None, "no connection")
    link.client("send", 4)
    link.client("receive", 4)
    link.client("acknowledged")
    link.client("close")
    link.c.sent = link.c.received = 4
    link.c.syn = link.c.fin_acknowledged = link.c.fin_counted = 1
    link.c.close = ("local", "fin")


def disconnected(link):
    link.open()
    link.move(link.c, 5)
    link.client("disconnect")
    link.server("be_reset")
    link.server("close")
    link.client("close")
    link.closed_by(link.c, "reset")
    # The server only accepted and read; the RST ended the socket before the process did anything that finrace watches.
    link.s.owner = None


def reset_with_unread_after_fin(link):
    link.open()
    link.move(link.s, 5, read=False)
    link.close_and_wait(link.s)
    link.client("state", "CLOSE_WAIT")
    link.client("close")


def reset_of_half_closed(link):
    link.open()
    link.move(link.c, 5)
    link.client("shutdown")
    link.client("state", "FIN_WAIT2")
    link.server("end_of_stream")
    link.server("reset")
    link.client("be_reset")
    link.client("close")
    link.closed_by(link.c, "fin")
    link.c.fin_acknowledged = link.s.fin_counted = 1


def sent_after_close(link):
    """The stale reuse: its bytes reach nobody and are never acknowledged."""
    link.open()
    link.move(link.c, 5)
    link.move(link.s, 6)
    link.close_and_wait(link.s)
    link.client("state", "CLOSE_WAIT")
    link.client("send", 9)
    link.client("be_gone")


def closing_at_once(link):
    """Both FINs under way at once: FIN_WAIT1 -> CLOSING. Needs a link with a delay."""
    link.open()
    link.move(link.c, 4)
    link.move(link.s, 3)
    link.world.client.ask("close", link.key)
    link.world.server.ask("close", link.key)
    link.world.client.take()
    link.world.server.take()
    for end in (link.c, link.s):
        end.fin_acknowledged = end.fin_counted = 1
        end.close = ("local", "fin")


class Mix:
    """The whole script."""

    def __init__(self):
        self.truths = []
        self.keys = 0
        self.ports = {}
        self.first_port = 42000
        self.silent_port = 41999  # nobody listens there
        # Namespaces first, threads later: the ends are forks of this process.
        self.here = World("this namespace", new=False)
        self.there = World("another namespace")
        self.slow = World("a namespace with delay", delay=CROSSING_DELAY)
        self.worlds = (self.here, self.there, self.slow)

    def next_key(self):
        self.keys += 1
        return str(self.keys)

    def next_port(self):
        self.first_port += 1
        return self.first_port

    def port(self, world, family):
        return self.ports[world, family]

    def listen(self):
        for offset, (world, family) in enumerate((world, family) for world in self.worlds for family in ADDRESSES):
            self.ports[world, family] = 41000 + offset
            world.server.do("listen", family, 41000 + offset)

    def play(self):
        self.listen()
        clean = {"client closes": one_closes("c"), "server closes": one_closes("s"),
                 "client half-closes": half_closed("c"), "server half-closes": half_closed("s")}
        resets = {"client resets": one_resets("c"), "server resets": one_resets("s"),
                  "client closes unread": one_resets("c", unread=True), "server closes unread": one_resets("s", unread=True)}
        for family in ADDRESSES:
            for name, script in clean.items():
                for up, down in ((0, 0), (3, 4), (4, 5), (5, 6), (6, 3), (1, 1)):
                    script(Link(self, f"{name}, {up} up, {down} down", self.here, family), up, down)
            for name, script in resets.items():
                for up, down in ((4, 5), (5, 6)):
                    script(Link(self, f"{name}, {up} up, {down} down", self.here, family), up, down)
            for up, down in ((1_000_000, 1), (1, 1 << 20)):
                one_closes("s")(Link(self, f"server closes, {up} up, {down} down", self.here, family), up, down)
            refused(Link(self, "refused", self.here, family, port=self.silent_port))
            idle_between(Link(self, "idle between exchanges", self.here, family))
        for name, script in {**clean, **resets}.items():
            script(Link(self, name, self.there), 4, 5)
        refused(Link(self, "refused", self.there, port=self.silent_port))
        refused_then_open(Link(self, "open after refused", self.here))
        never_accepted(Link(self, "never accepted", self.here, port=self.silent_port + 1))
        connected_to_itself(Link(self, "connected to itself", self.here))
        disconnected(Link(self, "disconnected", self.here))
        reset_with_unread_after_fin(Link(self, "reset with unread bytes after FIN", self.here))
        reset_of_half_closed(Link(self, "reset of the half-closed", self.here))
        sent_after_close(Link(self, "sent after close", self.here))
        for family in ADDRESSES:
            closing_at_once(Link(self, "both close at once", self.slow, family))

    def finish(self):
        for world in self.worlds:
            world.client.end()
            world.server.end()



# ---- what the tools say ------------------------------------------------------------------------------------------------------


def plain(address):
    """finrace gives an IPv4-mapped address as the IPv4 address that it is."""
    return address.removeprefix("::ffff:")


class Tool:
    """A running tcplife or tcpstates. Its heading comes once it has attached."""

    def __init__(self, name, heading):
        self.name, self.rows, self.said = name, [], []
        self.ready = threading.Event()
        self.heading = heading
        self.process = subprocess.Popen(
            [need("stdbuf", "coreutils"), "-oL", need(name, "libbpf-tools"), "-w"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=harness.die_with_parent,
        )
        self.readers = [threading.Thread(target=self.read_rows, daemon=True), threading.Thread(target=self.listen, daemon=True)]
        for reader in self.readers:
            reader.start()

    def read_rows(self):
        for line in self.process.stdout:
            text = line.decode("utf-8", "replace").rstrip("\n")
            if text.startswith(self.heading):
                self.ready.set()
            else:
                self.rows.append(text)
        self.ready.set()

    def listen(self):
        for line in self.process.stderr:
            self.said.append(line.decode("utf-8", "replace").rstrip("\n"))

    def wait_ready(self):
        must(self.ready.wait(harness.READY_LIMIT) and self.process.poll() is None,
             lambda: f"{self.name} did not start: {' | '.join(self.said[-10:])}")

    def stop(self):
        must(self.process.poll() is None, lambda: f"{self.name} ended by itself: {' | '.join(self.said[-10:])}")
        self.process.send_signal(signal.SIGINT)
        self.process.wait(harness.STOP_LIMIT)
        for reader in self.readers:
            reader.join(harness.LIMIT)
        must(not self.said, lambda: f"{self.name} complained: {' | '.join(self.said[-10:])}")

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(harness.STOP_LIMIT)


Life = collections.namedtuple("Life", "pid name sent received ms")
Step = collections.namedtuple("Step", "old new ms")


def tcplife_rows(rows):
    """(own address, own port, peer address, peer port) -> Life."""
    lives = {}
    for row in rows:
        found = re.fullmatch(r"(\d+)\s+(.*?)\s+(\S+)\s+(\d+)\s+(\S+)\s+(\d+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)", row)
        must(found, f"tcplife printed: {row!r}")
        pid, name, own, own_port, peer, peer_port, sent, received, ms = found.groups()
        ends = (plain(own), int(own_port), plain(peer), int(peer_port))
        if is_ours(ends):
            must(ends not in lives, f"tcplife twice: {ends}")
            lives[ends] = Life(int(pid), name, sent, received, float(ms))
    return lives


def tcpstates_rows(rows):
    """The same -> [Step]; sockets that only listened are left out."""
    open_lives, lives = {}, {}
    for row in rows:
        found = re.fullmatch(r"([0-9a-f]+)\s+\d+\s+.*?\s+[46]\s+(\S+)\s+(\d+)\s+(\S+)\s+(\d+)\s+(\w+)\s+-> (\w+)\s+([\d.]+)", row)
        must(found, f"tcpstates printed: {row!r}")
        socket_address, own, own_port, peer, peer_port, old, new, ms = found.groups()
        if socket_address not in open_lives:
            if (old, new) not in (("CLOSE", "SYN_SENT"), ("CLOSE", "LISTEN"), ("LISTEN", "SYN_RECV")):
                continue  # older than the tool
            open_lives[socket_address] = []
        life = open_lives[socket_address]
        must(not life or life[-1].new == old, lambda: f"tcpstates out of order: {life} then {row!r}")
        life.append(Step(old, new, float(ms)))
        if new == "CLOSE":
            del open_lives[socket_address]
            ends = (plain(own), int(own_port), plain(peer), int(peer_port))
            if life[0].new != "LISTEN" and is_ours(ends):
                must(ends not in lives, f"tcpstates twice: {ends}")
                lives[ends] = life
    return lives


def is_ours(ends):
    return 41000 <= ends[1] < 44000 and 41000 <= ends[3] < 44000


def finrace_rows(records):
    found = {}
    for record in records:
        if record.name == "finrace.connection" and is_ours(record.local + record.peer):
            must(record.local + record.peer not in found, lambda: f"finrace twice: {record}")
            found[record.local + record.peer] = record
    return found


# ---- the comparison ----------------------------------------------------------------------------------------------------------


class Comparison:
    def __init__(self, truths, lives, steps, records):
        self.truths = {truth.ends: truth for truth in truths}
        must(len(self.truths) == len(truths), "the script used a tuple twice")
        self.lives, self.steps, self.records = lives, steps, records

    def same_sockets(self, theirs, name):
        missing = [self.truths[ends] for ends in self.truths if ends not in theirs]
        extra = [ends for ends in theirs if ends not in self.truths]
        must(not missing and not extra,
             lambda: f"{name} lacks {[(one.script, one.side) for one in missing][:5]} ({len(missing)}), "
                     f"has besides {extra[:5]} ({len(extra)})")

    def each(self, check):
        """Runs check(truth, life, steps, record) on every socket that all have; it returns None or what differs."""
        problems, count = [], 0
        for ends, truth in self.truths.items():
            if ends in self.lives and ends in self.steps and ends in self.records:
                count += 1
                problem = check(truth, self.lives[ends], self.steps[ends], self.records[ends])
                if problem:
                    problems.append(f"{truth.script}, {truth.side}: {problem}")
        must(count > 0, "no socket to compare")
        must(not problems, lambda: f"{len(problems)} of {count} sockets differ:\n            " + "\n            ".join(problems[:12]))

    @staticmethod
    def states(_truth, _life, steps, record):
        theirs = [step.new for step in steps]
        ours = [step["state"] for step in record.at("finrace.connection.states")]
        return None if ours == theirs else f"finrace {' > '.join(ours)}, tcpstates {' > '.join(theirs)}"

    @staticmethod
    def payload(truth, _life, _steps, record):
        if truth.failed:
            there = {"bytes_sent", "bytes_received"} & set(record.at("finrace.connection"))
            return f"bytes of a connection that never was: {there}" if there else None
        ours = record.at("finrace.connection.bytes_sent"), record.at("finrace.connection.bytes_received")
        return None if ours == (truth.sent, truth.received) else f"finrace {ours}, in truth {(truth.sent, truth.received)}"

    @staticmethod
    def sequence_numbers(truth, life, _steps, record):
        """tcplife's figures are finrace's and the SYN's and FINs' sequence numbers."""
        sent = record.at("finrace.connection.bytes_sent", 0) + truth.syn + truth.fin_acknowledged
        received = record.at("finrace.connection.bytes_received", 0) + truth.fin_counted
        due = f"{sent / 1024:.2f}", f"{received / 1024:.2f}"
        if due == (life.sent, life.received):
            return None
        return f"tcplife {(life.sent, life.received)} KB, finrace's with SYN and FINs {due} ({sent} and {received})"

    @staticmethod
    def owner(truth, _life, _steps, record):
        ours = (record.at("process.pid"), record.at("process.executable.name")) if record.at("process") else None
        return None if ours == truth.owner else f"finrace {ours}, in truth {truth.owner}"

    @staticmethod
    def knows_owner(steps):
        """tcplife notes the process in these states alone."""
        return any(step.new in ("SYN_SENT", "LAST_ACK") for step in steps)

    def same_owner(self, _truth, life, steps, record):
        if not self.knows_owner(steps):
            return None
        ours = record.at("process.pid"), record.at("process.executable.name")
        return None if ours == (life.pid, life.name) else f"finrace {ours}, tcplife {(life.pid, life.name)}"

    @staticmethod
    def side(truth, _life, _steps, record):
        ours = record.at("finrace.side"), record.at("finrace.connection.opened_by")
        due = truth.side, "local" if truth.side == "client" else "peer"
        return None if ours == due else f"finrace {ours}, in truth {due}"

    @staticmethod
    def first_close(truth, _life, _steps, record):
        ours = record.at("finrace.close.by"), record.at("finrace.close.how")
        return None if ours == truth.close else f"finrace {ours}, in truth {truth.close}"

    @staticmethod
    def namespace(truth, _life, _steps, record):
        ours = record.at("finrace.connection.netns")
        return None if ours == truth.netns else f"finrace {ours}, in truth {truth.netns}"

    @staticmethod
    def exchanges(truth, _life, _steps, record):
        if truth.exchanges is None:
            return None
        ours, idle = record.at("finrace.connection.exchanges"), record.at("finrace.connection.longest_idle_ms")
        if ours != truth.exchanges:
            return f"finrace {ours} exchanges, in truth {truth.exchanges}"
        return None if idle >= IDLE * 1000 - 2 * TICK_MS else f"longest idle time {idle} ms, in truth {IDLE} s"

    def durations(self, seen):
        pairs = []
        for ends, record in self.records.items():
            if ends not in self.lives or ends not in self.steps:
                continue
            name = self.truths[ends].script
            pairs.append((abs(record.at("finrace.connection.age_ms") - self.lives[ends].ms), f"life, {name}"))
            # tcpstates prints how long the state that ends has lasted, so each figure belongs to the line before.
            spent = [step.ms for step in self.steps[ends][1:]]
            for ours, theirs in zip(record.at("finrace.connection.states"), spent):
                if "ms" in ours:
                    pairs.append((abs(ours["ms"] - theirs), f"{ours['state']}, {name}"))
                else:
                    must(ours["state"] == "SYN_RECV", f"{name}: no time in {ours['state']}")
        must(len(pairs) > 3 * len(self.records), f"only {len(pairs)} times to compare")
        pairs.sort()
        middle, most = pairs[len(pairs) // 2], pairs[len(pairs) * 95 // 100]
        seen.append(f"{len(pairs)} times: they differ by {middle[0]:.3f} ms (median), {most[0]:.3f} ms (95 %), "
                    f"{pairs[-1][0]:.3f} ms at most ({pairs[-1][1]})")
        must(pairs[-1][0] <= TICK_MS, seen[-1])

    def bystanders(self):
        """What tcplife gives as owner where it did not note one."""
        ends = [one for one in self.truths if one in self.lives and not self.knows_owner(self.steps.get(one, []))]
        wrong = [one for one in ends if self.truths[one].owner != (self.lives[one].pid, self.lives[one].name)]
        return f"of {len(ends)} sockets whose owner tcplife does not note, it names another process for {len(wrong)}"


def nothing_lost(records):
    last = [one for one in records if one.name == "finrace.health"][-1]
    must(last.at("finrace.health.complete") is True and last.at("finrace.lost_events") == 0, f"losses: {json.dumps(last)}")


def test(options, results):
    print(f"finrace ({options.backend_name}) beside tcplife and tcpstates on Linux {os.uname().release}", flush=True)
    mix = Mix()
    finrace, tools = None, []
    try:
        tools = [Tool("tcplife", "PID"), Tool("tcpstates", "SKADDR")]
        finrace = Finrace(options, "--connections", interval="1h")
        for tool in tools:
            tool.wait_ready()
        started = time.monotonic()
        mix.play()
        print(f"  {len(mix.truths)} sockets played in {time.monotonic() - started:.1f} s", flush=True)
        tcplife, tcpstates = tools
        enough = len(mix.truths)
        try:
            wait_for(lambda: len(tcplife.rows) >= enough, "tcplife's rows", limit=30)
            wait_for(lambda: sum(" -> CLOSE " in row for row in list(tcpstates.rows)) >= enough, "tcpstates' rows", limit=30)
            wait_for(lambda: len(finrace.connections()) >= enough, "finrace's records", limit=30)
        except Wrong as problem:
            print(f"  {problem}", flush=True)  # which ones are missing is what the comparison tells
        mix.finish()
        for tool in tools:
            results.run(f"{tool.name} ran and lost nothing", tool.stop)
        results.run("finrace ran to the end and ended with 0", finrace.stop)
        records = finrace.records()
    finally:
        for tool in tools:
            tool.kill()
            with open(os.path.join(options.folder, tool.name), "w", encoding="utf-8") as file:
                file.write("\n".join(tool.rows) + "\n")
        if finrace:
            finrace.kill()
    compared = Comparison(mix.truths, tcplife_rows(tcplife.rows), tcpstates_rows(tcpstates.rows), finrace_rows(records))
    results.run("tcplife shows the script's sockets", compared.same_sockets, compared.lives, "tcplife")
    results.run("tcpstates shows the script's sockets", compared.same_sockets, compared.steps, "tcpstates")
    results.run("finrace shows the script's sockets", compared.same_sockets, compared.records, "finrace")
    results.run("the same states as tcpstates, in the same order", compared.each, compared.states)
    results.run("payload bytes each way, to the byte", compared.each, compared.payload)
    results.run("the same bytes as tcplife, less SYN and FIN", compared.each, compared.sequence_numbers)
    results.run("the owner is the process that connected, wrote or closed", compared.each, compared.owner)
    results.run("the same owner as tcplife, where it notes one", compared.each, compared.same_owner)
    results.run("which side opened", compared.each, compared.side)
    results.run("who closed first, and how", compared.each, compared.first_close)
    results.run("the network namespace", compared.each, compared.namespace)
    results.run("exchanges and idle time", compared.each, compared.exchanges)
    seen = []
    results.run("the same durations as tcplife and tcpstates", compared.durations, seen)
    for text in seen + [compared.bystanders()]:
        print(f"          {text}")
    results.run("nothing was lost", nothing_lost, records)
    results.run("every record is valid", harness.check_schema, finrace)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    harness.add_options(parser)
    parser.set_defaults(backend="trace")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(harness.main("compare_tcplife", parse, test))
