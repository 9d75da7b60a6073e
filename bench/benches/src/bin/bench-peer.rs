//! The processes that benchmarks start: relays, the servers and clients around them, and
//! workloads to count instructions of. Not for use by hand, though nothing prevents it.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use benches::callgrind::Subject;
use benches::relay::{self, Backend, process};
use clap::{Parser, Subcommand};
use loadgen::pacing::Pacing;
use loadgen::serve::{self, Mode, Server};
use loadgen::size::Sizes;
use loadgen::stream::Direction;
use loadgen::worker::Client;
use loadgen::{connect, idle, rr, stream};

/// Bytes per request and per response.
const REQUEST_BYTES: usize = 64;
const DESCRIPTORS: u64 = 65_536;

/// Processes of the benchmarks.
#[derive(Debug, Parser)]
struct Cli {
    /// CPUs to run on [default: all allowed].
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    cpus: Vec<u32>,
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Relay connections to TARGET.
    Relay {
        #[arg(value_enum)]
        backend: Backend,
        target: SocketAddr,
    },
    /// Be the server behind the relay.
    Serve {
        #[arg(value_enum)]
        mode: Mode,
    },
    /// Be the client: prints `measuring`, `measured` and the report as one line of JSON.
    Load {
        /// rr, stream, connect or idle.
        kind: String,
        to: SocketAddr,
        connections: usize,
        warmup_s: f64,
        duration_s: f64,
    },
    /// Run a workload COUNT times, for an instruction counter to look at.
    Instructions {
        #[arg(value_enum)]
        subject: Subject,
        count: u64,
        /// Workloads of the mesh, where there is one.
        #[arg(long, default_value_t = 1)]
        size: usize,
    },
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    process::bind_to(&cli.cpus)?;
    // Those that need many connections find out whether that was enough.
    let _ = process::allow_descriptors(DESCRIPTORS);
    match cli.role {
        Role::Relay { backend, target } => relay::run(backend, target),
        Role::Serve { mode } => server(mode),
        Role::Load {
            kind,
            to,
            connections,
            warmup_s,
            duration_s,
        } => {
            let mut client = Client::new(to);
            client.connections = connections;
            client.warmup = Duration::try_from_secs_f64(warmup_s).context("warmup_s")?;
            client.duration = Duration::try_from_secs_f64(duration_s).context("duration_s")?;
            client.markers = true;
            load(&kind, client)
        }
        Role::Instructions {
            subject,
            count,
            size,
        } => subject.run(size, count),
    }
}

fn server(mode: Mode) -> Result<()> {
    let server = Server::start(&serve::Options {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        mode,
        threads: None,
        cpus: Vec::new(),
        print_peers: false,
    })?;
    println!("listening on {}", server.address());
    server.join()?;
    Ok(())
}

fn load(kind: &str, mut client: Client) -> Result<()> {
    let (size, verify) = (REQUEST_BYTES, false);
    let report = match kind {
        "rr" => rr::run(&rr::Options {
            client,
            sizes: Sizes::Fixed(size),
            pacing: Pacing::Closed,
            verify,
        }),
        "stream" => stream::run(&stream::Options {
            client,
            direction: Direction::Up,
            verify,
        }),
        "connect" => connect::run(&connect::Options {
            client,
            size,
            verify,
        }),
        "idle" => {
            // Ended from outside as soon as memory has been read.
            client.duration = Duration::from_secs(60);
            idle::run(&idle::Options { client })
        }
        other => anyhow::bail!("unknown load {other:?}: rr, stream, connect or idle"),
    }?;
    println!("{}", report.json());
    Ok(())
}
