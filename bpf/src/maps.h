/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The maps all programs share. User space pins each under its name. */
#ifndef ZT_MAPS_H
#define ZT_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "layout.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct config);
} config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PODS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, struct pod);
} pods SEC(".maps");

struct cidr {
	__u32 prefix_len;
	struct addr addr;
};

/* Addresses of pods of the whole cluster: HBONE between them goes past the nodes' stacks. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, MAX_POD_CIDRS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct cidr);
	__type(value, __u32);
} pod_cidrs SEC(".maps");

/* All local addresses of the node's namespace but loopback and link-local ones. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_NODE_ADDRS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, __u8);
} node_addrs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, ROLE_COUNT * MAX_CPUS);
	__type(key, __u32);
	__type(value, __u32);
} listeners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_NODE_FLOWS);
	__type(key, struct flow);
	__type(value, __u8);
} node_flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_STACK_FLOWS);
	__type(key, struct flow);
	__type(value, __u8);
} stack_flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_OLDER_FLOWS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct flow);
	__type(value, __u8);
} older_flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PROG_COUNT * REASON_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, EVENT_BYTES_MAX);
} events SEC(".maps");

static __always_inline void count(__u32 program, __u32 reason)
{
	__u32 key = program * REASON_COUNT + reason;
	__u64 *value = bpf_map_lookup_elem(&counters, &key);

	if (value)
		(*value)++;
}

static __always_inline struct config *get_config(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&config, &key);
}

static __always_inline struct pod *get_pod(const struct addr *addr)
{
	return bpf_map_lookup_elem(&pods, addr);
}

/* The last word first: it is the one that differs. */
static __always_inline int same_addr(const struct addr *a, const struct addr *b)
{
	return a->w[3] == b->w[3] && a->w[2] == b->w[2] && a->w[1] == b->w[1] && a->w[0] == b->w[0];
}

static __always_inline int is_link_local(const struct addr *addr)
{
	return (addr->w[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* From a pod's interface a link-local address is the node's: nothing else is on that link. */
static __always_inline int is_node_address(const struct addr *addr)
{
	return bpf_map_lookup_elem(&node_addrs, addr) || is_link_local(addr);
}

static __always_inline int in_pod_cidrs(const struct addr *addr)
{
	struct cidr key = { .prefix_len = 128, .addr = *addr };

	return bpf_map_lookup_elem(&pod_cidrs, &key) != 0;
}

static __always_inline int is_ztunnel_address(const struct config *cfg, const struct addr *addr)
{
	return same_addr(&cfg->ztunnel_addrs[0], addr) || same_addr(&cfg->ztunnel_addrs[1], addr);
}

#endif
