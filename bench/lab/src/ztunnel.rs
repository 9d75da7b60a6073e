//! The part of ztunnel and of what may stand in its place: environment, starting, readiness,
//! stopping.

use std::env;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use mesh::ports;

use crate::agent::{listener_map, pod_table};
use crate::daemon::{Daemon, last_words};
use crate::error::{Error, Result};
use crate::http::http_get;
use crate::kinds::{ProxyKind, Redirect};
use crate::network::namespace::{HostCommand, in_namespace};
use crate::network::netns_path;
use crate::peers;
use crate::process::Process;
use crate::state::{State, ca_paths, directory, mesh_path};
use crate::topology::{Host, Node};

/// How long a ztunnel may take to become ready.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// How long a ztunnel may drain after SIGTERM. Its own default deadline is 5 s.
const DRAIN_LIMIT: Duration = Duration::from_secs(8);

/// How long the kernel may take to close a dead ztunnel's listeners: an io_uring holds them until
/// it is torn down.
const PORTS_LIMIT: Duration = Duration::from_secs(5);

const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// The log of `node`'s ztunnel.
pub(crate) fn log_path(lab: &str, node: Node) -> PathBuf {
    directory(lab).join(format!("{}.log", node.ztunnel()))
}

/// Starts what stands in ztunnel's place on `node`. The caller records the process before waiting.
/// Variables of the caller's environment that are not set here reach it too, so that one can tune
/// it.
pub(crate) fn start(state: &State, binary: &Path, node: Node) -> Result<Daemon> {
    let host = node.ztunnel();
    let mut command = match state.proxy {
        ProxyKind::Shared => shared(state, binary, node),
        ProxyKind::Dedicated => dedicated(state, binary, node),
        ProxyKind::Listener => listener(state, binary, node),
        _ => peers::command(state, binary, node)?,
    };
    if env::var_os("RUST_LOG").is_none() {
        command.env("RUST_LOG", "info");
    }
    Daemon::start("ztunnel", host, command, log_path(&state.name, node))
}

/// A ztunnel as this project's: all pods of the node, known by their addresses.
fn shared(state: &State, binary: &Path, node: Node) -> HostCommand {
    let mut command = HostCommand::new(netns_path(&state.name, node.ztunnel()), binary);
    let (certificate, key) = ca_paths(&state.name);
    command
        .env("LOCAL_XDS_PATH", mesh_path(&state.name))
        .env("LOCAL_CA_CERT", certificate)
        .env("LOCAL_CA_KEY", key)
        .env("REDIRECT_MODE", "node")
        .env("NODE_NAME", node.name())
        .env("XDS_ADDRESS", "")
        .env("CA_ADDRESS", "")
        .env("ZTUNNEL_POD_TABLE", pod_table(&state.name, node))
        .env("SOCKMAP", if state.sockmap { "on" } else { "off" });
    if state.redirect == Redirect::Ebpf {
        command.env("ZTUNNEL_LISTENER_MAP", listener_map(&state.name, node));
    }
    command
}

/// Any ztunnel, with upstream's environment for a single workload and nothing else.
fn dedicated(state: &State, binary: &Path, node: Node) -> HostCommand {
    let pod = peers::main_pod(node);
    let mut command = HostCommand::new(netns_path(&state.name, node.ztunnel()), binary);
    command
        .env("PROXY_MODE", "dedicated")
        .env("PROXY_WORKLOAD_INFO", format!("default/{pod}/{pod}"))
        .env("FAKE_CA", "true")
        .env("XDS_ADDRESS", "")
        .env("LOCAL_XDS_PATH", mesh_path(&state.name))
        .env("ENABLE_ORIG_SRC", "true")
        .env("NODE_NAME", node.name());
    command
}

/// The lab's own [`crate::listener`].
fn listener(state: &State, binary: &Path, node: Node) -> HostCommand {
    let mut command = HostCommand::new(netns_path(&state.name, node.ztunnel()), binary);
    command.arg("answer");
    if state.redirect == Redirect::Ebpf {
        command
            .arg("--listener-map")
            .arg(listener_map(&state.name, node));
    }
    command
}

