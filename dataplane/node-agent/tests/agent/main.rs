//! The agent as a process, in network namespaces. Needs root; skips by name without.

#![allow(
    clippy::unwrap_used,
    reason = "a helper that fails is a test that fails"
)]

#[path = "../../../../bpf/redirect/tests/redirection/topology/mod.rs"]
#[allow(
    dead_code,
    unused_imports,
    reason = "shared with the tests of the redirect crate"
)]
mod topology;

mod granularity;
mod privilege;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use redirect::Role;
use topology::{APP1, REMOTE, Server, Topology, ZTUNNEL, can_run, inside};

use granularity::{
    a_pod_that_cannot_be_captured_is_cut_off, no_moment_is_open_while_a_pod_changes,
    one_bad_pod_costs_itself, the_running_and_newer_pod_has_the_address,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// One node with its configuration file.
struct Site {
    topology: Topology,
    redirect: &'static str,
    before: BTreeSet<String>,
}

/// `node-agent run`, killed when dropped.
struct Agent {
    process: Child,
    /// What it has written to standard error.
    log: Arc<Mutex<String>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Agent {
    fn new(mut process: Child) -> Self {
        let log = Arc::new(Mutex::new(String::new()));
        let mut lines = BufReader::new(process.stderr.take().unwrap());
        let reader = thread::spawn({
            let log = Arc::clone(&log);
            move || {
                let mut line = String::new();
                while lines.read_line(&mut line).unwrap() > 0 {
                    log.lock().unwrap().push_str(&line);
                    line.clear();
                }
            }
        });
        Self {
            process,
            log,
            reader: Some(reader),
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).unwrap();
    }

    /// Waits until it has logged `what` this often: when it looks at things depends on the machine.
    #[track_caller]
    fn wait_until_told(&self, what: &str, times: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.log.lock().unwrap().matches(what).count() < times {
            let late = Instant::now() >= deadline;
            assert!(!late, "no {times} x {what}: {}", self.log.lock().unwrap());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends it and returns what it wrote to standard error.
    fn end(mut self, signal: Signal) -> (Option<i32>, String) {
        self.signal(signal);
        let status = self.process.wait().unwrap();
        self.reader.take().unwrap().join().unwrap();
        let log = self.log.lock().unwrap().clone();
        (status.code(), log)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Site {
    fn new(redirect: &'static str) -> Self {
        let topology = Topology::new();
        let before = topology.traces();
        let site = Self {
            topology,
            redirect,
            before,
        };
        site.configure(&["app1", "app2"]);
        site
    }

    fn config_path(&self) -> PathBuf {
        self.topology.dir().join("agent.yaml")
    }

    fn config(&self, pods: &[&str]) -> String {
        let settings = self.topology.settings();
        let mut text = format!(
            "redirect: {}\nreconcile_s: 1\nnode: {{netns: {}, interfaces: [und], address: 10.244.1.1, \
             pod_cidrs: [10.244.0.0/16]}}\nztunnel: {{netns: {}, interface: eth0, \
             host_interface: vz, address: {ZTUNNEL}}}\nstate_dir: {}\nbpffs: {}\npods:\n",
            self.redirect.replace("clsact", "ebpf\nattach: clsact"),
            self.topology.netns("node").display(),
            settings.ztunnel.netns.display(),
            settings.state_dir.display(),
            self.topology.bpffs().display(),
        );
        for pod in self
            .topology
            .pods()
            .iter()
            .filter(|pod| pods.contains(&pod.uid.as_str()))
        {
            text += &format!(
                "- {{uid: {}, namespace: {}, name: {}, service_account: {}, addresses: [{}], \
                 netns: {}, host_interface: {}}}\n",
                pod.uid,
                pod.namespace,
                pod.name,
                pod.service_account,
                pod.addresses[0],
                pod.netns.display(),
                pod.host_interface,
            );
        }
        text
    }

    fn configure(&self, pods: &[&str]) {
        fs::write(self.config_path(), self.config(pods)).unwrap();
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_node-agent"));
        command.args(words).arg("--config").arg(self.config_path());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn once(&self, words: &[&str]) -> Output {
        inside(&self.topology.netns("node"), || {
            self.command(words).output().unwrap()
        })
    }

    /// Starts `run` and waits until it is ready.
    fn run(&self) -> Agent {
        let mut child = inside(&self.topology.netns("node"), || {
            self.command(&["run"]).spawn().unwrap()
        });
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let agent = Agent::new(child);
        if line != "node-agent: ready\n" {
            panic!("not ready but {line:?}: {}", agent.end(Signal::SIGTERM).1);
        }
        agent
    }

    fn cleanup(&self) {
        let output = self.once(&["cleanup"]);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let after = self.topology.traces();
        let new: Vec<_> = after.difference(&self.before).collect();
        let gone: Vec<_> = self.before.difference(&after).collect();
        assert!(
            new.is_empty() && gone.is_empty(),
            "left: {new:#?}, missing: {gone:#?}"
        );
        let state = fs::read_dir(self.topology.settings().state_dir).unwrap();
        assert_eq!(state.count(), 0, "files left in the state directory");
    }

    fn listener(&self) -> Server {
        let map = self.topology.bpffs().join("listeners");
        let map = (self.redirect != "tunnel").then_some((map.as_path(), 0));
        Server::ztunnel(
            &self.topology.netns("ztunnel"),
            Role::Outbound,
            "captured",
            map,
        )
    }

    /// Who answers app1 when it connects to the remote pod: "captured", "app" or nobody.
    fn answered_by(&self) -> Option<String> {
        self.topology
            .ask("app1", (REMOTE, 80))
            .ok()
            .map(|answer| answer.label)
    }

    #[track_caller]
    fn wait_until_answered_by(&self, label: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.answered_by();
            if now.as_deref() == Some(label) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{label} was expected, {now:?} answers"
            );
            thread::sleep(Duration::from_millis(100));
        }
    }
}

fn lives_dies_and_leaves_no_trace(redirect: &'static str) {
    let site = Site::new(redirect);
    let agent = site.run();
    let _ztunnel = site.listener();
    let _remote = Server::app(&site.topology.netns("remote"), 80);
    assert_eq!(site.answered_by().as_deref(), Some("captured"));
    // A second one and a clean-up are refused while it runs.
    let second = site.once(&["run"]);
    let message = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1), "{message}");
    assert!(
        message.contains(&format!("held by process {}", agent.process.id())),
        "{message}"
    );
    assert_eq!(message.lines().count(), 1, "{message}");
    let status = site.once(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["agent_pid"], agent.process.id());
    assert_eq!(status["pods"].as_array().unwrap().len(), 2);
    let driver = &status["tunnel_driver"];
    assert!(
        if redirect == "ebpf" {
            driver.is_null()
        } else {
            driver.is_string()
        },
        "{driver}"
    );
    assert!(site.once(&["status"]).status.success());
    // Ended or killed, it leaves capture in place; a new one takes over.
    let (code, log) = agent.end(Signal::SIGTERM);
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(site.answered_by().as_deref(), Some("captured"));
    site.run().end(Signal::SIGKILL);
    assert_eq!(site.answered_by().as_deref(), Some("captured"));
    site.run().end(Signal::SIGKILL);
    site.cleanup();
    assert_eq!(site.answered_by().as_deref(), Some("app"));
    site.cleanup();
}

fn follows_its_configuration(redirect: &'static str) {
    let site = Site::new(redirect);
    let agent = site.run();
    let _ztunnel = site.listener();
    let _remote = Server::app(&site.topology.netns("remote"), 80);
    site.wait_until_answered_by("captured");
    site.configure(&["app2"]);
    site.wait_until_answered_by("app");
    site.configure(&["app1", "app2"]);
    site.wait_until_answered_by("captured");
    // What is malformed, or cannot be done without a restart, changes nothing.
    let refused = "old configuration stays";
    fs::write(site.config_path(), "redirect: [").unwrap();
    agent.wait_until_told(refused, 1);
    let other = if redirect == "ebpf" { "tunnel" } else { "ebpf" };
    let moved = site.config(&[]).replace(redirect, other);
    fs::write(site.config_path(), moved).unwrap();
    agent.wait_until_told(refused, 2);
    assert_eq!(site.answered_by().as_deref(), Some("captured"));
    site.configure(&["app1"]);
    agent.wait_until_told("configuration applied", 3);
    let (_, log) = agent.end(Signal::SIGTERM);
    let lines: Vec<_> = log.lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(lines.len(), 2, "{log}");
    assert!(lines.iter().all(|line| line.contains(refused)), "{log}");
    site.cleanup();
}

fn follows_a_new_ztunnel(redirect: &'static str) {
    let site = Site::new(redirect);
    let _agent = site.run();
    let old = site.listener();
    let _remote = Server::app(&site.topology.netns("remote"), 80);
    site.wait_until_answered_by("captured");
    drop(old);
    site.topology.replace_ztunnel();
    // Never around ztunnel, whether the agent has noticed yet or not.
    let deadline = Instant::now() + Duration::from_millis(2500);
    while Instant::now() < deadline {
        assert_eq!(site.answered_by(), None);
    }
    let _new = site.listener();
    site.wait_until_answered_by("captured");
}

/// A pod that is listed before its interface is there, and one whose interface goes.
fn waits_for_interfaces(redirect: &'static str) {
    let site = Site::new(redirect);
    site.topology.ip("node", "link set va1 down");
    site.topology.ip("node", "link set va1 name later");
    site.configure(&["app2"]);
    let agent = site.run();
    let _ztunnel = site.listener();
    site.configure(&["app1", "app2"]);
    agent.wait_until_told("interface va1 not found", 1);
    site.topology.ip("node", "link set later name va1");
    site.topology.ip("node", "link set va1 up");
    site.topology
        .ip("node", &format!("route add {APP1}/32 dev va1 scope link"));
    site.wait_until_answered_by("captured");
    let (_, log) = agent.end(Signal::SIGTERM);
    assert_eq!(log.matches("interface va1 not found").count(), 1, "{log}");
}

fn bad_input_is_one_line_and_leaves_nothing(redirect: &'static str) {
    let site = Site::new(redirect);
    let config = site.config(&["app1", "app2"]);
    let cases = [
        ("redirect: [".to_owned(), "configuration"),
        (
            config.replace("interfaces: [und]", "interfaces: []"),
            "node.interfaces",
        ),
        (
            config.replace("[und]", "[nosuch]"),
            if redirect == "ebpf" { "nosuch" } else { "" },
        ),
        (
            config.replace("host_interface: vz", "host_interface: nosuch"),
            "nosuch not found",
        ),
        (config.replace("-ztunnel,", "-nosuch,"), "-nosuch"),
    ];
    for (text, expected) in cases {
        if expected.is_empty() {
            continue;
        }
        fs::write(site.config_path(), &text).unwrap();
        let output = site.once(&["run"]);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}{message}");
        assert!(message.contains(expected), "{message}");
        // A kernel without tcx is told before a pod's interface is found missing.
        let problems = message.lines().filter(|line| !line.contains(" INFO "));
        assert_eq!(problems.count(), 1, "{message}");
        assert_eq!(site.before, site.topology.traces(), "{message}");
    }
    fs::remove_file(site.config_path()).unwrap();
    let output = site.once(&["status"]);
    assert_eq!(output.status.code(), Some(1));
    site.configure(&["app1"]);
    let output = inside(&site.topology.netns("node"), || {
        let agent = site.command(&["run"]);
        Command::new("setpriv")
            .args(["--bounding-set", "-all", "--inh-caps", "-all"])
            .arg(agent.get_program())
            .args(agent.get_args())
            .output()
            .unwrap()
    });
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        message.contains("CAP_NET_ADMIN, CAP_SYS_ADMIN"),
        "{message}"
    );
    assert_eq!(
        (output.status.code(), message.lines().count()),
        (Some(1), 1),
        "{message}"
    );
    assert_eq!(site.before, site.topology.traces());
}

/// A probe of the node to a pod is not captured by the agent's redirection either.
fn probes_pass(redirect: &'static str) {
    let site = Site::new(redirect);
    let _agent = site.run();
    let _app = Server::app(&site.topology.netns("app1"), 8080);
    let answer = site.topology.ask("node", (APP1, 8080)).unwrap();
    assert_eq!(answer.label, "app");
}

/// Nobody named this address, and it came when the agent was running. Gone again it is a host's
/// like any other.
#[test]
fn addresses_of_the_node_are_followed() {
    if !can_run("addresses_of_the_node_are_followed") {
        return;
    }
    let site = Site::new("ebpf");
    let _agent = site.run();
    let topology = &site.topology;
    let _app = Server::app(&topology.netns("app1"), 8080);
    let _ztunnel = site.listener();
    let new = Ipv4Addr::new(198, 51, 100, 1);
    let wait_until = |what: &str, is_so: &dyn Fn() -> bool| {
        let deadline = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < deadline, "{what}");
        }
    };
    for _ in 0..3 {
        topology.ip("node", &format!("addr add {new}/32 dev und"));
        wait_until("the probe reaches the app", &|| {
            let answer = topology.ask_from("node", Some(new), (APP1, 8080));
            answer.is_ok_and(|answer| answer.label == "app" && answer.peer.ip() == new)
        });
        topology.ip("node", &format!("addr del {new}/32 dev und"));
        wait_until("ztunnel is asked", &|| {
            topology.ask("app1", (new, 80)).is_ok()
        });
    }
}

