"""The same traffic three times: seen by finrace live, in its recording, and in a capture that tcpdump took at each end.

What is judged must not depend on how it was seen, but for what a packet does not show. Left is the client's end (a proxy's),
right the server's (its upstream's).
"""

import itertools
import signal
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import harness
from harness import must, need

ENDS = ("left", "right")
WHOSE = {"left": "proxy", "right": "server"}
STOP_LIMIT = 30.0
EXAMPLES = 3
LAST_PORT = 9  # a refused connection, which tells the time at the end of each capture


class Capture:
    """tcpdump in a network namespace, by its name; as README.md says, but for a larger buffer, unless told else."""

    def __init__(self, namespace, path, device="any", flags=("-s", "128", "-B", "16384"), what="tcp or icmp or icmp6"):
        self.path = str(path)
        # -Z root: tcpdump would give up root and then may not write into the folder.
        self.process = subprocess.Popen(
            [need("ip", "iproute2"), "netns", "exec", namespace, need("tcpdump", "tcpdump"), "-i", device, "-n", "-U", "-Z", "root",
             *flags, "-w", self.path, what], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=harness.die_with_parent)
        harness.wait_said(self.process, "listening on")

    def stop(self):
        """Ends it, and asserts that it missed nothing."""
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=STOP_LIMIT)
        must(b"0 packets dropped by kernel" in said, f"the capture is not whole: {said.decode().strip()}")

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_LIMIT)


def tell_the_time(namespace, address):
    """To captures at both ends: what is not answered is silence once time has passed."""
    subprocess.run(["ip", "netns", "exec", namespace, "bash", "-c", f"</dev/tcp/{address}/{LAST_PORT}"], stderr=subprocess.DEVNULL,
                   timeout=STOP_LIMIT, check=False)


def records_of(options, path, flags=(), piped=False):
    """(lines, what was said) of a capture's replay; asserts that all are valid, and leaves their numbers out."""
    command = [options.finrace, "run", "--replay", "-" if piped else path, *flags]
    if piped:
        with open(path, "rb") as file:
            cat = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)
        done = subprocess.run(command, stdin=cat.stdout, capture_output=True, timeout=harness.LIMIT * 10, check=False)
        cat.wait()
    else:
        done = subprocess.run(command, capture_output=True, timeout=harness.LIMIT * 10, check=False)
    must(done.returncode == 0, f"exit {done.returncode}: {done.stderr[-1000:]!r}")
    lines = done.stdout.splitlines()
    found = harness.check_records.complaints(lines)
    must(not found, lambda: f"{len(found)} complaints about {len(lines)} records: {found[0]}")
    return harness.unnumbered(lines), done.stderr.decode()


def by_connection(records):
    """The verdicts among them: for each connection's ends a list, in the order of judgement."""
    verdicts = defaultdict(list)
    for record in records:
        if record.name == "finrace.verdict":
            verdicts[record.ends].append(record)
    return verdicts


def verdicts_of(lines):
    """The same, of lines of JSON."""
    return by_connection(map(harness.parse_line, lines))


def key(record):
    return record.at("finrace.cause"), record.at("finrace.variant"), record.at("finrace.connection.exchange"), record.at("finrace.request.bytes")


# ---- what a capture does not tell ----------------------------------------------------------------------------------------


LOST_ON_THE_WAY = "what the path drops never comes to the upstream's end"


@dataclass
class Blind:
    """Where a capture may differ from backend cgroup on the client's host: as narrow as can be, and why."""

    end: str
    live: tuple | None  # cause, variant, certainty; None: no verdict
    captured: tuple | None
    why: str


