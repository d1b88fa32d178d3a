/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The local ports that followed connections have had: one load tells most sockets that are not followed, above all
 * those that a server's port has accepted. A port stays noted, so nothing can be overlooked for one being released.
 */
#ifndef FINRACE_PORTS_BPF_H
#define FINRACE_PORTS_BPF_H

#include <linux/types.h>
#include <bpf/bpf_helpers.h>

__u8 followed_ports[1 << 16];

static __always_inline void follow_port(__u16 port)
{
	if (!followed_ports[port])
		followed_ports[port] = 1;
}

/* A socket on its way out may have given its port back, and show 0. */
static __always_inline int may_be_followed(__u16 port)
{
	return !port || followed_ports[port];
}

#endif /* FINRACE_PORTS_BPF_H */
