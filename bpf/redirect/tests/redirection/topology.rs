//! A node, its ztunnel, three pods and a remote pod in network namespaces, and small servers.
//!
//! ```text
//! app1 10.244.1.11 -va1-+
//! app2 10.244.1.12 -va2-+
//! plain 10.244.1.13 -vp-+ node 10.244.1.1 -und 172.31.9.1 === 172.31.9.2 und- remote 10.244.2.11
//! ztunnel 10.244.1.2 -vz+
//! ```
//! Addresses are /32 with a route per pod on the node, as cloud network plugins give them.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use redirect::{Attach, Iptables, ListenerMap, Node, Pod, Role, Settings, Variant, Ztunnel};
use socket2::{Domain, Protocol, Socket, Type};

pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);
/// The node's address on the underlay.
pub(crate) const UNDERLAY: Ipv4Addr = Ipv4Addr::new(172, 31, 9, 1);
pub(crate) const ZTUNNEL: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
pub(crate) const APP1: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 11);
pub(crate) const APP2: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 12);
pub(crate) const PLAIN: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 13);
pub(crate) const REMOTE: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 11);

const CONNECT_PATIENCE: Duration = Duration::from_millis(1500);

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
            bpffs: self.bpffs_root().join("node"),
            variant: Variant::Hardened,
            iptables: Iptables::Auto,
            attach: Attach::Auto,
            dns: false,
        }
    }

    pub(crate) fn pods(&self) -> Vec<Pod> {
        [("app1", APP1, "va1"), ("app2", APP2, "va2")]
            .map(|(host, address, interface)| Pod {
                uid: host.into(),
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
        let stream = inside(&self.netns(host), || connect(None, to).unwrap());
        Talk::new(stream)
    }

    /// As [`Topology::talk`], with a source address that need not be the host's.
    pub(crate) fn talk_from(&self, host: &str, from: Ipv4Addr, to: SocketAddr) -> Talk {
        let stream = inside(&self.netns(host), || {
            connect(Some(from.into()), to).unwrap()
        });
        Talk::new(stream)
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

fn connect(from: Option<IpAddr>, to: SocketAddr) -> Result<TcpStream, std::io::Error> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    if let Some(source) = from {
        socket.set_ip_transparent_v4(true)?;
        socket.bind(&SocketAddr::from((source, 0)).into())?;
    }
    socket.connect_timeout(&to.into(), CONNECT_PATIENCE)?;
    Ok(TcpStream::from(socket))
}

/// A server that sends back what it gets, on all connections at once.
#[derive(Debug)]
pub(crate) struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    pub(crate) fn app(netns: &Path, port: u16) -> Self {
        let address = (Ipv6Addr::UNSPECIFIED, port).into();
        Self::serve(inside(netns, || listen(address, false)))
    }

    /// ztunnel's outbound listener as an echo.
    pub(crate) fn ztunnel(netns: &Path, map: Option<&Path>) -> Self {
        let address = (Ipv6Addr::UNSPECIFIED, 15001).into();
        let socket = inside(netns, || listen(address, true));
        if let Some(path) = map {
            let mut map = ListenerMap::open(path).unwrap();
            map.set(Role::Outbound, 0, socket.as_fd()).unwrap();
        }
        Self::serve(socket)
    }

    fn serve(socket: TcpListener) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        socket.set_nonblocking(true).unwrap();
        let thread = thread::spawn(move || {
            let mut open: Vec<TcpStream> = Vec::new();
            let mut buffer = vec![0; 65536];
            while !stopped.load(Ordering::Relaxed) {
                let mut idle = true;
                if let Ok((stream, _)) = socket.accept() {
                    stream.set_nonblocking(true).unwrap();
                    open.push(stream);
                    idle = false;
                }
                open.retain_mut(|stream| match stream.read(&mut buffer) {
                    Ok(0) => false,
                    Ok(count) => {
                        idle = false;
                        stream.set_nonblocking(false).unwrap();
                        let sent = stream.write_all(&buffer[..count]).is_ok();
                        stream.set_nonblocking(true).unwrap();
                        sent
                    }
                    Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
                });
                if idle {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A connection to an [`Echo`].
#[derive(Debug)]
pub(crate) struct Talk(TcpStream);

impl Talk {
    fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(3)))
            .unwrap();
        Self(stream)
    }

    /// Sends something and gets it back.
    pub(crate) fn ping(&mut self) -> Result<(), std::io::Error> {
        self.exchange(b"are you there?")
    }

    pub(crate) fn exchange(&mut self, message: &[u8]) -> Result<(), std::io::Error> {
        let mut sender = self.0.try_clone()?;
        let mut answer = vec![0; message.len()];
        thread::scope(|scope| {
            scope.spawn(move || sender.write_all(message));
            self.0.read_exact(&mut answer)
        })?;
        assert!(answer == message, "other bytes than were sent");
        Ok(())
    }
}

/// What a server said about a connection.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Answer {
    /// Label of the server that answered.
    pub(crate) label: String,
    /// The peer as the server sees it.
    pub(crate) peer: SocketAddr,
    /// The local address as the server sees it.
    pub(crate) local: SocketAddr,
    /// The client's own local address.
    pub(crate) client: SocketAddr,
}

impl Answer {
    fn parse(text: &str, client: SocketAddr) -> Result<Self, std::io::Error> {
        let words: Vec<_> = text.split_whitespace().collect();
        let [label, peer, local] = words[..] else {
            return Err(std::io::Error::other(format!("no answer but {text:?}")));
        };
        Ok(Self {
            label: label.to_owned(),
            peer: peer.parse().unwrap(),
            local: local.parse().unwrap(),
            client,
        })
    }
}

/// A server that says who it is, who connected and to what, and closes.
#[derive(Debug)]
pub(crate) struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// An ordinary server of an application.
    pub(crate) fn app(netns: &Path, port: u16) -> Self {
        let socket = inside(netns, || {
            listen((Ipv4Addr::UNSPECIFIED, port).into(), false)
        });
        Self::serve("app", socket)
    }

    /// As [`Server::app`], for both families.
    pub(crate) fn app6(netns: &Path, port: u16) -> Self {
        let address = (Ipv6Addr::UNSPECIFIED, port).into();
        Self::serve("app", inside(netns, || listen(address, false)))
    }

    /// One of ztunnel's listeners, offered in `map` if there is one.
    pub(crate) fn ztunnel(
        netns: &Path,
        role: Role,
        label: &str,
        map: Option<(&Path, u32)>,
    ) -> Self {
        let port = match role {
            Role::Outbound => 15001,
            Role::InboundPlain => 15006,
            Role::InboundHbone => 15008,
            Role::DnsUdp | Role::DnsTcp => 15053,
        };
        let socket = inside(netns, || listen((Ipv6Addr::UNSPECIFIED, port).into(), true));
        if let Some((path, cpu)) = map {
            ListenerMap::open(path)
                .unwrap()
                .set(role, cpu, socket.as_fd())
                .unwrap();
        }
        Self::serve(label, socket)
    }

    fn serve(label: &str, socket: TcpListener) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, label) = (Arc::clone(&stop), label.to_owned());
        socket.set_nonblocking(true).unwrap();
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match socket.accept() {
                    Ok((mut stream, peer)) => {
                        let local = stream.local_addr().unwrap();
                        let (peer, local) = (unmapped(peer), unmapped(local));
                        let _ = stream.write_all(format!("{label} {peer} {local}").as_bytes());
                    }
                    Err(_) => thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn unmapped(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(IpAddr::to_canonical(&address.ip()), address.port())
}

fn listen(address: SocketAddr, transparent: bool) -> TcpListener {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )
    .unwrap();
    socket.set_reuse_address(true).unwrap();
    if transparent {
        socket.set_reuse_port(true).unwrap();
        if address.is_ipv6() {
            socket.set_only_v6(false).unwrap();
        }
        socket.set_ip_transparent_v4(true).unwrap();
    }
    socket.bind(&address.into()).unwrap();
    socket.listen(128).unwrap();
    socket.into()
}
