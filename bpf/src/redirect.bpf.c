// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Redirection of mesh pods' TCP through the node's ztunnel.
 *
 *   app_outbound     tc ingress of a pod's host interface: what the pod sends
 *   app_inbound      tc egress of it: what the node's stack delivers to the pod (fallback)
 *   ztunnel_host     tc ingress of ztunnel's host interface: what ztunnel sends
 *   underlay_ingress tc ingress of the underlay: what comes from other nodes
 *   ztunnel_ingress  sk_lookup in ztunnel's netns: which listener a new connection gets
 *
 * Rules that hold throughout:
 * - ztunnel takes a connection's direction and the workload's identity from its source address,
 *   so no packet may reach ztunnel with a pod's address that did not come from that pod's
 *   interface. Three programs check it, one for each way in.
 * - What should be captured and cannot be (fragments, IP options, IPv6, no ztunnel, no listener)
 *   is dropped, never let around the mesh. A fragment or option that the stack would accept and
 *   these programs cannot steer would be a bypass; real TCP stacks send neither.
 * - ARP, ICMP, ICMPv6 (neighbour discovery included), UDP and other IPv4 protocols are not the
 *   mesh's and pass, except from a spoofed source.
 * - "Not mine" is TCX_NEXT, so that programs attached after these still see the packet.
 * - Forwarding here does not decrement the TTL; each packet crosses at most once per node.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#include "layout.h"
#include "maps.h"
#include "packet.h"

#ifndef AF_INET
#define AF_INET 2
#endif

static __always_inline int next(__u32 program, __u32 reason)
{
	count(program, reason);
	return ZT_NEXT;
}

static __always_inline int drop(__u32 program, __u32 reason)
{
	count(program, reason);
	return ZT_DROP;
}

static __always_inline int to_peer(__u32 program, __u32 reason, __u32 ifindex)
{
	count(program, reason);
	return bpf_redirect_peer(ifindex, 0);
}

/* From an egress hook there is no redirect_peer: across the veth, with ztunnel's MAC. */
static __always_inline int to_ztunnel_by_egress(struct __sk_buff *skb, __u32 reason,
						const struct config *cfg)
{
	if (bpf_skb_store_bytes(skb, 0, cfg->ztunnel_mac, sizeof(cfg->ztunnel_mac), 0))
		return drop(PROG_APP_INBOUND, REASON_MALFORMED);
	count(PROG_APP_INBOUND, reason);
	return bpf_redirect(cfg->ztunnel_ifindex, 0);
}

static __always_inline int is_ztunnels_icmp_error(struct __sk_buff *skb, const struct packet *p,
						  const struct config *cfg)
{
	__be32 to = icmp_error_about(skb, p);

	return to && !is_node_address(cfg, to) && cfg->ztunnel_ifindex;
}

SEC("classifier")
int app_outbound(struct __sk_buff *skb)
{
	const __u32 me = PROG_APP_OUTBOUND;
	struct config *cfg = get_config();
	struct packet p;
	struct pod *pod;

	if (!cfg)
		return drop(me, REASON_NO_ZTUNNEL);
	parse(skb, &p);
	if (p.kind == KIND_OTHER)
		return next(me, REASON_PASSED);
	if (p.kind == KIND_MALFORMED)
		return drop(me, REASON_MALFORMED);
	if (p.kind == KIND_IPV6)
		return p.protocol == IPPROTO_ICMPV6 ? next(me, REASON_PASSED) :
						      drop(me, REASON_IPV6);
	pod = get_pod(p.saddr);
	if (!pod || pod->ifindex != skb->ifindex)
		return drop(me, REASON_SPOOFED);
	if (p.kind != KIND_TCP)
		return next(me, REASON_PASSED);
	if (p.fragment)
		return drop(me, REASON_FRAGMENT);
	if (p.options)
		return drop(me, REASON_OPTIONS);
	if (!cfg->ztunnel_ifindex)
		return drop(me, REASON_NO_ZTUNNEL);
	if (is_node_address(cfg, p.daddr)) {
		/* The node's own traffic is exempt, but ztunnel may be speaking with the node's
		 * address: for traffic the node masqueraded on its way to a pod. */
		struct node_flow flow = { .pod_addr = p.saddr, .node_addr = p.daddr,
					  .pod_port = p.sport, .node_port = p.dport };

		if (!bpf_map_lookup_elem(&node_flows, &flow))
			return next(me, REASON_HOST);
	}
	return to_peer(me, REASON_REDIRECTED, cfg->ztunnel_ifindex);
}