/// Waits until the ztunnel on `node` says that it is ready.
pub(crate) fn wait_ready(state: &State, daemon: &mut Daemon, node: Node) -> Result<()> {
    daemon.wait_ready(READY_LIMIT, |_| is_ready(&state.name, node.ztunnel()))
}

/// Waits until connections come to the ztunnel, whose ports may still be another one's.
pub(crate) fn wait_serving(state: &State, daemon: &mut Daemon) -> Result<()> {
    let said = match state.redirect {
        Redirect::Ebpf => "listeners registered in",
        _ => "workers on CPUs",
    };
    daemon.wait_ready(READY_LIMIT, |daemon| daemon.has_mentioned(said))
}

/// Ends `process`, whose ports another ztunnel has taken over.
pub(crate) fn end(process: &Process) -> Result<()> {
    process.stop(DRAIN_LIMIT)
}

/// Waits until a ztunnel that was started earlier says that it is ready.
pub(crate) fn wait_answering(state: &State, node: Node) -> Result<()> {
    let host = node.ztunnel();
    let deadline = Instant::now() + READY_LIMIT;
    while !is_ready(&state.name, host) {
        if Instant::now() >= deadline {
            return Err(Error::NotReady {
                program: "ztunnel".to_owned(),
                host: host.name().to_owned(),
                how: format!("was not ready after {} s", READY_LIMIT.as_secs()),
                log: last_words(&log_path(&state.name, node)),
            });
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Whether `host`'s ztunnel answers its readiness probe with 200.
pub(crate) fn is_ready(lab: &str, host: Host) -> bool {
    let server = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::READINESS));
    let answer = http_get(
        &netns_path(lab, host),
        server,
        "/healthz/ready",
        PROBE_TIMEOUT,
    );
    matches!(answer, Ok((200, _)))
}

/// Stops `process`, a ztunnel on `node`, and waits until its ports are free again.
pub(crate) fn stop(state: &State, process: &Process, node: Node) -> Result<()> {
    process.stop(DRAIN_LIMIT)?;
    let path = netns_path(&state.name, node.ztunnel());
    let deadline = Instant::now() + PORTS_LIMIT;
    while Instant::now() < deadline && in_namespace(&path, listening)? {
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Whether any TCP socket listens in the calling thread's namespace.
fn listening() -> bool {
    ["tcp", "tcp6"].iter().any(|table| {
        // /proc/net would show the namespace of the process's first thread.
        let text = fs::read_to_string(format!("/proc/thread-self/net/{table}"));
        text.is_ok_and(|text| text.lines().skip(1).any(is_listener))
    })
}

/// Whether a line of /proc/net/tcp is a listener: state, the fourth field, is 0A.
fn is_listener(line: &str) -> bool {
    line.split_ascii_whitespace().nth(3) == Some("0A")
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_stranger_gets_upstreams_environment_and_none_of_ours() {
        let state = State::example(ProxyKind::Dedicated);
        let mut command = dedicated(&state, Path::new("/bin/true"), Node::B);
        let set: Vec<String> = command
            .inner()
            .get_envs()
            .map(|(name, value)| {
                let value = value.unwrap_or_default().to_string_lossy();
                format!("{}={value}", name.to_string_lossy())
            })
            .collect();
        let expected = [
            "ENABLE_ORIG_SRC=true",
            "FAKE_CA=true",
            "LOCAL_XDS_PATH=/run/zt-lab/x/mesh.yaml",
            "NODE_NAME=node-b",
            "PROXY_MODE=dedicated",
            "PROXY_WORKLOAD_INFO=default/server-b/server-b",
            "XDS_ADDRESS=",
        ];
        assert_eq!(set, expected);
    }

    #[test]
    fn a_listener_is_seen_in_the_socket_table() {
        let _listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(listening());
        let established = "   1: 0100007F:1F90 0100007F:B3D2 01 00000000:00000000 00:00000000";
        assert!(!is_listener(established));
    }
}
