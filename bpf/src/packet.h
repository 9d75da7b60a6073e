/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Reading of one packet, once, into a plain struct.
 *
 * Headers are pulled into the linear area first: a packet whose headers sit in fragments of the
 * buffer would otherwise look too short here and still be readable to the stack.
 */
#ifndef ZT_PACKET_H
#define ZT_PACKET_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define ZT_NEXT (-1)		/* TCX_NEXT, and TC_ACT_UNSPEC under clsact: the next program decides */
#define ZT_DROP 2		/* TC_ACT_SHOT */

#define IP_MORE_FRAGMENTS 0x2000
#define IP_FRAGMENT_OFFSET 0x1fff

/* <linux/icmp.h> needs the C library's headers, which do not exist for this target. */
#define ZT_ICMP_DEST_UNREACH 3
#define ZT_ICMP_TIME_EXCEEDED 11
#define ZT_ICMP_PARAMETER_PROBLEM 12

struct icmp_header {
	__u8 type, code;
	__sum16 checksum;
	__be32 rest;
};

enum kind {
	KIND_OTHER,		/* neither IPv4 nor IPv6: ARP and the like */
	KIND_MALFORMED,
	KIND_IPV6,
	KIND_IPV4,		/* not TCP */
	KIND_TCP,		/* IPv4 and TCP, fragments included */
};

struct packet {
	enum kind kind;
	__u8 protocol;		/* IP protocol, IPv6: of the first header */
	__u8 options;		/* IPv4 header longer than 20 bytes */
	__u8 fragment;
	__u8 syn;		/* SYN without ACK; TCP that is neither fragment nor with options */
	__be32 saddr, daddr;
	__be16 sport, dport;
};

/*
 * Packet pointers, read from the context anew each time. Through plain C the compiler may keep the
 * 32-bit context field and widen it late, which the verifier does not take for a pointer.
 */
static __always_inline void *frame_start(const struct __sk_buff *skb)
{
	void *start;

	asm volatile("%0 = *(u32 *)(%1 + %2)"
		     : "=r"(start)
		     : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, data)));
	return start;
}

static __always_inline void *frame_end(const struct __sk_buff *skb)
{
	void *end;

	asm volatile("%0 = *(u32 *)(%1 + %2)"
		     : "=r"(end)
		     : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, data_end)));
	return end;
}

/* Makes `len` bytes from the start of the frame readable. */
static __always_inline int pull(struct __sk_buff *skb, __u32 len)
{
	if (frame_start(skb) + len <= frame_end(skb))
		return 0;
	if (skb->len < len)
		return -1;
	return bpf_skb_pull_data(skb, len) ? -1 : 0;
}

static __always_inline void parse_tcp(struct __sk_buff *skb, struct packet *p)
{
	const __u32 need = sizeof(struct ethhdr) + sizeof(struct iphdr) + sizeof(struct tcphdr);
	struct tcphdr *tcp;

	if (pull(skb, need)) {
		p->kind = KIND_MALFORMED;
		return;
	}
	tcp = frame_start(skb) + sizeof(struct ethhdr) + sizeof(struct iphdr);
	if ((void *)(tcp + 1) > frame_end(skb)) {
		p->kind = KIND_MALFORMED;
		return;
	}
	p->sport = tcp->source;
	p->dport = tcp->dest;
	p->syn = tcp->syn && !tcp->ack;
}

static __always_inline void parse_ipv4(struct __sk_buff *skb, struct packet *p)
{
	struct iphdr *ip;

	p->kind = KIND_MALFORMED;
	if (pull(skb, sizeof(struct ethhdr) + sizeof(*ip)))
		return;
	ip = frame_start(skb) + sizeof(struct ethhdr);
	if ((void *)(ip + 1) > frame_end(skb) || ip->version != 4 || ip->ihl < 5)
		return;
	p->protocol = ip->protocol;
	p->options = ip->ihl != 5;
	p->fragment = (ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET)) != 0;
	p->saddr = ip->saddr;
	p->daddr = ip->daddr;
	p->kind = ip->protocol == IPPROTO_TCP ? KIND_TCP : KIND_IPV4;
	if (p->kind == KIND_TCP && !p->options && !p->fragment)
		parse_tcp(skb, p);
}

static __always_inline void parse(struct __sk_buff *skb, struct packet *p)
{
	struct ipv6hdr *ip6;

	__builtin_memset(p, 0, sizeof(*p));
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		parse_ipv4(skb, p);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		p->kind = KIND_IPV6;
		if (pull(skb, sizeof(struct ethhdr) + sizeof(*ip6)))
			return;
		ip6 = frame_start(skb) + sizeof(struct ethhdr);
		if ((void *)(ip6 + 1) <= frame_end(skb))
			p->protocol = ip6->nexthdr;
	}
}

/*
 * If this is an ICMP error about a TCP connection of the packet's destination: where that
 * connection goes, else 0. A pod's TCP is all ztunnel's unless it is with the node, so such an
 * error (path MTU above all) is meant for ztunnel's socket.
 */
static __always_inline __be32 icmp_error_about(struct __sk_buff *skb, const struct packet *p)
{
	const __u32 need = sizeof(struct ethhdr) + 2 * sizeof(struct iphdr) +
			   sizeof(struct icmp_header);
	struct icmp_header *icmp;
	struct iphdr *inner;

	if (p->kind != KIND_IPV4 || p->protocol != IPPROTO_ICMP || p->options || p->fragment)
		return 0;
	if (pull(skb, need))
		return 0;
	icmp = frame_start(skb) + sizeof(struct ethhdr) + sizeof(struct iphdr);
	inner = (void *)(icmp + 1);
	if ((void *)(inner + 1) > frame_end(skb))
		return 0;
	if (icmp->type != ZT_ICMP_DEST_UNREACH && icmp->type != ZT_ICMP_TIME_EXCEEDED &&
	    icmp->type != ZT_ICMP_PARAMETER_PROBLEM)
		return 0;
	return inner->protocol == IPPROTO_TCP && inner->saddr == p->daddr ? inner->daddr : 0;
}

#endif
