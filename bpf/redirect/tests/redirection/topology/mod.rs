//! A node, its ztunnel, three pods and a remote pod in network namespaces, and small servers.
//!
//! ```text
//! app1 10.244.1.11 -va1-+
//! app2 10.244.1.12 -va2-+
//! plain 10.244.1.13 -vp-+ node 10.244.1.1 -und 172.31.9.1 === 172.31.9.2 und- remote 10.244.2.11
//! ztunnel 10.244.1.2 -vz+
//! ```
//! Addresses are /32 with a route per pod on the node, as cloud network plugins give them.

pub(crate) mod frames;
mod many;
mod servers;
mod traces;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use redirect::{Attach, BackEnd, EbpfSettings, Node, Pod, Settings, Ztunnel};

pub(crate) use many::ManyPods;
pub(crate) use servers::{Answer, Echo, Server, Talk};
use servers::{CONNECT_PATIENCE, connect};

pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);
/// The node's address on the underlay.
pub(crate) const UNDERLAY: Ipv4Addr = Ipv4Addr::new(172, 31, 9, 1);
pub(crate) const ZTUNNEL: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
pub(crate) const APP1: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 11);
pub(crate) const APP2: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 12);
pub(crate) const PLAIN: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 13);
pub(crate) const REMOTE: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 11);

/// Whether this process may run such tests; says which test was skipped and why if not.
pub(crate) fn can_run(test: &str) -> bool {
    let allowed = nix::unistd::geteuid().is_root() && redirect::check_privileges(true).is_ok();
    if !allowed {
        // Not eprintln, which the test harness keeps to itself.
        let _ = writeln!(
            std::io::stderr(),
            "skipped: {test}: needs root for network namespaces and BPF"
        );
    }
    allowed
}

