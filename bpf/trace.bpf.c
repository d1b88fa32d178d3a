// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * Backend "trace": the kernel's own TCP functions. Built three times from this one source:
 *
 *   trace_storage  fentry, accounting in socket storage          Linux 5.11 and later
 *   trace_hash     fentry, accounting in hash tables by socket    Linux 5.10
 *   trace_kprobe   kprobes, accounting in hash tables by socket   where trampolines are missing
 *
 * The hot path is one hook: the send. All others run when a connection begins, ends or fails.
 */
#include "client.bpf.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#ifdef FINRACE_KPROBE
#define HOOK(name, function, ...) \
	SEC("kprobe/" #function)  \
	int BPF_KPROBE(name, __VA_ARGS__)
/* A plain load where the kernel lets a kprobe's pointer be taken for what it is, a helper call elsewhere. */
#define READ(object, field)                                                  \
	({                                                                   \
		typeof((object)->field) value;                               \
		if (have_rdonly_cast)                                        \
			value = READ_ONLY(object, typeof(*(object)))->field; \
		else                                                         \
			value = BPF_CORE_READ(object, field);                \
		value;                                                       \
	})
#else
#define HOOK(name, function, ...) \
	SEC("fentry/" #function)  \
	int BPF_PROG(name, __VA_ARGS__)
#define READ(object, field) ((object)->field)
#endif

#include "table.bpf.h"

/*
 * Ports that a network namespace has listened on: tells of a connection that is not followed who opened it. Where more
 * are than there is room for, those that are asked for stay.
 */
struct listening_port {
	__u32 netns;
	__u32 port;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct listening_port);
	__type(value, __u8);
} listening_ports SEC(".maps");

static __always_inline void note_listener(struct sock *sk)
{
	struct listening_port listening = {
		.netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum),
		.port = READ(sk, __sk_common.skc_num),
	};
	__u8 one = 1;

	bpf_map_update_elem(&listening_ports, &listening, &one, BPF_ANY);
}

static __always_inline int is_listened_on(struct sock *sk, __u16 port)
{
	struct listening_port listening = {
		.netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum),
		.port = port,
	};

	return bpf_map_lookup_elem(&listening_ports, &listening) != NULL;
}

/*
 * Whether this host accepted it, if it is not followed. Such a socket begins as a copy of its listener, whose backlog
 * it keeps (sk_clone_lock()), and no other has one. Where that was listen()'s 0, the port tells (skc_num is 0 by the
 * time that a socket reaches CLOSE); like listening_ports, that holds for network namespaces that finrace could enter.
 */
static __always_inline int is_accepted(struct sock *sk, struct tcp_sock *tp)
{
	return READ(sk, sk_max_ack_backlog) || is_listened_on(sk, bpf_ntohs(READ(tp, inet_conn.icsk_inet.inet_sport)));
}

/* Which process holds a socket older than the tracer: thread group id by the inode number of the socket's file. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 20); /* set by the loader */
	__type(key, __u32);
	__type(value, __u32);
} socket_owners SEC(".maps");

/* Where tcp_reset() is not handed the segment (before 5.11): the segment that this CPU is about to process. */
struct segment_at_work {
	__u64 sk;
	__u64 skb;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct segment_at_work);
} segments_at_work SEC(".maps");

const volatile bool reset_has_segment; /* tcp_reset(sk, skb), since 5.11; before: tcp_reset(sk) */

static __always_inline struct tcp_sock *tcp_of(struct sock *sk)
{
#ifdef FINRACE_KPROBE
	return (struct tcp_sock *)sk;
#else
	/* Every socket that is followed is a TCP one: the cheaper cast loses no check. */
	return have_rdonly_cast ? READ_ONLY(sk, struct tcp_sock) : bpf_skc_to_tcp_sock(sk);
#endif
}

/* From process context only: in softirq the current process is a bystander. */
static __always_inline void set_owner(struct connection *c)
{
	c->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(c->comm, sizeof(c->comm));
}

static __always_inline int received_fin(struct sock *sk)
{
	return (READ(sk, __sk_common.skc_flags) >> SOCK_DONE_BIT) & 1;
}

static __always_inline int is_orphan(struct sock *sk)
{
	return (READ(sk, __sk_common.skc_flags) >> SOCK_DEAD_BIT) & 1;
}

static __always_inline void view_socket(struct socket_view *view, struct sock *sk, struct tcp_sock *tp,
					const struct connection *c)
{
	__u64 received = READ(tp, bytes_received);

	view->now_ns = bpf_ktime_get_ns();
	/* tcp_rcv_nxt_update() counts the FIN's sequence number among the bytes. */
	view->bytes_received = received - (received && received_fin(sk) ? 1 : 0);
	view->last_receive_ns =
		view->bytes_received ? jiffies_to_ns(READ(tp, inet_conn.icsk_ack.lrcvtime), view->now_ns) : 0;
	view->send_next = READ(tp, write_seq) - (c->flags & CONNECTION_LOCAL_FIN ? 1 : 0);
	view->acknowledged = READ(tp, snd_una);
	view->retransmits = READ(tp, total_retrans);
	view->segment_bytes = 0;
}

