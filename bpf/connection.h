/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The accounting of one connection: what a send, a FIN, an RST or a close does to it. The only place
 * that says what a segment means. Plain C without helpers, compiled into the kernel programs and into
 * userspace (tests, captures): whoever calls it says what can be seen of the socket, and when.
 *
 * The idea: whether a send begins a new exchange, and how much of the answer has come, both follow from
 * the count of received bytes at the last send. So a healthy request costs one look at its send and
 * nothing at all on receive.
 */
#ifndef FINRACE_CONNECTION_H
#define FINRACE_CONNECTION_H

#include "event.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FINRACE_NS_PER_MS 1000000ULL

/* RFC 6928's initial window of the smallest segments (RFC 9293 3.7.1): no upload has to pause before that. */
#define SHORTEST_FLIGHT_BYTES (10 * 536)

/* A BPF program has five arguments a call and no other frame to spare: everything here becomes part of its caller. */
#define FINRACE_INLINE static inline __attribute__((always_inline))

/* TCP header flags, RFC 9293 3.1, as they stand in the header's 14th byte. */
enum tcp_header_flag {
	TCP_FLAG_BIT_FIN = 1 << 0,
	TCP_FLAG_BIT_SYN = 1 << 1,
	TCP_FLAG_BIT_RST = 1 << 2,
	TCP_FLAG_BIT_PSH = 1 << 3,
	TCP_FLAG_BIT_ACK = 1 << 4,
};

/* What a source sees of a socket at one moment. FINs count in none of these numbers. */
struct socket_view {
	__u64 now_ns;          /* CLOCK_MONOTONIC */
	__u64 last_receive_ns; /* when payload last came in; 0 if the accounting has been told of it already */
	__u64 bytes_received;  /* payload received in order */
	__u32 send_next;       /* sequence number after the last byte written (or, at least, sent) */
	__u32 acknowledged;    /* sequence number up to which the peer has acknowledged */
	__u32 retransmits;     /* segments retransmitted over the connection's life */
	__u32 segment_bytes;   /* payload of the segment that is being processed, where that is what it is about */
};

/* The header of an RST, and what the receiver expected. */
struct reset_segment {
	__u32 seq;
	__u32 ack;
	__u32 receive_next; /* the receiver's rcv_nxt before the RST */
	__u8 flags;         /* enum tcp_header_flag */
	__u8 seen;          /* 0: the header could not be seen, all else is void */
};

/* Bytes from sequence number `from` up to `to`, 0 if `to` is not after `from`; RFC 9293 3.4 arithmetic. */
FINRACE_INLINE __u32 sequence_distance(__u32 from, __u32 to)
{
	__s32 distance = (__s32)(to - from);

	return distance > 0 ? (__u32)distance : 0;
}

FINRACE_INLINE __u32 saturating_ms(__u64 from_ns, __u64 to_ns)
{
	__u64 ms;

	if (to_ns <= from_ns)
		return 0;
	ms = (to_ns - from_ns) / FINRACE_NS_PER_MS;
	return ms > 0xffffffffULL ? 0xffffffffU : (__u32)ms;
}

FINRACE_INLINE void connection_note_lost_event(struct connection *c, __u8 kind)
{
	if (c->lost_events < 255)
		c->lost_events++;
	c->lost_kinds = (__u16)(c->lost_kinds | 1 << kind);
}

/* Payload of the response to the current exchange. */
FINRACE_INLINE __u64 connection_response_bytes(const struct connection *c, __u64 bytes_received)
{
	return bytes_received > c->received_before ? bytes_received - c->received_before : 0;
}

/* A request is under way and nothing of its answer has come. */
FINRACE_INLINE int connection_awaits_response(const struct connection *c, __u64 bytes_received)
{
	return c->exchange > 0 && connection_response_bytes(c, bytes_received) == 0;
}

/*
 * Bytes of the current exchange's request written so far, modulo 4 GiB: an upload may pass the 2 GiB that can be told
 * from "before". A source that can't know whether this host's FIN is queued may be one short: that is none.
 */