/// Runs `program args...` and returns its standard output; failing is a test failure.
pub(crate) fn run(line: &str) -> String {
    let words: Vec<_> = line.split_whitespace().collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success(),
        "{line}: {}: {stderr}",
        output.status
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs `work` on a thread of its own inside the namespace.
pub(crate) fn inside<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let helper = scope.spawn(|| {
            setns(File::open(netns).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        match helper.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Removes namespaces of tests that were killed.
fn remove_leftovers() {
    let Ok(names) = std::fs::read_dir("/run/netns") else {
        return; // never was one
    };
    for name in names.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
        let owner = name
            .strip_prefix("rd")
            .and_then(|rest| rest.split_once('x'));
        let Some(Ok(owner)) = owner.map(|(pid, _)| pid.parse::<u32>()) else {
            continue;
        };
        if !Path::new("/proc").join(owner.to_string()).exists() {
            // Another test program may have been quicker.
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
    }
}

/// The namespaces, removed when dropped.
#[derive(Debug)]
pub(crate) struct Topology {
    prefix: String,
    dir: tempfile::TempDir,
}

impl Topology {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        if number == 0 {
            remove_leftovers();
        }
        let prefix = format!("rd{}x{number}", std::process::id());
        let topology = Self {
            prefix,
            dir: tempfile::tempdir().unwrap(),
        };
        let bpffs = topology.bpffs_root();
        std::fs::create_dir(&bpffs).unwrap();
        mount(
            Some("bpf"),
            &bpffs,
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        for host in HOSTS {
            run(&format!("ip netns add {}", topology.name(host)));
            topology.ip(host, "link set lo up");
        }
        topology.underlay();
        topology.pod("ztunnel", ZTUNNEL, "vz");
        topology.pod("app1", APP1, "va1");
        topology.pod("app2", APP2, "va2");
        topology.pod("plain", PLAIN, "vp");
        topology.wait_for_links();
        topology
    }

    /// The kernel notices carriers a little later.
    fn wait_for_links(&self) {
        for host in HOSTS {
            while self.ip(host, "-br link show").contains(" DOWN ")
                || self.ip(host, "route show table all").contains("linkdown")
            {
                thread::sleep(Duration::from_millis(5));
            }
        }
    }

    fn underlay(&self) {
        let (node, remote) = (self.name("node"), self.name("remote"));
        run(&format!(
            "ip link add und netns {node} type veth peer name und netns {remote}"
        ));
        for (host, address) in [("node", "172.31.9.1"), ("remote", "172.31.9.2")] {
            self.ip(host, &format!("addr add {address}/24 dev und"));
            self.ip(host, "link set und up");
        }
        self.ip("node", "route add 10.244.2.0/24 via 172.31.9.2");
        self.ip("remote", &format!("addr add {REMOTE}/32 dev lo"));
        self.ip(
            "remote",
            &format!("route add 10.244.1.0/24 via 172.31.9.1 src {REMOTE}"),
        );
        self.sysctl("node", "net/ipv4/ip_forward", "1");
    }

    pub(crate) fn pod(&self, host: &str, address: Ipv4Addr, interface: &str) {
        let (node, pod) = (self.name("node"), self.name(host));
        run(&format!(
            "ip link add {interface} netns {node} type veth peer name eth0 netns {pod}"
        ));
        self.ip("node", &format!("addr add {NODE}/32 dev {interface}"));
        self.ip("node", &format!("link set {interface} up"));
        self.ip(host, &format!("addr add {address}/32 dev eth0"));
        self.ip(host, "link set eth0 up");
        self.ip(host, &format!("route add {NODE} dev eth0 scope link"));
        self.ip(
            host,
            &format!("route add default via {NODE} dev eth0 onlink"),
        );
        self.ip(
            "node",
            &format!("route add {address}/32 dev {interface} scope link src {NODE}"),
        );
    }

    /// A new namespace under the same name, as when ztunnel's pod is replaced.
    pub(crate) fn replace_ztunnel(&self) {
        run(&format!("ip netns del {}", self.name("ztunnel")));
        // The kernel takes its interfaces down a little later.
        while Command::new("ip")
            .args(["-n", &self.name("node"), "link", "show", "dev", "vz"])
            .output()
            .unwrap()
            .status
            .success()
        {
            thread::sleep(Duration::from_millis(10));
        }
        run(&format!("ip netns add {}", self.name("ztunnel")));
        self.ip("ztunnel", "link set lo up");
        self.pod("ztunnel", ZTUNNEL, "vz");
    }

    pub(crate) fn name(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }

    pub(crate) fn netns(&self, host: &str) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}", self.name(host)))
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where the redirection pins.
    pub(crate) fn bpffs(&self) -> PathBuf {
        self.bpffs_root().join("node")
    }

    pub(crate) fn bpffs_root(&self) -> PathBuf {
        self.dir.path().join("bpffs")
    }

    /// `ip -n HOST ...`.
    pub(crate) fn ip(&self, host: &str, line: &str) -> String {
        run(&format!("ip -n {} {line}", self.name(host)))
    }

    pub(crate) fn sysctl(&self, host: &str, name: &str, value: &str) {
        let path = format!("/proc/sys/{name}");
        inside(&self.netns(host), || std::fs::write(path, value).unwrap());
    }

    pub(crate) fn read_sysctl(&self, host: &str, name: &str) -> String {
        let path = format!("/proc/sys/{name}");
        inside(&self.netns(host), || {
            std::fs::read_to_string(path).unwrap().trim().to_owned()
        })
    }

    /// For `ebpf`; [`crate::shared::Kind::settings`] has those of others.
    pub(crate) fn settings(&self) -> Settings {
        Settings {
            node: Node {
                netns: Some(self.netns("node")),
                other_addresses: vec![],
                interfaces: vec!["und".into()],
                address: NODE,
                pod_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
            },
            ztunnel: Ztunnel {
                netns: self.netns("ztunnel"),
                interface: "eth0".into(),
                host_interface: "vz".into(),
                address: ZTUNNEL,
                address_v6: None,
            },
            state_dir: self.dir.path().join("state"),
            dns: false,
            back_end: BackEnd::Ebpf(EbpfSettings {
                bpffs: self.bpffs(),
                attach: Attach::Auto,
            }),
        }
    }

    pub(crate) fn pods(&self) -> Vec<Pod> {
        [("app1", APP1, "va1"), ("app2", APP2, "va2")]
            .map(|(host, address, interface)| Pod {
                uid: host.into(),
                namespace: "default".into(),
                name: host.into(),
                service_account: "default".into(),
                addresses: vec![address.into()],
                netns: self.netns(host),
                host_interface: interface.into(),
            })
            .to_vec()
    }

    /// Connects from `host` and returns what the server says, or what went wrong.
    pub(crate) fn ask(&self, host: &str, to: (Ipv4Addr, u16)) -> Result<Answer, std::io::Error> {
        self.ask_from(host, None, to)
    }

    /// As [`Topology::ask`], with a source address that need not be the host's.
    pub(crate) fn ask_from(
        &self,
        host: &str,
        from: Option<Ipv4Addr>,
        to: (Ipv4Addr, u16),
    ) -> Result<Answer, std::io::Error> {
        self.ask_any(host, from.map(IpAddr::from), to.into())
    }

    /// As [`Topology::ask_from`], in either family.
    pub(crate) fn ask_any(
        &self,
        host: &str,
        from: Option<IpAddr>,
        to: SocketAddr,
    ) -> Result<Answer, std::io::Error> {
        inside(&self.netns(host), || {
            let mut stream = connect(from, to)?;
            stream.set_read_timeout(Some(CONNECT_PATIENCE))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            let local = stream.local_addr()?;
            Answer::parse(&text, local)
        })
    }

    /// A connection from `host` to an [`Echo`].
    pub(crate) fn talk(&self, host: &str, to: SocketAddr) -> Talk {
        self.talk_any(host, None, to)
    }

    /// As [`Topology::talk`], with a source address that need not be the host's.
    pub(crate) fn talk_from(&self, host: &str, from: Ipv4Addr, to: SocketAddr) -> Talk {
        self.talk_any(host, Some(from.into()), to)
    }

    /// As [`Topology::talk_from`], in either family.
    pub(crate) fn talk_any(&self, host: &str, from: Option<IpAddr>, to: SocketAddr) -> Talk {
        let stream = inside(&self.netns(host), || connect(from, to));
        Talk::new(stream.unwrap_or_else(|e| panic!("{host} {from:?} -> {to}: {e}")))
    }

    /// Has the link between node and remote take packets of `mtu` bytes, while the remote pod goes
    /// on asking for segments that need 1,500, as one farther away would. At both ends: were it
    /// told of the node's alone, remote would send full-sized segments, of which veth drops without
    /// a word those that come alone, and passes those that come as one large packet. Whether a
    /// transfer ends is then chance; after a loss it does not.
    pub(crate) fn narrow_underlay(&self, mtu: u32) {
        for host in ["node", "remote"] {
            self.ip(host, &format!("link set und mtu {mtu}"));
        }
        self.ip(
            "remote",
            &format!("route replace 10.244.1.0/24 via 172.31.9.1 src {REMOTE} advmss 1460"),
        );
    }

    /// Gives everyone but the node an IPv6 address: pods `fd00:1::`, the remote pod `fd00:2::11`.
    pub(crate) fn add_ipv6(&self) {
        for (host, interfaces) in [
            ("node", &["vz", "va1", "va2", "vp", "und"][..]),
            ("ztunnel", &["eth0"]),
            ("app1", &["eth0"]),
            ("app2", &["eth0"]),
            ("plain", &["eth0"]),
            ("remote", &["und", "lo"]),
        ] {
            // Anew, without looking for duplicates, which takes a second or two.
            for interface in interfaces {
                for (name, value) in [
                    ("accept_dad", "0"),
                    ("dad_transmits", "0"),
                    ("disable_ipv6", "1"),
                    ("disable_ipv6", "0"),
                ] {
                    self.sysctl(host, &format!("net/ipv6/conf/{interface}/{name}"), value);
                }
            }
        }
        self.sysctl("node", "net/ipv6/conf/all/forwarding", "1");
        for (host, interface, address) in [
            ("ztunnel", "vz", "fd00:1::2"),
            ("app1", "va1", "fd00:1::11"),
            ("app2", "va2", "fd00:1::12"),
            ("plain", "vp", "fd00:1::13"),
        ] {
            self.ip(
                "node",
                &format!("addr add fe80::1/64 dev {interface} nodad"),
            );
            self.ip("node", &format!("route add {address}/128 dev {interface}"));
            self.ip(host, &format!("addr add {address}/128 dev eth0 nodad"));
            self.ip(host, "route add default via fe80::1 dev eth0");
        }
        for (host, last, other, pods) in [("node", 1, 2, "fd00:2::"), ("remote", 2, 1, "fd00:1::")]
        {
            self.ip(host, &format!("addr add fd00:9::{last}/64 dev und nodad"));
            self.ip(host, &format!("route add {pods}/64 via fd00:9::{other}"));
        }
        self.ip("remote", "addr add fd00:2::11/128 dev lo nodad");
        self.ip(
            "remote",
            "route replace fd00:1::/64 via fd00:9::1 src fd00:2::11",
        );
    }
}

const HOSTS: [&str; 6] = ["node", "ztunnel", "app1", "app2", "plain", "remote"];

impl Topology {
    pub(crate) fn remove_namespaces(&self) {
        for host in HOSTS {
            let name = self.name(host);
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        self.remove_namespaces();
        let _ = umount2(&self.bpffs_root(), MntFlags::MNT_DETACH);
    }
}