impl Site {
    /// What `status` lists as its own.
    fn owned(&self) -> BTreeSet<String> {
        let output = self.once(&["status", "--json"]);
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let owned = status["owned"].as_array().unwrap();
        owned
            .iter()
            .map(|l| l.as_str().unwrap().to_owned())
            .collect()
    }

    /// Runs a command in a namespace.
    fn damage(&self, host: &str, line: &str) {
        inside(&self.topology.netns(host), || {
            if line.starts_with("find ") {
                remove_beside_a_repair(line);
            } else {
                topology::run(line);
            }
        });
    }
}

/// Runs a `find ... -delete`. The agent repairs while it goes on: what find has seen may have
/// another name by then, and a directory something in it again.
#[track_caller]
fn remove_beside_a_repair(line: &str) {
    let words: Vec<_> = line.split(' ').collect();
    let mut command = Command::new(words[0]);
    let output = command
        .args(&words[1..])
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let overtaken = |line: &str| {
        line.ends_with("No such file or directory") || line.ends_with("Directory not empty")
    };
    assert!(error.lines().all(overtaken), "{line}: {error}");
    assert!(
        output.status.success() || !error.is_empty(),
        "{line}: {}",
        output.status
    );
}

/// Others remove parts of it, one after the other; all come back and traffic is captured again.
fn repairs(redirect: &'static str, damages: &[(&str, &str)]) {
    is_repaired(&Site::new(redirect), damages);
}

