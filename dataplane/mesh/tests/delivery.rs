//! One verdict, wherever the pod is: random meshes, each connection delivered within its node and
//! from another, by the decisions that proxies take and nothing else.
#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh::{
    Authority, ConnectionFacts, Delivery, Identity, NodeContext, Route, Snapshot, Verdict, Workload,
};
use proptest::prelude::*;
use serde::Deserialize;

const SOURCE: &str = "10.0.0.1";

#[derive(Clone, Copy, Debug)]
struct Pod {
    hbone: bool,
    /// Whether redirection captures it.
    captured: bool,
    /// Whether the configuration knows it.
    configured: bool,
    /// A waypoint, by position; its own position: none.
    waypoint: usize,
    /// Where it takes what tunnels bring, if not where that goes.
    tunnel_port: Option<u16>,
    /// A service of another namespace that lists its address and does not balance.
    passthrough: bool,
}

fn pod() -> impl Strategy<Value = Pod> {
    let tunnel_port = prop::option::weighted(0.2, prop::sample::select(vec![8001, 15006]));
    (
        any::<bool>(),
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.8),
        0_usize..8,
        tunnel_port,
        prop::bool::weighted(0.2),
    )
        .prop_map(
            |(hbone, captured, configured, waypoint, tunnel_port, passthrough)| Pod {
                hbone,
                captured,
                configured,
                waypoint,
                tunnel_port,
                passthrough,
            },
        )
}

fn policy() -> impl Strategy<Value = String> {
    let one = prop::sample::select(vec![
        "principals: [{Exact: cluster.local/ns/default/sa/source}]",
        "principals: [{Exact: cluster.local/ns/default/sa/other}]",
        "notPrincipals: [{Presence: []}]",
        "principals: [{Presence: []}]",
        "namespaces: [{Exact: default}]",
        "sourceIps: [10.0.0.1/32]",
        "sourceIps: [10.0.0.9/32]",
        "destinationPorts: [8001]",
        "destinationPorts: [8002, 15006]",
        "destinationIps: [10.0.1.0/32]",
    ]);
    (one, prop::sample::select(vec!["Allow", "Deny"])).prop_map(|(one, action)| {
        format!("scope: Global, action: {action}, dryRun: false, rules: [[[{{{one}}}]]]")
    })
}

fn address(n: usize) -> IpAddr {
    format!("10.0.1.{n}").parse().unwrap()
}

fn vip(n: usize) -> IpAddr {
    format!("10.96.0.{n}").parse().unwrap()
}

/// A mesh of these pods on `node`, and a source on node `a`.
fn mesh(pods: &[Pod], policies: &[String], node: &str) -> Snapshot {
    let mut workloads = format!(
        "- {{uid: source, name: source, namespace: default, serviceAccount: source, \
         workloadIps: [{SOURCE}], protocol: HBONE, node: a}}\n"
    );
    let mut services = String::new();
    for (n, pod) in pods.iter().enumerate().filter(|(_, pod)| pod.configured) {
        let protocol = if pod.hbone { "HBONE" } else { "TCP" };
        let waypoint = pods.get(pod.waypoint).filter(|_| pod.waypoint != n);
        let waypoint = waypoint.map_or_else(String::new, |_| {
            let port = if pod.waypoint.is_multiple_of(2) {
                15008
            } else {
                15018
            };
            let waypoint = address(pod.waypoint);
            format!(", waypoint: {{destination: \"/{waypoint}\", hboneMtlsPort: {port}}}")
        });
        let tunnel = pod.tunnel_port.map_or_else(String::new, |port| {
            format!(", applicationTunnel: {{protocol: NONE, port: {port}}}")
        });
        workloads += &format!(
            "- {{uid: p{n}, name: p{n}, namespace: default, serviceAccount: p{}, \
             workloadIps: [{}], protocol: {protocol}, node: {node}, \
             services: {{default/s{n}: {{8001: 8002, 8002: 8001}}}}{waypoint}{tunnel}}}\n",
            n % 2,
            address(n)
        );
        services += &format!(
            "- {{name: s{n}, namespace: default, hostname: s{n}, vips: [/{}], \
             ports: {{8001: 8002, 8002: 8001}}}}\n",
            vip(n)
        );
    }
    for (n, _) in pods.iter().enumerate().filter(|(_, pod)| pod.passthrough) {
        services += &format!(
            "- {{name: t{n}, namespace: elsewhere, hostname: t{n}, vips: [/{}], \
             ports: {{8001: 8001}}, loadBalancer: {{mode: Passthrough}}}}\n",
            address(n)
        );
    }
    let policies: String = policies
        .iter()
        .enumerate()
        .map(|(n, policy)| format!("- {{name: q{n}, namespace: istio-system, {policy}}}\n"))
        .collect();
    let list = |name: &str, items: &str| match items {
        "" => format!("{name}: []\n"),
        items => format!("{name}:\n{items}"),
    };
    let yaml = list("workloads", &workloads) + &list("services", &services);
    let yaml = yaml + &list("policies", &policies);
    #[derive(Deserialize)]
    struct Mesh {
        workloads: Vec<mesh::WorkloadConfig>,
        services: Vec<mesh::ServiceConfig>,
        policies: Vec<mesh::Policy>,
    }
    let mesh: Mesh = serde_saphyr::from_str(&yaml).unwrap();
    Snapshot::build(mesh.workloads, mesh.services, mesh.policies).unwrap()
}

/// What a connection comes to.
#[derive(Clone, Debug, PartialEq)]
enum End {
    /// An application at this address, past the pod's policies.
    Pod(SocketAddr),
    /// A host whose connections no proxy looks at; the port of its tunnels, or another.
    Uncaptured(SocketAddr),
    Refused,
}

