"""What the wire says: reads tcpdump's capture, taken on the proxy's side, as connections and requests.

The capture is an independent witness: it names the connection that carried a request (the request's id stands in
its header) and how that connection ended, by sequence numbers. It shares no code with finrace, so that it can
contradict both finrace and nginx's log.
"""

import bisect
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
    clock: int | None = None  # the sender's own, in milliseconds as Linux counts (RFC 7323's TSval)

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
    syns: int = 1
    last_syn: float = 0.0
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
    # `rested` by the upstream's own clock, and from the last time that it sent an answer's bytes; `rested` itself where its
    # segments carry no time.
    sender_rested: float = 0.0


def _timestamp(options: bytes) -> int | None:
    """TSval of the timestamps option (RFC 7323 3.2), None without it."""
    while options and options[0] != 0:
        if options[0] == 1:
            options = options[1:]
            continue
        if len(options) < 2 or options[1] < 2:
            return None
        if options[0] == 8 and len(options) >= 10:
            return struct.unpack_from("!I", options, 2)[0]
        options = options[options[1]:]
    return None


def _segments(data: bytes):
    """(time, source address, source port, destination address, destination port, seq, ack, flags, payload, TSval)."""
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
        begin = (size >> 4) * 4
        yield (seconds + fraction * tick, source, sport, destination, dport, seq, ack, flags, tcp[begin:], _timestamp(tcp[20:begin]))


def read(path: Path, port: int) -> list:
    """The connections to the server's port, in the order of their opening."""
    data = path.read_bytes() if path.exists() else b""
    done, live = [], {}
    for time, source, sport, destination, dport, seq, ack, flags, payload, clock in _segments(data):
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
            else:
                connection.syns += 1
            connection.last_syn = time
            continue
        if connection is None:
            continue  # opened before the capture began
        if flags & SYN:
            if connection.peer_isn is None:
                connection.peer_isn, connection.established = seq, time
            continue
        if connection.peer_isn is None and (outgoing or not flags & RST or ack != (connection.local_isn + 1) & 0xFFFFFFFF):
            continue  # of the connection that had this port before: its peer has not forgotten it yet
        own, other = ((connection.local_isn, connection.peer_isn) if outgoing
                      else (connection.peer_isn, connection.local_isn))
        segment = Segment(time, outgoing, flags,
                          (seq - (own or 0)) & 0xFFFFFFFF, (ack - (other or 0)) & 0xFFFFFFFF, payload, clock)
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
                   if index > request.index and segment.payload and not segment.outgoing
                   and segment.end > request.ack), None)  # else an answer before is retransmitted
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
    # Of an answer that was sent again, the copy may come after the request.
    sent = [segment.clock for segment in connection.segments[:end] if segment.payload and not segment.outgoing]
    rested = close.time - quiet_since
    sender_rested = ((close.clock - sent[-1]) & 0xFFFFFFFF) / 1e3 if sent and None not in (sent[-1], close.clock) else rested

    def found(kind, text):
        return Evidence(kind, text, connection.key, after, rested, close.time, sender_rested)

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


# ---- attempts: every request on a connection, and how each of them ended -------------------------------------------------
#
# `evidence` above needs no more than heads and a small answer. Here both streams are put together and read as HTTP/1: whether
# an answer was complete, and whether a request was, stands in them alone. The capture must hold whole packets.

# RFC 6928's initial window in bytes of Ethernet's segments: so much of a request may be on its way before the first
# acknowledgement.
ONE_FLIGHT = 10 * 1448
SMALLEST_FLIGHT = 4 * 1340  # RFC 6928, section 2, of 1,340 bytes a segment; what is larger may have been taken in part
# A request without an acknowledgement for so long has been retransmitted (RFC 6298's initial timeout).
SILENCE = 1.0

REQUEST_BEGINS = re.compile(rb"(GET|POST) /\S* HTTP/1\.")

CLOSED_BY_PEER = ("crossed", "crossed_partly", "stale", "fin_acknowledged", "reset_crossed", "reset_unread", "reset_bare",
                  "reset_late")
# No byte of an answer, or not all of it. `given_up`: the proxy let go first.
FAILED = CLOSED_BY_PEER + ("cut_by_reset", "cut_by_fin", "rejected", "given_up", "answer_given_up", "silent")


