//! The node agent's part: its configuration for a node of this lab, starting and removing it.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::kinds::Redirect;
use crate::mesh_file::NAMESPACE;
use crate::network::namespace::HostCommand;
use crate::network::{has_ipv6, netns_path};
use crate::state::{State, directory};
use crate::topology::{Host, Node, OUTSIDE_INTERFACE, Role, UNDERLAY_INTERFACE};

/// How long installing a redirection may take.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// What the agent prints once redirection is installed.
const READY_LINE: &str = "node-agent: ready";

/// Where the lab mounts its BPF file system.
pub(crate) fn bpffs(lab: &str) -> PathBuf {
    directory(lab).join("bpffs")
}

/// The pinned map that ztunnel on `node` puts its listeners into.
pub(crate) fn listener_map(lab: &str, node: Node) -> PathBuf {
    bpffs(lab).join(node.name()).join("listeners")
}

/// The agent's configuration file on `node`.
pub(crate) fn config_path(lab: &str, node: Node) -> PathBuf {
    directory(lab).join(format!("{}-agent.yaml", node.name()))
}

/// The agent's log on `node`.
pub(crate) fn log_path(lab: &str, node: Node) -> PathBuf {
    directory(lab).join(format!("{}-agent.log", node.name()))
}

/// The table of pods that the agent on `node` keeps for ztunnel.
pub(crate) fn pod_table(lab: &str, node: Node) -> PathBuf {
    redirect::pod_table::path(&directory(lab).join(node.name()))
}

/// Writes the agent's configuration for `node`. JSON is YAML.
pub(crate) fn write_config(state: &State, node: Node) -> Result<()> {
    let path = config_path(&state.name, node);
    let text = format!("{:#}\n", config(state, node));
    fs::write(&path, text).map_err(Error::io("writing", path))?;
    let work = directory(&state.name).join(node.name());
    fs::create_dir_all(&work).map_err(Error::io("creating", work))?;
    if state.redirect == Redirect::Ebpf {
        let pins = bpffs(&state.name).join(node.name());
        fs::create_dir_all(&pins).map_err(Error::io("creating", pins))?;
    }
    Ok(())
}

fn config(state: &State, node: Node) -> Value {
    let lab = &state.name;
    let ztunnel = node.ztunnel();
    let ipv6 = has_ipv6();
    let addresses = |host: Host| {
        let v6 = ipv6.then(|| IpAddr::from(host.address_v6()));
        [host.address()].into_iter().chain(v6).collect::<Vec<_>>()
    };
    let mut cidrs = Node::ALL.map(Node::pod_cidr).to_vec();
    if ipv6 {
        cidrs.extend(Node::ALL.map(Node::pod_cidr_v6));
    }
    let pods: Vec<Value> = node
        .pods()
        .filter(|pod| pod.role() == Role::MeshPod)
        .map(|pod| {
            json!({
                "uid": pod.name(),
                "namespace": NAMESPACE,
                "name": pod.name(),
                "service_account": pod.name(),
                "addresses": addresses(pod),
                "netns": netns_path(lab, pod),
                "host_interface": pod.host_interface(),
            })
        })
        .collect();
    json!({
        "redirect": state.redirect.name(),
        "variant": state.variant.name(),
        "node": {
            "interfaces": [UNDERLAY_INTERFACE, OUTSIDE_INTERFACE],
            "address": node.gateway(),
            "pod_cidrs": cidrs,
        },
        "ztunnel": {
            "netns": netns_path(lab, ztunnel),
            "interface": "eth0",
            "host_interface": ztunnel.host_interface(),
            "address": ztunnel.address(),
            "address_v6": ipv6.then(|| ztunnel.address_v6()),
        },
        "state_dir": directory(lab).join(node.name()),
        "bpffs": bpffs(lab).join(node.name()),
        // A lab is where a kernel that the agent refuses is measured.
        "sockmap": if state.sockmap { "force" } else { "off" },
        "pods": pods,
    })
}

/// Starts the agent on `node`. The caller records the process before waiting.
pub(crate) fn start(state: &State, binary: &Path, node: Node) -> Result<Daemon> {
    let mut command = HostCommand::new(netns_path(&state.name, node.host()), binary);
    command
        .args(["run", "--config"])
        .arg(config_path(&state.name, node));
    Daemon::start(
        "node-agent",
        node.host(),
        command,
        log_path(&state.name, node),
    )
}

/// Waits until redirection is installed.
pub(crate) fn wait_ready(daemon: &mut Daemon) -> Result<()> {
    daemon.wait_ready(READY_LIMIT, |daemon| daemon.has_written(READY_LINE))
}

/// The tunnel driver the agent on `node` reports, if it uses one.
pub(crate) fn tunnel_driver(state: &State, binary: &Path, node: Node) -> Result<Option<String>> {
    let host = node.host();
    let failed = |detail| Error::Command {
        what: format!("node-agent status on {host}"),
        detail,
    };
    let output = HostCommand::new(netns_path(&state.name, host), binary)
        .args(["status", "--json", "--config"])
        .arg(config_path(&state.name, node))
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(failed(
            text.lines().last().unwrap_or("no message").to_owned(),
        ));
    }
    let status: Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| failed(format!("its answer is not JSON: {error}")))?;
    Ok(status
        .get("tunnel_driver")
        .and_then(Value::as_str)
        .map(str::to_owned))
}

/// Has the agent remove its redirection from `host`'s node. Best effort: what it leaves goes with
/// the namespaces and the BPF file system.
pub(crate) fn cleanup(lab: &str, binary: &Path, node: Node) {
    let host: Host = node.host();
    let _ = HostCommand::new(netns_path(lab, host), binary)
        .args(["cleanup", "--config"])
        .arg(config_path(lab, node))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mesh_pods_are_enrolled() {
        let state = State::example(crate::kinds::ProxyKind::Shared);
        let config = config(&state, Node::B);
        let uids: Vec<_> = config["pods"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| &p["uid"])
            .collect();
        assert_eq!(uids, ["server-b"]);
        assert_eq!(config["redirect"], "tunnel");
        assert_eq!(config["ztunnel"]["netns"], "/run/netns/x-ztunnel-b");
        assert_eq!(config["node"]["address"], "10.244.2.1");
    }
}
