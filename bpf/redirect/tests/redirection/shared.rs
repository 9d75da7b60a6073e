//! What holds for every back end.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::Path;

use redirect::{
    Attach, BackEnd, EbpfSettings, Iptables, Lookup, Pod, PodTable, Redirection, Role, Settings,
    TunnelSettings, Variant,
};

use crate::topology::{
    APP1, APP2, Answer, NODE, REMOTE, Server, Topology, UNDERLAY, ZTUNNEL, can_run, inside,
};

/// A back end in one of its forms.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    Ebpf(Attach),
    Tunnel(Variant),
}

pub(crate) const EBPF: Kind = Kind::Ebpf(Attach::Auto);
pub(crate) const CLSACT: Kind = Kind::Ebpf(Attach::Clsact);
pub(crate) const FAITHFUL: Kind = Kind::Tunnel(Variant::Faithful);
pub(crate) const HARDENED: Kind = Kind::Tunnel(Variant::Hardened);

fn tunnel(variant: Variant) -> BackEnd<EbpfSettings, TunnelSettings> {
    BackEnd::IptablesTunnel(TunnelSettings {
        variant,
        iptables: Iptables::Auto,
    })
}

impl Kind {
    pub(crate) fn settings(self, topology: &Topology) -> Settings {
        let mut settings = topology.settings();
        settings.back_end = match self {
            Self::Ebpf(attach) => BackEnd::Ebpf(EbpfSettings {
                bpffs: topology.bpffs(),
                attach,
            }),
            Self::Tunnel(variant) => tunnel(variant),
        };
        settings
    }

    /// `settings` may be [`Topology::settings`], which are `ebpf`'s.
    pub(crate) fn create(self, mut settings: Settings) -> Box<dyn Redirection> {
        match (self, &settings.back_end) {
            (Self::Tunnel(_), BackEnd::Ebpf(_)) => settings.back_end = tunnel(Variant::Hardened),
            (Self::Ebpf(_), BackEnd::IptablesTunnel(_)) => panic!("{settings:?} is no {self:?}"),
            _ => {}
        }
        redirect::redirection(settings).unwrap()
    }

    /// Works with a new instance, as another process would, in the node's namespace.
    pub(crate) fn on_node<T: Send>(
        self,
        topology: &Topology,
        work: impl FnOnce(&mut dyn Redirection) -> T + Send,
    ) -> T {
        let settings = self.settings(topology);
        inside(&topology.netns("node"), || {
            work(self.create(settings).as_mut())
        })
    }

    /// Installs and enrols both apps.
    pub(crate) fn install(self, topology: &Topology) {
        self.on_node(topology, |redirection| {
            redirection.install().unwrap();
            for pod in topology.pods() {
                redirection.add_pod(&pod).unwrap();
            }
        });
    }

    /// ztunnel's three listeners. For eBPF they stand in for CPU 0: other CPUs fall back to it.
    pub(crate) fn listeners(self, topology: &Topology) -> Vec<Server> {
        self.listeners_in(topology, &topology.bpffs())
    }

    fn listeners_in(self, topology: &Topology, bpffs: &Path) -> Vec<Server> {
        let map = bpffs.join("listeners");
        let map = (self != FAITHFUL && self != HARDENED).then_some((map.as_path(), 0));
        [
            (Role::Outbound, "outbound"),
            (Role::InboundPlain, "plain"),
            (Role::InboundHbone, "hbone"),
        ]
        .map(|(role, label)| Server::ztunnel(&topology.netns("ztunnel"), role, label, map))
        .into()
    }
}

/// The expected server answered, it sees the original destination and the client's own address.
pub(crate) fn check(
    topology: &Topology,
    from: &str,
    to: (impl Into<Ipv4Addr>, u16),
    label: &str,
) -> Answer {
    let to = (to.0.into(), to.1);
    let answer = topology
        .ask(from, to)
        .unwrap_or_else(|e| panic!("{from} -> {to:?}: {e}"));
    assert_eq!(answer.label, label, "{from} -> {to:?}: {answer:?}");
    assert_eq!(answer.local, to.into(), "{from}: {answer:?}");
    assert_eq!(answer.peer, answer.client, "{from}: {answer:?}");
    answer
}

/// Says which lines came and which went.
#[track_caller]
pub(crate) fn assert_same(before: &BTreeSet<String>, after: &BTreeSet<String>) {
    let new: Vec<_> = after.difference(before).collect();
    let gone: Vec<_> = before.difference(after).collect();
    assert!(
        new.is_empty() && gone.is_empty(),
        "left behind: {new:#?}, missing: {gone:#?}"
    );
}

