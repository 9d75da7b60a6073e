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
        worker.snapshots.send(snapshot).unwrap();
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

/// More configurations than any queue would hold, and the last one forbids: it counts, also for
/// a connection that a drain lets finish.
#[test]
fn the_newest_policy_arrives_however_many_there_were_and_in_a_drain() {
    let (port, _) = echo();
    let worker = worker(port, "");
    let reload = |policies| {
        let snapshot = snapshot(&mesh(worker.outbound, port, policies));
        worker.snapshots.send(snapshot).unwrap();
    };
    let connected = || {
        let mut stream = worker.connect(CLIENT);
        stream.write_all(b"a").unwrap();
        stream.read_exact(&mut [0; 1]).unwrap();
        stream
    };
    let mut first = connected();
    for _ in 0..1_000 {
        reload(ONLY_CLIENT);
    }
    reload(NOBODY);
    let error = first.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    reload("");
    let mut second = loop {
        let mut stream = worker.connect(CLIENT);
        let echoed = stream
            .write_all(b"a")
            .and_then(|()| stream.read_exact(&mut [0; 1]));
        if echoed.is_ok() {
            break stream;
        }
    };
    worker.commands.send(Command::drain(HANG)).unwrap();
    // The listener's end shows that the drain has begun.
    while std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, worker.outbound)).is_ok() {}
    reload(NOBODY);
    let error = second.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    worker.join();
}

/// The source of the proxy's own sockets is the pod's address only where that is asked for.
#[test]
fn a_tunnel_has_the_pods_address_only_with_original_source() {
    for original in [true, false] {
        let far = std::net::TcpListener::bind("127.0.0.3:0").unwrap();
        let hbone = far.local_addr().unwrap().port();
        let mesh = mesh(1, 1, "").replace("node: node, network: ''", "node: NODE, network: ''");
        let mesh = mesh.replacen("NODE", "node", 1).replace("NODE", "other");
        let seen = std::thread::spawn(move || far.accept().unwrap().1.ip());
        run(async {
            let context = context(&mesh, |config| {
                config.mode = RedirectMode::Node;
                config.original_source = original;
                config.node.hbone_port = hbone;
            });
            let captured = std::net::TcpListener::bind("127.0.0.3:0").unwrap();
            let to = captured.local_addr().unwrap();
            let mut captured = rt::net::Listener::from_std(captured);
            let options = rt::net::ConnectOptions {
                source: Some(CLIENT),
                ..Default::default()
            };
            let _client = rt::net::connect(to, &options).await.unwrap();
            let stream = captured.accept().await.unwrap();
            let alive = context.alive();
            crate::outbound::handle(Rc::clone(&context), stream, alive).await;
        });
        let source = seen.join().unwrap();
        assert_eq!(source == CLIENT, original, "{source}");
    }
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
    worker.snapshots.send(empty).unwrap();
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
            assert!(context.wait_for_source(unknown).await.is_err());
        }
        assert_eq!(context.waiting_for_workloads(), 0);
        // And one that becomes known while somebody waits is found.
        let (sender, mut found) = rt::mailbox::channel(1);
        let patient = super::context("workloads: []", |config| config.workload_timeout = HANG);
        rt::spawn({
            let context = Rc::clone(&patient);
            async move {
                let workload = context.wait_for_source(CLIENT).await.unwrap();
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
    worker.snapshots.send(snapshot).unwrap();
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