GAVE_UP_ON_SILENCE = ("path_dropped", "gave_up", "likely")
GAVE_UP_OPENING = ("connect_timeout", "gave_up", "proven")
FIN_WAITS = "the FIN by which the proxy gave up waits behind what is not acknowledged"
# cgroup does not look at the words of a segment that leaves within a tick of the answer: connection_plain_send().
COUNTED_APART = "an answer had come within a request's first flight, so that its rest may look like another one"
# See wire.behind_uploads(): cgroup looks at the first words of a segment.
RIDES_BEHIND = "the head of a request left in one segment with the end of the one before"
BOTH_RESET = "a proxy that has its answer reset the connection as the upstream did: which was first is a matter of microseconds"
BLIND = (
    Blind("left", GAVE_UP_ON_SILENCE, ("path_dropped", None, "likely"), FIN_WAITS),
    Blind("left", GAVE_UP_ON_SILENCE, None, FIN_WAITS + ", and leaves when the path has healed, as any other would"),
    Blind("left", GAVE_UP_OPENING, ("connect_timeout", None, "likely"),
          "who gave up does not show, and ICMP's answer may have been filtered out"),
    Blind("left", ("connect_timeout", None, "possible"), ("connect_timeout", None, "likely"),
          "cgroup can't tell who gave up from ICMP's answer, of which a capture shows none"),
    Blind("left", None, ("connect_timeout", None, "likely"), "the SYNs show, where cgroup can't tell how they ended"),
    Blind("right", GAVE_UP_ON_SILENCE, None, LOST_ON_THE_WAY),
    Blind("right", GAVE_UP_OPENING, None, LOST_ON_THE_WAY),
    Blind("right", ("connect_timeout", None, "possible"), None, LOST_ON_THE_WAY),
    Blind("right", ("keepalive_race", "reset_crossed", "proven"), ("keepalive_race", "reset_closed", "likely"),
          "a request that came late on its way looks like one that was sent after an RST that was lost"),
    *(Blind(end, ("accept_stalled", "gave_up", "likely"), None, FIN_WAITS + ", and leaves once the queue has room, as any other would")
      for end in ENDS),
    *(Blind(end, None, ("request_rejected", "early_answer", "possible"),
            "the FIN of a proxy that has its answer waits behind the rest of the request, which a shut window keeps")
      for end in ENDS),
    *(Blind(end, ("request_rejected", "early_answer", "possible"), captured, why) for end in ENDS for captured, why in (
        (("request_rejected", None, "likely"), COUNTED_APART),
        (("request_rejected", "early_answer", "possible"), RIDES_BEHIND), (None, BOTH_RESET))),
)


def judged(record):
    return record and (record.at("finrace.cause"), record.at("finrace.variant"), record.at("finrace.certainty"))


# Reasons that depend on the upstream's other closes: on their order, within moments, and on rests that are known to a tick.
BY_OTHER_CLOSES = {"restart", "request_limit", "unannounced", "early_purge", "unknown"}


def same(live, captured):
    """Cause, variant, certainty, exchange, size, completeness; and the reason, as far as it can be known at that moment."""
    reasons = {record.at("finrace.reason") for record in (live, captured)}
    return (judged(live) == judged(captured) and key(live) == key(captured) and
            live.at("finrace.incomplete") == captured.at("finrace.incomplete") and
            (len(reasons) == 1 or "unknown" in reasons and None not in reasons or reasons <= BY_OTHER_CLOSES))


@dataclass
class Comparison:
    """Live verdicts beside a capture's, connection by connection and in order; ports that were used twice included."""

    same: int = 0
    excused: list = field(default_factory=list)  # (Blind, the connection's ends, live verdict or None)
    differ: list = field(default_factory=list)  # for people

    def unseen(self):
        """Live verdicts that the capture need not have."""
        return [verdict for blind, _, verdict in self.excused if blind.captured is None]

    def counted_apart(self):
        """Connections on which live and capture count the requests differently."""
        return {ends for blind, ends, _ in self.excused if blind.why == COUNTED_APART}

    def seen_better(self):
        """Connections that the capture alone has a name for."""
        return {ends for blind, ends, _ in self.excused if blind.live is None}

    def __str__(self):
        why = Counter(f"{(blind.live or blind.captured)[0]}: {blind.why}" for blind, _, _ in self.excused)
        return f"{self.same} verdicts are the same" + "".join(f"; {count} {text}" for text, count in why.items())


