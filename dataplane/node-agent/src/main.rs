//! The node's agent: enrols pods of the mesh and owns redirection, the role of Istio's CNI agent.
//!
//! `run` installs redirection, prints `node-agent: ready` and follows its configuration file.
//! Ending it (SIGTERM, SIGINT, a crash) leaves redirection in place, so that pods stay in the mesh
//! or, with ztunnel gone too, cut off; `cleanup` removes it.
//!
//! Exit codes: 0 done, 1 failed (one line on standard error), 2 wrong usage.

#![forbid(unsafe_code)]

mod agent;
mod config;
mod error;
mod lock;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::Config;
use crate::error::Result;

/// Enrols this node's mesh pods and redirects their TCP through ztunnel.
///
/// Runs in the node's network namespace with CAP_NET_ADMIN, CAP_SYS_ADMIN and CAP_BPF (eBPF) or
/// CAP_NET_RAW (tunnel). Needs ip, for the tunnel also iptables-restore, iptables-save and ipset.
#[derive(Debug, Parser)]
#[command(version)]
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
        Command::Run { config } => agent::run(&config),
        Command::Status { config, json } => agent::status(&Config::load(&config)?, json),
        Command::Cleanup { config } => agent::cleanup(&Config::load(&config)?),
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
