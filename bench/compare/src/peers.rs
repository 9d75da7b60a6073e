//! Other proxies: found, brought up in the way they take, probed.
//!
//! `--peer NAME=PATH` is any ztunnel: it is run in upstream's `dedicated` mode, on the `ebpf`
//! redirection with listeners that the lab registers for it, else on `tunnel`, which steers by
//! TPROXY. `NAME=shared:PATH` is one
//! that takes this project's environment, such as another version of it. `conventional`,
//! `envoy-tcp`, `envoy-hbone` and `haproxy` are known by name, and `all` stands for them. A peer
//! that is not installed, does not come up, or whose processes do no work while requests get
//! through, is skipped by name.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use super::plan::{Arm, Cell, Scope, check_peer_name};
use super::trial::Setup;
use lab::Redirect;
use lab::peers::ProxyKind;
use lab::workspace_binary;
use lab::{Lab, LabOptions};
use report::metric::{Metric, Spender};
use report::schema::{Peer, SkippedPeer};

/// The peer that is built beside this program.
const BUILT_IN: &str = "conventional";
/// Every peer that needs no path.
const ALL: &str = "all";
/// Before a path: the program takes this project's environment.
const SHARED: &str = "shared:";
/// A port of its own, away from the trials'.
const PROBE: u32 = 1999;

/// As our own ztunnel, on the better of the redirections first.
const AS_OURS: &[(Redirect, ProxyKind)] = &[
    (Redirect::Ebpf, ProxyKind::Shared),
    (Redirect::Tunnel, ProxyKind::Shared),
];
const AS_A_STRANGER: &[(Redirect, ProxyKind)] = &[
    (Redirect::Ebpf, ProxyKind::Dedicated),
    (Redirect::Tunnel, ProxyKind::Dedicated),
];
const BY_NAME: [&[(Redirect, ProxyKind)]; 3] = [
    &[(Redirect::Tunnel, ProxyKind::EnvoyTcp)],
    &[(Redirect::Tunnel, ProxyKind::EnvoyHbone)],
    &[(Redirect::Tunnel, ProxyKind::Haproxy)],
];

/// A peer that was asked for.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) name: String,
    binary: Result<PathBuf, String>,
    /// Ways to run it, the first that works is measured.
    ways: &'static [(Redirect, ProxyKind)],
}

/// Reads `NAME[=PATH]` of every `--peer`.
pub(super) fn parse(options: &[String]) -> Result<Vec<Wanted>> {
    let mut wanted: Vec<Wanted> = Vec::new();
    let mut add = |peer: Wanted, name_it: bool| {
        if wanted.iter().any(|other| other.name == peer.name) {
            if name_it {
                bail!("--peer names {} twice", peer.name);
            }
        } else {
            wanted.push(peer);
        }
        Ok(())
    };
    for option in options {
        if option == ALL {
            let known = BY_NAME.iter().map(|ways| ways[0].1.name());
            for name in [BUILT_IN].into_iter().chain(known) {
                add(one(name, None)?, false)?;
            }
            continue;
        }
        match option.split_once('=') {
            Some((name, path)) => add(one(name, Some(path))?, true)?,
            None => add(one(option, None)?, true)?,
        }
    }
    Ok(wanted)
}

fn one(name: &str, path: Option<&str>) -> Result<Wanted> {
    check_peer_name(name)?;
    let by_name = BY_NAME.into_iter().find(|ways| ways[0].1.name() == name);
    let shared = path.and_then(|path| path.strip_prefix(SHARED));
    let ways = match by_name {
        Some(ways) => ways,
        None if name == BUILT_IN || shared.is_some() => AS_OURS,
        None => AS_A_STRANGER,
    };
    let binary = match shared.or(path).map(PathBuf::from) {
        Some(path) if path.is_file() => Ok(path),
        Some(path) => Err(format!("{} is not there", path.display())),
        None if name == BUILT_IN => workspace_binary(name)
            .map_err(|_| "its binary is not built or not beside `lab`".to_owned()),
        None if by_name.is_some() => ways[0].1.program(),
        None => Err(format!(
            "no proxy of this name is known; give {name}=PATH of a ztunnel"
        )),
    };
    Ok(Wanted {
        name: name.to_owned(),
        binary,
        ways,
    })
}

/// Brings a peer's lab up in the first way in which it carries traffic.
pub(super) fn up(
    lab_name: &str,
    wanted: &Wanted,
    setup: &Setup<'_>,
) -> Result<(Lab, Arm, Peer), SkippedPeer> {
    let skipped = |reason: String| SkippedPeer {
        name: wanted.name.clone(),
        // One sentence of the report.
        reason: reason.trim_end_matches('.').to_owned(),
    };
    let binary = wanted.binary.clone().map_err(skipped)?;
    let mut reasons = Vec::new();
    for &(redirect, kind) in wanted.ways {
        match attempt(lab_name, &binary, (redirect, kind), setup) {
            Ok(lab) => {
                let mut arm = Arm::competitor(&wanted.name, binary.clone(), redirect);
                arm.cross_node_only = probe(&lab, Scope::SameNode, setup).is_err();
                let peer = describe(&wanted.name, &binary, kind, &arm);
                return Ok((lab, arm, peer));
            }
            Err(error) => {
                eprintln!(
                    "lab: peer {} does not work in {kind} mode on {redirect}: {error:#}",
                    wanted.name,
                );
                reasons.push(format!("{kind} on {redirect}: {error:#}"));
            }
        }
    }
    Err(skipped(reasons.join("; ")))
}

