// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * Programs that do nothing, on the hooks that finrace uses. What the kernel's statistics say of them is the cost of
 * being called and counted at all; what finrace's own programs take above that is their work.
 */
#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#ifdef EMPTY_FENTRY
SEC("fentry/tcp_sendmsg_locked")
int empty_fentry(void *ctx)
{
	return 0;
}
#endif

#ifdef EMPTY_KPROBE
SEC("kprobe/tcp_sendmsg_locked")
int empty_kprobe(void *ctx)
{
	return 0;
}
#endif

#ifdef EMPTY_CGROUP
SEC("cgroup_skb/egress")
int empty_egress(struct __sk_buff *skb)
{
	return 1;
}

SEC("cgroup_skb/ingress")
int empty_ingress(struct __sk_buff *skb)
{
	return 1;
}
#endif
