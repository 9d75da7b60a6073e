//! One bad pod costs itself, never its neighbours.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::topology::{APP1, APP2, NODE, PLAIN, REMOTE, Server, can_run, inside};
use crate::{PATIENCE, Site, ask_metrics};

/// How long something that must not get through is tried for.
const SILENCE: Duration = Duration::from_millis(1200);

/// One entry of the file.
fn pod(uid: &str, address: &str, netns: &str, interface: &str, more: &str) -> String {
    format!(
        "- {{uid: {uid}, namespace: default, name: pod, service_account: default, \
         addresses: [{address}], netns: {netns}, host_interface: {interface}{more}}}\n"
    )
}

impl Site {
    fn netns_of(&self, host: &str) -> String {
        self.topology.netns(host).display().to_string()
    }

    /// Both apps and what is given.
    fn configure_with(&self, pods: &str) {
        fs::write(self.config_path(), self.config(&["app1", "app2"]) + pods).unwrap();
    }

    fn json(&self) -> serde_json::Value {
        let output = self.once(&["status", "--json"]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{error}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Waits until `status --json` says what is expected of pods that are not captured: uid, why,
    /// whether cut off.
    #[track_caller]
    fn wait_until_not_captured(&self, expected: &[(&str, &str, bool)]) {
        let mut expected: Vec<_> = expected
            .iter()
            .map(|(uid, why, cut_off)| ((*uid).to_owned(), (*why).to_owned(), *cut_off))
            .collect();
        expected.sort();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.json();
            let list = status["not_captured"].as_array().unwrap();
            let mut now: Vec<_> = list
                .iter()
                .map(|pod| {
                    let text = |key: &str| pod[key].as_str().unwrap().to_owned();
                    (text("uid"), text("why"), pod["cut_off"].as_bool().unwrap())
                })
                .collect();
            now.sort();
            if now == expected {
                return;
            }
            assert!(Instant::now() < deadline, "{expected:?} wanted: {list:#?}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Neither connections nor datagrams, neither way.
    #[track_caller]
    fn assert_cut_off(&self, host: &str, address: Ipv4Addr) {
        let _server = Server::app(&self.topology.netns(host), 8081);
        let answer = self.topology.ask("node", (address, 8081));
        assert!(answer.is_err(), "node reaches {host}: {answer:?}");
        let answer = self.topology.ask(host, (REMOTE, 80));
        assert!(answer.is_err(), "{host} gets out: {answer:?}");
        assert!(!self.datagram_arrives("node", host, address), "to {host}");
        assert!(!self.datagram_arrives(host, "node", NODE), "from {host}");
    }

    fn datagram_arrives(&self, from: &str, to: &str, address: Ipv4Addr) -> bool {
        let receiver = inside(&self.topology.netns(to), || {
            UdpSocket::bind((address, 8082)).unwrap()
        });
        receiver.set_read_timeout(Some(SILENCE / 4)).unwrap();
        inside(&self.topology.netns(from), || {
            let sender = UdpSocket::bind("0.0.0.0:0").unwrap();
            // Unreachable is an answer.
            let _ = sender.send_to(b"x", (address, 8082));
        });
        receiver.recv(&mut [0; 8]).is_ok()
    }
}

/// Whatever is wrong with an entry, at start: the agent is ready, its neighbours are captured, and
/// what it is about is told and cut off.
pub(crate) fn one_bad_pod_costs_itself(redirect: &'static str) {
    let site = Site::new(redirect);
    site.topology.ip("node", "link set lo up");
    site.topology.ip("node", "link add br7 type bridge");
    site.topology.ip("node", "link set br7 up");
    for (name, peer) in [("x1", "x1p"), ("x2", "x2p"), ("x3", "x3p")] {
        let line = format!("link add {name} type veth peer name {peer}");
        site.topology.ip("node", &line);
    }
    let before = site.topology.traces();
    let (app1, app2) = (site.netns_of("app1"), site.netns_of("app2"));
    let plain = site.netns_of("plain");
    let many: Vec<_> = (20..37).map(|last| format!("10.244.3.{last}")).collect();
    let bad = [
        // Deleted: nothing of it is left.
        pod("deleted", "10.244.1.31", "/run/netns/nosuch", "nosuch", ""),
        // Its namespace is gone and its interface is not.
        pod("going", &PLAIN.to_string(), "/run/netns/nosuch", "vp", ""),
        // Completed, with the address of one that runs.
        pod(
            "done",
            &APP2.to_string(),
            &app2,
            "nosuch2",
            ", phase: Succeeded",
        ),
        // A second one with the uid, interface and address of app1, which is newer.
        pod(
            "app1",
            &APP1.to_string(),
            &app1,
            "va1",
            ", started: 2020-01-01T00:00:00Z",
        ),
        // What cannot be.
        pod("address", "10.244.1.999", &plain, "x1", ""),
        pod("many", &many.join(", "), &plain, "x2", ""),
        pod("nodes", &NODE.to_string(), &plain, "x3", ""),
        pod(
            "phase",
            "10.244.1.33",
            &plain,
            "nosuch3",
            ", phase: Sleeping",
        ),
        pod("file", "10.244.1.34", "/etc/passwd", "x1p", ""),
        pod("uts", "10.244.1.35", "/proc/1/ns/uts", "x2p", ""),
        pod("underlay", "10.244.1.36", &plain, "und", ""),
        "- only a word\n".to_owned(),
    ];
    site.configure_with(&bad.concat());
    // app1 as Site lists it has no start, and so would lose to one that has.
    let text = fs::read_to_string(site.config_path()).unwrap();
    let first = text.find("host_interface: va1}").unwrap();
    let (head, tail) = text.split_at(first);
    let newer = "host_interface: va1, started: 2021-01-01T00:00:00+01:00}";
    let text = format!("stats_address: 127.0.0.1:15014\n{head}{newer}")
        + &tail["host_interface: va1}".len()..];
    fs::write(site.config_path(), text).unwrap();

    let agent = site.run();
    let _ztunnel = site.listener();
    let _remote = Server::app(&site.topology.netns("remote"), 80);
    assert_eq!(site.answered_by().as_deref(), Some("captured"));
    let answer = site.topology.ask("app2", (REMOTE, 80)).unwrap();
    assert_eq!(answer.label, "captured");
    let expected = [
        ("deleted", "absent", false),
        ("going", "absent", true),
        ("done", "ended", false),
        ("app1", "conflict", false),
        ("address", "invalid", true),
        ("many", "invalid", true),
        ("nodes", "invalid", true),
        ("phase", "invalid", false),
        ("file", "absent", true),
        ("uts", "absent", true),
        ("underlay", "invalid", false),
        ("entry 14", "invalid", false),
    ];
    site.wait_until_not_captured(&expected);
    site.assert_cut_off("plain", PLAIN);
    // The command prints for people, too, and Prometheus is told.
    let output = site.once(&["status"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.contains("not captured: going vp (absent, cut off): "),
        "{text}"
    );
    let text = ask_metrics(&site, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    for line in [
        r#"node_agent_pods_not_captured{reason="invalid",cut_off="true"} 3"#,
        r#"node_agent_pods_not_captured{reason="absent",cut_off="false"} 1"#,
        "node_agent_pods 2",
    ] {
        assert!(text.contains(&format!("\n{line}\n")), "{line}: {text}");
    }
    // A restart in this state is no different.
    agent.end(Signal::SIGTERM);
    let agent = site.run();
    assert_eq!(site.answered_by().as_deref(), Some("captured"));
    site.wait_until_not_captured(&expected);
    // When it is right, or gone from the list, nothing is left of it.
    site.configure(&["app1", "app2"]);
    site.wait_until_not_captured(&[]);
    let _plain = Server::app(&site.topology.netns("plain"), 8081);
    let answer = site.topology.ask("plain", (REMOTE, 80)).unwrap();
    assert_eq!(answer.label, "app");
    let answer = site.topology.ask("node", (PLAIN, 8081)).unwrap();
    assert_eq!(answer.label, "app");
    agent.end(Signal::SIGTERM);
    assert!(site.once(&["cleanup"]).status.success());
    let after = site.topology.traces();
    let new: Vec<_> = after.difference(&before).collect();
    assert!(new.is_empty(), "{new:#?}");
}

/// Of two pods with one address the running and newer one has it, as they come and go; the other's
/// interface is cut off meanwhile, and neither gets past ztunnel at any time.
pub(crate) fn the_running_and_newer_pod_has_the_address(redirect: &'static str) {
    let site = Site::new(redirect);
    // app2 has app1's address, too.
    site.topology
        .ip("app2", &format!("addr add {APP1}/32 dev eth0"));
    let (app1, app2) = (site.netns_of("app1"), site.netns_of("app2"));
    let configure = |first: &str, second: &str| {
        let pods = [
            pod("first", &APP1.to_string(), &app1, "va1", first),
            pod("second", &APP1.to_string(), &app2, "va2", second),
        ];
        fs::write(site.config_path(), site.config(&[]) + &pods.concat()).unwrap();
    };
    let (one, two) = (
        ", started: 2026-01-01T00:00:00Z",
        ", started: 2026-01-02T00:00:00Z",
    );
    configure(two, one);
    let _agent = site.run();
    let _ztunnel = site.listener();
    let _remote = Server::app(&site.topology.netns("remote"), 80);
    let second_is_out = || site.topology.ask("app2", (REMOTE, 80)).is_err();
    site.wait_until_not_captured(&[("second", "conflict", true)]);
    assert_eq!(site.answered_by().as_deref(), Some("captured"));
    assert!(second_is_out());
    // The second starts later; the first one is out.
    configure(one, two);
    site.wait_until_not_captured(&[("first", "conflict", true)]);
    let deadline = Instant::now() + SILENCE;
    while Instant::now() < deadline {
        assert_eq!(site.answered_by(), None);
    }
    // Completed, it does not count any more.
    configure(one, &format!("{two}, phase: Failed"));
    site.wait_until_not_captured(&[("second", "ended", true)]);
    site.wait_until_answered_by("captured");
    assert!(second_is_out());
    // Nor does it when its interface is gone.
    configure(one, two);
    site.wait_until_not_captured(&[("first", "conflict", true)]);
    site.topology.ip("node", "link del va2");
    site.wait_until_not_captured(&[("second", "absent", false)]);
    site.wait_until_answered_by("captured");
}

/// What a back end finds only when it tries: no neighbour is hurt, what can be is cut off, and
/// what others need is not.
pub(crate) fn a_pod_that_cannot_be_captured_is_cut_off(redirect: &'static str) {
    let site = Site::new(redirect);
    site.topology.ip("node", "link add br7 type bridge");
    site.topology
        .ip("node", "link add pair7 type veth peer name pair8");
    let plain = site.netns_of("plain");
    let (address, interface) = if redirect == "tunnel" {
        ("fd00::13", "vp") // IPv4 is needed
    } else {
        ("10.244.1.13", "tun7") // a veth is needed
    };
    if redirect != "tunnel" {
        site.topology.ip("node", "tuntap add dev tun7 mode tun");
    }
    let bad = [
        pod("wrong", address, &plain, interface, ""),
        pod("bridge", "fd00::14", &plain, "br7", ""),
    ];
    site.configure_with(&bad.concat());
    let agent = site.run();
    let _ztunnel = site.listener();
    let _remote = Server::app(&site.topology.netns("remote"), 80);
    assert_eq!(site.answered_by().as_deref(), Some("captured"));
    site.wait_until_not_captured(&[("wrong", "failed", true), ("bridge", "failed", false)]);
    let status = site.json();
    let told = status["not_captured"].to_string();
    assert!(
        told.contains("br7") && told.contains("not cut off"),
        "{told}"
    );
    if redirect == "tunnel" {
        site.assert_cut_off("plain", PLAIN);
    }
    // It is tried again and does not end the agent; others may be added meanwhile.
    site.configure(&["app2"]);
    site.wait_until_answered_by("app");
    site.configure_with(&bad.concat());
    site.wait_until_answered_by("captured");
    let (code, log) = agent.end(Signal::SIGTERM);
    assert_eq!(code, Some(0), "{log}");
    let lines = log.matches("pod not captured: ").count();
    assert!(lines <= 6, "{lines} lines: {log}");
    assert!(site.once(&["cleanup"]).status.success());
    for host in ["app1", "plain"] {
        let answer = site.topology.ask(host, (REMOTE, 80)).unwrap();
        assert_eq!(answer.label, "app", "{host}");
    }
}

/// A pod that is listed wrongly after it was captured, and rightly again: its packets go through
/// ztunnel or nowhere at each moment.
pub(crate) fn no_moment_is_open_while_a_pod_changes(redirect: &'static str) {
    let site = Site::new(redirect);
    let agent = site.run();
    let _ztunnel = site.listener();
    let _remote = Server::app(&site.topology.netns("remote"), 80);
    site.wait_until_answered_by("captured");
    let sound = site.config(&["app1", "app2"]);
    let wrong = sound.replace(&format!("[{APP1}]"), &format!("[{APP1}, 127.0.0.1]"));
    let other = sound.replace(&format!("[{APP1}]"), &format!("[{APP1}, 10.244.1.77]"));
    assert!(wrong != sound && other != sound);
    let stop = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut answers = Vec::new();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                answers.extend(site.answered_by());
            }
            answers
        });
        for _ in 0..2 {
            fs::write(site.config_path(), &wrong).unwrap();
            site.wait_until_not_captured(&[("app1", "invalid", true)]);
            fs::write(site.config_path(), &other).unwrap();
            site.wait_until_not_captured(&[]);
            fs::write(site.config_path(), &sound).unwrap();
            agent.wait_until_told("configuration applied", 1);
            thread::sleep(SILENCE);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let answers = asking.join().unwrap();
        assert!(!answers.is_empty());
        assert!(
            answers.iter().all(|label| label == "captured"),
            "{answers:?}"
        );
    });
    site.wait_until_answered_by("captured");
    agent.end(Signal::SIGTERM);
    site.cleanup();
}

/// Programs of a cut-off pod that someone removes come back, as those of captured pods do.
#[test]
fn removed_pins_of_a_cut_off_pod_come_back() {
    if !can_run("removed_pins_of_a_cut_off_pod_come_back") {
        return;
    }
    let site = Site::new("ebpf");
    let bad = pod("going", &PLAIN.to_string(), "/run/netns/nosuch", "vp", "");
    site.configure_with(&bad);
    let agent = site.run();
    site.wait_until_not_captured(&[("going", "absent", true)]);
    site.assert_cut_off("plain", PLAIN);
    let whole = site.owned();
    let bpffs = site.topology.bpffs().display().to_string();
    site.damage("node", &format!("find {bpffs} -name app_*bound_* -delete"));
    agent.wait_until_told("removed by someone else", 1);
    let deadline = Instant::now() + PATIENCE;
    while !whole.is_subset(&site.owned()) {
        assert!(Instant::now() < deadline, "still open");
        thread::sleep(Duration::from_millis(100));
    }
    site.assert_cut_off("plain", PLAIN);
    agent.end(Signal::SIGTERM);
    site.cleanup();
}
