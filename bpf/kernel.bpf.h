/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Kernel types and every difference between kernel versions: one function per fact. Only the fields that
 * finrace reads are declared; CO-RE finds their places in the running kernel (5.10 to 6.18 and later).
 */
#ifndef FINRACE_KERNEL_BPF_H
#define FINRACE_KERNEL_BPF_H

#include <asm/ptrace.h>
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "connection.h"

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6

/*
 * sk_flags: enum sock_flags, include/net/sock.h. No process has the socket any more (sock_orphan()); and what tcp_fin()
 * sets, and nothing else in TCP.
 */
#define SOCK_DEAD_BIT 0
#define SOCK_DONE_BIT 1

#define RCV_SHUTDOWN 1
#define ETH_P_IP 0x0800
#define PF_EXITING 4

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct ns_common {
	unsigned int inum;
};

struct net {
	struct ns_common ns;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct in6_addr_bytes {
	__u8 bytes[16];
};

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	possible_net_t skc_net;
	struct in6_addr_bytes skc_v6_daddr;
	struct in6_addr_bytes skc_v6_rcv_saddr;
	unsigned long skc_flags;
};

struct inode {
	unsigned long i_ino;
};

struct file {
	struct inode *f_inode;
};

struct socket {
	struct file *file;
};

struct bpf_local_storage;

struct sock {
	struct sock_common __sk_common;
	int sk_err;
	__u16 sk_protocol;
	__u8 sk_shutdown;
	struct socket *sk_socket;
	struct bpf_local_storage *sk_bpf_storage;
	__u32 sk_ack_backlog; /* of a listener: connections to accept */
	__u32 sk_max_ack_backlog;
};

struct inet_sock {
	struct sock sk;
	__be16 inet_sport;
};

struct inet_connection_sock {
	struct inet_sock icsk_inet;
	struct {
		__u32 lrcvtime;
	} icsk_ack;
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u64 bytes_received;
	__u64 bytes_acked;
	__u64 bytes_sent;
	__u64 tcp_wstamp_ns;
	__u64 tcp_clock_cache;
	__u32 rcv_nxt;
	__u32 copied_seq;
	__u32 snd_una;
	__u32 write_seq;
	__u32 lsndtime;
	__u32 srtt_us;
	__u32 total_retrans;
};

struct sk_buff {
	unsigned int len;
	unsigned char *head;
	__u16 transport_header;
	__u16 network_header;
	__be16 protocol;
};

/* User memory that a process sends from. */
struct iovec {
	void *iov_base;
	__u64 iov_len;
};

/* What it sends from: of these, only user memory is read. The numbers moved with 5.14 and 6.4. */
enum iter_type {
	ITER_IOVEC,
	ITER_UBUF,
};

struct iov_iter {
	__u8 iter_type;
	__u64 iov_offset;
	__u64 count;         /* bytes left */
	__u64 nr_segs;       /* of __iov */
	struct iovec *__iov; /* iov before 6.4 */
	void *ubuf;          /* since 6.0 */
};

struct iov_iter___5_10 {
	unsigned int type; /* and the direction in its lowest bit */
};

struct iov_iter___6_3 {
	struct iovec *iov;
};

struct msghdr {
	struct iov_iter msg_iter;
};

struct task_struct {
	unsigned long nvcsw; /* how often it slept */
	unsigned int flags;
	int exit_code; /* with PF_EXITING, before it closes its files: do_exit() */
};

struct page;
struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
	__u64 session_id;
	__u64 seq_num;
};

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
	unsigned int uid;
};

#pragma clang attribute pop

/*
 * Takes a pointer for what it is, for plain loads; the verifier turns the call into a move. Linux 6.2, commit
 * a35b9af4ec2c. Set by the loader: without it the branch that calls is never verified.
 */
extern void *bpf_rdonly_cast(const void *object, __u32 type_id) __ksym __weak;
const volatile bool have_rdonly_cast;
#define READ_ONLY(object, type) ((type *)bpf_rdonly_cast(object, bpf_core_type_id_kernel(type)))

/* Of the current thread: another one once it has slept. */
static __always_inline __u64 current_turn(void)
{
	return BPF_CORE_READ((struct task_struct *)bpf_get_current_task(), nvcsw);
}

/* Set by the loader: the length of a jiffy. clock_getres(CLOCK_MONOTONIC_COARSE) tells it (kernel: TICK_NSEC). */
const volatile __u64 tick_ns = 4000000;

/*
 * When a 32-bit jiffies stamp of the past was taken, on the monotonic clock; as coarse as the tick. The
 * kernel keeps the time of the last received payload only so (icsk_ack.lrcvtime, set by
 * tcp_event_data_recv(), which a FIN without payload does not reach).
 */
FINRACE_INLINE __u64 jiffies_to_ns(__u32 stamp, __u64 now_ns)
{
	__u64 age = (__u64)((__u32)bpf_jiffies64() - stamp) * tick_ns;

	return age < now_ns ? now_ns - age : 0;
}

/* The other way. */
FINRACE_INLINE __u32 ns_to_jiffies(__u64 ns, __u64 now_ns)
{
	return (__u32)bpf_jiffies64() - (__u32)(ns < now_ns ? (now_ns - ns) / tick_ns : 0);
}

#endif /* FINRACE_KERNEL_BPF_H */
