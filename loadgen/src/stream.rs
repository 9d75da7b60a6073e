//! Bulk bytes over kept connections, in one or both directions.
//!
//! Bytes count when the socket has taken or given them, so up to a socket buffer per connection
//! is under way at the window's edges. At the end the client shuts its side down and reads until
//! the server closes, so that over the whole run both sides count the same bytes.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;

use mio::net::TcpStream;
use mio::{Events, Token};

use crate::error::Error;
use crate::net::{self, Progress};
use crate::outcome::Kind;
use crate::payload::{self, STREAM_PATTERN};
use crate::report::{Description, Report};
use crate::worker::{self, Client, Outcome, Window, Worker};

/// System calls one direction of a connection gets in a row, so that none starves the others.
const TURNS: usize = 8;
const READ_BUFFER: usize = 256 * 1024;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum Direction {
    /// Client to server (`serve --mode sink`).
    Up,
    /// Server to client (`serve --mode source`).
    Down,
    /// Both at once (`serve --mode source` or `echo`).
    Both,
}

impl Direction {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Both => "both",
        }
    }
}

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Connections, times and placement.
    pub client: Client,
    /// Which way the bytes go.
    pub direction: Direction,
    /// Check received bytes against the pattern the servers send.
    pub verify: bool,
}

/// Runs the workload.
///
/// # Errors
///
/// A setting out of range, or an event loop that cannot run.
pub fn run(options: &Options) -> Result<Report, Error> {
    let pattern = payload::pattern(STREAM_PATTERN);
    let outcome = worker::run(&options.client, "closed", |worker| {
        let streams = worker.establish()?;
        let established = streams.iter().flatten().count();
        let Some(window) = worker.begin(established) else {
            return Ok(());
        };
        Loop::new(worker, options, &pattern, streams, window).run()
    })?;
    Ok(Report::of(options, &outcome))
}

impl Description for Options {
    const COMMAND: &'static str = "stream";

    fn client(&self) -> &Client {
        &self.client
    }

    fn describe(&self, outcome: &Outcome, report: &mut Report) {
        let tally = &outcome.tally;
        report.set_setting("direction", self.direction.name());
        report.set_setting("verify", self.verify);
        report.set_rate("bytes_per_s", tally.sent + tally.received);
        report.set_rate("bytes_up_per_s", tally.sent);
        report.set_rate("bytes_down_per_s", tally.received);
        report.set("bytes_sent_total", tally.sent_total as f64);
        report.set("bytes_received_total", tally.received_total as f64);
        report.set("bytes_measured", (tally.sent + tally.received) as f64);
    }
}

#[derive(Debug)]
struct Flow {
    stream: Option<TcpStream>,
    sent: u64,
    received: u64,
    writable: bool,
    readable: bool,
    queued: bool,
}

#[derive(Debug)]
struct Loop<'w, 'r> {
    worker: &'w mut Worker<'r>,
    pattern: &'w [u8],
    sending: bool,
    verify: bool,
    window: Window,
    flows: Vec<Flow>,
    open: usize,
    buffer: Vec<u8>,
    /// Flows that may move bytes without waiting for an event.
    again: Vec<usize>,
    turn: Vec<usize>,
    closing: bool,
}

impl<'w, 'r> Loop<'w, 'r> {
    fn new(
        worker: &'w mut Worker<'r>,
        options: &Options,
        pattern: &'w [u8],
        streams: Vec<Option<TcpStream>>,
        window: Window,
    ) -> Self {
        let flow = |stream| Flow {
            stream,
            sent: 0,
            received: 0,
            writable: true,
            readable: true,
            queued: false,
        };
        let flows: Vec<Flow> = streams.into_iter().map(flow).collect();
        Self {
            worker,
            pattern,
            sending: options.direction != Direction::Down,
            verify: options.verify,
            window,
            open: flows.iter().filter(|f| f.stream.is_some()).count(),
            buffer: vec![0; READ_BUFFER],
            again: Vec::with_capacity(flows.len()),
            turn: Vec::with_capacity(flows.len()),
            flows,
            closing: false,
        }
    }

