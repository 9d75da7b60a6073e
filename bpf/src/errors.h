/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* ICMP errors: whom they are for, by the packet that they are about. */
#ifndef ZT_ERRORS_H
#define ZT_ERRORS_H

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "flows.h"
#include "layout.h"
#include "maps.h"
#include "packet.h"

/*
 * An ICMP error (path MTU, refused) that is for ztunnel: about TCP that ztunnel sent with the
 * address of the pod. All of a pod's TCP is ztunnel's but what is older than its capture and what
 * it has with the node.
 */
static __always_inline int is_error_for_ztunnel(struct __sk_buff *skb, const struct packet *p)
{
	struct flow sent;
	struct pod *pod;

	if (icmp_error_about(skb, p, &sent) != IPPROTO_TCP ||
	    !same_addr(&sent.pod_addr, &p->daddr))
		return 0;
	pod = get_pod(&sent.pod_addr);
	return pod && !is_older(pod, &sent) && stack_flow(pod, &sent) != FLOW_OF_POD;
}

/*
 * One that the pod sends about what ztunnel sent to it, with whatever address. Its receiver by
 * address is another node's ztunnel, or nobody.
 */
static __always_inline int is_error_from_pod(struct __sk_buff *skb, const struct packet *p,
					     const struct pod *pod)
{
	struct flow sent, flow;

	if (icmp_error_about(skb, p, &sent) != IPPROTO_TCP ||
	    !same_addr(&sent.peer_addr, &p->saddr))
		return 0;
	flow.pod_addr = sent.peer_addr;
	flow.peer_addr = sent.pod_addr;
	flow.pod_port = sent.peer_port;
	flow.peer_port = sent.pod_port;
	if (is_older(pod, &flow))
		return 0;
	return !is_node_address(&flow.peer_addr) || bpf_map_lookup_elem(&node_flows, &flow);
}

/* Whether this is an ICMP error about what went past the stack. */
static __always_inline int is_error_about_hbone(struct __sk_buff *skb, const struct packet *p)
{
	struct flow sent;
	struct pod *pod;

	if (icmp_error_about(skb, p, &sent) != IPPROTO_TCP ||
	    !same_addr(&sent.pod_addr, &p->daddr) || !is_hbone(sent.pod_port, sent.peer_port))
		return 0;
	pod = get_pod(&sent.pod_addr);
	return in_pod_cidrs(&sent.peer_addr) && !(pod && is_older(pod, &sent));
}

#endif
