#!/usr/bin/env bash
# Builds and runs every test: unit tests first, then those that set networks up. Ends with
# `N passed, N failed, N skipped` alone on a line, and fails if a test failed or none ran.
#
# A test that cannot run here prints `skipped: NAME: REASON`, which is shown and counted.
# Logs are kept in target/test-logs. TEST_FILTER=words runs only the matching tests, and
# TEST_PACKAGES="-p mesh -p tls" only those of some crates.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-$PWD/target}
case "$target" in /*) ;; *) target=$PWD/$target ;; esac
logs=$target/test-logs
rm -rf "$logs"
mkdir -p "$logs"

# The tests take the programs from here.
export LAB_BIN_DIR=$target/lab

# No single test program runs longer than this.
limit_s=1200

read -r -a packages <<<"${TEST_PACKAGES:---workspace}"

passed=0 failed=0 skipped=0
broken=()

# Takes over the outcome of one program whose output is in $2: name, log, exit code, seconds.
account() {
    local name=$1 log=$2 code=$3 seconds=$4 p=0 f=0 i=0 s=0 word=ok
    if grep -q '^test result: ' "$log"; then
        read -r p f i < <(awk '/^test result: / {
            for (k = 2; k <= NF; k++) {
                if ($k ~ /^passed;/) p += $(k - 1)
                if ($k ~ /^failed;/) f += $(k - 1)
                if ($k ~ /^ignored;/) i += $(k - 1)
            }
        } END {print p + 0, f + 0, i + 0}' "$log")
    fi
    # A program that died has not said which test it was.
    if [ "$code" != 0 ] && [ "$f" = 0 ]; then f=1; fi
    s=$( (grep -oE 'skipped: .+' "$log" || true) | sort -u | wc -l)
    if [ "$s" -gt "$p" ]; then s=$p; fi
    p=$((p - s))
    s=$((s + i))
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    if [ "$f" != 0 ]; then
        word=FAILED
        broken+=("$name")
    fi
    if [ $((p + f + s)) -gt 0 ]; then
        printf '%-6s %-34s %4d passed %3d failed %3d skipped %6ss\n' \
            "$word" "$name" "$p" "$f" "$s" "$seconds"
    fi
    if [ "$s" != 0 ]; then
        (grep -oE 'skipped: .+' "$log" || true) | sort -u | sed 's/^/       /'
        (grep -E '^test .* \.\.\. ignored' "$log" || true) | sed 's/^test /       skipped: /'
    fi
    if [ "$f" != 0 ]; then
        sed 's/^/    | /' "$log"
        if [ "$code" = 124 ]; then echo "    | stopped after $limit_s seconds"; fi
    fi
}

# Runs one test program: name, program, its package's directory.
run() {
    local name=$1 program=$2 directory=$3 code=0 start=$SECONDS
    local log=$logs/${name//[ \/]/-}.log
    # shellcheck disable=SC2086 # the filter is a list of words
    (cd "$directory" && CARGO_MANIFEST_DIR=$directory timeout -k 10 "$limit_s" \
        "$program" --show-output ${TEST_FILTER:-}) </dev/null >"$log" 2>&1 || code=$?
    account "$name" "$log" "$code" $((SECONDS - start))
}

echo "test: building (profile lab)"
start=$SECONDS
cargo build --quiet --profile lab "${packages[@]}" --bins
cargo test --quiet --profile lab "${packages[@]}" --no-run --message-format=json >"$logs/build.json"
echo "test: built in $((SECONDS - start)) s"

# Stage, name, program and directory of every test program. Those of whole crates come first; the
# ones that set networks up come last, whole labs at the very end.
list=$logs/programs
grep '"executable":"' "$logs/build.json" | grep '"profile":{[^}]*"test":true' \
    | sed -E 's/.*"manifest_path":"([^"]+)\/Cargo.toml","target":\{"kind":\["([^"]+)"\].*"name":"([^"]+)","src_path".*"executable":"([^"]+)".*/\1\t\2\t\3\t\4/' \
    | while IFS=$'\t' read -r directory kind name program; do
        package=$(basename "$directory")
        case "$kind $package $name" in
            "lib tidy "* | "test tidy "*) stage=0 ;;
            "lib "* | "bin "*) stage=1 ;;
            "test lab "*) stage=4 ;;
            "test redirect "* | "test node-agent "* | *" netns"* | *" root"*) stage=3 ;;
            *) stage=2 ;;
        esac
        if [ "$kind" != test ]; then name=$kind; fi
        printf '%s\t%s\t%s\t%s\n' "$stage" "$package/$name" "$program" "$directory"
    done | sort -u >"$list"

while IFS=$'\t' read -r _stage name program directory; do
    run "$name" "$program" "$directory"
done <"$list"

if [ -z "${TEST_FILTER:-}" ]; then
    start=$SECONDS code=0
    cargo test --quiet --profile lab "${packages[@]}" --doc >"$logs/doc.log" 2>&1 || code=$?
    account "documentation" "$logs/doc.log" "$code" $((SECONDS - start))
fi

if [ ${#broken[@]} != 0 ]; then echo "test: failed: ${broken[*]}"; fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] && [ $((passed + failed)) != 0 ]
