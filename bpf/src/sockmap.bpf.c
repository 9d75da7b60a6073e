// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * The short-cut between an application and its node's ztunnel (SOCKMAP=on): what one sends is put
 * straight into the other's receive queue, past both TCP stacks.
 *
 *   shortcut_sockets  sock_ops on a cgroup that holds pods and ztunnel: enters established sockets
 *   shortcut_send     sk_msg: decides for each message between short-cut and TCP
 *
 * The connection itself is set up, captured, authorized and closed by TCP as ever; only data takes
 * another way, and only between an enrolled pod (address and network namespace must both be its)
 * and ztunnel. Rules that keep the byte stream whole and memory bounded:
 *
 * - The receiver reads redirected data before TCP data. So a direction may start only when the
 *   receiver has read all that was ever sent over TCP, and once it goes back to TCP it stays.
 * - Redirected data knows no window: what is unread in the receiver is read from its socket before
 *   each message, and a message that would exceed the budget is sent, with all later ones, by TCP.
 *   So is one when TCP has all the memory it may have, on the whole machine.
 * - A redirect to a socket that is not in the map drops the message: its result decides.
 * - Only sockets of a ztunnel that knows of this are entered: those it has marked, or that come
 *   from a listener it has marked. Nothing else would save one that splices, or lets io_uring
 *   retry short sends. The mark tells it of a socket's stay in the map, too.
 * - The second end of a connection to be entered is so only if the first one is; otherwise the
 *   first one leaves.
 * - Sockets of applications that block are left alone, and MPTCP's. A recv(2) that waits on a
 *   socket in a map wakes once: a reset, a signal or room to send makes it return EAGAIN. Nor
 *   does it know MSG_WAITALL. Whether an accepted socket blocks shows only with its first
 *   message; that of a server's first connection is entered, and others not any more.
 * - A socket in the map pays for it with each call even if it uses TCP, so it is taken out, by
 *   user space (bpf/redirect/src/sockmap/reaper.rs), as soon as that cannot lose data: taking it
 *   out throws away what is unread. Hence two maps: out of `shortcut_targets` first, so that
 *   nothing more is redirected to it, and out of `shortcut_senders` when it has read everything.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_core_read.h>

#include "sockmap.h"
#include "sockmap_maps.h"

#define AF_INET 2
#define AF_INET6 10
#define TCP_ESTABLISHED 1
#define TCP_CLOSE 7
#define TCP_CLOSE_WAIT 8
#define O_NONBLOCK 04000
#define NS_PER_MS 1000000ULL

/* A direction that cannot start after this many messages never will. */
#define ATTEMPTS_MAX 16
/* Unread bytes up to which the receive buffer's size need not be looked at. */
#define SMALL_BYTES 2048
#define ASK_EVERY_NS (100 * NS_PER_MS)

/* The kernel's own structures, the fields used here; offsets are fixed up when loading. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct list_head {
	struct list_head *next;
};
typedef struct {
	int counter;
} atomic_t;
typedef struct {
	__s64 counter;
} atomic64_t;
struct file {
	unsigned int f_flags;
};
struct socket {
	struct file *file;
};
struct proto {
	atomic64_t *memory_allocated;
	unsigned long *memory_pressure;
};
struct sock_common {
	atomic64_t skc_cookie;
	struct proto *skc_prot;
};
struct sock {
	struct sock_common __sk_common;
	struct {
		atomic_t rmem_alloc;
	} sk_backlog;
	int sk_rcvbuf;
	struct socket *sk_socket;
	void *sk_user_data;
};
typedef struct refcount_struct {
	atomic_t refs;
} refcount_t;
struct sk_psock {
	struct list_head ingress_msg;
	refcount_t refcnt;
};
struct tcp_sock {
	__u32 copied_seq;
	__u32 write_seq;
};
struct bpf_map {
	__u32 id;
};
#pragma clang attribute pop

static __always_inline void add(__u32 counter, __u64 n)
{
	__u64 *value = bpf_map_lookup_elem(&shortcut_counters, &counter);

	if (value)
		*value += n;
}

static __always_inline struct shortcut_config *get_config(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&shortcut_config, &key);
}

static __always_inline void mapped(__be32 to[4], __be32 ipv4)
{
	to[0] = 0;
	to[1] = 0;
	to[2] = bpf_htonl(0xffff);
	to[3] = ipv4;
}

/* False: not TCP over IP as we know it. */
static __always_inline int own_key(struct bpf_sock_ops *ctx, struct end_key *key)
{
	if (ctx->family == AF_INET) {
		mapped(key->local, ctx->local_ip4);
		mapped(key->remote, ctx->remote_ip4);
	} else if (ctx->family == AF_INET6) {
		key->local[0] = ctx->local_ip6[0];
		key->local[1] = ctx->local_ip6[1];
		key->local[2] = ctx->local_ip6[2];
		key->local[3] = ctx->local_ip6[3];
		key->remote[0] = ctx->remote_ip6[0];
		key->remote[1] = ctx->remote_ip6[1];
		key->remote[2] = ctx->remote_ip6[2];
		key->remote[3] = ctx->remote_ip6[3];
	} else {
		return 0;
	}
	key->local_port = ctx->local_port;
	key->remote_port = bpf_ntohl(ctx->remote_port);
	key->netns = bpf_get_netns_cookie(ctx);
	return 1;
}

