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
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"

#define ZT_NEXT (-1)		/* TCX_NEXT, and TC_ACT_UNSPEC under clsact: the next program decides */
#define ZT_DROP 2		/* TC_ACT_SHOT */

#ifndef AF_INET
#define AF_INET 2
#define AF_INET6 10
#endif

#define IP_MORE_FRAGMENTS 0x2000
#define IP_FRAGMENT_OFFSET 0x1fff

/* <linux/icmp.h> needs the C library's headers, which do not exist for this target. */
#define ZT_ICMP_DEST_UNREACH 3
#define ZT_ICMP_TIME_EXCEEDED 11
#define ZT_ICMP_PARAMETER_PROBLEM 12
#define ZT_NDP_FIRST 133		/* router solicitation */
#define ZT_NDP_SOLICITATION 135	/* of a neighbour */
#define ZT_NDP_ADVERTISEMENT 136
#define ZT_NDP_LAST 137		/* redirect */
#define ZT_ICMPV6_INFORMATION 128	/* types below are errors */

#define ZT_IPPROTO_MOBILITY 135
#define ZT_IPPROTO_HIP 139
#define ZT_IPPROTO_SHIM6 140

struct icmp_header {
	__u8 type, code;
	__sum16 checksum;
	__be32 rest;
};

enum kind {
	KIND_OTHER,		/* neither IPv4 nor IPv6, ARP and the like; or with a VLAN tag */
	KIND_MALFORMED,
	KIND_IP,		/* not TCP */
	KIND_TCP,		/* TCP, fragments included, and what may hide it */
};

struct packet {
	enum kind kind;
	__u8 v6;
	__u8 protocol;		/* behind at most one IPv6 extension header */
	__u8 options;		/* IPv4 header longer than 20 bytes, IPv6 extension header */
	__u8 fragment;
	__u8 syn;		/* SYN without ACK; TCP that is neither fragment nor with options */
	__u8 icmp_type;		/* of ICMPv6 without extension headers */
	__u8 headers;		/* bytes of its IP and TCP headers */
	__be16 sport, dport;	/* of TCP and UDP that is neither fragment nor with options */
	struct addr saddr, daddr;
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

static __always_inline void set_ipv4(struct addr *addr, __be32 ipv4)
{
	addr->w[0] = 0;
	addr->w[1] = 0;
	addr->w[2] = bpf_htonl(0xffff);
	addr->w[3] = ipv4;
}

static __always_inline int is_mapped(const struct addr *addr)
{
	return addr->w[2] == bpf_htonl(0xffff) && !addr->w[1] && !addr->w[0];
}

static __always_inline void parse_tcp(struct __sk_buff *skb, struct packet *p, __u32 offset)
{
	struct tcphdr *tcp;

	if (pull(skb, offset + sizeof(*tcp))) {
		p->kind = KIND_MALFORMED;
		return;
	}
	tcp = frame_start(skb) + offset;
	if ((void *)(tcp + 1) > frame_end(skb)) {
		p->kind = KIND_MALFORMED;
		return;
	}
	p->sport = tcp->source;
	p->dport = tcp->dest;
	p->syn = tcp->syn && !tcp->ack;
	p->headers = offset - sizeof(struct ethhdr) + tcp->doff * 4;
}

/* A datagram too short for its header is no reason to drop: it is not the mesh's. */
static __always_inline void parse_udp(struct __sk_buff *skb, struct packet *p, __u32 offset)
{
	struct udphdr *udp;

	if (pull(skb, offset + sizeof(*udp)))
		return;
	udp = frame_start(skb) + offset;
	if ((void *)(udp + 1) > frame_end(skb))
		return;
	p->sport = udp->source;
	p->dport = udp->dest;
}

static __always_inline void parse_icmp6(struct __sk_buff *skb, struct packet *p, __u32 offset)
{
	struct icmp_header *icmp;

	if (pull(skb, offset + sizeof(*icmp)))
		return;
	icmp = frame_start(skb) + offset;
	if ((void *)(icmp + 1) <= frame_end(skb))
		p->icmp_type = icmp->type;
}

static __always_inline void parse_ports(struct __sk_buff *skb, struct packet *p, __u32 offset)
{
	if (p->kind == KIND_TCP)
		parse_tcp(skb, p, offset);
	else if (p->protocol == IPPROTO_UDP)
		parse_udp(skb, p, offset);
	else if (p->v6 && p->protocol == IPPROTO_ICMPV6)
		parse_icmp6(skb, p, offset);
}

static __always_inline void parse_ipv4(struct __sk_buff *skb, struct packet *p)
{
	const __u32 end = sizeof(struct ethhdr) + sizeof(struct iphdr);
	struct iphdr *ip;

	p->kind = KIND_MALFORMED;
	if (pull(skb, end))
		return;
	ip = frame_start(skb) + sizeof(struct ethhdr);
	if ((void *)(ip + 1) > frame_end(skb) || ip->version != 4 || ip->ihl < 5)
		return;
	p->protocol = ip->protocol;
	p->options = ip->ihl != 5;
	p->fragment = (ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET)) != 0;
	set_ipv4(&p->saddr, ip->saddr);
	set_ipv4(&p->daddr, ip->daddr);
	p->kind = ip->protocol == IPPROTO_TCP ? KIND_TCP : KIND_IP;
	if (!p->options && !p->fragment)
		parse_ports(skb, p, end);
}

