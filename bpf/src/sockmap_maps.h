/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Maps of sockmap.bpf.c, and what is in them. Sizes are repeated in
 * bpf/redirect/src/sockmap/layout.rs.
 */
#ifndef ZT_SOCKMAP_MAPS_H
#define ZT_SOCKMAP_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "sockmap.h"

/* What a socket is known by to its peer. */
struct end {
	__u64 sock;		/* struct sock *, never dereferenced but by probe reads */
	__u64 cookie;		/* tells whether it still is the same socket */
	__u32 flags;
	__u32 pad;
};

#define END_STARTED 1		/* something was redirected to it */
#define END_CLOSED 2		/* nothing may be, if nothing was */

enum mode { MODE_NEW, MODE_SHORTCUT, MODE_TCP };

/* The direction that begins in a socket. */
struct direction {
	struct end_key self;
	struct end_key peer;
	__u64 own_sock;
	__u64 peer_sock;
	__u64 peer_cookie;
	__u64 asked_ns;
	__u32 attempts;
	__u8 mode;
	__u8 from_ztunnel;
	__u16 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct shortcut_config);
} shortcut_config SEC(".maps");

/* Value: cookie of the pod's network namespace. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, SHORTCUT_PODS_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct pod_key);
	__type(value, __u64);
} shortcut_pods SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, SOCKETS_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct end_key);
	__type(value, struct end);
} shortcut_ends SEC(".maps");

/* Servers whose accepted sockets were found to block: a namespace and a port. */
struct server {
	__u64 netns;
	__u32 port;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, SERVERS_MAX);
	__type(key, struct server);
	__type(value, __u8);
} shortcut_blocking SEC(".maps");

/* A value of eight bytes lets user space look whether a socket is in it. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, SOCKETS_MAX);
	__type(key, struct end_key);
	__type(value, __u64);
} shortcut_senders SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, SOCKETS_MAX);
	__type(key, struct end_key);
	__type(value, __u32);
} shortcut_targets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct direction);
} shortcut_directions SEC(".maps");

/* Of ztunnel's sockets. What a listener accepts begins with a copy of its mark. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, struct mark);
} shortcut_marks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, SHORTCUT_EVENT_BYTES);
} shortcut_events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SHORTCUT_COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} shortcut_counters SEC(".maps");

#endif
