/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The socket lookup in ztunnel's namespace: which listener a new connection gets. */
#ifndef ZT_LISTENER_H
#define ZT_LISTENER_H

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "flows.h"
#include "layout.h"
#include "maps.h"
#include "packet.h"
#include "verdict.h"

struct ends {
	struct addr local, remote;
};

static __always_inline int refuse(const struct bpf_sk_lookup *ctx, const struct ends *ends,
				  __u32 reason)
{
	struct event event = {
		.saddr = ends->remote,
		.daddr = ends->local,
		.sport = (__be16)ctx->remote_port,
		.dport = bpf_htons((__u16)ctx->local_port),
		.program = PROG_ZTUNNEL_INGRESS,
		.reason = reason,
		.protocol = ctx->protocol,
	};

	report(&event);
	return SK_DROP;
}

static __always_inline int ends_of(const struct bpf_sk_lookup *ctx, struct ends *ends)
{
	if (ctx->family == AF_INET) {
		set_ipv4(&ends->local, ctx->local_ip4);
		set_ipv4(&ends->remote, ctx->remote_ip4);
		return 0;
	}
	if (ctx->family != AF_INET6)
		return -1;
	for (int i = 0; i < 4; i++) {
		ends->local.w[i] = ctx->local_ip6[i];
		ends->remote.w[i] = ctx->remote_ip6[i];
	}
	return 0;
}

static __always_inline int is_loopback(const struct addr *addr)
{
	if (is_mapped(addr))
		return (addr->w[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return addr->w[3] == bpf_htonl(1) && !addr->w[2] && !addr->w[1] && !addr->w[0];
}

static __always_inline int is_capture_port(__u32 port)
{
	return port == PORT_OUTBOUND || port == PORT_INBOUND_PLAIN || port == PORT_INBOUND_HBONE;
}

/* By way of the stack, see is_by_stack: not what the pod at the other end sends out. */
static __always_inline int is_inbound_by_stack(const struct bpf_sk_lookup *ctx,
					       const struct ends *ends, const struct pod *dialler)
{
	struct flow flow = {
		.pod_addr = ends->local,
		.peer_addr = ends->remote,
		.pod_port = bpf_htons((__u16)ctx->local_port),
		.peer_port = (__be16)ctx->remote_port,
	};

	return ctx->protocol == IPPROTO_TCP && stack_flow(dialler, &flow) == FLOW_OF_ZTUNNEL;
}

/*
 * Runs for new connections only: established sockets, half-open ones and TIME_WAIT are matched
 * before it. The worker on this CPU gets the connection; NO_REUSEPORT, so that the kernel does
 * not pick another member of the listener's group. For UDP it runs for each DNS query.
 */
SEC("sk_lookup")
int ztunnel_ingress(struct bpf_sk_lookup *ctx)
{
	struct config *cfg = get_config();
	__u32 port = ctx->local_port, cpu = bpf_get_smp_processor_id(), key, role;
	int tcp = ctx->protocol == IPPROTO_TCP, dns, from_pod;
	struct bpf_sock *sk;
	struct ends ends;
	struct pod *pod;
	long err;

	if (ends_of(ctx, &ends))
		return SK_PASS;
	if (!cfg)
		return tcp ? refuse(ctx, &ends, REASON_NO_ZTUNNEL) : SK_PASS;
	dns = (cfg->flags & CONFIG_DNS) && port == PORT_DNS;
	if (!tcp && !dns)
		return SK_PASS;
	/* ztunnel's own addresses: administration, metrics, readiness. The capture ports have no
	 * business there: whoever dials them directly would choose the direction himself. */
	if (is_ztunnel_address(cfg, &ends.local) || is_loopback(&ends.local) ||
	    is_link_local(&ends.local)) {
		if (tcp && is_capture_port(port))
			return refuse(ctx, &ends, REASON_CAPTURE_PORT);
		count(PROG_ZTUNNEL_INGRESS, REASON_PASSED);
		return SK_PASS;
	}
	pod = get_pod(&ends.remote);
	from_pod = pod && !is_inbound_by_stack(ctx, &ends, pod);
	if (!tcp && !from_pod)
		return SK_PASS;
	if (!from_pod)
		role = port == PORT_INBOUND_HBONE ? ROLE_INBOUND_HBONE : ROLE_INBOUND_PLAIN;
	else if (dns)
		role = tcp ? ROLE_DNS_TCP : ROLE_DNS_UDP;
	else
		role = ROLE_OUTBOUND;
	if (cpu >= MAX_CPUS)
		cpu = 0;
	key = role * MAX_CPUS + cpu;
	sk = bpf_map_lookup_elem(&listeners, &key);
	if (!sk && cpu) {
		key = role * MAX_CPUS;
		sk = bpf_map_lookup_elem(&listeners, &key);
	}
	if (!sk)
		return refuse(ctx, &ends, REASON_NO_LISTENER);
	err = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
	bpf_sk_release(sk);
	if (err)
		return refuse(ctx, &ends, REASON_NO_LISTENER);
	count(PROG_ZTUNNEL_INGRESS, dns && from_pod ? REASON_DNS : REASON_REDIRECTED);
	return SK_PASS;
}

#endif