FINRACE_INLINE __u32 connection_request_bytes(const struct connection *c, __u32 send_next)
{
	__u32 written = send_next - c->request_seq;

	return c->exchange && written != 0xffffffffU ? written : 0;
}

/* Of these, the bytes that the peer has not acknowledged. */
FINRACE_INLINE __u32 connection_unacked_bytes(const struct connection *c, __u32 send_next, __u32 acknowledged)
{
	__u32 unacked = sequence_distance(acknowledged, send_next);
	__u32 request = connection_request_bytes(c, send_next);

	return unacked < request ? unacked : request;
}

/* The peer has acknowledged nothing of the current exchange's request, but all before it. */
FINRACE_INLINE int connection_all_unacked(const struct connection *c, __u32 send_next, __u32 acknowledged)
{
	__u32 request = connection_request_bytes(c, send_next);

	return request && !(c->flags & CONNECTION_ADOPTED_IN_EXCHANGE) &&
	       sequence_distance(acknowledged, send_next) == request;
}

FINRACE_INLINE __u64 connection_last_byte_ns(const struct connection *c, __u64 last_receive_ns)
{
	return last_receive_ns > c->last_byte_ns ? last_receive_ns : c->last_byte_ns;
}

/* A connection whose first SYN is being sent, or that has just been accepted. */
FINRACE_INLINE void connection_start(struct connection *c, __u64 id, __u64 now_ns, __u32 flags, __u8 state)
{
	c->id = id;
	c->opened_ns = now_ns;
	c->last_byte_ns = now_ns;
	c->flags = flags;
	c->state = state;
}

/* The handshake is complete. Idle time before a first request counts from here. */
FINRACE_INLINE void connection_established(struct connection *c, __u64 now_ns)
{
	c->opened_ns = now_ns;
	c->last_byte_ns = now_ns;
}

/*
 * A connection older than the tracer. last_send_ns: when payload was last sent, 0 if unknown. A request that
 * seems to be under way is taken as an exchange whose first byte was not seen.
 */
FINRACE_INLINE void connection_adopt(struct connection *c, __u64 id, const struct socket_view *view, __u64 last_send_ns,
				     __u32 flags, __u8 state)
{
	connection_start(c, id, 0, flags | CONNECTION_ADOPTED, state);
	/* CLOSING as well: the peer's FIN came while this host's own was under way. */
	if (state == TCP_STATE_FIN_WAIT1 || state == TCP_STATE_FIN_WAIT2 || state == TCP_STATE_CLOSING)
		c->flags |= CONNECTION_LOCAL_FIRST;
	if (view->bytes_received)
		c->flags |= CONNECTION_CARRIED;
	c->received_before = view->bytes_received;
	c->last_byte_ns = view->last_receive_ns > last_send_ns ? view->last_receive_ns : last_send_ns;
	if (!c->last_byte_ns)
		c->last_byte_ns = view->now_ns;
	if (state == TCP_STATE_SYN_SENT) /* what is not acknowledged there is the SYN */
		return;
	/* What came in after the last send is (the beginning of) its answer, whatever is not acknowledged yet. */
	if (last_send_ns > view->last_receive_ns ||
	    (last_send_ns == view->last_receive_ns && sequence_distance(view->acknowledged, view->send_next))) {
		c->flags |= CONNECTION_ADOPTED_IN_EXCHANGE;
		c->exchange = 1;
		c->request_ns = last_send_ns ? last_send_ns : view->now_ns;
		c->request_seq = view->acknowledged;
	}
}

FINRACE_INLINE __u32 connection_protocol(const struct connection *c)
{
	return (c->flags & CONNECTION_PROTOCOL) >> CONNECTION_PROTOCOL_SHIFT;
}

/* Whether a send now begins a new exchange: it is the first, or it follows received bytes. */
FINRACE_INLINE int connection_begins_exchange(const struct connection *c, __u64 bytes_received)
{
	return c->exchange == 0 || bytes_received != c->received_before;
}