/// One node's proxy.
struct Proxy<'a> {
    mesh: &'a Snapshot,
    node: NodeContext,
    captured: &'a BTreeSet<IpAddr>,
}

impl Proxy<'_> {
    fn workload(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        let workload = self.mesh.workload_by_ip("", ip)?;
        self.node.is_local(workload).then_some(workload)
    }

    /// A connection in plain text to a captured pod: what port 15006 does, or 15008.
    fn plain(&self, src: IpAddr, dst: SocketAddr) -> End {
        if dst.port() == self.node.hbone_port {
            return End::Refused; // an application without a certificate
        }
        let target = self.mesh.resolve_plain(&self.node, dst);
        self.admit(dst.ip(), target.ok(), None, src)
    }

    /// A tunnel to a captured pod, and the request in it: what port 15008 does.
    fn tunnel(&self, src: IpAddr, identity: &Identity, route: &Route) -> End {
        let Route::Hbone {
            gateway,
            authority,
            expected,
            ..
        } = route
        else {
            panic!("not a tunnel")
        };
        let Some(pod) = self.workload(gateway.ip()) else {
            return End::Refused;
        };
        if gateway.port() != self.node.hbone_port {
            return self.plain(src, *gateway); // the pod terminates it
        }
        if !expected.contains(&pod.identity()) {
            return End::Refused;
        }
        let authority = authority.to_string();
        let target = self
            .mesh
            .resolve_inbound(&self.node, pod, *gateway, &authority);
        self.admit(gateway.ip(), target.ok(), Some(identity), src)
    }

    fn admit(
        &self,
        pod: IpAddr,
        target: Option<SocketAddr>,
        identity: Option<&Identity>,
        src: IpAddr,
    ) -> End {
        let (Some(pod), Some(dst)) = (self.workload(pod), target) else {
            return End::Refused;
        };
        let facts = ConnectionFacts { identity, src, dst };
        match self.mesh.authorize(pod, &facts) {
            Verdict::Allow => End::Pod(dst),
            Verdict::Deny(_) => End::Refused,
        }
    }

    /// The client's side. `far` is the proxy of the node its packets get to, if that is another
    /// one: what is sent to a pod of its own node goes past redirection.
    fn outbound(&self, dst: SocketAddr, tunnels: bool, far: Option<&Proxy<'_>>) -> End {
        let source = self.mesh.workload_by_uid("source").unwrap();
        let (src, identity) = (source.workload_ips[0], source.identity());
        let Ok(route) = self.mesh.route(&self.node, source, dst, 1) else {
            return End::Refused;
        };
        let is_captured = |ip| self.captured.contains(&ip);
        match (route.delivery(is_captured, tunnels), &route) {
            (Delivery::Plain(dst), _) => self.plain(src, dst),
            (Delivery::OneHop(target), Route::Hbone { expected, .. }) => {
                let Some(pod) = self.workload(target.ip()) else {
                    return End::Refused;
                };
                if !expected.contains(&pod.identity()) {
                    return End::Refused;
                }
                let authority = Authority::Address(target).to_string();
                let target = self
                    .mesh
                    .resolve_inbound(&self.node, pod, target, &authority);
                self.admit(pod.workload_ips[0], target.ok(), Some(&identity), src)
            }
            (Delivery::OwnTunnel, route) => self.tunnel(src, &identity, route),
            (Delivery::Network, Route::Passthrough { dst } | Route::Tcp { dst, .. }) => {
                match far.filter(|far| far.captured.contains(&dst.ip())) {
                    Some(far) => far.plain(src, *dst),
                    None => End::Uncaptured(*dst),
                }
            }
            (Delivery::Network, route @ Route::Hbone { gateway, .. }) => {
                match far.filter(|far| far.captured.contains(&gateway.ip())) {
                    Some(far) => far.tunnel(src, &identity, route),
                    None => End::Uncaptured(*gateway),
                }
            }
            (Delivery::OneHop(_), _) => panic!("no tunnel, no hop in its place"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn a_verdict_does_not_depend_on_where_the_pod_is(
        pods in prop::collection::vec(pod(), 1..6),
        policies in prop::collection::vec(policy(), 0..4),
        at in 0_usize..6,
        by_service: bool,
        port in prop::sample::select(vec![8001_u16, 8002, 9000, 15001, 15006, 15008]),
        tunnels: bool,
    ) {
        let at = at % pods.len();
        let dst = SocketAddr::new(if by_service { vip(at) } else { address(at) }, port);
        let captured = pods.iter().enumerate().filter(|(_, pod)| pod.captured);
        let captured: BTreeSet<IpAddr> = captured.map(|(n, _)| address(n)).collect();
        let own: BTreeSet<IpAddr> = [SOURCE.parse().unwrap()].into();
        let both: BTreeSet<IpAddr> = captured.union(&own).copied().collect();
        // All of it on the client's node.
        let near = mesh(&pods, &policies, "a");
        let proxy = Proxy { mesh: &near, node: NodeContext::new("", "a"), captured: &both };
        let same_node = proxy.outbound(dst, tunnels, None);
        // The client alone on its node.
        let far = mesh(&pods, &policies, "b");
        let a = Proxy { mesh: &far, node: NodeContext::new("", "a"), captured: &own };
        let b = Proxy { mesh: &far, node: NodeContext::new("", "b"), captured: &captured };
        let other_node = a.outbound(dst, tunnels, Some(&b));
        prop_assert_eq!(&same_node, &other_node);
        // No captured pod is reached but by its own proxy's leave.
        if let End::Uncaptured(address) = same_node {
            prop_assert!(!captured.contains(&address.ip()), "{address} past its policies");
        }
    }
}
