#!/bin/bash
# The first process of the virtual machine once its root is in place: mounts what a Linux system has,
# runs each program that /exchange/programs lists, writes its output and exit code beside it, and
# turns the machine off. There is no network but what the tests make.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debugfs /sys/kernel/debug
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
ln -s /run /var/run
mkdir -p /run/lock /var/lib/nginx /var/log/nginx /var/cache /var/lib/redis
hostname kernel-test
ip link set lo up

# The kernel's own way to load what is asked for (an interface type, an iptables match), from where
# this kernel's modules are.
cat >/run/modprobe <<'MODPROBE'
#!/bin/sh
exec /usr/sbin/modprobe -d /modules "$@"
MODPROBE
chmod 755 /run/modprobe
echo /run/modprobe >/proc/sys/kernel/modprobe

# What a node with kube-proxy and a network plugin has loaded long before. Other modules come when
# they are asked for.
for module in veth geneve cls_bpf sch_ingress nf_tables nft_compat nft_chain_nat ip_set_hash_ip \
    xt_set xt_mark xt_connmark xt_conntrack xt_owner xt_socket xt_tcpudp xt_CT xt_TPROXY; do
    /run/modprobe -q "$module"
done

# Whole files come faster from outside than their pages one by one, at the price of some memory.
bin=$(cat /exchange/bin-dir)
cat "$bin"/{lab,loadgen,node-agent,ztunnel} /usr/sbin/xtables-nft-multi /bin/{ip,bash} >/dev/null

uname -r >/exchange/release
while IFS=$'\t' read -r name program directory limit_s arguments; do
    file=/exchange/${name//[ \/]/-}
    if [ -e "$file.code" ]; then continue; fi # passed in an earlier run that is resumed
    cat "$program" >/dev/null
    dmesg --clear
    date +%s >"$file.start"
    # shellcheck disable=SC2086 # a list of words
    (cd "$directory" && CARGO_MANIFEST_DIR=$directory LAB_BIN_DIR=$bin \
        exec timeout -k 10 "$limit_s" "$program" $arguments) </dev/null >"$file.log" 2>&1
    code=$?
    dmesg >"$file.dmesg"
    echo "$code $(($(date +%s) - $(cat "$file.start")))" >"$file.code.new"
    mv "$file.code.new" "$file.code"
done </exchange/programs
touch /exchange/finished
sync
exec /busybox poweroff -f
