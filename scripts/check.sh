#!/usr/bin/env bash
# What every commit should pass, in less than a minute where the dependencies are built already:
# formatting, the house rules, and clippy of the crates with changes. `make lint` does the rest.
#
# Changes are those that are not committed, or, where there are none, the last commit's;
# BASE=main: all since main. --list: only prints the crates of the files named on standard input.
set -euo pipefail
cd "$(dirname "$0")/.."

# The directories of the workspace's crates.
members() {
    sed -n '/^members = \[/,/^\]/s/^ *"\(.*\)",$/\1/p' Cargo.toml
}

# The crates that the files on standard input belong to; all of them for what concerns all.
crates() {
    local file directory all=()
    mapfile -t all < <(members)
    while IFS= read -r file; do
        case $file in
        Cargo.toml | clippy.toml | rustfmt.toml | rust-toolchain*) printf '%s\n' "${all[@]}" ;;
        bpf/src/*) echo bpf/redirect ;;
        *.rs | *.toml | *.json | *.md)
            for directory in "${all[@]}"; do
                case $file in "$directory"/*) echo "$directory" ;; esac
            done
            ;;
        esac
    done | sort -u | while IFS= read -r directory; do
        sed -n '/^\[package\]/,/^\[/s/^name = "\(.*\)"$/\1/p' "$directory/Cargo.toml"
    done
}

changed() {
    if [ -n "${BASE:-}" ]; then
        git diff --name-only "$(git merge-base "$BASE" HEAD)"
    elif [ -n "$(git status --porcelain)" ]; then
        git diff --name-only HEAD
    else
        git diff --name-only HEAD~1
    fi
    git ls-files --others --exclude-standard
}

if [ "${1:-}" = --list ]; then
    crates
    exit
fi

cargo fmt --all --check
cargo test --quiet -p tidy
mapfile -t packages < <(changed | crates)
if [ ${#packages[@]} -gt 0 ]; then
    echo "clippy: ${packages[*]}"
    cargo clippy --quiet "${packages[@]/#/--package=}" --all-targets -- -D warnings
fi
echo "check: ok in $SECONDS s"
