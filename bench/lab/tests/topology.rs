//! The lab itself: its network, and that it comes and goes without a trace.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use lab::network::namespace;
use lab::{Host, Lab, LabOptions, Redirect};
use nix::sys::signal::{SigSet, Signal};
use support::{
    Guarded, TestLab, Trace, accept, at, can_run, lab_program, one_line, turn, unique,
    workspace_binary,
};

fn up_none(name: &str) -> Output {
    lab_program()
        .args(["up", "--redirect", "none", "--name", name])
        .output()
        .unwrap()
}

fn down(name: &str) -> Output {
    lab_program()
        .args(["down", "--name", name])
        .output()
        .unwrap()
}

#[test]
fn every_host_reaches_every_other_and_keeps_its_address() {
    if !can_run("every_host_reaches_every_other_and_keeps_its_address") {
        return;
    }
    let _turn = turn();
    let lab = TestLab::up("reach", Redirect::None);
    for server in Host::ALL {
        let listener = lab.listen(server.name(), 7000);
        for client in Host::ALL.into_iter().filter(|client| *client != server) {
            let mut stream = lab.connect(client.name(), at(server.name(), 7000));
            let (mut served, peer) = accept(&listener);
            let node = client == client.node().host();
            let is_pod = server != Host::Outside;
            let to_own_pod = node && is_pod && server.node() == client.node();
            let expected: IpAddr = if to_own_pod {
                client.node().gateway().into()
            } else {
                client.address()
            };
            assert_eq!(peer.ip(), expected, "{client} -> {server}");
            served.write_all(b"x").unwrap();
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
        }
    }
}

#[test]
fn links_and_sysctls_are_as_documented() {
    if !can_run("links_and_sysctls_are_as_documented") {
        return;
    }
    let _turn = turn();
    let lab = TestLab::up("link", Redirect::None);
    for host in Host::ALL {
        let links = lab.run(host.name(), "ip", &["-o", "link", "show", "type", "veth"]);
        let links = String::from_utf8(links.stdout).unwrap();
        assert!(!links.is_empty(), "{host} has no link");
        assert!(
            links.lines().all(|link| link.contains(" mtu 1500 ")),
            "{host}: {links}"
        );
        let read = |name: &str| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap();
        let (algorithm, forward) = lab
            .lab
            .on(host.name(), || {
                (read("tcp_congestion_control"), read("ip_forward"))
            })
            .unwrap();
        assert_eq!(algorithm.trim(), "reno", "{host}");
        let node = host == host.node().host();
        assert_eq!(forward.trim(), if node { "1" } else { "0" }, "{host}");
    }
    let routes = lab.run("client-a", "ip", &["route"]);
    let routes = String::from_utf8(routes.stdout).unwrap();
    assert!(
        routes.contains("default via 10.244.1.1 dev eth0 onlink"),
        "{routes}"
    );
}

