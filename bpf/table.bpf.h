/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Where backend trace keeps the accounting of each connection: in its socket's storage or, where programs can't reach
 * that, in tables by the socket's address.
 *
 * The tables are two. Of a healthy connection, established and in use or idle, FINRACE_HEALTHY_BYTES of the accounting
 * are enough: they lie in `connections`, 128 bytes each with all that the kernel adds, and a plain send looks nowhere
 * else. While a connection opens or ends, and once it has lost an event, it lies whole in `unsettled`.
 *
 * Whoever comes here holds the socket's lock, but for tcp_close(), which comes after the last send: it may meet a
 * segment that settles or unsettles the connection on another CPU (connection_close_called()).
 */
#ifndef FINRACE_TABLE_BPF_H
#define FINRACE_TABLE_BPF_H

#include "emit.bpf.h"

#ifdef FINRACE_SOCKET_STORAGE
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct connection);
} connections SEC(".maps");

static __always_inline struct connection *connection_lookup(struct sock *sk)
{
	/* One load tells most sockets that are not followed: cheaper than asking for their storage. */
	if (!sk->sk_bpf_storage)
		return NULL;
	return bpf_sk_storage_get(&connections, sk, NULL, 0);
}

static __always_inline int connection_is_followed(struct sock *sk)
{
	return connection_lookup(sk) != NULL;
}

static __always_inline struct connection *connection_of_sender(struct sock *sk)
{
	return connection_lookup(sk);
}

static __always_inline struct connection *connection_take(struct sock *sk, struct connection *room, int *settled)
{
	return connection_lookup(sk);
}

static __always_inline void connection_give_back(struct sock *sk, struct connection *room, int settled)
{
}

static __always_inline void connection_settle(struct sock *sk, const struct connection *c)
{
}

static __always_inline void follow_port_of(struct sock *sk)
{
}

static __always_inline struct connection *connection_create(struct sock *sk)
{
	bpf_sk_storage_delete(&connections, sk); /* a socket may connect again */
	return bpf_sk_storage_get(&connections, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
}

/* Of a socket that is not followed yet. Returns 0 if there is no room. */
static __always_inline int connection_insert(struct sock *sk, struct connection *c)
{
	return bpf_sk_storage_get(&connections, sk, c, BPF_SK_STORAGE_GET_F_CREATE) != NULL;
}

static __always_inline struct connection *connection_close_called(struct sock *sk)
{
	struct connection *c = connection_lookup(sk);

	if (c)
		c->flags |= CONNECTION_SOCKET_CLOSED;
	return c;
}

static __always_inline void connection_forget(struct sock *sk)
{
	bpf_sk_storage_delete(&connections, sk);
}
#else
#include "ports.bpf.h"

/* The beginning of struct connection, but for its owner: owner_key(). */
struct healthy_connection {
	__u8 beginning[FINRACE_HEALTHY_BYTES];
} __attribute__((aligned(8)));

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 18); /* set by the loader, as is BPF_F_NO_PREALLOC where tracing may allocate */
	__type(key, __u64);
	__type(value, struct healthy_connection);
} connections SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 17); /* set by the loader, as above */
	__type(key, __u64);
	__type(value, struct connection);
} unsettled SEC(".maps");

struct owner_name {
	char comm[FINRACE_COMM_LEN];
} __attribute__((aligned(8)));

/* What the owners of settled connections are called, by owner_key(). */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 512); /* set by the loader: each CPU keeps some free ones to itself */
	__type(key, __u32);
	__type(value, struct owner_name);
} owner_names SEC(".maps");

#define PID_MASK ((1U << 22) - 1) /* PID_MAX_LIMIT, linux/threads.h */

/* A process id, and in the bits that it leaves a hash of the name: threads of one process may have several. */
static __always_inline __u32 owner_key(const struct connection *c)
{
	const __u32 *words = (const __u32 *)c->comm;
	__u32 mixed = (((words[0] * 31 + words[1]) * 31 + words[2]) * 31 + words[3]) * 0x9e3779b1U;

	return (mixed & ~PID_MASK) | (c->pid & PID_MASK);
}

