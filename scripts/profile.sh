#!/usr/bin/env bash
# Where both ztunnels' CPU time goes under a load in the lab, by part of the stack.
#
#   scripts/profile.sh rr --connections 256 --size 64
#   SECONDS_LOADED=10 SERVER=server-a scripts/profile.sh connect --concurrency 16
#
# Arguments are the load generator's, without --to and times. Needs root, perf (Debian: linux-perf)
# and the release build (`make build`; CARGO_PROFILE_RELEASE_DEBUG=1 for annotated functions, with
# ZTUNNEL=PATH for another binary). REDIRECT is that of `lab up --redirect`, SOCKMAP=on its --sockmap.
# Samples are taken by the CPU clock, which virtual machines have as well; time with interrupts off
# is found where they are turned on again, so that `wake-ups and switches` includes all of it.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-$PWD/target}
bin=$target/release
name=profile-$$
seconds=${SECONDS_LOADED:-8}
server=${SERVER:-server-b}
ztunnel=${ZTUNNEL:-$bin/ztunnel}
samples=$(mktemp)
counts=$(mktemp)

fail() { echo "profile: $*" >&2; exit 1; }
[ $# -gt 0 ] || fail "give the load, such as: rr --connections 256 --size 64"
command -v perf >/dev/null || fail "perf is not installed (Debian: apt-get install linux-perf)"
for program in lab loadgen; do
    [ -x "$bin/$program" ] || fail "$bin/$program is not there: run \`make build\`"
done

lab() { local verb=$1; shift; "$bin/lab" "$verb" --name "$name" "$@"; }
cleanup() {
    [ -z "${serving:-}" ] || kill "$serving" 2>/dev/null || true
    lab down >/dev/null 2>&1 || true
    rm -f "$samples" "$counts"
}
trap cleanup EXIT

lab up --redirect "${REDIRECT:-ebpf}" --sockmap "${SOCKMAP:-off}" --ztunnel "$ztunnel" >/dev/null
lab exec "$server" -- "$bin/loadgen" serve --listen 0.0.0.0:8080 >/dev/null 2>&1 &
serving=$!
address=$(lab status | awk -v host="$server" '$1 == host {print $3}')
pids=$(lab status | awk '$1 ~ /^ztunnel-[ab]$/ {split($NF, all, ","); print all[1]}')
[ -n "$address" ] && [ -n "$pids" ] || fail "the lab does not say where $server and ztunnel are"

load() { lab exec client-a -- "$bin/loadgen" "$@" --to "$address:8080" >/dev/null; }
# CPU time of both ztunnels, ns.
cpu() {
    local pid total=0 ns
    for pid in $pids; do
        for ns in $(cat /proc/"$pid"/task/*/schedstat | cut -d' ' -f1); do
            total=$((total + ns))
        done
    done
    echo $total
}

load "$@" --duration 1
before=$(cpu)
load "$@" --warmup 0 --duration "$seconds" --json "$counts" &
loading=$!
sleep 0.5
perf record --quiet -e cpu-clock -F 4999 -p "$(echo $pids | tr ' ' ',')" -o "$samples" \
    -- sleep $((seconds - 1)) >/dev/null 2>&1
wait "$loading"
used=$(($(cpu) - before))
ok=$(grep -o '"ok": *[0-9]*' "$counts" | grep -o '[0-9]*$')

perf report -i "$samples" --no-children --sort symbol --percent-limit 0 2>/dev/null |
    awk -v each_us="$(awk "BEGIN {print $used / $ok / 1000}")" -v show="${SHOW:-}" '
    function part(symbol) {
        if (symbol ~ /^\[\.\]/) {
            sub(/^\[\.\] <?/, "", symbol)
            if (symbol ~ /^hbone/) return "ztunnel: HTTP/2 (hbone)"
            if (symbol ~ /^(tls|rustls|aws_lc|aead_|.*gcm|iv_len|skip_iv|ecp|p256|bn_|sha)/)
                return "ztunnel: TLS records and AES-GCM"
            if (symbol ~ /^(rt::|syscall)/) return "ztunnel: runtime (rt)"
            if (symbol ~ /^(telemetry|mesh|core::(fmt|net|hash)|alloc::fmt)/ ||
                symbol ~ /Display|Write|Hasher/) return "ztunnel: policy, names, log, metrics"
            if (symbol ~ /^(_?mi_|__mem|alloc::|mi_)|drop_in_place/)
                return "ztunnel: memory and copies"
            return "ztunnel: relay and tunnel (proxy)"
        }
        sub(/^\[k\] /, "", symbol)
        if (symbol ~ /^(bpf_|__bpf|__htab|htab|lookup_nulls|trie_lookup|skb_do_redirect)/)
            return "BPF programs and their maps"
        if (symbol ~ /^(finish_task|_raw_spin_unlock_irq|__?schedule|try_to_wake|ttwu|__wake|wake|sched|prepare_task|select_task|enqueue_(task|ent)|dequeue_|update_|pick_|psi_|native_|pv_|__pv|kvm_|hrtimer|tick_|ktime|read_tsc|sock_def_readable|autoremove|switch_|__switch|resched|place_ent|rb_|avg_v)/)
            return "kernel: wake-ups and switches"
        if (symbol ~ /^(io_|__io_|.*io_uring|tctx|task_work|llist)/) return "kernel: io_uring"
        if (symbol ~ /^(_copy|copy_|rep_movs|__skb_datagram|simple_copy|clear_page|__check_obj)/)
            return "kernel: copies to and from user space"
        if (symbol ~ /^(skb_|__skb|kfree|kmem|__?k?malloc|__alloc|_*slab|__kfree|alloc_skb|consume_skb|napi_skb|get_page|free_|__free|_*memcg|rmqueue|put_page|mod_|__mod|page_|__build|_*folio|obj_cgroup|__virt_addr|__refill|refill|sk_page|memset)/)
            return "kernel: packet buffers"
        if (symbol ~ /^(_*tcp_|_*inet|_*sk_|bictcp|cubictcp|minmax|_*siphash|secure_)/)
            return "kernel: TCP"
        if (symbol ~ /^(_*ip_|ip6|ipv|fib|_*net_|_*netif|_*dev_|_*veth|process_backlog|_*napi|eth_|neigh|nf_|_*xfrm|.*softirq|dst|rt_|raw_|_*qdisc|enqueue_to|netdev|_*rcu|.*local_bh|passthru|_*irq)/)
            return "kernel: IP, devices, softirq"
        return "kernel: system calls, sockets, files, locks"
    }
    $1 ~ /%$/ {
        share = $1 + 0
        $1 = ""
        sub(/^ /, "")
        sub(/ +-.*$/, "")
        parts[part($0)] += share
        total += share
        if (show != "" && part($0) ~ show) printf "%6.2f %%  %s\n", share, $0 > "/dev/stderr"
    }
    END {
        printf "%.2f us of CPU time per request or connection, both ztunnels\n\n", each_us
        print "| part | share | us |\n| --- | ---: | ---: |"
        for (p in parts)
            printf "| %s | %.1f %% | %.2f |\n", p, 100 * parts[p] / total, each_us * parts[p] / total | "sort -t\"|\" -k2,2"
    }'
