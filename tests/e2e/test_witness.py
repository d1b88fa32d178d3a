#!/usr/bin/python3
"""The end-to-end test's own judgement, tested: a wrong, missing or extra verdict must not pass. Needs no root."""

import struct
import sys
import tempfile
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
import proxy_lab  # noqa: E402
import wire  # noqa: E402
from proxy_lab import Exchange, Verdict  # noqa: E402

PROXY, SERVER, PORT = bytes([10, 77, 0, 1]), bytes([10, 77, 0, 2]), 8000
REQUEST = b"POST / HTTP/1.1\r\nX-Request-Id: %s\r\n\r\n"


class Script:
    """Writes a capture, segment by segment; sequence numbers count from the SYNs, which stand near the 2^32 wrap."""

    LOCAL_ISN, PEER_ISN = 0xFFFFFFF0, 0x12345678

    def __init__(self, port=40000):
        self.port, self.packets, self.time = port, [], 100.0

    def add(self, outgoing, flags, seq=0, ack=0, payload=b"", after=0.01):
        self.time += after
        own, other = (self.LOCAL_ISN, self.PEER_ISN) if outgoing else (self.PEER_ISN, self.LOCAL_ISN)
        ports = (self.port, PORT) if outgoing else (PORT, self.port)
        tcp = struct.pack("!HHIIBBHHH", *ports, (own + seq) & 0xFFFFFFFF, (other + ack) & 0xFFFFFFFF, 5 << 4, flags,
                          0, 0, 0) + payload
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


if __name__ == "__main__":
    unittest.main()
