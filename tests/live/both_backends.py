#!/usr/bin/python3
"""Backends trace and cgroup at once, on the same accidents: the same verdicts, connection by connection.

Two finraces run side by side, which is allowed, while the race lab (tools/lab.py) causes each accident. Every verdict of the
one must be a verdict of the other, alike in every field, but for

  what cgroup can't observe   absent there, and only there: the process (on some kernels), the network namespace's number,
                              how much the process left unread, the socket's error, what became of the request, what
                              the upstream's own process did (both ends of the lab's connections are on this host)
  what others do meanwhile    a verdict of trace's waits for its outcome, half a second at most: by then more may be known
                              of the upstream
  times                       each backend reads the clock for itself: within a few ticks
  what follows from that      cgroup says less: a smaller size (FOLLOWS), a lower certainty, a shorter sentence
  the sentence                its numbers of milliseconds may differ as the times do
  the record's own            its time stamp and the connection's id

and every upstream must have the same counts. All fields that differ, and how often, are listed, whether they may or not.

Made for `scripts/vm KERNEL --icount`, where time counts instructions: elsewhere a busy machine may stand still between the
two, and a time that lies near one of the classifier's limits falls to either side of it.
"""

import argparse
import copy
import os
import re
import sys
import time
from collections import Counter, defaultdict

sys.dont_write_bytecode = True
import harness  # noqa: E402
import lab_check  # noqa: E402
from harness import Finrace, must  # noqa: E402

CLOCK_MONOTONIC_COARSE = 6
TICK_MS = 1000 * time.clock_getres(CLOCK_MONOTONIC_COARSE)
IDLE_MS = 2 * TICK_MS  # the kernel notes the last byte's time to a tick, and each backend reads its own note
MEASURED_MS = TICK_MS  # two programs see one packet one after the other
EXAMPLES = 8
NOT_OBSERVED = (
    "finrace.outcome.", "finrace.server_end.", "process.", "finrace.connection.netns", "finrace.evidence.unread_bytes",
    "finrace.evidence.socket_error", "http.response.status_code",
)
# What can't be told without the client behind the exchange: to cgroup such an end is unclassified.
BY_ITS_CLIENT = ("proxy_timeout", "client_abort")
OWN = ("timestamp", "finrace.connection.id", "finrace.run", "finrace.sequence")
# What a verdict is. A fact that one backend leaves out is a difference.
COMPARED = (
    "finrace.cause", "finrace.variant", "finrace.certainty", "finrace.side", "finrace.connection.exchange",
    "finrace.connection.reused", "finrace.request.bytes", "finrace.request.unacked_bytes",
    "finrace.evidence.fin_unacked_bytes", "finrace.response.bytes", "finrace.incomplete",
)
# By scenario, what differs because of what cgroup can't observe: what was written and not yet sent, and the socket's error.
UNSENT = ("finrace.request.bytes", "finrace.request.unacked_bytes", "finrace.evidence.fin_unacked_bytes",
          "finrace.evidence.reset_unacked_bytes", "finrace.evidence.quiet_before_close_ms", "finrace.message")
FOLLOWS = {
    "body_10mb_interrupted": UNSENT,
    "connect_unreachable": ("finrace.certainty", "finrace.message"),
    "silence_after_acknowledgement": ("finrace.certainty",),
}
# What the upstream's own process did makes trace surer, and its sentence longer.
FOLLOWS_SERVER_END = ("finrace.certainty", "finrace.message")
LEARNED_MEANWHILE = {
    "finrace.upstream.samples": lambda trace, cgroup: cgroup <= trace,
    "finrace.reason": lambda trace, cgroup: cgroup == "unknown",
}
CERTAINTIES = ("possible", "likely", "proven")
# Times that come from the last byte, which the kernel notes to a tick.
NOTED = (
    "finrace.connection.idle_ms", "finrace.evidence.quiet_before_close_ms", "finrace.upstream.idle_timeout_ms",
    "finrace.upstream.spread_ms",
)
COUNTS = (
    "unclassified", "idle_closes.by_peer", "idle_closes.by_local", "complete_closes", "connections.opened",
    "connections.open_failed", "connections.closed", "exchanges", "verdicts",
)


def flat(value, path=""):
    """{"a.b": value} of nested objects."""
    if not isinstance(value, dict):
        return {path: value}
    fields = {}
    for name, inner in value.items():
        fields.update(flat(inner, f"{path}.{name}" if path else name))
    return fields


def wordless(message):
    """A sentence without its numbers of milliseconds."""
    return re.sub(r"[\d.]+ ms", "N ms", message)


class Difference:
    """Of one field: how often it differs or is missing, and how far apart its times are."""

    def __init__(self):
        self.kinds = Counter()
        self.apart = 0.0
        self.examples = []
        self.bad = 0

    def note(self, kind, bad, example, apart=0.0):
        self.kinds[kind] += 1
        self.apart = max(self.apart, apart)
        self.bad += bad
        if bad and len(self.examples) < EXAMPLES:
            self.examples.append(example)


