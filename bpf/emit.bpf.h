/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * From accounting to userspace: the ring, the loss counters, and who may wake the reader. Only an event that
 * may be the end of a failed exchange wakes anybody; the rest waits until the reader looks by itself, or until
 * the ring is a quarter full.
 */
#ifndef FINRACE_EMIT_BPF_H
#define FINRACE_EMIT_BPF_H

#include "kernel.bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096); /* set by the loader */
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct loss_counters);
} losses SEC(".maps");

/* Set by the loader before the programs are verified, so that what is off costs nothing. */
const volatile bool follow_accepted;      /* follow connections that this host accepted */
const volatile bool report_states;        /* report every change of state */
const volatile __u64 wakeup_bytes = 1024; /* a fuller ring than this wakes the reader */

__u64 connections_begun;   /* those included that are not followed, or no longer: LOSS_TABLE_FULL */
__u64 connections_adopted; /* of these, older than the tracer */

/*
 * An atomic counter that returns its value came with Linux 5.12 only. One CPU never reads the same nanosecond
 * twice here, so time and CPU together are unique.
 */
static __always_inline __u64 next_connection_id(void)
{
	__sync_fetch_and_add(&connections_begun, 1);
	return bpf_ktime_get_ns() << 8 | (bpf_get_smp_processor_id() & 0xff);
}

static __always_inline struct loss_counters *loss_counters(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&losses, &zero);
}

/* Atomic, for all that each CPU has its own: a packet's softirq may interrupt a process that is counting. */
static __always_inline void count_loss(enum loss place)
{
	struct loss_counters *counters = loss_counters();

	if (counters)
		__sync_fetch_and_add(&counters->by_place[place], 1);
}

/* A connection that begins, and finds no room. */
static __always_inline void count_unfollowed(void)
{
	__sync_fetch_and_add(&connections_begun, 1);
	count_loss(LOSS_TABLE_FULL);
}

static __always_inline void count_lost_event(__u8 kind)
{
	struct loss_counters *counters = loss_counters();

	if (counters) {
		__sync_fetch_and_add(&counters->by_place[LOSS_RING_FULL], 1);
		if (kind < EVENT_KINDS)
			__sync_fetch_and_add(&counters->by_kind[kind], 1);
	}
}

/* Room for an event with everything filled in that the accounting and the view know; NULL if lost (and counted). */
static __always_inline struct event *event_begin(struct connection *c, const struct socket_view *view, __u8 kind,
						 __u8 old_state, __u8 new_state, __u16 observed)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		count_lost_event(kind);
		connection_note_lost_event(c, kind);
		return NULL;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->timestamp_ns = view->now_ns;
	e->bytes_received = view->bytes_received;
	e->response_bytes = connection_response_bytes(c, view->bytes_received);
	e->request_bytes = connection_request_bytes(c, view->send_next);
	e->unacked_bytes = connection_unacked_bytes(c, view->send_next, view->acknowledged);
	e->retransmits = view->retransmits;
	e->segment_bytes = view->segment_bytes;
	e->kind = kind;
	e->old_state = old_state;
	e->new_state = new_state;
	e->observed = observed;
	e->version = FINRACE_EVENT_VERSION;
	e->connection = *c;
	return e;
}

static __always_inline void event_end(struct event *e)
{
	__u64 flags = BPF_RB_NO_WAKEUP;

	if (connection_is_urgent(&e->connection, e->kind, e->bytes_received) ||
	    bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) > wakeup_bytes)
		flags = BPF_RB_FORCE_WAKEUP;
	bpf_ringbuf_submit(e, flags);
}

#endif /* FINRACE_EMIT_BPF_H */
