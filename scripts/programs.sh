# What scripts/test.sh and scripts/kernels/run.sh share: building test programs, listing them, and
# taking over their outcome. Sourced.
# shellcheck shell=bash disable=SC2034 # used by those

passed=0 failed=0 skipped=0
broken=() features=()

# Builds every program and test program: logs directory, packages.
build_programs() {
    local logs=$1 start=$SECONDS
    shift
    # The slowdown that a comparison is to find.
    case " $* " in *" --workspace "* | *" ztunnel "*) features=(--features ztunnel/slowdown) ;; esac
    echo "test: building (profile lab)"
    cargo build --quiet --profile lab "$@" "${features[@]}" --bins
    cargo test --quiet --profile lab "$@" "${features[@]}" --no-run --message-format=json >"$logs/build.json"
    echo "test: built in $((SECONDS - start)) s"
}

# Stage, name, program and directory of every test program. Those of whole crates come first; the
# ones that set networks up come last, whole labs at the very end.
list_programs() {
    grep '"executable":"' "$1/build.json" | grep '"profile":{[^}]*"test":true' \
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
        done | sort -u
}

# Takes over the outcome of one program: name, its output's file, exit code, seconds it took, and the
# limit it had.
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
        if [ "$code" = 124 ]; then echo "    | stopped after $5 seconds"; fi
    fi
}
