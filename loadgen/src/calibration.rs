//! What the generator itself costs: the floor under everything it reports.

use std::fmt;
use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::pacing::Pacing;
use crate::report::Report;
use crate::rr;
use crate::serve::{self, Mode, Server};
use crate::size::Sizes;
use crate::worker::Client;

const CLOCK_READINGS: u32 = 20_000;
const WARMUP: Duration = Duration::from_millis(30);
const DURATION: Duration = Duration::from_millis(120);

/// The generator against an echo server of its own over loopback, one connection: no latency it
/// reports of anything else can be below this.
#[derive(Clone, Copy, Debug)]
pub struct Calibration {
    /// One reading of the clock, in ns.
    pub clock_ns: f64,
    /// Median round trip, in µs.
    pub floor_p50_us: f64,
    /// 99th percentile of the round trip, in µs.
    pub floor_p99_us: f64,
    /// CPU time of client and server together per round trip, in µs.
    pub cpu_us_per_request: f64,
}

impl Calibration {
    /// Measures for some 0.15 s. `None` where there is no loopback to measure on.
    #[must_use]
    pub fn measure(cpus: &[usize]) -> Option<Self> {
        let begun = Instant::now();
        for _ in 0..CLOCK_READINGS {
            black_box(Instant::now());
        }
        let clock_ns = begun.elapsed().as_nanos() as f64 / f64::from(CLOCK_READINGS);
        let server = Server::start(&serve::Options {
            listen: (Ipv4Addr::LOCALHOST, 0).into(),
            mode: Mode::Echo,
            threads: Some(1),
            cpus: cpus.to_vec(),
            print_peers: false,
        })
        .ok()?;
        let mut client = Client::new(server.address());
        client.cpus = cpus.to_vec();
        client.threads = Some(1);
        client.warmup = WARMUP;
        client.duration = DURATION;
        client.connect_timeout = Duration::from_millis(200);
        let report = rr::run(&rr::Options {
            client,
            sizes: Sizes::Fixed(64),
            pacing: Pacing::Closed,
            verify: false,
        });
        // A server that counted errors has served all the same.
        let _ = server.stop();
        let report = report.ok().filter(|report| report.ok() > 0)?;
        Some(Self {
            clock_ns,
            floor_p50_us: report.metric("p50_us")?,
            floor_p99_us: report.metric("p99_us")?,
            cpu_us_per_request: report.generator_cpu_us_per_request()?,
        })
    }

    /// Says in a report what the generator itself costs.
    pub fn note_in(&self, report: &mut Report) {
        report.set_floor(self.json(), self.to_string());
    }

    fn json(&self) -> Value {
        json!({
            "clock_ns": self.clock_ns,
            "floor_p50_us": self.floor_p50_us,
            "floor_p99_us": self.floor_p99_us,
            "cpu_us_per_request": self.cpu_us_per_request,
        })
    }
}

impl fmt::Display for Calibration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "generator: own echo over loopback {:.1} us median, {:.1} us 99 %, {:.1} us of CPU \
             per request; clock {:.0} ns",
            self.floor_p50_us, self.floor_p99_us, self.cpu_us_per_request, self.clock_ns
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_above_nothing_and_the_clock_below_the_floor() {
        let own = Calibration::measure(&[]).unwrap();
        assert!(
            own.floor_p50_us > 0.5 && own.floor_p50_us <= own.floor_p99_us,
            "{own:?}"
        );
        assert!(own.clock_ns / 1e3 < own.floor_p50_us, "{own:?}");
        assert!(own.cpu_us_per_request > 0.5, "{own:?}");
    }
}
