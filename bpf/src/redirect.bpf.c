// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Redirection of mesh pods' TCP through the node's ztunnel.
 *
 *   app_outbound     tc ingress of a pod's host interface: what the pod sends
 *   app_inbound      tc egress of it: what the node's stack delivers to the pod (fallback)
 *   ztunnel_host     tc ingress of ztunnel's host interface: what ztunnel sends
 *   underlay_ingress tc ingress of the underlay: HBONE from other nodes
 *   ztunnel_guard    tc egress of it: what the node's stack delivers to ztunnel
 *   ztunnel_ingress  sk_lookup in ztunnel's netns: which listener a new connection gets
 *   cut_off          in place of the first two, for a pod that cannot be captured
 *
 * Rules that hold throughout:
 * - ztunnel takes a connection's direction and the workload's identity from its source address,
 *   so no packet may reach ztunnel with a pod's address that did not come from that pod's
 *   interface. Four programs check it, one for each way in.
 * - What should be captured and cannot be (fragments, IP options, IPv6 extension headers that may
 *   hide TCP, no ztunnel, no listener) is dropped, never let around the mesh. A fragment or option
 *   that the stack would accept and these programs cannot steer would be a bypass; real TCP stacks
 *   send neither.
 * - ICMP, ICMPv6, UDP and other IP protocols are not the mesh's and pass, except from a spoofed
 *   source, and so do ARP and neighbour discovery about oneself. DNS queries are ztunnel's if it is
 *   asked for. No other frame passes at a pod's interface or ztunnel's, none with a VLAN tag, and
 *   nothing a pod sends that a node would open to find another packet (pod_frames.h). On the
 *   underlay tagged frames and those of other protocols are the node's business.
 * - A connection that is older than the pod's capture is left alone until it ends: user space
 *   lists it in `older_flows`. None can be added by a packet, and a SYN never counts as one.
 * - A connection takes one way in both directions, or what judges it in the node's stack
 *   (conntrack, which also translates addresses) sees half of it. Past the stack go: a pod and its
 *   ztunnel, ztunnel and the pods of its node, and HBONE (port 15008) between pods' addresses by
 *   the underlay, which nobody translates. Everything else takes the stack, to a pod and from it,
 *   and is caught at the pod's interface.
 * - An ICMP error goes the way of the packet it is about, to whoever sent that.
 * - Each drop is counted and told in `events`, as long as there is room.
 * - "Not mine" is TCX_NEXT, so that programs attached after these still see the packet.
 * - Forwarding here does not decrement the TTL; each packet crosses at most once per node.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#include "errors.h"
#include "flows.h"
#include "layout.h"
#include "listener.h"
#include "maps.h"
#include "packet.h"
#include "pod_frames.h"
#include "verdict.h"

/* From an egress hook there is no redirect_peer: across the veth, with ztunnel's MAC. */
static __always_inline int to_ztunnel_by_egress(struct __sk_buff *skb, __u32 reason,
						const struct config *cfg, const struct packet *p)
{
	if (bpf_skb_store_bytes(skb, 0, cfg->ztunnel_mac, sizeof(cfg->ztunnel_mac), 0))
		return drop(PROG_APP_INBOUND, REASON_MALFORMED, skb, p);
	count(PROG_APP_INBOUND, reason);
	return bpf_redirect(cfg->ztunnel_ifindex, 0);
}

static __always_inline int is_dns_query(const struct config *cfg, const struct packet *p)
{
	return (cfg->flags & CONFIG_DNS) && p->protocol == IPPROTO_UDP &&
	       p->dport == bpf_htons(PORT_DNS);
}

/* As over UDP, also to an address of the node: a cache that runs there has one. */
static __always_inline int is_dns_over_tcp(const struct config *cfg, const struct packet *p)
{
	return (cfg->flags & CONFIG_DNS) && p->dport == bpf_htons(PORT_DNS);
}

static __always_inline int is_dns_answer(const struct config *cfg, const struct packet *p)
{
	return (cfg->flags & CONFIG_DNS) && p->protocol == IPPROTO_UDP &&
	       p->sport == bpf_htons(PORT_DNS);
}