static __always_inline int is_extension(__u8 header)
{
	switch (header) {
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_FRAGMENT:
	case IPPROTO_DSTOPTS:
	case IPPROTO_AH:
	case ZT_IPPROTO_MOBILITY:
	case ZT_IPPROTO_HIP:
	case ZT_IPPROTO_SHIM6:
		return 1;
	}
	return 0;
}

/*
 * Behind one extension header ICMPv6 (multicast listener reports come like that) and UDP are
 * recognized. Whatever else has one counts as TCP with options, or as a fragment of TCP: a longer
 * chain may hide TCP.
 */
static __always_inline void parse_ipv6(struct __sk_buff *skb, struct packet *p)
{
	const __u32 end = sizeof(struct ethhdr) + sizeof(struct ipv6hdr);
	struct ipv6hdr *ip6;
	__u8 *extension;

	p->kind = KIND_MALFORMED;
	p->v6 = 1;
	if (pull(skb, end))
		return;
	ip6 = frame_start(skb) + sizeof(struct ethhdr);
	if ((void *)(ip6 + 1) > frame_end(skb) || ip6->version != 6)
		return;
	p->protocol = ip6->nexthdr;
	__builtin_memcpy(&p->saddr, &ip6->saddr, sizeof(p->saddr));
	__builtin_memcpy(&p->daddr, &ip6->daddr, sizeof(p->daddr));
	/* Must not be on any wire, and would be taken for an IPv4 pod's. */
	if (is_mapped(&p->saddr) || is_mapped(&p->daddr))
		return;
	if (!is_extension(p->protocol)) {
		p->kind = p->protocol == IPPROTO_TCP ? KIND_TCP : KIND_IP;
		parse_ports(skb, p, end);
		return;
	}
	p->fragment = p->protocol == IPPROTO_FRAGMENT;
	p->options = !p->fragment;
	if (pull(skb, end + 8))
		return;
	extension = frame_start(skb) + end;
	if ((void *)(extension + 8) > frame_end(skb))
		return;
	p->protocol = *extension;
	p->kind = p->protocol == IPPROTO_ICMPV6 || p->protocol == IPPROTO_UDP ? KIND_IP : KIND_TCP;
}

/*
 * Whether the frame has a VLAN tag: the first one is in the buffer's metadata, and others are in
 * place of the protocol. Of number 0 the stack takes off as many as there are.
 */
static __always_inline int is_tagged(const struct __sk_buff *skb)
{
	return skb->vlan_present || skb->protocol == bpf_htons(ETH_P_8021Q) ||
	       skb->protocol == bpf_htons(ETH_P_8021AD);
}

