#!/usr/bin/python3
"""finrace on captures against the race lab and against itself: tcpdump at both ends of the line while finrace watches live.

The lab (tools/lab.py) writes the truth. Each capture, the proxy's and the upstream's, judged on its own, must come to the
verdict that each accident is due, and name nothing else; and what it names, the live run must have named. What a capture can't
show may be absent, never wrong: ABSENT says what, at which end, and why. Three kinds of capture: on the device (EN10MB or
raw IP) as tcpdump writes it, the same on `-i any` (LINUX_SLL2), and read from a pipe.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "live"))
import harness  # noqa: E402
import lab_check  # noqa: E402
from both_ends import (ENDS, EXAMPLES, LAST_PORT, LOST_ON_THE_WAY, Capture, by_connection, check_place,  # noqa: E402
                       key, records_of, tell_the_time, verdicts_of)
from harness import Finrace, must  # noqa: E402

PATIENCE = 30.0

# What a capture at an end does not show: {scenario: (ends, why)}.
ABSENT = {
    "silence_until_client_gives_up": (("right",), LOST_ON_THE_WAY),
    "silence_until_client_shuts_down": (ENDS, "the FIN of its shutdown() leaves when the path has healed, as any other would"),
    "silence_until_kernel_gives_up": (("right",), LOST_ON_THE_WAY),
    "silence_until_bare_reset": (("right",), LOST_ON_THE_WAY),
    "silence_after_acknowledgement": (("right",), LOST_ON_THE_WAY),
    "body_10mb_interrupted": (("right",), "all that has arrived is acknowledged: that more was on its way does not show"),
    "connect_timeout": (("right",), LOST_ON_THE_WAY),
    "connect_abandoned": (("right",), LOST_ON_THE_WAY),
}
# What is right as well: {scenario: (variants, why)}.
VARIANTS = {
    "silence_until_client_gives_up": ((None, "gave_up"), "a FIN behind what is not acknowledged does not leave"),
    "silence_until_client_shuts_down": ((None, "gave_up"), "the same"),
}
# What is right as well at one end: {(scenario, end): (causes, why)}.
CAUSES = {
    ("silence_until_client_shuts_down", "right"): (
        ("upstream_reset",), "the upstream did reset the request, which came late: that it did does not show at this end"),
}
CERTAINTIES = {
    "connect_timeout": (("likely",), "ICMP's answer may have been filtered out of the capture"),
}


class Line:
    def __init__(self, options):
        self.control = os.path.join(options.folder, "line.sock")
        self.process = subprocess.Popen([options.delay_line, "--delay", options.delay, "--control", self.control],
                                        stdout=subprocess.PIPE, text=True, preexec_fn=harness.die_with_parent)
        words = self.process.stdout.readline().split()
        must(len(words) == 3 and words[0] == "ready", f"delay-line: {words}")
        self.names = {name: word.partition("=")[2] for name, word in zip(ENDS, words[1:])}

    def stop(self):
        self.process.terminate()
        self.process.wait(PATIENCE)


def play(options, line, base):
    truth = os.path.join(options.folder, "truth.jsonl")
    done = subprocess.run(
        ["/usr/bin/python3", os.path.join(harness.ROOT, "tools", "lab.py"), "--truth", truth, "--runs", str(options.runs),
         "--scenario", options.scenario, "--family", options.family, "--port-base", str(base), "--delay", options.delay,
         "--left", line.names["left"], "--right", line.names["right"], "--control", line.control],
        stderr=subprocess.PIPE, text=True, timeout=lab_check.LAB_LIMIT, check=False)
    must(done.returncode == 0, f"the lab failed ({done.returncode}): {done.stderr[-2000:]}")
    print("  " + done.stderr.strip().splitlines()[-1], flush=True)
    with open(truth, encoding="utf-8") as file:
        return [json.loads(text) for text in file]


def problem_with(row, verdicts, end):
    name = row["scenario"]
    if not verdicts and name in ABSENT and end in ABSENT[name][0]:
        return None
    if len(verdicts) == 1 and verdicts[0].at("finrace.cause") in CAUSES.get((name, end), ((), ""))[0]:
        return None
    due = dict(row)
    if due["expected"] and name in VARIANTS:
        due["accept_variants"] = VARIANTS[name][0]
    if due["expected"] and name in CERTAINTIES:
        due["expected"] = dict(due["expected"], certainty=CERTAINTIES[name][0][0])
    return lab_check.problem_with(due, verdicts)


def judge(rows, verdicts, end):
    tables, examples = defaultdict(Counter), defaultdict(list)
    for row in rows:
        table = tables[row["scenario"]]
        if row.get("slipped"):
            continue
        table["all"] += 1
        found = verdicts[lab_check.ends(row)]
        problem = problem_with(row, found, end)
        if problem is None:
            table["named" if found else "absent" if row["expected"] and "cause" in row["expected"] else "silent"] += 1
            continue
        table[problem[0]] += 1
        if len(examples[row["scenario"]]) < EXAMPLES:
            examples[row["scenario"]].append(lab_check.describe(row, found, problem[1]))
    return tables, examples


def check_scenario(table, examples):
    must(not table["wrong"] and not table["missing"], "{} wrong, {} missing of {}:\n          {}".format(
        table["wrong"], table["missing"], table["all"], "\n          ".join("\n".join(examples).split("\n"))))
    must(table["all"] > 0, "it never ran")


def check_against_live(rows, live, verdicts, end):
    """Connection by connection: the same words as the live run."""
    differ = []
    for row in rows:
        ours, theirs = verdicts[lab_check.ends(row)], live[lab_check.ends(row)]
        name = row["scenario"]
        if row.get("slipped") or (not ours and name in ABSENT and end in ABSENT[name][0]) or name in VARIANTS or name in BETTER:
            continue
        if (name, end) in CAUSES:
            continue
        if [key(one) for one in ours] != [key(one) for one in theirs]:
            differ.append(f"{name}: {[key(one) for one in ours]}, live {[key(one) for one in theirs]}")
    must(not differ, lambda: f"{len(differ)} of {len(rows)} differ: " + "; ".join(differ[:EXAMPLES]))


# Where a capture shows what backend cgroup does not.
BETTER = {"connect_timeout": "the retransmitted SYNs", "connect_unreachable": "the ICMP error"}


def test(options, results):
    line = Line(options)
    base = 20100
    captures = {}
    try:
        for end in ENDS:
            for device in ("line", "any"):
                captures[end, device] = Capture(line.names[end], os.path.join(options.folder, f"{end}-{device}.pcap"), device)
        with Finrace(options, interval="5s") as finrace:
            rows = play(options, line, base)
            time.sleep(6)  # the next retransmission of all was due
            tell_the_time(line.names["left"], "10.77.0.2")
            time.sleep(0.5)
            finrace.next_health()
            finrace.stop()
            live = by_connection(finrace.records())
        for capture in captures.values():
            capture.stop()
    finally:
        line.stop()
    for (end, device), capture in captures.items():
        lines, said = records_of(options, capture.path)
        verdicts = verdicts_of(lines)
        tables, examples = judge(rows, verdicts, end)
        for name in sorted(tables):
            results.run(f"{end}, {device}: {name}", check_scenario, tables[name], examples[name])
        known = {lab_check.ends(row) for row in rows}
        foreign = [ends for ends in verdicts if ends not in known and ends[3] != LAST_PORT]
        results.note(f"{end}, {device}: nothing else is named", f"{foreign[:3]}" if foreign else None)
        results.note(f"{end}, {device}: nothing is missing", said if "warning" in said else None)
        results.run(f"{end}, {device}: the same as live", check_against_live, rows, live, verdicts, end)
        status, report, _ = harness.diagnose(options, capture.path)
        results.note(f"{end}, {device}: its diagnosis has findings", None if status == 1 else f"exit {status}")
        results.run(f"{end}, {device}: where it was taken", check_place, report, end)
        if device == "any":
            piped, _ = records_of(options, capture.path, piped=True)
            results.note(f"{end}: a pipe gives the same", None if piped == lines else f"{len(piped)} records, not {len(lines)}")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    lab_check.add_lab_options(parser, 10)
    parser.add_argument("--delay", default="20ms", help="one-way")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(harness.main("captures", parse, test))
