// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * Backend "cgroup": sock_ops and cgroup_skb on the root of the cgroup v2 hierarchy. Stable kernel interface
 * only: no BTF, no kprobes, no reading of kernel memory, so it runs where tracing programs are refused.
 *
 * sock_ops tells every change of state of the connections that began after the tracer, with snd_una and
 * snd_nxt as they then are. The packet programs add what it can't tell: when a request was sent, and the
 * header of an RST. For connections older than the tracer (sock_ops stays silent on those) the packets
 * are all there is.
 */
#include "emit.bpf.h"
#include "ports.bpf.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define ALLOW 1
#define SOCK_STREAM 1
#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86DD
#define IPV6_HEADER_BYTES 40

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct connection);
} connections SEC(".maps");

/* Word by word: the verifier refuses the wider loads that the compiler would make of this. */
#define WORD(address, i) (*(volatile __u32 *)&(address)[i])
#define COPY_ADDRESS(to, from)                \
	do {                                  \
		__u32 *words = (__u32 *)(to); \
		words[0] = WORD(from, 0);     \
		words[1] = WORD(from, 1);     \
		words[2] = WORD(from, 2);     \
		words[3] = WORD(from, 3);     \
	} while (0)

/* By socket cookie. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 18);
	__type(key, __u64);
	__type(value, struct adoptable);
} adoptables SEC(".maps");

__s64 adoptables_left; /* 0: no socket without accounting needs to be looked up */

const volatile bool have_release_hook; /* cgroup/sock_release and socket storage in it */

/* 0 if the accounting has been told of it already, or there was none. */
static __always_inline __u64 last_receive_ns(const struct connection *c, __u64 now_ns)
{
	if (c->flags & CONNECTION_PEER_FIN || !c->received_tick)
		return 0;
	return jiffies_to_ns((__u32)c->received_tick, now_ns);
}

static __always_inline __u16 observed_here(const struct connection *c)
{
	return OBSERVED_RESET_HEADER | (c->pid ? OBSERVED_PROCESS : 0) | (have_release_hook ? OBSERVED_CLOSE_CALL : 0);
}

/*
 * Of this host's FIN, once it has left, the low bits of its sequence number; 0 before. It lies where a name ends, which
 * is 0 always (bpf_get_current_comm()), so that nobody else writes there: a packet of the peer's may be looked at on
 * another CPU, at that very moment.
 */
#define LOCAL_FIN_MARK(c) (*(volatile __u8 *)&(c)->comm[FINRACE_COMM_LEN - 1])
#define LOCAL_FIN_LEFT 0x80
#define LOCAL_FIN_BITS 0x7f

static __always_inline struct event *cgroup_event_begin(struct connection *c, const struct socket_view *view, __u8 kind,
							__u8 old_state, __u8 new_state)
{
	struct event *e = event_begin(c, view, kind, old_state, new_state, observed_here(c));

	if (!e)
		return NULL;
	e->received_ns = view->last_receive_ns;
	/* What is kept there until then is for the kernel alone. */
	LOCAL_FIN_MARK(&e->connection) = 0;
	if (!(c->flags & CONNECTION_PEER_FIN))
		e->connection.peer_fin_ns = 0;
	if (!(c->flags & CONNECTION_PEER_RESET)) {
		e->connection.peer_reset_ns = 0;
		e->connection.reset_unacked = 0;
	}
	return e;
}

static __always_inline void note_local_fin(struct connection *c, __u32 seq)
{
	LOCAL_FIN_MARK(c) = LOCAL_FIN_LEFT | (seq & LOCAL_FIN_BITS);
}

/*
 * The sequence number after what has been sent, without this host's FIN. One that is due, as the state tells, may have
 * to wait, as behind a request that is being retransmitted; snd_nxt counts it only after it has left
 * (tcp_event_new_data_sent()), and the peer's may arrive in between.
 */
static __always_inline __u32 send_next(const struct connection *c, __u32 snd_nxt)
{
	__u8 mark = LOCAL_FIN_MARK(c);

	if (!mark || ((snd_nxt - 1) & LOCAL_FIN_BITS) != (mark & LOCAL_FIN_BITS))
		return snd_nxt;
	return snd_nxt - 1;
}

