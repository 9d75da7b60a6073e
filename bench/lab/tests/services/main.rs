//! Every way in and out of a pod does with a mesh what it does without one, on nodes that have what
//! a cluster's nodes have: kube-proxy's rules for services, and an underlay whose packets are
//! smaller than the pods'.
//!
//! The first lab is the twin, without a mesh; the others run the same cells at the same services
//! and are compared with it, cell by cell. `LAB_PATHS=ebpf,tunnel` runs only these.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "../support/mod.rs"]
mod support;

mod alike;
mod cells;
mod probe;
mod run;
mod servers;

use std::io::{self, Write as _};
use std::process::Command;

use lab::{Redirect, Services};
use run::Path;

const NONE: Path = Path {
    name: "none",
    redirect: Redirect::None,
    sockmap: false,
};
const PATHS: [Path; 3] = [
    Path {
        name: "tunnel",
        redirect: Redirect::Tunnel,
        sockmap: false,
    },
    Path {
        name: "ebpf",
        redirect: Redirect::Ebpf,
        sockmap: false,
    },
    Path {
        name: "ebpf+sockmap",
        redirect: Redirect::Ebpf,
        sockmap: true,
    },
];

#[test]
fn every_way_works_as_without_a_mesh_with_services_by_iptables() {
    if support::can_run("every_way_works_as_without_a_mesh_with_services_by_iptables") {
        run::compare(Services::Iptables, NONE, &PATHS);
    }
}

#[test]
fn every_way_works_as_without_a_mesh_with_services_by_nftables() {
    const NAME: &str = "every_way_works_as_without_a_mesh_with_services_by_nftables";
    let has_nft = Command::new("nft").arg("--version").output().is_ok();
    if !has_nft {
        let _ = writeln!(io::stderr(), "skipped: {NAME}: nft is not installed");
    } else if support::can_run(NAME) {
        run::compare(Services::Nftables, NONE, &PATHS[..2]);
    }
}