/* The first write of a new exchange. `view->send_next` is the sequence number of its first byte. */
FINRACE_INLINE void connection_begin_exchange(struct connection *c, const struct socket_view *view)
{
	__u32 idle_ms = saturating_ms(connection_last_byte_ns(c, view->last_receive_ns), view->now_ns);

	c->exchange++;
	c->request_ns = view->now_ns;
	c->request_seq = view->send_next;
	c->received_before = view->bytes_received;
	c->last_byte_ns = view->now_ns;
	c->idle_ms = idle_ms;
	if (idle_ms > c->longest_idle_ms)
		c->longest_idle_ms = idle_ms;
	c->flags &= ~CONNECTION_ADOPTED_IN_EXCHANGE;
	if (c->flags & CONNECTION_PEER_FIN)
		c->flags |= CONNECTION_SENT_AFTER_FIN;
}

/*
 * Whether what is sent after the peer's FIN becomes a request by `bytes` more, written at sequence number `seq`:
 * HTTP/1, or more than a TLS farewell. True once for each request.
 */
FINRACE_INLINE int connection_requests_after_fin(const struct connection *c, __u32 seq, __u64 bytes)
{
	__u32 no_request = connection_protocol(c) == PROTOCOL_HTTP1 ? 0 : FINRACE_TLS_FAREWELL_BYTES;
	__u32 before = seq - c->request_seq;

	return c->flags & CONNECTION_SENT_AFTER_FIN && before <= no_request && before + bytes > no_request;
}

/*
 * The send of a healthy connection in use: tells the accounting in a few loads and stores. Returns 0, and does nothing,
 * for all else: a first request, one after a FIN, one after rest, or what may be the rest of a large request that was
 * answered before its end (413 and kin). `ticks` is how long ago payload last came in, as
 * exact as the kernel keeps that time; one is no rest. `now_ns` may be as old as that.
 */
FINRACE_INLINE int connection_plain_send(struct connection *c, __u64 now_ns, __u64 ticks, __u64 bytes_received,
					 __u32 send_next)
{
	__u32 exchange = c->exchange;

	if (!exchange || ticks > 1 ||
	    c->flags & (CONNECTION_PEER_FIN | CONNECTION_ADOPTED_IN_EXCHANGE | CONNECTION_HANDSHAKE))
		return 0;
	if (bytes_received != c->received_before && send_next - c->request_seq >= SHORTEST_FLIGHT_BYTES)
		return 0;
	c->last_byte_ns = now_ns;
	if (bytes_received == c->received_before)
		return 1;
	c->exchange = exchange + 1;
	c->request_ns = now_ns;
	c->request_seq = send_next;
	c->received_before = bytes_received;
	c->idle_ms = 0;
	return 1;
}

/*
 * A plain send took the time of the last receipt for its own. While nothing has come since and neither side has closed,
 * the socket's last segment is the request's: `departed_ns` is when that left, `most_ns` how far off the former may be.
 */
FINRACE_INLINE void connection_refine_request_time(struct connection *c, const struct socket_view *view,
						   __u64 departed_ns, __u64 most_ns)
{
	if (c->exchange < 2 || c->idle_ms || !connection_awaits_response(c, view->bytes_received))
		return;
	if (departed_ns <= c->request_ns || departed_ns - c->request_ns >= most_ns || departed_ns > view->now_ns)
		return;
	if ((c->flags & CONNECTION_PEER_FIN && departed_ns > c->peer_fin_ns) ||
	    (c->flags & CONNECTION_PEER_RESET && departed_ns > c->peer_reset_ns) ||
	    (c->local_close_ns && departed_ns > c->local_close_ns))
		return;
	c->request_ns = departed_ns;
}

/* More of the request. */
FINRACE_INLINE void connection_continue(struct connection *c, __u64 now_ns)
{
	c->last_byte_ns = now_ns;
}

