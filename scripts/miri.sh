#!/usr/bin/env bash
# Optional: the parts of rt that need no kernel under Miri, everything else under AddressSanitizer.
# Needs a nightly toolchain with the components miri and rust-src; the project itself does not.
set -euo pipefail
cd "$(dirname "$0")/.."

toolchain=${MIRI_TOOLCHAIN:-nightly}
target_dir=${CARGO_TARGET_DIR:-target}
if ! cargo "+$toolchain" miri --version >/dev/null 2>&1; then
    echo "miri.sh: no Miri: rustup toolchain install $toolchain --component miri,rust-src" >&2
    exit 1
fi

# Provenance is strict: blocks are handed to the kernel by address, and never got back from one.
CARGO_TARGET_DIR=$target_dir/miri MIRIFLAGS="-Zmiri-strict-provenance -Zmiri-disable-isolation" \
    cargo "+$toolchain" miri test -p rt --lib -- buf:: timer:: mailbox:: op:: sync::

# Sockets and rings are the real ones here, on both back ends. Tests that measure this process's
# memory are left out: the sanitizer keeps what is freed.
host=$(rustc "+$toolchain" -vV | sed -n 's/^host: //p')
CARGO_TARGET_DIR=$target_dir/asan RUSTFLAGS="-Zsanitizer=address" \
    cargo "+$toolchain" test -p rt --tests --target "$host" -- \
    --skip idle_connections_and_workers --skip short_connections_leave_nothing
