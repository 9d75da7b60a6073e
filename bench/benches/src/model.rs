//! A mesh of any size, and questions to its model.
//!
//! Of `n` workloads, ten are behind each service; one service has all of them. Workloads are in
//! fifty namespaces with an ALLOW policy each; one DENY policy applies to all, and every hundredth
//! workload selects a policy of its own. Questions go to destinations in a shuffled order, so that
//! what they touch is as cold as the size makes it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh::address::{NamespacedHostname, NetworkAddress};
use mesh::policy::{Action, Match, PolicyScope, StringMatch};
use mesh::{
    ConnectionFacts, NodeContext, Policy, Protocol, Route, ServiceConfig, Snapshot, Verdict,
    Workload, WorkloadConfig,
};

/// Sizes measured, in workloads.
pub const SIZES: [usize; 4] = [1, 1_000, 10_000, 100_000];

const NAMESPACES: usize = 50;
const ENDPOINTS: usize = 10;
/// Destinations asked for in turn.
const QUESTIONS: usize = 4096;
/// Routes timed together while the model is replaced.
const ROUTES_PER_SAMPLE: usize = 64;

/// What a snapshot is built from.
#[derive(Clone, Debug)]
pub struct Source {
    workloads: Vec<WorkloadConfig>,
    services: Vec<ServiceConfig>,
    policies: Vec<Policy>,
}

impl Source {
    /// A mesh of `n` workloads.
    #[must_use]
    pub fn new(n: usize) -> Self {
        let services = (n / ENDPOINTS).max(1);
        Self {
            workloads: (0..n).map(|index| workload(index, services)).collect(),
            services: (0..services).map(service).chain([everything()]).collect(),
            policies: policies(n),
        }
    }

    /// The snapshot.
    ///
    /// # Errors
    /// The model is refused: a defect of the benchmark.
    pub fn build(&self) -> Result<Snapshot> {
        let Self {
            workloads,
            services,
            policies,
        } = self.clone();
        Ok(Snapshot::build(workloads, services, policies)?)
    }

    /// How long building takes, without the copy of its input.
    ///
    /// # Errors
    /// As [`Source::build`].
    pub fn time_build(&self) -> Result<Duration> {
        let source = self.clone();
        let start = Instant::now();
        let snapshot = Snapshot::build(source.workloads, source.services, source.policies)?;
        let spent = start.elapsed();
        ensure!(snapshot.workloads().len() == self.workloads.len(), "lost");
        Ok(spent)
    }
}

fn namespace(index: usize) -> Arc<str> {
    format!("ns-{}", index % NAMESPACES).into()
}

fn hostname(index: usize) -> Arc<str> {
    format!("svc-{index}.ns-{}.svc.cluster.local", index % NAMESPACES).into()
}

fn pod(index: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + index as u32 + 1))
}

fn vip(index: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from(0xac10_0000 + index as u32 + 1))
}

fn workload(index: usize, services: usize) -> WorkloadConfig {
    let own = index % services;
    let key = |hostname, namespace| NamespacedHostname {
        namespace,
        hostname,
    };
    let ports = BTreeMap::from([(80, 8080)]);
    let mut config = WorkloadConfig {
        uid: format!("cluster1//v1/Pod/ns-{}/pod-{index}", index % NAMESPACES).into(),
        name: format!("pod-{index}").into(),
        namespace: namespace(index),
        service_account: format!("account-{}", index % 7).into(),
        workload_ips: vec![pod(index)],
        protocol: Protocol::Hbone,
        node: format!("node-{}", index % 500).into(),
        workload_name: format!("deployment-{own}").into(),
        canonical_name: format!("deployment-{own}").into(),
        services: BTreeMap::from([
            (key(hostname(own), namespace(own)), ports.clone()),
            (key("everything.shop".into(), "shop".into()), ports),
        ]),
        ..WorkloadConfig::default()
    };
    if index % 100 == 99 {
        let policy = format!("ns-{}/own-{index}", index % NAMESPACES);
        config.authorization_policies = vec![policy.into()];
    }
    config
}