/* What is tagged is of another link: a VLAN's. */
static __always_inline void parse(struct __sk_buff *skb, struct packet *p)
{
	__builtin_memset(p, 0, sizeof(*p));
	if (skb->vlan_present)
		return;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		parse_ipv4(skb, p);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		parse_ipv6(skb, p);
}

/*
 * Neighbour discovery; multicast listener reports, DHCPv6: from a link-local or no address to the
 * link. Nobody takes these from farther than the link, so that they need no check against the
 * pod's addresses.
 */
static __always_inline int stays_on_link(const struct packet *p)
{
	const struct addr *from = &p->saddr, *to = &p->daddr;

	if (!p->v6 || p->kind != KIND_IP)
		return 0;
	if (p->icmp_type >= ZT_NDP_FIRST && p->icmp_type <= ZT_NDP_LAST)
		return 1;
	if (!is_link_local(from) && (from->w[0] | from->w[1] | from->w[2] | from->w[3]))
		return 0;
	return is_link_local(to) || (to->w[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
}

/* The start of the packet that an ICMP error is about; of TCP and UDP alike. */
struct reported_ports {
	__be16 source, dest;
};

static __always_inline int icmp4_error_about(struct __sk_buff *skb, struct flow *sent)
{
	const __u32 need = sizeof(struct ethhdr) + 2 * sizeof(struct iphdr) +
			   sizeof(struct icmp_header) + sizeof(struct reported_ports);
	struct reported_ports *ports;
	struct icmp_header *icmp;
	struct iphdr *inner;

	if (pull(skb, need))
		return 0;
	icmp = frame_start(skb) + sizeof(struct ethhdr) + sizeof(struct iphdr);
	inner = (void *)(icmp + 1);
	ports = (void *)(inner + 1);
	if ((void *)(ports + 1) > frame_end(skb))
		return 0;
	if (icmp->type != ZT_ICMP_DEST_UNREACH && icmp->type != ZT_ICMP_TIME_EXCEEDED &&
	    icmp->type != ZT_ICMP_PARAMETER_PROBLEM)
		return 0;
	if (inner->ihl != 5 || (inner->frag_off & bpf_htons(IP_FRAGMENT_OFFSET)))
		return 0;
	set_ipv4(&sent->pod_addr, inner->saddr);
	set_ipv4(&sent->peer_addr, inner->daddr);
	sent->pod_port = ports->source;
	sent->peer_port = ports->dest;
	return inner->protocol;
}

static __always_inline int icmp6_error_about(struct __sk_buff *skb, struct flow *sent)
{
	const __u32 need = sizeof(struct ethhdr) + 2 * sizeof(struct ipv6hdr) +
			   sizeof(struct icmp_header) + sizeof(struct reported_ports);
	struct reported_ports *ports;
	struct icmp_header *icmp;
	struct ipv6hdr *inner;

	if (pull(skb, need))
		return 0;
	icmp = frame_start(skb) + sizeof(struct ethhdr) + sizeof(struct ipv6hdr);
	inner = (void *)(icmp + 1);
	ports = (void *)(inner + 1);
	if ((void *)(ports + 1) > frame_end(skb) || icmp->type >= ZT_ICMPV6_INFORMATION)
		return 0;
	__builtin_memcpy(&sent->pod_addr, &inner->saddr, sizeof(sent->pod_addr));
	__builtin_memcpy(&sent->peer_addr, &inner->daddr, sizeof(sent->peer_addr));
	sent->pod_port = ports->source;
	sent->peer_port = ports->dest;
	return inner->nexthdr;
}

/*
 * The protocol of the packet that this ICMP error is about, and that packet as a connection seen
 * from its sender; 0 if this is none, or about a packet whose ports cannot be read.
 */
static __always_inline int icmp_error_about(struct __sk_buff *skb, const struct packet *p,
					    struct flow *sent)
{
	if (p->kind != KIND_IP || p->options || p->fragment)
		return 0;
	if (p->v6)
		return p->protocol == IPPROTO_ICMPV6 ? icmp6_error_about(skb, sent) : 0;
	return p->protocol == IPPROTO_ICMP ? icmp4_error_about(skb, sent) : 0;
}

#endif