static __always_inline void describe_socket(struct event *e, struct sock *sk, struct tcp_sock *tp)
{
	__u32 received;

	if (READ(sk, __sk_common.skc_family) == AF_INET) {
		__u32 local = READ(sk, __sk_common.skc_rcv_saddr), peer = READ(sk, __sk_common.skc_daddr);

		e->family = 4;
		__builtin_memcpy(e->local_address, &local, sizeof(local));
		__builtin_memcpy(e->peer_address, &peer, sizeof(peer));
	} else {
		e->family = 6;
		bpf_core_read(e->local_address, 16, &sk->__sk_common.skc_v6_rcv_saddr);
		bpf_core_read(e->peer_address, 16, &sk->__sk_common.skc_v6_daddr);
	}
	/* skc_num is 0 by the time that a socket reaches CLOSE: inet_put_port() comes before the tracepoint. */
	e->local_port = bpf_ntohs(READ(tp, inet_conn.icsk_inet.inet_sport));
	e->peer_port = bpf_ntohs(READ(sk, __sk_common.skc_dport));
	e->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	e->socket_error = READ(sk, sk_err);
	received = READ(tp, rcv_nxt) - READ(tp, copied_seq);
	e->unread_bytes = received && received_fin(sk) ? received - 1 : received;
	e->srtt_us = READ(tp, srtt_us) >> 3;
	if (READ(tp, bytes_sent))
		e->sent_ns = jiffies_to_ns(READ(tp, lsndtime), e->timestamp_ns);
	if (READ(tp, bytes_received) > (__u64)received_fin(sk))
		e->received_ns = jiffies_to_ns(READ(tp, inet_conn.icsk_ack.lrcvtime), e->timestamp_ns);
}

/* From process context only, of the process that closes. */
static __always_inline void note_exit(struct event *e)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();

	if (!(BPF_CORE_READ(task, flags) & PF_EXITING))
		return;
	e->connection.flags |= CONNECTION_PROCESS_ENDS;
	e->exit_code = BPF_CORE_READ(task, exit_code);
}

/* Who does what is reported now. */
static __always_inline void name_actor(struct event *e)
{
	__u64 actor = bpf_get_current_pid_tgid();

	e->thread = (__u32)actor;
	e->turn = (__u16)current_turn();
	e->connection.pid = actor >> 32;
}

#define OBSERVED_HERE                                                                                               \
	(OBSERVED_PROCESS | OBSERVED_SEND_QUEUE | OBSERVED_RESET_HEADER | OBSERVED_SOCKET_ERROR | OBSERVED_UNREAD | \
	 OBSERVED_NETNS | OBSERVED_CLOSE_CALL)

static __always_inline void emit(struct sock *sk, struct tcp_sock *tp, struct connection *c,
				 const struct socket_view *view, __u8 kind, __u8 old_state, __u8 new_state)
{
	struct event *e;
	__u64 acked;

	connection_refine_request_time(c, view, READ(tp, tcp_wstamp_ns), 3 * tick_ns);
	e = event_begin(c, view, kind, old_state, new_state, OBSERVED_HERE);
	if (!e)
		return;
	describe_socket(e, sk, tp);
	/* bytes_acked counts our SYN and, once acknowledged, our FIN, which is not queued yet at EVENT_LOCAL_FIN. */
	acked = READ(tp, bytes_acked);
	if (acked && (c->flags & CONNECTION_CLIENT))
		acked--;
	if (acked && kind != EVENT_LOCAL_FIN && (c->flags & CONNECTION_LOCAL_FIN) &&
	    READ(tp, snd_una) == READ(tp, write_seq))
		acked--;
	e->bytes_sent = acked;
	if (kind >= EVENT_RELEASED)
		name_actor(e);
	else if (kind == EVENT_LOCAL_FIN ||
		 (kind == EVENT_CLOSED && c->flags & CONNECTION_LOCAL_RESET && c->local_close_ns == view->now_ns))
		note_exit(e);
	event_end(e);
}

/* The last that came from a client is newer than the last that it was sent. Exact to a tick. */
static __always_inline int client_waits(struct tcp_sock *tp)
{
	if (!READ(tp, bytes_received))
		return 0;
	return !READ(tp, bytes_sent) || (__s32)(READ(tp, inet_conn.icsk_ack.lrcvtime) - READ(tp, lsndtime)) > 0;
}

/*
 * When a client's last bytes came in, or were read, which takes the time too (tcp_rcv_space_adjust()). What else takes
 * it comes later: a delayed acknowledgement after TCP_DELACK_MIN (40 ms), a FIN. Then it is known to a tick: not later.
 */
static __always_inline __u64 client_asked_ns(struct sock *sk, struct tcp_sock *tp, __u64 now_ns)
{
	__u64 received_ns = jiffies_to_ns(READ(tp, inet_conn.icsk_ack.lrcvtime), now_ns) - tick_ns;
	__u64 stamp_ns = READ(tp, tcp_clock_cache);

	if (!received_fin(sk) && stamp_ns >= received_ns && stamp_ns - received_ns < DELAYED_ACK_NS)
		return stamp_ns;
	return received_ns;
}

static __always_inline void fill_client_event(struct event *e, struct sock *sk, struct tcp_sock *tp, __u8 kind)
{
	__u8 state = READ(sk, __sk_common.skc_state);

	e->timestamp_ns = bpf_ktime_get_ns();
	e->kind = kind;
	e->old_state = state;
	e->new_state = state;
	e->observed = OBSERVED_HERE;
	e->version = FINRACE_EVENT_VERSION;
	describe_socket(e, sk, tp);
	name_actor(e);
	e->connection.state = state;
	e->connection.last_byte_ns = client_asked_ns(sk, tp, e->timestamp_ns);
	if (client_waits(tp))
		e->connection.flags = CONNECTION_CLIENT_WAITS;
}

static __always_inline void report_client(struct sock *sk, struct tcp_sock *tp, __u8 kind, __u32 status, __u32 untried)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		count_lost_event(kind);
		return;
	}
	__builtin_memset(e, 0, sizeof(*e));
	fill_client_event(e, sk, tp, kind);
	e->http_status = status;
	if (untried) {
		e->connection.flags |= CONNECTION_UNTRIED;
		e->untried = untried;
	}
	event_end(e);
}

/* So late that the process may have waited for something in vain, or to a client that has left. */
static __always_inline int is_notable_answer(struct sock *sk, struct tcp_sock *tp, __u32 tick)
{
	return tick - READ(tp, inet_conn.icsk_ack.lrcvtime) > patience_ticks || received_fin(sk);
}