/* A TLS record's type and version: RFC 8446 5.1. */
FINRACE_INLINE int is_tls_record(__u32 first)
{
	__u8 type = (__u8)(first >> 24);

	return type >= 20 && type <= 24 && (first >> 16 & 0xff) == 3 && (first >> 8 & 0xff) <= 4;
}

#define TLS_ALERT 21
#define TLS_HANDSHAKE 22
#define TLS_APPLICATION_DATA 23

#define FINRACE_FOUR(a, b, c, d) ((__u32)(a) << 24 | (__u32)(b) << 16 | (__u32)(c) << 8 | (__u32)(d))

/* The protocol of which these are the first four bytes, the first of them in the highest place. */
FINRACE_INLINE __u32 protocol_of(__u32 first)
{
	if (is_tls_record(first))
		return PROTOCOL_TLS;
	switch (first) {
	case FINRACE_FOUR('P', 'R', 'I', ' '): /* RFC 9113 3.4 */
		return PROTOCOL_HTTP2;
	case FINRACE_FOUR('G', 'E', 'T', ' '): /* RFC 9110 9, RFC 5789, RFC 4918 9 */
	case FINRACE_FOUR('H', 'E', 'A', 'D'):
	case FINRACE_FOUR('P', 'O', 'S', 'T'):
	case FINRACE_FOUR('P', 'U', 'T', ' '):
	case FINRACE_FOUR('D', 'E', 'L', 'E'):
	case FINRACE_FOUR('C', 'O', 'N', 'N'):
	case FINRACE_FOUR('O', 'P', 'T', 'I'):
	case FINRACE_FOUR('T', 'R', 'A', 'C'):
	case FINRACE_FOUR('P', 'A', 'T', 'C'):
	case FINRACE_FOUR('P', 'R', 'O', 'P'):
	case FINRACE_FOUR('M', 'K', 'C', 'O'):
	case FINRACE_FOUR('C', 'O', 'P', 'Y'):
	case FINRACE_FOUR('M', 'O', 'V', 'E'):
	case FINRACE_FOUR('L', 'O', 'C', 'K'):
	case FINRACE_FOUR('U', 'N', 'L', 'O'):
	case FINRACE_FOUR('R', 'E', 'P', 'O'):
	case FINRACE_FOUR('S', 'E', 'A', 'R'):
		return PROTOCOL_HTTP1;
	default:
		return PROTOCOL_UNKNOWN;
	}
}

/*
 * Whether what follows the beginning of an answer is more of its request: of HTTP/1, one that may have had to wait for
 * an acknowledgement, and no method of a new one. What could not be read is a file, then, not a head. After the peer's
 * FIN a small one's as well: its body, after an answer that did not wait for that.
 */
FINRACE_INLINE int connection_continues_request(const struct connection *c, __u32 send_next, __u32 first)
{
	return c->exchange && connection_protocol(c) == PROTOCOL_HTTP1 && protocol_of(first) != PROTOCOL_HTTP1 &&
	       (send_next - c->request_seq >= SHORTEST_FLIGHT_BYTES || (first && c->flags & CONNECTION_PEER_FIN));
}

/*
 * Learns the protocol from a connection's first bytes. One that began as HTTP/1 and goes on with other words has been
 * upgraded (RFC 9110 7.8).
 */
FINRACE_INLINE void connection_recognise(struct connection *c, __u32 first)
{
	__u32 known = connection_protocol(c);

	if (!first || (known != PROTOCOL_HTTP1 &&
		       (known != PROTOCOL_UNKNOWN || (c->exchange && !(c->flags & CONNECTION_ADOPTED)))))
		return;
	c->flags = (c->flags & ~CONNECTION_PROTOCOL) | protocol_of(first) << CONNECTION_PROTOCOL_SHIFT;
}

/* Whether a send that is no plain one may begin something, so that its first bytes matter. */
FINRACE_INLINE int connection_asks_what(const struct connection *c, __u64 bytes_received)
{
	return c->flags & CONNECTION_HANDSHAKE || connection_begins_exchange(c, bytes_received);
}

