//! What the kernel says of the namespaces: counters, and all that redirection could leave behind.

use std::collections::BTreeSet;
use std::process::Command;

use super::{Topology, inside};

impl Topology {
    /// What the kernel counts in `host`: a number of `/proc/net/snmp` or `netstat`, such as Tcp
    /// RetransSegs.
    pub(crate) fn snmp(&self, host: &str, protocol: &str, name: &str) -> u64 {
        let text = inside(&self.netns(host), || {
            ["snmp", "netstat"]
                .map(|file| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")))
                .map(Result::unwrap)
                .concat()
        });
        let mut lines = text.lines().filter(|line| line.starts_with(protocol));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let at = names.split(' ').position(|word| word == name).unwrap();
        values.split(' ').nth(at).unwrap().parse().unwrap()
    }

    /// Names in the BPF file system's root, without the kernel's own.
    pub(crate) fn pins(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.bpffs_root()).unwrap();
        let name = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
        entries
            .flatten()
            .map(name)
            .filter(|name| !name.ends_with(".debug"))
            .collect()
    }

    /// Everything redirection could leave behind, by line, for comparing before and after.
    pub(crate) fn traces(&self) -> BTreeSet<String> {
        let mut all = String::new();
        for host in ["node", "ztunnel", "app1", "app2"] {
            for what in [
                "rule",
                "-6 rule",
                "-br link",
                "-4 -br addr",
                "-4 route",
                "-6 route",
            ] {
                let table = if what.ends_with("route") {
                    "table all"
                } else {
                    ""
                };
                let shown = self.ip(host, &format!("{what} show {table}"));
                // The kernel's own come and go with neighbour discovery.
                let kept = |line: &&str| !(what == "-6 route" && line.contains("proto kernel"));
                all += &shown
                    .lines()
                    .filter(kept)
                    .map(|line| format!("{host} {what} {line}\n"))
                    .collect::<String>();
            }
            let tool = |program: &str, args: &[&str]| {
                let output = inside(&self.netns(host), || {
                    Command::new(program).args(args).output().unwrap()
                });
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                text.lines()
                    .filter(|line| !line.starts_with('#'))
                    .collect::<Vec<_>>()
                    .join("\n")
            };
            for table in ["mangle", "nat", "filter"] {
                let rules = tool("iptables-save", &["-t", table]);
                // An empty table and one that was never used are the same.
                all += &rules
                    .lines()
                    .filter(|l| l.starts_with("-A"))
                    .collect::<Vec<_>>()
                    .join("\n");
                all += &rules
                    .lines()
                    .filter(|l| l.contains("ztunnel"))
                    .collect::<Vec<_>>()
                    .join("\n");
            }
            all += &tool("ipset", &["list", "-n"]);
            all += &tool("tc", &["qdisc", "show"]);
            all += &tool("bpftool", &["net", "show"]);
        }
        for name in ["all", "default", "vz", "va1", "va2"] {
            for key in ["rp_filter", "accept_local"] {
                let value = self.read_sysctl("node", &format!("net/ipv4/conf/{name}/{key}"));
                all += &format!("{name} {key} {value}\n");
            }
        }
        for name in ["all", "default", "eth0"] {
            let key = format!("net/ipv4/conf/{name}/rp_filter");
            all += &format!("ztunnel {name} {}\n", self.read_sysctl("ztunnel", &key));
        }
        all += &format!("pins {:?}\n", self.pins());
        all.lines().map(str::to_owned).collect()
    }
}
