#!/usr/bin/python3
"""What scripts/test runs inside a virtual machine: on this kernel, every backend through the lab, real software and oddities.

An emulated machine is ten to twenty times slower than a native one, so the tests are in two groups:

  exact  for a machine whose clock counts instructions (scripts/vm --paced). Nothing is late there, however busy the host is:
         all that depends on times, races between a request and a timer first of all. What takes long and hardly depends on
         the kernel runs on some kernels and says so elsewhere; with --whole it runs on all, and the lab a hundred times.
  smp    for a machine with real time and two CPUs: what crowds, floods and interrupts the tracer, as far as it depends on the
         kernel or the backend: each of it on some of them; with --whole on all.

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
KERNELS = ("5.10", "6.1", "6.12")
# Each pair of backend and kernel has one for its lab and for nginx, so that each backend, and each kernel, has all of them.
FAMILIES = ("6", "mapped", "4")
# What else stands behind nginx: once by each trace, and by cgroup natively.
UPSTREAMS = {
    "reset": {("kprobe", "5.10"), ("fentry", "6.1")},
    "local-uvicorn": {("fentry", "5.10"), ("kprobe", "6.1")},
    "lingering": {("kprobe", "6.1"), ("fentry", "6.12")},
}
FEWER = 100  # requests near the timer; more, if not enough of them race
# Of the robustness tests those whose outcome depends on how a program reads the kernel: tables by socket, by helper and by
# cast, its own storage, packets.
READS = "sends*,moved sockets,who closed and how,older connections,listener that is gone,table full"
READS_ON = {("fentry", "5.10"), ("kprobe", "5.10"), ("cgroup", "6.1"), ("fentry", "6.12"), ("kprobe", "6.12")}
# And on the kernel and the backend.
ODDITIES = "process names,smallest ring,two at once,accept queue full,service manager,healthy requests"
ODDITIES_ON = READS_ON - {("kprobe", "6.12")}
# What tries every backend that the kernel has, and what the kernel refuses to a confined process: minutes, once on each.
EACH_KERNEL = "doctor,confinement"
EACH_KERNEL_ON = {("fentry", "5.10"), ("cgroup", "6.1"), ("fentry", "6.12")}
# What depends on the backend, and hardly on the kernel: once for each way to attach.
WAYS = "answers at start,rest at close,requests in use,told to end in a flood,not root,no cgroup root,reload"
WAYS_ON = {("fentry", "6.1"), ("kprobe", "5.10")}
# What attaches and lists again and again, which takes minutes in an emulated machine: once, where every hook is there.
SLOW = "signals,churn at start,start stop,many connections"
SLOW_ON = {("fentry", "6.12")}
# What became of a request shows in a proxy's system calls, which are its own; and in the kernel's send path, by its version.
PROXIES = {("fentry", "6.12"): "nginx,haproxy,apache,lighttpd,varnish,caddy,node", ("kprobe", "5.10"): "nginx,haproxy"}
ENCRYPTED_ON = ("fentry", "6.12")  # a record is bytes to the kernel; natively as well
BOTH_BACKENDS_ON = ("fentry", "6.1")
PROVEN_ON = ("fentry", "6.1")
PEERS_ON = ("fentry", "5.10")
OUTPUTS = "all at once"  # they know nothing of how the kernel is watched; what confines them there, "confinement" tries
OUTPUTS_ON = ("kprobe", "5.10")
TWO_HOSTS_ON = ("fentry", "6.12")
VIEWED_ON = ("kprobe", "6.1")  # where no connection's accounting can be sampled; where it can, natively
LIMITS, WHOLE_LIMIT = {"exact": 600, "smp": 1500}, 5400  # seconds, of each command; those of smp are several in one


def exact(options, name):
    """(title, command, whether it runs here without --whole)."""
    kernel = ".".join(os.uname().release.split(".")[:2])
    here = (name, kernel)
    with_line, alone = [*BACKENDS[name], *tools(options)], [*BACKENDS[name], *tools(options, line=False)]
    share = (list(BACKENDS).index(name) + KERNELS.index(kernel)) % len(FAMILIES) if kernel in KERNELS else 0
    for family in FAMILIES:
        yield f"race lab, family {family}", [
            f"{HERE}/lab_check.py", *with_line, "--family", family,
            "--runs", str(options.runs if family == FAMILIES[share] else 10),
        ], family == FAMILIES[share]
    race = [f"{TESTS}/e2e/nginx_race.py", *with_line, "--requests"]
    for family in ("4", "6"):
        yield f"nginx and uvicorn over IPv{family}", [*race, str(options.requests), "--family", family], \
            family == ("6" if FAMILIES[share] == "6" else "4")
    for upstream, where in UPSTREAMS.items():
        yield f"nginx and {upstream}", [
            *race, str(options.requests if options.whole else FEWER), "--upstream", upstream,
        ], here in where
    if name == "fentry":
        yield "beside tcplife and tcpstates", [f"{HERE}/compare_tcplife.py", *alone], here == PEERS_ON
    if name != "cgroup":
        yield "the live view", [f"{HERE}/watch_view.py", *alone], here == VIEWED_ON
        yield "proxies", [
            f"{TESTS}/e2e/proxies.py", *alone, "--rounds", "1", "--proxies", PROXIES.get(here, "nginx,haproxy"),
        ], here in PROXIES
        yield "no live upstreams", [f"{TESTS}/e2e/no_live_upstreams.py", *alone], here in PROXIES
        yield "TLS and HTTP/2", [f"{TESTS}/e2e/protocols.py", *alone], here == ENCRYPTED_ON
        yield "two hosts in one store", [f"{TESTS}/pipelines/fleet.py", *with_line], here == TWO_HOSTS_ON
        yield "the proving ground, a part", [
            f"{TESTS}/e2e/prove.py", *with_line, "--pairs", "nginx+uvicorn", "--timers", "short", "--exchanges", "30",
        ], here == PROVEN_ON
        yield "beside cgroup", [
            f"{HERE}/both_backends.py", *BACKENDS[name][2:], *tools(options), "--runs", "3",
        ], here == BOTH_BACKENDS_ON


def smp(options, name):
    here = (name, ".".join(os.uname().release.split(".")[:2]))
    alone = [*BACKENDS[name], *tools(options, line=False), "--small"]
    parts = ((READS, READS_ON), (ODDITIES, ODDITIES_ON), (EACH_KERNEL, EACH_KERNEL_ON), (WAYS, WAYS_ON), (SLOW, SLOW_ON))
    # As one command: its start alone takes seconds of an emulated machine.
    mine = [tests for tests, where in parts if here in where or options.whole]
    if mine:
        yield f"robustness, {','.join(mine)}", [f"{HERE}/robustness.py", *alone, "--only", ",".join(mine)], True
    for tests, _ in parts:
        if tests not in mine:
            yield f"robustness, {tests}", [], False
    yield f"outputs, {OUTPUTS}", [f"{HERE}/outputs.py", *alone, "--only", OUTPUTS], here == OUTPUTS_ON
    yield "all outputs", [f"{HERE}/outputs.py", *alone], False


def tools(options, line=True):
    flags = ["--finrace", os.path.join(options.build, "finrace")]
    if line:
        flags += ["--delay-line", os.path.join(options.build, "delay-line")]
    return flags + (["--logs", options.logs] if options.logs else [])


def run(title, command, limit):
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
    parser.add_argument("group", choices=("exact", "smp"))
    parser.add_argument("--whole", action="store_true", help="what runs on some kernels only, on this one as well")
    parser.add_argument("--runs", type=int, help="of each of the lab's scenarios (default: 3; with --whole 100)")
    parser.add_argument("--requests", type=int, default=200, help="near the timer, through nginx")
    parser.add_argument("--only", default="", help="only commands with this word in their title")
    parser.add_argument("--build", default=os.path.join(os.path.dirname(TESTS), "build"), help="folder with the binaries")
    parser.add_argument("--logs", help="folder for what failed tests leave")
    options = parser.parse_args()
    options.runs = options.runs or (100 if options.whole else 3)
    names = options.backends.split(",")
    for name in names:
        if name not in BACKENDS:
            parser.error(f"--backends {name}: unknown; accepted: {', '.join(BACKENDS)}")
    signal.signal(signal.SIGALRM, on_alarm)
    rows = []
    group = {"exact": exact, "smp": smp}[options.group]
    for name in names:
        for what, command, here in group(options, name):
            title = f"{what}, {name}, on {os.uname().release}"
            if options.only not in title:
                continue
            if here or options.whole:
                rows.append((title, *run(title, command, WHOLE_LIMIT if options.whole else LIMITS[options.group])))
            else:
                print(f"\n!! {title}: LEFT OUT, other kernels run it; --whole runs it here", flush=True)
    print()
    for title, passed, failed, seconds in rows:
        print(f"{passed:5} passed {failed:4} failed {seconds:5.0f} s  {title}")
    failed = sum(row[2] for row in rows)
    print(f"{sum(row[1] for row in rows)} passed, {failed} failed", flush=True)
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