static __always_inline void mirror(struct end_key *to, const struct end_key *from, __u64 netns)
{
	__builtin_memcpy(to->local, from->remote, sizeof(to->local));
	__builtin_memcpy(to->remote, from->local, sizeof(to->remote));
	to->local_port = from->remote_port;
	to->remote_port = from->local_port;
	to->netns = netns;
}

/* Whose end it is, and the key of the other: false if it is not between a pod and ztunnel. */
static __always_inline int find_peer(const struct shortcut_config *cfg, struct direction *dir)
{
	int from_ztunnel = dir->self.netns == cfg->ztunnel_netns;
	struct pod_key pod;
	__u64 *netns;

	__builtin_memcpy(pod.addr, from_ztunnel ? dir->self.remote : dir->self.local,
			 sizeof(pod.addr));
	netns = bpf_map_lookup_elem(&shortcut_pods, &pod);
	if (!netns || (!from_ztunnel && *netns != dir->self.netns))
		return 0;
	mirror(&dir->peer, &dir->self, from_ztunnel ? *netns : cfg->ztunnel_netns);
	dir->from_ztunnel = from_ztunnel;
	return 1;
}

enum blocking { BLOCKS, DOES_NOT_BLOCK, NO_FILE };

/* NO_FILE: not accepted yet, or closed. */
static __always_inline enum blocking blocking(__u64 sock)
{
	struct sock *sk = (struct sock *)sock;
	struct socket *socket = 0;
	struct file *file = 0;
	unsigned int flags = 0;

	if (BPF_CORE_READ_INTO(&socket, sk, sk_socket) || !socket ||
	    BPF_CORE_READ_INTO(&file, socket, file) || !file ||
	    BPF_CORE_READ_INTO(&flags, file, f_flags))
		return NO_FILE;
	return flags & O_NONBLOCK ? DOES_NOT_BLOCK : BLOCKS;
}

static __always_inline int is_blocking_server(const struct direction *dir)
{
	const struct end_key *app = dir->from_ztunnel ? &dir->peer : &dir->self;
	struct server server = { .netns = app->netns, .port = app->local_port };

	return bpf_map_lookup_elem(&shortcut_blocking, &server) != 0;
}

static __always_inline int enter(struct bpf_sock_ops *ctx, struct direction *fresh)
{
	struct bpf_map *senders = (struct bpf_map *)&shortcut_senders;
	struct bpf_sock *sk = ctx->sk;
	struct mark *mark = 0;
	struct direction *dir;
	struct end end = {};

	if (!sk || bpf_skc_to_mptcp_sock(sk) || is_blocking_server(fresh))
		return 0;
	/* The end that connects is established before the one that accepts. */
	if (ctx->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB &&
	    !bpf_map_lookup_elem(&shortcut_ends, &fresh->peer))
		return 0;
	end.sock = (__u64)bpf_skc_to_tcp_sock(sk);
	end.cookie = bpf_get_socket_cookie(ctx);
	if (!end.sock)
		return 0;
	if (fresh->from_ztunnel) {
		mark = bpf_sk_storage_get(&shortcut_marks, sk, 0, 0);
		if (!mark)
			return 0;
	} else if (blocking(end.sock) == BLOCKS) {
		/* Before accept(2) nobody knows; its server's others tell. */
		return 0;
	}
	fresh->own_sock = end.sock;
	dir = bpf_sk_storage_get(&shortcut_directions, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!dir)
		return 0;
	*dir = *fresh;
	if (bpf_map_update_elem(&shortcut_ends, &fresh->self, &end, BPF_ANY))
		return 0;
	if (mark) {
		mark->self = fresh->self;
		mark->senders = senders->id;
	}
	/* Removes the entry above, and must not clear others' flags. */
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	return !bpf_sock_hash_update(ctx, &shortcut_senders, &fresh->self, BPF_ANY) &&
	       !bpf_sock_hash_update(ctx, &shortcut_targets, &fresh->self, BPF_ANY);
}