class Comparison:
    def __init__(self, rows, ports, trace, cgroup):
        self.rows, self.ports = rows, ports
        self.records = {"trace": trace, "cgroup": cgroup}
        self.scenarios = {lab_check.ends(row): row["scenario"] for row in rows}
        self.verdicts = {name: self.by_connection(records) for name, records in self.records.items()}
        self.differences = defaultdict(Difference)
        self.pairs = []
        for ends, found in self.verdicts["trace"].items():
            other = self.verdicts["cgroup"].get(ends, [])
            if len(found) == len(other):
                self.pairs += [(ends, ours, theirs) for ours, theirs in zip(found, other)]
        for ends, ours, theirs in self.pairs:
            self.compare(ends, ours, theirs)

    def by_connection(self, records):
        verdicts = defaultdict(list)
        for one in records:
            if one.name == "finrace.verdict" and one.ends[3] in self.ports:
                verdicts[one.ends].append(one)
        return verdicts

    def where(self, ends):
        return f"{self.scenarios.get(ends, 'no scenario')} {ends[0]}:{ends[1]}"

    def compare(self, ends, trace, cgroup):
        ours, theirs = flat(trace), flat(cgroup)
        for path in sorted({*ours, *theirs}):
            difference, where = self.differences[path], self.where(ends)
            if path not in theirs:
                difference.note("only trace", not path.startswith(NOT_OBSERVED), f"{where}: only trace has it: {ours[path]!r}")
            elif path not in ours:
                difference.note("only cgroup", True, f"{where}: only cgroup has it: {theirs[path]!r}")
            elif ours[path] != theirs[path]:
                learned_less = theirs.get("finrace.upstream.samples", 0) < ours.get("finrace.upstream.samples", 0)
                if path == "finrace.upstream.spread_ms" and learned_less and theirs[path] < ours[path]:
                    difference.note("less by cgroup", False, where)
                    continue
                self.unlike(difference, path, ours[path], theirs[path], where, "finrace.server_end.event" in ours)

    @staticmethod
    def unlike(difference, path, ours, theirs, where, server_seen):
        example = f"{where}: trace {ours!r}, cgroup {theirs!r}"
        unseen = path in FOLLOWS.get(where.split()[0], ())
        if unseen or (server_seen and path in FOLLOWS_SERVER_END):
            if path == "finrace.certainty":
                less = CERTAINTIES.index(theirs) < CERTAINTIES.index(ours)
            elif path == "finrace.message":
                less = unseen or wordless(ours).startswith(wordless(theirs))
            else:
                less = theirs <= ours + (IDLE_MS if path.endswith("_ms") else 0)
            difference.note("less by cgroup", not less, example)
        elif path in OWN:
            difference.note("its own", False, example)
        elif path in LEARNED_MEANWHILE:
            difference.note("less by cgroup", not LEARNED_MEANWHILE[path](ours, theirs), example)
        elif path == "finrace.message":
            difference.note("other numbers", wordless(ours) != wordless(theirs), example)
        elif path.endswith("_ms") and isinstance(ours, (int, float)):
            apart = abs(ours - theirs)
            limit = IDLE_MS if path in NOTED else MEASURED_MS
            difference.note("other time", apart > limit, example, apart)
        elif path == "finrace.evidence.srtt_us":
            # tcp_ack() updates it between the places where the two look.
            difference.note("other time", abs(ours - theirs) > MEASURED_MS * 1000, example, abs(ours - theirs) / 1000)
        else:
            difference.note("other value", True, example)

    def print_differences(self):
        print(f"  {'fields that differ':42} {'how often':>10}  of {len(self.pairs)} verdicts")
        for path, difference in sorted(self.differences.items()):
            for kind, count in difference.kinds.items():
                apart = f", at most {difference.apart:.3f} ms apart" if difference.apart else ""
                print(f"  {path:42} {count:10}  {kind}{apart}{'  <- must not' if difference.bad else ''}")

    def same_connections(self):
        trace, cgroup = (self.verdicts[name] for name in ("trace", "cgroup"))
        problems = []
        for ends in sorted({*trace, *cgroup}):
            ours = [one.verdict for one in trace.get(ends, []) if one.at("finrace.cause") not in BY_ITS_CLIENT]
            theirs = [one.verdict for one in cgroup.get(ends, [])]
            if len(ours) != len(theirs):
                problems.append(f"{self.where(ends)}: trace {ours or 'nothing'}, cgroup {theirs or 'nothing'}")
        must(trace, "trace said nothing at all")
        must(not problems, lambda: f"{len(problems)} connections: " + "\n            ".join(problems[:EXAMPLES]))

    def field(self, path):
        difference = self.differences.get(path)
        held = sum(1 for _, ours, _ in self.pairs if path in flat(ours))
        must(held > 0 or path in ("finrace.variant",), f"no verdict has {path}")
        must(not difference or not difference.bad,
             lambda: f"{difference.bad} of {len(self.pairs)}:\n            " + "\n            ".join(difference.examples))

    def other_fields(self):
        bad = {path: one for path, one in self.differences.items() if one.bad and path not in COMPARED and path != "finrace.connection.idle_ms"}
        must(not bad, lambda: "\n            ".join(f"{path}: {one.bad} of {len(self.pairs)}: {one.examples[0]}" for path, one in sorted(bad.items())))

    def upstreams(self, name):
        """The last record of each of the lab's upstreams, by port."""
        found = {}
        for one in self.records[name]:
            if one.name == "finrace.upstream" and one.at("network.peer.port") in self.ports:
                found[one.at("network.peer.port")] = one
        return found

    def counts(self, path):
        ours, theirs = self.upstreams("trace"), self.upstreams("cgroup")
        must(ours and set(ours) == set(theirs), lambda: f"upstreams {sorted(ours)} and {sorted(theirs)}")
        names = {row["server_port"]: row["scenario"] for row in self.rows}
        unlike = []
        for port in sorted(ours):
            one, other = (side[port].at("finrace.upstream." + path) for side in (ours, theirs))
            verdicts = dict(ours[port].at("finrace.upstream.verdicts", {}))
            by_client = sum(verdicts.pop(cause, 0) for cause in BY_ITS_CLIENT)
            if by_client and path == "verdicts":
                one = verdicts
            elif by_client and path == "unclassified":
                one += by_client
            if one != other:
                unlike.append(f"{names.get(port)}: trace {one}, cgroup {other}")
        must(not unlike, lambda: f"{len(unlike)} of {len(ours)} upstreams:\n            " + "\n            ".join(unlike[:EXAMPLES]))

    def learned(self):
        ours, theirs = self.upstreams("trace"), self.upstreams("cgroup")
        unlike = []
        for port in sorted(set(ours) & set(theirs)):
            one, other = (side[port].at("finrace.upstream.idle_timeout_ms") for side in (ours, theirs))
            samples = [side[port].at("finrace.upstream.samples") for side in (ours, theirs)]
            if (one is None) != (other is None) or samples[0] != samples[1] or (one is not None and abs(one - other) > IDLE_MS):
                unlike.append(f"port {port}: trace {one} ms of {samples[0]}, cgroup {other} ms of {samples[1]}")
        must(not unlike, lambda: "\n            ".join(unlike[:EXAMPLES]))


