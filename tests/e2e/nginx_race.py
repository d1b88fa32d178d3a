#!/usr/bin/python3
"""End-to-end test: the set of nginx's failed upstream requests and the set of finrace's verdicts are equal.

Real nginx with upstream keep-alive stands in front of a real upstream; many clients send POSTs near the upstream's idle
timer. finrace watches the whole host. The truth is nginx's error log, matched with finrace's records by the upstream
connection (all four of address and port) and time within a second; how that is exact is told in proxy_lab.py. A capture
on the proxy's side is the second witness: each verdict's cause must fit the sequence numbers on the wire. By trace, another
finrace sees the upstream's side alone (--side server), as if the proxy were on another host: what reached the upstream
after its close, or lay unread in it, must be named there as well, and nothing else.

Exit code: 0 all passed, 1 something failed (the logs are kept and named), 2 usage or environment.
"""

import argparse
import signal
import sys
from collections import Counter
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
import check_records  # noqa: E402
import proxy_lab  # noqa: E402
from proxy_lab import Lab, LabError, Paint, Verdict  # noqa: E402

# On the wire: what met the upstream's socket after its FIN, or unread at its RST. After an RST there is no socket, and in
# TIME_WAIT (stale) nothing that its kernel tells.
SERVER_SEES = {"crossed", "reset_unread"}
# Seconds, by the upstream's clock: its kernel keeps when an answer's bytes were last sent, so one that had to be sent again
# makes a rest look shorter than any idle timer (0.9 s).
SHORTEST_REST = 0.92
FEWEST_RACES = 10  # fewer, and the test has proved nothing
ROWS_SHOWN = 20


class Checks:
    def __init__(self, paint: Paint):
        self.paint, self.passed, self.failed = paint, 0, 0

    def __call__(self, good: bool, name: str, detail: str = "", rows=()):
        self.passed, self.failed = self.passed + bool(good), self.failed + (not good)
        mark = self.paint.good("pass") if good else self.paint.bad("FAIL")
        print(f"  {mark}  {name:<58} {detail}", flush=True)
        if not good:
            for row in list(rows)[:ROWS_SHOWN]:
                print(f"          {row}")
            if len(list(rows)) > ROWS_SHOWN:
                print(f"          and {len(list(rows)) - ROWS_SHOWN} more")


def describe(exchange) -> str:
    connection = exchange.connection
    where = f"{connection[0]}:{connection[1]}" if connection else "?"
    return (f"{exchange.id} at {exchange.time:.3f} from {where}: client got {exchange.status}; nginx: "
            f"{exchange.error or 'no error'}; wire: {exchange.evidence.text if exchange.evidence else 'nothing'}")


def describe_verdict(verdict: Verdict, exchanges) -> str:
    """With what the other witnesses say about that connection at that time."""
    near = [exchange for exchange in exchanges if exchange.connection == verdict.connection]
    near.sort(key=lambda exchange: abs(exchange.time - verdict.time))
    local = verdict.connection
    return (f"verdict {verdict} at {verdict.time:.3f} on {local[0]}:{local[1]} -> {local[2]}:{local[3]}: "
            f"{verdict.get('finrace.message', '')} || nearest: {describe(near[0]) if near else 'no request at all'}")


def run(arguments, checks: Checks) -> None:
    with Lab(arguments.upstream, clients=arguments.clients, keep_alive=arguments.keep_alive, family=arguments.family,
             delay=arguments.delay, delay_line=arguments.delay_line, seed=arguments.seed,
             logs=arguments.logs) as lab:
        lab.keep_directory = True  # until it is known that nothing failed
        try:
            judge(arguments, checks, lab)
            lab.keep_directory = checks.failed > 0 or arguments.keep_logs
        except (KeyboardInterrupt, SystemExit):
            lab.keep_directory = False
            raise
        finally:
            if lab.keep_directory:
                print(f"logs: {lab.kept_in}", file=sys.stderr)


