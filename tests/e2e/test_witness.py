#!/usr/bin/python3
"""The end-to-end test's own judgement, tested: a wrong, missing or extra verdict must not pass. Needs no root."""

import os
import struct
import sys
import tempfile
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[1:1] = [TESTS, os.path.join(TESTS, "live")]
import both_ends  # noqa: E402
import check_records  # noqa: E402
import proxy_lab  # noqa: E402
import truth  # noqa: E402
import wire  # noqa: E402
from proxy_lab import Exchange, Verdict  # noqa: E402
from reverse_proxies import Said  # noqa: E402

PROXY, SERVER, PORT = bytes([10, 77, 0, 1]), bytes([10, 77, 0, 2]), 8000
REQUEST = b"POST / HTTP/1.1\r\nX-Request-Id: %s\r\n\r\n"


class Script:
    """Writes a capture, segment by segment; sequence numbers count from the SYNs, which stand near the 2^32 wrap."""

    LOCAL_ISN, PEER_ISN = 0xFFFFFFF0, 0x12345678

    def __init__(self, port=40000):
        self.port, self.packets, self.time = port, [], 100.0

    def add(self, outgoing, flags, seq=0, ack=0, payload=b"", after=0.01, clock=None):
        self.time += after
        own, other = (self.LOCAL_ISN, self.PEER_ISN) if outgoing else (self.PEER_ISN, self.LOCAL_ISN)
        ports = (self.port, PORT) if outgoing else (PORT, self.port)
        options = b"" if clock is None else struct.pack("!BBBBII", 1, 1, 8, 10, clock & 0xFFFFFFFF, 0)
        tcp = struct.pack("!HHIIBBHHH", *ports, (own + seq) & 0xFFFFFFFF, (other + ack) & 0xFFFFFFFF,
                          (20 + len(options)) << 2, flags, 0, 0, 0) + options + payload
        ends = PROXY + SERVER if outgoing else SERVER + PROXY
        self.packets.append((self.time, struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + ends + tcp))
        return self

    def open(self):
        return (self.add(True, wire.SYN).add(False, wire.SYN | wire.ACK, ack=1)
                .add(True, wire.ACK, 1, 1))

    def exchanged(self, name=b"first"):
        self.out = 1 + len(REQUEST % name)
        return (self.open().add(True, wire.ACK, 1, 1, REQUEST % name)
                .add(False, wire.ACK, 1, self.out, b"ok", after=0.04))

    def second(self, name=b"second", after=1.0, knows_fin=False):
        self.end = self.out + len(REQUEST % name)
        return self.add(True, wire.ACK, self.out, 4 if knows_fin else 3, REQUEST % name, after=after)

    def connections(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "wire.pcap"
            data = struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 65535, 101)
            for time, packet in self.packets:
                data += struct.pack("<IIII", int(time), round(time % 1 * 1e9), len(packet), len(packet)) + packet
            path.write_bytes(data + b"\0" * 7)  # a packet that tcpdump has not written to its end
            return wire.read(path, PORT)

    def evidence(self, name="second"):
        for connection in self.connections():
            for request in connection.requests:
                if request.id == name:
                    return wire.evidence(connection, request)
        raise AssertionError(f"no request {name}")