/// As [`repairs`], of a site that is configured.
fn is_repaired(site: &Site, damages: &[(&str, &str)]) {
    let agent = site.run();
    let _ztunnel = site.listener();
    let _remote = Server::app(&site.topology.netns("remote"), 80);
    site.wait_until_answered_by("captured");
    let whole = site.owned();
    let bpffs = site.topology.bpffs().display().to_string();
    for (host, line) in damages {
        site.damage(host, &line.replace("BPFFS", &bpffs));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = site.owned();
            let missing: Vec<_> = whole.difference(&now).collect();
            if missing.is_empty() {
                break;
            }
            if Instant::now() >= deadline {
                let missing: Vec<_> = missing.into_iter().cloned().collect();
                panic!("{line}: {missing:#?}: {}", agent.end(Signal::SIGTERM).1);
            }
            thread::sleep(Duration::from_millis(200));
        }
        site.wait_until_answered_by("captured");
    }
    let (_, log) = agent.end(Signal::SIGTERM);
    assert!(log.contains("removed by someone else"), "{log}");
    // A pin may go at any time, also between a look at it and its use.
    let errors = log.lines().filter(|line| line.contains("ERROR"));
    let others: Vec<_> = errors.filter(|line| !line.contains(&bpffs)).collect();
    assert!(others.is_empty(), "{log}");
    site.cleanup();
}