fn service(index: usize) -> ServiceConfig {
    let network = Arc::from("");
    ServiceConfig {
        name: format!("svc-{index}").into(),
        namespace: namespace(index),
        hostname: hostname(index),
        vips: vec![NetworkAddress {
            network,
            ip: vip(index),
        }],
        ports: BTreeMap::from([(80, 8080)]),
        ..ServiceConfig::default()
    }
}

/// The service that has every workload.
fn everything() -> ServiceConfig {
    let network = Arc::from("");
    ServiceConfig {
        name: "everything".into(),
        namespace: "shop".into(),
        hostname: "everything.shop".into(),
        vips: vec![NetworkAddress {
            network,
            ip: IpAddr::V4(Ipv4Addr::new(192, 168, 0, 1)),
        }],
        ports: BTreeMap::from([(80, 8080)]),
        ..ServiceConfig::default()
    }
}

fn policies(workloads: usize) -> Vec<Policy> {
    let policy = |name: String, namespace: Arc<str>, scope, action, one: Match| Policy {
        name: name.into(),
        namespace,
        scope,
        action,
        dry_run: false,
        rules: vec![vec![vec![one]]],
    };
    let principal = |text: String| Match {
        principals: vec![StringMatch::Exact(text.into())],
        ..Match::default()
    };
    let deny = Match {
        namespaces: vec![StringMatch::Exact("untrusted".into())],
        ..Match::default()
    };
    let global = PolicyScope::Global;
    let mut all = vec![policy(
        "deny".into(),
        "istio-system".into(),
        global,
        Action::Deny,
        deny,
    )];
    for index in 0..NAMESPACES {
        let mut clients = principal("cluster.local/ns/ns-0/sa/account-1".to_owned());
        let own = format!("cluster.local/ns/ns-{index}/sa/").into();
        clients.principals.push(StringMatch::Prefix(own));
        let wanted = "cluster.local/ns/ns-0/sa/account-0".to_owned();
        clients.principals.push(StringMatch::Exact(wanted.into()));
        let name = format!("clients-{index}");
        let scope = PolicyScope::Namespace;
        all.push(policy(
            name,
            namespace(index),
            scope,
            Action::Allow,
            clients,
        ));
    }
    for index in (99..workloads).step_by(100) {
        let one = principal(format!("cluster.local/ns/ns-1/sa/account-{index}"));
        let (name, scope) = (format!("own-{index}"), PolicyScope::WorkloadSelector);
        all.push(policy(name, namespace(index), scope, Action::Allow, one));
    }
    all
}

/// A snapshot with questions to ask it.
#[derive(Debug)]
pub struct World {
    snapshot: Arc<Snapshot>,
    context: NodeContext,
    client: Arc<Workload>,
    workloads: Vec<Arc<Workload>>,
    vips: Vec<SocketAddr>,
    everything: SocketAddr,
    next: usize,
}

impl World {
    /// Asks a mesh built from `source`.
    ///
    /// # Errors
    /// The model is refused or lacks what was put in.
    pub fn new(source: &Source) -> Result<Self> {
        let snapshot = Arc::new(source.build()?);
        let client = snapshot.workload_by_ip("", pod(0));
        let client = Arc::clone(client.context("the client is missing")?);
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let (workloads, services) = (source.workloads.len(), source.services.len() - 1);
        let pick = |n: usize| Arc::clone(&snapshot.workloads()[n]);
        let chosen = (0..QUESTIONS).map(|_| pick(random.below(workloads)));
        let workloads = chosen.collect();
        let vips = (0..QUESTIONS).map(|_| SocketAddr::new(vip(random.below(services)), 80));
        Ok(Self {
            vips: vips.collect(),
            workloads,
            client,
            everything: SocketAddr::from(([192, 168, 0, 1], 80)),
            context: NodeContext::new("", "node-0"),
            snapshot,
            next: 0,
        })
    }

    fn turn(&mut self) -> usize {
        self.next = (self.next + 1) % QUESTIONS;
        self.next
    }

