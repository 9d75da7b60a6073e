//! Arguments of the commands.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use loadgen::calibration::Calibration;
use loadgen::pacing::{Arrivals, Pacing};
use loadgen::search::Objective;
use loadgen::serve::{self, Mode};
use loadgen::size::Sizes;
use loadgen::stream::Direction;
use loadgen::target::Target;
use loadgen::worker::Client;
use loadgen::{connect, idle, rr, stream};

/// Load generator for TCP: measures latency, throughput and connection rates, and serves the
/// other end.
///
/// Latencies are recorded in HDR histograms from 1 ns to 60 s. Ctrl-C ends a run early and still
/// writes its results. Exit status: 0 if anything succeeded, 1 if nothing did or the run could
/// not start, 2 for wrong arguments.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "Examples:
  loadgen serve --listen 127.0.0.1:9000
  loadgen rr --to 127.0.0.1:9000 --connections 32 --size 64 --duration 10
  loadgen rr --to 127.0.0.1:9000 --connections 32 --rate 20000 --json rr.json --hgrm rr.hgrm
  loadgen rr --to 127.0.0.1:9000 --connections 32 --size 64:9,16384:1 --max-sustainable 'p99<2ms'
  loadgen serve --listen 127.0.0.1:9001 --mode source
  loadgen stream --to 127.0.0.1:9001 --connections 4 --direction both
  loadgen connect --to 127.0.0.1:9000 --concurrency 16";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve the other end: echo (for rr, connect, idle), sink (stream up) or source (stream
    /// down and both). Prints `listening on ADDR` when ready; SIGTERM or Ctrl-C ends it.
    Serve(ServeArgs),
    /// Requests and responses of one size over kept connections; latency and rate. Closed loop,
    /// or open loop with --rate.
    Rr(RrArgs),
    /// Bulk bytes; throughput.
    Stream(StreamArgs),
    /// Connect, one request, close; rate and latency of all of it.
    Connect(ConnectArgs),
    /// Open connections and hold them.
    Idle(IdleArgs),
}

#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    /// Address and port; port 0 takes a free one.
    #[arg(long, value_name = "ADDR")]
    listen: SocketAddr,
    /// What to do with connections.
    #[arg(long, value_enum, default_value = "echo")]
    mode: Mode,
    /// Threads [default: one per CPU].
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
    /// CPUs to run on, for example 0,1.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    cpus: Vec<usize>,
    /// Print `accepted PEER` for every connection.
    #[arg(long)]
    print_peers: bool,
}

impl ServeArgs {
    pub(crate) fn options(&self) -> serve::Options {
        serve::Options {
            listen: self.listen,
            mode: self.mode,
            threads: self.threads,
            cpus: self.cpus.clone(),
            print_peers: self.print_peers,
        }
    }
}

/// Arguments all clients share.
#[derive(Args, Debug)]
pub(crate) struct Common {
    /// Server as ADDRESS:PORT or NAME:PORT; of a name's addresses the first that answers.
    #[arg(long, value_name = "ADDR")]
    to: Target,
    /// Source address.
    #[arg(long, value_name = "IP")]
    bind: Option<IpAddr>,
    /// Threads [default: one per CPU, at most one per connection].
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
    /// CPUs to run on, for example 0,1.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    cpus: Vec<usize>,
    /// Longest wait for a connection.
    #[arg(long, value_name = "S", default_value = "5", value_parser = seconds)]
    connect_timeout: Duration,
    /// Longest wait for a response.
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds)]
    timeout: Duration,
    /// How long requests under way at the end may still finish.
    #[arg(long, value_name = "S", default_value = "2", value_parser = seconds)]
    grace: Duration,
    /// A line per second on stderr even if it is not a terminal.
    #[arg(long)]
    progress: bool,
    /// Print `measuring` and `measured` on stdout as the measured time begins and ends, for
    /// programs that sample other processes; replaces the progress line.
    #[arg(long, conflicts_with = "progress")]
    markers: bool,
    /// Do not measure what the generator itself costs before the run (0.15 s; never with
    /// --markers).
    #[arg(long)]
    no_calibration: bool,
}

impl Common {
    /// What the generator itself costs, unless that is not wanted.
    pub(crate) fn calibrate(&self) -> Option<Calibration> {
        let wanted = !self.no_calibration && !self.markers;
        wanted.then(|| Calibration::measure(&self.cpus)).flatten()
    }

    fn client(&self, connections: usize, stop: Arc<AtomicBool>) -> Client {
        let (to, refused) = self.to.choose(self.bind, self.connect_timeout);
        for failure in refused {
            eprintln!("loadgen: {failure}");
        }
        let mut client = Client::new(to);
        client.bind = self.bind;
        client.connections = connections;
        client.threads = self.threads;
        client.cpus = self.cpus.clone();
        client.connect_timeout = self.connect_timeout;
        client.request_timeout = self.timeout;
        client.grace = self.grace;
        client.progress = self.progress.then_some(true);
        client.markers = self.markers;
        client.stop = stop;
        client
    }
}