/* ------------------------------------------------------------------ sock_ops: states */

static __always_inline void view_sock_ops(struct socket_view *view, struct bpf_sock_ops *ctx,
					  const struct connection *c, int fin_counted)
{
	__u64 received = ctx->bytes_received;

	view->now_ns = bpf_ktime_get_ns();
	view->last_receive_ns = last_receive_ns(c, view->now_ns);
	/* tcp_rcv_nxt_update() counts the FIN's sequence number among the bytes. */
	view->bytes_received = received - (received && fin_counted ? 1 : 0);
	view->send_next = send_next(c, ctx->snd_nxt);
	view->acknowledged = ctx->snd_una;
	view->retransmits = ctx->total_retrans;
	view->segment_bytes = 0;
}

static __always_inline void emit_sock_ops(struct bpf_sock_ops *ctx, struct connection *c,
					  const struct socket_view *view, __u8 kind, __u8 old_state, __u8 new_state)
{
	struct event *e = cgroup_event_begin(c, view, kind, old_state, new_state);
	__u64 acked;

	if (!e)
		return;
	if (ctx->family == AF_INET) {
		__u32 local = ctx->local_ip4, peer = ctx->remote_ip4;

		e->family = 4;
		__builtin_memcpy(e->local_address, &local, sizeof(local));
		__builtin_memcpy(e->peer_address, &peer, sizeof(peer));
	} else {
		e->family = 6;
		COPY_ADDRESS(e->local_address, ctx->local_ip6);
		COPY_ADDRESS(e->peer_address, ctx->remote_ip6);
	}
	e->local_port = ctx->local_port;
	e->peer_port = bpf_ntohl(ctx->remote_port);
	acked = ctx->bytes_acked;
	if (acked && (c->flags & CONNECTION_CLIENT))
		acked--;
	if (acked && LOCAL_FIN_MARK(c) && ctx->snd_una == ctx->snd_nxt)
		acked--;
	e->bytes_sent = acked;
	e->srtt_us = ctx->srtt_us >> 3;
	event_end(e);
}

