#!/usr/bin/python3
"""scripts/demo as a new user meets it: it ends in a tally that agrees, leaves nothing behind, interrupted or not, and says what a
wrong flag should have been.

Set-up and build are those of the tests: what scripts/demo does first is what scripts/test does, by the same script.
"""

import glob
import os
import re
import signal
import subprocess
import sys

sys.dont_write_bytecode = True
sys.path.insert(1, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "live"))
import harness  # noqa: E402
from harness import must, wait_for  # noqa: E402

DEMO = os.path.join(harness.ROOT, "scripts", "demo")
LIMIT = 170  # seconds: the demo is to take less than three minutes once all is set up
REQUESTS = "60"


def command(options, *flags):
    return [DEMO, "--no-setup", "--no-build", *options.backend_flags, "--keep-alive", "1", "--requests", REQUESTS, *flags]


def of_the_lab():
    """Command lines of living processes that work in a folder of the demo's."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(path, "rb") as file:
                words = file.read().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # gone meanwhile
        if "finrace-lab-" in words or "proxy_demo" in words:
            found.append(words)
    return found


def there():
    """What the demo makes and should take away. A BPF object that a living process holds is somebody else's."""
    found = {("network namespace", name) for name in (os.listdir("/run/netns") if os.path.isdir("/run/netns") else [])}
    found |= {("folder", name) for name in glob.glob("/tmp/finrace-lab-*")} | {("process", words) for words in of_the_lab()}
    return found | set(harness.bpf_objects()) - harness.held_objects()


def nothing_more_than(before):
    wait_for(lambda: not there() - before, lambda: f"nothing to be left behind; there is {there() - before}")


def test_tally(options):
    """Two witnesses, request by request: nginx's log and finrace's verdicts, and they agree."""
    before = there()
    done = subprocess.run(command(options), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT)
    must(done.returncode == 0, f"exit {done.returncode}: {done.stdout[-3000:]} {done.stderr[-3000:]}")
    rows = [re.split("  +", line.strip()) for line in done.stdout.splitlines() if re.match(r"  \d\d:\d\d:\d\d\.\d{3}  ", line)]
    must(rows and all(row[-1] == "yes" for row in rows), f"rows: {rows}")
    words = done.stdout.split("finrace watch:", 1)
    must(len(words) == 2 and "keepalive_race" in words[1].split("4/4", 1)[0], f"no race was drawn live: {done.stdout[-3000:]}")
    sent = [row for row in rows if not any("no byte was sent" in cell for cell in row)]
    must(f"they agree on every one of the {len(sent)}" in done.stdout, f"no tally: {done.stdout[-2000:]}")
    must("nothing is left behind" in done.stdout, f"{done.stdout[-500:]}")
    nothing_more_than(before)


def test_interrupted(options):
    """Ctrl-C in the midst of the races: it ends soon, and leaves nothing."""
    before = there()
    demo = subprocess.Popen(command(options, "--requests", "5000"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=harness.Finrace.enter_host)
    try:
        said = []
        for line in demo.stdout:
            said.append(line)
            if "keepalive_race" in line:
                break
        must(said and "keepalive_race" in said[-1], f"it ended before the first race: {''.join(said)}")
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does: to all that is in the foreground
        rest, _ = demo.communicate(timeout=LIMIT)
        must(demo.returncode == 130, f"exit {demo.returncode}: {rest[-2000:]}")
        must("Traceback" not in rest, rest[-2000:])
    finally:
        if demo.poll() is None:
            os.killpg(demo.pid, signal.SIGKILL)
            demo.wait()
    nothing_more_than(before)


def test_refusals(_):
    """A wrong flag is named with what it takes, and nothing is begun."""
    for flags, words in (
        (["--nosuch"], ["--nosuch", "--help"]), (["--keep-alive"], ["--keep-alive needs a value"]), (["--family", "5"], ["--family 5: takes one of 4 6"]),
        (["--requests", "0"], ["--requests 0: takes a number from 1"]), (["--delay", "20"], ["--delay 20: takes a time such as 20ms"]),
    ):
        done = subprocess.run([DEMO, *flags], capture_output=True, text=True, timeout=LIMIT)
        must(done.returncode == 2 and not done.stdout and all(word in done.stderr for word in words), f"{flags}: {done}")


def test(options, results):
    print(f"demo: backend {options.backend_name}", flush=True)
    results.run_each([test_refusals, test_tally, test_interrupted], options)


if __name__ == "__main__":
    sys.exit(harness.main("demo", lambda: harness.parser_of(__doc__).parse_args(), test))