/* A process sends on a socket that is not followed, perhaps to a client, and that the first bytes of an answer. */
static __noinline int on_client_send(struct sock *sk, struct msghdr *message)
{
	__u64 actor = bpf_get_current_pid_tgid();
	__u32 thread = (__u32)actor;
	struct tcp_sock *tp = tcp_of(sk);
	struct lost_exchange *lost;
	struct event *answer;
	__u32 status, untried;
	__s32 since_receipt;
	__u64 asked_ns;

	if (!tp || !READ(tp, bytes_received))
		return 0;
	/* More of it: within one tick, that is so for a client that has closed since. */
	since_receipt = READ(tp, lsndtime) - READ(tp, inet_conn.icsk_ack.lrcvtime);
	if (READ(tp, bytes_sent) && (since_receipt > 0 || (!since_receipt && received_fin(sk))))
		return 0;
	if (!is_accepted(sk, tp)) /* but to an upstream: there was no room to follow it */
		return 0;
	if (anybody_may_set_aside()) {
		asked_ns = client_asked_ns(sk, tp, bpf_ktime_get_ns());
		if (may_have_lost(READ(tp, inet_conn.icsk_ack.lrcvtime)) && take_report(actor >> 32, asked_ns)) {
			report_client(sk, tp, EVENT_CLIENT_ANSWERED, message ? http_status_of(message) : 0, 0);
			return 0;
		}
		lost = has_set_aside(actor >> 32, asked_ns);
		status = lost && message ? http_status_of(message) : 0;
		if (lost && (status == 502 || status == 503)) {
			untried = take_untried(lost);
			if (untried)
				report_client(sk, tp, EVENT_CLIENT_ANSWERED, status, untried);
			return 0;
		}
	}
	if (!is_notable_answer(sk, tp, (__u32)bpf_jiffies64()))
		return 0;
	status = message ? http_status_of(message) : 0;
	if (status && status < 400)
		return 0;
	/* lighttpd answers all clients whose time is over, and then lets go of their upstreams. */
	answer = bpf_map_lookup_elem(&late_answers, &thread);
	if (answer && answer->http_status)
		tell_late_answer(answer);
	bpf_map_update_elem(&late_answers, &thread, &no_event, BPF_ANY);
	answer = bpf_map_lookup_elem(&late_answers, &thread);
	if (!answer)
		return 0;
	fill_client_event(answer, sk, tp, EVENT_CLIENT_ANSWERED);
	answer->http_status = status;
	return 0;
}

/* A process lets go of a socket that is not followed: a client's, if this host accepted it. */
static __noinline int on_client_release(struct sock *sk)
{
	struct tcp_sock *tp = tcp_of(sk);
	__u8 state;

	if (!tp || !READ(sk, __sk_common.skc_dport) || !is_accepted(sk, tp))
		return 0;
	state = READ(sk, __sk_common.skc_state);
	/* A client that left while it waited is told of in any case: some proxies let go of it first (Node.js). */
	if ((anybody_lost() && client_waits(tp) &&
	     take_report(bpf_get_current_pid_tgid() >> 32, client_asked_ns(sk, tp, bpf_ktime_get_ns()))) ||
	    ((state == TCP_STATE_CLOSE_WAIT || state == TCP_STATE_LAST_ACK || state == TCP_STATE_CLOSE) &&
	     client_waits(tp)))
		report_client(sk, tp, EVENT_CLIENT_RELEASED, 0, 0);
	return 0;
}

/* Whether an end met a request without an answer, or broke one off: then somebody waits for what comes of it. */
static __always_inline int loses_exchange(const struct connection *c, const struct socket_view *view)
{
	__u32 request = connection_request_bytes(c, view->send_next);

	if (!(c->flags & CONNECTION_CLIENT))
		return 0;
	if (c->state == TCP_STATE_SYN_SENT || c->flags & CONNECTION_HANDSHAKE)
		return 1;
	if (!c->exchange || (!request && !(c->flags & CONNECTION_ADOPTED_IN_EXCHANGE)))
		return 0;
	if (c->exchange > 1 && request <= FINRACE_TLS_FAREWELL_BYTES)
		return 0;
	return c->flags & CONNECTION_PEER_RESET || connection_awaits_response(c, view->bytes_received);
}

/*
 * Whether a process that lets go of a lost exchange may set its upstream aside for that: not if it was in haste, for
 * then its own client has left. On a busy proxy clients leave all the time.
 */
static __always_inline int may_blame(const struct connection *c, const struct socket_view *view)
{
	__u64 since_ns = c->exchange ? c->request_ns : c->opened_ns;

	/* A handshake that its own process ends has failed: by a certificate, say. */
	return c->state == TCP_STATE_CLOSE ||
	       c->flags & (CONNECTION_PEER_FIN | CONNECTION_PEER_RESET | CONNECTION_HANDSHAKE) ||
	       view->now_ns - since_ns >= PATIENCE_NS;
}

/* A process tries again: it begins a request of (at first) so many bytes, or with 0 a connection for one. `c` is whole.
 */
static __noinline int on_try(struct connection *c, struct sock *sk, __u64 bytes)
{
	struct socket_view view = {};
	struct tcp_sock *tp;

	if (!c)
		return 0;
	if (bytes)
		c->flags &= ~CONNECTION_TRIES_AGAIN;
	else
		c->flags |= CONNECTION_TRIES_AGAIN;
	tp = tcp_of(sk);
	if (!tp)
		return 0;
	view_socket(&view, sk, tp, c);
	view.send_next += bytes;
	emit(sk, tp, c, &view, EVENT_TRIED, c->state, c->state);
	return 0;
}

