/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What a pod may send beside TCP: IPv4, IPv6, ARP and neighbour discovery about itself.
 *
 * The stack takes away what is around an IP packet before it looks at it: VLAN tags of number 0,
 * however many, and whatever a tunnel device of the node opens. What is in there would then be a
 * packet from nowhere that these programs have never seen.
 */
#ifndef ZT_POD_FRAMES_H
#define ZT_POD_FRAMES_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "layout.h"
#include "maps.h"
#include "packet.h"

#define ZT_ARPHRD_ETHER 1

/* IP protocols that carry packets or frames (IANA's names), other than those of <linux/in.h>. */
#define ZT_IPPROTO_MOBILE 55		/* RFC 2004 */
#define ZT_IPPROTO_KA9Q_IPIP 94
#define ZT_IPPROTO_ETHERIP 97		/* RFC 3378 */
#define ZT_IPPROTO_L2TP 115		/* RFC 3931 */
#define ZT_IPPROTO_ETHERNET 143		/* RFC 8986 */

/* UDP ports whose datagrams the kernel's tunnel devices open, whoever sent them. */
#define ZT_PORT_VXLAN 4789		/* RFC 7348 */
#define ZT_PORT_VXLAN_GPE 4790
#define ZT_PORT_VXLAN_LINUX 8472	/* the kernel's own default, flannel's and Cilium's */
#define ZT_PORT_GENEVE 6081		/* RFC 8926 */
#define ZT_PORT_MPLS 6635		/* RFC 7510 */

struct arp_ipv4 {
	__be16 hardware, protocol;
	__u8 hardware_len, protocol_len;
	__be16 operation;
	__u8 sender_mac[ETH_ALEN];
	__u8 sender_ip[4];
	__u8 target_mac[ETH_ALEN];
	__u8 target_ip[4];
};

/* The reason to drop a frame that is neither IPv4 nor IPv6; 0 (REASON_PASSED) for ARP. */
static __always_inline __u32 refused_frame(const struct __sk_buff *skb)
{
	if (is_tagged(skb))
		return REASON_VLAN;
	return skb->protocol == bpf_htons(ETH_P_ARP) ? REASON_PASSED : REASON_ETHERTYPE;
}

static __always_inline int is_own(const struct __sk_buff *skb, const struct addr *addr)
{
	struct pod *pod = get_pod(addr);

	return pod && pod->ifindex == skb->ifindex;
}

static __always_inline int is_unspecified(const struct addr *addr)
{
	return !(addr->w[0] | addr->w[1] | addr->w[2] | addr->w[3]);
}

/*
 * Whether ARP that a pod sends says nothing of others: its sender is one of the pod's addresses, or
 * none yet (RFC 5227). On a shared link it would turn others' traffic to the pod.
 */
static __always_inline int is_own_arp(struct __sk_buff *skb, struct packet *p)
{
	struct arp_ipv4 arp;
	__be32 ip;

	if (bpf_skb_load_bytes(skb, sizeof(struct ethhdr), &arp, sizeof(arp)))
		return 0;
	if (arp.hardware != bpf_htons(ZT_ARPHRD_ETHER) || arp.protocol != bpf_htons(ETH_P_IP) ||
	    arp.hardware_len != ETH_ALEN || arp.protocol_len != sizeof(ip))
		return 0;
	__builtin_memcpy(&ip, arp.target_ip, sizeof(ip));
	set_ipv4(&p->daddr, ip);
	__builtin_memcpy(&ip, arp.sender_ip, sizeof(ip));
	set_ipv4(&p->saddr, ip);
	return !ip || is_own(skb, &p->saddr);
}

/* Where what follows the IP header, or the extension header, begins. */
static __always_inline int payload_offset(struct __sk_buff *skb, const struct packet *p)
{
	__u8 byte;

	if (!p->v6) {
		if (bpf_skb_load_bytes(skb, sizeof(struct ethhdr), &byte, sizeof(byte)))
			return -1;
		return sizeof(struct ethhdr) + (byte & 15) * 4;
	}
	if (p->fragment)
		return sizeof(struct ethhdr) + sizeof(struct ipv6hdr) + 8;
	if (!p->options)
		return sizeof(struct ethhdr) + sizeof(struct ipv6hdr);
	/* Length in units of 8 bytes, less one. */
	if (bpf_skb_load_bytes(skb, sizeof(struct ethhdr) + sizeof(struct ipv6hdr) + 1, &byte,
			       sizeof(byte)))
		return -1;
	return sizeof(struct ethhdr) + sizeof(struct ipv6hdr) + (byte + 1) * 8;
}