static __always_inline void leave(struct bpf_sock_ops *ctx)
{
	struct end_key key = {};
	struct end *end;

	if (!own_key(ctx, &key))
		return;
	end = bpf_map_lookup_elem(&shortcut_ends, &key);
	if (end && end->cookie == bpf_get_socket_cookie(ctx))
		bpf_map_delete_elem(&shortcut_ends, &key);
}

/* Not 0: it cannot be read. */
static __always_inline int psock_of(__u64 sock, struct sk_psock **psock)
{
	__u64 data = 0;

	if (bpf_core_read(&data, sizeof(data), &((struct sock *)sock)->sk_user_data))
		return 1;
	*psock = (struct sk_psock *)(data & ~7ULL);	/* the low bits are flags */
	return 0;
}

/*
 * Whether no call on the socket may still be about to redirect something, however long ago it has
 * decided to: each holds a reference as long as it lasts. `refs_max` are the others: one of the
 * map, and one of the call that asks if it is on this socket.
 */
static __always_inline int is_idle(__u64 sock, int refs_max)
{
	struct sk_psock *psock = 0;
	int refs = 0;

	if (psock_of(sock, &psock))
		return 0;
	return !psock || (!BPF_CORE_READ_INTO(&refs, psock, refcnt.refs.counter) &&
			  refs <= refs_max);
}

static __always_inline int has_unread(__u64 sock)
{
	struct list_head *queue, *first = 0;
	struct sk_psock *psock = 0;

	if (psock_of(sock, &psock))
		return 1;
	if (!psock)
		return 0;
	queue = __builtin_preserve_access_index(&psock->ingress_msg);
	return bpf_core_read(&first, sizeof(first), &queue->next) || first != queue;
}

/* False: there was no room; a later message tells again. */
static __always_inline int tell(__u32 kind, __u64 when_ns, __u32 started,
				const struct end_key *self, const struct end_key *peer)
{
	struct shortcut_event *event;

	event = bpf_ringbuf_reserve(&shortcut_events, sizeof(*event), 0);
	if (!event)
		return 0;
	event->when_ns = when_ns;
	event->kind = kind;
	event->started = started;
	event->self = *self;
	event->peer = *peer;
	bpf_ringbuf_submit(event, 0);
	return 1;
}

/* Nothing is redirected to this end from now on if nothing was before. Returns what it was. */
static __always_inline __u32 close_end(struct end_key *key)
{
	struct end *end = bpf_map_lookup_elem(&shortcut_ends, key);

	return end ? __sync_fetch_and_or(&end->flags, END_CLOSED) & END_STARTED : 0;
}

/* Neither end redirects to the other any more, and both leave the map. */
static __always_inline void give_back(struct end_key *self, struct end_key *peer)
{
	__u32 started = 0;

	if (close_end(self))
		started |= STARTED_SELF;
	if (close_end(peer))
		started |= STARTED_PEER;
	tell(EVENT_DEMOTED, bpf_ktime_get_ns(), started, self, peer);
}