pub(crate) fn check_all_directions(topology: &Topology) {
    check(topology, "app1", (REMOTE, 80), "outbound");
    check(topology, "app1", (APP2, 8080), "outbound");
    check(topology, "app1", (APP2, 15008), "outbound");
    check(topology, "app1", ([1, 2, 3, 4], 443), "outbound");
    check(topology, "remote", (APP1, 80), "plain");
    check(topology, "remote", (APP1, 15008), "hbone");
    check(topology, "plain", (APP2, 80), "plain");
    check(topology, "plain", (APP2, 15008), "hbone");
}

fn captures_and_leaves_no_trace(kind: Kind) {
    let topology = Topology::new();
    let before = topology.traces();
    kind.install(&topology);
    let servers = kind.listeners(&topology);
    check_all_directions(&topology);
    let status = kind.on_node(&topology, |redirection| redirection.status().unwrap());
    assert!(status.installed);
    assert_eq!(status.pods.len(), 2);
    assert!(status.pods.iter().all(|pod| pod.present));
    drop(servers);
    assert_ne!(before, topology.traces());
    kind.on_node(&topology, |redirection| redirection.cleanup().unwrap());
    assert_same(&before, &topology.traces());
    let status = kind.on_node(&topology, |redirection| redirection.status().unwrap());
    assert!(!status.installed);
    let server = Server::app(&topology.netns("remote"), 80);
    check(&topology, "app1", (REMOTE, 80), "app");
    drop(server);
}

fn probes_from_the_node_reach_the_app(kind: Kind) {
    let topology = Topology::new();
    let _app = Server::app(&topology.netns("app1"), 8080);
    let _on_node = Server::app(&topology.netns("node"), 10250);
    kind.install(&topology);
    let _ztunnel = kind.listeners(&topology);
    for _ in 0..5 {
        let answer = check(&topology, "node", (APP1, 8080), "app");
        assert_eq!(answer.peer.ip(), NODE);
        check(&topology, "app1", (NODE, 10250), "app");
        check(&topology, "app1", (UNDERLAY, 10250), "app");
    }
}

fn without_ztunnel_nothing_gets_through(kind: Kind) {
    let topology = Topology::new();
    kind.install(&topology);
    let _remote = Server::app(&topology.netns("remote"), 80);
    let _app = Server::app(&topology.netns("app1"), 80);
    let expect_failure = |from: &str, to| {
        let answer = topology.ask(from, to);
        assert!(answer.is_err(), "{from} -> {to:?} went around: {answer:?}");
    };
    // Never there.
    expect_failure("app1", (REMOTE, 80));
    expect_failure("remote", (APP1, 80));
    expect_failure("plain", (APP1, 80));
    // Gone.
    let servers = kind.listeners(&topology);
    check(&topology, "app1", (REMOTE, 80), "outbound");
    drop(servers);
    expect_failure("app1", (REMOTE, 80));
    expect_failure("remote", (APP1, 80));
    // With its namespace gone, too.
    topology.ip("node", "link del vz");
    expect_failure("app1", (REMOTE, 80));
    expect_failure("remote", (APP1, 80));
    expect_failure("plain", (APP1, 80));
    if kind == HARDENED {
        // Nor do later packets of connections that were open, or the tunnels' own.
        for (mark, to) in [("0x40", REMOTE), ("0x100", ZTUNNEL), ("0", ZTUNNEL)] {
            let route = format!("ip -n {} route get {to} mark {mark}", topology.name("node"));
            let words: Vec<_> = route.split_whitespace().collect();
            let output = std::process::Command::new(words[0])
                .args(&words[1..])
                .output()
                .unwrap();
            let message = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(message.contains("No route to host"), "{route}: {output:?}");
        }
    }
}

fn works_with_syn_cookies(kind: Kind) {
    let topology = Topology::new();
    topology.sysctl("ztunnel", "net/ipv4/tcp_syncookies", "2");
    kind.install(&topology);
    let _servers = kind.listeners(&topology);
    check_all_directions(&topology);
}

/// What the test above would show of a path that cannot do it: Istio's own rules.
fn fails_with_syn_cookies(kind: Kind) {
    let topology = Topology::new();
    topology.sysctl("ztunnel", "net/ipv4/tcp_syncookies", "2");
    kind.install(&topology);
    let _servers = kind.listeners(&topology);
    topology.ask("app1", (REMOTE, 80)).unwrap_err();
    topology.ask("remote", (APP1, 80)).unwrap_err();
    check(&topology, "remote", (APP1, 15008), "hbone");
}