/*
 * Whether what a pod sends to an address of the node is the node's: exempt. But ztunnel may be
 * speaking with that address, for what the node masqueraded on its way to the pod. What the pod
 * dials is noted, as the address may be a node port's: the answers come by the stack then, from
 * elsewhere. Each packet does so that finds no note, as others may have pushed it out.
 */
static __always_inline int is_with_node(struct pod *pod, const struct packet *p,
					const struct flow *flow)
{
	if (p->syn)
		bpf_map_delete_elem(&node_flows, flow);
	else if (bpf_map_lookup_elem(&node_flows, flow))
		return 0;
	if (stack_flow(pod, flow) != FLOW_OF_POD)
		note_stack_flow(pod, flow, FLOW_OF_POD);
	return 1;
}

/* What a pod sends that is neither IPv4 nor IPv6. */
static __always_inline int other_than_ip(struct __sk_buff *skb, struct packet *p)
{
	const __u32 me = PROG_APP_OUTBOUND;
	__u32 refused = refused_frame(skb);

	if (refused)
		return drop(me, refused, skb, p);
	if (!is_own_arp(skb, p))
		return drop(me, REASON_NEIGHBOUR, skb, p);
	return next(me, REASON_PASSED);
}

/* What a pod sends that is not TCP. */
static __always_inline int other_than_tcp(struct __sk_buff *skb, const struct packet *p,
					  const struct config *cfg, const struct pod *pod)
{
	const __u32 me = PROG_APP_OUTBOUND;
	__u32 reason = REASON_DNS;

	if (!is_dns_query(cfg, p)) {
		if (!is_error_from_pod(skb, p, pod))
			return next(me, REASON_PASSED);
		reason = REASON_ICMP_ERROR;
	}
	if (!cfg->ztunnel_ifindex)
		return drop(me, REASON_NO_ZTUNNEL, skb, p);
	return to_peer(me, reason, cfg->ztunnel_ifindex);
}

SEC("classifier")
int app_outbound(struct __sk_buff *skb)
{
	const __u32 me = PROG_APP_OUTBOUND;
	struct config *cfg = get_config();
	struct packet p;
	struct flow flow;
	struct pod *pod;
	enum age age;

	parse(skb, &p);
	if (!cfg)
		return drop(me, REASON_NO_ZTUNNEL, skb, &p);
	if (p.kind == KIND_OTHER)
		return other_than_ip(skb, &p);
	if (p.kind == KIND_MALFORMED)
		return drop(me, REASON_MALFORMED, skb, &p);
	if (p.kind == KIND_IP) {
		__u32 refused = refused_packet(skb, &p);

		if (refused)
			return drop(me, refused, skb, &p);
		if (stays_on_link(&p))
			return next(me, REASON_PASSED);
	}
	pod = get_pod(&p.saddr);
	if (!pod || pod->ifindex != skb->ifindex)
		return drop(me, p.v6 && !pod ? REASON_IPV6 : REASON_SPOOFED, skb, &p);
	if (p.kind != KIND_TCP)
		return other_than_tcp(skb, &p, cfg, pod);
	if (p.fragment)
		return drop(me, REASON_FRAGMENT, skb, &p);
	if (p.options)
		return drop(me, REASON_OPTIONS, skb, &p);
	flow_from(&flow, &p);
	age = age_of(pod, &p, &flow);
	if (age == OLDER)
		return next(me, REASON_OLDER);
	if (!is_dns_over_tcp(cfg, &p) && is_node_address(&p.daddr) && is_with_node(pod, &p, &flow))
		return next(me, REASON_HOST);
	if (age == UNKNOWN)
		return drop(me, REASON_ENROLLING, skb, &p);
	if (!cfg->ztunnel_ifindex)
		return drop(me, REASON_NO_ZTUNNEL, skb, &p);
	/* The same ends may once have met by way of the stack, and not be told apart from it. */
	if (p.syn && pod->stack_flows) {
		flow_to(&flow, &p);
		bpf_map_delete_elem(&stack_flows, &flow);
	}
	return to_peer(me, REASON_REDIRECTED, cfg->ztunnel_ifindex);
}

/*
 * TCP with the address of a mesh pod of this node that the stack delivers to another: a node port
 * or service address that was translated without masquerading. The address is that pod's if the
 * packet came from it, or from ztunnel, which speaks for it. For ztunnel it is inbound plain text
 * all the same, whose answer must meet the translation.
 */
