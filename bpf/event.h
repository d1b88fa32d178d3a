/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * THE contract: what a connection's accounting holds, the one lifecycle event that carries it, and the
 * loss counters. Compiled into the kernel programs (C) and into userspace (C++) alike, so every offset
 * is asserted in both.
 *
 * An event carries the whole accounting of its connection. A lost event therefore loses a moment, never
 * the evidence: the next event of the same connection brings all of it, and says what was lost before.
 */
#ifndef FINRACE_EVENT_H
#define FINRACE_EVENT_H

#include <linux/types.h>

#ifdef __cplusplus
#define FINRACE_STATIC_ASSERT(condition) static_assert(condition, #condition)
extern "C" {
#else
#define FINRACE_STATIC_ASSERT(condition) _Static_assert(condition, #condition)
#endif

/* Raised whenever the meaning or the place of a field changes. */
#define FINRACE_EVENT_VERSION 6

/*
 * The longest close_notify alert of TLS in use: 31 bytes by TLS 1.2 with AES-GCM (RFC 5246 6.2, RFC 5288 3), 24 by
 * TLS 1.3 (RFC 8446 5.2). Where TLS is not ruled out, no request is as short.
 */
#define FINRACE_TLS_FAREWELL_BYTES 31

/* RFC 6928's initial window in full-size segments: what a sender may have under way before any acknowledgement. */
#define FINRACE_ONE_FLIGHT_BYTES (10 * 1460)

/* The longest that a proxy sets an upstream aside by default, and a second (Apache httpd's retry: 60 s). */
#define FINRACE_ASIDE_MOST_NS 61000000000ULL

#define FINRACE_COMM_LEN 16 /* TASK_COMM_LEN, include/linux/sched.h */

/* RFC 9293 states as the kernel numbers them, include/net/tcp_states.h; part of its ABI through INET_DIAG. */
enum tcp_connection_state {
	TCP_STATE_ESTABLISHED = 1,
	TCP_STATE_SYN_SENT = 2,
	TCP_STATE_SYN_RECV = 3,
	TCP_STATE_FIN_WAIT1 = 4,
	TCP_STATE_FIN_WAIT2 = 5,
	TCP_STATE_TIME_WAIT = 6,
	TCP_STATE_CLOSE = 7,
	TCP_STATE_CLOSE_WAIT = 8,
	TCP_STATE_LAST_ACK = 9,
	TCP_STATE_LISTEN = 10,
	TCP_STATE_CLOSING = 11,
	TCP_STATE_NEW_SYN_RECV = 12,
};

/* What has happened to a connection. Stored as __u8. */
enum event_kind {
	EVENT_OPENED = 1,          /* the handshake is complete */
	EVENT_OPEN_FAILED,         /* SYN_SENT ended in CLOSE */
	EVENT_PEER_FIN,            /* the peer's FIN was processed, its acknowledgement number already applied */
	EVENT_PEER_RESET,          /* a valid RST of the peer was processed */
	EVENT_LOCAL_FIN,           /* this host closed its direction: close() or shutdown() */
	EVENT_LOCAL_RESET,         /* this host sent an RST of its own accord */
	EVENT_SENT_AFTER_FIN,      /* a request was written after the peer's FIN had been processed */
	EVENT_SEGMENT_AFTER_CLOSE, /* data came in after this host had closed its direction */
	EVENT_STATE,               /* any other change of state; only where all connections are asked for */
	EVENT_CLOSED,              /* the socket is in CLOSE: nothing follows */
	/* Of a process that has lost an exchange, for a second: what it does next. */
	EVENT_RELEASED,        /* it let go of the socket of the exchange that failed; may follow EVENT_CLOSED */
	EVENT_TRIED,           /* in the same turn it began a request, or a connection for one, and then its request */
	EVENT_CLIENT_ANSWERED, /* it began to answer a client that had waited: a socket that this host accepted */
	EVENT_CLIENT_RELEASED, /* it let go of a client's socket */
	/* Of a listening socket, so many a second at most: `peer` is the latest that was turned away. */
	EVENT_ACCEPT_OVERFLOW, /* its accept queue was full: a SYN, or the last ACK of a handshake, was dropped */
	EVENT_KINDS
};

/* connection.flags */
enum connection_flag {
	CONNECTION_CLIENT = 1 << 0,  /* this host opened it; else it accepted it */
	CONNECTION_ADOPTED = 1 << 1, /* older than the tracer */
	CONNECTION_CARRIED = 1 << 2, /* had received bytes before it was adopted: the next request reuses it */
	CONNECTION_ADOPTED_IN_EXCHANGE = 1 << 3, /* a request was under way when adopted: its start is not known */
	CONNECTION_PEER_FIN = 1 << 4,            /* peer_fin_ns and fin_* hold */
	CONNECTION_PEER_RESET = 1 << 5,          /* peer_reset_ns and reset_* hold */
	CONNECTION_RESET_HAS_ACK = 1 << 6,       /* the RST carried an ACK: its sender's socket still existed */
	CONNECTION_RESET_FLAGS_UNKNOWN = 1 << 7, /* the RST's own header could not be seen */
	CONNECTION_RESET_AT_FIN = 1 << 8, /* RST.seq is the FIN's own: it answers data sent before the FIN was seen */
	CONNECTION_RESET_BEYOND_FIN = 1 << 9,  /* RST.seq is the FIN's plus one: it answers data sent after the FIN */
	CONNECTION_LOCAL_FIN = 1 << 10,        /* local_close_ns holds; this host sent a FIN */
	CONNECTION_LOCAL_RESET = 1 << 11,      /* local_close_ns holds; this host sent an RST */
	CONNECTION_LOCAL_FIRST = 1 << 12,      /* this host closed its direction before anything came from the peer */
	CONNECTION_SENT_AFTER_FIN = 1 << 13,   /* the current exchange's request was written after the peer's FIN */
	CONNECTION_SOCKET_CLOSED = 1 << 14,    /* the process has released its socket */
	CONNECTION_STATE_CALLBACKS = 1 << 15,  /* cgroup: sock_ops reports this socket's states */
	CONNECTION_IGNORED = 1 << 16,          /* cgroup: known not to be followed */
	CONNECTION_DATA_AFTER_CLOSE = 1 << 17, /* data came in after this host had closed its direction */
	CONNECTION_EARLIER_UNACKED =
		1 << 18, /* the FIN or RST left bytes from before the current request unacknowledged */
	/* In the kernel alone: seen as a packet, and not processed by the socket yet. */
	CONNECTION_FIN_WAITS = 1 << 19,
	CONNECTION_RESET_WITH_ACK_WAITS = 1 << 20,
	CONNECTION_BARE_RESET_WAITS = 1 << 21,
	/* Nothing of the request had been acknowledged when this host's process, or its kernel, let go of it. */
	CONNECTION_CLOSED_UNACKED = 1 << 22,
	/* Of an accepted socket, in events alone: the client's last bytes are newer than the last that it was sent. */
	CONNECTION_CLIENT_WAITS = 1 << 23,
	/* Opened right after its thread had lost an exchange: its first request is told of as well. */
	CONNECTION_TRIES_AGAIN = 1 << 24,
	/* The process that closes is ending: event.exit_code. */
	CONNECTION_PROCESS_ENDS = 1 << 25,
	CONNECTION_PROTOCOL = 3 << 26, /* enum connection_protocol, by CONNECTION_PROTOCOL_SHIFT */
	/* TLS: its client has sent no application data yet; the exchange is the handshake, so far. */
	CONNECTION_HANDSHAKE = 1 << 28,
	/* EVENT_CLIENT_ANSWERED: with an error, and its process has tried no upstream since the client asked. */
	CONNECTION_UNTRIED = 1 << 29,
	/* The same as CONNECTION_CLOSED_UNACKED at a shutdown(), after which its process may go on waiting. */
	CONNECTION_SHUTDOWN_UNACKED = 1 << 30,
};

/* What the client of a connection speaks, by the first bytes that it sent. */
enum connection_protocol {
	PROTOCOL_UNKNOWN = 0, /* another one, or not seen */
	PROTOCOL_HTTP1,
	PROTOCOL_TLS,
	PROTOCOL_HTTP2, /* in plain text, with prior knowledge (RFC 9113 3.3) */
};

#define CONNECTION_PROTOCOL_SHIFT 26

/* event.observed: what the source could see at all. A fact outside the mask is unknown, never zero. */
enum observed {
	OBSERVED_PROCESS = 1 << 0,      /* connection.pid and .comm may be trusted where set */
	OBSERVED_SEND_QUEUE = 1 << 1,   /* request bytes include what was written and not yet sent */
	OBSERVED_RESET_HEADER = 1 << 2, /* the RST's flags, sequence and acknowledgement numbers */
	OBSERVED_SOCKET_ERROR = 1 << 3, /* socket_error */
	OBSERVED_UNREAD = 1 << 4,       /* unread_bytes */
	OBSERVED_NETNS = 1 << 5,        /* netns */
	OBSERVED_CLOSE_CALL = 1 << 6,   /* CONNECTION_SOCKET_CLOSED is set whenever it happens */
	OBSERVED_WIRE = 1 << 7,         /* segments alone, as a capture has them: what ends without a FIN or RST of
					 * either side was given up in silence, after retransmissions or probes */
};

/* Where something was lost. Index into struct loss_counters. */
enum loss {
	LOSS_RING_FULL = 0,   /* an event found no room in the ring */
	LOSS_TABLE_FULL,      /* a connection could not be followed: no room or no memory for its accounting */
	LOSS_UNREADABLE,      /* a segment's header could not be read */
	LOSS_PROGRAM_SKIPPED, /* the kernel did not run a program that was running on that CPU already; it counts
			       * itself: recursion_misses of struct bpf_prog_info */
	LOSS_PLACES
};

struct loss_counters {
	__u64 by_place[LOSS_PLACES];
	__u64 by_kind[EVENT_KINDS]; /* LOSS_RING_FULL again, by the kind of event */
};

/* What the loader's listing of sockets tells backend "cgroup" of a connection older than the tracer. */
struct adoptable {
	__u64 last_receive_ns; /* 0 for never */
	__u64 last_send_ns;
	__u64 bytes_received; /* when it was listed, a FIN's number included */
	__u32 flags;          /* enum connection_flag */
	__u32 pid;            /* 0 if not known */
};

/* The numbers of a FIN or RST that its socket has not processed yet. */
struct waiting_segment {
	__u32 seq;
	__u32 ack;
};

/*
 * The accounting of one connection, kept in the kernel for as long as the socket lives. Times are
 * CLOCK_MONOTONIC nanoseconds, 0 for never. "Request" and "response" are what this side sends and
 * receives; on an accepted connection the words swap meaning, the accounting does not.
 */
struct connection {
	/* All that matters of a healthy one, in use or idle: FINRACE_HEALTHY_BYTES, which a table may keep alone. */
	__u64 id;              /* unique on this host: sockets' addresses and ports are used again */
	__u64 opened_ns;       /* SYN sent; from EVENT_OPENED on: handshake complete */
	__u64 request_ns;      /* first write of the current exchange */
	__u64 last_byte_ns;    /* the last byte, either way, that the accounting has been told of */
	__u64 received_before; /* payload bytes received before the current exchange's request */
	__u32 request_seq;     /* sequence number of the request's first byte */
	__u32 exchange;        /* number of the current exchange, 0 before the first */
	__u32 idle_ms;         /* idle time before the current exchange's request */
	__u32 longest_idle_ms; /* of all of them */
	__u32 flags;           /* enum connection_flag */
	__u32 pid;             /* owner's thread group id, 0 if not known; from process context only */
	/* How it ends, by whose process, and what was lost of it. */
	union {
		__u64 peer_fin_ns;
		__u64 received_tick; /* until then, where the kernel does not tell: jiffies at the last receipt, or 0 */
	};
	union {
		__u64 peer_reset_ns;
		struct waiting_segment waiting; /* until then: an RST with ACK, or a FIN, that its socket is to meet */
	};
	__u64 local_close_ns;
	__u32 fin_unacked; /* bytes of the request that the peer's FIN left unacknowledged, or unsent */
	__u32 fin_idle_ms; /* time from the last byte, either way, to the FIN or RST of the peer */
	union {
		__u32 reset_unacked;      /* with CONNECTION_RESET_HAS_ACK: bytes that the RST left unacknowledged */
		__u32 waiting_bare_reset; /* until then: sequence number of an RST without ACK */
	};
	__u8 state;       /* enum tcp_connection_state, as last seen */
	__u8 lost_events; /* events of this connection lost so far, saturating */
	__u16 lost_kinds; /* which: bit (1 << enum event_kind) */
	char comm[FINRACE_COMM_LEN];
};

/* Of struct connection's beginning. */
#define FINRACE_HEALTHY_BYTES 64

/* One lifecycle event: the moment, the socket as it was then, and the accounting so far. */
struct event {
	__u64 timestamp_ns;     /* CLOCK_MONOTONIC */
	__u64 bytes_sent;       /* payload acknowledged by the peer */
	__u64 bytes_received;   /* payload received, in order */
	__u64 response_bytes;   /* of these, since the current exchange's request */
	__u8 local_address[16]; /* network order; IPv4 in the first four bytes, the rest zero */
	__u8 peer_address[16];
	__u16 local_port; /* host order */
	__u16 peer_port;
	__u8 family; /* 4 or 6; IPv4-mapped addresses are 4 */
	__u8 kind;   /* enum event_kind */
	__u8 old_state;
	__u8 new_state;
	__u16 observed;      /* enum observed */
	__u16 socket_error;  /* sk_err: an errno, or 0 */
	__u32 netns;         /* inode number of the network namespace, 0 if not known */
	__u32 request_bytes; /* written since the current exchange began */
	__u32 unacked_bytes; /* of these, not acknowledged now */
	union {
		__u32 unread_bytes; /* received and not read by the process */
		__u32 accept_queue; /* EVENT_ACCEPT_OVERFLOW: connections that wait to be accepted */
	};
	__u32 srtt_us;     /* smoothed round-trip time, RFC 6298 */
	__u32 retransmits; /* segments retransmitted over the connection's life */
	__u32 version;     /* FINRACE_EVENT_VERSION */
	union {
		__u32 thread; /* thread id, from EVENT_RELEASED on; there connection.pid is the process that acts */
		/* Of an accepted socket that is not followed: sequence number of the first byte that its process has
		 * not read, or, after its close, of the first that came. 0 if not known. */
		__u32 unread_seq;
	};
	__u16 http_status; /* EVENT_CLIENT_ANSWERED: of the HTTP/1 answer in plain text that begins here, or 0 */
	__u16 turn;        /* of that thread, modulo 2^16: another one once it has slept */
	__u64 sent_ns;     /* when this host last sent payload, exact to a tick; 0 for never, or not known */
	__u64 received_ns; /* when payload last came in, the same */
	__u32 exit_code;   /* CONNECTION_PROCESS_ENDS: how, as wait(2) tells it */
	union {
		__u32 segment_bytes; /* EVENT_SEGMENT_AFTER_CLOSE: payload that came */
		__u32 turned_away;   /* EVENT_ACCEPT_OVERFLOW: SYNs and ACKs dropped since the one before */
		__u32 untried;       /* CONNECTION_UNTRIED: such answers of its process since the one before */
	};
	/*
	 * Of an accepted socket that is not followed (id 0) there is no accounting: the flags, the owner (from process
	 * context), local_close_ns; from EVENT_CLIENT_ANSWERED on, in last_byte_ns when the client last sent payload.
	 */
	struct connection connection;
};

#define FINRACE_AT(type, member, offset) FINRACE_STATIC_ASSERT(__builtin_offsetof(struct type, member) == (offset))

FINRACE_STATIC_ASSERT(sizeof(struct adoptable) == 32);
FINRACE_AT(adoptable, last_receive_ns, 0);
FINRACE_AT(adoptable, last_send_ns, 8);
FINRACE_AT(adoptable, bytes_received, 16);
FINRACE_AT(adoptable, flags, 24);
FINRACE_AT(adoptable, pid, 28);

FINRACE_STATIC_ASSERT(sizeof(struct connection) == 120);
FINRACE_AT(connection, id, 0);
FINRACE_AT(connection, opened_ns, 8);
FINRACE_AT(connection, request_ns, 16);
FINRACE_AT(connection, last_byte_ns, 24);
FINRACE_AT(connection, received_before, 32);
FINRACE_AT(connection, request_seq, 40);
FINRACE_AT(connection, exchange, 44);
FINRACE_AT(connection, idle_ms, 48);
FINRACE_AT(connection, longest_idle_ms, 52);
FINRACE_AT(connection, flags, 56);
FINRACE_AT(connection, pid, 60);
FINRACE_AT(connection, peer_fin_ns, 64);
FINRACE_AT(connection, peer_reset_ns, 72);
FINRACE_AT(connection, local_close_ns, 80);
FINRACE_AT(connection, fin_unacked, 88);
FINRACE_AT(connection, fin_idle_ms, 92);
FINRACE_AT(connection, reset_unacked, 96);
FINRACE_AT(connection, state, 100);
FINRACE_AT(connection, lost_events, 101);
FINRACE_AT(connection, lost_kinds, 102);
FINRACE_AT(connection, comm, 104);

FINRACE_STATIC_ASSERT(sizeof(struct event) == 256);
FINRACE_AT(event, timestamp_ns, 0);
FINRACE_AT(event, bytes_sent, 8);
FINRACE_AT(event, bytes_received, 16);
FINRACE_AT(event, response_bytes, 24);
FINRACE_AT(event, local_address, 32);
FINRACE_AT(event, peer_address, 48);
FINRACE_AT(event, local_port, 64);
FINRACE_AT(event, peer_port, 66);
FINRACE_AT(event, family, 68);
FINRACE_AT(event, kind, 69);
FINRACE_AT(event, old_state, 70);
FINRACE_AT(event, new_state, 71);
FINRACE_AT(event, observed, 72);
FINRACE_AT(event, socket_error, 74);
FINRACE_AT(event, netns, 76);
FINRACE_AT(event, request_bytes, 80);
FINRACE_AT(event, unacked_bytes, 84);
FINRACE_AT(event, unread_bytes, 88);
FINRACE_AT(event, srtt_us, 92);
FINRACE_AT(event, retransmits, 96);
FINRACE_AT(event, version, 100);
FINRACE_AT(event, thread, 104);
FINRACE_AT(event, http_status, 108);
FINRACE_AT(event, turn, 110);
FINRACE_AT(event, sent_ns, 112);
FINRACE_AT(event, received_ns, 120);
FINRACE_AT(event, exit_code, 128);
FINRACE_AT(event, segment_bytes, 132);
FINRACE_AT(event, connection, 136);

#undef FINRACE_AT

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* FINRACE_EVENT_H */