fn attempt(
    lab_name: &str,
    binary: &Path,
    (redirect, kind): (Redirect, ProxyKind),
    setup: &Setup<'_>,
) -> Result<Lab> {
    let options = LabOptions {
        name: lab_name.to_owned(),
        redirect,
        ztunnel: Some(binary.to_owned()),
        proxy: kind,
        services: setup.services,
        ..LabOptions::default()
    };
    let lab = Lab::up(&options)?;
    match probe(&lab, Scope::CrossNode, setup) {
        Ok(()) => Ok(lab),
        Err(error) => {
            Lab::down(lab_name)?;
            Err(error)
        }
    }
}

/// Whether requests get through, at the latest in the third of three short trials: what a busy
/// machine delays must not leave a peer out.
fn probe(lab: &Lab, scope: Scope, setup: &Setup<'_>) -> Result<()> {
    let mut tried = try_once(lab, scope, setup);
    for _ in 0..2 {
        if tried.is_ok() {
            break;
        }
        tried = try_once(lab, scope, setup);
    }
    tried
}

/// One short trial: requests get through, and by way of the peer.
fn try_once(lab: &Lab, scope: Scope, setup: &Setup<'_>) -> Result<()> {
    let cell = Cell {
        scope,
        ..Cell::closed_rr(1)
    };
    let trial = setup.run(lab, &cell, PROBE)?;
    let workload = cell.workload.name();
    let throughput = Metric::throughput(workload);
    if trial.metric(Metric::Errors) != Some(0.0) || trial.metric(throughput) <= Some(0.0) {
        bail!("it is ready, but {} requests fail", scope.name());
    }
    if trial.metric(Metric::cpu(Spender::Ztunnels, workload)) <= Some(0.0) {
        bail!("requests get through without passing it");
    }
    Ok(())
}

fn describe(name: &str, binary: &Path, kind: ProxyKind, arm: &Arm) -> Peer {
    let mut about = match kind {
        ProxyKind::Shared => String::new(),
        ProxyKind::Dedicated => {
            "It serves one pod per node, with certificates of its own fake CA.".to_owned()
        }
        _ => about(kind, &version(binary)),
    };
    if arm.cross_node_only {
        about
            .push_str(" It carries nothing between pods of one node, so it is not measured there.");
    }
    let file = binary.file_name().unwrap_or(binary.as_os_str());
    Peer {
        name: name.to_owned(),
        binary: file.to_string_lossy().into_owned(),
        redirect: arm.redirect.name().to_owned(),
        mode: kind.name().to_owned(),
        about: about.trim().to_owned(),
    }
}

/// What a foreign proxy does and does not do of what ztunnel does.
fn about(kind: ProxyKind, version: &str) -> String {
    let less = "No policies, no access log, no telemetry by workload.";
    let each = "a TLS session, resumed where possible, for each connection; no HBONE";
    let does = match kind {
        ProxyKind::EnvoyHbone => {
            "HBONE by its TCP proxy's CONNECT tunnelling, HTTP/2 connections shared per worker and \
             client address; exact SPIFFE identities checked, client's address kept, AES-128-GCM"
                .to_owned()
        }
        ProxyKind::EnvoyTcp => {
            format!("{each}; exact SPIFFE identities checked, client's address kept, AES-128-GCM")
        }
        ProxyKind::Haproxy => format!(
            "{each}; the server's chain is checked but not its SPIFFE identity, client's address \
             kept, AES-256-GCM as ours"
        ),
        ProxyKind::Shared | ProxyKind::Dedicated | ProxyKind::Listener => return String::new(),
    };
    format!("{version}: {does}. {less}")
}