/*
 * Payload came in at `tick` (jiffies): for a source whose kernel does not tell afterwards. Returns 0 if the peer's FIN
 * was processed meanwhile, on another CPU, so that its time has to be noted again.
 */
FINRACE_INLINE int connection_note_receipt(struct connection *c, __u64 tick)
{
	volatile __u32 *flags = &c->flags;

	if (*flags & CONNECTION_PEER_FIN)
		return 1;
	c->received_tick = tick;
	return !(*flags & CONNECTION_PEER_FIN);
}

/*
 * Bytes older than the current request are not acknowledged either: an answer came before its request's end (413 and
 * kin), so what looked like a new request was the rest of the old one.
 */
FINRACE_INLINE void connection_note_earlier_unacked(struct connection *c, __u32 send_next, __u32 acknowledged)
{
	if (c->exchange && sequence_distance(acknowledged, send_next) > connection_request_bytes(c, send_next))
		c->flags |= CONNECTION_EARLIER_UNACKED;
}

/* The peer's FIN, once the kernel has applied its acknowledgement number (tcp_ack runs before tcp_fin). */
FINRACE_INLINE void connection_peer_fin(struct connection *c, const struct socket_view *view)
{
	if (c->flags & CONNECTION_PEER_FIN)
		return;
	c->flags |= CONNECTION_PEER_FIN;
	c->peer_fin_ns = view->now_ns;
	c->fin_unacked = connection_unacked_bytes(c, view->send_next, view->acknowledged);
	connection_note_earlier_unacked(c, view->send_next, view->acknowledged);
	c->last_byte_ns = connection_last_byte_ns(c, view->last_receive_ns);
	c->fin_idle_ms = saturating_ms(c->last_byte_ns, view->now_ns);
}

/* The peer's FIN came while nobody looked: what it acknowledged is not known any more. */
FINRACE_INLINE void connection_missed_fin(struct connection *c)
{
	c->flags |= CONNECTION_PEER_FIN;
	c->peer_fin_ns = 0;
	connection_note_lost_event(c, EVENT_PEER_FIN);
}

/*
 * Whether a socket in `state` takes an RST for valid: RFC 5961 3.2 as tcp_validate_incoming() has it, at rcv_nxt, or
 * (tcp_reset_check()) at the FIN's own number after a FIN; in SYN_SENT one that acknowledges the SYN
 * (tcp_rcv_synsent_state_process()).
 */
FINRACE_INLINE int connection_accepts_reset(const struct connection *c, const struct socket_view *view,
					    const struct reset_segment *reset, __u8 state)
{
	if (state == TCP_STATE_SYN_SENT)
		return reset->flags & TCP_FLAG_BIT_ACK && sequence_distance(view->acknowledged, reset->ack) &&
		       !sequence_distance(view->send_next, reset->ack);
	return reset->seq == reset->receive_next ||
	       (c->flags & CONNECTION_PEER_FIN && reset->seq == reset->receive_next - 1);
}

/* Whether an RST that waits already comes before one that has arrived: it is valid now, or the same but earlier. */
FINRACE_INLINE int connection_keeps_reset(__u32 waiting_seq, const struct reset_segment *arrived)
{
	return waiting_seq == arrived->receive_next || waiting_seq == arrived->seq;
}

/*
 * An RST that a source meets before its socket does: while a process holds the socket, it waits on the backlog, behind
 * data perhaps. A socket sends one with ACK as it closes, and what answers for it afterwards sends bare ones, each at
 * the number that it was told: which of them ends this side's socket shows only then.
 */
FINRACE_INLINE void connection_note_reset(struct connection *c, const struct reset_segment *arrived)
{
	if (c->flags & CONNECTION_PEER_RESET)
		return;
	if (arrived->flags & TCP_FLAG_BIT_ACK) {
		if (c->flags & CONNECTION_RESET_WITH_ACK_WAITS && connection_keeps_reset(c->waiting.seq, arrived))
			return;
		c->waiting.seq = arrived->seq;
		c->waiting.ack = arrived->ack;
		c->flags |= CONNECTION_RESET_WITH_ACK_WAITS;
	} else {
		if (c->flags & CONNECTION_BARE_RESET_WAITS && connection_keeps_reset(c->waiting_bare_reset, arrived))
			return;
		c->waiting_bare_reset = arrived->seq;
		c->flags |= CONNECTION_BARE_RESET_WAITS;
	}
}