fn pods_come_and_go(kind: Kind) {
    let topology = Topology::new();
    kind.install(&topology);
    let _ztunnel = kind.listeners(&topology);
    let _remote = Server::app(&topology.netns("remote"), 80);
    check(&topology, "app1", (REMOTE, 80), "outbound");
    kind.on_node(&topology, |redirection| {
        redirection.install().unwrap();
        redirection.remove_pod("app1").unwrap();
        redirection.remove_pod("unknown").unwrap();
    });
    check(&topology, "app1", (REMOTE, 80), "app");
    check(&topology, "app2", (REMOTE, 80), "outbound");
    let pod = topology.pods().swap_remove(0);
    kind.on_node(&topology, |redirection| {
        redirection.install().unwrap();
        redirection.add_pod(&pod).unwrap();
        redirection.add_pod(&pod).unwrap();
    });
    check(&topology, "app1", (REMOTE, 80), "outbound");
    // An address has one owner.
    let thief = Pod {
        uid: "thief".into(),
        ..pod
    };
    let error = kind.on_node(&topology, |redirection| {
        redirection.add_pod(&thief).unwrap_err()
    });
    assert!(error.to_string().contains("app1"), "{error}");
}

/// Whose an address is stands in the table from before its capture to after it: a pod that ztunnel
/// cannot be told of is not captured.
#[test]
fn a_captured_address_is_in_the_table_first() {
    for kind in [EBPF, HARDENED] {
        if !can_run("a_captured_address_is_in_the_table_first") {
            return;
        }
        let topology = Topology::new();
        kind.on_node(&topology, |redirection| redirection.install().unwrap());
        let path = redirect::pod_table::path(&kind.settings(&topology).state_dir);
        let pod = topology.pods().remove(0);
        let mut table = PodTable::new(&path);
        let mut owner = || match table.get(APP1.into()) {
            Lookup::Pod(found) => found.name.to_string(),
            other => format!("{other:?}"),
        };
        assert_eq!(owner(), "NotCaptured");
        let captured = |redirection: &dyn Redirection| {
            let lines = redirection.inventory().unwrap();
            lines.iter().any(|line| line.contains(&APP1.to_string()))
        };
        for turn in 0..3 {
            let named = |name: &str| Pod {
                uid: format!("uid-{turn}"),
                name: format!("{name}-{turn}"),
                ..pod.clone()
            };
            let (first, renamed) = (named("first"), named("renamed"));
            kind.on_node(&topology, |redirection| {
                redirection.install().unwrap();
                redirection.add_pod(&first).unwrap();
                assert_eq!(owner(), first.name);
                // Who has it changes, and nothing of its capture.
                redirection.add_pod(&renamed).unwrap();
                assert_eq!(owner(), renamed.name);
                assert!(captured(redirection));
                redirection.remove_pod(&first.uid).unwrap();
            });
            assert_eq!(owner(), "NotCaptured");
        }
        kind.on_node(&topology, |redirection| {
            redirection.install().unwrap();
            // Where the next table is to be made there is something else.
            let next = path.with_extension("new");
            std::fs::create_dir(&next).unwrap();
            let error = redirection.add_pod(&pod).unwrap_err().to_string();
            assert!(error.contains("pods/table.new"), "{error}");
            assert!(!captured(redirection), "captured, and ztunnel not told");
            std::fs::remove_dir(&next).unwrap();
            redirection.add_pod(&pod).unwrap();
            // Somebody removes it: that is seen, and the next installation brings it back.
            std::fs::remove_file(&path).unwrap();
            let has = |lines: BTreeSet<String>| lines.contains("pod table of 1 addresses");
            assert!(!has(redirection.inventory().unwrap()));
            redirection.install().unwrap();
            assert!(has(redirection.inventory().unwrap()));
            redirection.cleanup().unwrap();
        });
        assert!(!path.exists() && !path.parent().unwrap().exists());
    }
}

/// What an agent killed with SIGKILL leaves is adopted; the connection attempts that go on
/// meanwhile never reach their destination around ztunnel.
fn a_second_agent_adopts(kind: Kind) {
    let topology = Topology::new();
    let before = topology.traces();
    kind.install(&topology);
    let _ztunnel = kind.listeners(&topology);
    let _remote = Server::app(&topology.netns("remote"), 80);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            for _ in 0..60 {
                check(&topology, "app1", (REMOTE, 80), "outbound");
            }
        });
        for _ in 0..3 {
            kind.install(&topology);
        }
        asking.join().unwrap();
    });
    check_all_directions(&topology);
    kind.on_node(&topology, |redirection| redirection.cleanup().unwrap());
    assert_same(&before, &topology.traces());
}