/// What a client at `address` gets for a request.
fn ask_metrics(site: &Site, request: &str) -> String {
    inside(&site.topology.netns("node"), || {
        let mut stream = std::net::TcpStream::connect("127.0.0.1:15014").unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    })
}

/// Counters for Prometheus; the endpoint comes and goes with the configuration.
fn metrics(redirect: &'static str) {
    let site = Site::new(redirect);
    site.topology.ip("node", "link set lo up");
    let config = site.config(&["app1", "app2"]);
    let with_stats = format!("stats_address: 127.0.0.1:15014\n{config}");
    fs::write(site.config_path(), &with_stats).unwrap();
    let agent = site.run();
    let _ztunnel = site.listener();
    let _remote = Server::app(&site.topology.netns("remote"), 80);
    site.wait_until_answered_by("captured");
    let get = |path: &str| {
        let end = "HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        ask_metrics(&site, &format!("GET {path} {end}"))
    };
    // Idle clients, more than are served at a time, keep nobody out.
    let idle: Vec<_> = inside(&site.topology.netns("node"), || {
        let connect = |_| std::net::TcpStream::connect("127.0.0.1:15014").unwrap();
        (0..100).map(connect).collect()
    });
    // The journal is not needed for a scrape.
    let journal = site.topology.settings().state_dir.join("redirection.json");
    let aside = journal.with_extension("aside");
    fs::rename(&journal, &aside).unwrap();
    let text = get("/metrics");
    fs::rename(&aside, &journal).unwrap();
    drop(idle);
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
    assert!(text.contains("\nnode_agent_pods 2\n"), "{text}");
    assert!(text.contains("\nnode_agent_sockmap_enabled 0\n"), "{text}");
    let counted = if redirect == "ebpf" {
        r#"node_agent_packets_total{program="app_outbound",outcome="redirected",reason="redirected"} "#
    } else {
        r#"node_agent_rule_packets_total{place="node",rule="mangle -A ztunnel-PREROUTING "#
    };
    assert!(text.contains(counted), "{text}");
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let head = head.to_ascii_lowercase();
    let length = format!("content-length: {}", body.len());
    assert!(head.contains(&length), "{head}");
    let kind = "content-type: text/plain; version=0.0.4; charset=utf-8";
    assert!(head.contains(kind), "{head}");
    let probes = [("/readyz", "ready\n"), ("/healthz", "ok\n")];
    for (path, answer) in probes {
        let text = get(path);
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        assert!(text.ends_with(answer), "{text}");
    }
    let text = get("/");
    assert!(text.starts_with("HTTP/1.1 404 "), "{text}");
    let text = ask_metrics(&site, "HELO there\r\n\r\n");
    assert!(text.starts_with("HTTP/1.1 400 "), "{text}");
    // Without the setting nobody listens any more.
    fs::write(site.config_path(), config).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while inside(&site.topology.netns("node"), || {
        std::net::TcpStream::connect("127.0.0.1:15014").is_ok()
    }) {
        assert!(Instant::now() < deadline, "it still listens");
        thread::sleep(Duration::from_millis(100));
    }
    // An address that cannot be had is told in one line, and nothing is installed for it.
    agent.end(Signal::SIGTERM);
    site.cleanup();
    let wrong = with_stats.replace("127.0.0.1:15014", "192.0.2.1:15014");
    fs::write(site.config_path(), wrong).unwrap();
    let output = site.once(&["run"]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        message.contains("stats_address 192.0.2.1:15014"),
        "{message}"
    );
    assert_eq!(message.lines().count(), 1, "{message}");
}

