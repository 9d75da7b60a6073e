//! Many short connections between two pods of one node: none of them meets what the kernel
//! remembers of another. ztunnel's connection to the server carries the client's address, so on a
//! port the client has used as well it would be the same connection to the node's conntrack.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::process::Stdio;
use std::time::Duration;

use lab::Redirect;
use support::{TestLab, at, can_run, eventually, turn, workspace_binary};

#[test]
fn tunnel() {
    short_connections("tunnel", Redirect::Tunnel);
}

#[test]
fn ebpf() {
    short_connections("ebpf", Redirect::Ebpf);
}

fn short_connections(test: &str, redirect: Redirect) {
    if !can_run(test) {
        return;
    }
    let _turn = turn();
    let lab = TestLab::up("own", redirect);
    let loadgen = workspace_binary("loadgen");
    let loadgen = loadgen.to_str().unwrap();
    let server = at("server-a", 8080).to_string();
    let mut command = lab.lab.command("server-a", loadgen).unwrap();
    let mut serve = command
        .args(["serve", "--listen", &server])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    eventually("the server listens", || {
        lab.try_connect("server-a", at("server-a", 8080), Duration::from_secs(1))
            .ok()
    });

    let arguments = [
        "connect",
        "--to",
        &server,
        "--concurrency",
        "8",
        "--duration",
        "3",
    ];
    let output = lab.run("client-a", loadgen, &arguments);
    serve.kill().unwrap();
    serve.wait().unwrap();

    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains(" 0 failed"), "{text}");
    let again = syn_retransmissions(&lab);
    assert_eq!(
        again, 0,
        "SYNs were sent again for want of an answer:\n{text}"
    );
}

/// `TCPSynRetrans` of the client's namespace.
fn syn_retransmissions(lab: &TestLab) -> u64 {
    let output = lab.run("client-a", "cat", &["/proc/net/netstat"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut both = names.split_whitespace().zip(values.split_whitespace());
    let (_, value) = both.find(|(name, _)| *name == "TCPSynRetrans").unwrap();
    value.parse().unwrap()
}