class WireTest(unittest.TestCase):
    def test_crossed_by_the_whole_request_and_by_its_last_byte(self):
        script = Script().exchanged().second()
        script.add(False, wire.FIN | wire.ACK, 3, script.out)
        self.assertEqual(script.evidence().kind, "crossed")
        script = Script().exchanged().second()
        script.add(False, wire.FIN | wire.ACK, 3, script.end - 1)
        self.assertEqual(script.evidence().kind, "crossed")
        self.assertIn("1 of", script.evidence().text)

    def test_request_acknowledged_then_fin(self):
        script = Script().exchanged().second()
        script.add(False, wire.FIN | wire.ACK, 3, script.end)
        self.assertEqual(script.evidence().kind, "fin_acknowledged")

    def test_stale_by_the_acknowledgement_of_the_fin_not_by_the_order_at_the_tap(self):
        script = Script().exchanged()
        script.add(False, wire.FIN | wire.ACK, 3, script.out, after=1).second(after=0.0001, knows_fin=True)
        self.assertEqual(script.evidence().kind, "stale")
        script = Script().exchanged()
        script.add(False, wire.FIN | wire.ACK, 3, script.out, after=1).second(after=0.0001)
        self.assertEqual(script.evidence().kind, "crossed")

    def test_resets_and_answer(self):
        for flags, unacked, kind in ((wire.RST | wire.ACK, 0, "reset_unread"), (wire.RST | wire.ACK, 1, "reset_crossed"),
                                     (wire.RST, 0, "reset_bare")):
            script = Script().exchanged().second()
            self.assertEqual(script.add(False, flags, 3, script.end - unacked).evidence().kind, kind)
        script = Script().exchanged().second()
        self.assertEqual(script.evidence().kind, "open")
        self.assertEqual(script.add(False, wire.ACK, 3, script.end, b"ok").evidence().kind, "answered")

    def test_retransmission_is_not_a_second_request(self):
        script = Script().exchanged().second()
        script.add(True, wire.ACK, script.out, 3, REQUEST % b"second").add(False, wire.FIN | wire.ACK, 3, script.out)
        self.assertEqual(len(script.connections()[0].requests), 2)
        self.assertEqual(script.evidence().kind, "crossed")

    def test_an_answer_that_is_retransmitted_is_none_to_the_second_request(self):
        script = Script().exchanged().second()
        script.add(False, wire.ACK, 1, script.out, b"ok").add(False, wire.FIN | wire.ACK, 3, script.out)
        self.assertEqual(script.evidence().kind, "crossed")

    def test_a_rest_by_the_upstreams_clock_begins_when_its_answer_was_last_sent(self):
        wrap = 1 << 32
        script = Script().exchanged()
        script.add(False, wire.ACK, 1, script.out, b"ok", after=0.01, clock=wrap - 500)
        script.second().add(False, wire.ACK, 1, script.out, b"ok", clock=wrap - 400)
        script.add(False, wire.FIN | wire.ACK, 3, script.out, after=0.1, clock=wrap + 500)
        self.assertAlmostEqual(script.evidence().sender_rested, 0.9)
        self.assertAlmostEqual(script.evidence().rested, 1.11, places=3)
        script = Script().exchanged().second()
        script.add(False, wire.FIN | wire.ACK, 3, script.out)
        self.assertAlmostEqual(script.evidence().sender_rested, script.evidence().rested)

    def test_idle_close(self):
        script = Script().exchanged()
        script.add(False, wire.FIN | wire.ACK, 3, script.out, after=1.0)
        self.assertAlmostEqual(script.connections()[0].idle_before_close(), 1.0, places=6)
        script = Script().exchanged().second()
        script.add(False, wire.FIN | wire.ACK, 3, script.out)
        self.assertIsNone(script.connections()[0].idle_before_close())

    def test_a_port_used_again_is_another_connection(self):
        script = Script().exchanged()
        script.LOCAL_ISN = 77
        script.open()
        self.assertEqual(len(script.connections()), 2)


HEAD = b"HTTP/1.1 200 OK\r\nX-App: 1\r\n%s\r\n"


class Conversation(unittest.TestCase):
    """Writes requests and answers; `out` and `back` are the next sequence numbers of both directions."""

    def setUp(self):
        self.script = Script().open()
        self.out = self.back = 1

    def send(self, data, after=0.01):
        self.script.add(True, wire.ACK, self.out, self.back, data, after)
        self.out += len(data)
        return self

    def reply(self, data, after=0.01):
        self.script.add(False, wire.ACK, self.back, self.out, data, after)
        self.back += len(data)
        return self

    def end(self, flags, outgoing=False, unacked=0, after=0.01):
        own, other = (self.out, self.back) if outgoing else (self.back, self.out)
        self.script.add(outgoing, flags, own, other - unacked, after=after)
        return self

    def request(self, name, body=b"", declared=None, **more):
        head = (b"POST / HTTP/1.1\r\nX-Request-Id: %s\r\nContent-Length: %d\r\n\r\n"
                % (name, len(body) if declared is None else declared))
        self.size = len(head) + len(body)
        return self.send(head + body, **more)

    def exchanged(self):
        return self.request(b"first").reply(HEAD % b"Content-Length: 2\r\n" + b"ok")


