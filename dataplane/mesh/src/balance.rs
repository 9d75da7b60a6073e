//! Choice among the endpoints of a service.
//!
//! Everything that does not depend on the client is computed when the snapshot is built: for
//! each service port a table of the endpoints that can serve it, in groups that are alike in
//! the properties the routing preferences name. A choice ranks groups (not endpoints), draws a
//! group, then an endpoint: by index where weights are equal, else by binary search. Nothing
//! is allocated.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::endpoint::Endpoint;
use crate::workload::{Workload, WorkloadConfig};

/// How a service's endpoints are chosen.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LoadBalancer {
    /// What an endpoint should share with the client, most important first.
    pub routing_preferences: Vec<Scope>,
    /// What the preferences mean.
    pub mode: LoadBalancerMode,
    /// Which endpoints take part.
    pub health_policy: HealthPolicy,
}

/// Property that client and endpoint may share.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub enum Scope {
    /// Locality region.
    Region,
    /// Locality zone.
    Zone,
    /// Locality subzone.
    Subzone,
    /// Node.
    Node,
    /// Cluster.
    Cluster,
    /// Network.
    Network,
}

/// What routing preferences mean.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub enum LoadBalancerMode {
    /// Nothing: every endpoint takes part.
    #[default]
    Standard,
    /// Only endpoints that match all preferences.
    Strict,
    /// The endpoints that match the most leading preferences.
    Failover,
    /// No choice: connections go to the address the client asked for, in plain TCP.
    Passthrough,
}

/// Which endpoints take part in load balancing.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub enum HealthPolicy {
    /// Healthy ones.
    #[default]
    OnlyHealthy,
    /// All.
    AllowAll,
}

/// A sequence of pseudo-random numbers from one seed (splitmix64).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Draw(u64);

impl Draw {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `bound`, which must not be 0; bias below 2^-32 for bounds up to 2^32.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        debug_assert!(bound > 0, "nothing is below 0");
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        let product = u128::from(mixed) * u128::from(bound);
        (product >> 64) as u64
    }
}

/// An endpoint that can serve a port.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    /// Position in the service's endpoints.
    pub(crate) endpoint: u32,
    /// Port to connect to; 0 keeps the requested one.
    pub(crate) port: u16,
    /// Sum of the weights of its group up to and including this one.
    weight_sum: u64,
}

/// Candidates that every routing preference judges alike.
#[derive(Debug)]
struct Group {
    candidates: Box<[Candidate]>,
    weight: u64,
    /// All weights are the same.
    equal: bool,
    /// A workload of the group, to judge it by.
    member: u32,
}

type Table = Box<[Group]>;

#[derive(Debug, Default)]
pub(crate) struct Balancer {
    mode: LoadBalancerMode,
    preferences: Box<[Scope]>,
    /// Sorted by port.
    by_port: Box<[(u16, Table)]>,
    /// Endpoints whose application tunnel takes any port. Only waypoints are reached by a port
    /// their service does not list.
    any_port: Table,
}

impl Balancer {
    pub(crate) fn new(
        ports: &BTreeMap<u16, u16>,
        load_balancer: Option<&LoadBalancer>,
        endpoints: &[Endpoint],
        workloads: &[WorkloadConfig],
    ) -> Self {
        let (mode, preferences) = load_balancer
            .map(|lb| (lb.mode, &*lb.routing_preferences))
            .unwrap_or_default();
        let ranked = matches!(mode, LoadBalancerMode::Strict | LoadBalancerMode::Failover);
        let preferences = if ranked { preferences } else { &[] };
        let table = |port: Option<(u16, u16)>| {
            build_table(
                endpoints,
                workloads,
                preferences,
                |endpoint, workload| match port {
                    Some((port, target)) => target_port(endpoint, workload, port, target),
                    None => workload.application_tunnel.map(|_| 0),
                },
            )
        };
        Self {
            mode,
            preferences: preferences.into(),
            by_port: ports
                .iter()
                .map(|(p, t)| (*p, table(Some((*p, *t)))))
                .collect(),
            any_port: table(None),
        }
    }

    /// Draws an endpoint for a client that asks for `port`.
    pub(crate) fn pick(
        &self,
        port: u16,
        source: &Workload,
        workloads: &[Arc<Workload>],
        draw: &mut Draw,
    ) -> Option<Candidate> {
        let position = self
            .by_port
            .binary_search_by_key(&port, |(port, _)| *port)
            .ok()?;
        self.draw_from(&self.by_port[position].1, source, workloads, draw)
    }

    /// As `pick`, for a waypoint: its application tunnel may take ports the service does not
    /// list.
    pub(crate) fn pick_waypoint(
        &self,
        port: u16,
        source: &Workload,
        workloads: &[Arc<Workload>],
        draw: &mut Draw,
    ) -> Option<Candidate> {
        self.pick(port, source, workloads, draw)
            .or_else(|| self.draw_from(&self.any_port, source, workloads, draw))
    }

