#!/usr/bin/python3
"""The demo's second half (scripts/demo is the first): races live on the terminal, then the tally.

`finrace watch` draws each race while the traffic runs; a `finrace run` beside it writes the records, which are then laid
beside nginx's own error log, request by request. Exit code: 0 they agree, 1 they don't, 2 the lab could not be built.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.dont_write_bytecode = True
import proxy_lab  # noqa: E402
from proxy_lab import Child, Lab, LabError, Paint  # noqa: E402

OWN_WORDS = {  # nginx's sentences, short enough for a column
    "upstream prematurely closed connection": "prematurely closed connection",
    "recv() failed (104": "recv() failed (104: reset by peer)",
    "writev() failed (32": "writev() failed (32: broken pipe)",
    "writev() failed (104": "writev() failed (104: reset by peer)",
}


def short(error: str) -> str:
    for start, text in OWN_WORDS.items():
        if error.startswith(start):
            return text
    return error[:44]


def version(command: list) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    words = (result.stdout + result.stderr).replace("nginx/", "").split()
    return next((word for word in words if word[0].isdigit()), "?")


class Stage:
    def __init__(self, paint: Paint):
        self.paint, self.number = paint, 0

    def __call__(self, name: str, text: str):
        self.number += 1
        print(f"{self.paint.bold(f'{self.number}/4 {name:<9}')} {text}", flush=True)


def demo(arguments) -> int:
    paint = Paint()
    stage = Stage(paint)
    started = time.monotonic()
    print(paint.bold("finrace demo") + ": does an upstream's idle close meet the proxy's next request?\n", flush=True)
    with Lab("uvicorn", clients=arguments.clients, keep_alive=arguments.keep_alive, family=arguments.family,
             delay=arguments.delay, delay_line=arguments.delay_line, seed=arguments.seed) as lab:
        nginx = version([proxy_lab.need("nginx", "nginx-light"), "-v"])
        uvicorn = version([proxy_lab.need("uvicorn", "uvicorn"), "--version"])
        stage("lab", f"nginx {nginx} -> {arguments.delay} each way -> uvicorn {uvicorn}, "
              f"keep-alive {arguments.keep_alive} s, {arguments.clients} clients")
        options = ["--backend", arguments.backend] + (["--attach", arguments.attach] if arguments.attach else [])
        records = lab.start_finrace(arguments.finrace, options)
        lab.warm_up(records)
        learned = records.learned(lab.address, lab.port)
        stage("warm-up", f"left alone, connections are closed by uvicorn after {lab.idle_timeout * 1e3:.0f} ms; finrace "
              + (f"learned {learned[0]:.0f} ms" if learned else "has not learned it yet"))
        low, high = lab.window()
        stage("races", f"{arguments.requests} POSTs, {low * 1e3:.0f} to {high * 1e3:.0f} ms after the last response; "
              "finrace watch:\n")
        host = f"[{lab.address}]" if ":" in lab.address else lab.address
        watch = Child(lab, "watch", [arguments.finrace, "watch", *options, "--upstream",
                                     f"{host}:{lab.port}"], stdout=sys.stdout, stop=signal.SIGINT)
        proxy_lab.wait_for("finrace watch is ready",
                           lambda: "finrace: ready" in watch.stderr_path.read_text(errors="replace"), child=watch)
        lab.race(arguments.requests)
        lab.settle()
        watch_ran, watch_code = watch.process.poll() is None, watch.stop()
        finrace_ran, finrace_code = lab.finrace.process.poll() is None, lab.finrace.stop()
        print()
        stage("tally", "nginx's error log beside finrace's verdicts, matched by upstream connection and time\n")
        agreed = tally(lab, records, paint)
        for name, ran, code, child in (("watch", watch_ran, watch_code, watch),
                                       ("run", finrace_ran, finrace_code, lab.finrace)):
            if not ran or code != 0:
                agreed = False
                print(f"finrace {name} ended with {code}:\n{child.last_words()}", file=sys.stderr)
        if not agreed:
            lab.keep_directory = True
            print(f"The logs are kept in {lab.directory}", file=sys.stderr)
    print(paint.dim(f"\n{time.monotonic() - started:.0f} s; nothing is left behind" if agreed else ""))
    return 0 if agreed else 1


def tally(lab: Lab, records: proxy_lab.Records, paint: Paint) -> bool:
    trouble = lab.gather()
    verdicts, foreign = lab.verdicts(records)
    pairs, missing, extra = proxy_lab.match(lab.failures, verdicts)
    rows, wrong = [], 0
    for exchange, verdict in pairs:
        why = proxy_lab.disagreement(exchange, verdict)
        wrong += why is not None
        rows.append((exchange.time, exchange.id, exchange.connection, short(exchange.error), str(verdict), why))
    unsent = [exchange for exchange in missing if proxy_lab.never_sent(exchange)]
    missing = [exchange for exchange in missing if exchange not in unsent]
    for exchange in unsent:
        rows.append((exchange.time, exchange.id, exchange.connection, short(exchange.error), "(no byte was sent)", None))
    for exchange in missing:
        rows.append((exchange.time, exchange.id, exchange.connection, short(exchange.error), "-", "no verdict"))
    for verdict in extra + foreign:
        rows.append((verdict.time, "-", verdict.connection, "-", str(verdict), "nginx knows of no failure"))
    rows.sort(key=lambda row: row[0])

    def where(connection):
        if connection is None:
            return "?"
        return f"[{connection[0]}]:{connection[1]}" if ":" in connection[0] else f"{connection[0]}:{connection[1]}"

    heads = ("time (UTC)", "connection", "nginx's error log", "finrace", "agree")
    table = [(time.strftime("%H:%M:%S", time.gmtime(row[0])) + f".{int(row[0] % 1 * 1000):03d}", where(row[2]), row[3],
              row[4], "yes" if row[5] is None else f"NO: {row[5]}") for row in rows]
    widths = [max(len(line[column]) for line in [heads, *table]) for column in range(len(heads))]
    print("  " + paint.dim("  ".join(head.ljust(width) for head, width in zip(heads, widths)).rstrip()))
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        cells[-1] = paint.good(line[-1]) if line[-1] == "yes" else paint.bad(line[-1])
        print("  " + "  ".join(cells))
    for line in trouble:
        print("  " + paint.bad(line))

    raced = [exchange for exchange in lab.exchanges if exchange.race]
    failed = [exchange for exchange in raced if exchange.failed]
    certainty = Counter(verdict.get("finrace.certainty") for verdict in verdicts)
    lost = records.lost_events()
    agreed = not (missing or extra or foreign or wrong or trouble or lost) and bool(failed)
    print(f"\n  near the timer  {len(raced)} POSTs: {len(raced) - len(failed)} answered, {len(failed)} failed")
    print(f"  nginx           {len(lab.failures)} upstream failures in its error log, which does not say why")
    print(f"  finrace         {len(verdicts)} verdicts: "
          + (", ".join(f"{count} {name}" for name, count in certainty.most_common()) or "none")
          + f"; {lost} events lost")
    if not failed:
        print("  " + paint.bad("no request raced: nothing was shown; try more --requests"))
    elif agreed:
        print("  " + paint.good(f"they agree on every one of the {len(pairs)}, and on the requests that succeeded"))
    else:
        print("  " + paint.bad(f"they disagree: {len(missing)} without a verdict, {len(extra) + len(foreign)} without a "
                               f"failure, {wrong} with another cause than the wire shows, {len(trouble)} unexplained"))
    return agreed


def main() -> int:
    parser = argparse.ArgumentParser(description="What scripts/demo runs once finrace is built.", allow_abbrev=False)
    parser.add_argument("--finrace", type=Path, default=proxy_lab.ROOT / "build/finrace")
    parser.add_argument("--delay-line", type=Path, default=proxy_lab.ROOT / "build/delay-line")
    parser.add_argument("--backend", choices=["auto", "trace", "cgroup"], default="auto")
    parser.add_argument("--attach", choices=["auto", "fentry", "kprobe"])
    parser.add_argument("--family", type=int, choices=[4, 6], default=4)
    parser.add_argument("--keep-alive", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--delay", default="20ms")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if min(arguments.keep_alive, arguments.requests, arguments.clients) < 1:
        parser.error("--keep-alive, --requests and --clients take numbers from 1")
    arguments.finrace, arguments.delay_line = arguments.finrace.resolve(), arguments.delay_line.resolve()
    proxy_lab.unwind_on_signals()
    try:
        return demo(arguments)
    except (LabError, OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