class AttemptTest(Conversation):
    def last(self):
        found = wire.attempts(self.script.connections()[0])
        return found[-1] if found else None

    def kind(self):
        return self.last().kind

    def test_answered_by_length_by_chunks_and_by_close(self):
        self.exchanged()
        self.assertEqual((self.kind(), self.last().status, self.last().early), ("answered", 200, False))
        self.request(b"second", after=1).reply(HEAD % b"Transfer-Encoding: chunked\r\n" + b"2\r\nok\r\n")
        self.assertEqual((self.kind(), self.last().number), ("open", 2))
        self.reply(b"0\r\n\r\n")
        self.assertEqual(self.kind(), "answered")
        self.request(b"third").reply(HEAD % b"" + b"ok")
        self.assertEqual(self.kind(), "open")
        self.assertEqual(self.end(wire.FIN | wire.ACK).kind(), "answered")

    def test_interim_answer_and_head_in_two_segments(self):
        self.request(b"first").reply(b"HTTP/1.1 100 Continue\r\n\r\n").reply((HEAD % b"Content-Length: 2\r\n")[:9])
        self.assertEqual(self.kind(), "open")
        self.reply((HEAD % b"Content-Length: 2\r\n")[9:] + b"ok")
        self.assertEqual((self.kind(), self.last().status), ("answered", 200))

    def test_cut(self):
        for flags, kind in ((wire.FIN | wire.ACK, "cut_by_fin"), (wire.RST | wire.ACK, "cut_by_reset"),
                            (wire.RST, "cut_by_reset")):
            self.setUp()
            self.exchanged().request(b"second").reply(HEAD % b"Content-Length: 3\r\n" + b"ok")
            self.assertEqual(self.end(flags).kind(), kind)

    def test_closes_by_the_peer(self):
        for flags, unacked, kind in ((wire.FIN | wire.ACK, 0, "fin_acknowledged"), (wire.FIN | wire.ACK, 1, "crossed_partly"),
                                     (wire.FIN | wire.ACK, 1000, "crossed"), (wire.RST | wire.ACK, 0, "reset_unread"),
                                     (wire.RST | wire.ACK, 1000, "reset_crossed"), (wire.RST, 0, "reset_bare")):
            self.setUp()
            self.exchanged().request(b"second", after=1)
            self.assertEqual(self.end(flags, unacked=min(unacked, self.size)).kind(), kind, (flags, unacked))
            self.assertAlmostEqual(self.last().idle, 1.0, places=3)
            self.assertAlmostEqual(self.last().rested, 1.01, places=3)
            self.assertFalse(self.last().fresh)

    def test_bare_reset_after_an_acknowledgement_is_another_thing(self):
        self.exchanged().request(b"second").reply(b"").end(wire.RST)
        self.assertEqual(self.kind(), "reset_late")

    def test_stale(self):
        self.exchanged().end(wire.FIN | wire.ACK, after=1)
        self.back += 1  # the FIN
        self.assertEqual(self.request(b"second", after=0.001).kind(), "stale")
        self.setUp()
        self.exchanged().end(wire.FIN | wire.ACK, after=1)
        self.assertEqual(self.request(b"second", after=0.001).kind(), "crossed")

    def test_the_proxy_lets_go(self):
        self.exchanged().request(b"second").reply(b"").end(wire.FIN | wire.ACK, outgoing=True)
        self.assertEqual(self.kind(), "given_up")
        self.reply(HEAD % b"Content-Length: 2\r\n" + b"ok")  # too late
        self.assertEqual(self.kind(), "given_up")
        self.setUp()
        self.exchanged().request(b"second").reply(HEAD % b"Content-Length: 3\r\n" + b"ok").end(wire.RST, outgoing=True)
        self.assertEqual(self.kind(), "answer_given_up")

    def test_silence(self):
        self.exchanged().request(b"second", after=1)
        head = self.out
        for _ in range(3):
            self.script.add(True, wire.ACK, self.out - 10, self.back, b"x" * 10, 0.5)
        self.assertEqual(self.end(wire.FIN | wire.ACK, outgoing=True).kind(), "silent")
        self.assertEqual(self.out, head)
        self.setUp()
        self.exchanged().request(b"second", after=1).end(wire.FIN | wire.ACK, outgoing=True, after=0.9)
        self.assertEqual(self.kind(), "given_up")

    def test_answer_before_the_request_s_end(self):
        large = b"x" * 3 * wire.ONE_FLIGHT
        self.request(b"first", large, declared=2 * len(large)).reply(HEAD % b"Content-Length: 2\r\n" + b"no")
        self.assertEqual((self.kind(), self.last().early), ("answered", True))
        self.setUp()
        self.request(b"first", large, declared=2 * len(large)).end(wire.RST | wire.ACK, unacked=10)
        self.assertEqual(self.kind(), "rejected")

    def test_the_next_request_in_place_of_the_rest(self):
        self.request(b"first", b"x" * 1000, declared=5000).reply(HEAD % b"Content-Length: 2\r\n" + b"no")
        self.request(b"second").reply((HEAD % b"Content-Length: 2\r\n").replace(b"200", b"400") + b"no")
        found = wire.attempts(self.script.connections()[0])
        self.assertEqual([(one.id, one.kind, one.status, one.early) for one in found],
                         [("first", "answered", 200, True), ("second", "answered", 400, False)])
        self.assertEqual(wire.behind_uploads(found), [])

    def test_the_next_request_behind_the_rest(self):
        for after, riding in ((0, ["second"]), (0.002, [])):
            self.setUp()
            self.request(b"first", b"x" * 1000, declared=3000).reply(HEAD % b"Content-Length: 2\r\n" + b"no")
            self.script.add(True, wire.ACK, self.out, self.back, b"x" * 2000)
            self.out += 2000
            self.request(b"second", after=after)
            found = wire.attempts(self.script.connections()[0])
            self.assertEqual([(one.id, one.early) for one in found], [("first", True), ("second", False)])
            self.assertEqual([one.id for one in wire.behind_uploads(found)], riding)

    def test_bytes_that_had_come_before(self):
        self.exchanged().reply(HEAD % b"Content-Length: 2\r\n" + b"ok").request(b"second")
        self.assertEqual(self.kind(), "unsolicited")

    def test_retransmission_and_disorder(self):
        self.request(b"first")
        answer = HEAD % b"Content-Length: 4\r\n" + b"okok"
        self.script.add(False, wire.ACK, self.back + len(answer) - 2, self.out, answer[-2:])
        for _ in range(2):
            self.script.add(False, wire.ACK, self.back, self.out, answer[:-2])
        self.assertEqual((self.kind(), len(wire.attempts(self.script.connections()[0]))), ("answered", 1))

    def test_a_port_whose_last_connection_is_not_forgotten(self):
        script = Script().add(True, wire.SYN).add(False, wire.ACK, 7000, 5000).add(True, wire.RST, 5000)
        script.add(True, wire.SYN, after=1).add(False, wire.SYN | wire.ACK, ack=1).add(True, wire.ACK, 1, 1)
        self.script = script
        self.assertEqual(self.request(b"first").reply(HEAD % b"Content-Length: 2\r\n" + b"ok").kind(), "answered")

    def test_opening(self):
        def opening(script):
            return wire.opening(script.connections()[0])

        self.assertEqual(opening(Script().open()), "established")
        self.assertEqual(opening(Script().add(True, wire.SYN)), "unanswered")
        twice = Script().add(True, wire.SYN).add(True, wire.SYN, after=1)
        self.assertEqual((len(twice.connections()), twice.connections()[0].syns), (1, 2))
        script = Script().add(True, wire.SYN)
        script.PEER_ISN = 0
        self.assertEqual(opening(script.add(False, wire.RST | wire.ACK, ack=2)), "unanswered")
        self.assertEqual(opening(script.add(False, wire.RST | wire.ACK, ack=1)), "refused")