/* What this host has sent since says that those which wait never came to its socket. */
FINRACE_INLINE void connection_forget_resets(struct connection *c)
{
	c->flags &= ~(CONNECTION_RESET_WITH_ACK_WAITS | CONNECTION_BARE_RESET_WAITS);
}

/*
 * A socket in `state` has come to CLOSE: finds the RST that did it among those that wait. Returns 0 if none did.
 * `receive_next` is the socket's rcv_nxt, which an RST leaves as it was.
 */
FINRACE_INLINE int connection_find_reset(const struct connection *c, const struct socket_view *view, __u8 state,
					 __u32 receive_next, struct reset_segment *reset)
{
	__u32 ahead;

	reset->receive_next = receive_next;
	reset->seen = 1;
	if (c->flags & CONNECTION_RESET_WITH_ACK_WAITS) {
		reset->seq = c->waiting.seq;
		reset->ack = c->waiting.ack;
		reset->flags = TCP_FLAG_BIT_RST | TCP_FLAG_BIT_ACK;
		if (connection_accepts_reset(c, view, reset, state))
			return 1;
	}
	ahead = c->flags & CONNECTION_RESET_WITH_ACK_WAITS && sequence_distance(receive_next, c->waiting.seq);
	if (c->flags & CONNECTION_BARE_RESET_WAITS) {
		reset->seq = c->waiting_bare_reset;
		reset->ack = 0;
		reset->flags = TCP_FLAG_BIT_RST;
		if (connection_accepts_reset(c, view, reset, state))
			return 1;
	}
	/* One that follows a hole is valid where the last selective acknowledgement ended: but for that, it ends
	 * nothing. */
	if (!ahead || state != TCP_STATE_ESTABLISHED || c->flags & CONNECTION_SOCKET_CLOSED)
		return 0;
	reset->seq = c->waiting.seq;
	reset->ack = c->waiting.ack;
	reset->flags = TCP_FLAG_BIT_RST | TCP_FLAG_BIT_ACK;
	return 1;
}

/*
 * A valid RST of the peer. Its ACK never reaches snd_una (tcp_reset runs before tcp_ack), so what it
 * acknowledges is read from the segment. Its sequence number is what our segment acknowledged: the FIN's
 * own if that was sent before the FIN had come, one above it if after.
 */
FINRACE_INLINE void connection_peer_reset(struct connection *c, const struct socket_view *view,
					  const struct reset_segment *reset)
{
	__u32 acknowledged = view->acknowledged;

	if (c->flags & CONNECTION_PEER_RESET)
		return;
	c->flags |= CONNECTION_PEER_RESET;
	c->peer_reset_ns = view->now_ns;
	c->reset_unacked = 0;
	if (!(c->flags & CONNECTION_PEER_FIN))
		c->fin_idle_ms = saturating_ms(connection_last_byte_ns(c, view->last_receive_ns), view->now_ns);
	if (!reset->seen) {
		c->flags |= CONNECTION_RESET_FLAGS_UNKNOWN;
		return;
	}
	if (reset->flags & TCP_FLAG_BIT_ACK) {
		if (sequence_distance(acknowledged, reset->ack))
			acknowledged = reset->ack;
		c->flags |= CONNECTION_RESET_HAS_ACK;
		c->reset_unacked = connection_unacked_bytes(c, view->send_next, acknowledged);
	}
	connection_note_earlier_unacked(c, view->send_next, acknowledged);
	if (c->flags & CONNECTION_PEER_FIN) {
		if (reset->seq == reset->receive_next - 1)
			c->flags |= CONNECTION_RESET_AT_FIN;
		else if (reset->seq == reset->receive_next)
			c->flags |= CONNECTION_RESET_BEYOND_FIN;
	}
}

