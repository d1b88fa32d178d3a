"""What has to be true of a verdict: client, wire, proxy's log and application's log, joined; finrace has no part in it.

The unit is the attempt: one request on one upstream connection, as the capture shows it (wire.Attempt), or a connection
that could not be opened. `expect` says what an attempt may be called, `judge` holds a proxy's failures and finrace's
verdicts beside that, with the client, the answer, the retry and the reason that these name.
"""

import bisect
import re
from dataclasses import dataclass, field, replace

import wire

LATE = 1.5  # seconds that a verdict may come after the segment that decided it: an outcome is waited for
SLACK = 0.25  # of a timer, on a machine that has other work


@dataclass
class Ask:
    """A client's request, and what it got."""

    id: str
    accident: str
    method: str
    path: str
    sent: float = 0.0
    done: float = 0.0
    status: int = 0  # 0: no answer
    application: bool = False  # the answer is the application's own (X-App)
    whole: bool = False
    left: float = 0.0  # when the client went away without waiting on
    trouble: str = ""
    port: int = 0  # the client's
    server: bool = False  # the answer has the words of the upstream's server, which no proxy has

    @property
    def got(self):
        if self.left:
            return f"left after {self.left - self.sent:.2f} s"
        if not self.status:
            return f"nothing ({self.trouble})"
        return f"{self.status}{'' if self.application else ' without X-App'}{'' if self.whole else ', cut'}"


@dataclass
class Expected:
    """What finrace may call an attempt: (cause, beginning of the variant). Empty: nothing."""

    allowed: list
    demanded: bool = True  # a verdict must come
    unproven: tuple = ()  # causes that may not be called proven here
    unclassified: bool = False  # no verdict, and counted as such
    countable: bool = False  # no verdict, and perhaps counted as unclassified
    unobservable: bool = False  # TCP doesn't tell, or the wire never saw it
    why: str = ""


RACE, CLOSED, RESET = "keepalive_race", "upstream_closed", "upstream_reset"


def near_timer(rested, keep_alive, late):
    """Whether the server's idle timer, which comes up to `late` seconds after its time, explains a close after this rest."""
    return keep_alive is not None and keep_alive - SLACK <= rested <= keep_alive * 1.02 + late + SLACK


def expect(attempt, began, at_timer, ask, backend, killed=False):
    """`began`: whether the application's handler had this attempt's request; None if that is not known. `at_timer`: the
    server's idle timer explains the end. `killed`: so does its process's death (None: perhaps); the kernel that closes for it
    sends no FIN where a byte lay unread, so that such a process had read its request."""
    kind = attempt.kind
    taken = CLOSED if not attempt.reset else RESET
    if kind in ("answered", "open"):
        early = [("request_rejected", "")] if attempt.early else []
        return Expected(early, demanded=False, why="answered" if kind == "answered" else "still open")
    if kind in ("crossed", "reset_crossed"):
        if attempt.fresh:
            return Expected([(taken, "on_accept")])
        return Expected([(RACE, "fin_crossed" if kind == "crossed" else "reset_crossed")])
    if kind == "crossed_partly":
        return Expected([(RACE, ""), ("request_rejected", "")], demanded=False)
    if kind == "stale":
        return Expected([("stale_reuse", "")])
    if kind in ("fin_acknowledged", "reset_unread"):
        race = (RACE, "fin_lingering" if kind == "fin_acknowledged" else "reset_unread")
        if began:
            return Expected([(taken, "")], why="the handler had begun")
        if began is None:
            return Expected([race, (taken, "")], why="whether the handler had begun is not known")
        if at_timer:
            return Expected([race], why="the handler had not begun, at the idle timer")
        if attempt.fresh:
            return Expected([(taken, "")], why="the handler had not begun; no idle close meets a connection just opened")
        # A byte left unread makes the kernel's FIN an RST, so a killed process that sent a FIN had read the request; and no
        # idle close is proven where a signal closed.
        return Expected([race, (taken, "")], unproven={True: (RACE,), False: (taken,), None: ()}[killed],
                        why="the handler had not begun, perhaps not by the idle timer")
    if kind == "reset_bare":
        return Expected([(RESET, "")] if attempt.fresh else [(RACE, "reset_closed")])
    if kind == "reset_late":
        return Expected([("request_rejected" if attempt.size > wire.SMALLEST_FLIGHT else RESET, "")], demanded=False)
    if kind == "given_up":
        if ask is not None and ask.left and ask.left <= attempt.ended:
            name = "client_abort"
        else:
            name = "proxy_timeout"
        return Expected([(name, "")] if backend == "trace" else [], demanded=False, unclassified=True, why=name)
    if kind == "silent":
        return Expected([("accept_stalled", "")] if attempt.fresh else [("path_dropped", "")])
    if kind == "cut_by_reset":
        return Expected([("response_cut", "")])
    if kind == "cut_by_fin":
        return Expected([], demanded=False, unobservable=True, why="TCP does not tell a cut answer from a whole one")
    if kind == "rejected":
        return Expected([("request_rejected", "")] + ([(RACE, "")] if at_timer else []), demanded=backend == "trace",
                        unclassified=True, why="cgroup does not see what was still to be sent")
    if kind == "answer_given_up":
        return Expected([], demanded=False, unobservable=True, why="the proxy let go in the middle of an answer")
    if kind == "unsolicited":
        return Expected([("stale_response", "")])
    raise ValueError(kind)


