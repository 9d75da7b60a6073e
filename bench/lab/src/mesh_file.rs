//! The default mesh file: what the control plane would tell the ztunnels about this lab, in the
//! format of upstream's `LOCAL_XDS_PATH`, with upstream's keys only.

use std::fmt::Write as _;

use crate::topology::{Host, Role};

/// Ports of the services in front of the servers: (service port, target port). 80 differs from
/// its target on purpose, so that port mapping is exercised.
pub(crate) const PORTS: &[(u16, u16)] = &[(80, 8080), (8080, 8080), (9000, 9000), (6379, 6379)];

/// Kubernetes namespace of all pods of the lab.
pub(crate) const NAMESPACE: &str = "default";

/// Trust domain of every identity in the lab.
pub(crate) const TRUST_DOMAIN: &str = "cluster.local";

/// The default mesh as YAML: what a lab gets without `--config`.
#[must_use]
pub fn default_mesh() -> String {
    let mut text = String::from("# Written by `lab up`. Pass your own with `lab up --config`.\n");
    text.push_str("workloads:\n");
    for host in Host::ALL {
        workload(&mut text, host);
    }
    text.push_str("services:\n");
    for host in Host::ALL {
        service(&mut text, host);
    }
    text.push_str("policies: []\n");
    text
}

/// The `host` part of a service's name in the mesh.
fn hostname(host: Host) -> String {
    format!("{host}.{NAMESPACE}.svc.cluster.local")
}

fn ports() -> String {
    let pairs: Vec<_> = PORTS
        .iter()
        .map(|(port, target)| format!("{port}: {target}"))
        .collect();
    format!("{{{}}}", pairs.join(", "))
}

/// A workload's addresses. Both: with IPv6 off nobody uses the second.
fn addresses(host: Host) -> String {
    format!("\"{}\", \"{}\"", host.address(), host.address_v6())
}

fn workload(text: &mut String, host: Host) {
    let protocol = match host.role() {
        Role::MeshPod | Role::Waypoint => "HBONE",
        Role::PlainPod => "TCP",
        // Nodes, ztunnels and what is outside are no workloads: what they send is passed through.
        Role::Node | Role::Ztunnel | Role::Outside => return,
    };
    let services = match host.service_address() {
        Some(_) => format!("{{\"{NAMESPACE}/{}\": {}}}", hostname(host), ports()),
        None => "{}".to_owned(),
    };
    let (addresses, node) = (addresses(host), host.node().name());
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        "- uid: Kubernetes//v1/Pod/{NAMESPACE}/{host}\n  \
           name: {host}\n  \
           namespace: {NAMESPACE}\n  \
           serviceAccount: {host}\n  \
           trustDomain: {TRUST_DOMAIN}\n  \
           workloadIps: [{addresses}]\n  \
           protocol: {protocol}\n  \
           network: \"\"\n  \
           node: {node}\n  \
           workloadName: {host}\n  \
           workloadType: pod\n  \
           canonicalName: {host}\n  \
           canonicalRevision: v1\n  \
           clusterId: Kubernetes\n  \
           status: Healthy\n  \
           services: {services}\n"
    );
}

fn service(text: &mut String, host: Host) {
    let (Some(address), Some(address_v6)) = (host.service_address(), host.service_address_v6())
    else {
        return;
    };
    let _ = write!(
        text,
        "- name: {host}\n  \
           namespace: {NAMESPACE}\n  \
           hostname: {}\n  \
           vips: [\"/{address}\", \"/{address_v6}\"]\n  \
           ports: {}\n  \
           canonical: true\n",
        hostname(host),
        ports()
    );
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Mesh {
        workloads: Vec<Workload>,
        services: Vec<Service>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Workload {
        name: String,
        node: String,
        protocol: String,
        workload_ips: Vec<String>,
        services: BTreeMap<String, BTreeMap<u16, u16>>,
    }

    #[derive(Deserialize)]
    struct Service {
        vips: Vec<String>,
        ports: BTreeMap<u16, u16>,
    }

    #[test]
    fn the_default_mesh_is_yaml_with_every_pod_once() {
        let mesh: Mesh = serde_saphyr::from_str(&default_mesh()).unwrap();
        let names: Vec<_> = mesh.workloads.iter().map(|w| w.name.as_str()).collect();
        assert_eq!(
            names,
            ["client-a", "server-a", "server-b", "plain-b", "waypoint-b"]
        );
        for workload in &mesh.workloads {
            let host: Host = workload.name.parse().unwrap();
            let both = [host.address().to_string(), host.address_v6().to_string()];
            assert_eq!(workload.workload_ips, both);
            assert_eq!(workload.node, host.node().name());
            assert_eq!(workload.protocol == "TCP", host == Host::PlainB);
        }
        assert_eq!(mesh.services.len(), 2);
        assert_eq!(mesh.services[1].vips, ["/10.96.0.12", "/fd00:96::12"]);
        assert_eq!(mesh.services[1].ports[&80], 8080);
        assert_eq!(
            mesh.workloads[2].services["default/server-b.default.svc.cluster.local"][&80],
            8080
        );
    }
}
