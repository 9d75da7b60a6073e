/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What the programs and user space (bpf/redirect/src/ebpf/layout.rs) both know:
 * roles, sizes, map values and counters. A change here is a change there.
 */
#ifndef ZT_LAYOUT_H
#define ZT_LAYOUT_H

#include <linux/types.h>

/* Listener roles; the key of `listeners` is role * MAX_CPUS + cpu. */
enum role { ROLE_OUTBOUND, ROLE_INBOUND_PLAIN, ROLE_INBOUND_HBONE, ROLE_DNS_UDP, ROLE_DNS_TCP,
	    ROLE_COUNT };

#define MAX_CPUS 1024
/* Entries take memory when they are made; this bounds the table of buckets (4 MiB). */
#define MAX_PODS 262144
#define MAX_POD_CIDRS 64
#define MAX_UNDERLAYS 8
#define MAX_NODE_ADDRS 4096
#define MAX_NODE_FLOWS 65536
#define MAX_STACK_FLOWS 65536
#define MAX_OLDER_FLOWS 262144
#define EVENT_BYTES_MAX 65536

#define PORT_OUTBOUND 15001
#define PORT_INBOUND_PLAIN 15006
#define PORT_INBOUND_HBONE 15008
#define PORT_DNS 53

/* An IPv6 address, or an IPv4 address as ::ffff:a.b.c.d. Network byte order. */
struct addr {
	__be32 w[4];
};

#define CONFIG_DNS 1		/* pods' DNS queries go to ztunnel */

/* One value, index 0. */
struct config {
	__u32 ztunnel_ifindex;		/* ztunnel's interface on the node; 0: no ztunnel, drop */
	__u32 flags;
	struct addr ztunnel_addrs[2];	/* IPv4 and IPv6, 0 if there is none */
	__u32 underlays[MAX_UNDERLAYS];	/* ifindex of each underlay interface, the rest 0 */
	__u8 ztunnel_mac[6];		/* of the interface inside ztunnel's netns */
	__u8 pad[2];
};

#define POD_OLDER 1		/* has entries in `older_flows` */
#define POD_ENROLLING 2		/* they are still being collected */

/* Value of `pods`, keyed by each of the pod's addresses. */
struct pod {
	__u32 ifindex;			/* host-side interface */
	__u16 flags;
	__u16 stack_flows;		/* by the programs: has made some that are in `stack_flows` */
};

/*
 * A connection of a pod, seen from the pod. Key of `node_flows`: one that ztunnel made to a pod
 * with an address of the node. Key of `older_flows`: one that is older than the pod's capture.
 * Key of `stack_flows`: one that takes the node's stack, where it may be translated, although an
 * address alone would say otherwise; the value says whose it is.
 */
struct flow {
	struct addr pod_addr;
	struct addr peer_addr;
	__be16 pod_port;
	__be16 peer_port;
};

/* Values of `stack_flows`. */
#define FLOW_OF_POD 1		/* the pod dialled an address of its node: exempt */
#define FLOW_OF_ZTUNNEL 2	/* a mesh pod of this node dialled the pod by way of the stack */

/* Counter index is program * REASON_COUNT + reason. */
enum program { PROG_APP_OUTBOUND, PROG_APP_INBOUND, PROG_ZTUNNEL_HOST, PROG_UNDERLAY,
	       PROG_ZTUNNEL_INGRESS, PROG_CUT_OFF, PROG_ZTUNNEL_GUARD, PROG_COUNT };

enum reason {
	REASON_PASSED,		/* not for the mesh: left to the stack */
	REASON_REDIRECTED,	/* to ztunnel, to a pod or to the underlay; a listener chosen */
	REASON_HOST,		/* to or from the node itself: exempt */
	REASON_SPOOFED,		/* dropped: source address is not the sender's */
	REASON_FRAGMENT,	/* dropped: TCP fragment */
	REASON_OPTIONS,		/* dropped: TCP with IP options or IPv6 extension headers */
	REASON_IPV6,		/* dropped: IPv6 address that is not among the pod's */
	REASON_MALFORMED,	/* dropped: headers shorter than they must be */
	REASON_NO_ZTUNNEL,	/* dropped: no configuration or no ztunnel */
	REASON_NO_LISTENER,	/* dropped: ztunnel has no listener for this role */
	REASON_CAPTURE_PORT,	/* dropped: a capture port addressed directly */
	REASON_ICMP_ERROR,	/* ICMP error about a connection of ztunnel: redirected to it */
	REASON_OLDER,		/* connection older than the pod's capture: left to the stack */
	REASON_ENROLLING,	/* dropped while such connections are collected; TCP sends again */
	REASON_DNS,		/* DNS query or its answer: redirected */
	REASON_CUT_OFF,		/* dropped: a pod that cannot be captured */
	REASON_VLAN,		/* dropped: frame with a VLAN tag */
	REASON_ETHERTYPE,	/* dropped: frame that is neither IPv4 nor IPv6 nor ARP */
	REASON_NEIGHBOUR,	/* dropped: ARP or neighbour discovery about another's address */
	REASON_ENCAPSULATED,	/* dropped: a packet in a packet that a node would open */
	REASON_COUNT
};

/* A dropped packet, in the ring buffer `events`. */
struct event {
	struct addr saddr, daddr;
	__be16 sport, dport;	/* 0 if not known */
	__u32 ifindex;
	__u8 program, reason, protocol, pad;
};

#endif