#[test]
fn nothing_of_a_lab_shows_up_in_the_machines_network_or_stays() {
    if !can_run("nothing_of_a_lab_shows_up_in_the_machines_network_or_stays") {
        return;
    }
    let _turn = turn();
    let name = unique("trace");
    let before = Trace::take(&name);
    let monitor = Command::new("ip")
        .args(["-o", "monitor", "link"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut monitor = Guarded(monitor);
    thread::sleep(Duration::from_millis(200));
    let output = up_none(&name);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // A process of the lab that the lab has not started by itself must go too.
    let child = lab_program()
        .args(["exec", "--name", &name, "server-b", "--", "sleep", "600"])
        .spawn()
        .unwrap();
    let mut child = Guarded(child);
    thread::sleep(Duration::from_millis(200));
    let inside = fs::metadata(format!("/proc/{}/ns/net", child.0.id())).unwrap();
    let netns = namespace::path(&format!("{name}-server-b"));
    use std::os::unix::fs::MetadataExt;
    assert_eq!(
        Some(inside.ino()),
        namespace::inode(&netns),
        "exec is not in the namespace"
    );
    let during = Trace::take(&name);
    assert_eq!(during.namespaces.len(), Host::ALL.len());
    assert_eq!(
        (&during.routes, &during.rules),
        (&before.routes, &before.rules)
    );

    assert!(down(&name).status.success());
    assert!(
        child.0.wait().unwrap().signal().is_some(),
        "a process in the lab outlived it"
    );
    assert_eq!(Trace::take(&name), before);
    monitor.0.kill().unwrap();
    let mut events = String::new();
    monitor
        .0
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut events)
        .unwrap();
    for host in Host::ALL {
        let shown = events
            .lines()
            .any(|e| e.contains(&format!(" {}@", host.host_interface())));
        assert!(
            !shown,
            "{} was in the machine's network: {events}",
            host.host_interface()
        );
    }
    let again = down(&name);
    assert!(again.status.success(), "down of nothing failed");
    assert_eq!(Trace::take(&name), before);
}

#[test]
fn a_second_up_works_whenever_the_first_one_was_killed() {
    if !can_run("a_second_up_works_whenever_the_first_one_was_killed") {
        return;
    }
    let _turn = turn();
    let name = unique("kill");
    let before = Trace::take(&name);
    let mut remnants = 0;
    for delay_ms in [1, 5, 10, 20, 30, 40, 50, 60, 80, 100, 120, 150] {
        let mut first = lab_program()
            .args(["up", "--redirect", "none", "--name", &name])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(delay_ms));
        first.kill().unwrap();
        let finished = first.wait().unwrap().success();
        let second = up_none(&name);
        let said = String::from_utf8_lossy(&second.stderr).into_owned();
        if second.status.success() {
            remnants += usize::from(said.contains("did not finish"));
            assert!(
                !finished || said.contains("did not finish"),
                "a finished lab was replaced"
            );
        } else {
            // The first one had come to its end before it was hit.
            assert!(said.contains("already up"), "after {delay_ms} ms: {said}");
        }
        let lab = Lab::attach(&name).unwrap();
        assert!(
            lab.status().ready,
            "after {delay_ms} ms: {:?}",
            lab.status().missing
        );
        assert!(down(&name).status.success());
        assert_eq!(Trace::take(&name), before, "after {delay_ms} ms");
    }
    assert!(
        remnants > 0,
        "no kill hit an `up` half way: the test shows nothing"
    );
}

#[test]
fn a_killed_up_is_also_removed_by_down() {
    if !can_run("a_killed_up_is_also_removed_by_down") {
        return;
    }
    let _turn = turn();
    let name = unique("killdown");
    let before = Trace::take(&name);
    for delay_ms in [15, 35, 55, 75] {
        let mut first = lab_program()
            .args(["up", "--redirect", "none", "--name", &name])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(delay_ms));
        first.kill().unwrap();
        first.wait().unwrap();
        assert!(down(&name).status.success());
        assert_eq!(Trace::take(&name), before, "after {delay_ms} ms");
    }
}

#[test]
fn two_labs_are_up_at_once_and_do_not_see_each_other() {
    if !can_run("two_labs_are_up_at_once_and_do_not_see_each_other") {
        return;
    }
    let _turn = turn();
    let one = TestLab::up("one", Redirect::None);
    let two = TestLab::up("two", Redirect::None);
    // Same address and port in both; each client must reach its own.
    for (lab, mark) in [(&one, b'1'), (&two, b'2')] {
        let listener = lab.listen("server-b", 7000);
        let mut client = lab.connect("client-a", at("server-b", 7000));
        accept(&listener).0.write_all(&[mark]).unwrap();
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        assert_eq!(byte[0], mark);
    }
    let name = two.lab.name().to_owned();
    drop(two);
    assert!(
        one.lab.status().ready,
        "removing {name} hurt {}",
        one.lab.name()
    );
    let refused = up_none(one.lab.name());
    assert!(!refused.status.success());
    let line = one_line(&refused);
    assert!(
        line.contains("already up") && line.contains("lab down"),
        "{line}"
    );
    assert!(
        one.lab.status().ready,
        "a refused up hurt the lab that is up"
    );
}

