//! Many small pods: what it takes to enrol them is measured.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use redirect::Pod;

use super::Topology;

/// Pods in network namespaces of their own, each with a veth on the node; removed when dropped.
#[derive(Debug)]
pub(crate) struct ManyPods {
    pub(crate) pods: Vec<Pod>,
    names: Vec<String>,
}

impl ManyPods {
    /// Adds `count` pods with addresses from 10.245.0.0, of which nothing listens and no route on
    /// the node knows.
    pub(crate) fn add(topology: &Topology, count: u32) -> Self {
        let names: Vec<_> = (0..count)
            .map(|number| topology.name(&format!("m{number}")))
            .collect();
        let many = Self {
            pods: (0..count)
                .zip(&names)
                .map(|(number, name)| pod(number, name))
                .collect(),
            names,
        };
        let node = topology.name("node");
        let (mut namespaces, mut links) = (String::new(), String::new());
        for (name, pod) in many.names.iter().zip(&many.pods) {
            let link = &pod.host_interface;
            let _ = writeln!(namespaces, "netns add {name}");
            let _ = writeln!(
                links,
                "link add {link} netns {node} type veth peer name eth0 netns {name}"
            );
        }
        batch(&namespaces);
        batch(&links);
        many
    }
}

impl Drop for ManyPods {
    fn drop(&mut self) {
        let lines = self.names.iter().map(|name| format!("netns del {name}\n"));
        batch(&lines.collect::<String>());
    }
}

fn pod(number: u32, name: &str) -> Pod {
    let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 245, 0, 0)) + number);
    Pod {
        uid: format!("many-{number}"),
        namespace: "default".into(),
        name: format!("many-{number}"),
        service_account: "default".into(),
        addresses: vec![address.into()],
        netns: PathBuf::from("/run/netns").join(name),
        host_interface: format!("vm{number}"),
    }
}

/// One process for all lines. What fails is shown by what is missing afterwards.
fn batch(lines: &str) {
    let mut child = Command::new("ip")
        .args(["-force", "-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(lines.as_bytes())
        .unwrap();
    child.wait().unwrap();
}
