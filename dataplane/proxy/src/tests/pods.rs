//! Whose an address is: what redirection says, what the configuration says, and what comes of both.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh::WorkloadName;

use super::end_to_end::{CLIENT, echo, exchange, mesh, worker_with};
use super::{HANG, context, run, snapshot};
use crate::config::{CapturedPod, LocalPods, Lookup, PodReader, RedirectMode};
use crate::error::ProxyError;
use crate::pods::Nobody;

/// A table that tests write. Addresses that it does not have are nobody's.
#[derive(Debug, Clone, Default)]
struct Table(Arc<Mutex<Vec<(IpAddr, Lookup)>>>);

impl Table {
    fn set(&self, ip: IpAddr, lookup: Lookup) {
        let mut entries = self.0.lock().unwrap();
        entries.retain(|(known, _)| *known != ip);
        entries.push((ip, lookup));
    }

    /// `ip` is the pod `name` of a service account of that name.
    fn captured(&self, ip: IpAddr, name: &str) {
        self.set(ip, pod(name));
    }
}

impl LocalPods for Table {
    fn reader(&self) -> Box<dyn PodReader> {
        Box::new(self.clone())
    }
}

impl PodReader for Table {
    fn pod(&mut self, ip: IpAddr) -> Lookup {
        let entries = self.0.lock().unwrap();
        let found = entries.iter().find(|(known, _)| *known == ip);
        found.map_or(Lookup::NotCaptured, |(_, lookup)| lookup.clone())
    }
}

fn pod(name: &str) -> Lookup {
    Lookup::Pod(Arc::new(CapturedPod {
        name: WorkloadName {
            namespace: "default".into(),
            name: name.into(),
            service_account: name.into(),
            trust_domain: None,
        },
        uid: format!("uid of {name}").into(),
    }))
}

fn why(error: &ProxyError) -> Nobody {
    match error {
        ProxyError::UnknownSource { why, .. } | ProxyError::UnknownDestination { why, .. } => {
            why.clone()
        }
        other => panic!("{other}"),
    }
}

#[test]
fn an_address_is_nobodys_where_the_two_disagree() {
    run(async {
        let table = Table::default();
        let pods: Arc<dyn LocalPods> = Arc::new(table.clone());
        let context = context(&mesh(1, 1, ""), |config| config.pods = Some(pods));
        let ask = || async { context.wait_for_source(CLIENT).await };
        let destination = || async { context.wait_for_destination(CLIENT).await };
        assert_eq!(why(&ask().await.unwrap_err()), Nobody::NotCaptured);
        assert_eq!(why(&destination().await.unwrap_err()), Nobody::NotCaptured);
        table.set(CLIENT, Lookup::NoTable);
        assert_eq!(why(&ask().await.unwrap_err()), Nobody::NoTable);
        table.captured(CLIENT, "stranger");
        for error in [ask().await.unwrap_err(), destination().await.unwrap_err()] {
            let text = error.to_string();
            for word in [
                "127.0.0.2",
                "default/stranger",
                "default/client",
                "uid of stranger",
            ] {
                assert!(text.contains(word), "{text}");
            }
        }
        table.captured(CLIENT, "client");
        assert_eq!(&*ask().await.unwrap().name, "client");
        assert_eq!(&*destination().await.unwrap().name, "client");
        // Each part of the name counts.
        let Lookup::Pod(client) = pod("client") else {
            panic!("a pod")
        };
        for change in [
            |name: &mut WorkloadName| name.namespace = "other".into(),
            |name: &mut WorkloadName| name.service_account = "other".into(),
        ] {
            let mut other = (*client).clone();
            change(&mut other.name);
            table.set(CLIENT, Lookup::Pod(Arc::new(other)));
            assert!(matches!(
                why(&ask().await.unwrap_err()),
                Nobody::Disagreed { .. }
            ));
        }
        assert_eq!(context.waiting_for_workloads(), 0);
    });
}