    /// Where a connection to some service goes.
    ///
    /// # Errors
    /// Nowhere.
    pub fn route(&mut self) -> Result<Route> {
        let turn = self.turn();
        let (dst, seed) = (self.vips[turn], scramble(turn));
        Ok(self
            .snapshot
            .route(&self.context, &self.client, dst, seed)?)
    }

    /// Where a connection to the service that has every workload goes.
    ///
    /// # Errors
    /// Nowhere.
    pub fn balance(&mut self) -> Result<Route> {
        let seed = scramble(self.turn());
        Ok(self
            .snapshot
            .route(&self.context, &self.client, self.everything, seed)?)
    }

    /// Whether the client may reach some workload.
    #[must_use]
    pub fn authorize(&mut self) -> Verdict {
        let turn = self.turn();
        let destination = &self.workloads[turn];
        let address = destination.workload_ips.first().copied();
        let facts = ConnectionFacts {
            identity: Some(self.client.identity_ref()),
            src: pod(0),
            dst: SocketAddr::new(address.unwrap_or_else(|| pod(0)), 8080),
        };
        self.snapshot.authorize(destination, &facts)
    }

    /// Times routing for `duration`, while another thread keeps building new snapshots from
    /// `source` and handing them over if there is one. Returns ns per route of each sample and how
    /// many snapshots arrived.
    ///
    /// # Errors
    /// A route or a snapshot failed.
    pub fn route_while(
        &mut self,
        source: Option<&Source>,
        duration: Duration,
    ) -> Result<(Vec<f64>, u64)> {
        let (mailbox, stop) = (Mutex::new(None::<Arc<Snapshot>>), AtomicBool::new(false));
        let (full, mut arrived) = (AtomicBool::new(false), 0);
        let samples = thread::scope(|scope| {
            let builder = source.map(|source| {
                scope.spawn(|| -> Result<()> {
                    while !stop.load(Ordering::Relaxed) {
                        let snapshot = Arc::new(source.build()?);
                        // The one it replaces, if nobody took it, is freed on this thread.
                        let mut slot = mailbox.lock().unwrap_or_else(PoisonError::into_inner);
                        *slot = Some(snapshot);
                        full.store(true, Ordering::Release);
                    }
                    Ok(())
                })
            });
            let mut samples = Vec::with_capacity(1 << 20);
            let started = Instant::now();
            let result = loop {
                if started.elapsed() >= duration && (source.is_none() || arrived > 0) {
                    break Ok(());
                }
                if full.swap(false, Ordering::AcqRel) {
                    let taken = mailbox
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .take();
                    if let Some(snapshot) = taken {
                        self.snapshot = snapshot;
                        arrived += 1;
                    }
                }
                let start = Instant::now();
                let routed = (0..ROUTES_PER_SAMPLE).try_for_each(|_| self.route().map(drop));
                let ns = start.elapsed().as_nanos() as f64 / ROUTES_PER_SAMPLE as f64;
                if let Err(error) = routed {
                    break Err(error);
                }
                if samples.len() < samples.capacity() {
                    samples.push(ns);
                }
            };
            stop.store(true, Ordering::Relaxed);
            if let Some(builder) = builder {
                builder
                    .join()
                    .map_err(|_| anyhow::anyhow!("the building thread panicked"))??;
            }
            result.map(|()| samples)
        })?;
        Ok((samples, arrived))
    }
}

/// Spreads small numbers over all of u64.
fn scramble(n: usize) -> u64 {
    (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Deterministic pseudo-random numbers (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_question_has_an_answer() {
        for size in [1, 1_000] {
            let source = Source::new(size);
            let mut world = World::new(&source).unwrap();
            assert_eq!(world.snapshot.warnings(), [""; 0]);
            for _ in 0..QUESTIONS {
                assert!(matches!(world.route().unwrap(), Route::Hbone { .. }));
                assert!(matches!(world.balance().unwrap(), Route::Hbone { .. }));
                let verdict = world.authorize();
                assert_eq!(verdict, Verdict::Allow, "{:?}", world.workloads[world.next]);
            }
            let wait = Duration::from_millis(20);
            let (samples, arrived) = world.route_while(Some(&source), wait).unwrap();
            assert!(arrived > 0 && !samples.is_empty());
        }
    }
}