#[derive(Args, Debug)]
pub(crate) struct Times {
    /// Measured time in seconds (also 500ms, 2m).
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds)]
    duration: Duration,
    /// Load before that, excluded from the results.
    #[arg(long, value_name = "S", default_value = "1", value_parser = seconds)]
    warmup: Duration,
}

#[derive(Args, Debug)]
pub(crate) struct Output {
    /// Write the results as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write the latency distribution for HdrHistogram plotters, in us.
    #[arg(long, value_name = "FILE")]
    pub(crate) hgrm: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct RrArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    times: Times,
    /// Connections, over all threads.
    #[arg(long, value_name = "N", default_value = "1")]
    connections: usize,
    /// Bytes per request and per response: BYTES, uniform:LOW-HIGH, or BYTES:WEIGHT,...
    #[arg(long, value_name = "SIZES", default_value = "64")]
    size: Sizes,
    /// Search the highest rate at which a quantile stays below a bound, for example 'p99<2ms';
    /// --duration is that of every step.
    #[arg(long, value_name = "QUANTILE<TIME", conflicts_with = "rate")]
    max_sustainable: Option<Objective>,
    /// Open loop: requests per second over all connections; latency counts from the intended
    /// send time. Without it the loop is closed.
    #[arg(long, value_name = "R")]
    rate: Option<f64>,
    /// Spacing of an open loop's requests.
    #[arg(long, value_enum, default_value = "constant")]
    arrivals: Arrivals,
    /// Compare every response with its request.
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

impl RrArgs {
    pub(crate) fn common(&self) -> &Common {
        &self.common
    }

    /// What to search for, and how arrivals are spaced meanwhile.
    pub(crate) fn search(&self) -> Option<(&Objective, Arrivals)> {
        Some((self.max_sustainable.as_ref()?, self.arrivals))
    }

    pub(crate) fn options(&self, stop: Arc<AtomicBool>) -> rr::Options {
        let mut client = self.common.client(self.connections, stop);
        client.duration = self.times.duration;
        client.warmup = self.times.warmup;
        let pacing = match self.rate {
            None => Pacing::Closed,
            Some(rate) => Pacing::Open {
                rate,
                arrivals: self.arrivals,
            },
        };
        rr::Options {
            client,
            sizes: self.size.clone(),
            pacing,
            verify: self.verify,
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct StreamArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    times: Times,
    /// Connections, over all threads.
    #[arg(long, value_name = "N", default_value = "1")]
    connections: usize,
    /// Which way the bytes go.
    #[arg(long, value_enum, default_value = "up")]
    direction: Direction,
    /// Check received bytes against the pattern the servers send.
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

impl StreamArgs {
    pub(crate) fn common(&self) -> &Common {
        &self.common
    }

    pub(crate) fn options(&self, stop: Arc<AtomicBool>) -> stream::Options {
        let mut client = self.common.client(self.connections, stop);
        client.duration = self.times.duration;
        client.warmup = self.times.warmup;
        stream::Options {
            client,
            direction: self.direction,
            verify: self.verify,
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct ConnectArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    times: Times,
    /// Connections under way at a time, over all threads.
    #[arg(long, value_name = "N", default_value = "1")]
    concurrency: usize,
    /// Bytes per request and per response.
    #[arg(long, value_name = "BYTES", default_value = "64")]
    size: usize,
    /// Compare every response with its request.
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

impl ConnectArgs {
    pub(crate) fn common(&self) -> &Common {
        &self.common
    }

    pub(crate) fn options(&self, stop: Arc<AtomicBool>) -> connect::Options {
        let mut client = self.common.client(self.concurrency, stop);
        client.duration = self.times.duration;
        client.warmup = self.times.warmup;
        connect::Options {
            client,
            size: self.size,
            verify: self.verify,
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct IdleArgs {
    #[command(flatten)]
    common: Common,
    /// Connections, over all threads.
    #[arg(long, value_name = "N", default_value = "1")]
    connections: usize,
    /// How long to hold them, in seconds (also 500ms, 2m).
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds)]
    hold: Duration,
    #[command(flatten)]
    pub(crate) output: Output,
}

impl IdleArgs {
    pub(crate) fn common(&self) -> &Common {
        &self.common
    }

    pub(crate) fn options(&self, stop: Arc<AtomicBool>) -> idle::Options {
        let mut client = self.common.client(self.connections, stop);
        client.duration = self.hold;
        client.warmup = Duration::ZERO;
        idle::Options { client }
    }
}

/// `10`, `2.5`, `500ms`, `3s` or `2m`; at most a day.
fn seconds(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text {
        t if t.ends_with("ms") => (&t[..t.len() - 2], 1e-3),
        t if t.ends_with('s') => (&t[..t.len() - 1], 1.0),
        t if t.ends_with('m') => (&t[..t.len() - 1], 60.0),
        t => (t, 1.0),
    };
    let value = number.parse::<f64>().ok().map(|n| n * unit);
    match value {
        Some(s) if (0.0..=86_400.0).contains(&s) => Ok(Duration::from_secs_f64(s)),
        _ => Err("must be a time such as 10, 2.5, 500ms or 2m, at most 86400 s".to_owned()),
    }
}

fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=1024) => Ok(n),
        _ => Err("must be 1 to 1024".to_owned()),
    }
}
