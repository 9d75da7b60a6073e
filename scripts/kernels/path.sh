#!/usr/bin/env bash
# One path of the lab, end to end, with what it must be made of on this kernel:
#
#   scripts/kernels/path.sh tunnel geneve
#   scripts/kernels/path.sh ebpf clsact|tcx
#
# Data goes between pods on one node and on two, every byte compared. Prints its outcome as a test
# program does.
set -euo pipefail
redirect=$1 wanted=$2
bin=${LAB_BIN_DIR:?}
lab=kernel-$redirect
test=${redirect}_by_$wanted
servers=()

finish() {
    local code=$? pid
    for pid in "${servers[@]}"; do kill "$pid" 2>/dev/null || true; done
    if [ "$code" != 0 ]; then tail -n 40 "/run/zt-lab/$lab"/*.log 2>/dev/null || true; fi
    "$bin/lab" down --name "$lab" || code=1
    if [ "$code" = 0 ]; then
        echo "test $test ... ok"
        echo "test result: ok. 1 passed; 0 failed; 0 ignored"
    else
        echo "test $test ... FAILED"
        echo "test result: FAILED. 0 passed; 1 failed; 0 ignored"
    fi
    exit "$code"
}
trap finish EXIT

on() {
    local host=$1
    shift
    "$bin/lab" exec --name "$lab" "$host" -- "$@"
}

fail() {
    echo "$test: $*" >&2
    exit 1
}

# What the agent of the node says under this key.
agent_says() {
    on "$1" "$bin/node-agent" status --json --config "/run/zt-lab/$lab/$1-agent.yaml" |
        sed -n "s/.*\"$2\": *\"\\([^\"]*\\)\".*/\\1/p"
}

"$bin/lab" up --name "$lab" --redirect "$redirect"

# Which back end the data path has here is in its log.
grep -h -i -E 'io_uring|epoll' "/run/zt-lab/$lab/ztunnel-a.log" || true

for node in node-a node-b; do
    if [ "$redirect" = tunnel ]; then
        says=$(agent_says "$node" tunnel_driver)
    else
        says=$(agent_says "$node" attach)
    fi
    [ "$says" = "$wanted" ] || fail "the agent of $node says ${says:-nothing}, not $wanted"
done
if [ "$redirect" = tunnel ]; then
    driver=$("$bin/lab" status --name "$lab" --json | sed -n 's/.*"tunnel_driver": "\(.*\)".*/\1/p')
    [ "$driver" = "$wanted" ] || fail "the lab says ${driver:-nothing}, not $wanted"
    # The kernel's own word.
    for host in node-a node-b ztunnel-a ztunnel-b; do
        count=$(on "$host" ip -o -d link show type "$wanted" | wc -l)
        [ "$count" = 2 ] || fail "$host has $count interfaces of type $wanted, not 2"
    done
fi

for host in server-a server-b; do
    on "$host" "$bin/loadgen" serve --listen 0.0.0.0:8080 --mode echo >/dev/null &
    servers+=($!)
done
for address in 10.244.1.12 10.244.2.11; do
    for _ in $(seq 100); do
        if on client-a bash -c "exec 3<>/dev/tcp/$address/8080" 2>/dev/null; then break; fi
        sleep 0.2
    done
    on client-a "$bin/loadgen" rr --to "$address:8080" --connections 4 --size uniform:1-100000 \
        --duration 1 --verify
done
# The kernel's own word again: the tunnels carried the connections' first packets, the filters are there.
if [ "$redirect" = tunnel ]; then
    packets=$(on ztunnel-a ip -j -s link show pistioout |
        sed -n 's/.*"rx":{"bytes":[0-9]*,"packets":\([0-9]*\).*/\1/p')
    [ "${packets:-0}" -gt 0 ] || fail "no packet came through the tunnel"
elif [ "$wanted" = clsact ]; then
    filters=$(on node-a tc filter show dev va1 ingress)
    grep -q app_outbound <<<"$filters" || fail "no filter app_outbound on va1: $filters"
fi
