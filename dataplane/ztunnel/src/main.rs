//! The node proxy: configuration and wiring. What it does is in the crates it depends on.
//!
//! Start-up order decides what a failure leaves behind: everything that can be wrong (settings,
//! configuration file, CA, ports, capabilities, io_uring) is checked before the first connection
//! could be accepted, and each problem is one line on standard error and exit code 1.

#![forbid(unsafe_code)]

mod admin;
mod config;
mod control_thread;
mod environment;
mod handover;
mod key_file;
mod limits;
mod listeners;
mod pod_table;
mod sockmap;
mod steering;
mod workers;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const HELP: &str = "\
ztunnel: the node proxy of an ambient mesh (io_uring, HBONE, eBPF redirection)

Usage: ztunnel [proxy|version|help]

  proxy     run the proxy (default)
  version   print the version
  help      print this text

Settings come from the environment; docs/configuration.md lists all of them. The essential ones:

  LOCAL_XDS_PATH        YAML file with workloads, services and policies
  LOCAL_CA_CERT         PEM certificate of the CA that issues workload certificates in process
  LOCAL_CA_KEY          PEM private key of that CA
  REDIRECT_MODE         in-pod (default) or node
  NODE_NAME             name of this node in the configuration
  PROXY_MODE            shared (default: all pods of the node) or dedicated
  PROXY_WORKLOAD_INFO   namespace/name/service-account a dedicated proxy serves
  NETWORK               network of this node (default: empty)
  ZTUNNEL_LISTENER_MAP  pinned socket map of the eBPF redirection (node mode)
  ZTUNNEL_POD_TABLE     the node agent's table of whose an address is (node mode)
  ZTUNNEL_WORKER_THREADS  N, N% or 0 for all CPUs
  ZTUNNEL_RUNTIME_BACKEND  auto (default), io_uring or epoll
  RUST_LOG, LOG_FORMAT  log filter; plain (default) or json

SIGTERM drains. Readiness: :15021/healthz/ready. Metrics: :15020/metrics. Admin: localhost:15000.
";

fn main() -> ExitCode {
    // Further arguments are ignored, as upstream does: its chart passes `proxy ztunnel`.
    let command = std::env::args().nth(1);
    match command.as_deref() {
        None | Some("proxy") => match control_thread::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("ztunnel: {error}");
                ExitCode::FAILURE
            }
        },
        Some("version") => {
            println!("ztunnel {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some("help" | "--help" | "-h") => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        Some(other) => {
            eprintln!("ztunnel: unknown command `{other}`: use proxy, version or help");
            ExitCode::from(2)
        }
    }
}