static __always_inline void on_connect(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct connection *c = bpf_sk_storage_get(&connections, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	struct connection owner;
	struct socket_view view = {};

	if (!c) {
		count_unfollowed();
		return;
	}
	follow_port(ctx->local_port);
	owner = *c; /* left there by cgroup/connect */
	__builtin_memset(c, 0, sizeof(*c));
	c->pid = owner.pid;
	__builtin_memcpy(c->comm, owner.comm, FINRACE_COMM_LEN);
	connection_start(c, next_connection_id(), bpf_ktime_get_ns(), CONNECTION_CLIENT | CONNECTION_STATE_CALLBACKS,
			 TCP_STATE_SYN_SENT);
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	if (report_states) {
		view_sock_ops(&view, ctx, c, 0);
		emit_sock_ops(ctx, c, &view, EVENT_STATE, TCP_STATE_CLOSE, TCP_STATE_SYN_SENT);
	}
}

static __always_inline void on_accept(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct connection *c = bpf_sk_storage_get(&connections, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	struct socket_view view = {};

	if (!c) {
		count_unfollowed();
		return;
	}
	if (c->state == TCP_STATE_SYN_RECV) /* opened from both sides at once: it has connected, not accepted */
		return;
	follow_port(ctx->local_port);
	connection_start(c, next_connection_id(), bpf_ktime_get_ns(), CONNECTION_STATE_CALLBACKS,
			 TCP_STATE_ESTABLISHED);
	connection_established(c, c->opened_ns);
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	view_sock_ops(&view, ctx, c, 0);
	emit_sock_ops(ctx, c, &view, EVENT_OPENED, TCP_STATE_SYN_RECV, TCP_STATE_ESTABLISHED);
}

static __always_inline void on_state(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u8 old_state, __u8 new_state)
{
	struct connection *c = bpf_sk_storage_get(&connections, sk, NULL, 0);
	struct reset_segment reset = {};
	struct socket_view view = {};
	struct connection last;
	__u8 kind = 0;
	int fin;

	if (!c || c->flags & CONNECTION_IGNORED || old_state == new_state) /* close() after shutdown() */
		return;
	/* A packet that comes now, on another CPU, changes nothing of what is told last. */
	if (new_state == TCP_STATE_CLOSE) {
		last = *c;
		c = &last;
	}
	fin = new_state == TCP_STATE_CLOSE_WAIT || new_state == TCP_STATE_CLOSING || c->flags & CONNECTION_PEER_FIN;
	view_sock_ops(&view, ctx, c, fin);
	switch (new_state) {
	case TCP_STATE_ESTABLISHED:
		if (!(c->flags & CONNECTION_CLIENT)) /* on_accept() has told, just before */
			break;
		connection_established(c, view.now_ns);
		kind = EVENT_OPENED;
		break;
	case TCP_STATE_CLOSE_WAIT:
	case TCP_STATE_CLOSING:
		if (c->flags & CONNECTION_PEER_FIN) /* seen as a packet */
			break;
		connection_peer_fin(c, &view);
		kind = EVENT_PEER_FIN;
		break;
	case TCP_STATE_FIN_WAIT1:
	case TCP_STATE_LAST_ACK:
		connection_local_close(c, &view, CONNECTION_LOCAL_FIN);
		kind = EVENT_LOCAL_FIN;
		break;
	case TCP_STATE_CLOSE:
		kind = old_state == TCP_STATE_SYN_SENT ? EVENT_OPEN_FAILED : EVENT_CLOSED;
		/* What a packet program noted before is judged with what the socket has processed by now. */
		if (connection_find_reset(c, &view, old_state, ctx->rcv_nxt, &reset)) {
			connection_peer_reset(c, &view, &reset);
			if (kind == EVENT_CLOSED)
				emit_sock_ops(ctx, c, &view, EVENT_PEER_RESET, old_state, old_state);
		} else if ((old_state == TCP_STATE_ESTABLISHED || old_state == TCP_STATE_CLOSE_WAIT) &&
			   c->flags & CONNECTION_SOCKET_CLOSED) {
			/*
			 * close() with unread bytes or SO_LINGER 0: the RST leaves only after this, and meets no
			 * accounting.
			 */
			connection_local_close(c, &view, CONNECTION_LOCAL_RESET);
		}
		break;
	default:
		kind = report_states ? EVENT_STATE : 0;
		break;
	}
	c->state = new_state;
	if (kind)
		emit_sock_ops(ctx, c, &view, kind, old_state, new_state);
	if (new_state == TCP_STATE_CLOSE)
		bpf_sk_storage_delete(&connections, sk);
}

SEC("sockops")
int cgroup_states(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return ALLOW;
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		on_connect(ctx, sk);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		if (follow_accepted)
			on_accept(ctx, sk);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		on_state(ctx, sk, ctx->args[0], ctx->args[1]);
		break;
	}
	return ALLOW;
}

/* ------------------------------------------------------------------ cgroup_skb: packets */

struct segment {
	__u32 seq;
	__u32 ack;
	__u32 payload;
	__u8 flags;
};

/* In place, without a copy; the stack has pulled the TCP header into the linear part on both paths. */
static __always_inline int parse_segment(struct __sk_buff *skb, struct segment *segment)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	__u32 ip_bytes;
	__u8 *tcp;

	if (skb->protocol == bpf_htons(ETHERTYPE_IPV4)) {
		__u8 *ip = data;

		if (data + 20 > end || ip[9] != IPPROTO_TCP)
			return -1; /* what IPsec has wrapped has a TCP socket still */
		ip_bytes = (ip[0] & 0x0f) * 4;
	} else {
		__u8 *ip = data;

		if (data + IPV6_HEADER_BYTES > end || ip[6] != IPPROTO_TCP)
			return -1; /* extension headers */
		ip_bytes = IPV6_HEADER_BYTES;
	}
	tcp = data + ip_bytes;
	if ((void *)(tcp + 20) > end)
		return -1;
	segment->seq = bpf_ntohl(*(__be32 *)(tcp + 4));
	segment->ack = bpf_ntohl(*(__be32 *)(tcp + 8));
	segment->flags = tcp[13];
	segment->payload = skb->len - ip_bytes - (tcp[12] >> 4) * 4;
	return 0;
}

