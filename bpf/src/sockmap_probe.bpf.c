// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * What the short-cut needs of the kernel is tried out on two sockets before it is used: every
 * message of the one goes to the other (bpf/redirect/src/sockmap/probe.rs).
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} probe_target SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} probe_sender SEC(".maps");

SEC("sk_msg")
int probe_send(struct sk_msg_md *msg)
{
	__u32 key = 0;

	return bpf_msg_redirect_hash(msg, &probe_target, &key, BPF_F_INGRESS);
}

char _license[] SEC("license") = "GPL";