def backend_options(options, backend):
    chosen = copy.copy(options)
    chosen.backend, chosen.attach = backend, options.attach if backend == "trace" else None
    chosen.backend_flags = ["--backend", backend] + (["--attach", chosen.attach] if chosen.attach else [])
    return chosen


def test(options, results):
    attach = f" by {options.attach}" if options.attach else ""
    print(f"backends trace{attach} and cgroup on Linux {os.uname().release}, family {options.family}, "
          f"{options.runs} runs of each scenario", flush=True)
    flags = ["--connections"] if options.connections else []
    chosen = {name: backend_options(options, name) for name in ("trace", "cgroup")}
    with Finrace(chosen["trace"], *flags, interval="1m") as trace, Finrace(chosen["cgroup"], *flags, interval="1m") as cgroup:
        rows, ports = lab_check.run_lab(options, os.path.join(options.folder, "truth.jsonl"))
        for name, finrace in (("trace", trace), ("cgroup", cgroup)):
            results.run(f"{name} ran beside the other to the end and ended with 0", finrace.stop)
        records = {"trace": trace.records(), "cgroup": cgroup.records()}
        for name in records:
            results.run(f"{name} lost nothing", lab_check.nothing_lost, records[name])
            results.run(f"{name} is what ran", lab_check.the_asked_backend, chosen[name], records[name])
        compared = Comparison(rows, ports, records["trace"], records["cgroup"])
        compared.print_differences()
        results.run("verdicts on the same connections", compared.same_connections)
        for path in COMPARED:
            results.run(f"the same {path}", compared.field, path)
        results.run(f"idle_ms within two ticks ({IDLE_MS:g} ms)", compared.field, "finrace.connection.idle_ms")
        results.run("every other field alike, or not to be observed by cgroup", compared.other_fields)
        for path in COUNTS:
            results.run(f"per upstream: the same {path}", compared.counts, path)
        results.run("per upstream: the same idle timeout learned", compared.learned)
        for name, finrace in (("trace", trace), ("cgroup", cgroup)):
            results.run(f"every record of {name} is valid", harness.check_schema, finrace)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    parser.add_argument("--finrace", default=os.path.join(harness.ROOT, "build", "finrace"), help="the binary (default: build/finrace)")
    parser.add_argument("--attach", choices=("fentry", "kprobe"), help="of backend trace")
    parser.add_argument("--logs", help="folder for what a failed run leaves (default: a new one in /tmp)")
    parser.add_argument("--runs", type=int, default=3, help="of each scenario")
    parser.add_argument("--scenario", default="all", help="as for lab.py")
    parser.add_argument("--family", choices=("4", "6", "mapped"), default="4")
    parser.add_argument("--parallel", type=int, default=20)
    parser.add_argument("--connections", action="store_true", help="both run with --connections")
    parser.add_argument("--delay-line", default=os.path.join(harness.ROOT, "build", "delay-line"))
    parser.set_defaults(backend="trace", delay=None, keep_alive=None, local=False)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(harness.main("both_backends", parse, test))
