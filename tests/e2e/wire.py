"""What the wire says: reads tcpdump's capture, taken on the proxy's side, as connections and requests.

The capture is an independent witness: it names the connection that carried a request (the request's id stands in
its header) and how that connection ended, by sequence numbers. It shares no code with finrace, so that it can
contradict both finrace and nginx's log.
"""

import ipaddress
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10

REQUEST_ID = re.compile(rb"\r\nx-request-id: *([^\r\n]+)\r\n", re.IGNORECASE)

LINK_HEADER = {1: 14, 101: 0, 12: 0, 113: 16, 276: 20}  # Ethernet, raw IP (two numbers), Linux cooked 1 and 2


@dataclass
class Segment:
    time: float
    outgoing: bool  # by the proxy
    flags: int
    seq: int  # relative to the sender's SYN
    ack: int  # relative to the peer's SYN
    payload: bytes

    @property
    def end(self) -> int:
        return self.seq + len(self.payload)


@dataclass
class Request:
    id: str
    index: int  # of its first segment in the connection
    time: float
    start: int
    end: int
    ack: int  # what its first segment acknowledges: the FIN too, if the socket had taken it in


@dataclass
class Connection:
    key: tuple  # (local address, local port, peer address, peer port), local being the proxy
    opened: float
    local_isn: int
    peer_isn: int | None = None
    established: float | None = None
    segments: list = field(default_factory=list)
    requests: list = field(default_factory=list)

    def peer_close(self):
        """The peer's first FIN or RST, or None."""
        for segment in self.segments:
            if not segment.outgoing and segment.flags & (FIN | RST):
                return segment
        return None

    def idle_before_close(self):
        """Seconds from the last response byte to the peer's FIN or RST, when no request came between."""
        last = None
        for segment in self.segments:
            if segment.outgoing and segment.payload:
                last = None
            elif not segment.outgoing:
                if segment.flags & (FIN | RST):
                    return None if last is None or segment.payload else segment.time - last
                if segment.payload:
                    last = segment.time
        return None


@dataclass
class Evidence:
    """How one request met its connection's end."""

    kind: str  # answered, crossed, fin_acknowledged, reset_crossed, reset_unread, reset_bare, stale, unsent, open
    text: str
    connection: tuple | None = None
    after: float = 0.0  # seconds from the request to the FIN or RST
    rested: float = 0.0  # seconds from the last response byte to the FIN or RST
    ended: float = 0.0  # when the FIN or RST passed the tap


def _segments(data: bytes):
    """(time, source address, source port, destination address, destination port, seq, ack, flags, payload)."""
    if len(data) < 24:
        return
    order = {b"\xd4\xc3\xb2\xa1": ("<", 1e-6), b"\x4d\x3c\xb2\xa1": ("<", 1e-9),
             b"\xa1\xb2\xc3\xd4": (">", 1e-6), b"\xa1\xb2\x3c\x4d": (">", 1e-9)}.get(data[:4])
    if order is None:
        raise ValueError("not a pcap file: its magic number is " + data[:4].hex())
    endian, tick = order
    link = struct.unpack_from(endian + "I", data, 20)[0] & 0xFFFF
    if link not in LINK_HEADER:
        raise ValueError(f"link type {link} of the capture is not known here")
    offset = 24
    while offset + 16 <= len(data):
        seconds, fraction, captured, _ = struct.unpack_from(endian + "IIII", data, offset)
        offset += 16
        if not 0 < captured <= 262144:
            raise ValueError(f"the capture is corrupt at byte {offset - 16}: a packet of {captured} bytes; the lab's "
                             "directory (TMPDIR) must lie on a local file system")
        if offset + captured > len(data):
            return  # tcpdump is still writing this one
        packet = data[offset + LINK_HEADER[link]:offset + captured]
        offset += captured
        if len(packet) >= 40 and packet[0] >> 4 == 4 and packet[9] == 6:
            header, total = (packet[0] & 15) * 4, struct.unpack_from("!H", packet, 2)[0]
            source, destination = packet[12:16], packet[16:20]
            tcp = packet[header:total]
        elif len(packet) >= 60 and packet[0] >> 4 == 6 and packet[6] == 6:
            total = 40 + struct.unpack_from("!H", packet, 4)[0]
            source, destination = packet[8:24], packet[24:40]
            tcp = packet[40:total]
        else:
            continue
        if len(tcp) < 20:
            continue
        sport, dport, seq, ack, size, flags = struct.unpack_from("!HHIIBB", tcp)
        yield (seconds + fraction * tick, source, sport, destination, dport, seq, ack, flags, tcp[(size >> 4) * 4:])