/* A socket that sends an RST as it closes has given its port back before: the segment still has it. */
static __always_inline __u16 source_port(struct __sk_buff *skb)
{
	__u8 *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	__u32 ip_bytes = IPV6_HEADER_BYTES;

	if (skb->protocol == bpf_htons(ETHERTYPE_IPV4)) {
		if ((void *)(data + 1) > end)
			return 0;
		ip_bytes = (data[0] & 0x0f) * 4;
	}
	data += ip_bytes;
	if ((void *)(data + 2) > end)
		return 0;
	return bpf_ntohs(*(__be16 *)data);
}

static __always_inline void view_tcp(struct socket_view *view, struct bpf_tcp_sock *tp, const struct connection *c,
				     __u64 now_ns)
{
	__u64 received = tp->bytes_received;

	view->now_ns = now_ns;
	view->last_receive_ns = last_receive_ns(c, now_ns);
	view->bytes_received = received - (received && c->flags & CONNECTION_PEER_FIN ? 1 : 0);
	view->send_next = send_next(c, tp->snd_nxt);
	view->acknowledged = tp->snd_una;
	view->retransmits = tp->total_retrans;
	view->segment_bytes = 0;
}

/* Out of line: one copy serves both packet programs, and stays out of the way of the packets that make no event. */
static __noinline int emit_packet(struct bpf_sock *sk, struct connection *c, const struct socket_view *view, __u8 kind,
				  __u16 local_port)
{
	struct bpf_tcp_sock *tp;
	struct event *e;
	__u64 acked;

	if (!sk || !c || !view)
		return 0;
	tp = bpf_tcp_sock(sk);
	if (!tp)
		return 0;
	e = cgroup_event_begin(c, view, kind, c->state, c->state);
	if (!e)
		return 0;
	if (sk->family == AF_INET) {
		__u32 local = sk->src_ip4, peer = sk->dst_ip4;

		e->family = 4;
		__builtin_memcpy(e->local_address, &local, sizeof(local));
		__builtin_memcpy(e->peer_address, &peer, sizeof(peer));
	} else {
		e->family = 6;
		COPY_ADDRESS(e->local_address, sk->src_ip6);
		COPY_ADDRESS(e->peer_address, sk->dst_ip6);
	}
	e->local_port = local_port;
	e->peer_port = bpf_ntohs(sk->dst_port);
	acked = tp->bytes_acked;
	if (acked && (c->flags & CONNECTION_CLIENT))
		acked--;
	e->bytes_sent = acked;
	e->srtt_us = tp->srtt_us >> 3;
	event_end(e);
	return 0;
}

/*
 * A socket without accounting: older than the tracer, or not to be followed. While any of the former are left,
 * the answer is kept in the socket's storage, so that each socket is looked up once.
 */
static __noinline struct connection *adopt(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct socket_view view = {};
	struct adoptable *adoptable;
	struct bpf_tcp_sock *tp;
	struct connection *c;
	__u64 cookie;

	if (!sk)
		return NULL;
	sk = bpf_sk_fullsock(sk);
	if (!sk || sk->protocol != IPPROTO_TCP)
		return NULL;
	tp = bpf_tcp_sock(sk);
	if (!tp || sk->state == TCP_STATE_SYN_RECV || sk->state == TCP_STATE_LISTEN)
		return NULL;
	c = bpf_sk_storage_get(&connections, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!c) {
		count_loss(LOSS_TABLE_FULL);
		return NULL;
	}
	cookie = bpf_get_socket_cookie(skb);
	adoptable = bpf_map_lookup_elem(&adoptables, &cookie);
	if (!adoptable) {
		c->flags = CONNECTION_IGNORED;
		return c;
	}
	view.now_ns = bpf_ktime_get_ns();
	view.last_receive_ns = adoptable->last_receive_ns;
	/* Not as of now: what has come since is the answer to the request that was under way. */
	view.bytes_received = adoptable->bytes_received;
	view.send_next = tp->snd_nxt;
	view.acknowledged = tp->snd_una;
	if (adoptable->flags & CONNECTION_PEER_FIN && view.bytes_received)
		view.bytes_received--;
	if (adoptable->flags & CONNECTION_LOCAL_FIN)
		view.send_next--;
	connection_adopt(c, next_connection_id(), &view, adoptable->last_send_ns, adoptable->flags, sk->state);
	if (adoptable->flags & CONNECTION_LOCAL_FIN)
		note_local_fin(c, view.send_next);
	c->pid = adoptable->pid;
	follow_port(sk->src_port);
	__sync_fetch_and_add(&connections_adopted, 1);
	if (!bpf_map_delete_elem(&adoptables, &cookie))
		__sync_fetch_and_add(&adoptables_left, -1);
	return c;
}