    fn run(mut self) -> io::Result<()> {
        let mut events = self.worker.events();
        for i in 0..self.flows.len() {
            self.queue(i);
        }
        let mut until = self.window.until;
        while self.open > 0 {
            let now = self.worker.clock.now();
            if !self.closing && (now >= self.window.until || self.worker.stopped()) {
                self.worker.end_window(&mut self.window, now);
                self.close();
                until = now + self.worker.client.grace.as_nanos() as u64;
            } else if self.closing && now >= until {
                break;
            }
            let wake = if self.again.is_empty() { until } else { now };
            self.worker.wait(&mut events, wake)?;
            self.note(&events);
            std::mem::swap(&mut self.turn, &mut self.again);
            for k in 0..self.turn.len() {
                let i = self.turn[k];
                self.flows[i].queued = false;
                self.pump(i);
            }
            self.turn.clear();
            self.worker.publish();
        }
        for flow in &mut self.flows {
            if flow.stream.take().is_some() {
                self.worker.tally.fail(Kind::Unfinished);
            }
        }
        Ok(())
    }

    fn note(&mut self, events: &Events) {
        for event in events {
            let Token(i) = event.token();
            let flow = &mut self.flows[i];
            flow.writable |= event.is_writable();
            flow.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
            self.queue(i);
        }
    }

    fn queue(&mut self, i: usize) {
        let flow = &mut self.flows[i];
        if flow.stream.is_some() && !flow.queued {
            flow.queued = true;
            self.again.push(i);
        }
    }

    /// Moves bytes both ways, a few calls each.
    fn pump(&mut self, i: usize) {
        for _ in 0..TURNS {
            let write = self.sending && self.flows[i].writable;
            if !(write && self.write(i)) {
                break;
            }
        }
        for _ in 0..TURNS {
            if !(self.flows[i].readable && self.read(i)) {
                break;
            }
        }
        let flow = &self.flows[i];
        if flow.readable || (flow.writable && self.sending) {
            self.queue(i);
        }
    }

    /// One write; false when there is no point in another.
    fn write(&mut self, i: usize) -> bool {
        let flow = &mut self.flows[i];
        let Some(stream) = &mut flow.stream else {
            return false;
        };
        let at = (flow.sent % self.pattern.len() as u64) as usize;
        match net::progress(stream.write(&self.pattern[at..])) {
            Ok(Progress::Moved(n)) => {
                flow.sent += n as u64;
                let measured = self.window.contains(self.worker.clock.now());
                self.worker.tally.moved(n, 0, measured);
                true
            }
            Ok(Progress::Blocked | Progress::Ended) => {
                flow.writable = false;
                false
            }
            Err(e) => self.end(i, Some(Kind::of_io(&e))),
        }
    }

    /// One read; false when there is no point in another.
    fn read(&mut self, i: usize) -> bool {
        let flow = &mut self.flows[i];
        let Some(stream) = &mut flow.stream else {
            return false;
        };
        match net::progress(stream.read(&mut self.buffer)) {
            Ok(Progress::Moved(n)) => {
                let position = flow.received;
                flow.received += n as u64;
                let measured = self.window.contains(self.worker.clock.now());
                self.worker.tally.moved(0, n, measured);
                let received = &self.buffer[..n];
                if self.verify && !payload::matches_stream(self.pattern, position, received) {
                    return self.end(i, Some(Kind::ContentMismatch));
                }
                true
            }
            Ok(Progress::Blocked) => {
                flow.readable = false;
                false
            }
            Ok(Progress::Ended) if self.closing => self.end(i, None),
            Ok(Progress::Ended) => self.end(i, Some(Kind::ClosedEarly)),
            Err(e) => self.end(i, Some(Kind::of_io(&e))),
        }
    }

    /// The flow is over: as it should be, or with a failure. Always false.
    fn end(&mut self, i: usize, failure: Option<Kind>) -> bool {
        let flow = &mut self.flows[i];
        flow.stream = None;
        flow.readable = false;
        flow.writable = false;
        self.open -= 1;
        match failure {
            Some(kind) => self.worker.tally.fail(kind),
            None => {
                self.worker.tally.ok += 1;
                self.worker.tally.complete(true);
            }
        }
        false
    }

    /// Stops sending and tells the server so.
    fn close(&mut self) {
        self.closing = true;
        self.sending = false;
        for i in 0..self.flows.len() {
            if let Some(stream) = &self.flows[i].stream
                && let Err(e) = stream.shutdown(Shutdown::Write)
            {
                self.end(i, Some(Kind::of_io(&e)));
            }
        }
    }
}