def expect_opening(kind):
    return Expected([("connect_refused" if kind == "refused" else "connect_timeout", "")])


@dataclass
class Finding:
    """One thing that is not as it should be."""

    what: str  # wrong, missed, success, unexplained, truth
    text: str


@dataclass
class Tally:
    """What one accident showed."""

    exchanges: int = 0
    failures: int = 0
    verdicts: int = 0
    wrong: int = 0
    missed: int = 0
    on_success: int = 0
    unclassified: int = 0
    unobservable: int = 0
    unexplained: int = 0
    truth: int = 0
    statuses: dict = field(default_factory=dict)
    kinds: dict = field(default_factory=dict)
    causes: dict = field(default_factory=dict)
    explained: dict = field(default_factory=dict)
    benched: int = 0  # clients that finrace calls so
    clients: int = 0  # verdicts on an attempt of a known client's: how many name it, and what it was answered
    answers: int = 0
    lowest: int = 0  # of what finrace may count as unclassified
    highest: int = 0
    counted: int | None = None  # by finrace
    compared: int = 0  # verdicts that were looked for in captures
    findings: list = field(default_factory=list)

    def add(self, other):
        for name in ("exchanges", "failures", "verdicts", "wrong", "missed", "on_success", "unclassified", "unobservable",
                     "unexplained", "truth"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.findings += other.findings

    def problem(self):
        """Why this accident's check fails, or None."""
        said = [f"{count} {name}" for count, name in (
            (self.wrong, "wrong"), (self.missed, "missed"), (self.on_success, "on a success"),
            (self.unexplained, "of the proxy's failures without a cause"), (self.truth, "contradictions in the truth itself"))
            if count]
        if self.counted is not None and not self.lowest <= self.counted <= self.highest:
            said.append(f"{self.counted} counted as unclassified, {self.lowest} to {self.highest} expected")
        return ", ".join(said) or None


def note(counts, name):
    counts[name] = counts.get(name, 0) + 1


class Truth:
    """All that is known of one stage, without finrace."""

    def __init__(self, asks, connections, application, said, *, backend, keep_alive, logs_begin, late, patience, violent=(),
                 killing=None, purges=False, calls_off=False, disconnects=False):
        """`application`: its log's lines; `said`: (request id or "", reverse_proxies.Said); `violent`: accidents that end
        idle connections in other ways than by the timer; `killing`: whether these kill the server's process (None: perhaps);
        `purges`: the server drops what is idle when it is short of room."""
        self.asks = {ask.id: ask for ask in asks}
        self.backend, self.keep_alive, self.logs_begin = backend, keep_alive, logs_begin
        self.late, self.patience, self.violent, self.killing = late, patience, violent, killing or {}
        self.purges, self.calls_off, self.disconnects = purges, calls_off, disconnects
        self.connections = connections
        self.attempts = {}
        self.on = {}  # by connection
        for connection in connections:
            found = wire.attempts(connection)
            self.on[id(connection)] = found
            for attempt in found:
                self.attempts.setdefault(attempt.id, []).append(attempt)
        for name, attempts in self.attempts.items():
            attempts.sort(key=lambda attempt: attempt.time)
            self.hidden_end(self.asks.get(name), attempts[-1])
        self.begun = {}
        for line in application:
            if line.get("event") == "begin":
                self.begun.setdefault(line["id"], []).append(line["time"])
        self.said, self.nameless = {}, []
        for name, one in said:
            if name:
                self.said.setdefault(name, []).append(one)
            else:
                self.nameless.append(one)
        self.failed_openings = [connection for connection in connections if wire.opening(connection) != "established"]

    @staticmethod
    def hidden_end(ask, attempt):
        """Behind bytes that nobody acknowledges no FIN shows: when the proxy let go is known by what it told its client.

        An answer may yet come, to a socket that is gone."""
        if (ask and attempt.kind in ("given_up", "answer_given_up", "answered") and not ask.application and not ask.left and
                attempt.acknowledged > ask.done >= attempt.time + wire.SILENCE):
            attempt.kind = "silent"
            attempt.text += f"; nothing acknowledged when its client was answered, after {(ask.done - attempt.time) * 1e3:.0f} ms"

    def began(self, attempt):
        if not self.logs_begin:
            return None
        times = [other.time for other in self.attempts[attempt.id]]
        place = times.index(attempt.time)
        until = times[place + 1] if place + 1 < len(times) else float("inf")
        return any(attempt.time - 0.001 <= when < until for when in self.begun.get(attempt.id, []))

    def expected(self, attempt):
        ask = self.asks.get(attempt.id)
        at_timer = near_timer(attempt.rested, self.keep_alive, self.late)
        killed = self.killing.get(ask.accident, False) if ask else False
        if at_timer and ask and ask.accident in self.violent:
            at_timer, killed = False, None if killed else False  # either explains it
        due = expect(attempt, self.began(attempt), at_timer, ask, self.backend, killed)
        if self.backend == "cgroup" and attempt in wire.behind_uploads(self.on[id(attempt.connection)]):
            due = replace(due, allowed=[*due.allowed, ("request_rejected", "")], demanded=False, unclassified=False, countable=True,
                          unobservable=True, why="its head may have left in one segment with the rest of an upload")
        return due

    # -- the proxy's own failures

    def openings(self, ask):
        """Connections that could not be opened while this request was under way."""
        return [connection for connection in self.failed_openings
                if ask.sent - 0.01 <= connection.opened <= (ask.done or ask.left) + 0.01]

    def failed_by_proxy(self, ask):
        """Its client got no whole answer of the upstream's, and had waited for one."""
        if ask.left:
            return False
        if ask.application or ask.server:
            return not ask.whole
        if 0 < ask.status and ask.whole:
            # A server has errors of its own that the application never wrote (503 at its limit, 413, 400).
            return not any(attempt.kind == "answered" and attempt.status == ask.status
                           for attempt in self.attempts.get(ask.id, []))
        return True

    def explanation(self, ask):
        """(what, or None; contradiction, or None) of a failed request."""
        attempts = self.attempts.get(ask.id, [])
        failed = [attempt for attempt in attempts if attempt.kind not in ("answered", "open")]
        said = self.said.get(ask.id, [])
        whats = {one.what for one in said}
        words = "; ".join(f"{one.what}: {one.text}" for one in said) or "nothing"
        if failed:
            if whats & {"benched", "connections", "queue"}:
                return "an attempt, then " + "/".join(sorted(whats & {"benched", "connections", "queue"})), None
            kinds = {attempt.kind for attempt in failed}
            if "timeout" in whats and not kinds & {"given_up", "silent", "answer_given_up"} and not self.openings(ask):
                return "an attempt", f"the proxy speaks of a time-out ({words}), the wire shows {kinds}"
            if "upstream" in whats and not kinds & set(wire.FAILED):
                return "an attempt", f"the proxy blames the upstream ({words}), the wire shows {kinds}"
            return "an attempt", None
        openings = self.openings(ask)
        if openings:
            return "connection " + wire.opening(openings[0]), None
        for what in ("benched", "connections", "queue"):
            if what in whats:
                return what, None
        if not attempts and "connections" in {one.what for one in self.nameless}:
            return "connections", None
        if "upstream" in whats and not attempts:
            near = [connection for connection in self.connections if connection.peer_close() is not None
                    and ask.sent - 0.05 <= connection.peer_close().time <= ask.done + 0.05]
            if near:
                return "unsent", None
        if not ask.status and any(attempt.early and attempt.status == one.status for attempt in attempts for one in said):
            return "an early answer lost under the client's own body", None
        if any(attempt.early and attempt.reset_after for attempt in attempts):
            return "an early answer lost to the reset behind it", None
        if "upstream" in whats and any(attempt.early for attempt in attempts):
            return "an early answer that the proxy did not take, with its request still to be sent", None
        if "timeout" in whats and any(attempt.kind == "answered" and attempt.ended - attempt.time >= self.patience
                                      for attempt in attempts):
            return "an answer too late", None  # the proxy gives up without letting go of the upstream
        if attempts:
            return None, f"the proxy failed it ({words}), the wire shows " + "; ".join(map(str, attempts))
        return None, f"no attempt on the wire; the proxy said {words}"


def segments(connection, since, count=14):
    """The wire's last words on a connection, for people."""
    lines = []
    for segment in connection.segments[-count:]:
        flags = "".join(letter for bit, letter in ((wire.SYN, "S"), (wire.FIN, "F"), (wire.RST, "R"), (wire.ACK, ".")) if
                        segment.flags & bit)
        lines.append(f"{'>' if segment.outgoing else '<'} {(segment.time - since) * 1e3:9.2f} ms {flags:3} seq {segment.seq} "
                     f"ack {segment.ack} len {len(segment.payload)}")
    return lines


def judge_benched(truth, verdicts, tallies, accident_at):
    """upstream_benched belongs to a client that got an error without an attempt; one record may stand for several."""
    by_port = {}
    for ask in truth.asks.values():
        by_port.setdefault(ask.port, []).append(ask)
    for verdict in verdicts:
        asks = [ask for ask in by_port.get(verdict.at("finrace.outcome.client_port"), [])
                if ask.sent - 0.1 <= verdict.time <= ask.done + LATE]
        tally = tallies[asks[0].accident if asks else accident_at(verdict.time)]
        tally.verdicts += 1
        tally.benched += verdict.at("finrace.evidence.untried_answers", 1)
        note(tally.causes, verdict.verdict)
        # Beside openings that failed for others, who was told of a bench and who of his own can't be told (Varnish).
        if not any(truth.failed_by_proxy(ask) and re.search("benched|^connection ", truth.explanation(ask)[0] or "")
                   for ask in asks):
            tally.wrong += 1
            whose = ", ".join(f"{ask.id}: {ask.got}" for ask in asks) or "nobody"
            tally.findings.append(Finding("wrong", f"benched, of {whose}: {describe(verdict)}"))


def judge(truth, verdicts, tallies, accident_at):
    """Fills `tallies` (by accident). `verdicts`: harness records of the proxy's side; `accident_at(time)`: name."""
    judge_benched(truth, [one for one in verdicts if one.at("finrace.cause") == "upstream_benched"], tallies, accident_at)
    verdicts = [one for one in verdicts if one.at("finrace.cause") != "upstream_benched"]
    by_key = {}
    for connection in truth.connections:
        by_key.setdefault(connection.key, []).append(connection)
    for connections in by_key.values():
        connections.sort(key=lambda connection: connection.opened)
    matched = {}  # id(connection) -> verdicts
    for verdict in verdicts:
        key = verdict.local + verdict.peer
        candidates = by_key.get(key, [])
        place = bisect.bisect_right([connection.opened for connection in candidates], verdict.time + 0.001) - 1
        if place < 0:
            tally = tallies[accident_at(verdict.time)]
            tally.wrong += 1
            tally.verdicts += 1
            tally.findings.append(Finding("wrong", f"on a connection that the wire does not know: {describe(verdict)}"))
            continue
        matched.setdefault(id(candidates[place]), []).append(verdict)

    for connection in truth.connections:
        found = matched.get(id(connection), [])
        attempts = truth.on[id(connection)]
        opening = wire.opening(connection)
        last = attempts[-1] if attempts else None
        for attempt in attempts[:-1]:
            if attempt.failed:
                tally = tallies[_accident(truth, attempt, accident_at)]
                tally.truth += 1
                tally.findings.append(Finding("truth", f"failed, with a request after it on its connection: {attempt}"))
        if opening != "established":
            expected, accident, what = expect_opening(opening), accident_at(connection.opened), f"opening {opening}"
            # Of a SYN that was given up before it was sent again nothing can be said (docs/design.md).
            if opening == "unanswered" and connection.syns < 2:
                expected.demanded, expected.unclassified = False, True
            # Where errors can't be seen, a disconnected socket looks as if ICMP had ended it.
            if opening == "unanswered" and truth.disconnects and truth.backend == "cgroup":
                expected.demanded, expected.unclassified = False, True
            # An RST that finds the socket gone looks the same on the wire.
            if opening == "refused" and truth.calls_off:
                expected.demanded, expected.unobservable = False, True
        elif last is None:
            # Called off: the SYN-ACK met no socket any more.
            called_off = truth.calls_off and any(one.outgoing and one.flags & wire.RST for one in connection.segments)
            expected, accident, what = Expected([], demanded=False, countable=called_off), accident_at(connection.opened), "unused"
        else:
            expected, accident, what = truth.expected(last), _accident(truth, last, accident_at), last.kind
        _hold(tallies[accident], connection, last, what, expected, found, opening != "established" or (
            last is not None and last.failed), truth)

    for ask in truth.asks.values():
        tally = tallies[ask.accident]
        tally.exchanges += 1
        note(tally.statuses, "left" if ask.left else ask.got if not ask.status else
             f"{ask.status}{'' if ask.application else ' own'}{'' if ask.whole else ' cut'}")
        if truth.failed_by_proxy(ask):
            why, contradiction = truth.explanation(ask)
            if why:
                note(tally.explained, why)
                tally.unobservable += why == "unsent"
            if why is None:
                tally.unexplained += 1
                tally.findings.append(Finding("unexplained", f"{ask.id} got {ask.got}: {contradiction}"))
            elif contradiction:
                tally.truth += 1
                tally.findings.append(Finding("truth", f"{ask.id} got {ask.got}: {contradiction}"))
        elif not ask.left and ask.status:
            attempts = truth.attempts.get(ask.id, [])
            # A proxy that took an early answer may go on over the connection in the midst of its last request's body (Traffic
            # Server 9.2.9): what it sends then is no request, to the server's parser nor to the wire's reader.
            if not ask.server and not any(attempt.kind == "answered" for attempt in attempts):
                tally.truth += 1
                tally.findings.append(Finding("truth", f"{ask.id} got {ask.got}, the wire shows "
                                              f"{'; '.join(map(str, attempts)) or 'nothing'}"))


def mistaken(truth, attempt, verdict):
    """What a verdict says beside the cause, and is not so: client, answer, retry, the reason of the close. None if all is.

    What finrace itself calls no more than possible is not held against it."""
    ask = truth.asks[attempt.id]
    outcome = verdict.at("finrace.outcome", {})
    if outcome.get("certainty") == "likely":
        if outcome["client_port"] != ask.port:
            return f"the client's port was {ask.port}, not {outcome['client_port']}"
        status = verdict.at("http.response.status_code")
        if status is not None and not ask.left and status != ask.status:
            return f"the client was answered {ask.status}, not {status}"
        if outcome.get("client_left") and not ask.left and ask.done > verdict.time + LATE:
            return "the client had not left"
    again = any(other.time > attempt.time for other in truth.attempts[attempt.id])
    if outcome.get("retried") is True and not again and not truth.openings(ask):
        return "it was not tried again"
    if outcome.get("retried") is False and again:
        return "it was tried again"
    reason = verdict.at("finrace.reason")
    if reason == "idle_timer" and not near_timer(attempt.rested, truth.keep_alive, truth.late):
        return f"no idle timer of {truth.keep_alive} s closes after {attempt.rested:.3f} s"
    if reason in ("restart", "early_purge") and ask.accident not in truth.violent and not truth.purges:
        return "no server was restarted, and this one drops nothing for want of room"
    if reason == "unannounced" and attempt.rested > 0.02:
        return f"the connection had rested for {attempt.rested:.3f} s since its last answer"
    if verdict.at("finrace.server_end.exit_signal") and ask.accident not in truth.violent:
        return "no process was killed"
    return None


def _accident(truth, attempt, accident_at):
    ask = truth.asks.get(attempt.id)
    return ask.accident if ask else accident_at(attempt.time)


def _hold(tally, connection, attempt, what, expected, found, failed, truth):
    """One connection's end beside the verdicts on it."""
    tally.verdicts += len(found)
    if failed:
        tally.failures += 1
        note(tally.kinds, what)
    for verdict in found:
        note(tally.causes, verdict.verdict)
    since = attempt.time if attempt else connection.opened

    def evidence(*more):
        ask = truth.asks.get(attempt.id) if attempt else None
        lines = [str(attempt) if attempt else f"{what} on {connection.key}"]
        if expected.why:
            lines.append(f"because: {expected.why}")
        right = " or ".join(f"{cause} {variant}".strip() for cause, variant in expected.allowed)
        lines.append(f"right: {right or 'nothing'}")
        if ask:
            lines.append(f"{ask.method} {ask.path}: the client got {ask.got}")
            said = truth.said.get(ask.id, [])
            lines.append("proxy: " + ("; ".join(f"{one.what}: {one.text}" for one in said) or "nothing"))
            begun = ", ".join(f"{(when - since) * 1e3:.1f} ms" for when in truth.begun.get(ask.id, []))
            lines.append(f"handler began: {begun or 'never'}")
        for verdict in found:
            lines.append(f"finrace at {(verdict.time - since) * 1e3:.1f} ms: {describe(verdict)}")
        return "\n    ".join([*lines, *more, *segments(connection, since)])

    if not found:
        tally.unobservable += expected.unobservable
        if expected.demanded:
            tally.missed += 1
            tally.findings.append(Finding("missed", evidence()))
        elif expected.unclassified:
            tally.unclassified += 1
            tally.lowest += 1
            tally.highest += 1
        elif failed or expected.allowed or expected.countable:
            tally.highest += 1
        return
    if len(found) > 1:
        tally.wrong += 1
        tally.findings.append(Finding("wrong", evidence(f"{len(found)} verdicts on one connection")))
        return
    verdict = found[0]
    cause, variant = verdict.at("finrace.cause"), verdict.at("finrace.variant") or ""
    complaint = None
    if not any(cause == name and variant.startswith(start) for name, start in expected.allowed):
        complaint = "not what happened"
    elif cause in expected.unproven and verdict.at("finrace.certainty") == "proven":
        complaint = "proven, and it is not"
    elif not connection.opened - 0.1 <= verdict.time <= max(attempt.ended if attempt else 0, connection.last_syn,
                                                            connection.opened) + LATE + 3:
        complaint = "at another time"
    elif attempt and attempt.id in truth.asks:
        tally.clients += "client_port" in verdict.at("finrace.outcome", {})
        tally.answers += verdict.at("http.response.status_code") is not None
        complaint = mistaken(truth, attempt, verdict)
    if not complaint:
        return
    if not failed:
        tally.on_success += 1
        tally.findings.append(Finding("success", evidence("a verdict on a success")))
    else:
        tally.wrong += 1
        tally.findings.append(Finding("wrong", evidence(complaint)))


def describe(verdict):
    return (f"{verdict.verdict}: {verdict.at('finrace.message')} [exchange {verdict.at('finrace.connection.exchange')}, idle "
            f"{verdict.at('finrace.connection.idle_ms')} ms, evidence {dict(verdict.at('finrace.evidence', {}))}, upstream "
            f"{dict(verdict.at('finrace.upstream', {}))}, outcome {dict(verdict.at('finrace.outcome', {}))}, status "
            f"{verdict.at('http.response.status_code')}, reason {verdict.at('finrace.reason')}]")