static __always_inline __u32 note_owner(const struct connection *c)
{
	const __u64 *own = (const __u64 *)c->comm, *noted;
	__u32 key = owner_key(c);

	if (!c->comm[0])
		return key;
	noted = bpf_map_lookup_elem(&owner_names, &key);
	if (!noted || noted[0] != own[0] || noted[1] != own[1])
		bpf_map_update_elem(&owner_names, &key, c->comm, BPF_ANY);
	return key;
}

static __always_inline void name_owner(struct connection *c, __u32 key)
{
	struct owner_name *name = key ? bpf_map_lookup_elem(&owner_names, &key) : NULL;

	if (name)
		__builtin_memcpy(c->comm, name->comm, FINRACE_COMM_LEN);
}

/* The whole accounting that `healthy` stands for, but for its owner's name. Returns the key of that. */
static __always_inline __u32 connection_unfold(struct connection *c, const struct healthy_connection *healthy)
{
	__u32 key;

	__builtin_memset(c, 0, sizeof(*c));
	__builtin_memcpy(c, healthy, FINRACE_HEALTHY_BYTES);
	c->state = TCP_STATE_ESTABLISHED;
	key = c->pid;
	c->pid = key & PID_MASK;
	return key;
}

static __always_inline int connection_is_healthy(const struct connection *c)
{
	return c->state == TCP_STATE_ESTABLISHED && !c->lost_events && !c->local_close_ns &&
	       !(c->flags & (CONNECTION_PEER_FIN | CONNECTION_PEER_RESET | CONNECTION_LOCAL_FIN |
			     CONNECTION_LOCAL_RESET | CONNECTION_SOCKET_CLOSED));
}

static __always_inline void connection_fold(struct healthy_connection *healthy, const struct connection *c)
{
	__u32 owner = note_owner(c);

	__builtin_memcpy(healthy, c, sizeof(*healthy));
	__builtin_memcpy(healthy->beginning + __builtin_offsetof(struct connection, pid), &owner, sizeof(owner));
}

/* `c` is in `unsettled`. Without room among the settled it is not followed any more, and counted. */
static __always_inline void connection_settle(struct sock *sk, const struct connection *c)
{
	struct healthy_connection healthy;
	__u64 key = (__u64)sk;

	if (!connection_is_healthy(c))
		return;
	connection_fold(&healthy, c);
	if (bpf_map_update_elem(&connections, &key, &healthy, BPF_ANY))
		count_loss(LOSS_TABLE_FULL);
	/* Its process may have let go of it meanwhile. */
	if (c->flags & CONNECTION_SOCKET_CLOSED || bpf_map_delete_elem(&unsettled, &key))
		bpf_map_delete_elem(&connections, &key);
}

/*
 * From the settled to the unsettled, in an order that lets two do it at once: who comes second finds the first one's.
 * Without room there the connection is not followed any more, and counted.
 */
static __noinline struct connection *connection_unsettle(struct sock *sk)
{
	struct healthy_connection *healthy;
	struct connection whole, *c;
	__u64 key = (__u64)sk;

	healthy = bpf_map_lookup_elem(&connections, &key);
	if (!healthy)
		return bpf_map_lookup_elem(&unsettled, &key); /* the first one may be through with it by now */
	name_owner(&whole, connection_unfold(&whole, healthy));
	bpf_map_update_elem(&unsettled, &key, &whole, BPF_NOEXIST);
	c = bpf_map_lookup_elem(&unsettled, &key);
	if (!c)
		count_loss(LOSS_TABLE_FULL);
	bpf_map_delete_elem(&connections, &key);
	return c;
}

/* For all that is no send: what opens, ends or breaks a connection. */
static __always_inline struct connection *connection_lookup(struct sock *sk)
{
	__u64 key = (__u64)sk;
	struct connection *c = bpf_map_lookup_elem(&unsettled, &key);

	return c ? c : connection_unsettle(sk);
}

static __always_inline int connection_is_followed(struct sock *sk)
{
	__u64 key = (__u64)sk;

	return bpf_map_lookup_elem(&unsettled, &key) || bpf_map_lookup_elem(&connections, &key) ||
	       bpf_map_lookup_elem(&unsettled, &key); /* it may have moved between the two looks */
}

