/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What a process does next once it has lost an exchange: whether it tries again, and what the client behind it gets.
 * Proxies do that in the same turn of their loop, as a rule, or within milliseconds from another thread. So nothing is
 * kept of healthy exchanges. After a loss, the next request that its thread begins before it sleeps is an event; and
 * for one second, so many times, each answer to a client that had asked before, and each such client's socket let go
 * of. For as long as a proxy may set an upstream aside after that, its errors to clients that asked later, if it has
 * tried no upstream in between.
 */
#ifndef FINRACE_CLIENT_BPF_H
#define FINRACE_CLIENT_BPF_H

#include "emit.bpf.h"

#define REPORTS_FOR_A_LOSS 16
#define ASIDE_SECONDS 10     /* nginx: fail_timeout; Apache httpd's retry (60 s) is as long for who is asked on */
#define TRIES_OF_RECOVERY 16 /* so many without another loss: it goes on asking */
#define UNTRIED_A_SECOND 16
#define PATIENCE_NS (500 * FINRACE_NS_PER_MS)   /* no proxy's timer is shorter, as a rule */
#define DELAYED_ACK_NS (30 * FINRACE_NS_PER_MS) /* the first is sent later */

/* By process (thread group id). */
struct lost_exchange {
	__u64 until;    /* jiffies */
	__u64 asked_ns; /* when the latest of them began: clients that asked later wait for others */
	__s64 reports_left;
	__u64 noticed_ns;    /* when the latest of them was lost */
	__u64 tried_ns;      /* when the process last began a request, or a connection for one, since then */
	__u64 tries;         /* how often it did */
	__u64 aside_until;   /* jiffies */
	__u64 untried_until; /* of untried_left */
	__u32 untried_left;
	__u32 untried; /* errors of its own that have not been told of */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct lost_exchange);
} lost_exchanges SEC(".maps");

/* By thread: the turn in which it let go of a lost exchange's socket, until it tries again. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, __u64);
} turns_of_loss SEC(".maps");

/*
 * The last answer of a thread that may be an error of its own, kept until the thread answers the next client or lets go
 * of a request: some proxies answer their client first (HAProxy, lighttpd).
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct event);
} late_answers SEC(".maps");

const struct event no_event = {};

/* All that a healthy send looks at, in jiffies: the latest `until` and aside_until. */
__u64 aside_until;
/* After that, the latest of lost_exchanges, and of turns_of_loss. */
__u64 loss_until;
__u32 loss_asked_tick; /* when the latest of them began */
__u64 retry_until;     /* who tries again does so at once */

const volatile __u32 ticks_per_second = 250; /* set by the loader */
const volatile __u32 patience_ticks = 125;   /* set by the loader: who answers this late may have waited in vain */

static __always_inline int anybody_lost(void)
{
	return bpf_jiffies64() < loss_until;
}

static __always_inline int anybody_may_set_aside(void)
{
	return bpf_jiffies64() < aside_until;
}

/* Whether a client whose last payload came in at `tick` may have waited for an exchange that was lost. */
static __always_inline int may_have_lost(__u32 tick)
{
	return anybody_lost() && (__s32)(tick - loss_asked_tick) <= 1;
}

/* A process, 0 if not known, has lost an exchange, or is about to notice. `blames`: it may set its upstream aside. */
static __always_inline void expect_outcome(__u32 pid, const struct connection *c, int blames)
{
	struct lost_exchange *before = bpf_map_lookup_elem(&lost_exchanges, &pid);
	__u64 asked_ns = c->exchange ? c->request_ns : c->opened_ns;
	__u64 now = bpf_jiffies64();
	struct lost_exchange lost = {};
	__u32 asked_tick;

	if (!pid)
		return;
	if (before)
		lost = *before;
	if (asked_ns > lost.asked_ns)
		lost.asked_ns = asked_ns;
	lost.until = now + ticks_per_second;
	lost.reports_left = REPORTS_FOR_A_LOSS;
	if (blames) {
		lost.noticed_ns = bpf_ktime_get_ns();
		lost.tried_ns = 0;
		lost.tries = 0;
		lost.aside_until = now + ASIDE_SECONDS * ticks_per_second;
	}
	bpf_map_update_elem(&lost_exchanges, &pid, &lost, BPF_ANY);
	if (lost.until > aside_until)
		aside_until = lost.until;
	if (lost.aside_until > aside_until)
		aside_until = lost.aside_until;
	asked_tick = ns_to_jiffies(lost.asked_ns, bpf_ktime_get_ns());
	if (!anybody_lost() || (__s32)(asked_tick - loss_asked_tick) > 0)
		loss_asked_tick = asked_tick;
	loss_until = lost.until;
}

