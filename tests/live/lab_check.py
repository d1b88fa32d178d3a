#!/usr/bin/python3
"""finrace against the race lab: each scripted accident must get exactly the verdict that it is due, and nothing else one.

The lab (tools/lab.py) writes the truth, a line for each connection; a verdict is found by the connection's four of
address and port. Beside cause, variant and certainty, the exchange's number, the request's size, how long the connection
had rested and how the upstream closed it are compared, the verdict's delay, every record's validity by the schema, and that
nothing was lost.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict

sys.dont_write_bytecode = True
import harness  # noqa: E402
from harness import Finrace, Wrong, must  # noqa: E402

VERDICT_LIMIT = 1.0  # from the connection's end to its record
SILENCE = int(1e9)  # ns; what the lab's scenarios of that name let pass at least, after a request that nothing acknowledges
# How far a rest may be from the lab's, in ms: the kernel keeps the last receipt to a tick (10 ms); the server's end is two delays
# off, and the lab's client may have been late to read what its kernel had, for as long as the row's `stall_ms`.
IDLE_EARLY, IDLE_LATE = 20, 60
BY_UPSTREAM = {"keepalive_race", "stale_response", "stale_reuse", "upstream_closed", "upstream_reset", "response_cut", "request_rejected"}
LAB_LIMIT, LAB_LIMIT_RUN = 1500, 40  # seconds, and for each run of every scenario
EXAMPLES = 5


def run_lab(options, truth):
    # Ports of a run's own: other labs may be at work on this machine, with the same addresses.
    base = random.randrange(10000, 19900)
    command = [
        "/usr/bin/python3", os.path.join(harness.ROOT, "tools", "lab.py"), "--truth", truth, "--runs", str(options.runs),
        "--scenario", options.scenario, "--family", options.family, "--parallel", str(options.parallel),
        "--port-base", str(base), "--delay-line", options.delay_line,
    ]
    if options.delay:
        command += ["--delay", options.delay]
    if options.keep_alive:
        command += ["--keep-alive", options.keep_alive]
    if options.local:
        command.append("--local")
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=LAB_LIMIT + options.runs * LAB_LIMIT_RUN)
    tail = done.stderr.strip().splitlines()[-1:]
    if done.returncode == 2:
        raise harness.EnvironmentProblem(f"the lab does not run: {done.stderr.strip()[-1000:]}")
    must(done.returncode == 0, f"the lab failed ({done.returncode}): {done.stderr[-2000:]}")
    print(f"  {tail[0] if tail else 'the lab said nothing'}", flush=True)
    with open(truth, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return rows, range(base, base + 100)


def ends(row):
    return row["client_address"], row["client_port"], row["server_address"], row["server_port"]


def problem_with(row, verdicts):
    """None when they fit; else ("wrong" or "missing", why)."""
    expected = row["expected"]
    if expected and expected.get("anything"):
        return None
    if expected is None or expected.get("unclassified"):
        if verdicts:
            return "wrong", f"{verdicts[0].verdict} where no verdict is due"
        return None
    if not verdicts:
        return "missing", "no verdict"
    if len(verdicts) > 1:
        return "wrong", "more than one verdict: " + ", ".join(one.verdict for one in verdicts)
    verdict = verdicts[0]
    if not verdict.client:
        return "wrong", f"on side {verdict.at('finrace.side')}"
    if verdict.at("finrace.cause") != expected["cause"]:
        return "wrong", f"{verdict.verdict}, not {expected['cause']}"
    accepted = row.get("accept_variants") or ([expected["variant"]] if expected.get("variant") else None)
    if accepted and verdict.at("finrace.variant") not in accepted:
        return "wrong", f"{verdict.verdict}, not variant {' or '.join(accepted)}"
    # Then problem_with_server_end() judges that.
    corroborated = row["server_unread_bytes"] and verdict.at("finrace.server_end.unread_bytes")
    if expected.get("certainty") and not corroborated and verdict.at("finrace.certainty") != expected["certainty"]:
        return "wrong", f"{verdict.verdict}, not {expected['certainty']}"
    if verdict.at("finrace.incomplete"):
        return "wrong", "incomplete, though finrace saw the connection from its beginning"
    if row["exchange"] and verdict.at("finrace.connection.exchange") != row["exchange"]:
        return "wrong", f"exchange {verdict.at('finrace.connection.exchange')}, not {row['exchange']}"
    idle, rested = verdict.at("finrace.connection.idle_ms"), row["idle_ms"]
    if rested is not None and row["client_sent_at"] and (idle is None or not rested - IDLE_EARLY <= idle <= rested + row["stall_ms"] + IDLE_LATE):
        return "wrong", f"idle for {idle} ms, not {rested}"
    close = verdict.at("finrace.close.by"), verdict.at("finrace.close.how")
    if verdict.at("finrace.cause") in BY_UPSTREAM and row["server_close_how"] != "none" and close != ("peer", row["server_close_how"]):
        return "wrong", f"closed by {' by '.join(map(str, close))}, not by the peer by {row['server_close_how']}"
    size = verdict.at("finrace.request.bytes")
    if row["request_bytes"] and size != row["request_bytes"]:
        return "wrong", f"{size} request bytes, not {row['request_bytes']}"
    return None


def problem_with_server_end(row, verdict):
    """Both ends are on this host: what the server had read, or had not, is evidence, and leaves nothing to guess."""
    request, unread = row["request_bytes"], row["server_unread_bytes"]
    cause = verdict.at("finrace.cause")
    whole = 0 < request == row["server_read_bytes"]
    taken = cause in ("upstream_closed", "upstream_reset") and whole and row["server_close_how"] != "none"
    found = verdict.at("finrace.server_end.unread_bytes")
    coming_in = request == 0 and found is not None and found > unread  # a body in full flow: more may come before the close
    if not unread and not taken:
        if found and not coming_in and row["server_close_how"] != "none":  # else the lab did not see that end
            return "wrong", f"the server's end has {found} bytes unread, where all had been read"
        return None
    if found != unread and not coming_in:
        return "wrong", f"the server's end has {found} bytes unread, not {unread}"
    if (0 < request <= unread or cause == "request_rejected" or taken) and verdict.at("finrace.certainty") != "proven":
        return "wrong", f"{verdict.verdict}, though the server's end {'had read it' if taken else 'had it unread'}"
    return None


def describe(row, verdicts, why):
    facts = {name: value for name, value in row.items() if name not in ("expected", "scenario", "phase", "family")}
    lines = [f"{row['scenario']}: {why}", f"    due:   {json.dumps(row['expected'])}", f"    truth: {json.dumps(facts)}"]
    lines += [f"    said:  {json.dumps(one)}" for one in verdicts] or ["    said:  nothing"]
    return "\n".join(lines)


class Judgement:
    def __init__(self, rows, records, ports, sees_servers):
        self.rows = rows
        self.records = records
        mine = [one for one in records if one.name == "finrace.verdict" and one.ends[3] in ports]
        self.verdicts = defaultdict(list)
        for one in mine:
            self.verdicts[one.ends].append(one)
        known = {ends(row) for row in rows}
        self.of_servers = [one for one in records if one.name == "finrace.verdict" and not one.client and one.ends[3] in ports]
        self.foreign = [one for one in mine if one.ends not in known]
        self.tables = defaultdict(Counter)
        self.examples = defaultdict(list)
        for row in rows:
            table = self.tables[row["scenario"]]
            if row.get("slipped"):
                table["slipped"] += 1
                continue
            table["learned" if row["phase"] == "learn" else "runs"] += 1
            found = self.verdicts[ends(row)]
            problem = problem_with(row, found)
            if problem is None and sees_servers and found and row["phase"] == "run":
                problem = problem_with_server_end(row, found[0])
            if problem is None:
                table["right"] += row["phase"] == "run"
                continue
            table[problem[0]] += 1
            if len(self.examples[row["scenario"]]) < EXAMPLES:
                self.examples[row["scenario"]].append(describe(row, found, problem[1]))

    def print_table(self):
        print(f"  {'scenario':32} {'runs':>5} {'right':>6} {'wrong':>6} {'missing':>8}  {'slipped':>8}")
        for name, table in sorted(self.tables.items()):
            print(f"  {name:32} {table['runs']:5} {table['right']:6} {table['wrong']:6} {table['missing']:8}  "
                  f"{table['slipped']:8}")

    def scenario(self, name):
        table = self.tables[name]
        examples = "\n          ".join("\n".join(self.examples[name]).split("\n"))
        must(not table["wrong"] and not table["missing"],
             f"{table['wrong']} wrong, {table['missing']} missing of {table['runs']}:\n          {examples}")
        must(table["runs"] > 0, "it never ran")

    def unclassified(self):
        """What is no cause has no verdict but is counted, per upstream: here a server port is a scenario."""
        counts = {}
        for one in self.records:
            if one.name == "finrace.upstream" and one.at("network.peer.port"):
                counts[one.at("network.peer.port")] = one.at("finrace.upstream.unclassified")
        for name in sorted(self.tables):
            rows = [row for row in self.rows if row["scenario"] == name]
            due = sum(1 for row in rows if (row["expected"] or {}).get("unclassified"))
            vague = sum(1 for row in rows if row.get("slipped"))
            count = counts.get(rows[0]["server_port"])
            must(count is not None, f"{name}: no finrace.upstream record of its port {rows[0]['server_port']}")
            must(due <= count <= due + vague, f"{name}: {count} unclassified, {due} were due ({vague} runs slipped)")

    def promptness(self, seen):
        delays = [one.arrived - one.time for found in self.verdicts.values() for one in found]
        must(delays, "no verdict at all")
        late = [delay for delay in delays if delay > VERDICT_LIMIT]
        ordered = sorted(delays)
        seen.append(f"median {ordered[len(ordered) // 2] * 1e3:.0f} ms, longest {ordered[-1] * 1e3:.0f} ms")
        must(not late, f"{len(late)} of {len(delays)} verdicts came late, the latest after {max(delays):.3f} s")

    def end_times(self, slack):
        """The verdict's own time is that of the accident: when the last of request and close was under way, or soon after."""
        for row in self.rows:
            found = self.verdicts.get(ends(row))
            begun = moments = [row[name] for name in ("server_closed_at", "client_sent_at") if row.get(name)]
            if row["scenario"].startswith("silence_") and moments:
                # Nothing but its length is the accident: it is over SILENCE after the request at the earliest, and at the latest
                # when the client has woken, which may be long after its kernel on a busy machine.
                begun, moments = [row["client_sent_at"] + SILENCE], [row["client_ended_at"]]
            if row.get("slipped") or not found or not moments:
                continue
            opened = harness.wall_time(row["opened_at_wall"])
            early, late = (found[0].time - opened - (max(at) - row["opened_at"]) / 1e9 for at in (begun, moments))
            must(early >= -slack and late <= VERDICT_LIMIT,
                 lambda: describe(row, found, f"the verdict's time is {early:.3f} s from the earliest end, {late:.3f} s from the latest"))

    def nothing_foreign(self):
        must(not self.foreign, lambda: f"{len(self.foreign)} verdicts on connections that the lab did not make: {self.foreign[0]}")


    def nothing_twice(self):
        must(not self.of_servers, lambda: f"{len(self.of_servers)} verdicts on accidents that the client's side has: {self.of_servers[0]}")