static __always_inline int is_by_stack(const struct __sk_buff *skb, const struct config *cfg,
				       struct pod *sender, const struct flow *flow)
{
	if (skb->ingress_ifindex != sender->ifindex && skb->ingress_ifindex != cfg->ztunnel_ifindex)
		return 0;
	if (stack_flow(sender, flow) != FLOW_OF_ZTUNNEL)
		note_stack_flow(sender, flow, FLOW_OF_ZTUNNEL);
	return 1;
}

/* Whether it is of a connection that the pod has with an address of the node, see is_with_node. */
static __always_inline int is_answer_to_pod(const struct packet *p, const struct pod *pod,
					    const struct flow *flow)
{
	if (stack_flow(pod, flow) != FLOW_OF_POD)
		return 0;
	if (!p->syn)
		return 1;
	bpf_map_delete_elem(&stack_flows, flow);
	return 0;
}

/* TCP that the node's stack delivers to a pod for someone else. */
static __always_inline int forwarded_to_app(struct __sk_buff *skb, const struct packet *p,
					    const struct config *cfg)
{
	const __u32 me = PROG_APP_INBOUND;
	struct pod *pod = get_pod(&p->daddr), *sender = get_pod(&p->saddr);
	enum age age = NEW;
	struct flow flow;

	if (p->fragment)
		return drop(me, REASON_FRAGMENT, skb, p);
	if (p->options)
		return drop(me, REASON_OPTIONS, skb, p);
	if (!pod && p->v6)
		return drop(me, REASON_IPV6, skb, p);
	if (sender) {
		/* Of two mesh pods either may have been captured first. */
		flow_from(&flow, p);
		if (age_of(sender, p, &flow) == OLDER)
			return next(me, REASON_OLDER);
	}
	flow_to(&flow, p);
	if (pod)
		age = age_of(pod, p, &flow);
	if (age == OLDER)
		return next(me, REASON_OLDER);
	if (sender && !is_by_stack(skb, cfg, sender, &flow))
		return drop(me, REASON_SPOOFED, skb, p);
	if (!sender && pod && is_answer_to_pod(p, pod, &flow))
		return next(me, REASON_HOST);
	if (age == UNKNOWN)
		return drop(me, REASON_ENROLLING, skb, p);
	if (!cfg->ztunnel_ifindex)
		return drop(me, REASON_NO_ZTUNNEL, skb, p);
	return to_ztunnel_by_egress(skb, REASON_REDIRECTED, cfg, p);
}

SEC("classifier")
int app_inbound(struct __sk_buff *skb)
{
	const __u32 me = PROG_APP_INBOUND;
	struct config *cfg = get_config();
	struct packet p;
	struct flow flow;

	parse(skb, &p);
	if (!cfg)
		return drop(me, REASON_NO_ZTUNNEL, skb, &p);
	if (p.kind == KIND_OTHER) {
		__u32 refused = refused_frame(skb);

		return refused ? drop(me, refused, skb, &p) : next(me, REASON_PASSED);
	}
	if (p.kind == KIND_MALFORMED)
		return drop(me, REASON_MALFORMED, skb, &p);
	if (cfg->ztunnel_ifindex && is_error_for_ztunnel(skb, &p))
		return to_ztunnel_by_egress(skb, REASON_ICMP_ERROR, cfg, &p);
	if (p.kind != KIND_TCP)
		return next(me, REASON_PASSED);
	/* Sent by a socket of the node itself (also TIME_WAIT answers, which have no struct
	 * socket), and not forwarded for someone else. With another's address it is a reset that
	 * a filter rule made on the node, for whoever sent what it refuses. */
	if (skb->ingress_ifindex == 0 && is_node_address(&p.saddr)) {
		flow_to(&flow, &p);
		if (p.syn)
			bpf_map_delete_elem(&node_flows, &flow);
		return next(me, REASON_HOST);
	}
	return forwarded_to_app(skb, &p, cfg);
}

static __always_inline int is_underlay(const struct config *cfg, __u32 ifindex)
{
	for (int i = 0; i < MAX_UNDERLAYS; i++)
		if (cfg->underlays[i] == ifindex)
			return 1;
	return 0;
}

