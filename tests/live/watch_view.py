#!/usr/bin/python3
"""`finrace watch` on a terminal: a shell with job control on a pseudo-terminal, what it draws read by a small emulator of one.

The emulator knows only what the view may send: anything else is a failure.
"""

import errno
import fcntl
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading

sys.dont_write_bytecode = True
import harness  # noqa: E402
from harness import LIMIT, Pair, listen, must, wait_for  # noqa: E402
from robustness import network, stale  # noqa: E402

ROWS, COLUMNS = 24, 80
CTRL_U, CTRL_Z, ESCAPE = b"\x15", b"\x1a", b"\x1b"
SEQUENCE = re.compile(r"\x1b\[(\?25[lh]|[0-9]*A|J|[0-9;]*m)")


class Screen:
    """A terminal: its rows, and what has scrolled off at the top."""

    def __init__(self, rows, columns):
        self.rows, self.columns = rows, columns
        self.history = []
        self.lines = [""]
        self.row = self.column = 0
        self.cursor = True
        self.wraps = False  # the last column has been written to

    def down(self):
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")
        if len(self.lines) > self.rows:
            self.history.append(self.lines.pop(0))
            self.row -= 1

    def put(self, character):
        if self.wraps:
            self.down()
            self.column = 0
        line = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = line[:self.column] + character + line[self.column + 1:]
        self.wraps = self.column + 1 == self.columns
        self.column += 0 if self.wraps else 1

    def steer(self, code):
        if code == "J":
            self.lines = self.lines[:self.row + 1]
            self.lines[self.row] = self.lines[self.row][:self.column]
        elif code.endswith("A"):
            self.row = max(0, self.row - int(code[:-1] or 1))
        elif code.startswith("?25"):
            self.cursor = code.endswith("h")

    def take(self, text):
        """What is not complete yet."""
        at = 0
        while at < len(text):
            character = text[at]
            if character == "\x1b":
                found = SEQUENCE.match(text, at)
                if not found:
                    must(len(text) - at < 12, f"the terminal is sent {text[at:at + 20]!r}")
                    return text[at:]
                self.steer(found[1])
                at = found.end()
                continue
            at += 1
            if character in "\r\n":
                self.wraps = False
                if character == "\r":
                    self.column = 0
                else:
                    self.down()
            else:
                must(character.isprintable() or character == "\a", f"the terminal is sent {character!r}")
                self.put(character)
        return ""

    def resize(self, rows, columns):
        """As a terminal does that does not wrap lines anew."""
        self.rows, self.columns = rows, columns
        while len(self.lines) > rows and self.row > 0:
            self.history.append(self.lines.pop(0))
            self.row -= 1
        self.lines = [line[:columns] for line in self.lines[:rows]]

    def all(self):
        return "\n".join(self.history + self.lines)