#[test]
fn exec_is_transparent() {
    if !can_run("exec_is_transparent") {
        return;
    }
    let _turn = turn();
    let lab = TestLab::up("exec", Redirect::None);
    let exec = |host: &str, command: &[&str]| {
        let mut program = lab_program();
        program
            .args(["exec", "--name", lab.lab.name(), host, "--"])
            .args(command);
        program
    };
    for code in [0, 1, 7, 255] {
        let status = exec("client-a", &["sh", "-c", &format!("exit {code}")])
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(code));
    }
    let killed = exec("client-a", &["sh", "-c", "kill -9 $$"])
        .status()
        .unwrap();
    assert_eq!(killed.signal(), Some(9));
    let missing = exec("client-a", &["no-such-program"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(127));
    assert!(one_line(&missing).contains("no-such-program"));
    let unknown = exec("client-c", &["true"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(1));
    assert!(
        one_line(&unknown).contains("client-a"),
        "the hosts are not listed"
    );

    let mut cat = exec("plain-b", &["sh", "-c", "ip -o -4 addr show eth0; cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    cat.stdin.take().unwrap().write_all(b"from stdin").unwrap();
    let output = cat.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("10.244.2.12/32") && text.ends_with("from stdin"),
        "{text}"
    );
}

#[test]
fn commands_start_with_no_signal_blocked() {
    if !can_run("commands_start_with_no_signal_blocked") {
        return;
    }
    let _turn = turn();
    let lab = TestLab::up("mask", Redirect::None);
    // As a program does that wants Ctrl-C to wait.
    let mut held = SigSet::empty();
    held.add(Signal::SIGTERM);
    held.thread_block().unwrap();
    let output = lab.run("client-a", "grep", &["SigBlk", "/proc/self/status"]);
    held.thread_unblock().unwrap();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "SigBlk:\t0000000000000000\n"
    );
}

#[test]
fn status_has_the_promised_shape() {
    if !can_run("status_has_the_promised_shape") {
        return;
    }
    let _turn = turn();
    let name = unique("status");
    let absent = lab_program()
        .args(["status", "--name", &name])
        .output()
        .unwrap();
    assert_eq!(absent.status.code(), Some(1));
    assert!(one_line(&absent).contains("not up"));

    let lab = TestLab::up("status", Redirect::None);
    let mut sleep = lab.lab.command("client-a", "sleep").unwrap();
    let sleep = Guarded(sleep.arg("600").spawn().unwrap());
    let output = lab_program()
        .args(["status", "--json", "--name", &name])
        .output()
        .unwrap();
    assert!(output.status.success());
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["redirect"], "none");
    assert_eq!(status["sockmap"], false);
    assert_eq!(status["tunnel_driver"], serde_json::Value::Null);
    assert_eq!(status["ready"], true);
    let hosts = status["hosts"].as_array().unwrap();
    let names: Vec<_> = hosts
        .iter()
        .map(|host| host["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, Host::ALL.map(Host::name));
    let client = &hosts[4];
    assert_eq!(client["node"], "node-a");
    // The IPv6 address follows where the machine has IPv6.
    assert_eq!(client["addresses"][0], "10.244.1.11");
    assert_eq!(client["pids"], serde_json::json!([sleep.0.id()]));
}

#[test]
fn bad_arguments_are_refused_in_one_line_and_make_nothing() {
    if !can_run("bad_arguments_are_refused_in_one_line_and_make_nothing") {
        return;
    }
    let _turn = turn();
    let name = unique("bad");
    let before = Trace::take(&name);
    let cases: &[(&[&str], &str)] = &[
        (&["up", "--redirect", "geneve"], "none, tunnel, ebpf"),
        (
            &["up", "--redirect", "tunnel", "--sockmap", "on"],
            "--redirect ebpf",
        ),
        (
            &["up", "--redirect", "none", "--sockmap", "on"],
            "--redirect tunnel or ebpf",
        ),
        (&["up", "--sockmap", "maybe"], "off, on"),
        (&["up", "--variant", "fast"], "hardened"),
        (
            &["up", "--redirect", "none", "--config", "/dev/null"],
            "--config needs a ztunnel",
        ),
        (
            &["up", "--config", "/no/such/mesh.yaml"],
            "/no/such/mesh.yaml",
        ),
        (&["up", "--ztunnel", "/no/such/ztunnel"], "/no/such/ztunnel"),
        (&["up", "--bogus"], "--bogus"),
        (&["exec", "client-a"], "COMMAND"),
        (&["exec", "client-a", "--", "true"], "not up"),
        (&["sideways"], "sideways"),
    ];
    for (arguments, expected) in cases {
        let (command, rest) = arguments.split_first().unwrap();
        let mut program = lab_program();
        program.args([command, "--name", &name]).args(rest);
        let output = program.output().unwrap();
        assert!(!output.status.success(), "{arguments:?} was accepted");
        let line = one_line(&output);
        assert!(line.contains(expected), "{arguments:?}: {line}");
        assert_eq!(Trace::take(&name), before, "{arguments:?}");
    }
    for bad in ["", "Up", "../x", "a_b"] {
        let output = lab_program()
            .args(["up", "--redirect", "none", "--name", bad])
            .output();
        assert!(
            one_line(&output.unwrap()).contains("not usable"),
            "name {bad:?}"
        );
    }
}

#[test]
fn without_root_or_iproute2_the_reason_is_given() {
    if !can_run("without_root_or_iproute2_the_reason_is_given") {
        return;
    }
    let _turn = turn();
    let name = unique("noroot");
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = directory.path().join("lab");
    fs::copy(workspace_binary("lab"), &copy).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&copy)
        .args(["up", "--redirect", "none", "--name", &name])
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(one_line(&output).contains("needs root"));
    let output = lab_program()
        .args(["up", "--redirect", "none", "--name", &name])
        .env("PATH", directory.path())
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(one_line(&output).contains("iproute2"));
    let unprivileged = Command::new("setpriv")
        .args(["--bounding-set=-sys_admin", "--inh-caps=-sys_admin"])
        .arg(&copy)
        .args(["up", "--redirect", "none", "--name", &name])
        .output()
        .unwrap();
    assert!(!unprivileged.status.success());
    let line = one_line(&unprivileged);
    assert!(
        line.contains("CAP_SYS_ADMIN") || line.contains("not permitted"),
        "{line}"
    );
    assert!(Trace::take(&name).namespaces.is_empty());
}

/// Writes an executable script.
fn script(directory: &Path, name: &str, body: &str) {
    let path = directory.join(name);
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_failing_daemon_rolls_everything_back() {
    if !can_run("a_failing_daemon_rolls_everything_back") {
        return;
    }
    let _turn = turn();
    let name = unique("rollback");
    let before = Trace::take(&name);
    let agent = "[ $1 = run ] || exit 0\necho 'node-agent: ready'\nexec sleep 600";
    let cases = [
        (
            "echo broken agent >&2; exit 3",
            "exit 1",
            "node-agent on node-a",
            "broken agent",
        ),
        (
            agent,
            "echo broken ztunnel; exit 4",
            "ztunnel on ztunnel-a",
            "broken ztunnel",
        ),
    ];
    for redirect in ["tunnel", "ebpf"] {
        for (agent, ztunnel, who, words) in cases {
            let directory = tempfile::tempdir().unwrap();
            let agent = agent.replace(
                "exit 0",
                "{ echo '{\"tunnel_driver\": \"vxlan\"}'; exit 0; }",
            );
            script(directory.path(), "node-agent", &agent);
            script(directory.path(), "ztunnel", ztunnel);
            let output = lab_program()
                .args(["up", "--redirect", redirect, "--name", &name])
                .env("LAB_BIN_DIR", directory.path())
                .output()
                .unwrap();
            assert!(!output.status.success());
            let line = one_line(&output);
            assert!(line.contains(who) && line.contains(words), "{line}");
            assert_eq!(Trace::take(&name), before, "{redirect}: {who}");
        }
    }
}

#[test]
fn namespaces_of_somebody_else_are_not_taken_over() {
    if !can_run("namespaces_of_somebody_else_are_not_taken_over") {
        return;
    }
    let _turn = turn();
    let name = unique("foreign");
    let netns = format!("{name}-client-a");
    let ip = |command: &str| {
        assert!(
            Command::new("ip")
                .args(["netns", command, &netns])
                .status()
                .unwrap()
                .success()
        );
    };
    ip("add");
    let options = LabOptions {
        name: name.clone(),
        redirect: Redirect::None,
        ..LabOptions::default()
    };
    let error = Lab::up(&options).unwrap_err().to_string();
    assert!(
        error.contains(&netns) && error.contains("lab down"),
        "{error}"
    );
    assert!(
        namespace::inode(&namespace::path(&netns)).is_some(),
        "it was removed"
    );
    assert!(Lab::down(&name).unwrap());
    assert!(namespace::inode(&namespace::path(&netns)).is_none());
}