def read(path: Path, port: int) -> list:
    """The connections to the server's port, in the order of their opening."""
    data = path.read_bytes() if path.exists() else b""
    done, live = [], {}
    for time, source, sport, destination, dport, seq, ack, flags, payload in _segments(data):
        if dport == port:
            outgoing, pair = True, (source, sport, destination, dport)
        elif sport == port:
            outgoing, pair = False, (destination, dport, source, sport)
        else:
            continue
        connection = live.get(pair)
        if outgoing and flags & SYN:
            if connection is None or connection.local_isn != seq:
                key = (str(ipaddress.ip_address(pair[0])), pair[1], str(ipaddress.ip_address(pair[2])), pair[3])
                connection = live[pair] = Connection(key, time, seq)
                done.append(connection)
            continue
        if connection is None:
            continue  # opened before the capture began
        if flags & SYN:
            if connection.peer_isn is None:
                connection.peer_isn, connection.established = seq, time
            continue
        own, other = ((connection.local_isn, connection.peer_isn) if outgoing
                      else (connection.peer_isn, connection.local_isn))
        segment = Segment(time, outgoing, flags,
                          (seq - (own or 0)) & 0xFFFFFFFF, (ack - (other or 0)) & 0xFFFFFFFF, payload)
        if outgoing and payload:
            match = REQUEST_ID.search(payload)
            again = any(request.start == segment.seq for request in connection.requests)
            if match and not again:
                connection.requests.append(Request(match[1].decode("latin-1"), len(connection.segments), time,
                                                   segment.seq, segment.end, segment.ack))
            elif connection.requests and not again:
                connection.requests[-1].end = max(connection.requests[-1].end, segment.end)
        connection.segments.append(segment)
    return done


def evidence(connection: Connection, request: Request) -> Evidence:
    """Judges by sequence numbers, not by the capture's order: a FIN may pass the tap before a request that was written
    without knowing of it, and wait in the socket's backlog."""
    answer = next((index for index, segment in enumerate(connection.segments)
                   if index > request.index and segment.payload and not segment.outgoing), None)
    end = next((index for index, segment in enumerate(connection.segments)
                if not segment.outgoing and segment.flags & (FIN | RST)), None)
    if answer is not None and (end is None or answer <= end):
        after = connection.segments[answer].time - request.time
        return Evidence("answered", f"response after {after * 1e3:.1f} ms", connection.key, after)
    if end is None:
        return Evidence("open", "nothing came back", connection.key)
    close = connection.segments[end]
    after = close.time - request.time
    quiet_since = max((segment.time for segment in connection.segments[:request.index]
                       if segment.payload and not segment.outgoing), default=connection.opened)
    missing, size = request.end - close.ack, request.end - request.start

    def found(kind, text):
        return Evidence(kind, text, connection.key, after, close.time - quiet_since, close.time)

    unacknowledged = f"after {after * 1e3:.1f} ms, {min(missing, size)} of {size} request bytes unacknowledged"
    acknowledged = f"after {after * 1e3:.1f} ms, request acknowledged"
    if close.flags & RST:
        if not close.flags & ACK:
            return found("reset_bare", f"bare RST after {after * 1e3:.1f} ms")
        if missing > 0:
            return found("reset_crossed", f"RST with ACK {unacknowledged}")
        return found("reset_unread", f"RST with ACK {acknowledged}")
    if request.ack > close.end:
        return found("stale", f"request sent {-after * 1e6:.0f} us after the FIN had come, and acknowledging it")
    if missing > 0:
        return found("crossed", f"FIN {unacknowledged}")
    return found("fin_acknowledged", f"FIN {acknowledged}")