#[test]
fn repairs_ebpf() {
    if can_run("repairs_ebpf") {
        repairs(
            "ebpf",
            &[
                ("node", "find BPFFS -name app_outbound_* -delete"),
                ("node", "find BPFFS -name underlay_ingress_* -delete"),
                ("ztunnel", "ip rule del pref 20000"),
                ("ztunnel", "ip route flush table 100"),
                ("node", "find BPFFS -name pods -delete"),
                ("node", "find BPFFS -name listeners -delete"),
                ("node", "find BPFFS -name ztunnel_ingress -delete"),
                // All of it: the agent still has the maps open, ztunnel's listeners in them.
                ("node", "find BPFFS -mindepth 1 -delete"),
            ],
        );
    }
}

/// Without the program that a removed pin kept attached, packets go past ztunnel: it is put back at
/// the next look at the node, long before everything is looked at again.
#[test]
fn removed_pins_are_noticed_at_once() {
    if !can_run("removed_pins_are_noticed_at_once") {
        return;
    }
    let site = Site::new("ebpf");
    let config = site.config(&["app1", "app2"]);
    let config = config.replace("reconcile_s: 1\n", "reconcile_s: 3600\n");
    fs::write(site.config_path(), config).unwrap();
    is_repaired(
        &site,
        &[
            ("node", "find BPFFS -name ztunnel_ingress -delete"),
            ("node", "find BPFFS -name app_outbound_* -delete"),
        ],
    );
}

