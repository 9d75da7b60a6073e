#!/usr/bin/env bash
# Builds and runs every test: unit tests first, then those that set networks up. Ends with
# `N passed, N failed, N skipped` alone on a line, and fails if a test failed or none ran.
#
# A test that cannot run here prints `skipped: NAME: REASON`, which is shown and counted.
# Logs are kept in target/test-logs. TEST_FILTER=words runs only the matching tests, and
# TEST_PACKAGES="-p mesh -p tls" only those of some crates. FAILED_BEFORE=word counts as a failure
# that came before.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/programs.sh

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

# Runs one test program: name, program, its package's directory.
run() {
    local name=$1 program=$2 directory=$3 code=0 start=$SECONDS
    local log=$logs/${name//[ \/]/-}.log
    # shellcheck disable=SC2086 # the filter is a list of words
    (cd "$directory" && CARGO_MANIFEST_DIR=$directory timeout -k 10 "$limit_s" \
        "$program" --show-output ${TEST_FILTER:-}) </dev/null >"$log" 2>&1 || code=$?
    account "$name" "$log" "$code" $((SECONDS - start)) "$limit_s"
}

build_programs "$logs" "${packages[@]}"
list=$logs/programs
list_programs "$logs" >"$list"

while IFS=$'\t' read -r _stage name program directory; do
    run "$name" "$program" "$directory"
done <"$list"

if [ -z "${TEST_FILTER:-}" ]; then
    start=$SECONDS code=0
    cargo test --quiet --profile lab "${packages[@]}" "${features[@]}" --doc >"$logs/doc.log" 2>&1 || code=$?
    account "documentation" "$logs/doc.log" "$code" $((SECONDS - start)) "$limit_s"
fi

if [ -n "${FAILED_BEFORE:-}" ]; then
    broken+=("$FAILED_BEFORE")
    failed=$((failed + 1))
fi
if [ ${#broken[@]} != 0 ]; then echo "test: failed: ${broken[*]}"; fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] && [ $((passed + failed)) != 0 ]