class TruthTest(Conversation):
    """What an attempt may be called, and that a wrong, missing or extra verdict is counted."""

    class Record(dict):
        def __init__(self, cause, variant=None, certainty="likely", when=100.1, port=40000):
            super().__init__(cause=cause, variant=variant, certainty=certainty, message="")
            self.time, self.local, self.peer = when, ("10.77.0.1", port), ("10.77.0.2", PORT)
            self.verdict = "/".join(part for part in (cause, variant, certainty) if part)

        def at(self, path, default=None):
            return self.get(path.rpartition(".")[2], default)

    def tally(self, *verdicts, status=502, application=False, began=None, backend="cgroup", said=(), left=0.0, violent=(),
              calls_off=False, killing=None, purges=False, server=False):
        ask = truth.Ask("second", "one", "POST", "/ok/second", 100.0, 110.0, status, application, True, left, port=50000,
                        server=server)
        lines = [{"event": "begin", "id": "second", "time": began}] if began else []
        joined = truth.Truth([ask], self.script.connections(), lines, list(said), backend=backend, keep_alive=1.0,
                             logs_begin=True, late=0.0, patience=2.0, violent=violent, calls_off=calls_off,
                             killing=killing, purges=purges)
        tallies = {"one": truth.Tally()}
        truth.judge(joined, list(verdicts), tallies, lambda _: "one")
        return tallies["one"]

    def found(self, *verdicts, **more):
        tally = self.tally(*verdicts, **more)
        return {name: getattr(tally, name) for name in ("failures", "wrong", "missed", "on_success", "unexplained", "truth")
                if getattr(tally, name)}

    def record(self, *arguments, **more):
        return self.Record(*arguments, when=self.script.time, **more)

    def test_crossed(self):
        self.exchanged().request(b"second", after=1).end(wire.FIN | wire.ACK, unacked=self.size)
        self.assertEqual(self.found(self.record("keepalive_race", "fin_crossed", "proven")), {"failures": 1})
        self.assertEqual(self.found(), {"failures": 1, "missed": 1})
        for wrong in (self.record("keepalive_race", "fin_lingering"), self.record("upstream_closed"),
                      self.record("stale_reuse")):
            self.assertEqual(self.found(wrong), {"failures": 1, "wrong": 1})
        right = self.record("keepalive_race", "fin_crossed", "proven")
        self.assertEqual(self.found(right, right), {"failures": 1, "wrong": 1})
        self.assertEqual(self.found(right, self.record("keepalive_race", "fin_crossed", port=40001)),
                         {"failures": 1, "wrong": 1})

    def test_client_answer_retry_and_reason(self):
        self.exchanged().request(b"second", after=1).end(wire.FIN | wire.ACK, unacked=self.size)

        def found(outcome, violent=(), purges=False, **said):
            record = self.record("keepalive_race", "fin_crossed", "proven")
            record.update(said)
            if outcome is not None:
                record["outcome"] = {"certainty": "likely", "client_port": 50000, **outcome}
            return self.found(record, violent=violent, purges=purges)

        right, wrong = {"failures": 1}, {"failures": 1, "wrong": 1}
        self.assertEqual(found({"retried": False}, status_code=502, reason="idle_timer"), right)
        self.assertEqual(found({"client_port": 50001}), wrong)
        self.assertEqual(found({"client_port": 50001, "certainty": "possible"}, status_code=200), right)
        self.assertEqual(found({}, status_code=200), wrong)
        self.assertEqual(found({"client_left": True}), wrong)
        self.assertEqual(found({"retried": True}), wrong)
        for reason in ("restart", "early_purge"):
            self.assertEqual(found(None, reason=reason), wrong)
            self.assertEqual(found(None, reason=reason, violent=("one",)), right)
            self.assertEqual(found(None, reason=reason, purges=True), right)
        self.assertEqual(found(None, exit_signal=9), wrong)
        self.setUp()
        self.exchanged().request(b"second", after=0.3).end(wire.FIN | wire.ACK, unacked=self.size)
        self.assertEqual(found(None, reason="idle_timer"), wrong)

    def test_an_acknowledged_request_by_timer_and_handler(self):
        race, closed = ("keepalive_race", "fin_lingering"), ("upstream_closed",)
        self.exchanged().request(b"second", after=1).end(wire.FIN | wire.ACK)
        self.assertEqual(self.found(self.record(*race)), {"failures": 1})
        self.assertEqual(self.found(self.record(*closed)), {"failures": 1, "wrong": 1})
        began = self.script.time - 0.005
        self.assertEqual(self.found(self.record(*race), began=began), {"failures": 1, "wrong": 1})
        self.assertEqual(self.found(self.record(*closed, None, "proven"), began=began), {"failures": 1})
        self.assertEqual(self.found(self.record(*closed), violent=("one",)), {"failures": 1})
        self.assertEqual(self.found(self.record(*closed, None, "proven"), violent=("one",)), {"failures": 1, "wrong": 1})
        self.setUp()
        self.exchanged().request(b"second", after=0.8).end(wire.FIN | wire.ACK, after=0.2)
        # A timer runs on over a request that busy workers have not read (httpd).
        self.assertEqual(self.found(self.record(*closed)), {"failures": 1, "wrong": 1})
        self.setUp()
        self.exchanged().request(b"second", after=0.5).end(wire.FIN | wire.ACK)
        for name in (race, closed):
            self.assertEqual(self.found(self.record(*name)), {"failures": 1})
        self.assertEqual(self.found(self.record(*closed, None, "proven")), {"failures": 1, "wrong": 1})

    def test_a_success(self):
        self.exchanged().request(b"second").reply(HEAD % b"Content-Length: 2\r\n" + b"ok")
        self.assertEqual(self.found(status=200, application=True), {})
        self.assertEqual(self.found(self.record("upstream_closed"), status=200, application=True), {"on_success": 1})
        # The upstream's server did not take it for a request, nor does the wire's reader.
        self.assertEqual(self.found(status=400), {"unexplained": 1})
        self.assertEqual(self.found(status=400, server=True), {})
        self.setUp()
        self.assertEqual(self.found(status=400), {"unexplained": 1})
        self.assertEqual(self.found(status=400, server=True), {})
        self.exchanged().request(b"second").reply(HEAD % b"Content-Length: 2\r\n" + b"ok")
        # The proxy failed what the wire calls answered.
        self.assertEqual(self.found(), {"unexplained": 1})
        said = [("second", Said(0, 504, "timeout", ""))]
        self.assertEqual(self.found(said=said), {"unexplained": 1})
        self.setUp()
        self.exchanged().request(b"second").reply(HEAD % b"Content-Length: 2\r\n" + b"ok", after=3)
        self.assertEqual(self.found(said=said, status=504), {})

    def test_a_failure_that_the_client_does_not_know_of(self):
        self.exchanged().request(b"second", after=1).end(wire.FIN | wire.ACK, unacked=self.size)
        self.assertEqual(self.found(self.record("keepalive_race", "fin_crossed"), status=200, application=True),
                         {"failures": 1, "truth": 1})

    def test_let_go(self):
        self.exchanged().request(b"second").reply(b"").end(wire.FIN | wire.ACK, outgoing=True)
        tally = self.tally()
        self.assertEqual((tally.unclassified, tally.lowest, tally.highest, tally.problem()), (1, 1, 1, None))
        tally.counted = 0
        self.assertIn("unclassified", tally.problem())
        self.assertEqual(self.found(self.record("proxy_timeout"), backend="trace"), {"failures": 1})
        self.assertEqual(self.found(self.record("proxy_timeout")), {"failures": 1, "wrong": 1})
        left = self.script.time - 0.005
        self.assertEqual(self.found(self.record("client_abort"), backend="trace", left=left), {"failures": 1})
        self.assertEqual(self.found(self.record("proxy_timeout"), backend="trace", left=left), {"failures": 1, "wrong": 1})

    def test_let_go_behind_bytes_that_nobody_acknowledged(self):
        self.exchanged().request(b"second", after=1).reply(b"", after=30).end(wire.FIN | wire.ACK, outgoing=True)
        self.assertEqual(self.tally().kinds, {"silent": 1})  # its client was answered before
        self.setUp()
        self.exchanged().request(b"second", after=1).reply(b"").end(wire.FIN | wire.ACK, outgoing=True, after=30)
        self.assertEqual(self.tally().kinds, {"given_up": 1})
        self.setUp()
        self.exchanged().request(b"second", after=1).reply(HEAD % b"Content-Length: 2\r\n" + b"ok", after=30)
        self.assertEqual(self.tally(status=504).kinds, {"silent": 1})
        self.assertEqual(self.tally(status=200, application=True).kinds, {})

    def test_a_killed_process_had_read_what_it_left_no_byte_of(self):
        self.exchanged().request(b"second", after=0.5).end(wire.FIN | wire.ACK)
        closed = self.record("upstream_closed", certainty="proven")
        self.assertEqual(self.found(closed), {"failures": 1, "wrong": 1})
        self.assertEqual(self.found(closed, killing={"one": True}), {"failures": 1})
        for certainty in ("proven", "likely"):
            for name in ("upstream_closed", "keepalive_race"):
                record = self.record(name, "fin_lingering" if name == "keepalive_race" else None, certainty)
                self.assertEqual(self.found(record, killing={"one": None}), {"failures": 1})

    def test_a_connection_called_off(self):
        self.script = Script()
        self.script.add(True, wire.SYN).add(False, wire.SYN | wire.ACK, ack=1).add(True, wire.RST)
        self.assertEqual((self.tally(calls_off=True).lowest, self.tally(calls_off=True).highest), (0, 1))
        self.assertEqual(self.tally().highest, 0)

    def test_a_cut_answer(self):
        self.exchanged().request(b"second").reply(HEAD % b"Content-Length: 3\r\n" + b"ok").end(wire.FIN | wire.ACK)
        self.assertEqual(self.tally(status=200, application=True).unobservable, 1)
        self.assertEqual(self.found(self.record("response_cut")), {"failures": 1, "wrong": 1})
        self.setUp()
        self.exchanged().request(b"second").reply(HEAD % b"Content-Length: 3\r\n" + b"ok").end(wire.RST | wire.ACK)
        self.assertEqual(self.found(self.record("response_cut")), {"failures": 1})
        self.assertEqual(self.found(), {"failures": 1, "missed": 1})

    def test_refused_and_its_explanation(self):
        self.script = Script()
        self.script.PEER_ISN = 0
        self.script.add(True, wire.SYN).add(False, wire.RST | wire.ACK, ack=1)
        self.assertEqual(self.found(self.record("connect_refused", certainty="proven")), {"failures": 1})
        self.assertEqual(self.found(), {"failures": 1, "missed": 1})
        self.assertEqual((self.found(calls_off=True), self.tally(calls_off=True).unobservable), ({"failures": 1}, 1))
        self.script = Script()
        self.assertEqual(self.found(), {"unexplained": 1})
        self.assertEqual(self.found(said=[("second", Said(0, 502, "benched", "no live upstreams"))]), {})
        self.assertEqual(self.found(said=[("second", Said(0, 502, "other", "502"))]), {"unexplained": 1})

    def test_a_witness_that_speaks_of_something_else(self):
        self.exchanged().request(b"second", after=1).end(wire.FIN | wire.ACK, unacked=self.size)
        right = self.record("keepalive_race", "fin_crossed", "proven")
        self.assertEqual(self.found(right, said=[("second", Said(0, 502, "upstream", ""))]), {"failures": 1})
        self.assertEqual(self.found(right, said=[("second", Said(0, 504, "timeout", ""))]), {"failures": 1, "truth": 1})


