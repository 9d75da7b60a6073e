//! Choice of endpoints: health, weights, locality.
#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

mod support;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use mesh::address::NamespacedHostname;
use mesh::service::{HealthPolicy, LoadBalancer, LoadBalancerMode, Scope};
use mesh::{HealthStatus, Locality, Route, ServiceConfig, Snapshot, WorkloadConfig};
use proptest::prelude::*;
use support::{addr, node};

fn key() -> NamespacedHostname {
    "n/s.example".parse().unwrap()
}

fn client() -> WorkloadConfig {
    WorkloadConfig {
        uid: "client".into(),
        name: "client".into(),
        namespace: "n".into(),
        node: "n0".into(),
        cluster_id: "c0".into(),
        locality: locality("r0", "z0", "s0"),
        workload_ips: vec![[10, 1, 0, 1].into()],
        ..WorkloadConfig::default()
    }
}

fn locality(region: &str, zone: &str, subzone: &str) -> Locality {
    Locality {
        region: region.into(),
        zone: zone.into(),
        subzone: subzone.into(),
    }
}

fn endpoint(number: usize) -> WorkloadConfig {
    let ip = std::net::Ipv4Addr::from(0x0a00_0000 + u32::try_from(number).unwrap());
    WorkloadConfig {
        uid: format!("e{number}").into(),
        name: format!("e{number}").into(),
        workload_ips: vec![IpAddr::V4(ip)],
        services: BTreeMap::from([(key(), BTreeMap::from([(80, 8080)]))]),
        ..client()
    }
}

fn mesh(endpoints: Vec<WorkloadConfig>, load_balancer: Option<LoadBalancer>) -> Snapshot {
    let service = ServiceConfig {
        name: "s".into(),
        namespace: "n".into(),
        hostname: "s.example".into(),
        vips: vec!["/10.96.0.1".parse().unwrap()],
        ports: BTreeMap::from([(80, 80)]),
        load_balancer,
        ..ServiceConfig::default()
    };
    let mut workloads = vec![client()];
    workloads.extend(endpoints);
    Snapshot::build(workloads, vec![service], vec![]).unwrap()
}

/// The endpoint chosen for a seed, none if there is no healthy upstream.
fn chosen(mesh: &Snapshot, seed: u64) -> Option<Arc<str>> {
    let source = mesh.workload_by_uid("client").unwrap();
    match mesh.route(&node(), source, addr("10.96.0.1:80"), seed) {
        Ok(Route::Tcp { dst, workload, .. }) => {
            assert!(workload.workload_ips.contains(&dst.ip()));
            assert_eq!(dst.port(), 8080);
            Some(workload.uid.clone())
        }
        Err(mesh::RouteError::NoHealthyUpstream { .. }) => None,
        other => panic!("{other:?}"),
    }
}

fn counts(mesh: &Snapshot, draws: u64) -> HashMap<Arc<str>, u64> {
    let mut counts = HashMap::new();
    for seed in 0..draws {
        *counts.entry(chosen(mesh, seed).unwrap()).or_default() += 1;
    }
    counts
}

fn failover(scopes: &[Scope], mode: LoadBalancerMode) -> Option<LoadBalancer> {
    let routing_preferences = scopes.to_vec();
    Some(LoadBalancer {
        routing_preferences,
        mode,
        health_policy: HealthPolicy::OnlyHealthy,
    })
}

#[test]
fn equal_weights_are_equally_likely() {
    let mesh = mesh((0..10).map(endpoint).collect(), None);
    for (uid, count) in counts(&mesh, 10_000) {
        assert!((850..1_150).contains(&count), "{uid}: {count}");
    }
}

#[test]
fn consecutive_and_sparse_seeds_spread_alike() {
    let mesh = mesh((0..4).map(endpoint).collect(), None);
    for shift in [0, 16, 32, 48] {
        let seen: BTreeSet<_> = (0..64)
            .map(|seed: u64| chosen(&mesh, seed << shift))
            .collect();
        assert_eq!(seen.len(), 4, "seeds shifted by {shift}");
    }
}

#[test]
fn capacities_are_weights() {
    let mut endpoints: Vec<_> = (0..3).map(endpoint).collect();
    for (workload, capacity) in endpoints.iter_mut().zip([1, 3, 0]) {
        workload.capacity = capacity;
    }
    let counts = counts(&mesh(endpoints, None), 10_000);
    assert_eq!(counts.len(), 2, "{counts:?}");
    assert!((2_300..2_700).contains(&counts["e0"]), "{counts:?}");
    assert!((7_300..7_700).contains(&counts["e1"]), "{counts:?}");
}

