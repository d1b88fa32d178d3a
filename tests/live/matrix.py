#!/usr/bin/python3
"""What scripts/test runs inside a virtual machine: on this kernel, every backend through the lab, oddities, and real software.

An emulated machine is ten to twenty times slower than a native one: fewer runs of each accident, the same kinds of them.
The last line counts the tests of all commands.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
BACKENDS = {
    "fentry": ["--backend", "trace", "--attach", "fentry"],
    "kprobe": ["--backend", "trace", "--attach", "kprobe"],
    "cgroup": ["--backend", "cgroup"],
}
# Of the robustness tests those whose outcome depends on the kernel and the backend; and those that attach and list again
# and again, which takes minutes in an emulated machine: once, where the tables grow and every hook is there.
ODDITIES = "sends*,process names,who closed and how,older connections,smallest ring,two at once"
SLOW_ODDITIES = ODDITIES + ",signals,churn at start,start stop,many connections"
SLOW_ON = ("fentry", "6.12")


def commands(options, name):
    backend = BACKENDS[name]
    binary = ["--finrace", os.path.join(options.build, "finrace")]
    line = ["--delay-line", os.path.join(options.build, "delay-line")]
    logs = ["--logs", options.logs] if options.logs else []
    yield "race lab", 400, [
        f"{HERE}/lab_check.py", *binary, *line, *backend, *logs, "--runs", str(options.runs), "--delay", "40ms", "--keep-alive", "2s",
        "--parallel", "16",
    ]
    yield "robustness", 300, [f"{HERE}/robustness.py", *binary, *backend, *logs, "--small", "--only", ODDITIES]
    yield "nginx and uvicorn", 400, [
        f"{TESTS}/e2e/nginx_race.py", *binary, *line, *backend, "--upstream", "uvicorn", "--requests", str(options.requests),
        *logs,
    ]


def once(options):
    """What runs one backend beside the other: where the machine has not the slow oddities to do."""
    if os.uname().release.startswith(SLOW_ON[1]):
        return
    logs = ["--logs", options.logs] if options.logs else []
    yield "both backends at once", 500, [
        f"{HERE}/both_backends.py", "--finrace", os.path.join(options.build, "finrace"), *logs,
        "--delay-line", os.path.join(options.build, "delay-line"), "--runs", "3", "--parallel", "16",
    ]


def run(title, limit, command):
    """(passed, failed, seconds). Its output goes through as it comes."""
    print(f"\n== {title}", flush=True)
    started = time.monotonic()
    passed = failed = 0
    process = subprocess.Popen(["/usr/bin/python3", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               stdin=subprocess.DEVNULL, start_new_session=True)
    signal.alarm(limit)
    try:
        for line in process.stdout:
            text = line.decode("utf-8", "replace")
            print("  " + text, end="", flush=True)
            count = re.match(r"(\d+) passed, (\d+) failed", text)
            if count:
                passed, failed = int(count[1]), int(count[2])
        status = process.wait()
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        print(f"  matrix: {title} took longer than {limit} s and was ended", flush=True)
    finally:
        signal.alarm(0)
    if (status != 0 or passed == 0) and failed == 0:
        print(f"  matrix: {title} ended with {status} and no count of failures", flush=True)
        failed = 1
    return passed, failed, time.monotonic() - started


def on_alarm(*_):
    raise TimeoutError


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    parser.add_argument("--backends", default=",".join(BACKENDS), help="of fentry, kprobe, cgroup (default: all)")
    parser.add_argument("--runs", type=int, default=5, help="of each of the lab's scenarios")
    parser.add_argument("--requests", type=int, default=100, help="near the timer, through nginx")
    parser.add_argument("--only", default="", help="only commands with this word in their title")
    parser.add_argument("--build", default=os.path.join(os.path.dirname(TESTS), "build"), help="folder with the binaries")
    parser.add_argument("--logs", help="folder for what failed tests leave")
    options = parser.parse_args()
    names = options.backends.split(",")
    for name in names:
        if name not in BACKENDS:
            parser.error(f"--backends {name}: unknown; accepted: {', '.join(BACKENDS)}")
    signal.signal(signal.SIGALRM, on_alarm)
    rows = []
    planned = [(f"{title}, {name}", limit, command) for name in names for title, limit, command in commands(options, name)]
    if len(names) == len(BACKENDS):
        planned += once(options)
    for title, limit, command in planned:
        title += f", on {os.uname().release}"
        if options.only in title:
            rows.append((title, *run(title, limit, command)))
    print()
    for title, passed, failed, seconds in rows:
        print(f"{passed:5} passed {failed:4} failed {seconds:5.0f} s  {title}")
    failed = sum(row[2] for row in rows)
    print(f"{sum(row[1] for row in rows)} passed, {failed} failed", flush=True)
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