/* Whether the packet is a fragment without the start of what it carries. */
static __always_inline int is_later_fragment(struct __sk_buff *skb, const struct packet *p)
{
	__be16 field;
	int at = sizeof(struct ethhdr) + (p->v6 ? (int)sizeof(struct ipv6hdr) + 2 : 6);

	if (!p->fragment)
		return 0;
	if (bpf_skb_load_bytes(skb, at, &field, sizeof(field)))
		return 1;
	return (field & bpf_htons(p->v6 ? 0xfff8 : IP_FRAGMENT_OFFSET)) != 0;
}

static __always_inline int is_tunnel_port(__be16 port)
{
	return port == bpf_htons(ZT_PORT_VXLAN) || port == bpf_htons(ZT_PORT_VXLAN_LINUX) ||
	       port == bpf_htons(ZT_PORT_GENEVE) || port == bpf_htons(ZT_PORT_VXLAN_GPE) ||
	       port == bpf_htons(ZT_PORT_MPLS);
}

/* Destination port of UDP, also of a first fragment or behind options; 0 if there is none. */
static __always_inline __be16 udp_port(struct __sk_buff *skb, const struct packet *p)
{
	struct udphdr udp;
	int at;

	if (!p->fragment && !p->options)
		return p->dport;
	if (is_later_fragment(skb, p))
		return 0;
	at = payload_offset(skb, p);
	if (at < 0 || bpf_skb_load_bytes(skb, at, &udp, sizeof(udp)))
		return 0;
	return udp.dest;
}

/*
 * Whether the packet carries another, or TCP where it is not looked for, in a form that a kernel
 * opens without a key: IP in IP, GRE and the like to whomever, and the tunnels over UDP. AH hides
 * nothing, but what it carries is not at its place; ESP's is anybody's guess, as that of any
 * encrypted datagram.
 */
static __always_inline int carries_packet(struct __sk_buff *skb, const struct packet *p)
{
	switch (p->protocol) {
	case IPPROTO_IPIP:
	case IPPROTO_IPV6:
	case IPPROTO_GRE:
	case IPPROTO_AH:
	case ZT_IPPROTO_MOBILE:
	case ZT_IPPROTO_KA9Q_IPIP:
	case ZT_IPPROTO_ETHERIP:
	case IPPROTO_ENCAP:
	case IPPROTO_COMP:
	case ZT_IPPROTO_L2TP:
	case IPPROTO_MPLS:
	case ZT_IPPROTO_ETHERNET:
		return 1;
	case IPPROTO_UDP:
		return is_tunnel_port(udp_port(skb, p));
	}
	return 0;
}

/* A node opens these; what pods send each other over UDP is their own. */
static __always_inline int is_for_a_node(const struct packet *p)
{
	return p->protocol != IPPROTO_UDP || is_node_address(&p->daddr) || !in_pod_cidrs(&p->daddr);
}

static __always_inline __u32 refused_address(const struct __sk_buff *skb, const struct addr *addr)
{
	if (is_unspecified(addr) || is_link_local(addr) || is_own(skb, addr))
		return REASON_PASSED;
	return get_pod(addr) ? REASON_NEIGHBOUR : REASON_IPV6;
}

/*
 * As is_own_arp: neighbour discovery that makes a router of the pod, or speaks of others, is
 * refused. Of link-local addresses nobody knows whose they are.
 */
static __always_inline __u32 refused_discovery(struct __sk_buff *skb, const struct packet *p)
{
	struct addr target;
	__u32 refused;
	__u8 type;
	int at;

	if (!p->v6 || p->protocol != IPPROTO_ICMPV6 || is_later_fragment(skb, p))
		return REASON_PASSED;
	at = payload_offset(skb, p);
	if (at < 0 || bpf_skb_load_bytes(skb, at, &type, sizeof(type)) || type < ZT_NDP_FIRST ||
	    type > ZT_NDP_LAST)
		return REASON_PASSED;
	/* Not behind extension headers or in fragments (RFC 6980): nobody sends it so. */
	if (p->options || p->fragment || (type != ZT_NDP_FIRST && type != ZT_NDP_SOLICITATION &&
					  type != ZT_NDP_ADVERTISEMENT))
		return REASON_NEIGHBOUR;
	refused = refused_address(skb, &p->saddr);
	if (refused || type != ZT_NDP_ADVERTISEMENT)
		return refused;
	if (bpf_skb_load_bytes(skb, at + sizeof(struct icmp_header), &target, sizeof(target)))
		return REASON_MALFORMED;
	return refused_address(skb, &target);
}

/* The reason to drop what a pod sends that is IP and not TCP; REASON_PASSED if there is none. */
static __always_inline __u32 refused_packet(struct __sk_buff *skb, const struct packet *p)
{
	if (carries_packet(skb, p) && is_for_a_node(p))
		return REASON_ENCAPSULATED;
	return refused_discovery(skb, p);
}

#endif