def compare(live, captured, end, riding=(), both_reset=()):
    """`live`, `captured`: as by_connection() gives them. `riding`, `both_reset`: the ends of the connections with
    wire.behind_uploads(), and of those that both sides reset."""
    limited = {RIDES_BEHIND: riding, BOTH_RESET: both_reset}
    found = Comparison()
    for ends in {**live, **captured}:
        for one, other in itertools.zip_longest(live.get(ends, ()), captured.get(ends, ())):
            if one and other and same(one, other):
                found.same += 1
                continue
            blind = next((rule for rule in BLIND if rule.end == end and rule.live == judged(one) and
                          rule.captured == judged(other) and ends in limited.get(rule.why, [ends])), None)
            if blind:
                found.excused.append((blind, ends, one))
            else:
                found.differ.append(f"{ends}: live {words(one)}, captured {words(other)}")
    return found


def words(record):
    if record is None:
        return "nothing"
    return (f"{record.verdict} [{record.at('finrace.reason')}, exchange {record.at('finrace.connection.exchange')}, "
            f"{record.at('finrace.request.bytes')} bytes]: {record.at('finrace.message')}")


def check_same(found):
    must(not found.differ, lambda: f"{len(found.differ)} differ, {found.same} are the same:\n          " +
         "\n          ".join(found.differ[:EXAMPLES]))


# ---- reports -------------------------------------------------------------------------------------------------------------


NEAR_MS, NEAR_SHARE = 10, 0.01  # two ticks of the kernel's clock, in which cgroup knows when an answer came; and jitter


def near(one, other, spread=0):
    return abs(one - other) <= max(NEAR_MS, NEAR_SHARE * max(one, other), spread / 2)


def learned_alike(one, other):
    """Of two learned timeouts, or None. What is spread widely on the path's account has no sharp middle."""
    if one is None or other is None:
        return one is other
    return near(one["ms"], other["ms"], max(one["spread_ms"], other["spread_ms"]))


def pools_differ(recorded, report, unseen=(), seen_better=(), counted_apart=(), absent=0, riding=0):
    """What two reports say apart of the same pools: the recording's, and the live one or a capture's. `unseen`, `seen_better`,
    `counted_apart`: as Comparison has them. `absent`: connections that do not come to where the capture was taken.
    `riding`: requests that cgroup may not tell from the one before."""
    pools = [{harness.place_of(pool): pool for pool in one["upstreams"]} for one in (recorded, report)]
    must(pools[0], "there is no pool")
    if pools[0].keys() != pools[1].keys():
        return [f"pools {list(pools[0])} and {list(pools[1])}"]
    differ = []
    for place, one in pools[0].items():
        other = pools[1][place]
        # The live one knows what the ends have been told as well, and which open connections rest.
        told = one["state"] == "unknown" and (other["state"] == "not_reused" and other["open"] > 0 or
                                              any("present" in other.get(who, {}) for who in ("proxy", "server")))
        if one["state"] != other["state"] and not told:
            differ.append(f"state {one['state']} and {other['state']}")
        for name in ("idle_timeout", "own_idle_limit"):
            if not learned_alike(one.get(name), other.get(name)):
                differ.append(f"{name} {one.get(name)} and {other.get(name)}")
        # Requests count at their connection's end, which the path may have dropped.
        asked = sum(verdict.at("finrace.connection.exchange", 0) for verdict in unseen)
        begun = [dict(pool, connections=pool["connections"] + pool["open"]) for pool in (one, other)]
        for name, fewer, more in (("connections", absent, 0),
                                  ("requests", asked + len(counted_apart), len(counted_apart) + riding),
                                  ("unclassified", len(seen_better), len(unseen) + riding)):
            if not -fewer <= begun[1][name] - begun[0][name] <= more:
                differ.append(f"{begun[0][name]} and {begun[1][name]} {name}")
        if not unseen and not near(one["longest_reused_idle_ms"], other["longest_reused_idle_ms"]):
            differ.append(f"used again after {one['longest_reused_idle_ms']} and {other['longest_reused_idle_ms']} ms")
    return differ


def check_pools(*arguments, **more):
    differ = pools_differ(*arguments, **more)
    must(not differ, "; ".join(differ))


def check_place(report, end):
    """Where a capture was taken, and that it is whole."""
    capture = report["captures"][0]
    due = {"left": "client", "right": "server"}[end]
    must(capture["taken_at"] == due and capture["certainty"] == "sure", f"taken_at {capture['taken_at']}, {capture.get('certainty')}")
    must(capture["missing"] == 0 and capture["one_direction"] == 0 and capture["unreadable"] == 0, f"gaps: {capture}")