#[test]
fn capacities_may_be_huge() {
    let mut endpoints: Vec<_> = (0..3).map(endpoint).collect();
    endpoints
        .iter_mut()
        .for_each(|workload| workload.capacity = u32::MAX);
    endpoints[0].capacity = 1;
    let counts = counts(&mesh(endpoints, None), 2_000);
    assert!(!counts.contains_key("e0"), "{counts:?}");
}

#[test]
fn no_capacity_is_no_upstream() {
    let mut endpoints: Vec<_> = (0..2).map(endpoint).collect();
    endpoints
        .iter_mut()
        .for_each(|workload| workload.capacity = 0);
    for mode in [LoadBalancerMode::Standard, LoadBalancerMode::Failover] {
        let mesh = mesh(endpoints.clone(), failover(&[Scope::Node], mode));
        assert_eq!(chosen(&mesh, 1), None, "{mode:?}");
    }
}

#[test]
fn unhealthy_endpoints_need_permission() {
    let mut endpoints: Vec<_> = (0..2).map(endpoint).collect();
    endpoints[1].status = HealthStatus::Unhealthy;
    let only_healthy = counts(&mesh(endpoints.clone(), None), 100);
    assert_eq!(
        only_healthy.keys().map(|uid| &**uid).collect::<Vec<_>>(),
        ["e0"]
    );
    let all = LoadBalancer {
        health_policy: HealthPolicy::AllowAll,
        ..LoadBalancer::default()
    };
    assert_eq!(counts(&mesh(endpoints, Some(all)), 100).len(), 2);
}

/// Endpoints that share more and more with the client.
fn places() -> Vec<WorkloadConfig> {
    let mut all: Vec<_> = (0..5).map(endpoint).collect();
    all[0].locality = locality("r1", "z0", "s0");
    all[1].locality = locality("r0", "z1", "s0");
    all[2].locality = locality("r0", "z0", "s1");
    all[3].locality = locality("r0", "z0", "s0");
    all[3].node = "n1".into();
    all
}

#[test]
fn failover_prefers_the_longest_match() {
    use Scope::{Node, Region, Subzone, Zone};
    let preferences = [Region, Zone, Subzone, Node];
    let mut remaining = places();
    for expected in ["e4", "e3", "e2", "e1", "e0"] {
        let mesh = mesh(
            remaining.clone(),
            failover(&preferences, LoadBalancerMode::Failover),
        );
        let counts = counts(&mesh, 50);
        assert_eq!(
            counts.keys().map(|uid| &**uid).collect::<Vec<_>>(),
            [expected]
        );
        remaining.pop();
    }
}

#[test]
fn failover_ends_at_the_first_mismatch() {
    // e0 shares zone and subzone, but not the region that comes first: no better than e1,
    // which shares nothing.
    let mut two = vec![places().swap_remove(0), endpoint(1)];
    two[1].locality = locality("r2", "z2", "s2");
    let preferences = [Scope::Region, Scope::Zone, Scope::Subzone];
    let mesh = mesh(two, failover(&preferences, LoadBalancerMode::Failover));
    assert_eq!(counts(&mesh, 100).len(), 2);
}

#[test]
fn endpoints_without_weight_do_not_hold_the_best_place() {
    let mut all = places();
    all[4].capacity = 0;
    let preferences = [Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node];
    let mesh = mesh(all, failover(&preferences, LoadBalancerMode::Failover));
    assert_eq!(chosen(&mesh, 9).as_deref(), Some("e3"));
}

#[test]
fn strict_needs_all_preferences() {
    let preferences = [Scope::Region, Scope::Zone];
    let strict = failover(&preferences, LoadBalancerMode::Strict);
    let all = counts(&mesh(places(), strict.clone()), 200);
    let mut names: Vec<_> = all.keys().map(|uid| &**uid).collect();
    names.sort_unstable();
    assert_eq!(names, ["e2", "e3", "e4"]);
    assert_eq!(
        chosen(&mesh(places().drain(..2).collect(), strict.clone()), 3),
        None
    );
    assert_eq!(
        chosen(&mesh(places().drain(..1).collect(), strict), 3),
        None
    );
}