/*
 * Of the accounting it gives FINRACE_HEALTHY_BYTES, without the owner. Most senders are not followed, and cheaper to
 * tell without asking the tables.
 */
static __always_inline struct connection *connection_of_sender(struct sock *sk)
{
	struct connection *c;
	__u64 key = (__u64)sk;

	/* In SYN_SENT a socket may have been followed before it got its port. */
	if (!may_be_followed(READ(sk, __sk_common.skc_num)) && READ(sk, __sk_common.skc_state) != TCP_STATE_SYN_SENT)
		return NULL;
	c = bpf_map_lookup_elem(&connections, &key);
	return c ? c : bpf_map_lookup_elem(&unsettled, &key);
}

/* For a send, which leaves a connection where it is: all but its owner's name, if it is `settled` in `room`.
 * connection_give_back() follows. */
static __always_inline struct connection *connection_take(struct sock *sk, struct connection *room, int *settled)
{
	struct healthy_connection *healthy;
	__u64 key = (__u64)sk;
	struct connection *c = bpf_map_lookup_elem(&unsettled, &key);

	*settled = 0;
	if (c)
		return c;
	healthy = bpf_map_lookup_elem(&connections, &key);
	if (!healthy)
		return NULL;
	*settled = 1;
	connection_unfold(room, healthy);
	return room;
}

static __always_inline void connection_give_back(struct sock *sk, struct connection *room, int settled)
{
	struct connection *beginning;
	__u64 key = (__u64)sk;

	/* Not by comparing pointers: where it is not settled, older verifiers let nobody read `room`. */
	if (!settled)
		return;
	beginning = bpf_map_lookup_elem(&connections, &key);
	if (!beginning)
		return;
	if (connection_is_healthy(room)) {
		__builtin_memcpy(beginning, room, __builtin_offsetof(struct connection, pid));
		if (!beginning->pid && room->pid)
			beginning->pid = note_owner(room);
		return;
	}
	name_owner(room, beginning->pid);
	if (bpf_map_update_elem(&unsettled, &key, room, BPF_NOEXIST))
		count_loss(LOSS_TABLE_FULL);
	bpf_map_delete_elem(&connections, &key);
}

static __always_inline void follow_port_of(struct sock *sk)
{
	follow_port(READ(sk, __sk_common.skc_num));
}

static __always_inline struct connection *connection_create(struct sock *sk)
{
	struct connection empty = {};
	__u64 key = (__u64)sk;

	bpf_map_delete_elem(&connections, &key); /* a socket may connect again */
	if (bpf_map_update_elem(&unsettled, &key, &empty, BPF_ANY))
		return NULL;
	return bpf_map_lookup_elem(&unsettled, &key);
}

/* Of a socket that is not followed yet. Returns 0 if there is no room. */
static __always_inline int connection_insert(struct sock *sk, struct connection *c)
{
	struct healthy_connection healthy;
	__u64 key = (__u64)sk;

	if (!connection_is_healthy(c))
		return !bpf_map_update_elem(&unsettled, &key, c, BPF_ANY);
	connection_fold(&healthy, c);
	return !bpf_map_update_elem(&connections, &key, &healthy, BPF_ANY);
}

/* Without the socket's lock: a segment may move it from one table to the other between two looks, or end it. */
static __always_inline struct connection *connection_close_called(struct sock *sk)
{
	struct connection *c = connection_lookup(sk), *settled, *now;
	__u64 key = (__u64)sk;

	if (c)
		c->flags |= CONNECTION_SOCKET_CLOSED;
	/* connection_settle() looks at that flag after it has made this one. */
	settled = bpf_map_lookup_elem(&connections, &key);
	if (settled)
		settled->flags |= CONNECTION_SOCKET_CLOSED;
	now = bpf_map_lookup_elem(&unsettled, &key);
	if (c && !now)
		now = connection_unsettle(sk);
	if (now && now != c)
		now->flags |= CONNECTION_SOCKET_CLOSED;
	return now;
}

static __always_inline void connection_forget(struct sock *sk)
{
	__u64 key = (__u64)sk;

	bpf_map_delete_elem(&unsettled, &key);
	bpf_map_delete_elem(&connections, &key);
}
#endif

#endif /* FINRACE_TABLE_BPF_H */