/* Whether what `pid` does now for a client that asked at `asked_ns` is to be reported: takes one of its reports. */
static __always_inline int take_report(__u32 pid, __u64 asked_ns)
{
	struct lost_exchange *lost = bpf_map_lookup_elem(&lost_exchanges, &pid);

	if (!lost || bpf_jiffies64() >= lost->until || asked_ns > lost->asked_ns || lost->reports_left <= 0)
		return 0;
	__sync_fetch_and_add(&lost->reports_left, -1);
	return 1;
}

/* This process begins a request, or a connection for one. */
static __always_inline void note_try(void)
{
	__u32 pid = bpf_get_current_pid_tgid() >> 32;
	struct lost_exchange *lost = bpf_map_lookup_elem(&lost_exchanges, &pid);

	if (lost) {
		lost->tried_ns = bpf_ktime_get_ns();
		__sync_fetch_and_add(&lost->tries, 1);
	}
}

/*
 * Whether `pid`, which answers a client that asked at `asked_ns`, may have set an upstream aside: it has lost an
 * exchange before, not long ago, has not gone on asking since, and has tried nothing for this client.
 */
static __always_inline struct lost_exchange *has_set_aside(__u32 pid, __u64 asked_ns)
{
	struct lost_exchange *lost = bpf_map_lookup_elem(&lost_exchanges, &pid);

	if (!lost || bpf_jiffies64() >= lost->aside_until || asked_ns <= lost->noticed_ns ||
	    asked_ns <= lost->tried_ns || lost->tries > TRIES_OF_RECOVERY ||
	    asked_ns > lost->noticed_ns + FINRACE_ASIDE_MOST_NS)
		return NULL;
	return lost;
}

/* Counts an error of its own; returns how many are to be told of now. While they come, they are waited for. */
static __always_inline __u32 take_untried(struct lost_exchange *lost)
{
	__u64 now = bpf_jiffies64();
	__u32 untried;

	__sync_fetch_and_add(&lost->untried, 1);
	lost->aside_until = now + ASIDE_SECONDS * ticks_per_second;
	aside_until = lost->aside_until;
	if (now >= lost->untried_until) {
		lost->untried_until = now + ticks_per_second;
		lost->untried_left = UNTRIED_A_SECOND;
	}
	if (!lost->untried_left)
		return 0;
	lost->untried_left--;
	untried = lost->untried;
	lost->untried = 0;
	return untried;
}

static __always_inline void expect_retry(void)
{
	__u32 thread = bpf_get_current_pid_tgid();
	__u64 turn = current_turn();

	bpf_map_update_elem(&turns_of_loss, &thread, &turn, BPF_ANY);
	retry_until = bpf_jiffies64() + 1 + ticks_per_second / 32;
}

/* Whether this is the first request that the thread begins since it lost one, and it has not slept in between. */
static __always_inline int may_be_retry(void)
{
	__u32 thread = bpf_get_current_pid_tgid();
	__u64 *turn;
	int same;

	if (bpf_jiffies64() >= retry_until)
		return 0;
	turn = bpf_map_lookup_elem(&turns_of_loss, &thread);
	if (!turn)
		return 0;
	same = *turn == current_turn();
	bpf_map_delete_elem(&turns_of_loss, &thread);
	return same;
}

/* `answer` is a late_answers entry. What a thread did before it slept was for another exchange. */
static __always_inline void tell_late_answer(const struct event *answer)
{
	if (answer->turn == (__u16)current_turn() &&
	    bpf_ringbuf_output(&events, (void *)answer, sizeof(*answer), BPF_RB_NO_WAKEUP))
		count_lost_event(EVENT_CLIENT_ANSWERED);
}