/*
 * HBONE with a pod of another node: out of the underlay without the node's stack. The route
 * decides, so that a pod of this node outside the mesh (in the same CIDR) takes the stack, and so
 * does what is too large for the way, so that the stack says so. What is not HBONE may have been
 * translated or be about to.
 */
static __always_inline int to_other_node(struct __sk_buff *skb, const struct packet *p,
					 const struct config *cfg)
{
	const __u32 me = PROG_ZTUNNEL_HOST;
	struct bpf_fib_lookup fib = {
		.ifindex = skb->ifindex,
		.l4_protocol = IPPROTO_TCP,
		/* Of each packet that a large one will be cut into. */
		.tot_len = skb->gso_size ? skb->gso_size + p->headers :
					   skb->len - sizeof(struct ethhdr),
	};
	struct ethhdr *eth;
	long ret;

	if (!is_hbone(p->dport, p->sport) || !in_pod_cidrs(&p->daddr))
		return next(me, REASON_PASSED);
	if (p->v6) {
		fib.family = AF_INET6;
		__builtin_memcpy(fib.ipv6_src, &p->saddr, sizeof(fib.ipv6_src));
		__builtin_memcpy(fib.ipv6_dst, &p->daddr, sizeof(fib.ipv6_dst));
	} else {
		fib.family = AF_INET;
		fib.ipv4_src = p->saddr.w[3];
		fib.ipv4_dst = p->daddr.w[3];
	}
	ret = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	if ((ret != BPF_FIB_LKUP_RET_SUCCESS && ret != BPF_FIB_LKUP_RET_NO_NEIGH) ||
	    !is_underlay(cfg, fib.ifindex))
		return next(me, REASON_PASSED);
	if (ret == BPF_FIB_LKUP_RET_NO_NEIGH) {
		count(me, REASON_REDIRECTED);
		return bpf_redirect_neigh(fib.ifindex, 0, 0, 0);
	}
	eth = frame_start(skb);
	if ((void *)(eth + 1) > frame_end(skb))
		return drop(me, REASON_MALFORMED, skb, p);
	__builtin_memcpy(eth->h_dest, fib.dmac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, fib.smac, ETH_ALEN);
	count(me, REASON_REDIRECTED);
	return bpf_redirect(fib.ifindex, 0);
}

SEC("classifier")
int ztunnel_host(struct __sk_buff *skb)
{
	const __u32 me = PROG_ZTUNNEL_HOST;
	struct config *cfg = get_config();
	struct packet p;
	struct flow flow;
	struct pod *pod;

	parse(skb, &p);
	if (!cfg)
		return drop(me, REASON_NO_ZTUNNEL, skb, &p);
	if (p.kind == KIND_IP && is_dns_answer(cfg, &p)) {
		pod = get_pod(&p.daddr);
		return pod ? to_peer(me, REASON_DNS, pod->ifindex) : next(me, REASON_PASSED);
	}
	/* ztunnel's own stack sends no fragments or options; what is odd takes the stack, where
	 * app_inbound drops it if it is for a pod. */
	if (p.kind != KIND_TCP || p.fragment || p.options)
		return next(me, REASON_PASSED);
	pod = get_pod(&p.daddr);
	if (!pod)
		return to_other_node(skb, &p, cfg);
	/* An answer to what came by the stack. */
	flow_from(&flow, &p);
	if (stack_flow(pod, &flow) == FLOW_OF_ZTUNNEL)
		return next(me, REASON_PASSED);
	if (p.syn && is_node_address(&p.saddr)) {
		__u8 one = 1;

		flow_to(&flow, &p);
		bpf_map_update_elem(&node_flows, &flow, &one, BPF_ANY);
	}
	return to_peer(me, REASON_REDIRECTED, pod->ifindex);
}

/*
 * Whether TCP or a DNS query with a pod's address may come to ztunnel by the node's stack: of a
 * connection older than the pod's capture, or one that app_inbound has let by (is_by_stack).
 */
