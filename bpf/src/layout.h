/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What the programs and user space (bpf/redirect/src/ebpf/layout.rs) both know:
 * roles, sizes, map values and counters. A change here is a change there.
 */
#ifndef ZT_LAYOUT_H
#define ZT_LAYOUT_H

#include <linux/types.h>

/* Listener roles; the key of `listeners` is role * MAX_CPUS + cpu. */
enum role { ROLE_OUTBOUND, ROLE_INBOUND_PLAIN, ROLE_INBOUND_HBONE, ROLE_COUNT };

#define MAX_CPUS 1024
#define MAX_PODS 4096
#define MAX_POD_CIDRS 64
#define MAX_UNDERLAYS 8
#define MAX_NODE_ADDRS 16
#define MAX_NODE_FLOWS 65536

#define PORT_OUTBOUND 15001
#define PORT_INBOUND_PLAIN 15006
#define PORT_INBOUND_HBONE 15008

/* One value, index 0. Addresses are in network byte order. */
struct config {
	__u32 ztunnel_ifindex;		/* ztunnel's interface on the node; 0: no ztunnel, drop */
	__be32 ztunnel_addr;
	__be32 node_addrs[MAX_NODE_ADDRS];	/* the node's own, the rest 0 */
	__u32 underlays[MAX_UNDERLAYS];	/* ifindex of each underlay interface, the rest 0 */
	__u8 ztunnel_mac[6];		/* of the interface inside ztunnel's netns */
	__u8 pad[2];
};

/* Value of `pods`, keyed by the pod's IPv4 address in network byte order. */
struct pod {
	__u32 ifindex;			/* host-side interface */
};

/* Key of `node_flows`: a connection ztunnel made to a pod with an address of the node. */
struct node_flow {
	__be32 pod_addr;
	__be32 node_addr;
	__be16 pod_port;
	__be16 node_port;
};

/* Counter index is program * REASON_COUNT + reason. */
enum program { PROG_APP_OUTBOUND, PROG_APP_INBOUND, PROG_ZTUNNEL_HOST, PROG_UNDERLAY,
	       PROG_ZTUNNEL_INGRESS, PROG_COUNT };

enum reason {
	REASON_PASSED,		/* not for the mesh: left to the stack */
	REASON_REDIRECTED,	/* to ztunnel, to a pod or to the underlay; a listener chosen */
	REASON_HOST,		/* to or from the node itself: exempt */
	REASON_SPOOFED,		/* dropped: source address is not the sender's */
	REASON_FRAGMENT,	/* dropped: TCP fragment */
	REASON_OPTIONS,		/* dropped: TCP with IP options */
	REASON_IPV6,		/* dropped: IPv6 is not captured and must not be a way around */
	REASON_MALFORMED,	/* dropped: headers shorter than they must be */
	REASON_NO_ZTUNNEL,	/* dropped: no configuration or no ztunnel */
	REASON_NO_LISTENER,	/* dropped: ztunnel has no listener for this role */
	REASON_CAPTURE_PORT,	/* dropped: a capture port addressed directly */
	REASON_ICMP_ERROR,	/* ICMP error about a connection of ztunnel: redirected to it */
	REASON_COUNT
};

#endif
