/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What sockmap.bpf.c and user space (bpf/redirect/src/sockmap/layout.rs) both know. A change here
 * is a change there.
 */
#ifndef ZT_SOCKMAP_H
#define ZT_SOCKMAP_H

#include <linux/types.h>

/* Sockets at one time, both ends of a connection counted. */
#define SOCKETS_MAX 65536
#define SHORTCUT_PODS_MAX 65536
#define SERVERS_MAX 4096
#define SHORTCUT_EVENT_BYTES (1 << 18)

/* What may wait unread in a receiver, at most; less if its receive buffer is smaller. */
#define BUDGET_BYTES (256 * 1024)

/* A socket: its own view of the connection, IPv4 mapped into IPv6, ports in host order. */
struct end_key {
	__be32 local[4];
	__be32 remote[4];
	__u32 local_port;
	__u32 remote_port;
	__u64 netns;		/* cookie */
};

/*
 * On a socket of ztunnel's: it may be entered. User space puts it there, all zero, before the
 * socket connects or accepts.
 */
struct mark {
	__u32 senders;		/* id of the map it was entered into; 0: it was not, nor will be */
	__u32 pad;
	struct end_key self;	/* its key there */
};

/* An IPv4 (mapped) or IPv6 address of a pod. */
struct pod_key {
	__be32 addr[4];
};

#define SHORTCUT_ENABLED 1	/* new connections, and messages of the old ones */
#define SHORTCUT_FORCED 2	/* for user space: the kernel has a defect */

struct shortcut_config {
	__u64 ztunnel_netns;	/* cookie */
	__u32 flags;
	__u32 memory_pages_max;	/* of all TCP sockets of the machine; 0: the kernel's limit only */
};

/* Why a direction went back to TCP, or never left it. Also indexes of `shortcut_counters`. */
enum shortcut_counter {
	COUNT_TO_ZTUNNEL_MESSAGES,
	COUNT_TO_ZTUNNEL_BYTES,
	COUNT_TO_POD_MESSAGES,
	COUNT_TO_POD_BYTES,
	COUNT_BYPASSED_BYTES,	/* sent over TCP by a socket that is in the map */
	COUNT_SOCKETS,		/* put into the map */
	COUNT_REFUSED,		/* not put there: blocking, MPTCP, no mark, no peer, or it is full */
	COUNT_DEMOTED_BUDGET,	/* the receiver had too much unread */
	COUNT_DEMOTED_PRESSURE,	/* the kernel is short of memory for TCP, or TCP has its bound */
	COUNT_DEMOTED_BLOCKING,	/* the application's socket blocks */
	COUNT_DEMOTED_NO_PEER,	/* the other end is not in the map, or not any more */
	COUNT_DEMOTED_CLOSED,	/* the other direction was given back to TCP */
	SHORTCUT_COUNTERS
};

enum shortcut_event_kind {
	EVENT_DEMOTED,		/* no more short-cuts from `self` to `peer`, nor back */
	EVENT_DRAINED,		/* `self` uses TCP and has nothing redirected unread */
};

/* Bits of shortcut_event.started: which ends may hold redirected data. */
#define STARTED_SELF 1
#define STARTED_PEER 2

struct shortcut_event {
	__u64 when_ns;		/* CLOCK_MONOTONIC */
	__u32 kind;
	__u32 started;
	struct end_key self;
	struct end_key peer;
};

#endif