/* The accounting of a packet's socket, NULL if it is not followed. */
static __always_inline struct connection *connection_of(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct connection *c;

	if (!sk || (!may_be_followed(sk->src_port) && adoptables_left <= 0))
		return NULL;
	c = bpf_sk_storage_get(&connections, sk, NULL, 0);
	if (!c && adoptables_left > 0)
		c = adopt(skb);
	return c && !(c->flags & CONNECTION_IGNORED) ? c : NULL;
}

static __always_inline int states_are_reported(const struct connection *c)
{
	return c->flags & CONNECTION_STATE_CALLBACKS;
}

/* The end of a connection whose states nobody reports: both sides have closed, or one has reset. */
static __always_inline void end_if_over(struct bpf_sock *sk, struct connection *c, const struct socket_view *view,
					__u16 local_port)
{
	__u32 both = CONNECTION_PEER_FIN | CONNECTION_LOCAL_FIN;

	if ((c->flags & both) != both && !(c->flags & (CONNECTION_PEER_RESET | CONNECTION_LOCAL_RESET)))
		return;
	c->state = TCP_STATE_CLOSE;
	emit_packet(sk, c, view, EVENT_CLOSED, local_port);
	c->flags = CONNECTION_IGNORED;
}

/* Has the socket processed the FIN that waited behind data? Asked at its acknowledgement, and at the next arrival. */
static __always_inline void on_noted_fin(struct bpf_sock *sk, struct connection *c, struct bpf_tcp_sock *tp)
{
	struct socket_view view;

	if (tp->rcv_nxt != c->waiting.seq + 1)
		return;
	c->flags &= ~CONNECTION_FIN_WAITS;
	view_tcp(&view, tp, c, bpf_ktime_get_ns());
	if (view.bytes_received)
		view.bytes_received--; /* the FIN's own number */
	connection_peer_fin(c, &view);
	emit_packet(sk, c, &view, EVENT_PEER_FIN, sk->src_port);
	end_if_over(sk, c, &view, sk->src_port);
}

/* The first four bytes of its payload, the first of them in the highest place; 0 if there are fewer. */
static __always_inline __u32 first_four_of(struct __sk_buff *skb, const struct segment *segment)
{
	__be32 four;

	if (segment->payload < sizeof(four) ||
	    bpf_skb_load_bytes(skb, skb->len - segment->payload, &four, sizeof(four)))
		return 0;
	return bpf_ntohl(four);
}

/* What a segment that deserves a closer look is about, looked up anew; NULL if it needs none after all. */
static __always_inline struct connection *look_closer(struct __sk_buff *skb, struct bpf_sock *sk,
						      struct bpf_tcp_sock **tp, struct segment *segment)
{
	struct connection *c;

	if (!sk)
		return NULL;
	c = bpf_sk_storage_get(&connections, sk, NULL, 0);
	if (!c || parse_segment(skb, segment))
		return NULL;
	*tp = bpf_tcp_sock(sk);
	if (!*tp)
		return NULL;
	if (c->flags & CONNECTION_FIN_WAITS)
		on_noted_fin(sk, c, *tp);
	return c->flags & CONNECTION_IGNORED ? NULL : c;
}