class Terminal:
    """A shell with job control, on a terminal of its own."""

    def __init__(self, term="xterm"):
        self.screen = Screen(ROWS, COLUMNS)
        self.problem = None
        self.asked = 0
        self.lock = threading.RLock()  # of the screen
        self.bytes = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            harness.Finrace.enter_host()
            os.environ.update(TERM=term, PS1="$ ", LC_ALL="C.UTF-8")
            os.environ.pop("ENV", None)
            os.execv("/bin/sh", ["sh", "-i"])
        self.set_size(ROWS, COLUMNS)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        self.wait(lambda screen: screen.lines[screen.row].startswith("$"), "the shell's prompt")

    def set_size(self, rows, columns):
        with self.lock:
            self.screen.resize(rows, columns)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self):
        rest = b""
        left = ""
        while True:
            try:
                data = os.read(self.fd, 1 << 16)
            except OSError as error:
                must(error.errno == errno.EIO, f"reading the terminal: {error}")
                return
            if not data:
                return
            self.bytes += data
            rest += data
            text = rest.decode("utf-8", "ignore")  # the end of it may be a part of a character
            rest = rest[len(text.encode()):]
            try:
                with self.lock:
                    left = self.screen.take(left + text)
            except harness.Wrong as problem:
                self.problem = problem
                return

    def type(self, keys):
        data = keys if isinstance(keys, bytes) else keys.encode()
        os.write(self.fd, data)

    def wait(self, condition, what, limit=LIMIT):
        def good():
            if self.problem:
                raise self.problem
            with self.lock:
                return condition(self.screen)

        return wait_for(good, lambda: f"{what}; the terminal shows:\n" + self.screen.all()[-3000:], limit)

    def shows(self, *words, what=None):
        """Waits until each of the words is on the screen itself."""
        self.wait(lambda screen: all(word in "\n".join(screen.lines) for word in words), what or f"{words} on the screen")

    def says(self, command, *words):
        """Gives the shell a command; waits until the words have come after it."""
        before = len(self.screen.all())
        self.type(command + "\n")
        self.wait(lambda screen: all(word in screen.all()[before + len(command):] for word in words), f"{command}: {words}")

    def settings(self):
        """Of the terminal, as a string, once the shell has it."""
        self.asked += 1
        answer = re.compile(rf"^settings {self.asked} are (\w{{32}})$", re.MULTILINE)
        self.type(f"echo settings {self.asked} are $(stty -g | md5sum | cut -c1-32)\n")
        self.wait(lambda screen: answer.search(screen.all()), "the settings")
        return answer.search(self.screen.all())[1]

    def close(self):
        os.kill(self.pid, signal.SIGHUP)
        wait_for(lambda: os.waitpid(self.pid, os.WNOHANG)[0], "the shell's end")
        os.close(self.fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.close()
        except ProcessLookupError:
            pass


def command(options, net, *more):
    return " ".join([options.finrace, "watch", *options.backend_flags, "--upstream", f"{net.prefix}0/24", *more])


def status(terminal):
    """The line for the whole: the one that the cursor rests on."""
    return terminal.screen.lines[terminal.screen.row]


def begin(terminal, options, net, *more):
    terminal.type(command(options, net, *more) + "\n")
    terminal.wait(lambda screen: "no verdict" in status(terminal) and not screen.cursor, "the line for the whole")


def end(terminal, settings):
    """After whatever ended it: the terminal as it was, and nothing of the lower lines."""
    terminal.wait(lambda screen: screen.cursor and screen.lines[screen.row].startswith("$"), "the end")
    terminal.says("echo ended with $?", "ended with 0")
    must("p pause" not in terminal.screen.all(), "the lower lines stay on the screen, or in the scrollback")
    must(terminal.settings() == settings, "the terminal's settings are not restored")


def tells_requests(options):
    """Whether this backend keeps its accounting in sockets."""
    version = tuple(int(number) for number in os.uname().release.split("-")[0].split(".")[:2])
    return options.backend == "cgroup" or (options.attach != "kprobe" and version >= (5, 11))


def timelines(terminal):
    return len(re.findall(r"^\d\d:\d\d:\d\d\.\d\d\d  stale_reuse", terminal.screen.all(), re.MULTILINE))


def test_view(options):
    """The upstream's line, a race, pause, filter, another size, the keys, Ctrl-Z and back, the end."""
    with network() as net, Terminal() as terminal:
        settings = terminal.settings()
        begin(terminal, options, net)
        server = listen(net)
        where = "{}:{}".format(*server.getsockname()[:2])
        busy, idle = Pair(net, server), Pair(net, server)
        for _ in range(50):
            idle.exchange()
        busy.client.sendall(b"GET /slow HTTP/1.1\r\n\r\n")
        rate = r"\d+(\.\d)?" if tells_requests(options) else "-"
        row = rf"{re.escape(where)} +1 +1 +{rate}  -  +unknown +0$"
        terminal.wait(lambda screen: any(re.search(row, line) for line in screen.lines), f"{row}: one idle, one busy, its requests")
        must(not re.search(rf"{re.escape(where)} +1 +1 +0\.0 ", terminal.screen.all()), "no request a second")

        stale(net, server)
        terminal.wait(lambda _: timelines(terminal) == 1, "the race")
        terminal.wait(lambda screen: "1 stale_reuse" in status(terminal) and
                      any(re.search(rf"{re.escape(where)} .* 1$", line) for line in screen.lines), "its counts")

        terminal.type("p")
        terminal.wait(lambda _: "PAUSED 0 new" in status(terminal), "the pause")
        stale(net, server)
        terminal.wait(lambda _: "PAUSED 1 new" in status(terminal), "what came meanwhile")
        must(timelines(terminal) == 1, "shown while paused")
        terminal.type(" ")
        terminal.wait(lambda _: timelines(terminal) == 2 and "PAUSED" not in status(terminal), "what was kept")

        terminal.type("/nothing\x7fg")
        terminal.shows("filter: nothing_")
        terminal.type("\r")
        terminal.wait(lambda _: "filter nothing (0 hidden)" in status(terminal), "the filter")
        stale(net, server)
        terminal.wait(lambda _: "filter nothing (1 hidden)" in status(terminal), "what it hides")
        must(timelines(terminal) == 2, "shown in spite of the filter")
        terminal.type("fx" + ESCAPE.decode())
        terminal.wait(lambda screen: "filter nothing (1 hidden)" in status(terminal) and
                      not any(line.startswith("filter:") for line in screen.lines), "the filter as it was")
        terminal.type(b"f" + CTRL_U + where.encode() + b"\r")
        terminal.wait(lambda _: f"filter {where}" in status(terminal), "another filter")
        stale(net, server)
        terminal.wait(lambda _: timelines(terminal) == 3, "what it lets through")

        terminal.set_size(10, 40)
        terminal.wait(lambda screen: any(re.search(rf"^{re.escape(where)} .*unknown +4$", line) for line in screen.lines) and
                      len(screen.lines) - screen.row <= 3, "the lower lines in a small terminal")
        terminal.set_size(ROWS, COLUMNS)
        terminal.wait(lambda screen: "p pause" in status(terminal) or "? keys" in status(terminal), "the lower lines as before")

        terminal.type("?")
        terminal.wait(lambda screen: "Ctrl-C" in screen.all() and "? keys" in status(terminal), "the keys")

        terminal.type(CTRL_Z)
        terminal.wait(lambda screen: screen.cursor and "Stopped" in screen.all(), "Ctrl-Z")
        must(terminal.settings() == settings, "stopped, it does not restore the terminal's settings")
        terminal.type("fg\n")
        terminal.wait(lambda screen: not screen.cursor and "stale_reuse" in status(terminal), "the view again")
        terminal.type("p")
        terminal.wait(lambda _: "PAUSED" in status(terminal), "keys after fg")
        stale(net, server)
        terminal.wait(lambda _: "PAUSED 1 new" in status(terminal), "what came while paused again")
        terminal.type("q")
        end(terminal, settings)
        must("paused: 1 verdicts were not shown" in terminal.screen.all(), "not said: what a pause kept")
        must("5 stale_reuse" in terminal.screen.all(), "no tally")
        must(timelines(terminal) == 3, "the scrollback has lost races, or shows them twice")
        for pair in (busy, idle):
            pair.close()


def test_signals(options):
    """SIGTERM, SIGINT, SIGHUP, SIGQUIT and --for: the terminal is as it was."""
    with network() as net, Terminal() as terminal:
        settings = terminal.settings()
        for how in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            begin(terminal, options, net)
            os.kill(foreground(terminal), how)
            end(terminal, settings)
        begin(terminal, options, net, "--for", "2s")
        end(terminal, settings)


def foreground(terminal):
    """The process group that has the terminal."""
    return struct.unpack("i", fcntl.ioctl(terminal.fd, termios.TIOCGPGRP, b"\0" * 4))[0]


def test_background(options):
    """A background job goes on, reads no keys and draws nothing; fg brings the view."""
    with network() as net, Terminal() as terminal:
        terminal.says(f"{command(options, net)} &", "finrace: ready")
        stale(net, listen(net))
        terminal.wait(lambda _: timelines(terminal) == 1, "the race")
        terminal.says("echo jobs; jobs", "Running")
        must(terminal.screen.cursor and "p pause" not in terminal.screen.all(), "it draws in the background")
        terminal.type("fg\n")
        terminal.wait(lambda screen: not screen.cursor and "1 stale_reuse" in status(terminal), "the view")
        terminal.type("q")
        terminal.wait(lambda screen: screen.cursor, "the end")


def test_flood(options):
    """Many alike in a second become one line, and none is lost from the count."""
    with network() as net, Terminal() as terminal:
        settings = terminal.settings()
        begin(terminal, options, net)
        nobody = listen(net)
        where = nobody.getsockname()[:2]
        nobody.close()
        for _ in range(400):
            with socket.socket() as one:
                one.settimeout(LIMIT)
                must(one.connect_ex(where) == errno.ECONNREFUSED, "somebody listens")
        terminal.wait(lambda _: "400 connect_refused" in status(terminal), "all of them counted")
        folded = re.compile(r"connect_refused  (\d+) more like it from " + re.escape("{}:{}".format(*where)))
        shown = re.compile(r"^\d\d:\d\d:\d\d\.\d\d\d  connect_refused  (?!\d)", re.MULTILINE)

        def told(screen):
            text = screen.all()
            return sum(map(int, folded.findall(text))) + len(shown.findall(text))

        terminal.wait(lambda screen: told(screen) == 400, "each of them shown or folded")
        must(len(shown.findall(terminal.screen.all())) < 100, "not folded")
        terminal.type("q")
        end(terminal, settings)


def plain(options, net, stdout, term):
    return subprocess.Popen([*command(options, net, "--for", "8s").split()], stdin=subprocess.DEVNULL, stdout=stdout,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "TERM": term},
                            preexec_fn=harness.Finrace.enter_host)