def failure(port=40000, time=100.0, kind="crossed", after=0.01, rested=1.0, ended=0.0):
    exchange = Exchange("race-00-0001", 0, True, None, log={"msec": time}, error="upstream prematurely closed connection")
    exchange.evidence = wire.Evidence(kind, "", ("10.77.0.1", port, "10.77.0.2", 8000), after, rested, ended)
    return exchange


def verdict(port=40000, when="1970-01-01T00:01:40.250000001Z", cause="keepalive_race", variant="fin_crossed",
            certainty="proven", local="10.77.0.1"):
    return Verdict({"timestamp": when, "event": {"name": "finrace.verdict"},
                    "network": {"local": {"address": local, "port": port},
                                "peer": {"address": "10.77.0.2", "port": 8000}},
                    "finrace": {"cause": cause, "variant": variant, "certainty": certainty, "side": "client"}})


class MatchTest(unittest.TestCase):
    def counts(self, failures, verdicts):
        return tuple(map(len, proxy_lab.match(failures, verdicts)))

    def test_equal(self):
        self.assertEqual(self.counts([failure()], [verdict()]), (1, 0, 0))
        self.assertEqual(self.counts([failure()], [verdict(local="::ffff:10.77.0.1")]), (1, 0, 0))
        self.assertEqual(self.counts([failure(time=100.0), failure(time=101.5)],
                                     [verdict(when="1970-01-01T00:01:41.6Z"), verdict()]), (2, 0, 0))

    def test_missing_extra_elsewhere_late(self):
        self.assertEqual(self.counts([failure()], []), (0, 1, 0))
        self.assertEqual(self.counts([], [verdict()]), (0, 0, 1))
        self.assertEqual(self.counts([failure()], [verdict(), verdict()]), (1, 0, 1))
        self.assertEqual(self.counts([failure()], [verdict(port=40001)]), (0, 1, 1))
        self.assertEqual(self.counts([failure()], [verdict(when="1970-01-01T00:01:41.1Z")]), (0, 1, 1))

    def test_nginx_notices_late(self):
        self.assertEqual(self.counts([failure(time=103.0)], [verdict()]), (0, 1, 1))
        self.assertEqual(self.counts([failure(time=103.0, ended=100.2)], [verdict()]), (1, 0, 0))
        self.assertEqual(self.counts([failure(time=103.0, ended=101.3)], [verdict()]), (0, 1, 1))

    def test_cause_against_the_wire(self):
        self.assertIsNone(proxy_lab.disagreement(failure(), verdict()))
        self.assertIn("not proven", proxy_lab.disagreement(failure(), verdict(certainty="likely")))
        for wrong in (verdict(cause="upstream_closed"), verdict(cause="stale_reuse", variant=None),
                      verdict(variant="fin_lingering"), verdict(variant=None)):
            self.assertIsNotNone(proxy_lab.disagreement(failure(), wrong))
        self.assertIsNone(proxy_lab.disagreement(failure(kind="stale"), verdict(cause="stale_reuse", variant=None)))
        self.assertIsNotNone(proxy_lab.disagreement(failure(kind="stale"), verdict()))
        self.assertIsNone(proxy_lab.disagreement(failure(kind="reset_bare"),
                                                 verdict(variant="reset_closed", certainty="likely")))
        self.assertIsNotNone(proxy_lab.disagreement(failure(kind="answered"), verdict()))

    def test_an_acknowledged_request_and_a_stalled_upstream(self):
        reset = verdict(cause="upstream_reset", variant=None, certainty="likely")
        reset.record["finrace"]["upstream"] = {"idle_timeout_ms": 1000}
        self.assertIsNotNone(proxy_lab.disagreement(failure(kind="reset_unread"), reset))
        self.assertIsNone(proxy_lab.disagreement(failure(kind="reset_unread", after=0.2), reset))
        self.assertIsNone(proxy_lab.disagreement(failure(kind="reset_unread", rested=1.3), reset))
        self.assertIsNotNone(proxy_lab.disagreement(failure(kind="crossed", after=0.2), reset))
        reset.record["finrace"]["certainty"] = "proven"
        self.assertIsNotNone(proxy_lab.disagreement(failure(kind="reset_unread", after=0.2), reset))