/* A segment that is more than the next one of a healthy connection. Out of line: it stays out of the way of those. */
static __noinline int on_notable_egress(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct socket_view view = {};
	struct segment segment;
	struct bpf_tcp_sock *tp;
	struct connection *c = look_closer(skb, sk, &tp, &segment);

	if (!c)
		return 0;
	view_tcp(&view, tp, c, bpf_ktime_get_ns());
	/* snd_nxt moves on after the segment has left: what lies before it is a retransmission. */
	if (segment.payload && !sequence_distance(segment.seq, tp->snd_nxt)) {
		view.send_next = segment.seq;
		connection_notable_send(c, &view, first_four_of(skb, &segment), segment.payload);
		view.send_next += segment.payload;
		if (connection_requests_after_fin(c, segment.seq, segment.payload)) {
			c->state = sk->state;
			emit_packet(sk, c, &view, EVENT_SENT_AFTER_FIN, sk->src_port);
		}
	}
	if (segment.flags & TCP_FLAG_BIT_FIN)
		note_local_fin(c, segment.seq + segment.payload);
	/* In SYN_SENT an RST answers a stranger's ACK, as from TIME_WAIT at the peer, and the SYN goes on (RFC
	 * 9293 3.10.7.3). It has been this socket's since Linux 6.13. */
	if (segment.flags & TCP_FLAG_BIT_RST && c->state == TCP_STATE_SYN_SENT)
		return 0;
	if (segment.flags & TCP_FLAG_BIT_RST) {
		__u16 port = source_port(skb);

		connection_local_close(c, &view, CONNECTION_LOCAL_RESET);
		emit_packet(sk, c, &view, EVENT_LOCAL_RESET, port);
		if (!states_are_reported(c))
			end_if_over(sk, c, &view, port);
	} else if (segment.flags & TCP_FLAG_BIT_FIN && !states_are_reported(c) && !(c->flags & CONNECTION_LOCAL_FIN)) {
		connection_local_close(c, &view, CONNECTION_LOCAL_FIN);
		emit_packet(sk, c, &view, EVENT_LOCAL_FIN, sk->src_port);
		end_if_over(sk, c, &view, sk->src_port);
	}
	return 0;
}

SEC("cgroup_skb/egress")
int cgroup_egress(struct __sk_buff *skb)
{
	struct connection *c = connection_of(skb);
	struct segment segment;
	struct bpf_tcp_sock *tp;

	if (!c)
		return ALLOW;
	if (parse_segment(skb, &segment)) {
		count_loss(LOSS_UNREADABLE);
		return ALLOW;
	}
	if (!(segment.flags & (TCP_FLAG_BIT_FIN | TCP_FLAG_BIT_RST)) && !(c->flags & CONNECTION_FIN_WAITS)) {
		if (!segment.payload)
			return ALLOW;
		tp = skb->sk ? bpf_tcp_sock(skb->sk) : NULL;
		/* The segment carries its time of departure (tcp_wstamp_ns, __tcp_transmit_skb()): no clock need be
		 * read. */
		if (tp && segment.seq == tp->snd_nxt &&
		    connection_plain_send(c, skb->tstamp, bpf_jiffies64() - c->received_tick, tp->bytes_received,
					  segment.seq))
			return ALLOW;
	}
	on_notable_egress(skb);
	return ALLOW;
}

static __always_inline void on_packet_reset(struct bpf_sock *sk, struct connection *c, struct bpf_tcp_sock *tp,
					    const struct segment *segment)
{
	struct reset_segment reset = {
		.seq = segment->seq,
		.ack = segment->ack,
		.receive_next = tp->rcv_nxt,
		.flags = segment->flags,
		.seen = 1,
	};
	struct socket_view view;

	if (states_are_reported(c)) { /* sock_ops tells when the socket has processed it */
		connection_note_reset(c, &reset);
		return;
	}
	view_tcp(&view, tp, c, bpf_ktime_get_ns());
	if (!connection_accepts_reset(c, &view, &reset, sk->state))
		return;
	connection_peer_reset(c, &view, &reset);
	emit_packet(sk, c, &view, EVENT_PEER_RESET, sk->src_port);
	end_if_over(sk, c, &view, sk->src_port);
}