SEC("classifier")
int app_inbound(struct __sk_buff *skb)
{
	const __u32 me = PROG_APP_INBOUND;
	struct config *cfg = get_config();
	/* Sent by a socket of the node itself (also TIME_WAIT answers, which have no struct
	 * socket), and not forwarded for someone else. */
	int from_node = skb->ingress_ifindex == 0;
	struct packet p;

	if (!cfg)
		return drop(me, REASON_NO_ZTUNNEL);
	parse(skb, &p);
	if (p.kind == KIND_OTHER)
		return next(me, REASON_PASSED);
	if (p.kind == KIND_MALFORMED)
		return drop(me, REASON_MALFORMED);
	if (p.kind == KIND_IPV6) {
		if (from_node)
			return next(me, REASON_HOST);
		return p.protocol == IPPROTO_ICMPV6 ? next(me, REASON_PASSED) :
						      drop(me, REASON_IPV6);
	}
	if (is_ztunnels_icmp_error(skb, &p, cfg))
		return to_ztunnel_by_egress(skb, REASON_ICMP_ERROR, cfg);
	if (p.kind != KIND_TCP)
		return next(me, REASON_PASSED);
	if (from_node) {
		struct node_flow flow = { .pod_addr = p.daddr, .node_addr = p.saddr,
					  .pod_port = p.dport, .node_port = p.sport };

		if (p.syn)
			bpf_map_delete_elem(&node_flows, &flow);
		return next(me, REASON_HOST);
	}
	if (p.fragment)
		return drop(me, REASON_FRAGMENT);
	if (p.options)
		return drop(me, REASON_OPTIONS);
	/* A mesh pod's own TCP never takes the stack to another mesh pod, so this is either a
	 * pod outside the mesh using a mesh pod's address or a node port dialled by a mesh pod
	 * without masquerading, whose answer could not be translated back. */
	if (get_pod(p.saddr))
		return drop(me, REASON_SPOOFED);
	if (!cfg->ztunnel_ifindex)
		return drop(me, REASON_NO_ZTUNNEL);
	return to_ztunnel_by_egress(skb, REASON_REDIRECTED, cfg);
}

static __always_inline int is_underlay(const struct config *cfg, __u32 ifindex)
{
	for (int i = 0; i < MAX_UNDERLAYS; i++)
		if (cfg->underlays[i] == ifindex)
			return 1;
	return 0;
}

/*
 * A pod of another node: out of the underlay without the node's stack. The route decides, so
 * that a pod of this node outside the mesh (in the same CIDR) takes the stack, and so does what
 * leaves the cluster, which may need masquerading.
 */
static __always_inline int to_other_node(struct __sk_buff *skb, const struct packet *p,
					 const struct config *cfg)
{
	const __u32 me = PROG_ZTUNNEL_HOST;
	struct cidr key = { .prefix_len = 32, .addr = p->daddr };
	struct bpf_fib_lookup fib = {
		.family = AF_INET,
		.ipv4_src = p->saddr,
		.ipv4_dst = p->daddr,
		.ifindex = skb->ifindex,
		.l4_protocol = IPPROTO_TCP,
	};
	struct ethhdr *eth;
	long ret;

	if (!bpf_map_lookup_elem(&pod_cidrs, &key))
		return next(me, REASON_PASSED);
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
		return drop(me, REASON_MALFORMED);
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
	struct pod *pod;

	if (!cfg)
		return drop(me, REASON_NO_ZTUNNEL);
	parse(skb, &p);
	/* ztunnel's own stack sends no fragments or options; what is odd takes the stack, where
	 * app_inbound drops it if it is for a pod. */
	if (p.kind != KIND_TCP || p.fragment || p.options)
		return next(me, REASON_PASSED);
	pod = get_pod(p.daddr);
	if (!pod)
		return to_other_node(skb, &p, cfg);
	if (p.syn && is_node_address(cfg, p.saddr)) {
		struct node_flow flow = { .pod_addr = p.daddr, .node_addr = p.saddr,
					  .pod_port = p.dport, .node_port = p.sport };
		__u8 one = 1;

		bpf_map_update_elem(&node_flows, &flow, &one, BPF_ANY);
	}
	return to_peer(me, REASON_REDIRECTED, pod->ifindex);
}

