#!/usr/bin/env bash
# Runs the tests of redirection on other kernels, each in a virtual machine of its own without any
# network: Debian's kernels, this machine's programs. Called by `make test-kernels`; docs/kernels.md
# says more. Prints as scripts/test.sh does and ends with `N passed, N failed, N skipped`.
#
#   KERNELS="5.10 6.1"   which kernels (default 6.1): 5.10, 6.1, 6.12, or Debian packages by name
#   KERNEL_TESTS=REGEXES only test programs whose name matches one, for example '^redirect/'; in the order
#                        of the regular expressions, separated by spaces
#   TEST_FILTER=words    only the matching tests of those
#   RESUME=1             goes on with the last run: with what was built for it, leaving out what has passed
#   ACCEL=tcg            one emulated processor even where KVM is there
#   ACCEL=mttcg          two emulated processors in real time: faster, for a machine with nothing else
#                        to do
#   VM_LIMIT_S=7200      seconds that one virtual machine may run
#
# Logs, the kernels' messages included, are kept in target/kernels/run-KERNEL.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/programs.sh

target=${CARGO_TARGET_DIR:-$PWD/target}
case "$target" in /*) ;; *) target=$PWD/$target ;; esac
kernels=$target/kernels
mkdir -p "$kernels"

memory_mib=2560
# Of one test program, by the guest's clock.
program_limit_s=1800

# What concerns the kernel: redirection, the runtime's back ends, and labs made of all parts.
wanted=${KERNEL_TESTS:-'^(kernel|redirect|node-agent|rt)/ ^lab/(lifecycle|own_node|security|traffic)$'}
# The crates these are of, and the programs that labs are made of.
crates=(-p redirect -p node-agent -p rt -p lab -p lab-cli -p loadgen -p ztunnel)

# The accelerator and what goes with it. An emulated processor is 10 to 50 times slower, and more on a
# busy machine, so that no time-out of any test would hold; there the guest's clock counts its own
# instructions (a quarter of a billion a second) while it works. QEMU can do that for one processor only.
use() {
    accelerator=$1
    case "$accelerator" in
        kvm) processor=(-accel kvm -smp 2) vm_limit_s=${VM_LIMIT_S:-3600} ;;
        tcg) processor=(-accel tcg -icount shift=2 -smp 1) vm_limit_s=${VM_LIMIT_S:-14400} ;;
        mttcg) processor=(-accel tcg,thread=multi -smp 2) vm_limit_s=${VM_LIMIT_S:-14400} ;;
        *)
            echo "test-kernels: unknown ACCEL $accelerator: use kvm, tcg or mttcg" >&2
            exit 2
            ;;
    esac
}
use "${ACCEL:-kvm}"
if [ "$accelerator" = kvm ] && ! { [ -r /dev/kvm ] && [ -w /dev/kvm ]; }; then use tcg; fi

vm=
stop() {
    if [ -z "$vm" ]; then return 0; fi
    kill -KILL "$vm" 2>/dev/null || true
    wait "$vm" 2>/dev/null || true
    vm=
}
trap stop EXIT
trap 'exit 130' INT TERM

# The lines of a test program: name, program and directory. Tests mostly wait, so two run at a time also
# where there is one processor. The longest program is run by modules, as separate programs, so that
# what one of them says is there before the others are done. How long enrolment takes is nothing to ask
# a virtual machine.
list_program() {
    local arguments="--show-output --test-threads 2" module
    if [ "$1" != redirect/redirection ] || [ -n "${TEST_FILTER:-}" ]; then
        printf '%s\t%s\t%s\t%s\t%s\n' "$@" "$program_limit_s" \
            "$arguments --skip enrolment:: ${TEST_FILTER:-}"
        return
    fi
    "$2" --list --format terse | sed -n 's/::.*: test$//p' | sort -u | while read -r module; do
        if [ "$module" = enrolment ]; then continue; fi
        printf '%s\t%s\t%s\t%s\t%s\n' "$1 $module" "$2" "$3" "$program_limit_s" \
            "$arguments $module::"
    done
}

# Name, program, directory, limit and arguments, one program a line, for the kernel $1.
make_list() {
    local attach=clsact all regex
    local -a wanted_in_order
    case "$1" in 6.12* | linux-image-6.12*) attach=tcx ;; esac
    all=$(
        printf 'kernel/%s\t%s\t%s\t%s\t%s\n' \
            tunnel "$PWD/scripts/kernels/path.sh" "$PWD" "$program_limit_s" "tunnel geneve" \
            ebpf "$PWD/scripts/kernels/path.sh" "$PWD" "$program_limit_s" "ebpf $attach"
        list_programs "$kernels" | while IFS=$'\t' read -r _stage name program directory; do
            list_program "$name" "$program" "$directory"
        done
    )
    read -ra wanted_in_order <<<"$wanted"
    for regex in "${wanted_in_order[@]}"; do
        awk -F '\t' -v regex="$regex" '$1 ~ regex' <<<"$all"
    done | awk -F '\t' '!seen[$1]++'
}

# Starts the virtual machine: directory of the kernel, exchange directory.
start_vm() {
    local kernel=$1 exchange=$2 share=local,security_model=none,multidevs=remap tag path
    local shares=()
    while read -r tag path; do
        if [ "$tag" = modules ]; then path=$kernel/tree; fi
        shares+=(-virtfs "$share,readonly=on,mount_tag=$tag,path=$path")
    done <"$exchange/shares"
    nice -n 19 qemu-system-x86_64 "${processor[@]}" -cpu max,arch-capabilities=off -m "$memory_mib" \
        -nodefaults -no-user-config -display none -no-reboot -nic none \
        -kernel "$kernel/vmlinuz" -initrd "$kernel/initramfs" \
        -append "console=ttyS0 earlyprintk=serial,ttyS0 panic=-1 oops=panic mitigations=off" \
        -serial "file:$exchange/console.log" -device virtio-rng-pci \
        -virtfs "$share,mount_tag=exchange,path=$exchange" "${shares[@]}" </dev/null \
        2>"$exchange/qemu.log" &
    vm=$!
}

# Some machines offer KVM and cannot run anything with it, virtual ones above all. A kernel that lives
# has a first word within a second.
check_accelerator() {
    local waited=0
    if [ "$accelerator" != kvm ]; then return 0; fi
    while [ ! -s "$2/console.log" ] && [ "$waited" -lt 20 ]; do
        sleep 1
        waited=$((waited + 1))
    done
    if [ -s "$2/console.log" ]; then return 0; fi
    echo "test-kernels: /dev/kvm runs nothing here: software emulation instead"
    stop
    use tcg
    start_vm "$1" "$2"
}

# Takes over what has ended since the last call. $1 kernel, $2 exchange directory.
collect() {
    local name file code seconds
    while IFS=$'\t' read -r name _; do
        file=$2/${name//[ \/]/-}
        if [ -e "$file.code" ] && [ ! -e "$file.seen" ]; then
            touch "$file.seen"
            read -r code seconds <"$file.code"
            account "$1 $name" "$file.log" "$code" "$seconds" "$program_limit_s"
            { grep -E 'BUG:|WARNING:|Oops|general protection|blocked for more' "$file.dmesg" || true; } |
                sed 's/^/       kernel: /'
        fi
    done <"$2/programs"
}

# What the virtual machine did not come to is a failure, told with the console's last words.
give_up_on() {
    local name file
    while IFS=$'\t' read -r name _; do
        file=$2/${name//[ \/]/-}
        if [ ! -e "$file.seen" ]; then
            failed=$((failed + 1))
            broken+=("$1 $name")
            printf '%-6s %-34s did not end: %s\n' FAILED "$1 $name" "$3"
            if [ -e "$file.start" ]; then sed 's/^/    | /' "$file.log" | tail -n 50; fi
        fi
    done <"$2/programs"
    tail -n 40 "$2/console.log" "$2/qemu.log" | sed 's/^/    # /'
}

# Makes the exchange directory ready: of an earlier run, what has passed is left, to be told again and
# not to be run again.
forget_what_failed() {
    local exchange=$1 file
    mkdir -p "$exchange"
    rm -f "$exchange"/{finished,console.log,qemu.log,*.seen}
    for file in "$exchange"/*.start; do
        file=${file%.start}
        if ! grep -qs '^0 ' "$file.code"; then rm -f "$file".{start,log,dmesg,code}; fi
    done
}

run_kernel() {
    local name=$1 kernel=$kernels/$1 exchange=$kernels/run-$1 deadline why=""
    scripts/kernels/fetch.sh "$name" "$kernel"
    if [ -z "${RESUME:-}" ]; then rm -rf "$exchange"; fi
    forget_what_failed "$exchange"
    cp scripts/kernels/guest.sh "$exchange/"
    make_list "$name" >"$exchange/programs"
    printf '%s\n' "$target/lab" >"$exchange/bin-dir"
    printf '%s\n' "usr /usr" "etc /etc" "source $PWD" "target $target/lab" "modules /modules" \
        >"$exchange/shares"
    start_vm "$kernel" "$exchange"
    check_accelerator "$kernel" "$exchange"
    echo "test-kernels: Linux $(cat "$kernel/version") (Debian $(cat "$kernel/package-version")), $accelerator"
    deadline=$((SECONDS + vm_limit_s))
    while kill -0 "$vm" 2>/dev/null && [ "$SECONDS" -lt "$deadline" ]; do
        sleep 1
        collect "$name" "$exchange"
    done
    if [ "$SECONDS" -ge "$deadline" ]; then why="the machine was stopped after $vm_limit_s seconds"; fi
    stop
    collect "$name" "$exchange"
    if [ ! -e "$exchange/finished" ]; then
        give_up_on "$name" "$exchange" "${why:-the machine went down}"
    fi
}

if [ -z "${RESUME:-}" ] || [ ! -e "$kernels/build.json" ]; then
    build_programs "$kernels" "${crates[@]}"
fi
for name in ${KERNELS:-6.1}; do
    run_kernel "$name"
done
if [ ${#broken[@]} != 0 ]; then echo "test-kernels: failed: ${broken[*]}"; fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] && [ $((passed + failed)) != 0 ]
