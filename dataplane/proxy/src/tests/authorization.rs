//! Policies that change while connections are open, and what waits for configuration.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::rc::Rc;
use std::time::Duration;

use super::end_to_end::{CLIENT, ONLY_CLIENT, STRANGER, Worker, echo, mesh, worker, worker_with};
use super::{HANG, context, run, snapshot};
use crate::Command;
use crate::config::RedirectMode;

const NOBODY: &str = "policies:\n- {name: nobody, namespace: default, scope: Namespace, \
     action: Deny, dryRun: false, rules: [[[{principals: \
     [{Exact: cluster.local/ns/default/sa/client}]}]]]}\n";

/// A connection that a new policy denies ends with a reset; one that it allows goes on; and what
/// is denied now stays so.
#[test]
fn connections_that_are_no_longer_allowed_end() {
    let (port, _) = echo();
    ends_what_is_no_longer_allowed(worker(port, ""), port);
}

/// The same where both pods are on this node and there is no tunnel whose certificates say who they
/// are: policies match the identities of the pods.
#[test]
fn connections_of_one_hop_that_are_no_longer_allowed_end() {
    let (port, _) = echo();
    let worker = worker_with(port, "", &super::store(), |config| {
        config.mode = RedirectMode::Node;
        config.node.hbone_port = 1; // a tunnel would fail
    });
    ends_what_is_no_longer_allowed(worker, port);
}

fn ends_what_is_no_longer_allowed(worker: Worker, port: u16) {
    let exchange = |stream: &mut std::net::TcpStream| {
        stream.write_all(b"hello").unwrap();
        let mut back = [0; 5];
        stream.read_exact(&mut back).map(|()| back)
    };
    let (mut denied, mut kept) = (worker.connect(CLIENT), worker.connect(STRANGER));
    assert_eq!(&exchange(&mut denied).unwrap(), b"hello");
    assert_eq!(&exchange(&mut kept).unwrap(), b"hello");
    let reload = |policies| {
        let snapshot = snapshot(&mesh(worker.outbound, port, policies));
        worker.commands.send(Command::Snapshot(snapshot)).unwrap();
    };
    // Dry runs and changes elsewhere end nothing.
    reload(ONLY_CLIENT);
    let error = kept.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(&exchange(&mut denied).unwrap(), b"hello");
    reload(NOBODY);
    let error = denied.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let error = worker.connect(CLIENT).read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    // Only those: the tunnel they may have shared has not been ended.
    assert_eq!(&exchange(&mut worker.connect(STRANGER)).unwrap(), b"hello");
    worker.drain();
}

/// A workload that has left the configuration keeps its connections: its pod may still be ending.
#[test]
fn connections_outlive_their_workload() {
    let (port, _) = echo();
    let worker = worker(port, ONLY_CLIENT);
    let mut stream = worker.connect(CLIENT);
    stream.write_all(b"a").unwrap();
    stream.read_exact(&mut [0; 1]).unwrap();
    let empty = snapshot("workloads: []\nservices: []\n");
    worker.commands.send(Command::Snapshot(empty)).unwrap();
    let mut late = worker.connect(CLIENT);
    assert!(late.read(&mut [0; 1]).is_err());
    stream.write_all(b"b").unwrap();
    stream.read_exact(&mut [0; 1]).unwrap();
    drop((stream, late));
    worker.drain();
}

/// Connections of a pod that is not configured leave nothing behind.
#[test]
fn waits_for_a_workload_are_forgotten() {
    run(async {
        let context = context(&mesh(1, 1, ""), |config| {
            config.workload_timeout = Duration::from_millis(5);
        });
        let unknown = IpAddr::V4(Ipv4Addr::new(127, 9, 9, 9));
        for _ in 0..50 {
            assert!(context.wait_for_workload(unknown).await.is_err());
        }
        assert_eq!(context.waiting_for_workloads(), 0);
        // And one that becomes known while somebody waits is found.
        let (sender, mut found) = rt::mailbox::channel(1);
        let patient = super::context("workloads: []", |config| config.workload_timeout = HANG);
        rt::spawn({
            let context = Rc::clone(&patient);
            async move {
                let workload = context.wait_for_workload(CLIENT).await.unwrap();
                sender.send(workload.name.to_string()).unwrap();
            }
        });
        rt::time::sleep(Duration::from_millis(5)).await;
        patient.replace_snapshot(snapshot(&mesh(1, 1, "")));
        assert_eq!(found.recv().await, "client");
    });
}

/// A service may list identities beside its workloads'; the one that the server has proved is told.
#[test]
fn metrics_name_the_server_that_answered() {
    let (port, _) = echo();
    let worker = worker(port, "");
    let listed =
        "hostname: s.local, subjectAltNames: [spiffe://cluster.local/ns/default/sa/former],";
    let mesh = mesh(worker.outbound, port, "").replace("hostname: s.local,", listed);
    let snapshot = snapshot(&mesh);
    worker.commands.send(Command::Snapshot(snapshot)).unwrap();
    let mut stream = worker.connect(CLIENT);
    stream.write_all(b"a").unwrap();
    stream.read_exact(&mut [0; 1]).unwrap();
    let opened = worker.samples("istio_tcp_connections_opened_total");
    let outbound: Vec<_> = opened
        .iter()
        .filter(|line| line.contains("reporter=\"source\""))
        .collect();
    assert_eq!(outbound.len(), 1, "{opened:?}");
    let proved = "destination_principal=\"spiffe://cluster.local/ns/default/sa/server\"";
    assert!(outbound[0].contains(proved), "{opened:?}");
    drop(stream);
    worker.drain();
}