/*
 * This host closes its direction: how is CONNECTION_LOCAL_FIN or CONNECTION_LOCAL_RESET. `view` does not count the FIN.
 * Its kernel goes on to send what waits, so what the peer had of the request by now is kept.
 */
FINRACE_INLINE void connection_local_close(struct connection *c, const struct socket_view *view, __u32 how)
{
	if (!(c->flags & (CONNECTION_LOCAL_FIN | CONNECTION_LOCAL_RESET))) {
		c->local_close_ns = view->now_ns;
		if (!(c->flags & (CONNECTION_PEER_FIN | CONNECTION_PEER_RESET)))
			c->flags |= CONNECTION_LOCAL_FIRST;
		/* A window of zero, whose probes are no retransmissions, is no silence. */
		if (view->retransmits && connection_all_unacked(c, view->send_next, view->acknowledged))
			c->flags |= c->flags & CONNECTION_SOCKET_CLOSED || how == CONNECTION_LOCAL_RESET ?
					    CONNECTION_CLOSED_UNACKED :
					    CONNECTION_SHUTDOWN_UNACKED;
	}
	c->flags |= how;
}

/*
 * A send that is no plain one: the first of a new exchange, or more of it. `first`: its first four bytes, the first of
 * them in the highest place, 0 if they could not be read; `bytes`: its size. What belongs to TLS's handshake is all one
 * exchange with the first request. An alert there is this host's end of it; TLS 1.3 hides it in a record of application
 * data that is too short for a request.
 */
FINRACE_INLINE void connection_notable_send(struct connection *c, const struct socket_view *view, __u32 first,
					    __u64 bytes)
{
	int begins = connection_begins_exchange(c, view->bytes_received);
	__u8 type = (__u8)(first >> 24);

	if (!connection_asks_what(c, view->bytes_received) || connection_continues_request(c, view->send_next, first)) {
		connection_continue(c, view->now_ns);
		return;
	}
	connection_recognise(c, first);
	if (c->flags & CONNECTION_HANDSHAKE) {
		if (is_tls_record(first) &&
		    (type == TLS_ALERT || (type == TLS_APPLICATION_DATA && bytes <= FINRACE_TLS_FAREWELL_BYTES))) {
			connection_local_close(c, view, 0);
			connection_continue(c, view->now_ns);
			return;
		}
		/* A segment, unlike a write, may begin within a record. */
		if (is_tls_record(first) ? type == TLS_APPLICATION_DATA : begins) {
			c->flags &= ~CONNECTION_HANDSHAKE;
		} else if (!begins) {
			connection_continue(c, view->now_ns);
			return;
		}
		c->exchange = 0;
	} else if (!c->exchange && !(c->flags & CONNECTION_ADOPTED) && is_tls_record(first) && type == TLS_HANDSHAKE) {
		c->flags |= CONNECTION_HANDSHAKE;
	}
	connection_begin_exchange(c, view);
}

/*
 * Whether an event may be the end of a failed exchange, so that somebody should look at it now. Everything
 * else may wait for the next look at the ring: a healthy connection wakes nobody.
 */
FINRACE_INLINE int connection_is_urgent(const struct connection *c, __u8 kind, __u64 bytes_received)
{
	switch (kind) {
	case EVENT_OPEN_FAILED:
		return 1;
	case EVENT_PEER_FIN:
		return (c->flags & CONNECTION_CLIENT) &&
		       (connection_awaits_response(c, bytes_received) || c->flags & CONNECTION_HANDSHAKE);
	case EVENT_PEER_RESET:
	case EVENT_SENT_AFTER_FIN: /* on an accepted connection that is an answer to a client that half-closed */
		return (c->flags & CONNECTION_CLIENT) != 0;
	default:
		return (c->flags & CONNECTION_CLIENT) && c->lost_events;
	}
}

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* FINRACE_CONNECTION_H */
