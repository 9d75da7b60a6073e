//! The node's agent: enrols pods of the mesh and owns redirection, the role of Istio's CNI agent.
//!
//! `run` installs redirection, prints `node-agent: ready` and follows its configuration file.
//! Ending it (SIGTERM, SIGINT, a crash) leaves redirection in place, so that pods stay in the mesh
//! or, with ztunnel gone too, cut off; `cleanup` removes it.
//!
//! Exit codes: 0 done, 1 failed (one line on standard error), 2 wrong usage.

#![forbid(unsafe_code)]

mod apply;
mod cleanup;
mod config;
mod desired;
mod dropped;
mod endpoint;
mod error;
mod events;
mod lock;
mod metrics;
mod node;
mod reconcile;
mod reconciler;
mod run;
mod sockmap;
mod source;
mod status;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::Config;
use crate::error::Result;

const EXAMPLE: &str = "\
Configuration:
  redirect: ebpf              # or tunnel
  variant: hardened           # tunnel only; or faithful: Istio 1.20's rules as they were
  iptables: auto              # tunnel only; or nft, legacy
  attach: auto                # ebpf only; tcx where the kernel has it (6.6), else clsact
  node: {interfaces: [eth0], address: 10.244.1.1, pod_cidrs: [10.244.0.0/16]}
  ztunnel: {netns: /run/netns/ztunnel, interface: eth0, host_interface: veth1, address: 10.244.1.2}
  dns: false                  # true: pods' DNS queries (port 53) go to ztunnel's port 15053
  reconcile_s: 10             # how often what others removed is put back (1 to 3600)
  state_dir: /run/node-agent  # journal and lock; what is needed to clean up
  bpffs: /sys/fs/bpf/ztunnel  # ebpf only; ztunnel finds its map at <bpffs>/listeners
  sockmap: off                # ebpf only; on or force: short-cut between pods and ztunnel
  cgroup: /sys/fs/cgroup/kubepods.slice  # sockmap only; default: root of the cgroup2 hierarchy
  sockmap_memory_mib: 512     # memory of all TCP sockets that ends it; default: the kernel's limit
  stats_address: 127.0.0.1:15014  # /metrics for Prometheus, /readyz, /healthz; default: nowhere
  pods:
  - {uid: a, namespace: default, name: web-1, service_account: web,
     addresses: [10.244.1.11, fd00::11], netns: /run/netns/a, host_interface: veth2}
A pod may have phase (Kubernetes' status.phase) and started (status.startTime): of two pods with
one address the running and newer one is captured. A pod that is not captured is cut off.
With ebpf, IPv6 needs ztunnel.address_v6, and node.other_addresses for addresses of the node
that are on none of its interfaces; node.netns makes the agent refuse to run elsewhere.
RUST_LOG sets what is logged to standard error (default info).";

/// Enrols this node's mesh pods and redirects their TCP through ztunnel.
///
/// Runs in the node's network namespace with CAP_NET_ADMIN, CAP_SYS_ADMIN and CAP_BPF (eBPF) or
/// CAP_NET_RAW (tunnel). Needs ip, for the tunnel also iptables-restore, iptables-save and ipset.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLE)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install redirection and follow changes of the configuration until SIGTERM.
    ///
    /// Prints "node-agent: ready" when it is installed. Ending it does not remove anything.
    Run {
        /// Configuration file (YAML).
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Print what is installed.
    Status {
        /// Configuration file (YAML).
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Remove everything that was ever installed, also after a crash.
    ///
    /// Refuses while `run` is running.
    Cleanup {
        /// Configuration file (YAML).
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
}

fn dispatch(command: Command) -> Result<()> {
    match command {
        Command::Run { config } => run::run(&config),
        Command::Status { config, json } => status::print(&Config::load(&config)?, json),
        Command::Cleanup { config } => cleanup::cleanup(&Config::load(&config)?),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
    match dispatch(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("node-agent: {error}");
            ExitCode::FAILURE
        }
    }
}