SEC("sockops")
int shortcut_sockets(struct bpf_sock_ops *ctx)
{
	struct direction fresh = {};
	struct shortcut_config *cfg;

	if (ctx->op == BPF_SOCK_OPS_STATE_CB) {
		if (ctx->args[1] == TCP_CLOSE)
			leave(ctx);
		return 1;
	}
	if (ctx->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB &&
	    ctx->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		return 1;
	cfg = get_config();
	if (!cfg || !(cfg->flags & SHORTCUT_ENABLED) || !own_key(ctx, &fresh.self) ||
	    !find_peer(cfg, &fresh))
		return 1;
	if (enter(ctx, &fresh)) {
		add(COUNT_SOCKETS, 1);
		return 1;
	}
	add(COUNT_REFUSED, 1);
	if (ctx->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB &&
	    bpf_map_lookup_elem(&shortcut_ends, &fresh.peer))
		give_back(&fresh.self, &fresh.peer);
	return 1;
}

static __always_inline int by_tcp(__u32 bytes)
{
	add(COUNT_BYPASSED_BYTES, bytes);
	return SK_PASS;
}

/* For good, and the other direction with it: a socket can only leave the map with both. */
static __always_inline int demote(struct direction *dir, __u32 bytes, __u32 reason)
{
	dir->mode = MODE_TCP;
	add(reason, 1);
	dir->asked_ns = bpf_ktime_get_ns();
	give_back(&dir->self, &dir->peer);
	return by_tcp(bytes);
}

/* The application at one end blocks: its server, if it is one, is remembered. */
static __always_inline int demote_blocking(struct direction *dir, __u32 bytes)
{
	struct end_key *app = dir->from_ztunnel ? &dir->peer : &dir->self;
	struct server server = { .netns = app->netns, .port = app->local_port };
	__u8 one = 1;

	bpf_map_update_elem(&shortcut_blocking, &server, &one, BPF_ANY);
	return demote(dir, bytes, COUNT_DEMOTED_BLOCKING);
}

static __always_inline int not_yet(struct direction *dir, __u32 bytes, __u32 reason)
{
	if (++dir->attempts >= ATTEMPTS_MAX)
		return demote(dir, bytes, reason);
	return by_tcp(bytes);
}

/* Whether the peer is still the socket it was. */
static __always_inline int is_same_peer(const struct direction *dir)
{
	struct sock *peer = (struct sock *)dir->peer_sock;
	__u64 cookie = 0;

	return peer && !BPF_CORE_READ_INTO(&cookie, peer, __sk_common.skc_cookie.counter) &&
	       cookie == dir->peer_cookie;
}

/*
 * The peer's queue is looked at, too: a receiver of bulk data sends nothing itself. For the same
 * reason this end stays until the peer may leave.
 */
static __always_inline int still_tcp(struct direction *dir, __u32 bytes)
{
	__u64 now = bpf_ktime_get_ns();
	int has_peer;

	if (now - dir->asked_ns <= ASK_EVERY_NS)
		return by_tcp(bytes);
	dir->asked_ns = now;
	has_peer = is_same_peer(dir);
	if (!is_idle(dir->own_sock, 2) || (has_peer && !is_idle(dir->peer_sock, 1)))
		return by_tcp(bytes);
	if (has_peer &&
	    (has_unread(dir->peer_sock) || !tell(EVENT_DRAINED, now, 0, &dir->peer, &dir->self)))
		return by_tcp(bytes);
	if (!has_unread(dir->own_sock))
		tell(EVENT_DRAINED, now, 0, &dir->self, &dir->peer);
	return by_tcp(bytes);
}

/* Whether the receiver has read everything that was sent over TCP. */
static __always_inline int has_read_tcp(const struct direction *dir)
{
	struct tcp_sock *own = (struct tcp_sock *)dir->own_sock;
	struct tcp_sock *peer = (struct tcp_sock *)dir->peer_sock;
	__u32 written = 0, read = 0;

	if (BPF_CORE_READ_INTO(&written, own, write_seq) ||
	    BPF_CORE_READ_INTO(&read, peer, copied_seq))
		return 0;
	return written == read;
}

/* Whether a new direction may start now; else `verdict` is what becomes of the message. */
static __always_inline int may_start(struct direction *dir, __u32 bytes, int *verdict)
{
	struct end *peer = bpf_map_lookup_elem(&shortcut_ends, &dir->peer);

	if (!peer) {
		*verdict = not_yet(dir, bytes, COUNT_DEMOTED_NO_PEER);
		return 0;
	}
	dir->peer_sock = peer->sock;
	dir->peer_cookie = peer->cookie;
	switch (blocking(dir->from_ztunnel ? dir->peer_sock : dir->own_sock)) {
	case BLOCKS:
		*verdict = demote_blocking(dir, bytes);
		return 0;
	case NO_FILE:
		*verdict = not_yet(dir, bytes, COUNT_DEMOTED_NO_PEER);
		return 0;
	case DOES_NOT_BLOCK:
		break;
	}
	if (!has_read_tcp(dir)) {
		*verdict = not_yet(dir, bytes, COUNT_DEMOTED_BUDGET);
		return 0;
	}
	return 1;
}

/* False: the other end is to leave the map, or has. */
static __always_inline int start(struct direction *dir)
{
	struct end *peer = bpf_map_lookup_elem(&shortcut_ends, &dir->peer);

	return peer && !(__sync_fetch_and_or(&peer->flags, END_STARTED) & END_CLOSED);
}

/*
 * Whether TCP as a whole may have more memory: what is redirected is charged like all else. The
 * kernel keeps up to a MiB per CPU that its count does not show.
 */
static __always_inline int has_memory(const struct shortcut_config *cfg, struct sock *peer)
{
	unsigned long *pressure = 0, under_pressure = 0;
	struct proto *proto = 0;
	atomic64_t *count = 0;
	__s64 pages = 0;

	if (BPF_CORE_READ_INTO(&proto, peer, __sk_common.skc_prot) ||
	    BPF_CORE_READ_INTO(&pressure, proto, memory_pressure) ||
	    bpf_probe_read_kernel(&under_pressure, sizeof(under_pressure), pressure) ||
	    under_pressure)
		return 0;
	if (!cfg->memory_pages_max)
		return 1;
	return !BPF_CORE_READ_INTO(&count, proto, memory_allocated) &&
	       !bpf_probe_read_kernel(&pages, sizeof(pages), count) &&
	       pages <= cfg->memory_pages_max;
}

/* Whether the receiver may get `bytes` more; else `reason` says why not. */
static __always_inline int has_room(const struct shortcut_config *cfg,
				    const struct direction *dir, __u32 bytes, __u32 *reason)
{
	struct sock *peer = (struct sock *)dir->peer_sock;
	int unread = 0, buffer = 0;
	__u64 total;

	*reason = COUNT_DEMOTED_NO_PEER;
	if (!is_same_peer(dir) ||
	    BPF_CORE_READ_INTO(&unread, peer, sk_backlog.rmem_alloc.counter) || unread < 0)
		return 0;
	if (dir->from_ztunnel) {
		*reason = COUNT_DEMOTED_BLOCKING;
		if (blocking(dir->peer_sock) != DOES_NOT_BLOCK)
			return 0;
	}
	total = (__u64)unread + bytes;
	if (total <= SMALL_BYTES)
		return 1;
	*reason = COUNT_DEMOTED_BUDGET;
	if (total > BUDGET_BYTES || BPF_CORE_READ_INTO(&buffer, peer, sk_rcvbuf) || buffer < 0 ||
	    total > (__u64)buffer)
		return 0;
	*reason = COUNT_DEMOTED_PRESSURE;
	return has_memory(cfg, peer);
}

SEC("sk_msg")
int shortcut_send(struct sk_msg_md *msg)
{
	struct shortcut_config *cfg = get_config();
	struct bpf_sock *sk = msg->sk;
	__u32 bytes = msg->size, reason;
	struct direction *dir;
	int verdict;

	if (!sk || !cfg)
		return SK_PASS;
	dir = bpf_sk_storage_get(&shortcut_directions, sk, 0, 0);
	if (!dir)
		return SK_PASS;
	if (dir->mode == MODE_TCP)
		return still_tcp(dir, bytes);
	/* After shutdown(2) TCP says EPIPE; the short-cut would not. */
	if (sk->state != TCP_ESTABLISHED && sk->state != TCP_CLOSE_WAIT)
		return by_tcp(bytes);
	if (!(cfg->flags & SHORTCUT_ENABLED))
		return demote(dir, bytes, COUNT_DEMOTED_CLOSED);
	if (dir->mode == MODE_NEW && !may_start(dir, bytes, &verdict))
		return verdict;
	if (!has_room(cfg, dir, bytes, &reason))
		return demote(dir, bytes, reason);
	if (dir->mode == MODE_NEW && !start(dir))
		return demote(dir, bytes, COUNT_DEMOTED_CLOSED);
	if (bpf_msg_redirect_hash(msg, &shortcut_targets, &dir->peer, BPF_F_INGRESS) != SK_PASS)
		return demote(dir, bytes, COUNT_DEMOTED_NO_PEER);
	/* From here on the message is redirected: no other verdict is possible. */
	dir->mode = MODE_SHORTCUT;
	add(dir->from_ztunnel ? COUNT_TO_POD_MESSAGES : COUNT_TO_ZTUNNEL_MESSAGES, 1);
	add(dir->from_ztunnel ? COUNT_TO_POD_BYTES : COUNT_TO_ZTUNNEL_BYTES, bytes);
	return SK_PASS;
}

char _license[] SEC("license") = "GPL";