static __always_inline void on_packet_fin(struct bpf_sock *sk, struct connection *c, struct bpf_tcp_sock *tp,
					  const struct segment *segment)
{
	struct socket_view view;

	if (segment->seq != tp->rcv_nxt) {
		/* Behind a hole, or behind data on the backlog: on_noted_fin() has it when the socket has processed it.
		 */
		if (!states_are_reported(c)) {
			c->waiting.seq = segment->seq + segment->payload;
			c->flags |= CONNECTION_FIN_WAITS;
		}
		return;
	}
	view_tcp(&view, tp, c, bpf_ktime_get_ns());
	view.bytes_received += segment->payload;
	if (segment->payload)
		view.last_receive_ns = view.now_ns;
	/* This program runs before tcp_ack(). */
	if (sequence_distance(view.acknowledged, segment->ack))
		view.acknowledged = segment->ack;
	c->flags &= ~CONNECTION_FIN_WAITS;
	connection_peer_fin(c, &view);
	emit_packet(sk, c, &view, EVENT_PEER_FIN, sk->src_port);
	if (!states_are_reported(c))
		end_if_over(sk, c, &view, sk->src_port);
}

/* A FIN, an RST, or anything after this host's own FIN. */
static __noinline int on_notable_ingress(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct segment segment;
	struct bpf_tcp_sock *tp;
	struct connection *c = look_closer(skb, sk, &tp, &segment);

	if (!c)
		return 0;
	if (segment.flags & TCP_FLAG_BIT_RST) {
		on_packet_reset(sk, c, tp, &segment);
		return 0;
	}
	if (segment.payload && c->flags & CONNECTION_SOCKET_CLOSED && !(c->flags & CONNECTION_DATA_AFTER_CLOSE)) {
		struct socket_view view;

		c->flags |= CONNECTION_DATA_AFTER_CLOSE;
		view_tcp(&view, tp, c, bpf_ktime_get_ns());
		emit_packet(sk, c, &view, EVENT_SEGMENT_AFTER_CLOSE, sk->src_port);
	}
	/* A FIN after this host's own may lead straight to TIME_WAIT, which sock_ops reports as CLOSE alone. */
	if (segment.flags & TCP_FLAG_BIT_FIN && !(c->flags & CONNECTION_PEER_FIN) &&
	    (!states_are_reported(c) || sk->state == TCP_STATE_FIN_WAIT1 || sk->state == TCP_STATE_FIN_WAIT2))
		on_packet_fin(sk, c, tp, &segment);
	return 0;
}

SEC("cgroup_skb/ingress")
int cgroup_ingress(struct __sk_buff *skb)
{
	struct connection *c = connection_of(skb);
	struct segment segment;

	if (!c)
		return ALLOW;
	if (parse_segment(skb, &segment)) {
		count_loss(LOSS_UNREADABLE);
		return ALLOW;
	}
	if (segment.payload && !connection_note_receipt(c, bpf_jiffies64()))
		c->peer_fin_ns = bpf_ktime_get_ns();
	if (segment.flags & (TCP_FLAG_BIT_RST | TCP_FLAG_BIT_FIN) ||
	    c->flags & (CONNECTION_LOCAL_FIN | CONNECTION_FIN_WAITS))
		on_notable_ingress(skb);
	return ALLOW;
}

/* ------------------------------------------------------------------ process context, where the kernel allows it */

static __always_inline int note_owner(struct bpf_sock_addr *ctx)
{
	struct connection *c;

	if (ctx->type != SOCK_STREAM || ctx->protocol != IPPROTO_TCP || !ctx->sk)
		return ALLOW;
	c = bpf_sk_storage_get(&connections, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (c) {
		c->pid = bpf_get_current_pid_tgid() >> 32;
		bpf_get_current_comm(c->comm, sizeof(c->comm));
	}
	return ALLOW;
}

SEC("cgroup/connect4")
int cgroup_connect4(struct bpf_sock_addr *ctx)
{
	return note_owner(ctx);
}

SEC("cgroup/connect6")
int cgroup_connect6(struct bpf_sock_addr *ctx)
{
	return note_owner(ctx);
}

/* inet_release(), before tcp_close(). */
SEC("cgroup/sock_release")
int cgroup_release(struct bpf_sock *ctx)
{
	struct connection *c = bpf_sk_storage_get(&connections, ctx, NULL, 0);

	if (c)
		c->flags |= CONNECTION_SOCKET_CLOSED;
	return ALLOW;
}