static __always_inline int may_come_by_stack(const struct packet *p, struct pod *sender)
{
	struct flow flow;

	if (p->kind != KIND_TCP || p->fragment || p->options)
		return 0;
	flow_from(&flow, p);
	if (age_of(sender, p, &flow) == OLDER)
		return 1;
	flow_to(&flow, p);
	return stack_flow(sender, &flow) == FLOW_OF_ZTUNNEL;
}

/*
 * Pods' packets come to ztunnel past the stack and this hook. What comes by it with a pod's address
 * was forged outside: opened out of a tunnel by the node, or bridged.
 */
SEC("classifier")
int ztunnel_guard(struct __sk_buff *skb)
{
	const __u32 me = PROG_ZTUNNEL_GUARD;
	struct config *cfg = get_config();
	struct packet p;
	struct pod *sender;

	parse(skb, &p);
	if (!cfg)
		return drop(me, REASON_NO_ZTUNNEL, skb, &p);
	if (p.kind == KIND_OTHER) {
		__u32 refused = refused_frame(skb);

		return refused ? drop(me, refused, skb, &p) : next(me, REASON_PASSED);
	}
	if (p.kind == KIND_MALFORMED)
		return drop(me, REASON_MALFORMED, skb, &p);
	if (p.kind != KIND_TCP && !is_dns_query(cfg, &p))
		return next(me, REASON_PASSED);
	sender = get_pod(&p.saddr);
	if (sender && !may_come_by_stack(&p, sender))
		return drop(me, REASON_SPOOFED, skb, &p);
	return next(me, REASON_PASSED);
}

SEC("classifier")
int underlay_ingress(struct __sk_buff *skb)
{
	const __u32 me = PROG_UNDERLAY;
	struct config *cfg = get_config();
	struct packet p;
	struct flow flow;
	struct pod *pod;
	enum age age = NEW;

	parse(skb, &p);
	/* Without configuration nothing is diverted here; app_inbound still guards the pods. */
	if (!cfg || (p.kind != KIND_TCP && p.kind != KIND_IP))
		return next(me, REASON_PASSED);
	/* Nodes' own tunnels have nodes' addresses at both ends. */
	if (p.kind == KIND_IP && carries_packet(skb, &p) && is_for_a_node(&p) &&
	    in_pod_cidrs(&p.saddr))
		return drop(me, REASON_ENCAPSULATED, skb, &p);
	pod = get_pod(&p.daddr);
	if (!pod && !is_ztunnel_address(cfg, &p.daddr))
		return next(me, REASON_PASSED);
	if (get_pod(&p.saddr))
		return drop(me, REASON_SPOOFED, skb, &p);
	if (cfg->ztunnel_ifindex && is_error_about_hbone(skb, &p))
		return to_peer(me, REASON_ICMP_ERROR, cfg->ztunnel_ifindex);
	if (p.kind != KIND_TCP)
		return next(me, REASON_PASSED);
	if (p.fragment)
		return drop(me, REASON_FRAGMENT, skb, &p);
	if (p.options)
		return drop(me, REASON_OPTIONS, skb, &p);
	/* As ztunnel_host does in the other direction: what is no HBONE between pods takes the
	 * stack, and is caught at the pod's interface. */
	if (!is_hbone(p.dport, p.sport) || !in_pod_cidrs(&p.saddr))
		return next(me, REASON_PASSED);
	if (pod) {
		flow_to(&flow, &p);
		age = age_of(pod, &p, &flow);
	}
	if (age == OLDER)
		return next(me, REASON_OLDER);
	if (age == UNKNOWN)
		return drop(me, REASON_ENROLLING, skb, &p);
	if (!cfg->ztunnel_ifindex)
		return drop(me, REASON_NO_ZTUNNEL, skb, &p);
	return to_peer(me, REASON_REDIRECTED, cfg->ztunnel_ifindex);
}

/*
 * Stands where app_outbound and app_inbound would. Nothing passes, ARP and neighbour discovery
 * neither: whose addresses this pod may speak of is what is in doubt, and what cannot be sent to
 * needs no neighbour.
 */
SEC("classifier")
int cut_off(struct __sk_buff *skb)
{
	struct packet p;

	parse(skb, &p);
	return drop(PROG_CUT_OFF, REASON_CUT_OFF, skb, &p);
}

/* Half of the files' dual licence; some helpers are for GPL-compatible programs only. */
char _license[] SEC("license") = "GPL";