/* Out of line: what calls it has no room on the stack for more. */
static __noinline int on_request_after_loss(struct sock *sk, __u64 bytes)
{
	struct connection *c = connection_of_sender(sk);

	note_try();
	if (!c || (!(c->flags & CONNECTION_TRIES_AGAIN) && !may_be_retry()))
		return 0;
	c = connection_lookup(sk);
	if (!c)
		return 0;
	on_try(c, sk, bytes);
	connection_settle(sk, c);
	return 0;
}

/* Out of line, so that the plain send below spills nothing. */
static __noinline int on_notable_send(struct sock *sk, struct msghdr *message, __u64 bytes)
{
	int settled;
	struct connection room, *c = connection_take(sk, &room, &settled);
	struct socket_view view;
	struct tcp_sock *tp;
	__u64 received;

	if (!c || c->state == TCP_STATE_CLOSE)
		return 0;
	tp = tcp_of(sk);
	if (!tp)
		return 0;
	received = READ(tp, bytes_received);
	if (c->flags & CONNECTION_PEER_FIN && received)
		received--;
	view.now_ns = bpf_ktime_get_ns();
	view.bytes_received = received;
	view.last_receive_ns = received ? jiffies_to_ns(READ(tp, inet_conn.icsk_ack.lrcvtime), view.now_ns) : 0;
	view.send_next = READ(tp, write_seq);
	view.acknowledged = 0;
	view.retransmits = 0;
	connection_notable_send(c, &view, connection_asks_what(c, received) ? first_four_of(message) : 0, bytes);
	if (!c->pid)
		set_owner(c);
	if (connection_requests_after_fin(c, view.send_next, bytes)) {
		view_socket(&view, sk, tp, c);
		view.send_next += bytes;
		emit(sk, tp, c, &view, EVENT_SENT_AFTER_FIN, c->state, c->state);
	}
	connection_give_back(sk, &room, settled);
	return 0;
}

/* Where no plain load can tell, it would cost every send too much. */
static __always_inline int answers_notably(struct sock *sk, __u32 tick)
{
	return have_rdonly_cast && is_notable_answer(sk, tcp_of(sk), tick);
}

static __always_inline void account_send(struct sock *sk, struct connection *c, struct msghdr *message, __u64 bytes,
					 __u32 tick)
{
	struct tcp_sock *tp = tcp_of(sk);
	__u32 ticks;

	if (!tp)
		return;
	/* No clock is read: the socket's own has been since payload came in (tcp_mstamp_refresh()). */
	ticks = tick - READ(tp, inet_conn.icsk_ack.lrcvtime);
	if (!connection_plain_send(c, READ(tp, tcp_clock_cache), ticks, READ(tp, bytes_received), READ(tp, write_seq)))
		on_notable_send(sk, message, bytes);
}

/* Out of line as well: for some seconds after a loss alone. */
static __noinline int on_send_after_loss(struct connection *c, struct sock *sk, struct msghdr *message, __u64 bytes)
{
	struct tcp_sock *tp = tcp_of(sk);
	int tries = 0;

	if (!tp)
		return 0;
	if (c && c->flags & CONNECTION_CLIENT)
		tries = connection_begins_exchange(c, READ(tp, bytes_received));
	else
		on_client_send(sk, message);
	if (c)
		account_send(sk, c, message, bytes, (__u32)bpf_jiffies64());
	if (tries)
		on_request_after_loss(sk, bytes);
	return 0;
}

/* Every way to send payload ends in one of two functions, with the socket locked and its backlog processed. */
static __always_inline int on_send(struct sock *sk, struct msghdr *message, __u64 bytes)
{
	struct connection *c = connection_of_sender(sk);
	__u64 now = bpf_jiffies64();

	if (now < aside_until)
		return on_send_after_loss(c, sk, message, bytes);
	if ((!c || (follow_accepted && !(c->flags & CONNECTION_CLIENT))) && answers_notably(sk, (__u32)now))
		on_client_send(sk, message);
	if (c)
		account_send(sk, c, message, bytes, (__u32)now);
	return 0;
}

/* send(), sendmsg(), write(), writev(), MSG_ZEROCOPY, io_uring; from 6.5 also sendfile() and splice(). */
HOOK(trace_send, tcp_sendmsg_locked, struct sock *sk, struct msghdr *message, unsigned long bytes)
{
	return on_send(sk, message, bytes);
}

/* sendfile() and splice(), and kernel TLS, up to 6.4. */
HOOK(trace_sendpages, do_tcp_sendpages, struct sock *sk, struct page *page, int offset, unsigned long bytes)
{
	return on_send(sk, NULL, bytes);
}

static __always_inline void on_opening(struct sock *sk, __u8 old_state)
{
	struct socket_view view = {};
	struct connection *c = connection_create(sk);
	struct tcp_sock *tp = tcp_of(sk);

	if (!c) {
		count_unfollowed();
		return;
	}
	if (!tp)
		return;
	connection_start(c, next_connection_id(), bpf_ktime_get_ns(), CONNECTION_CLIENT, TCP_STATE_SYN_SENT);
	set_owner(c); /* tcp_v4_connect() and tcp_v6_connect() run in the process that connects */
	if (report_states) {
		view_socket(&view, sk, tp, c);
		emit(sk, tp, c, &view, EVENT_STATE, old_state, TCP_STATE_SYN_SENT);
	}
	if (anybody_may_set_aside())
		note_try();
	if (anybody_lost() && may_be_retry())
		on_try(c, sk, 0);
}

static __always_inline void on_accepting(struct sock *sk)
{
	struct connection *c = connection_create(sk);

	if (!c) {
		count_unfollowed();
		return;
	}
	connection_start(c, next_connection_id(), bpf_ktime_get_ns(), 0, TCP_STATE_SYN_RECV);
}

struct tcp_header_words {
	__be16 source;
	__be16 destination;
	__be32 seq;
	__be32 ack;
	__u8 data_offset; /* in the upper four bits, in 32-bit words */
	__u8 flags;
};

