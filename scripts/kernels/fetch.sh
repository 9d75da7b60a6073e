#!/usr/bin/env bash
# Fetches one of Debian's kernels, unpacks it, and makes the small initial file system it starts with.
# Nothing is installed: /boot, the boot loader and this machine's package lists stay as they are.
#
#   scripts/kernels/fetch.sh KERNEL DIRECTORY
#
# KERNEL is 5.10, 6.1 or 6.12 (the newest of Debian 11, 12 or 13), or one of their packages by name,
# for example linux-image-6.1.0-54-amd64. What DIRECTORY has already is not fetched again.
# DEBIAN_MIRROR and DEBIAN_SECURITY_MIRROR name other mirrors than deb.debian.org.
set -euo pipefail
kernel=$1
directory=$(realpath -m "$2")
here=$(cd "$(dirname "$0")" && pwd)
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
security=${DEBIAN_SECURITY_MIRROR:-http://deb.debian.org/debian-security}

# What has to be loaded before the file systems of the machine can be mounted. All else is loaded by
# the running kernel when it is asked for.
modules="virtio_pci 9pnet_virtio 9p"

case "$kernel" in
    5.10) suite=bullseye package=linux-image-amd64 ;;
    6.1) suite=bookworm package=linux-image-amd64 ;;
    6.12) suite=trixie package=linux-image-amd64 ;;
    linux-image-5.10.0-*) suite=bullseye package=$kernel ;;
    linux-image-6.1.0-*) suite=bookworm package=$kernel ;;
    linux-image-6.12.*+deb13-*) suite=trixie package=$kernel ;;
    *)
        echo "test-kernels: unknown kernel $kernel: use 5.10, 6.1, 6.12 or a package of Debian 11" \
            "to 13 like linux-image-6.1.0-54-amd64" >&2
        exit 2
        ;;
esac

# A package manager of its own: lists, cache and sources below the directory.
own=$directory/../apt/$suite
options=(-qq -o "Dir::Etc::sourcelist=$own/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::Etc::preferencesparts=/dev/null -o "Dir::State::lists=$own/lists" -o "Dir::Cache=$own"
    -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o Dir::State::status=/dev/null
    -o APT::Sandbox::User=root -o Acquire::Languages=none -o Acquire::Check-Valid-Until=false)

# Into $1. linux-image-amd64 holds nothing, it only names the newest.
fetch_package() {
    mkdir -p "$own/lists/partial" "$own/archives/partial"
    printf '%s\n' "deb $mirror $suite main" "deb $security $suite-security main" >"$own/sources.list"
    apt-get "${options[@]}" update
    if [ "$package" = linux-image-amd64 ]; then
        package=$(apt-cache "${options[@]}" depends linux-image-amd64 |
            awk '$1 == "Depends:" && $2 ~ /^linux-image-[0-9]/ {print $2; exit}')
        if [ -z "$package" ]; then
            echo "test-kernels: $suite on $mirror has no linux-image-amd64" >&2
            exit 1
        fi
    fi
    (cd "$1" && apt-get "${options[@]}" download "$package")
}

# Busybox, the modules in the order in which they need each other, and `init`.
make_initramfs() {
    local root=$1 tree=$2 version=$3 to=$4 kind module name rest
    mkdir -p "$root/bin" "$root/modules"
    cp "$(command -v busybox)" "$root/bin/busybox"
    if ldd "$root/bin/busybox" >/dev/null 2>&1; then
        echo "test-kernels: $(command -v busybox) is not static: install the package busybox-static" >&2
        exit 1
    fi
    install -m 755 "$here/init" "$root/init"
    for module in $modules; do
        PATH=$PATH:/usr/sbin:/sbin modprobe -d "$tree" -S "$version" --show-depends "$module"
    done | while read -r kind module rest; do
        if [ "$kind" != insmod ]; then continue; fi
        name=$(basename "$module")
        case "$name" in
            *.xz) name=${name%.xz} && xz -dc "$module" >"$root/modules/$name" ;;
            *.zst) name=${name%.zst} && zstd -qdc "$module" >"$root/modules/$name" ;;
            *) cp "$module" "$root/modules/" ;;
        esac
        grep -qxF "$name" "$root/modules/order" 2>/dev/null || echo "$name" >>"$root/modules/order"
    done
    [ -s "$root/modules/order" ]
    (cd "$root" && find . | cpio --quiet -o -H newc | gzip -1) >"$to.new"
    mv "$to.new" "$to"
}

if [ -e "$directory/version" ] && [ -z "${KERNEL_REFRESH:-}" ]; then
    version=$(cat "$directory/version")
else
    echo "test-kernels: fetching Linux $kernel from $mirror ($suite)"
    rm -rf "$directory"
    mkdir -p "$directory/package"
    fetch_package "$directory/package"
    dpkg-deb -x "$directory"/package/linux-image-*.deb "$directory/tree"
    image=$(echo "$directory"/tree/boot/vmlinuz-*)
    version=${image##*/vmlinuz-}
    if [ -d "$directory/tree/usr/lib/modules" ]; then ln -sfn usr/lib "$directory/tree/lib"; fi
    PATH=$PATH:/usr/sbin:/sbin depmod -b "$directory/tree" "$version"
    cp "$image" "$directory/vmlinuz"
    dpkg-deb -f "$directory"/package/linux-image-*.deb Version >"$directory/package-version"
    rm -rf "$directory/package"
    echo "$version" >"$directory/version" # last: what is there is whole
fi

# Made each time, as `init` may have changed.
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
make_initramfs "$root" "$directory/tree" "$version" "$directory/initramfs"