#[test]
fn standard_ignores_preferences() {
    let preferences = failover(&[Scope::Region, Scope::Node], LoadBalancerMode::Standard);
    assert_eq!(counts(&mesh(places(), preferences), 500).len(), 5);
}

#[test]
fn the_network_outranks_everything_else() {
    let mut two: Vec<_> = (0..2).map(endpoint).collect();
    // e0 is on our network but nowhere near; e1 is as near as can be on another network.
    two[0].locality = locality("r9", "z9", "s9");
    two[0].node = "n9".into();
    two[1].network = "remote".into();
    let preferences = [Scope::Network, Scope::Region, Scope::Zone, Scope::Node];
    let mesh = mesh(two, failover(&preferences, LoadBalancerMode::Failover));
    assert_eq!(
        counts(&mesh, 100)
            .keys()
            .map(|uid| &**uid)
            .collect::<Vec<_>>(),
        ["e0"]
    );
}

#[derive(Clone, Debug)]
struct Spot {
    healthy: bool,
    capacity: u32,
    region: u8,
    zone: u8,
    node: u8,
}

fn spot() -> impl Strategy<Value = Spot> {
    (any::<bool>(), 0_u32..4, 0_u8..2, 0_u8..2, 0_u8..2).prop_map(
        |(healthy, capacity, region, zone, node)| Spot {
            healthy,
            capacity,
            region,
            zone,
            node,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever the mode: never an unhealthy endpoint, never one without weight, never one
    /// that another outranks, and all that qualify are reached.
    #[test]
    fn only_those_that_qualify_and_all_of_them(
        spots in prop::collection::vec(spot(), 0..6),
        mode in prop::sample::select(vec![
            LoadBalancerMode::Standard, LoadBalancerMode::Strict, LoadBalancerMode::Failover,
        ]),
        depth in 0_usize..4,
    ) {
        let scopes = &[Scope::Region, Scope::Zone, Scope::Node][..depth];
        let endpoints = spots.iter().enumerate().map(|(n, spot)| WorkloadConfig {
            status: if spot.healthy { HealthStatus::Healthy } else { HealthStatus::Unhealthy },
            capacity: spot.capacity,
            locality: locality(&format!("r{}", spot.region), &format!("z{}", spot.zone), "s0"),
            node: format!("n{}", spot.node).into(),
            ..endpoint(n)
        });
        let mesh = mesh(endpoints.collect(), failover(scopes, mode));
        let rank = |spot: &Spot| {
            let shared = [spot.region == 0, spot.zone == 0, spot.node == 0];
            shared[..depth].iter().take_while(|same| **same).count()
        };
        let usable: Vec<_> = spots
            .iter()
            .enumerate()
            .filter(|(_, spot)| spot.healthy && spot.capacity > 0)
            .collect();
        let best = usable.iter().map(|(_, spot)| rank(spot)).max().unwrap_or(0);
        let qualify: BTreeSet<String> = usable
            .iter()
            .filter(|(_, spot)| match mode {
                LoadBalancerMode::Strict => rank(spot) == depth,
                LoadBalancerMode::Failover => rank(spot) == best,
                _ => true,
            })
            .map(|(n, _)| format!("e{n}"))
            .collect();
        let seen: BTreeSet<String> =
            (0..400).filter_map(|seed| chosen(&mesh, seed)).map(|uid| uid.to_string()).collect();
        prop_assert_eq!(seen, qualify);
    }

    #[test]
    fn weights_are_respected(capacities in prop::collection::vec(1_u32..6, 2..6), seed: u64) {
        let endpoints = capacities.iter().enumerate().map(|(n, capacity)| WorkloadConfig {
            capacity: *capacity,
            ..endpoint(n)
        });
        let mesh = mesh(endpoints.collect(), None);
        let draws = 4_000_u64;
        let mut seen = vec![0_u64; capacities.len()];
        for n in 0..draws {
            let uid = chosen(&mesh, seed.wrapping_add(n)).unwrap();
            seen[uid[1..].parse::<usize>().unwrap()] += 1;
        }
        let total: u32 = capacities.iter().sum();
        for (capacity, seen) in capacities.iter().zip(seen) {
            let share = f64::from(*capacity) / f64::from(total);
            let expected = share * draws as f64;
            // Six standard deviations of a binomial distribution.
            let slack = 6.0 * (draws as f64 * share * (1.0 - share)).sqrt();
            prop_assert!((seen as f64 - expected).abs() < slack, "{seen} of {expected}");
        }
    }
}
