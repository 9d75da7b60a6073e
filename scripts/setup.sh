#!/usr/bin/env bash
# Installs what building, testing and comparing need on Debian 12, and nothing that is there already.
#
#   scripts/setup.sh                everything; fails if something stays missing
#   scripts/setup.sh --best-effort  fails only without what the build needs; says what else is missing
#
# Rust is not touched: rustup or the distribution's is the user's own affair. Packages that bring a
# service (nginx, redis) are installed without starting or enabling it.
set -euo pipefail

best_effort=no
case "${1:-}" in
    "") ;;
    --best-effort) best_effort=yes ;;
    -h | --help)
        sed -n '2,8s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *)
        echo "setup: unknown argument $1: use --best-effort or nothing" >&2
        exit 2
        ;;
esac

# need | how to find it (command, or an absolute path) | Debian package
needs="\
build cc build-essential
build make make
build git git
build cmake cmake
build clang clang
build /usr/include/bpf/bpf_helpers.h libbpf-dev
build /usr/include/linux/bpf.h linux-libc-dev
lint llvm-objdump llvm
run ip iproute2
run tc iproute2
run iptables iptables
run ipset ipset
run sysctl procps
run mount mount
run bpftool bpftool
run tcpdump tcpdump
run curl curl
run nginx nginx-light
run redis-server redis-server
run redis-benchmark redis-tools"

# Where administration tools are, which an ordinary user's PATH may lack.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

present() {
    case "$1" in
        /*) [ -e "$1" ] ;;
        *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

# Prints the lines of $needs whose thing is not there.
missing() {
    local kind thing package
    while read -r kind thing package; do
        present "$thing" || echo "$kind $thing $package"
    done <<<"$needs"
}

# No rule file of ours outlives this script, and nobody else's is overwritten.
policy=/usr/sbin/policy-rc.d
policy_is_ours=no
cleanup() {
    if [ "$policy_is_ours" = yes ]; then rm -f "$policy"; fi
}
trap cleanup EXIT

install_packages() {
    if [ ! -e "$policy" ]; then
        policy_is_ours=yes
        printf '%s\n' '#!/bin/sh' \
            'case "$1" in nginx | redis-server | redis) exit 101 ;; esac' 'exit 0' >"$policy"
        chmod 755 "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    local apt=(apt-get -qq -o DPkg::Lock::Timeout=300)
    "${apt[@]}" update
    "${apt[@]}" install -y --no-install-recommends "$@" >/dev/null
    local package unit
    for package in "$@"; do
        case "$package" in
            nginx-light) unit=nginx ;;
            redis-server) unit=redis-server ;;
            *) continue ;;
        esac
        # Not at the next start of the machine either. Without systemd there is nothing to disable.
        if command -v systemctl >/dev/null 2>&1; then
            systemctl disable --quiet "$unit" >/dev/null 2>&1 || true
        fi
    done
}

if ! command -v cargo >/dev/null 2>&1; then
    echo "setup: cargo not found in PATH: install Rust 1.95 or later (https://rustup.rs)" >&2
    exit 1
fi

lacking=$(missing)
if [ -z "$lacking" ]; then
    echo "setup: everything is there"
    exit 0
fi
packages=$(awk '{print $3}' <<<"$lacking" | sort -u | tr '\n' ' ')

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "setup: installing ${packages% }"
    # shellcheck disable=SC2086 # a list of words
    install_packages $packages || echo "setup: apt-get failed, see above" >&2
    lacking=$(missing)
    if [ -z "$lacking" ]; then
        echo "setup: everything is there now"
        exit 0
    fi
    packages=$(awk '{print $3}' <<<"$lacking" | sort -u | tr '\n' ' ')
fi

things=$(awk '{print $2}' <<<"$lacking" | tr '\n' ' ')
echo "setup: missing: ${things% }; as root on Debian 12: apt-get install ${packages% }" >&2
if [ "$best_effort" = yes ] && ! grep -q '^build ' <<<"$lacking"; then
    echo "setup: going on without; what needs them is skipped by name" >&2
    exit 0
fi
exit 1