/// What one pod has connected is not another's because that has the address by the time the
/// configuration is there, though redirection and configuration agree then.
#[test]
fn a_connection_is_not_handed_from_one_pod_to_the_next() {
    run(async {
        for (before, expected) in [("former", false), ("client", true)] {
            let table = Table::default();
            table.captured(CLIENT, before);
            let pods: Arc<dyn LocalPods> = Arc::new(table.clone());
            let context = context("workloads: []", |config| {
                config.pods = Some(pods);
                config.workload_timeout = HANG;
            });
            let (sender, mut found) = rt::mailbox::channel(1);
            rt::spawn({
                let context = Rc::clone(&context);
                async move {
                    let found = context.wait_for_source(CLIENT).await;
                    sender
                        .send(found.map(drop).map_err(|error| why(&error)))
                        .unwrap();
                }
            });
            while context.waiting_for_workloads() == 0 {
                rt::time::sleep(Duration::from_millis(1)).await;
            }
            table.captured(CLIENT, "client");
            context.replace_snapshot(snapshot(&mesh(1, 1, "")));
            let found = found.recv().await;
            assert_eq!(found.is_ok(), expected, "{before}: {found:?}");
            assert!(expected || found == Err(Nobody::Changed));
        }
    });
}

/// A tunnel stays with the pod whose certificate it was opened with: when the address is another's
/// nothing more goes through it, and the client's next connection makes another.
#[test]
fn a_tunnel_does_not_pass_to_the_next_pod_with_the_address() {
    let server: IpAddr = [127, 0, 0, 3].into();
    let (port, told) = echo();
    let table = Table::default();
    table.captured(CLIENT, "client");
    table.captured(server, "server");
    let pods: Arc<dyn LocalPods> = Arc::new(table.clone());
    let worker = worker_with(port, "", &super::store(), |config| {
        config.mode = RedirectMode::Node;
        config.same_node_tunnel = true;
        config.pods = Some(pods);
    });
    assert_eq!(exchange(&worker.connect(CLIENT), b"first"), b"first");
    told.recv().unwrap();
    table.captured(server, "newcomer");
    let refused = |mut stream: std::net::TcpStream| {
        let _ = stream.write_all(b"x"); // it may be over already
        assert!(
            !matches!(stream.read(&mut [0; 1]), Ok(1..)),
            "served by another pod"
        );
    };
    refused(worker.connect(CLIENT));
    refused(worker.connect(CLIENT));
    assert!(told.try_recv().is_err(), "the server was reached");
    table.captured(server, "server");
    assert_eq!(exchange(&worker.connect(CLIENT), b"again"), b"again");
    worker.drain();
}

/// A pod that is captured and not configured is refused to pods of its own node, whichever way
/// would lead there; and one that is not captured is nobody's to refuse.
#[test]
fn what_is_captured_and_unknown_is_refused_on_its_own_node() {
    let unknown: IpAddr = [127, 0, 0, 77].into();
    for captured in [true, false] {
        let (port, told) = echo();
        let table = Table::default();
        table.captured(CLIENT, "client");
        if captured {
            table.captured(unknown, "unknown");
        }
        let pods: Arc<dyn LocalPods> = Arc::new(table);
        run(async move {
            let context = context(&mesh(1, 1, ""), |config| {
                config.mode = RedirectMode::Node;
                config.pods = Some(pods);
            });
            let source = context.wait_for_source(CLIENT).await.unwrap();
            let dst = SocketAddr::new(unknown, port);
            let node = &context.config.node;
            let route = context.snapshot().route(node, &source, dst, 1).unwrap();
            let delivery = route.delivery(|ip| context.is_captured(ip), false);
            let plain = delivery == mesh::Delivery::Plain(dst);
            assert_eq!(plain, captured, "{delivery:?}");
            if captured {
                let error = context.wait_for_destination(unknown).await.unwrap_err();
                assert_eq!(why(&error), Nobody::NotConfigured);
            }
        });
        assert!(told.try_recv().is_err());
    }
}
