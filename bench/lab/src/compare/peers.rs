//! Other ztunnels: found, brought up in the way they take, probed.
//!
//! A peer is any binary that takes ztunnel's environment. It is tried the way our own is run, then
//! in upstream's `dedicated` style on the `tunnel` redirection, which steers by TPROXY and needs
//! no help from the proxy. The first way in which a request gets through, and passes the peer's
//! processes, is measured. A peer that is not there or works in no way is skipped by name.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path as FilePath, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::plan::{Cell, Path, check_peer_name};
use super::trial::Setup;
use crate::daemon::workspace_binary;
use crate::lab::{Lab, LabOptions};
use crate::report::schema::{Peer, SkippedPeer};
use crate::state::Redirect;

/// The peer that is built beside this program.
const BUILT_IN: &str = "conventional";
/// A port of its own, away from the trials'.
const PROBE: u32 = 1999;

/// A peer that was asked for.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) name: String,
    binary: Result<PathBuf, String>,
}

/// How a peer is run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Mode {
    /// As our own ztunnel.
    Shared,
    /// As upstream's for a single pod.
    Dedicated,
}

const WAYS: [(Redirect, Mode); 4] = [
    (Redirect::Ebpf, Mode::Shared),
    (Redirect::Tunnel, Mode::Shared),
    (Redirect::Ebpf, Mode::Dedicated),
    (Redirect::Tunnel, Mode::Dedicated),
];

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Dedicated => "dedicated",
        }
    }
}

/// Reads `NAME[=PATH]` of every `--peer`.
pub(super) fn parse(options: &[String]) -> Result<Vec<Wanted>> {
    let mut wanted: Vec<Wanted> = Vec::new();
    for option in options {
        let (name, path) = match option.split_once('=') {
            Some((name, path)) => (name, Some(PathBuf::from(path))),
            None => (option.as_str(), None),
        };
        check_peer_name(name)?;
        if wanted.iter().any(|peer| peer.name == name) {
            bail!("--peer names {name} twice");
        }
        let binary = match path {
            Some(path) if path.is_file() => Ok(path),
            Some(path) => Err(format!("{} is not there", path.display())),
            None if name == BUILT_IN => workspace_binary(name)
                .map_err(|_| "its binary is not built or not beside `lab`".to_owned()),
            None => Err(format!(
                "no ztunnel of this name is known; give {name}=PATH"
            )),
        };
        wanted.push(Wanted {
            name: name.to_owned(),
            binary,
        });
    }
    Ok(wanted)
}

/// Brings a peer's lab up in the first way in which it carries traffic.
pub(super) fn up(
    lab_name: &str,
    wanted: &Wanted,
    setup: &Setup<'_>,
) -> Result<(Lab, Path, Peer), SkippedPeer> {
    let skipped = |reason: String| SkippedPeer {
        name: wanted.name.clone(),
        // One sentence of the report.
        reason: reason.trim_end_matches('.').to_owned(),
    };
    let binary = wanted.binary.clone().map_err(skipped)?;
    let mut reasons = Vec::new();
    for (redirect, mode) in WAYS {
        match attempt(lab_name, &binary, (redirect, mode), setup) {
            Ok(lab) => {
                let file = binary.file_name().unwrap_or(binary.as_os_str());
                let peer = Peer {
                    name: wanted.name.clone(),
                    binary: file.to_string_lossy().into_owned(),
                    redirect: redirect.name().to_owned(),
                    mode: mode.name().to_owned(),
                };
                return Ok((lab, Path::peer(&wanted.name, binary, redirect), peer));
            }
            Err(error) => {
                eprintln!(
                    "lab: peer {} does not work in {} mode on {redirect}: {error:#}",
                    wanted.name,
                    mode.name()
                );
                reasons.push(format!("{} on {redirect}: {error:#}", mode.name()));
            }
        }
    }
    Err(skipped(reasons.join("; ")))
}

fn attempt(
    lab_name: &str,
    binary: &FilePath,
    (redirect, mode): (Redirect, Mode),
    setup: &Setup<'_>,
) -> Result<Lab> {
    let ztunnel = match mode {
        Mode::Shared => binary.to_owned(),
        Mode::Dedicated => dedicated(binary, setup.scratch, lab_name)?,
    };
    let options = LabOptions {
        name: lab_name.to_owned(),
        redirect,
        ztunnel: Some(ztunnel),
        ..LabOptions::default()
    };
    let lab = Lab::up(&options)?;
    match probe(&lab, setup) {
        Ok(()) => Ok(lab),
        Err(error) => {
            Lab::down(lab_name)?;
            Err(error)
        }
    }
}

/// One short trial between the nodes: requests get through, and by way of the peer.
fn probe(lab: &Lab, setup: &Setup<'_>) -> Result<()> {
    let trial = setup.run(lab, &Cell::closed_rr(1), PROBE)?;
    if trial.metric("errors") != Some(0.0) || trial.metric("requests_per_s") <= Some(0.0) {
        bail!("it is ready, but requests between the nodes fail");
    }
    if trial.metric("ztunnel_cpu_us_per_request") <= Some(0.0) {
        bail!("requests get through without passing it");
    }
    Ok(())
}

/// Writes a program that runs `binary` with the environment of upstream's ztunnel for the node's
/// main pod.
fn dedicated(binary: &FilePath, scratch: &FilePath, lab_name: &str) -> Result<PathBuf> {
    let path = scratch.join(format!("{lab_name}-dedicated"));
    let binary = fs::canonicalize(binary).with_context(|| format!("{}", binary.display()))?;
    let quoted = binary.display().to_string().replace('\'', "'\\''");
    let text = format!(
        "#!/bin/sh\n\
         case \"$NODE_NAME\" in node-a) pod=client-a ;; *) pod=server-b ;; esac\n\
         unset LOCAL_CA_CERT LOCAL_CA_KEY REDIRECT_MODE SOCKMAP ZTUNNEL_LISTENER_MAP\n\
         export PROXY_MODE=dedicated PROXY_WORKLOAD_INFO=\"default/$pod/$pod\"\n\
         export FAKE_CA=true ENABLE_ORIG_SRC=true\n\
         exec '{quoted}' \"$@\"\n"
    );
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("making {} a program", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_kept_with_the_reason() {
        let options = ["other=/no/such/file", "envoy", "sh=/bin/sh"].map(str::to_owned);
        let wanted = parse(&options).unwrap();
        let reason = |i: usize| wanted[i].binary.clone().unwrap_err();
        assert_eq!(reason(0), "/no/such/file is not there");
        assert!(reason(1).contains("give envoy=PATH"), "{}", reason(1));
        assert_eq!(wanted[2].binary.as_deref(), Ok(FilePath::new("/bin/sh")));
        assert!(parse(&["sh=/bin/sh", "sh"].map(str::to_owned)).is_err());
        assert!(parse(&["ebpf=/bin/sh".to_owned()]).is_err());
    }

    #[test]
    fn a_dedicated_peer_gets_upstreams_environment_and_none_of_ours() {
        let scratch = tempfile::tempdir().unwrap();
        let script = dedicated(FilePath::new("/usr/bin/env"), scratch.path(), "x").unwrap();
        let output = std::process::Command::new(script)
            .env("NODE_NAME", "node-b")
            .env("REDIRECT_MODE", "node")
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            text.contains("PROXY_WORKLOAD_INFO=default/server-b/server-b"),
            "{text}"
        );
        assert!(
            text.contains("PROXY_MODE=dedicated") && !text.contains("REDIRECT_MODE"),
            "{text}"
        );
    }
}