def judge(arguments, checks: Checks, lab: Lab) -> None:
    records = server_records = None
    if arguments.finrace is not None:
        options = ["--backend", arguments.backend]
        if arguments.attach:
            options += ["--attach", arguments.attach]
        records = lab.start_finrace(arguments.finrace, options)
        if arguments.backend == "trace":
            server_records = lab.start_finrace(arguments.finrace, [*options, "--side", "server"], "server side")
    rounds = lab.warm_up(records)
    print(f"  upstream closes after {lab.idle_timeout * 1e3:.1f} ms of idleness, round trip {lab.round_trip * 1e3:.1f} ms "
          f"({rounds} warm-up round{'s' if rounds > 1 else ''})", flush=True)
    lab.race(arguments.requests, enough=2 * FEWEST_RACES)
    lab.settle()

    for name, child in lab.tracers.items():
        alive = child.process.poll() is None
        code = child.stop()
        checks(alive and code == 0, f"{name} ran to the end and SIGINT ended it with 0",
               f"exit {code}" + ("" if alive else ", before SIGINT"), child.last_words().splitlines())
    missed = lab.capture_losses()
    checks(missed == 0, "the capture is complete", f"{missed} packets missed")
    trouble = lab.gather()
    failures = lab.failures
    raced = [exchange for exchange in lab.exchanges if exchange.race]
    checks(len(raced) >= arguments.requests, "every request near the timer was sent", f"{len(raced)}")
    checks(not trouble, "client, nginx's logs and the wire agree", f"{len(trouble)} differences", trouble)
    checks(len(failures) >= FEWEST_RACES, f"at least {FEWEST_RACES} requests raced",
           f"{len(failures)} of {len(raced)} failed")
    kinds = Counter(exchange.evidence.kind for exchange in failures if exchange.evidence)
    print("  on the wire: " + (", ".join(f"{kind} {count}" for kind, count in kinds.most_common()) or "nothing"))
    print("  nginx's log: " + "; ".join(f"{count} x {text}" for text, count in
                                        Counter(exchange.error for exchange in failures).most_common()))
    if records is None:
        print(checks.paint.bad("  finrace did not run (--finrace none): only the lab itself was tested"))
        return

    verdicts, foreign = lab.verdicts(records)
    print("  finrace:     " + "; ".join(f"{count} x {text}" for text, count in
                                        Counter(map(str, verdicts)).most_common()))
    learned = records.learned(lab.address, lab.port)
    idles = [idle * 1e3 for idle in lab.idle_times()]
    low, high = idles[len(idles) // 10], idles[len(idles) * 9 // 10]
    checks(learned is not None and low - 50 <= learned[0] <= high + 50, "finrace learned the upstream's idle timeout",
           (f"{learned[0]:.0f} ms from {learned[1]} closes" if learned else "no finrace.upstream record with it")
           + f"; on the wire 80 % of {len(idles)} lie in {low:.0f} to {high:.0f} ms")
    pairs, missing, extra = proxy_lab.match(failures, verdicts)
    unsent = [exchange for exchange in missing if proxy_lab.never_sent(exchange)]
    missing = [exchange for exchange in missing if not proxy_lab.never_sent(exchange)]
    if unsent:
        print(f"  {len(unsent)} failed without a byte sent (the reset had come before nginx wrote), and have no verdict:")
        for exchange in unsent:
            print(f"          {describe(exchange)}")
    checks(len(unsent) * 20 <= len(failures), "hardly any request failed unsent", f"{len(unsent)} of {len(failures)}")
    checks(not missing, "every failed request has its verdict", f"{len(pairs)} of {len(failures) - len(unsent)}",
           ["no verdict for " + describe(exchange) for exchange in missing])
    checks(not extra, "no verdict without a failed request", f"{len(extra)} beside the {len(pairs)}",
           [describe_verdict(verdict, lab.exchanges) for verdict in extra])
    checks(not foreign, "no verdict on the clients' own connections", f"{len(foreign)}", map(str, foreign))
    stalls = [exchange for exchange, verdict in pairs if proxy_lab.stalled(exchange, verdict)]
    checks(len(stalls) <= max(3, len(failures) // 10), "hardly any met an upstream, or a path, that stood still",
           f"{len(stalls)} of {len(failures)}, named upstream_reset, upstream_closed or path_dropped, not proven")
    wrong = [(exchange, verdict, why) for exchange, verdict in pairs
             if (why := proxy_lab.disagreement(exchange, verdict)) is not None]
    checks(not wrong, "every cause fits the wire, every crossing is proven", f"{len(pairs) - len(wrong)} of {len(pairs)}",
           [f"{verdict}: {why}; {describe(exchange)}" for exchange, verdict, why in wrong])
    if server_records is not None:
        judge_server_side(checks, lab, failures, server_records)
        with_server = [verdict for _, verdict in pairs if verdict.get("finrace.server_end")]
        unproven = [verdict for verdict in with_server if verdict.get("finrace.server_end.unread_bytes")
                    and verdict.get("finrace.certainty") != "proven"]
        checks(not unproven, "what the upstream left unread is proven", f"{len(with_server)} with the upstream's end",
               [describe_verdict(verdict, lab.exchanges) for verdict in unproven])
    unproven = [verdict for verdict in verdicts if verdict.get("finrace.incomplete")]
    checks(not unproven, "no verdict is incomplete", f"{len(unproven)}", map(str, unproven))
    health = records.named("finrace.health")
    last = health[-1] if health else Verdict({})
    lost = records.lost_events()
    checks(lost == 0 and last.get("finrace.health.complete") is True, "no event was lost, no record dropped",
           f"{lost} lost, {len(health)} health records, complete: {last.get('finrace.health.complete')}")
    for name, one in (("", records), (" of the server's side", server_records)):
        if one is not None:
            lines = one.path.read_bytes().split(b"\n")[:-1]
            complaints = check_records.complaints(lines)
            checks(lines and not complaints, f"every record{name} is valid", f"{len(lines)} records", complaints)
    used = {"backend": last.get("finrace.health.backend"), "attach": last.get("finrace.health.attach")}
    asked = {name: value for name in used if (value := getattr(arguments, name)) not in (None, "auto")}
    checks(all(used[name] == value for name, value in asked.items()), "the backend asked for is the one that ran",
           " by ".join(value for value in used.values() if value))


def judge_server_side(checks: Checks, lab: Lab, failures, records) -> None:
    """What finrace says of the upstream's side alone."""
    found = records.named("finrace.verdict")
    clients = [verdict for verdict in found if verdict.get("finrace.side") != "server"]
    checks(not clients, "the server's side alone was asked for", f"{len(clients)} of the client's", map(str, clients))
    print("  server side: " + ("; ".join(f"{count} x {text}" for text, count in Counter(map(str, found)).most_common()) or "-"))
    # By connection and time: an upstream connection's port may come again within a run.
    pairs, unnamed, extra = proxy_lab.match([failure for failure in failures if failure.evidence],
                                            [FromUpstream(verdict.record) for verdict in found])
    seen = [failure for failure in failures if failure.evidence and failure.evidence.kind in SERVER_SEES]
    due = [failure for failure in seen if failure.evidence.sender_rested >= SHORTEST_REST]
    checks(len(due) * 4 >= len(seen) * 3, "few answers had to be sent again",
           f"{len(seen) - len(due)} of {len(seen)} rests are cut short by that")
    missing = [failure for failure in due if failure in unnamed]
    wrong = [(failure, verdict) for failure, verdict in pairs if verdict.get("finrace.cause") != "closed_on_request"]
    checks(not missing and not wrong, "the upstream's side names each that it could see", f"{len(due) - len(missing)} of {len(due)}",
           [f"no verdict for {describe(failure)}" for failure in missing]
           + [f"{verdict}: {describe(failure)}" for failure, verdict in wrong])
    checks(not extra, "and no other", f"{len(found)} in all", map(str, extra))


class FromUpstream(Verdict):
    """A verdict of the upstream's side, its connection as the proxy sees it."""

    @property
    def connection(self) -> tuple:
        local_address, local_port, peer_address, peer_port = super().connection
        return (peer_address, peer_port, local_address, local_port)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--finrace", default=str(proxy_lab.ROOT / "build/finrace"),
                        help="the binary; 'none' tests the lab alone, and says so (default: build/finrace)")
    parser.add_argument("--backend", choices=["trace", "cgroup", "auto"], default="auto")
    parser.add_argument("--attach", choices=["fentry", "kprobe", "auto"])
    parser.add_argument("--upstream", choices=["uvicorn", "lingering", "reset", "local-uvicorn"], default="uvicorn")
    parser.add_argument("--family", type=int, choices=[4, 6], default=4)
    parser.add_argument("--requests", type=positive, default=300)
    parser.add_argument("--clients", type=positive, default=30)
    parser.add_argument("--keep-alive", type=positive, default=1, metavar="SECONDS")
    parser.add_argument("--delay", default="20ms", help="one-way (default: 20ms)")
    parser.add_argument("--delay-line", type=Path, default=proxy_lab.ROOT / "build/delay-line")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path, metavar="DIR", help="where the logs of a failed run go when it ends, such as a "
                        "folder that a virtual machine shares (default: they stay where they were written)")
    parser.add_argument("--keep-logs", action="store_true", help="keep the logs of a run that passed as well")
    arguments = parser.parse_args()
    arguments.finrace = None if arguments.finrace == "none" else Path(arguments.finrace).resolve()
    arguments.logs = arguments.logs.resolve() if arguments.logs else None
    arguments.delay_line = arguments.delay_line.resolve()
    return arguments


def main() -> int:
    arguments = parse()
    proxy_lab.unwind_on_signals()
    checks = Checks(Paint())
    attach = f"/{arguments.attach}" if arguments.attach else ""
    print(f"nginx race: {arguments.upstream} upstream, IPv{arguments.family}, backend {arguments.backend}{attach}, "
          f"{arguments.requests} POSTs from {arguments.clients} clients", flush=True)
    try:
        run(arguments, checks)
    except (LabError, OSError, ValueError) as error:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print(f"nginx_race: {error}", file=sys.stderr)
        return 2
    print(f"{checks.passed} passed, {checks.failed} failed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