    fn draw_from(
        &self,
        table: &Table,
        source: &Workload,
        workloads: &[Arc<Workload>],
        draw: &mut Draw,
    ) -> Option<Candidate> {
        let [only] = &**table else {
            return self.draw_ranked(table, source, workloads, draw);
        };
        if self.mode == LoadBalancerMode::Strict && !self.admits(only, source, workloads) {
            return None;
        }
        only.draw(draw)
    }

    fn draw_ranked(
        &self,
        table: &Table,
        source: &Workload,
        workloads: &[Arc<Workload>],
        draw: &mut Draw,
    ) -> Option<Candidate> {
        let rank_of =
            |group: &Group| rank(&self.preferences, source, &workloads[group.member as usize]);
        let strict = self.mode == LoadBalancerMode::Strict;
        let (mut best, mut weight) = (0, 0_u64);
        for group in table.iter().filter(|group| group.weight > 0) {
            let (rank, all) = rank_of(group);
            if (strict && !all) || rank < best {
                continue;
            }
            if rank > best {
                (best, weight) = (rank, 0);
            }
            weight += group.weight;
        }
        if weight == 0 {
            return None;
        }
        let mut drawn = draw.below(weight);
        for group in table.iter().filter(|group| group.weight > 0) {
            let (rank, all) = rank_of(group);
            if rank != best || (strict && !all) {
                continue;
            }
            if drawn < group.weight {
                return group.draw(draw);
            }
            drawn -= group.weight;
        }
        None
    }

    fn admits(&self, group: &Group, source: &Workload, workloads: &[Arc<Workload>]) -> bool {
        rank(&self.preferences, source, &workloads[group.member as usize]).1
    }
}

impl Group {
    fn draw(&self, draw: &mut Draw) -> Option<Candidate> {
        if self.weight == 0 {
            return None;
        }
        let position = if self.equal {
            usize::try_from(draw.below(self.candidates.len() as u64)).ok()?
        } else {
            let drawn = draw.below(self.weight);
            self.candidates
                .partition_point(|candidate| candidate.weight_sum <= drawn)
        };
        self.candidates.get(position).copied()
    }
}

/// The port an endpoint serves `port` on: its own mapping, else the service's target, else the
/// requested port if an application tunnel takes it.
fn target_port(
    endpoint: &Endpoint,
    workload: &WorkloadConfig,
    port: u16,
    target: u16,
) -> Option<u16> {
    let own = endpoint.ports.get(&port).copied();
    own.filter(|own| *own != 0)
        .or_else(|| (target != 0).then_some(target))
        .or_else(|| workload.application_tunnel.map(|_| port))
}

fn build_table(
    endpoints: &[Endpoint],
    workloads: &[WorkloadConfig],
    preferences: &[Scope],
    port_of: impl Fn(&Endpoint, &WorkloadConfig) -> Option<u16>,
) -> Table {
    let mut groups: BTreeMap<Vec<&str>, Vec<(u32, u16, u32)>> = BTreeMap::new();
    for (position, endpoint) in (0_u32..).zip(endpoints) {
        let workload = &workloads[endpoint.workload as usize];
        let has_place = endpoint.ipv4.is_some()
            || endpoint.ipv6.is_some()
            || !workload.hostname.is_empty()
            || workload.network_gateway.is_some();
        let takes_part = endpoint.eligible && has_place;
        let Some(port) = port_of(endpoint, workload).filter(|_| takes_part) else {
            continue;
        };
        let key = preferences.iter().map(|scope| scope.of(workload)).collect();
        groups
            .entry(key)
            .or_default()
            .push((position, port, workload.capacity));
    }
    let group = |members: Vec<(u32, u16, u32)>| {
        let first = members[0];
        let mut weight = 0;
        let equal = members.iter().all(|(_, _, capacity)| *capacity == first.2);
        let candidates = members.into_iter().map(|(endpoint, port, capacity)| {
            weight += u64::from(capacity);
            Candidate {
                endpoint,
                port,
                weight_sum: weight,
            }
        });
        let candidates: Box<[_]> = candidates.collect();
        Group {
            candidates,
            weight,
            equal,
            member: endpoints[first.0 as usize].workload,
        }
    };
    groups.into_values().map(group).collect()
}

/// How well a workload matches the preferences: the number of leading ones that match, and
/// whether all do. A leading `Network` outranks all others together, and its mismatch does not
/// end the comparison, so that endpoints elsewhere are still ranked among themselves.
fn rank(preferences: &[Scope], source: &WorkloadConfig, other: &WorkloadConfig) -> (usize, bool) {
    let mut rank = 0;
    let mut all = true;
    for (position, scope) in preferences.iter().enumerate() {
        let matches = scope.of(source) == scope.of(other);
        all &= matches;
        match (matches, position == 0 && *scope == Scope::Network) {
            (true, true) => rank += preferences.len(),
            (true, false) => rank += 1,
            (false, true) => {}
            (false, false) => break,
        }
    }
    (rank, all)
}

impl Scope {
    fn of(self, workload: &WorkloadConfig) -> &str {
        match self {
            Self::Region => &workload.locality.region,
            Self::Zone => &workload.locality.zone,
            Self::Subzone => &workload.locality.subzone,
            Self::Node => &workload.node,
            Self::Cluster => &workload.cluster_id,
            Self::Network => &workload.network,
        }
    }
}