def nothing_lost(records):
    health = [one for one in records if one.name == "finrace.health"]
    must(health, "no health record")
    last = health[-1]
    must(last.at("finrace.health.last") is True, "the last health record is not the last summary")
    must(last.at("finrace.lost_events") == 0 and last.at("finrace.health.complete") is True, f"losses: {json.dumps(last)}")


def the_asked_backend(options, records):
    last = [one for one in records if one.name == "finrace.health"][-1]
    must(last.at("finrace.health.backend") == options.backend, f"backend {last.at('finrace.health.backend')}")
    if options.attach:
        must(last.at("finrace.health.attach") == options.attach, f"attached by {last.at('finrace.health.attach')}")


def test(options, results):
    print(f"lab check: backend {options.backend_name}, family {options.family}, {options.runs} runs of each scenario", flush=True)
    truth = os.path.join(options.folder, "truth.jsonl")
    more = ["--connections"] if options.connections else []
    recording = os.path.join(options.folder, "recording")
    with Finrace(options, *more, "--record", recording, interval="5s") as finrace:
        rows, ports = run_lab(options, truth)
        finrace.next_health()
        stopped = None
        try:
            finrace.stop()
        except Wrong as error:
            stopped = error
        results.note("finrace ran to the end and ended with 0", stopped)
        records = finrace.records()
    judgement = Judgement(rows, records, ports, sees_servers=options.backend == "trace")
    judgement.print_table()
    for name in sorted(judgement.tables):
        results.run(name, judgement.scenario, name)
    seen = []
    results.run("unclassified is counted where it is due", judgement.unclassified)
    results.run(f"each verdict within {VERDICT_LIMIT:g} s", judgement.promptness, seen)
    for text in seen:
        print(f"          end to record: {text}")
    results.run("each verdict's time is the end's", judgement.end_times, 0.05)
    results.run("no verdict on any other connection", judgement.nothing_foreign)
    results.run("no verdict on the server's side of these", judgement.nothing_twice)
    results.run("nothing was lost", nothing_lost, records)
    results.run("the backend asked for is the one that ran", the_asked_backend, options, records)
    results.run("every record is valid", harness.check_schema, finrace)
    results.run("the recording tells the same, byte for byte", harness.check_replay, finrace, [recording], more)
    results.run("the recording's diagnosis finds what was named", harness.check_diagnosis, finrace, [recording])


def add_lab_options(parser, runs):
    harness.add_options(parser)
    parser.add_argument("--runs", type=int, default=runs, help="of each scenario")
    parser.add_argument("--scenario", default="all", help="as for lab.py")
    parser.add_argument("--family", choices=("4", "6", "mapped"), default="4")
    parser.add_argument("--delay-line", default=os.path.join(harness.ROOT, "build", "delay-line"))


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    add_lab_options(parser, 100)
    parser.add_argument("--parallel", type=int, default=50)
    parser.add_argument("--delay", help="one-way (default: the lab's, 20ms)")
    parser.add_argument("--keep-alive", help="the servers' idle timer (default: the lab's, 1s)")
    parser.add_argument("--local", action="store_true", help="both ends on loopback, without the delay line")
    parser.add_argument("--connections", action="store_true", help="finrace runs with --connections")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(harness.main("lab_check", parse, test))