static __always_inline int read_tcp_header(struct sk_buff *skb, struct tcp_header_words *header)
{
	unsigned char *head = BPF_CORE_READ(skb, head);
	__u16 offset = BPF_CORE_READ(skb, transport_header);

	return bpf_probe_read_kernel(header, sizeof(*header), head + offset);
}

static __always_inline struct event *server_event_begin(struct sock *sk, struct tcp_sock *tp, __u8 kind, __u8 old_state,
							__u8 new_state)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	__u64 received;

	if (!e) {
		count_lost_event(kind);
		return NULL;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->timestamp_ns = bpf_ktime_get_ns();
	e->kind = kind;
	e->old_state = old_state;
	e->new_state = new_state;
	e->observed = OBSERVED_HERE;
	e->version = FINRACE_EVENT_VERSION;
	describe_socket(e, sk, tp);
	received = READ(tp, bytes_received);
	e->bytes_received = received - (received && received_fin(sk) ? 1 : 0);
	e->unacked_bytes = READ(tp, write_seq) - READ(tp, snd_una);
	e->retransmits = READ(tp, total_retrans);
	e->connection.state = new_state;
	return e;
}

/* A process closes, or stops sending on, a socket that this host accepted, and leaves something undone. */
static __noinline int on_server_close(struct sock *sk, int old_state, int new_state)
{
	struct tcp_sock *tp = tcp_of(sk);
	struct event *e;
	__u32 flags;

	if (!tp || (new_state == TCP_STATE_CLOSE && READ(sk, sk_err)))
		return 0;
	if (!client_waits(tp) && READ(tp, rcv_nxt) == READ(tp, copied_seq) &&
	    (new_state != TCP_STATE_CLOSE || READ(tp, write_seq) == READ(tp, snd_una)))
		return 0;
	if (!is_accepted(sk, tp))
		return 0;
	e = server_event_begin(sk, tp, new_state == TCP_STATE_CLOSE ? EVENT_CLOSED : EVENT_LOCAL_FIN, old_state,
			       new_state);
	if (!e)
		return 0;
	flags = CONNECTION_LOCAL_FIRST | (new_state == TCP_STATE_CLOSE ? CONNECTION_LOCAL_RESET : CONNECTION_LOCAL_FIN);
	if (READ(sk, sk_shutdown) & RCV_SHUTDOWN)
		flags |= CONNECTION_SOCKET_CLOSED;
	if (client_waits(tp))
		flags |= CONNECTION_CLIENT_WAITS;
	e->unread_seq = READ(tp, copied_seq);
	e->connection.flags = flags;
	e->connection.local_close_ns = e->timestamp_ns;
	set_owner(&e->connection);
	note_exit(e);
	event_end(e);
	return 0;
}

/*
 * Payload that comes after the server's FIN, so that nothing can answer it: once its process has let go of the socket
 * the kernel sends an RST (tcp_rcv_state_process()), before that the process may read and discard it.
 */
static __noinline int on_server_late_segment(struct sock *sk, __u8 state, __u32 bytes)
{
	struct tcp_sock *tp = tcp_of(sk);
	__u64 fin_ns, now_ns;
	struct event *e;

	if (!tp)
		return 0;
	/* The FIN was the last that left. What follows the first such segment is more of the same. */
	fin_ns = READ(tp, tcp_wstamp_ns);
	now_ns = bpf_ktime_get_ns();
	if (READ(tp, bytes_received) && jiffies_to_ns(READ(tp, inet_conn.icsk_ack.lrcvtime), now_ns) > fin_ns)
		return 0;
	if (!is_accepted(sk, tp))
		return 0;
	e = server_event_begin(sk, tp, EVENT_SEGMENT_AFTER_CLOSE, state, state);
	if (!e)
		return 0;
	e->segment_bytes = bytes;
	e->unread_seq = READ(tp, rcv_nxt);
	if (e->unacked_bytes)
		e->unacked_bytes--; /* the FIN */
	e->connection.flags = CONNECTION_LOCAL_FIRST | CONNECTION_LOCAL_FIN | CONNECTION_DATA_AFTER_CLOSE;
	if (is_orphan(sk))
		e->connection.flags |= CONNECTION_SOCKET_CLOSED;
	e->connection.local_close_ns = fin_ns;
	event_end(e);
	return 0;
}

#define OVERFLOWS_A_SECOND 16

/* By listening socket: what it has turned away since it was told of, and how often it may be until when. */
struct overflow {
	__u64 until; /* jiffies */
	__u32 turned_away;
	__u32 reports_left;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct overflow);
} overflows SEC(".maps");

static __always_inline void read_addresses(struct event *e, struct sk_buff *skb)
{
	unsigned char *ip = BPF_CORE_READ(skb, head) + BPF_CORE_READ(skb, network_header);

	if (READ(skb, protocol) == bpf_htons(ETH_P_IP)) {
		e->family = 4;
		bpf_probe_read_kernel(e->peer_address, 4, ip + 12);
		bpf_probe_read_kernel(e->local_address, 4, ip + 16);
	} else {
		e->family = 6;
		bpf_probe_read_kernel(e->peer_address, 16, ip + 8);
		bpf_probe_read_kernel(e->local_address, 16, ip + 24);
	}
}

