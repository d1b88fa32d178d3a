// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * The least that tells a race: when and where in the stream the current request began, by connection that this host has
 * opened. It knows no loss, no older connection, no protocol, no client and no name, and asks a fixed port who opened
 * it: what finrace's send hook takes above it is what those cost, and what it takes itself no finrace can save.
 * Linux 6.12.
 */
#include "kernel.bpf.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define PROXY_PORT 8080 /* measure.py's */
#define UPSTREAM_PORT 8081

struct least {
	__u64 received_before;
	__u64 request_ns;
	__u32 request_seq;
	__u32 requests;
};

static __always_inline int is_ours(__be16 port)
{
	return port == bpf_htons(UPSTREAM_PORT) || port == bpf_htons(PROXY_PORT);
}

static __always_inline void account(struct least *one, __u64 received, __u64 now_ns, __u32 next)
{
	if (one->requests && received == one->received_before)
		return;
	one->received_before = received;
	one->request_ns = now_ns;
	one->request_seq = next;
	one->requests++;
}

#ifdef LEAST_KPROBE
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 18);
	__type(key, __u64);
	__type(value, struct least);
} requests SEC(".maps");

SEC("kprobe/tcp_sendmsg_locked")
int BPF_KPROBE(least_kprobe, struct sock *sk)
{
	struct tcp_sock *tp = READ_ONLY(sk, struct tcp_sock);
	__u64 key = (__u64)sk;
	struct least none = {};
	struct least *one;

	if (!is_ours(READ_ONLY(sk, struct sock)->__sk_common.skc_dport))
		return 0;
	one = bpf_map_lookup_elem(&requests, &key);
	if (one)
		account(one, tp->bytes_received, tp->tcp_clock_cache, tp->write_seq);
	else
		bpf_map_update_elem(&requests, &key, &none, BPF_ANY);
	return 0;
}
#else
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct least);
} requests SEC(".maps");
#endif

#ifdef LEAST_FENTRY
SEC("fentry/tcp_sendmsg_locked")
int BPF_PROG(least_fentry, struct sock *sk)
{
	struct tcp_sock *tp = READ_ONLY(sk, struct tcp_sock);
	struct least *one;

	if (!is_ours(sk->__sk_common.skc_dport))
		return 0;
	one = bpf_sk_storage_get(&requests, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (one)
		account(one, tp->bytes_received, tp->tcp_clock_cache, tp->write_seq);
	return 0;
}
#endif

#ifdef LEAST_CGROUP
#define HEADER_BYTES 52 /* IPv4's, and TCP's with time stamps */

SEC("cgroup_skb/egress")
int least_egress(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct bpf_tcp_sock *tp;
	struct least *one;

	if (skb->len <= HEADER_BYTES || !sk || !is_ours((__be16)sk->dst_port))
		return 1;
	tp = bpf_tcp_sock(sk);
	if (!tp)
		return 1;
	one = bpf_sk_storage_get(&requests, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (one)
		account(one, tp->bytes_received, bpf_ktime_get_coarse_ns(), tp->snd_nxt);
	return 1;
}

/* Nothing needs it, but the kernel asks for every packet either way where finrace is to see a FIN or an RST come in. */
SEC("cgroup_skb/ingress")
int least_ingress(struct __sk_buff *skb)
{
	return 1;
}
#endif