SEC("classifier")
int underlay_ingress(struct __sk_buff *skb)
{
	const __u32 me = PROG_UNDERLAY;
	struct config *cfg = get_config();
	struct packet p;
	struct pod *pod;

	parse(skb, &p);
	/* Without configuration nothing is diverted here; app_inbound still guards the pods. */
	if (!cfg || (p.kind != KIND_TCP && p.kind != KIND_IPV4))
		return next(me, REASON_PASSED);
	pod = get_pod(p.daddr);
	if (!pod && p.daddr != cfg->ztunnel_addr)
		return next(me, REASON_PASSED);
	if (get_pod(p.saddr))
		return drop(me, REASON_SPOOFED);
	if (pod && is_ztunnels_icmp_error(skb, &p, cfg))
		return to_peer(me, REASON_ICMP_ERROR, cfg->ztunnel_ifindex);
	if (p.kind != KIND_TCP)
		return next(me, REASON_PASSED);
	if (p.fragment)
		return drop(me, REASON_FRAGMENT);
	if (p.options)
		return drop(me, REASON_OPTIONS);
	if (!cfg->ztunnel_ifindex)
		return drop(me, REASON_NO_ZTUNNEL);
	return to_peer(me, REASON_REDIRECTED, cfg->ztunnel_ifindex);
}

static __always_inline int lookup_drop(__u32 reason)
{
	count(PROG_ZTUNNEL_INGRESS, reason);
	return SK_DROP;
}

static __always_inline int is_capture_port(__u32 port)
{
	return port == PORT_OUTBOUND || port == PORT_INBOUND_PLAIN || port == PORT_INBOUND_HBONE;
}

/*
 * Runs for new connections only: established sockets, half-open ones and TIME_WAIT are matched
 * before it. The worker on this CPU gets the connection; NO_REUSEPORT, so that the kernel does
 * not pick another member of the listener's group.
 */
SEC("sk_lookup")
int ztunnel_ingress(struct bpf_sk_lookup *ctx)
{
	struct config *cfg = get_config();
	__u32 port = ctx->local_port, cpu = bpf_get_smp_processor_id(), key, role;
	struct bpf_sock *sk;
	long err;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	if (!cfg)
		return lookup_drop(REASON_NO_ZTUNNEL);
	/* ztunnel's own addresses: administration, metrics, readiness. The capture ports have no
	 * business there: whoever dials them directly would choose the direction himself. */
	if (ctx->family != AF_INET || ctx->local_ip4 == cfg->ztunnel_addr ||
	    (ctx->local_ip4 & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000)) {
		if (is_capture_port(port))
			return lookup_drop(REASON_CAPTURE_PORT);
		count(PROG_ZTUNNEL_INGRESS, REASON_PASSED);
		return SK_PASS;
	}
	if (get_pod(ctx->remote_ip4))
		role = ROLE_OUTBOUND;
	else
		role = port == PORT_INBOUND_HBONE ? ROLE_INBOUND_HBONE : ROLE_INBOUND_PLAIN;
	if (cpu >= MAX_CPUS)
		cpu = 0;
	key = role * MAX_CPUS + cpu;
	sk = bpf_map_lookup_elem(&listeners, &key);
	if (!sk && cpu) {
		key = role * MAX_CPUS;
		sk = bpf_map_lookup_elem(&listeners, &key);
	}
	if (!sk)
		return lookup_drop(REASON_NO_LISTENER);
	err = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
	bpf_sk_release(sk);
	if (err)
		return lookup_drop(REASON_NO_LISTENER);
	count(PROG_ZTUNNEL_INGRESS, REASON_REDIRECTED);
	return SK_PASS;
}

/* Half of the files' dual licence; some helpers are for GPL-compatible programs only. */
char _license[] SEC("license") = "GPL";