/* A SYN, or the last ACK of a handshake, for a listener: dropped if its queue is full (sk_acceptq_is_full()). */
static __always_inline int on_handshake(struct sock *sk, struct sk_buff *skb)
{
	struct overflow begun = {}, *overflow;
	struct tcp_header_words header;
	__u64 key = (__u64)sk;
	struct event *e;

	if (READ(sk, sk_ack_backlog) <= READ(sk, sk_max_ack_backlog))
		return 0;
	overflow = bpf_map_lookup_elem(&overflows, &key);
	if (!overflow) {
		bpf_map_update_elem(&overflows, &key, &begun, BPF_NOEXIST);
		overflow = bpf_map_lookup_elem(&overflows, &key);
		if (!overflow)
			return 0;
	}
	__sync_fetch_and_add(&overflow->turned_away, 1);
	if (bpf_jiffies64() >= overflow->until) {
		overflow->until = bpf_jiffies64() + ticks_per_second;
		overflow->reports_left = OVERFLOWS_A_SECOND;
	}
	if (!overflow->reports_left)
		return 0;
	overflow->reports_left--;
	if (read_tcp_header(skb, &header)) {
		count_loss(LOSS_UNREADABLE);
		return 0;
	}
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		count_lost_event(EVENT_ACCEPT_OVERFLOW);
		return 0;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->timestamp_ns = bpf_ktime_get_ns();
	e->kind = EVENT_ACCEPT_OVERFLOW;
	e->old_state = TCP_STATE_LISTEN;
	e->new_state = TCP_STATE_LISTEN;
	e->observed = OBSERVED_NETNS;
	e->version = FINRACE_EVENT_VERSION;
	e->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	read_addresses(e, skb);
	e->local_port = bpf_ntohs(header.destination);
	e->peer_port = bpf_ntohs(header.source);
	e->accept_queue = READ(sk, sk_ack_backlog);
	e->turned_away = overflow->turned_away;
	overflow->turned_away = 0;
	event_end(e);
	return 0;
}

HOOK(trace_syn, tcp_conn_request, void *request_ops, void *family_ops, struct sock *sk, struct sk_buff *skb)
{
	return on_handshake(sk, skb);
}

HOOK(trace_last_ack, tcp_check_req, struct sock *sk, struct sk_buff *skb)
{
	return on_handshake(sk, skb);
}

/* The tracepoint fires before the socket carries its new state, and after the segment's ACK was applied. */
static __noinline int on_state(struct sock *sk, int old_state, int new_state)
{
	struct socket_view view = {};
	struct connection *c;
	struct tcp_sock *tp;
	__u8 kind = 0;
	int lost = 0;

	if (READ(sk, sk_protocol) != IPPROTO_TCP || old_state == new_state) /* close() after shutdown() */
		return 0;
	if (new_state == TCP_STATE_SYN_SENT) {
		on_opening(sk, old_state);
		return 0;
	}
	if (new_state == TCP_STATE_LISTEN) {
		note_listener(sk);
		return 0;
	}
	c = connection_lookup(sk);
	/* A new socket, at the address of a former one whose end was not seen (LOSS_PROGRAM_SKIPPED). */
	if (c && old_state == TCP_STATE_LISTEN) {
		connection_forget(sk);
		return 0;
	}
	/* A socket that passed SYN_RECV as a known one is opened from both sides at once: it has connected, not
	 * accepted. */
	if (follow_accepted && old_state == TCP_STATE_SYN_RECV && new_state == TCP_STATE_ESTABLISHED &&
	    (!c || c->state != TCP_STATE_SYN_RECV)) {
		on_accepting(sk);
		c = connection_lookup(sk);
	}
	if (!c) {
		if (old_state == TCP_STATE_ESTABLISHED &&
		    (new_state == TCP_STATE_FIN_WAIT1 || new_state == TCP_STATE_CLOSE))
			on_server_close(sk, old_state, new_state);
		return 0;
	}
	tp = tcp_of(sk);
	if (!tp)
		return 0;
	view_socket(&view, sk, tp, c);
	if (!(c->flags & CONNECTION_PEER_FIN) &&
	    (old_state == TCP_STATE_CLOSE_WAIT || old_state == TCP_STATE_LAST_ACK || old_state == TCP_STATE_CLOSING))
		connection_missed_fin(c);

	switch (new_state) {
	case TCP_STATE_ESTABLISHED:
		follow_port_of(sk);
		connection_established(c, view.now_ns);
		kind = EVENT_OPENED;
		break;
	case TCP_STATE_CLOSE_WAIT:
	case TCP_STATE_CLOSING:
		connection_peer_fin(c, &view);
		kind = EVENT_PEER_FIN;
		lost = loses_exchange(c, &view);
		break;
	case TCP_STATE_FIN_WAIT1:
	case TCP_STATE_LAST_ACK:
		/* The FIN itself is queued after this: the view above does not count it. */
		connection_local_close(c, &view, CONNECTION_LOCAL_FIN);
		if (!c->pid) /* shutdown() and close() alone lead here */
			set_owner(c);
		kind = EVENT_LOCAL_FIN;
		break;
	case TCP_STATE_CLOSE:
		/*
		 * close() with unread bytes or SO_LINGER 0, connect() to AF_UNSPEC, the end of a listener with
		 * connections to accept: the kernel sends its RST only after this. What timers and ICMP end leaves an
		 * errno.
		 */
		if ((old_state == TCP_STATE_ESTABLISHED || old_state == TCP_STATE_CLOSE_WAIT) &&
		    !(c->flags & (CONNECTION_PEER_RESET | CONNECTION_LOCAL_RESET)) && !READ(sk, sk_err))
			connection_local_close(c, &view, CONNECTION_LOCAL_RESET);
		/* A FIN that meets FIN_WAIT2 turns the socket straight into a TIME_WAIT one. */
		if (old_state == TCP_STATE_FIN_WAIT2 && received_fin(sk))
			connection_peer_fin(c, &view);
		kind = old_state == TCP_STATE_SYN_SENT ? EVENT_OPEN_FAILED : EVENT_CLOSED;
		lost = !(c->flags & CONNECTION_SOCKET_CLOSED) && !is_orphan(sk) && loses_exchange(c, &view);
		break;
	default:
		kind = report_states ? EVENT_STATE : 0;
		break;
	}
	c->state = new_state;
	if (kind)
		emit(sk, tp, c, &view, kind, old_state, new_state);
	if (lost)
		expect_outcome(c->pid, c, 1);
	/* What its process is yet to notice is kept until it lets go: trace_close. */
	if (new_state == TCP_STATE_CLOSE && !lost)
		connection_forget(sk);
	else if (new_state == TCP_STATE_ESTABLISHED)
		connection_settle(sk, c);
	return 0;
}