def seen(cause="keepalive_race", variant="fin_crossed", certainty="proven", reason=None, exchange=2, size=100, incomplete=False,
         port=40000):
    record = {"event": {"name": "finrace.verdict"}, "network": verdict(port).record["network"],
              "finrace": {"cause": cause, "certainty": certainty, "side": "client", "incomplete": incomplete,
                          "connection": {"exchange": exchange}, "request": {"bytes": size}}}
    record["finrace"].update({name: value for name, value in (("variant", variant), ("reason", reason)) if value})
    return both_ends.harness.Record(record)


class BothEndsTest(unittest.TestCase):
    def counts(self, live, captured, end="left", **limited):
        found = both_ends.compare(both_ends.by_connection(live), both_ends.by_connection(captured), end, **limited)
        return found.same, len(found.excused), len(found.differ)

    def test_the_same(self):
        self.assertEqual(self.counts([seen(), seen(port=40001)], [seen(port=40001), seen()]), (2, 0, 0))

    def test_apart(self):
        for other in (seen(cause="stale_reuse", variant=None), seen(variant="fin_lingering"), seen(certainty="likely"),
                      seen(exchange=3), seen(size=99), seen(incomplete=True), seen(reason="restart")):
            self.assertEqual(self.counts([seen()], [other]), (0, 0, 1))
        self.assertEqual(self.counts([seen()], []), (0, 0, 1))
        self.assertEqual(self.counts([], [seen()]), (0, 0, 1))
        self.assertEqual(self.counts([seen()], [seen(), seen()]), (1, 0, 1))
        self.assertEqual(self.counts([seen()], [seen(port=40001)]), (0, 0, 2))

    def test_reasons(self):
        for one, other, good in (("idle_timer", "unknown", True), ("restart", "early_purge", True),
                                 ("unannounced", "restart", True), ("restart", "idle_timer", False), ("idle_timer", None, False)):
            self.assertEqual(self.counts([seen(reason=one)], [seen(reason=other)]), (good, 0, not good))

    def test_blind_at_one_end_alone(self):
        silent = seen("path_dropped", "gave_up", "likely")
        self.assertEqual(self.counts([silent], [], "right"), (0, 1, 0))
        self.assertEqual(self.counts([silent], [seen()], "right"), (0, 0, 1))
        self.assertEqual(self.counts([silent], [seen("path_dropped", None, "likely")], "left"), (0, 1, 0))
        self.assertEqual(self.counts([silent], [seen("path_dropped", None, "likely")], "right"), (0, 0, 1))
        self.assertEqual(self.counts([seen("path_dropped", None, "likely")], [], "right"), (0, 0, 1))
        stalled = seen("accept_stalled", "gave_up", "likely")
        self.assertEqual([self.counts([stalled], [], end) for end in both_ends.ENDS], 2 * [(0, 1, 0)])
        self.assertEqual(self.counts([seen("accept_stalled", None, "likely")], []), (0, 0, 1))
        rejected = [seen("request_rejected", "early_answer", "possible", exchange=number) for number in (1, 2)]
        self.assertEqual(self.counts(rejected[:1], rejected[1:]), (0, 0, 1))
        self.assertEqual(self.counts(rejected[:1], rejected[1:], riding=[rejected[0].ends]), (0, 1, 0))
        self.assertEqual(self.counts(rejected[:1], []), (0, 0, 1))
        self.assertEqual(self.counts(rejected[:1], [], both_reset={rejected[0].ends}), (0, 1, 0))

    def test_pools(self):
        def report(**changes):
            pool = {"address": "10.0.0.1", "port": 80, "state": "exposed", "connections": 10, "open": 1, "requests": 50, "unclassified": 2,
                    "longest_reused_idle_ms": 2000, "idle_timeout": {"ms": 5000, "spread_ms": 16}}
            return {"upstreams": [{**pool, **changes}]}

        for change in ({"open": 2, "connections": 9}, {"idle_timeout": {"ms": 5040, "spread_ms": 16}}):
            self.assertFalse(both_ends.pools_differ(report(), report(**change)))
        for change in ({"state": "unknown"}, {"idle_timeout": {"ms": 5060, "spread_ms": 16}}, {"idle_timeout": None}, {"requests": 49},
                       {"own_idle_limit": {"ms": 1000, "spread_ms": 5}}, {"connections": 9}, {"unclassified": 3}, {"port": 81},
                       {"longest_reused_idle_ms": 2030}):
            self.assertTrue(both_ends.pools_differ(report(), report(**change)), change)
        lost = [seen("path_dropped", "gave_up", "likely", exchange=3)]
        self.assertFalse(both_ends.pools_differ(report(), report(requests=47, unclassified=3), lost))
        self.assertTrue(both_ends.pools_differ(report(), report(requests=46), lost))
        self.assertTrue(both_ends.pools_differ(report(), report(unclassified=1), lost))
        self.assertFalse(both_ends.pools_differ(report(), report(requests=51), counted_apart={1}))
        self.assertTrue(both_ends.pools_differ(report(), report(requests=52), counted_apart={1}))
        self.assertFalse(both_ends.pools_differ(report(), report(requests=51, unclassified=3), riding=1))
        self.assertTrue(both_ends.pools_differ(report(), report(requests=52), riding=1))


class ReportTest(unittest.TestCase):
    def test_a_wrong_part_is_found_behind_every_reference(self):
        self.assertIn("findings.0.upstream.netns: 'x'", " ".join(check_records.report_complaints({"findings": [{"upstream": {"netns": "x"}}]})))
        self.assertIn("findings.0.cause: 'x'", " ".join(check_records.report_complaints({"findings": [{"cause": "x"}]})))
        self.assertIn("elsewhere.0.netns: 'x'", " ".join(check_records.report_complaints({"elsewhere": [{"netns": "x"}]})))


if __name__ == "__main__":
    unittest.main()