@dataclass
class Attempt:
    """One request on one connection. `kind` is answered, unsolicited (bytes that had come before it), open, or of FAILED."""

    id: str
    connection: Connection
    number: int  # on its connection, from 1
    time: float
    kind: str = "open"
    text: str = ""
    ended: float = 0.0  # when the deciding segment passed the tap
    acknowledged: float = 0.0  # when any of it first was; 0: never
    rested: float = 0.0  # from the last byte of the answer before (or the opening) to that segment
    idle: float = 0.0  # the same, to the request
    status: int = 0  # of the answer, where one had begun
    early: bool = False  # the answer began with a part of the request still to come
    size: int = 0  # bytes of the request that were sent
    reset: bool = False  # how the peer ended it, for the kinds that both FIN and RST make
    reset_after: bool = False  # the peer's RST came after an answer that was complete

    @property
    def failed(self):
        return self.kind in FAILED

    @property
    def fresh(self):
        """First on its connection, and right after the handshake."""
        return self.number == 1 and self.idle < 0.1

    def __str__(self):
        return (f"{self.id}: {self.kind} ({self.text}), request {self.number} on port {self.connection.key[1]} to "
                f"{self.connection.key[3]} at {self.time:.4f}, {self.size} bytes, after {self.idle * 1e3:.0f} ms of rest")


class Stream:
    """One direction's bytes, in order and once each, and which segment brought them."""

    def __init__(self, connection, outgoing):
        self.data = bytearray()
        self.ends, self.indices = [], []
        self.heads = []  # where a segment begins with a request
        waiting = {}
        for index, segment in enumerate(connection.segments):
            if segment.outgoing != outgoing or not segment.payload:
                continue
            waiting[segment.seq - 1] = max(waiting.get(segment.seq - 1, b""), segment.payload, key=len)
            while True:
                start = next((start for start, part in waiting.items()
                              if start <= len(self.data) < start + len(part)), None)
                if start is None:
                    break
                part = waiting.pop(start)[len(self.data) - start:]
                if REQUEST_BEGINS.match(part) and REQUEST_ID.search(part):
                    self.heads.append(len(self.data))
                self.data += part
                self.ends.append(len(self.data))
                self.indices.append(index)

    def index_of(self, offset):
        """The segment that brought the byte at this offset; None if it never came."""
        place = bisect.bisect_right(self.ends, offset)
        return self.indices[place] if place < len(self.ends) else None


