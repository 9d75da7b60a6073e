/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* What becomes of a packet, counted; drops are told in `events`. */
#ifndef ZT_VERDICT_H
#define ZT_VERDICT_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "layout.h"
#include "maps.h"
#include "packet.h"

static __always_inline int next(__u32 program, __u32 reason)
{
	count(program, reason);
	return ZT_NEXT;
}

/* Without a wake-up: the reader looks from time to time, and a flood must not cost more. */
static __noinline int report(struct event *event)
{
	if (!event)
		return 0;
	count(event->program, event->reason);
	return (int)bpf_ringbuf_output(&events, event, sizeof(*event), BPF_RB_NO_WAKEUP);
}

static __always_inline int drop(__u32 program, __u32 reason, const struct __sk_buff *skb,
				const struct packet *p)
{
	struct event event = {
		.saddr = p->saddr,
		.daddr = p->daddr,
		.sport = p->sport,
		.dport = p->dport,
		.ifindex = skb->ifindex,
		.program = program,
		.reason = reason,
		.protocol = p->protocol,
	};

	report(&event);
	return ZT_DROP;
}

static __always_inline int to_peer(__u32 program, __u32 reason, __u32 ifindex)
{
	count(program, reason);
	return bpf_redirect_peer(ifindex, 0);
}

#endif