/// As after a killed lab or a reboot with kept directories: the journal and the pins are of
/// namespaces that are gone.
fn another_nodes_leftovers_do_not_matter(kind: Kind) {
    let (gone, topology) = (Topology::new(), Topology::new());
    kind.install(&gone);
    gone.remove_namespaces();
    let before = topology.traces();
    let mut settings = kind.settings(&topology);
    settings.state_dir = gone.settings().state_dir;
    if let BackEnd::Ebpf(own) = &mut settings.back_end {
        own.bpffs = gone.bpffs();
    }
    let _ztunnel = inside(&topology.netns("node"), || {
        let mut redirection = kind.create(settings.clone());
        redirection.install().unwrap();
        assert_eq!(redirection.enrolled(), []);
        for pod in topology.pods() {
            redirection.add_pod(&pod).unwrap();
        }
        kind.listeners_in(&topology, &gone.bpffs())
    });
    check_all_directions(&topology);
    inside(&topology.netns("node"), || {
        kind.create(settings).cleanup().unwrap();
    });
    assert_same(&before, &topology.traces());
    assert_eq!(gone.pins(), [""; 0]);
}

fn a_failure_leaves_nothing(kind: Kind) {
    let topology = Topology::new();
    let before = topology.traces();
    let expect_failure = |settings: Settings, part: &str| {
        let error = inside(&topology.netns("node"), || {
            kind.create(settings).install().unwrap_err().to_string()
        });
        assert!(error.contains(part) && !error.contains('\n'), "{error}");
        assert_same(&before, &topology.traces());
    };
    let mut settings = kind.settings(&topology);
    settings.ztunnel.host_interface = "nosuch".into();
    expect_failure(settings, "interface nosuch not found in the node");
    let mut settings = kind.settings(&topology);
    settings.ztunnel.interface = "nosuch".into();
    expect_failure(settings, "interface nosuch not found in /run/netns/");
    let mut settings = kind.settings(&topology);
    settings.ztunnel.netns = "/run/netns/nosuch".into();
    expect_failure(settings, "/run/netns/nosuch");
    // Half-way: something late in the installation cannot be had.
    match kind {
        Kind::Ebpf(_) => {
            // After the programs are loaded: a directory where the socket lookup is pinned.
            let settings = kind.settings(&topology);
            std::fs::create_dir(topology.bpffs_root().join("node")).unwrap();
            std::fs::create_dir(topology.bpffs_root().join("node/ztunnel_ingress")).unwrap();
            let before = topology.traces();
            let error = inside(&topology.netns("node"), || {
                kind.create(settings).install().unwrap_err().to_string()
            });
            assert!(error.contains("ztunnel_ingress"), "{error}");
            assert_same(&before, &topology.traces());
            let pins = std::fs::read_dir(topology.bpffs_root().join("node")).unwrap();
            assert_eq!(pins.count(), 1, "the directory in the way alone");
        }
        Kind::Tunnel(_) => {
            // After the node's tunnels are made: another's interface in ztunnel's namespace.
            topology.ip("ztunnel", "link add pistioout type bridge");
            let before = topology.traces();
            let settings = kind.settings(&topology);
            let error = inside(&topology.netns("node"), || {
                kind.create(settings).install().unwrap_err().to_string()
            });
            assert!(
                error.contains("pistioout") && error.contains("not ours"),
                "{error}"
            );
            assert_same(&before, &topology.traces());
        }
    }
}

macro_rules! for_kinds {
    ($($test:ident: $($name:ident = $kind:expr),+;)+) => {
        $(mod $test {
            $(#[test]
            fn $name() {
                if super::can_run(concat!(stringify!($test), "::", stringify!($name))) {
                    super::$test($kind);
                }
            })+
        })+
    };
}

for_kinds! {
    captures_and_leaves_no_trace: ebpf = super::EBPF, clsact = super::CLSACT,
        faithful = super::FAITHFUL, hardened = super::HARDENED;
    probes_from_the_node_reach_the_app: ebpf = super::EBPF, clsact = super::CLSACT,
        hardened = super::HARDENED;
    without_ztunnel_nothing_gets_through: ebpf = super::EBPF, hardened = super::HARDENED;
    works_with_syn_cookies: ebpf = super::EBPF, hardened = super::HARDENED;
    fails_with_syn_cookies: faithful = super::FAITHFUL;
    pods_come_and_go: ebpf = super::EBPF, clsact = super::CLSACT, hardened = super::HARDENED;
    a_second_agent_adopts: ebpf = super::EBPF, clsact = super::CLSACT,
        hardened = super::HARDENED;
    another_nodes_leftovers_do_not_matter: ebpf = super::EBPF, clsact = super::CLSACT,
        hardened = super::HARDENED;
    a_failure_leaves_nothing: ebpf = super::EBPF, hardened = super::HARDENED;
}