def test_plain(options):
    """Into a pipe, and on a terminal that is dumb: timelines, and nothing that steers a terminal."""
    timeline = re.compile(r"\A\d\d:\d\d:\d\d\.\d{3}  stale_reuse  \w+\n(  .*\n)+\n\Z")
    with network() as net:
        process = plain(options, net, subprocess.PIPE, "xterm")
        must(select.select([process.stderr], [], [], LIMIT)[0], "not ready")
        must("ready" in process.stderr.readline(), "not ready")
        stale(net, listen(net))
        text, said = process.communicate(timeout=LIMIT)
        must(process.returncode == 0 and "1 stale_reuse" in said, f"exit {process.returncode}: {said}")
        must(timeline.match(text), f"no timeline alone: {text!r}")
        with Terminal(term="dumb") as terminal:
            terminal.says(command(options, net), "finrace: ready")
            stale(net, listen(net))
            terminal.wait(lambda _: timelines(terminal) == 1, "the race")
            must(b"\x1b" not in terminal.bytes, "a dumb terminal is steered")
            terminal.type(b"\x03")
            terminal.wait(lambda screen: "1 stale_reuse\n" in screen.all(), "the end")


TESTS = [test_view, test_signals, test_background, test_flood, test_plain]


def test(options, results):
    print(f"the live view: backend {options.backend_name}", flush=True)
    results.run_each(TESTS, options)


def parse():
    return harness.parser_of(__doc__).parse_args()


if __name__ == "__main__":
    sys.exit(harness.main("watch_view", parse, test))