/// The agent looks at its file first: what has been removed by then is put back all the same, of
/// pods that the change of the file is not about.
#[test]
fn pins_removed_beside_a_change_of_the_configuration_come_back() {
    if !can_run("pins_removed_beside_a_change_of_the_configuration_come_back") {
        return;
    }
    let site = Site::new("ebpf");
    let agent = site.run();
    let _ztunnel = site.listener();
    let _remote = Server::app(&site.topology.netns("remote"), 80);
    site.wait_until_answered_by("captured");
    let bpffs = site.topology.bpffs().display().to_string();
    // Both in one look at the node.
    agent.signal(Signal::SIGSTOP);
    site.damage(
        "node",
        &format!("find {bpffs} -name app_outbound_* -delete"),
    );
    site.configure(&["app1"]);
    agent.signal(Signal::SIGCONT);
    agent.wait_until_told("removed by someone else", 1);
    site.wait_until_answered_by("captured");
    agent.end(Signal::SIGTERM);
    site.cleanup();
}

#[test]
fn repairs_clsact() {
    if can_run("repairs_clsact") {
        repairs(
            "clsact",
            &[
                ("node", "tc filter del dev va1 ingress"),
                ("node", "tc qdisc del dev va1 clsact"),
                ("node", "tc qdisc del dev vz clsact"),
                ("node", "find BPFFS -mindepth 1 -delete"),
            ],
        );
    }
}

#[test]
fn repairs_tunnel() {
    if can_run("repairs_tunnel") {
        repairs(
            "tunnel",
            &[
                ("node", "iptables -t mangle -F"),
                ("node", "iptables -t nat -F ztunnel-PREROUTING"),
                ("ztunnel", "iptables -t mangle -F"),
                ("node", "ipset flush ztunnel-pods-ips"),
                ("node", "ip rule del pref 101"),
                ("node", "ip route flush table 101"),
                ("node", "ip link del istioout"),
                ("ztunnel", "ip link del pistioin"),
            ],
        );
    }
}