#define STATUS_LINE_BYTES 12 /* "HTTP/1.1 502" */
#define STATUS_LINE_PARTS 4  /* Varnish writes it in five, of which the third is the code */

/* The status code of an HTTP/1 answer (RFC 9112 4), 0 if these bytes are no such answer's. */
static __always_inline __u32 parse_status_line(const char *line)
{
	static const char version[] = {'H', 'T', 'T', 'P', '/', '1', '.'};
	__u32 code = 0;
	int i;

#pragma unroll
	for (i = 0; i < (int)sizeof(version); i++)
		if (line[i] != version[i])
			return 0;
	if (line[8] != ' ')
		return 0;
#pragma unroll
	for (i = 9; i < STATUS_LINE_BYTES; i++) {
		if (line[i] < '0' || line[i] > '9')
			return 0;
		code = code * 10 + (line[i] - '0');
	}
	return code;
}

/*
 * The first bytes of what a process is about to send, from its own memory: STATUS_LINE_BYTES at most, in `line` of 32.
 * Returns how many; 0 if they can't be read.
 */
static __noinline __u32 read_beginning(struct msghdr *message, char *line)
{
	struct iov_iter *iter = &message->msg_iter;
	__u64 offset = BPF_CORE_READ(iter, iov_offset);
	struct iovec *parts = NULL;
	void *whole = NULL;
	__u64 count = 1, have = 0;
	int i;

	if (!line)
		return 0;
	if (bpf_core_field_exists(iter->iter_type)) {
		__u8 type = BPF_CORE_READ(iter, iter_type);

		if (bpf_core_enum_value_exists(enum iter_type, ITER_UBUF) &&
		    type == bpf_core_enum_value(enum iter_type, ITER_UBUF))
			whole = BPF_CORE_READ(iter, ubuf);
		else if (type != bpf_core_enum_value(enum iter_type, ITER_IOVEC))
			return 0;
	} else if ((BPF_CORE_READ((struct iov_iter___5_10 *)iter, type) & ~1U) !=
		   bpf_core_enum_value(enum iter_type, ITER_IOVEC)) {
		return 0;
	}
	if (!whole) {
		count = BPF_CORE_READ(iter, nr_segs);
		if (bpf_core_field_exists(iter->__iov))
			parts = BPF_CORE_READ(iter, __iov);
		else
			parts = BPF_CORE_READ((struct iov_iter___6_3 *)iter, iov);
	}
#pragma unroll
	for (i = 0; i < STATUS_LINE_PARTS; i++) {
		struct iovec part = {.iov_base = whole, .iov_len = BPF_CORE_READ(iter, count) + offset};
		__u64 length, at;

		if ((__u64)i >= count || have >= STATUS_LINE_BYTES)
			break;
		if (!whole && bpf_probe_read_kernel(&part, sizeof(part), parts + i))
			return 0;
		if (part.iov_len < offset)
			return 0;
		length = part.iov_len - offset;
		if (length > STATUS_LINE_BYTES - have)
			length = STATUS_LINE_BYTES - have;
		at = have;
		/* The compiler knows that both are small; the verifier wants to see it. */
		asm volatile("" : "+r"(length), "+r"(at));
		if (bpf_probe_read_user(line + (at & 15), length & 15, part.iov_base + offset))
			return 0;
		have += length;
		offset = 0;
	}
	return have;
}

/* Of an answer in plain text that a process is about to send; 0 if that can't be told. */
static __noinline __u32 http_status_of(struct msghdr *message)
{
	char line[32] = {};

	return read_beginning(message, line) < STATUS_LINE_BYTES ? 0 : parse_status_line(line);
}

/* The first four bytes, the first of them in the highest place; 0 if they can't be read. */
static __always_inline __u32 first_four_of(struct msghdr *message)
{
	char line[32] = {};
	__u32 four;

	if (!message || read_beginning(message, line) < sizeof(four))
		return 0;
	__builtin_memcpy(&four, line, sizeof(four));
	return bpf_ntohl(four);
}

#endif /* FINRACE_CLIENT_BPF_H */
