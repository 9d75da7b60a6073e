//! Other proxies in ztunnel's place: how each is configured and started on a node.
//!
//! All of them stand in the same namespaces, behind the same redirection, with certificates of
//! the lab's own CA (dedicated ztunnels: of their fake CA). A foreign proxy serves one workload
//! per node, the node's main pod, whose certificate it presents. It cannot register listeners
//! with the eBPF redirection; the lab does it in its place ([`crate::steering`]). TPROXY of the
//! `tunnel` one needs nothing of that.

pub mod envoy;
pub mod haproxy;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use crate::ca::CertificateAuthority;
use crate::daemon::workspace_binary;
use crate::error::{Error, Result};
pub use crate::kinds::ProxyKind;
use crate::mesh_file::TRUST_DOMAIN;
use crate::network::namespace::HostCommand;
use crate::network::netns_path;
use crate::state::{State, ca_paths, directory};
use crate::topology::{Host, Node};

/// Version of Envoy that `make setup PEERS=1` installs.
pub const ENVOY_VERSION: &str = "1.40.0";
/// What to do about a peer that is not there.
pub const REMEDY: &str = "run `make setup PEERS=1`";

impl ProxyKind {
    /// The program of this kind that is installed.
    ///
    /// # Errors
    /// In one sentence, why there is none.
    pub fn program(self) -> std::result::Result<PathBuf, String> {
        match self {
            Self::EnvoyTcp | Self::EnvoyHbone => {
                let file = format!("envoy-{ENVOY_VERSION}/envoy");
                let own = peers_directories().into_iter().map(|dir| dir.join(&file));
                first_file(own)
                    .or_else(|| in_path("envoy"))
                    .ok_or_else(|| format!("Envoy is not installed: {REMEDY}"))
            }
            Self::Haproxy => {
                in_path("haproxy").ok_or_else(|| format!("HAProxy is not installed: {REMEDY}"))
            }
            Self::Listener => workspace_binary("lab").map_err(|error| error.to_string()),
            Self::Shared | Self::Dedicated => {
                Err("no ztunnel of this name is known: give NAME=PATH".to_owned())
            }
        }
    }
}

/// Certificate, key and root of a node's main pod, as PEM files.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Certificate chain.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Certificate and key in one file, as HAProxy takes them.
    pub both: PathBuf,
    /// The lab's root.
    pub root: PathBuf,
}

/// Everything a configuration is made from.
#[derive(Clone, Debug)]
pub struct Place {
    /// The node.
    pub node: Node,
    /// Its main pod's.
    pub tls: TlsFiles,
    /// Worker threads.
    pub threads: usize,
}

impl Place {
    /// The mesh pods of the other node that tunnels lead to, and who they must prove to be.
    fn far_pod(&self) -> (Host, String) {
        let pod = main_pod(self.node.other());
        (pod, identity(pod))
    }
}

/// The pod whose traffic a proxy that serves one pod per node serves.
#[must_use]
pub fn main_pod(node: Node) -> Host {
    match node {
        Node::A => Host::ClientA,
        Node::B => Host::ServerB,
    }
}

fn identity(pod: Host) -> String {
    format!("spiffe://{TRUST_DOMAIN}/ns/default/sa/{pod}")
}

/// Writes what a foreign proxy on `node` needs and returns the command that runs it.
pub(crate) fn command(state: &State, binary: &Path, node: Node) -> Result<HostCommand> {
    let directory = directory(&state.name).join(format!("{}-proxy", node.name()));
    let (certificate, key) = ca_paths(&state.name);
    let authority = CertificateAuthority::load(&certificate, &key)?;
    let place = Place {
        node,
        tls: write_certificates(&authority, &directory, node)?,
        threads: thread::available_parallelism().map_or(1, usize::from),
    };
    let write = |name: &str, text: String| {
        let path = directory.join(name);
        fs::write(&path, text).map_err(Error::io("writing", &path))?;
        Ok::<_, Error>(path)
    };
    let mut command = HostCommand::new(netns_path(&state.name, node.ztunnel()), binary);
    match state.proxy {
        ProxyKind::Haproxy => {
            let file = write("haproxy.cfg", haproxy::config(&place))?;
            command.args(haproxy::arguments(&file));
        }
        kind => {
            let text = format!("{:#}\n", envoy::config(kind, &place));
            let file = write("envoy.json", text)?;
            command.args(envoy::arguments(&file, &place));
        }
    }
    Ok(command)
}

/// Issues the main pod's certificate into `directory`.
///
/// # Errors
/// [`Error::Io`] naming the file, [`Error::Certificate`].
pub fn write_certificates(
    authority: &CertificateAuthority,
    directory: &Path,
    node: Node,
) -> Result<TlsFiles> {
    fs::create_dir_all(directory).map_err(Error::io("creating", directory))?;
    let (certificate, key) = authority.issue(&identity(main_pod(node)))?;
    let write = |name: &str, text: &str| {
        let path = directory.join(name);
        fs::write(&path, text).map_err(Error::io("writing", &path))?;
        Ok::<_, Error>(path)
    };
    Ok(TlsFiles {
        both: write("both.pem", &format!("{certificate}{key}"))?,
        certificate: write("certificate.pem", &certificate)?,
        key: write("key.pem", &key)?,
        root: write("root.pem", authority.certificate_pem())?,
    })
}

/// Where `make setup PEERS=1` puts programs: `peers` in the target directory.
fn peers_directories() -> Vec<PathBuf> {
    let mut starts = Vec::new();
    starts.extend(env::var_os("LAB_BIN_DIR").map(PathBuf::from));
    starts.extend(env::current_exe().ok());
    starts
        .iter()
        .flat_map(|start| start.ancestors().take(4))
        .map(|directory| directory.join("peers"))
        .collect()
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/local/sbin", "/usr/sbin"].map(PathBuf::from);
    first_file(
        env::split_paths(&path)
            .chain(extra)
            .map(|dir| dir.join(program)),
    )
}

fn first_file(candidates: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    candidates.into_iter().find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back_and_what_is_missing_says_what_to_do() {
        for kind in ProxyKind::ALL {
            assert_eq!(kind.name().parse::<ProxyKind>().unwrap(), kind);
        }
        let error = "nginx".parse::<ProxyKind>().unwrap_err().to_string();
        assert!(error.contains("envoy-hbone"), "{error}");
        assert!(ProxyKind::Shared.program().is_err());
        for kind in [ProxyKind::EnvoyTcp, ProxyKind::Haproxy] {
            if let Err(reason) = kind.program() {
                assert!(reason.contains("make setup PEERS=1"), "{reason}");
            }
        }
    }

    #[test]
    fn certificates_are_the_main_pods() {
        let authority = CertificateAuthority::generate(TRUST_DOMAIN).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let tls = write_certificates(&authority, directory.path(), Node::B).unwrap();
        let both = fs::read_to_string(tls.both).unwrap();
        assert!(both.contains("BEGIN CERTIFICATE") && both.contains("PRIVATE KEY"));
        assert_eq!(
            identity(main_pod(Node::B)),
            "spiffe://cluster.local/ns/default/sa/server-b"
        );
        assert_eq!(
            fs::read_to_string(tls.root).unwrap(),
            authority.certificate_pem()
        );
    }
}