/// Filters of others, older and newer than ours, survive all of it.
#[test]
fn foreign_filters_survive() {
    if !can_run("foreign_filters_survive") {
        return;
    }
    let site = Site::new("clsact");
    let foreign = |interface: &str| {
        let add = "prio 50 handle 0x77 bpf bytecode 1,6\u{a0}0\u{a0}0\u{a0}4294967295";
        let words: Vec<_> = add.split(' ').map(|w| w.replace('\u{a0}', " ")).collect();
        inside(&site.topology.netns("node"), || {
            let status = Command::new("tc")
                .args(["filter", "add", "dev", interface, "ingress"])
                .args(&words)
                .args(["flowid", "1:1"])
                .status();
            assert!(status.unwrap().success());
        });
    };
    site.damage("node", "tc qdisc add dev va1 clsact");
    foreign("va1");
    let agent = site.run();
    foreign("va2");
    let _ztunnel = site.listener();
    let _remote = Server::app(&site.topology.netns("remote"), 80);
    site.wait_until_answered_by("captured");
    site.configure(&["app2"]);
    site.wait_until_answered_by("app");
    agent.end(Signal::SIGTERM);
    assert!(site.once(&["cleanup"]).status.success());
    for interface in ["va1", "va2"] {
        let shown = inside(&site.topology.netns("node"), || {
            topology::run(&format!("tc filter show dev {interface} ingress"))
        });
        assert!(
            shown.contains("0x77") && !shown.contains("0x5a54"),
            "{shown}"
        );
        site.damage("node", &format!("tc qdisc del dev {interface} clsact"));
    }
    site.cleanup();
}

#[test]
fn one_agent_per_namespace_and_in_its_own() {
    if !can_run("one_agent_per_namespace_and_in_its_own") {
        return;
    }
    let site = Site::new("ebpf");
    let elsewhere = inside(&site.topology.netns("plain"), || {
        site.command(&["run"]).output().unwrap()
    });
    let message = String::from_utf8_lossy(&elsewhere.stderr).into_owned();
    assert!(message.contains("another network namespace"), "{message}");
    assert_eq!(site.before, site.topology.traces());
    let agent = site.run();
    // With another state directory it is refused, too.
    let config = site.config(&["app1"]).replace("/state", "/other-state");
    fs::write(site.config_path(), config).unwrap();
    let second = site.once(&["run"]);
    let message = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(message.contains("another node-agent runs"), "{message}");
    site.configure(&["app1", "app2"]);
    // What is dropped is told.
    let asked = site
        .topology
        .ask_from("app1", Some(topology::APP2), (REMOTE, 80));
    asked.unwrap_err();
    agent.wait_until_told("dropped: app_outbound spoofed: protocol 6 10.244.1.12:", 1);
    agent.end(Signal::SIGTERM);
    site.cleanup();
}

macro_rules! for_both {
    ($($test:ident),+) => {
        $(mod $test {
            #[test]
            fn ebpf() {
                if super::can_run(concat!(stringify!($test), "::ebpf")) {
                    super::$test("ebpf");
                }
            }

            #[test]
            fn tunnel() {
                if super::can_run(concat!(stringify!($test), "::tunnel")) {
                    super::$test("tunnel");
                }
            }
        })+
    };
}

for_both!(
    lives_dies_and_leaves_no_trace,
    follows_its_configuration,
    follows_a_new_ztunnel,
    metrics,
    waits_for_interfaces,
    bad_input_is_one_line_and_leaves_nothing,
    probes_pass,
    one_bad_pod_costs_itself,
    the_running_and_newer_pod_has_the_address,
    a_pod_that_cannot_be_captured_is_cut_off,
    no_moment_is_open_while_a_pod_changes
);