/*
 * A segment's softirq may interrupt a process whose close() is being traced on this CPU. From Linux 6.2 on the kernel
 * does not run a program that is running there already, so a second one of the same kind stands by.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} states_at_work SEC(".maps");

__u64 states_stood_in; /* changes of state that trace_state was skipped for, and trace_state_nested had */

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(trace_state, struct sock *sk, int old_state, int new_state)
{
	__u32 zero = 0, *at_work;

	at_work = bpf_map_lookup_elem(&states_at_work, &zero);
	if (!at_work)
		return 0;
	*(volatile __u32 *)at_work = 1;
	on_state(sk, old_state, new_state);
	*(volatile __u32 *)at_work = 0;
	return 0;
}

/* Attached after trace_state, so run after it: finds it at work only if it was skipped. */
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(trace_state_nested, struct sock *sk, int old_state, int new_state)
{
	__u32 zero = 0, *at_work;

	at_work = bpf_map_lookup_elem(&states_at_work, &zero);
	if (!at_work || !*at_work)
		return 0;
	__sync_fetch_and_add(&states_stood_in, 1);
	on_state(sk, old_state, new_state);
	return 0;
}

/* The process lets go of its socket. What the kernel then sends (FIN, RST, nothing) shows in the other hooks. */
HOOK(trace_close, tcp_close, struct sock *sk)
{
	__u32 thread = (__u32)bpf_get_current_pid_tgid();
	struct connection *c = connection_close_called(sk);
	struct socket_view view = {};
	struct event *answer;
	struct tcp_sock *tp;

	if (!c || !(c->flags & CONNECTION_CLIENT))
		on_client_release(sk);
	if (!c)
		return 0;
	if (!c->pid)
		set_owner(c);
	tp = tcp_of(sk);
	if (!tp)
		return 0;
	view_socket(&view, sk, tp, c);
	if (c->state == TCP_STATE_CLOSE || loses_exchange(c, &view)) {
		emit(sk, tp, c, &view, EVENT_RELEASED, c->state, c->state);
		expect_outcome(bpf_get_current_pid_tgid() >> 32, c, may_blame(c, &view));
		expect_retry();
		answer = bpf_map_lookup_elem(&late_answers, &thread);
		if (answer) {
			tell_late_answer(answer);
			bpf_map_delete_elem(&late_answers, &thread);
		}
	}
	/* Whatever was skipped or came in between: nothing follows. */
	if (c->state == TCP_STATE_CLOSE || READ(sk, __sk_common.skc_state) == TCP_STATE_CLOSE)
		connection_forget(sk);
	return 0;
}

static __always_inline int on_reset(struct sock *sk, struct sk_buff *skb)
{
	struct connection *c = connection_lookup(sk);
	struct reset_segment reset = {};
	struct tcp_header_words header;
	struct socket_view view = {};
	struct tcp_sock *tp;
	__u8 state;

	if (!c)
		return 0;
	tp = tcp_of(sk);
	if (!tp)
		return 0;
	state = READ(sk, __sk_common.skc_state);
	view_socket(&view, sk, tp, c);
	if (skb) {
		if (read_tcp_header(skb, &header)) {
			count_loss(LOSS_UNREADABLE);
		} else {
			reset.seen = 1;
			reset.flags = header.flags;
			reset.seq = bpf_ntohl(header.seq);
			reset.ack = bpf_ntohl(header.ack);
			reset.receive_next = READ(tp, rcv_nxt);
		}
	}
	/*
	 * tcp_rcv_state_process() calls tcp_reset() as well where data met a socket that its process has closed
	 * (FIN_WAIT1, FIN_WAIT2): then this host resets, and no RST has come.
	 */
	if (reset.seen ? !(reset.flags & TCP_FLAG_BIT_RST) :
			 state == TCP_STATE_FIN_WAIT1 || state == TCP_STATE_FIN_WAIT2) {
		connection_local_close(c, &view, CONNECTION_LOCAL_RESET);
		emit(sk, tp, c, &view, EVENT_LOCAL_RESET, state, state);
		return 0;
	}
	connection_peer_reset(c, &view, &reset);
	if (state != TCP_STATE_SYN_SENT) /* that is an open that failed: its event follows at once */
		emit(sk, tp, c, &view, EVENT_PEER_RESET, state, state);
	if (loses_exchange(c, &view))
		expect_outcome(c->pid, c, 1);
	return 0;
}

HOOK(trace_reset, tcp_reset, struct sock *sk, struct sk_buff *skb)
{
	return on_reset(sk, skb);
}

/* tcp_reset(sk) of Linux 5.10. */
HOOK(trace_reset_bare, tcp_reset, struct sock *sk)
{
	struct segment_at_work *segment;
	__u32 zero = 0;

	segment = bpf_map_lookup_elem(&segments_at_work, &zero);
	if (segment && segment->sk == (__u64)sk)
		return on_reset(sk, (struct sk_buff *)segment->skb);
	return on_reset(sk, NULL);
}

static __always_inline void note_segment(struct sock *sk, struct sk_buff *skb)
{
	struct segment_at_work *segment;
	__u32 zero = 0;

	segment = bpf_map_lookup_elem(&segments_at_work, &zero);
	if (segment) {
		segment->sk = (__u64)sk;
		segment->skb = (__u64)skb;
	}
}