def _head(data, start):
    """(first line, headers with small names, offset behind the head), or None while it is not whole."""
    end = data.find(b"\r\n\r\n", start)
    if end < 0:
        return None
    first, *lines = bytes(data[start:end]).split(b"\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip()
    return first, headers, end + 4


def _body_end(data, start, headers):
    """The offset behind the body; beyond the data's end if the length says so, None where it is not known (yet)."""
    if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
        while True:
            line = data.find(b"\r\n", start)
            if line < 0:
                return None
            try:
                size = int(bytes(data[start:line]).split(b";")[0], 16)
            except ValueError:
                return None
            start = line + 2 + size + 2
            if size == 0:
                return start  # trailers are not sent here
    return start + int(headers.get(b"content-length", b"0"))


def _http_requests(stream):
    """(id, method, start, end of what was sent, whether that is all of it) of each request.

    A proxy may leave a request's rest out once it is answered and go on with the next one (Traffic Server 9.2 does).
    """
    data, start = stream.data, 0
    while start < len(data):
        head = _head(data, start)
        following = next((one for one in stream.heads if one > start), len(data))
        if head is None:
            found = REQUEST_ID.search(bytes(data[start:]))
            yield found[1].decode("latin-1") if found else "", b"", start, len(data), False
            return
        first, headers, behind = head
        declared = _body_end(data, behind, headers)
        end = following if declared is None else min(declared, following)
        yield headers.get(b"x-request-id", b"").decode("latin-1"), first.split(b" ")[0], start, end, end == declared
        start = end


def _http_answer(data, start, method):
    """(status, offset behind it): 0 where it has not begun, None where it has no end yet, -1 where only a close ends it."""
    while True:
        head = _head(data, start)
        if head is None:
            return 0, None
        first, headers, behind = head
        parts = first.split(b" ")
        status = int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0
        if 100 <= status < 200:
            start = behind
            continue
        if method == b"HEAD" or status in (204, 304):
            return status, behind
        if b"content-length" not in headers and b"chunked" not in headers.get(b"transfer-encoding", b"").lower():
            return status, -1
        end = _body_end(data, behind, headers)
        return status, end if end is not None and end <= len(data) else None


def attempts(connection: Connection) -> list:
    """Every request on this connection with its end."""
    out, back = Stream(connection, True), Stream(connection, False)
    found, position = [], 0
    for number, (name, method, start, end, whole) in enumerate(_http_requests(out), 1):
        first = out.index_of(start)
        if first is None:
            break
        attempt = Attempt(name, connection, number, connection.segments[first].time)
        status, behind = _http_answer(back.data, position, method)
        _judge(connection, attempt, first, start, end, whole, out, back, position, status, behind)
        found.append(attempt)
        if behind is None or behind < 0:
            break
        position = behind
    return found


RIGHT_BEHIND = 0.001  # seconds, between segments of one burst


def behind_uploads(found: list) -> list:
    """Of one connection's attempts those that left right behind the rest of an upload whose answer had come before its end (413),
    as Traffic Server's do: in one segment with it, perhaps, before the device cut that into those on the wire."""
    def right_behind(attempt):
        return sum(bool(one.outgoing and one.payload) and 0 <= attempt.time - one.time <= RIGHT_BEHIND
                   for one in attempt.connection.segments) > 1  # its own is one of them

    return [attempt for before, attempt in zip(found, found[1:]) if before.early and right_behind(attempt)]


def _judge(connection, attempt, first, start, sent, whole, out, back, position, status, behind):
    segments = connection.segments

    def index(wanted):
        return next((number for number, segment in enumerate(segments) if wanted(segment)), None)

    def before(one, other):
        return one is not None and (other is None or one < other)

    attempt.size = sent - start
    local = index(lambda segment: segment.outgoing and segment.flags & (FIN | RST))
    peer = index(lambda segment: not segment.outgoing and segment.flags & (FIN | RST))
    begun = back.index_of(position)
    last = index(lambda segment: not segment.outgoing and segment.flags & FIN) if behind == -1 else (
        back.index_of(behind - 1) if behind is not None else None)
    quiet = max((segment.time for segment in segments[:first] if segment.payload), default=connection.established or
                connection.opened)
    attempt.idle = attempt.time - quiet
    acknowledging = [segment for segment in segments[first:] if not segment.outgoing and segment.flags & ACK and not
                     segment.flags & RST and segment.ack - 1 > start]
    attempt.acknowledged = acknowledging[0].time if acknowledging else 0.0

    def ends(kind, number, text):
        close = segments[number] if number is not None else segments[-1]
        attempt.kind, attempt.ended = kind, close.time
        attempt.rested = close.time - quiet
        attempt.text = f"{text} after {(close.time - attempt.time) * 1e3:.1f} ms"

    if begun is not None and begun < first:
        return ends("unsolicited", begun, "bytes that had come before the request")
    if before(begun, local):
        attempt.status = status
        attempt.early = not whole or segments[begun].ack - 1 < sent or out.index_of(sent - 1) > begun
        if last is not None and (local is None or last <= local):
            attempt.reset_after = peer is not None and bool(segments[peer].flags & RST)
            return ends("answered", last, f"{status}")
        if before(local, peer):
            return ends("answer_given_up", local, f"{status} had begun, the proxy let go")
        if peer is None:
            return ends("open", None, f"{status} has begun")
        attempt.reset = bool(segments[peer].flags & RST)
        if not whole or attempt.early:
            return ends("rejected", peer, f"{status} had begun, before the request's end; {_name(segments[peer])}")
        return ends("cut_by_reset" if attempt.reset else "cut_by_fin", peer, f"{status} had begun; {_name(segments[peer])}")
    decided = local if before(local, peer) else peer
    silence = (segments[decided].time if decided is not None else segments[-1].time) - attempt.time
    if not acknowledging and silence >= SILENCE and not (peer is not None and peer < first):
        return ends("silent", decided, "nothing of it was acknowledged;"
                    f" {_name(segments[decided]) if decided is not None else 'no end'}")
    if before(local, peer):
        return ends("given_up", local, f"the proxy let go{'' if acknowledging else ', nothing acknowledged'}")
    if peer is None:
        return ends("open", None, "nothing came back")
    close = segments[peer]
    attempt.reset = bool(close.flags & RST)
    on_way = max((segment.end - 1 for segment in segments[:max(peer, first + 1)] if segment.outgoing and segment.payload),
                 default=sent)
    on_way = max(min(on_way, sent), start + 1)
    taken = close.ack - 1
    if attempt.reset and not close.flags & ACK:
        return ends("reset_late" if acknowledging else "reset_bare", peer, "a bare RST")
    if not attempt.reset and segments[first].ack > close.end:
        return ends("stale", peer, "sent after the FIN had come, and acknowledging it; the FIN")
    text = f"{_name(close)} with {max(0, on_way - taken)} of {on_way - start} bytes unacknowledged"
    if taken <= start:
        return ends("reset_crossed" if attempt.reset else "crossed", peer, text)
    if taken < on_way or not whole:
        return ends("rejected" if attempt.size > ONE_FLIGHT or not whole else "crossed_partly", peer, text)
    return ends("reset_unread" if attempt.reset else "fin_acknowledged", peer, text)


def _name(segment):
    if segment.flags & RST:
        return "RST with ACK" if segment.flags & ACK else "bare RST"
    return "FIN"


def opening(connection: Connection) -> str:
    """established, refused, or unanswered."""
    if connection.established is not None:
        return "established"
    return "refused" if any(not segment.outgoing and segment.flags & RST for segment in connection.segments) else "unanswered"
