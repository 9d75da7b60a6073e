//! Connections that are opened and held: what standing connections cost the system under test.

use std::io::{self, Read as _};

use mio::Token;
use mio::net::TcpStream;

use crate::error::Error;
use crate::net::{self, Progress};
use crate::outcome::Kind;
use crate::report::{Description, Report};
use crate::worker::{self, Client, Outcome, Worker};

/// Reads per event.
const READS: usize = 16;

/// What to do; the client's `duration` is how long connections are held, its warm-up is not used.
#[derive(Clone, Debug)]
pub struct Options {
    /// Connections, times and placement.
    pub client: Client,
}

/// Opens the connections, holds them and counts those that stand at the end.
///
/// # Errors
///
/// A setting out of range, or an event loop that cannot run.
pub fn run(options: &Options) -> Result<Report, Error> {
    let mut options = options.clone();
    options.client.warmup = std::time::Duration::ZERO;
    let outcome = worker::run(&options.client, "held", |worker| {
        let streams = worker.establish()?;
        hold(worker, streams)
    })?;
    Ok(Report::of(&options, &outcome))
}

impl Description for Options {
    const COMMAND: &'static str = "idle";

    fn client(&self) -> &Client {
        &self.client
    }

    fn describe(&self, outcome: &Outcome, report: &mut Report) {
        let tally = &outcome.tally;
        report.set("established", outcome.established as f64);
        report.set("held", tally.ok as f64);
        report.set_latency("connect_", &tally.connecting);
    }
}

fn hold(worker: &mut Worker<'_>, mut streams: Vec<Option<TcpStream>>) -> io::Result<()> {
    let established = streams.iter().flatten().count();
    let Some(mut window) = worker.begin(established) else {
        return Ok(());
    };
    let mut events = worker.events();
    let mut buffer = vec![0; 4096];
    // What happened to a connection while others were still being established raised its event
    // then, and readiness is reported once.
    for stream in &mut streams {
        look(worker, stream, &mut buffer);
    }
    while worker.clock.now() < window.until && !worker.stopped() {
        worker.wait(&mut events, window.until)?;
        for event in &events {
            let Token(i) = event.token();
            look(worker, &mut streams[i], &mut buffer);
        }
        worker.publish();
    }
    worker.end_window(&mut window, worker.clock.now());
    for _ in streams.iter().flatten() {
        worker.tally.ok += 1;
        worker.tally.complete(true);
    }
    Ok(())
}

/// Reads what a connection has, which tells whether it still stands; one that does not is counted
/// and forgotten.
fn look(worker: &mut Worker<'_>, slot: &mut Option<TcpStream>, buffer: &mut [u8]) {
    // An idle server sends nothing; what one sends all the same is thrown away, and not for ever:
    // new bytes are new events.
    for _ in 0..READS {
        let Some(stream) = slot else { return };
        let kind = match net::progress(stream.read(buffer)) {
            Ok(Progress::Moved(n)) => {
                worker.tally.moved(0, n, true);
                continue;
            }
            Ok(Progress::Blocked) => return,
            Ok(Progress::Ended) => Kind::ClosedEarly,
            Err(e) => Kind::of_io(&e),
        };
        worker.tally.fail(kind);
        *slot = None;
    }
}