/* Loaded on 5.10 alone, where nothing else hands tcp_reset()'s hook the RST: the one hook on receives there. */
HOOK(trace_segment, tcp_rcv_established, struct sock *sk, struct sk_buff *skb)
{
	note_segment(sk, skb);
	return 0;
}

/* Segments for a socket in any state but ESTABLISHED: here for those that come after this host's close. */
HOOK(trace_late_segment, tcp_rcv_state_process, struct sock *sk, struct sk_buff *skb)
{
	struct connection *c = connection_lookup(sk);
	struct tcp_header_words header;
	struct socket_view view = {};
	__u32 header_bytes, bytes;
	struct tcp_sock *tp;
	__u8 state;

	if (c && !reset_has_segment)
		note_segment(sk, skb);
	state = READ(sk, __sk_common.skc_state);
	if (state != TCP_STATE_FIN_WAIT1 && state != TCP_STATE_FIN_WAIT2)
		return 0;
	if (c && (c->flags & CONNECTION_DATA_AFTER_CLOSE ||
		  (c->flags & CONNECTION_CLIENT && !(c->flags & CONNECTION_SOCKET_CLOSED))))
		return 0;
	if (read_tcp_header(skb, &header)) {
		count_loss(LOSS_UNREADABLE);
		return 0;
	}
	header_bytes = (header.data_offset >> 4) * 4;
	bytes = READ(skb, len);
	if (bytes <= header_bytes)
		return 0;
	bytes -= header_bytes;
	tp = tcp_of(sk);
	if (!tp || !sequence_distance(READ(tp, rcv_nxt), bpf_ntohl(header.seq) + bytes)) /* sent again */
		return 0;
	if (!c)
		return on_server_late_segment(sk, state, bytes);
	c->flags |= CONNECTION_DATA_AFTER_CLOSE;
	view_socket(&view, sk, tp, c);
	view.segment_bytes = bytes;
	emit(sk, tp, c, &view, EVENT_SEGMENT_AFTER_CLOSE, state, state);
	return 0;
}

/* This host resets: close() with unread bytes or SO_LINGER 0, or an orphan that ran out of patience. */
HOOK(trace_active_reset, tcp_send_active_reset, struct sock *sk)
{
	struct connection *c = connection_lookup(sk);
	struct socket_view view = {};
	struct tcp_sock *tp;
	__u8 state;

	if (!c || c->state == TCP_STATE_CLOSE)
		return 0;
	tp = tcp_of(sk);
	if (!tp)
		return 0;
	state = READ(sk, __sk_common.skc_state);
	view_socket(&view, sk, tp, c);
	connection_local_close(c, &view, CONNECTION_LOCAL_RESET);
	emit(sk, tp, c, &view, EVENT_LOCAL_RESET, state, state);
	return 0;
}

/* Takes in what is open when the tracer starts. A namespace's listening sockets come first, then the others. */
SEC("iter/tcp")
int trace_adopt(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	struct listening_port listening = {};
	struct socket_view view = {};
	__u64 received, last_send_ns;
	__u32 flags = 0, inode, *pid;
	struct connection c = {};
	struct tcp_sock *tp;
	struct sock *sk;
	__u8 state;

	if (!common)
		return 0;
	tp = bpf_skc_to_tcp_sock(common);
	if (!tp)
		return 0;
	sk = (struct sock *)tp;
	state = common->skc_state;
	if (state == TCP_STATE_LISTEN) {
		__u8 one = 1;

		listening.netns = BPF_CORE_READ(common, skc_net.net, ns.inum);
		listening.port = common->skc_num;
		bpf_map_update_elem(&listening_ports, &listening, &one, BPF_ANY);
		return 0;
	}
	if (state == TCP_STATE_CLOSE || state == TCP_STATE_SYN_RECV)
		return 0;
	if (!sk->sk_max_ack_backlog && !is_listened_on(sk, common->skc_num))
		flags |= CONNECTION_CLIENT;
	else if (!follow_accepted)
		return 0;
	if (connection_is_followed(sk))
		return 0;
	received = tp->bytes_received;
	view.now_ns = bpf_ktime_get_ns();
	view.bytes_received = received;
	if (state == TCP_STATE_CLOSE_WAIT || state == TCP_STATE_LAST_ACK || state == TCP_STATE_CLOSING) {
		flags |= CONNECTION_PEER_FIN; /* when it came is not known */
		if (received)
			view.bytes_received--;
	}
	if (state == TCP_STATE_LAST_ACK || state == TCP_STATE_CLOSING || state == TCP_STATE_FIN_WAIT1 ||
	    state == TCP_STATE_FIN_WAIT2)
		flags |= CONNECTION_LOCAL_FIN;
	view.last_receive_ns = received ? jiffies_to_ns(tp->inet_conn.icsk_ack.lrcvtime, view.now_ns) : 0;
	view.send_next = tp->write_seq - (flags & CONNECTION_LOCAL_FIN ? 1 : 0);
	view.acknowledged = tp->snd_una;
	/* lsndtime is set at the handshake, too: without acknowledged payload it tells nothing. */
	last_send_ns =
		tp->bytes_acked > 1 || tp->write_seq != tp->snd_una ? jiffies_to_ns(tp->lsndtime, view.now_ns) : 0;
	connection_adopt(&c, next_connection_id(), &view, last_send_ns, flags, state);
	inode = BPF_CORE_READ(sk, sk_socket, file, f_inode, i_ino);
	pid = bpf_map_lookup_elem(&socket_owners, &inode);
	if (pid)
		c.pid = *pid;
	follow_port_of(sk);
	if (!connection_insert(sk, &c)) {
		count_loss(LOSS_TABLE_FULL);
		return 0;
	}
	__sync_fetch_and_add(&connections_adopted, 1);
	/* It may have died since: then trace_state has run without finding it. */
	if (sk->__sk_common.skc_state == TCP_STATE_CLOSE)
		connection_forget(sk);
	return 0;
}