/// The first line with a number that the program says about its version.
fn version(binary: &Path) -> String {
    let flag = match binary.file_name() {
        Some(name) if name == "haproxy" => "-v",
        _ => "--version",
    };
    let output = Command::new(binary).arg(flag).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let text = text.unwrap_or_default();
    let line = text.lines().find(|line| line.contains(['.', '/']));
    match line.map(str::trim) {
        // envoy  version: <hash>/1.40.0/Clean/RELEASE/BoringSSL
        Some(line) => match line.rsplit("version:").next().map(str::trim) {
            Some(rest) if rest.split('/').count() > 2 && !rest.contains(' ') => {
                format!("Envoy {}", rest.split('/').nth(1).unwrap_or(rest))
            }
            _ => line.split(" - ").next().unwrap_or(line).to_owned(),
        },
        None => "unknown version".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(options: &[&str]) -> Result<Vec<Wanted>> {
        let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        parse(&options)
    }

    #[test]
    fn what_is_missing_is_kept_with_the_reason() {
        let wanted = parsed(&["other=/no/such/file", "nginx", "sh=/bin/sh"]).unwrap();
        let reason = |i: usize| wanted[i].binary.clone().unwrap_err();
        assert_eq!(reason(0), "/no/such/file is not there");
        assert!(reason(1).contains("give nginx=PATH"), "{}", reason(1));
        assert_eq!(wanted[2].binary.as_deref(), Ok(Path::new("/bin/sh")));
        assert!(parsed(&["sh=/bin/sh", "sh"]).is_err());
        assert!(parsed(&["ebpf=/bin/sh"]).is_err());
    }

    #[test]
    fn strangers_are_dedicated_and_own_versions_are_run_as_ours() {
        let wanted = parsed(&["a=/bin/sh", "b=shared:/bin/sh", "envoy-tcp=/bin/sh"]).unwrap();
        assert_eq!(wanted[0].ways, AS_A_STRANGER);
        assert_eq!(wanted[1].ways, AS_OURS);
        assert_eq!(wanted[1].binary.as_deref(), Ok(Path::new("/bin/sh")));
        assert_eq!(wanted[2].ways, [(Redirect::Tunnel, ProxyKind::EnvoyTcp)]);
    }

    #[test]
    fn all_stands_for_every_peer_once() {
        let wanted = parsed(&["haproxy", "all"]).unwrap();
        let mut names: Vec<&str> = wanted.iter().map(|peer| peer.name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            ["conventional", "envoy-hbone", "envoy-tcp", "haproxy"]
        );
    }

    #[test]
    fn every_installed_peer_passes_its_probe_and_says_where_it_is_measured() {
        let test = "every_installed_peer_passes_its_probe_and_says_where_it_is_measured";
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: {test}: needs root");
            return;
        }
        let built = ["loadgen", "ztunnel", "node-agent", BUILT_IN].map(workspace_binary);
        let [Ok(loadgen), Ok(ztunnel), Ok(_), Ok(_)] = built else {
            eprintln!("skipped: {test}: the workspace's programs are not built");
            return;
        };
        let stranger = format!("stranger={}", ztunnel.display());
        let own = format!("own=shared:{}", ztunnel.display());
        let scratch = tempfile::tempdir().unwrap();
        let setup = Setup {
            loadgen: &loadgen,
            scratch: scratch.path(),
            duration: std::time::Duration::from_millis(300),
            warmup: std::time::Duration::from_millis(100),
            pin: &crate::placement::Pin::parse(None).unwrap(),
            services: lab::Services::Iptables,
        };
        for wanted in parsed(&["all", &stranger, &own, "absent=/bin/false"]).unwrap() {
            if let Err(reason) = &wanted.binary {
                eprintln!("skipped: {test}: {}: {reason}", wanted.name);
                continue;
            }
            let lab_name = format!("p{}-{}", std::process::id(), wanted.name);
            match up(&lab_name, &wanted, &setup) {
                Ok((lab, arm, peer)) => {
                    Lab::down(lab.name()).unwrap();
                    assert_ne!(wanted.name, "absent");
                    assert_eq!(arm.cross_node_only, wanted.name == "stranger", "{peer:?}");
                    assert_eq!(arm.cross_node_only, peer.about.contains("not measured"));
                    let as_ours = wanted.ways == AS_OURS;
                    assert_eq!(peer.mode == "shared", as_ours, "{peer:?}");
                    let by_ebpf = as_ours || wanted.name == "stranger";
                    assert_eq!(arm.redirect == Redirect::Ebpf, by_ebpf, "{peer:?}");
                }
                Err(skipped) => {
                    assert_eq!(skipped.name, "absent", "{}", skipped.reason);
                    assert!(
                        skipped.reason.contains("before it was ready"),
                        "{}",
                        skipped.reason
                    );
                }
            }
        }
    }

    #[test]
    fn versions_are_read_from_what_programs_say() {
        let scratch = tempfile::tempdir().unwrap();
        let says = |name: &str, text: &str| {
            use std::os::unix::fs::PermissionsExt as _;
            let path = scratch.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\necho '{text}'\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            version(&path)
        };
        assert_eq!(
            says(
                "envoy",
                "\n/x/envoy  version: ab12/1.40.0/Clean/RELEASE/BoringSSL\n"
            ),
            "Envoy 1.40.0"
        );
        assert_eq!(
            says(
                "haproxy",
                "HAProxy version 2.6.12-1 2026/10/17 - https://haproxy.org/"
            ),
            "HAProxy version 2.6.12-1 2026/10/17"
        );
        assert_eq!(version(Path::new("/no/such")), "unknown version");
    }
}
