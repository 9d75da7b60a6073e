/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Whose a connection is, and by which way it goes, where addresses alone do not say it. */
#ifndef ZT_FLOWS_H
#define ZT_FLOWS_H

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "layout.h"
#include "maps.h"
#include "packet.h"

/* What the pod at the packet's source sent, as a connection of that pod. */
static __always_inline void flow_from(struct flow *flow, const struct packet *p)
{
	flow->pod_addr = p->saddr;
	flow->peer_addr = p->daddr;
	flow->pod_port = p->sport;
	flow->peer_port = p->dport;
}

/* What is for the pod at the packet's destination. */
static __always_inline void flow_to(struct flow *flow, const struct packet *p)
{
	flow->pod_addr = p->daddr;
	flow->peer_addr = p->saddr;
	flow->pod_port = p->dport;
	flow->peer_port = p->sport;
}

enum age { NEW, OLDER, UNKNOWN };

/*
 * Whether a packet of TCP is of a connection that is older than the pod's capture. Most pods have
 * none, which costs nothing more to know.
 */
static __always_inline enum age age_of(const struct pod *pod, const struct packet *p,
				       const struct flow *flow)
{
	if (!(pod->flags & (POD_OLDER | POD_ENROLLING)) || p->syn || p->fragment || p->options)
		return NEW;
	if (bpf_map_lookup_elem(&older_flows, flow))
		return OLDER;
	return pod->flags & POD_ENROLLING ? UNKNOWN : NEW;
}

static __always_inline int is_older(const struct pod *pod, const struct flow *flow)
{
	return (pod->flags & (POD_OLDER | POD_ENROLLING)) && bpf_map_lookup_elem(&older_flows, flow);
}

/* Whose the connection in `stack_flows` is; 0 if it is not there. */
static __always_inline __u8 stack_flow(const struct pod *dialler, const struct flow *flow)
{
	__u8 *value;

	if (!dialler->stack_flows)
		return 0;
	value = bpf_map_lookup_elem(&stack_flows, flow);
	return value ? *value : 0;
}

static __always_inline void note_stack_flow(struct pod *dialler, const struct flow *flow, __u8 of)
{
	bpf_map_update_elem(&stack_flows, flow, &of, BPF_ANY);
	if (!dialler->stack_flows)
		dialler->stack_flows = 1;
}

/* Port of HBONE at either end. ztunnel listens on it, so that none of its own is so by chance. */
static __always_inline int is_hbone(__be16 one, __be16 other)
{
	return one == bpf_htons(PORT_INBOUND_HBONE) || other == bpf_htons(PORT_INBOUND_HBONE);
}

#endif
