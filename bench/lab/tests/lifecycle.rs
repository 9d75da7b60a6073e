//! A lab with redirection comes, is killed on its way, and goes, and nothing of it stays: neither
//! programs in the kernel nor anything that `topology.rs` looks for.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use lab::{Lab, LabOptions, Redirect};
use support::{
    Pattern, Trace, at, can_run, check_echo, echo_server, eventually, lab_program, turn, unique,
};

#[test]
fn tunnel() {
    lifecycle("tunnel", Redirect::Tunnel);
}

#[test]
fn ebpf() {
    lifecycle("ebpf", Redirect::Ebpf);
}

fn lifecycle(test: &str, redirect: Redirect) {
    if !can_run(test) {
        return;
    }
    let _turn = turn();
    let name = unique(redirect.name());
    let options = LabOptions {
        name: name.clone(),
        redirect,
        ..LabOptions::default()
    };
    let before = Trace::take(&name);
    let programs_before = programs();

    for delay_ms in [150, 400, 800, 1300] {
        let arguments = ["up", "--redirect", redirect.name(), "--name", &name];
        let mut first = lab_program()
            .args(arguments)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(delay_ms));
        first.kill().unwrap();
        first.wait().unwrap();
        // On a fast machine it had finished before it was killed: then it is up, and stays.
        if Lab::attach(&name).is_ok() {
            Lab::down(&name).unwrap();
        }
    }
    let lab = match Lab::up(&options) {
        Ok(lab) => support::TestLab { lab },
        Err(error) => panic!("up after a killed one: {error}"),
    };
    let status = lab.lab.status();
    assert!(status.ready, "{:?}", status.missing);
    let driver = status.tunnel_driver.as_deref();
    match redirect {
        Redirect::Tunnel => assert!(matches!(driver, Some("geneve" | "vxlan")), "{driver:?}"),
        _ => assert_eq!(driver, None),
    }
    let echo = echo_server(lab.listen("server-b", 8080), 1);
    check_echo(
        &lab.connect("client-a", at("server-b", 8080)),
        &Pattern::new(1),
        100_000,
        1,
    );
    echo.join().unwrap();
    let ours: BTreeSet<_> = programs().difference(&programs_before).cloned().collect();
    if redirect == Redirect::Ebpf {
        assert!(!ours.is_empty(), "the eBPF path runs without programs");
    }

    assert!(Lab::down(&name).unwrap());
    assert_eq!(Trace::take(&name), before);
    eventually("the lab's BPF programs are gone", || {
        programs().is_disjoint(&ours).then_some(())
    });
    assert!(Lab::attach(&name).is_err());
    // Already down: there is nothing for the end of the test to remove.
    drop(lab);
    assert_eq!(Trace::take(&name), before);
}

/// Ids of the redirection's programs in the kernel, of all labs.
fn programs() -> BTreeSet<u64> {
    let output = Command::new("bpftool")
        .args(["--json", "prog", "show"])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let programs: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let redirection = |program: &&serde_json::Value| {
        matches!(
            program["type"].as_str(),
            Some("sched_cls" | "sk_lookup" | "sock_ops" | "sk_msg")
        )
    };
    let ids = programs.as_array().unwrap().iter().filter(redirection);
    ids.filter_map(|program| program["id"].as_u64()).collect()
}
