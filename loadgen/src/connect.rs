//! A new connection for every request: connect, send, read the response, close.
//!
//! The latency covers all of it. The client closes first, so the local port stays in `TIME_WAIT`:
//! where that runs out (about 28,000 ports, unless `net.ipv4.tcp_tw_reuse` is 1 or the port range
//! is widened) failures of kind `no_local_port` appear.

use std::io::{self, Read as _, Write as _};

use mio::net::TcpStream;
use mio::{Events, Token};

use crate::error::Error;
use crate::net::{self, Progress};
use crate::outcome::Kind;
use crate::payload::Requests;
use crate::report::{Description, Report};
use crate::worker::{self, Client, Outcome, Window, Worker};

/// Pause of a slot after a failure, in ns: a refused connection must not become a busy loop.
const PAUSE: u64 = 10_000_000;
/// How often timeouts and paused slots are looked at, in ns.
const SWEEP_EVERY: u64 = 10_000_000;
const MAX_SIZE: usize = 1 << 20;
/// Bits of a token that hold the slot; the rest tells connections of one slot apart.
const SLOT_BITS: u32 = 20;

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Times and placement; `connections` is how many are under way at a time.
    pub client: Client,
    /// Bytes per request and per response; 1 to 1,048,576.
    pub size: usize,
    /// Compare every response with the request, byte by byte.
    pub verify: bool,
}

/// Runs the workload.
///
/// # Errors
///
/// A setting out of range, or an event loop that cannot run.
pub fn run(options: &Options) -> Result<Report, Error> {
    if !(1..=MAX_SIZE).contains(&options.size) {
        let value = options.size.to_string();
        return Err(Error::Setting {
            name: "--size",
            value,
            allowed: "1 to 1048576",
        });
    }
    let requests = Requests::new(options.size);
    let outcome = worker::run(&options.client, "connections", |worker| {
        // Whether anybody answers is found out while measuring.
        let Some(window) = worker.begin(worker.share.len()) else {
            return Ok(());
        };
        Loop::new(worker, &requests, options.verify, window).run()
    })?;
    Ok(Report::of(options, &outcome))
}

impl Description for Options {
    const COMMAND: &'static str = "connect";

    fn client(&self) -> &Client {
        &self.client
    }

    fn describe(&self, outcome: &Outcome, report: &mut Report) {
        let tally = &outcome.tally;
        report.set_loop("closed");
        report.set_setting("size_bytes", self.size);
        report.set_setting("verify", self.verify);
        report.set_rate("connections_per_s", tally.completed);
        report.set_latency("", &tally.latency);
        report.set("unfinished", tally.unfinished as f64);
        report.set_latency("connect_", &tally.connecting);
        report.set_distribution(&tally.latency);
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Done; begins the next connection before the next wait.
    Free,
    /// Failed; begins the next connection at this time.
    Paused {
        until: u64,
    },
    Connecting,
    Exchanging,
}

#[derive(Debug)]
struct Slot {
    stream: Option<TcpStream>,
    state: State,
    generation: usize,
    begun: u64,
    sent: usize,
    received: usize,
}

#[derive(Debug)]
struct Loop<'w, 'r> {
    worker: &'w mut Worker<'r>,
    requests: &'w Requests,
    verify: bool,
    window: Window,
    slots: Vec<Slot>,
    buffer: Vec<u8>,
    /// Slots whose connection is done and that begin the next one after this round of events.
    free: Vec<usize>,
    closing: bool,
}

impl<'w, 'r> Loop<'w, 'r> {
    fn new(
        worker: &'w mut Worker<'r>,
        requests: &'w Requests,
        verify: bool,
        window: Window,
    ) -> Self {
        let slots: Vec<Slot> = worker
            .share
            .clone()
            .map(|_| Slot {
                stream: None,
                state: State::Paused { until: 0 },
                generation: 0,
                begun: 0,
                sent: 0,
                received: 0,
            })
            .collect();
        Self {
            worker,
            requests,
            verify,
            window,
            free: Vec::with_capacity(slots.len()),
            slots,
            buffer: vec![0; (requests.size() + 1).max(16 * 1024)],
            closing: false,
        }
    }

    fn run(mut self) -> io::Result<()> {
        let mut events = self.worker.events();
        let mut next_sweep = 0;
        let mut until = self.window.until;
        loop {
            let now = self.worker.clock.now();
            if !self.closing && (now >= self.window.until || self.worker.stopped()) {
                self.closing = true;
                self.worker.end_window(&mut self.window, now);
                until = now + self.worker.client.grace.as_nanos() as u64;
            }
            let under_way = self.slots.iter().filter(|s| s.stream.is_some());
            if self.closing && (now >= until || under_way.count() == 0) {
                break;
            }
            if now >= next_sweep {
                self.sweep(now);
                next_sweep = now + SWEEP_EVERY;
            }
            for k in 0..self.free.len() {
                self.begin(self.free[k]);
            }
            self.free.clear();
            let wake = until.min(if self.any_paused() { next_sweep } else { until });
            self.worker.wait(&mut events, wake)?;
            self.take(&events);
            self.worker.publish();
        }
        let now = self.worker.clock.now();
        for i in 0..self.slots.len() {
            if self.slots[i].stream.is_some() {
                self.give_up(i, now);
                self.worker.tally.fail(Kind::Unfinished);
            }
        }
        Ok(())
    }

    fn any_paused(&self) -> bool {
        !self.closing
            && self
                .slots
                .iter()
                .any(|s| matches!(s.state, State::Paused { .. }))
    }

    fn take(&mut self, events: &Events) {
        for event in events {
            let Token(token) = event.token();
            let i = token & ((1 << SLOT_BITS) - 1);
            // An event of a connection this slot has already closed.
            if self.slots[i].generation != token >> SLOT_BITS {
                continue;
            }
            if self.slots[i].state == State::Connecting {
                self.finish_connecting(i);
            }
            if self.slots[i].state == State::Exchanging {
                self.pull(i, event.is_read_closed() || event.is_error());
            }
            if self.slots[i].state == State::Exchanging && event.is_writable() {
                self.push(i);
            }
        }
    }

    /// Begins the slot's next connection.
    fn begin(&mut self, i: usize) {
        if self.closing {
            return;
        }
        let slot = &mut self.slots[i];
        // Wraps long before the token's bits end, far longer than a round of events lasts.
        slot.generation = (slot.generation + 1) & 0xffff_ffff;
        slot.begun = self.worker.clock.now();
        slot.sent = 0;
        slot.received = 0;
        match self.worker.dial(Token(slot.generation << SLOT_BITS | i)) {
            Ok(stream) => {
                slot.stream = Some(stream);
                slot.state = State::Connecting;
            }
            Err(kind) => self.fail(i, kind),
        }
    }

    fn finish_connecting(&mut self, i: usize) {
        let Some(stream) = &self.slots[i].stream else {
            return;
        };
        match net::established(stream) {
            Ok(true) => {
                let now = self.worker.clock.now();
                let slot = &mut self.slots[i];
                slot.state = State::Exchanging;
                let measured = now >= self.window.from;
                self.worker.tally.connect(now - slot.begun, measured);
                self.push(i);
            }
            Ok(false) => {}
            Err(e) => self.fail(i, Kind::of_connect(&e)),
        }
    }

    fn push(&mut self, i: usize) {
        let request = self.requests.of(self.worker.share.start + i);
        let slot = &mut self.slots[i];
        let Some(stream) = &mut slot.stream else {
            return;
        };
        while slot.sent < request.len() {
            match net::progress(stream.write(&request[slot.sent..])) {
                Ok(Progress::Moved(n)) => {
                    slot.sent += n;
                    let measured = self.window.contains(slot.begun);
                    self.worker.tally.moved(n, 0, measured);
                }
                Ok(Progress::Blocked | Progress::Ended) => return,
                Err(e) => return self.fail(i, Kind::of_io(&e)),
            }
        }
    }

    fn pull(&mut self, i: usize, closed: bool) {
        while let Some(stream) = &mut self.slots[i].stream {
            let n = match net::progress(stream.read(&mut self.buffer)) {
                Ok(Progress::Moved(n)) => n,
                Ok(Progress::Blocked) => return,
                Ok(Progress::Ended) => return self.fail(i, Kind::ClosedEarly),
                Err(e) => return self.fail(i, Kind::of_io(&e)),
            };
            let request = self.requests.of(self.worker.share.start + i);
            let slot = &mut self.slots[i];
            let end = slot.received + n;
            if end > slot.sent {
                return self.fail(i, Kind::ExcessBytes);
            }
            if self.verify && request[slot.received..end] != self.buffer[..n] {
                return self.fail(i, Kind::ContentMismatch);
            }
            slot.received = end;
            let now = self.worker.clock.now();
            self.worker.tally.moved(0, n, self.window.contains(now));
            if end == request.len() {
                return self.finish(i);
            }
            if n < self.buffer.len() && !closed {
                return;
            }
        }
    }

    /// Closes the connection of a complete exchange and counts it.
    fn finish(&mut self, i: usize) {
        self.slots[i].stream = None;
        self.slots[i].state = State::Free;
        let now = self.worker.clock.now();
        // Also what began before the window: a stall that reaches into it is a stall in it.
        if now >= self.window.from {
            self.worker.tally.latency.record(now - self.slots[i].begun);
            self.worker.tally.ok += 1;
        }
        self.worker.tally.complete(self.window.contains(now));
        self.free.push(i);
    }

    fn fail(&mut self, i: usize, kind: Kind) {
        self.worker.tally.fail(kind);
        self.slots[i].stream = None;
        self.slots[i].state = State::Paused {
            until: self.worker.clock.now() + PAUSE,
        };
    }

    /// Counts the age of an exchange that is given up, if it outlived the warm-up.
    fn give_up(&mut self, i: usize, now: u64) {
        let slot = &self.slots[i];
        if now < self.window.from {
            return;
        }
        let age = now - slot.begun;
        self.worker.tally.give_up(age);
        if slot.state == State::Connecting {
            self.worker.tally.connecting.record(age);
        }
    }

    fn sweep(&mut self, now: u64) {
        let connect_timeout = self.worker.client.connect_timeout.as_nanos() as u64;
        let request_timeout = self.worker.client.request_timeout.as_nanos() as u64;
        for i in 0..self.slots.len() {
            let slot = &self.slots[i];
            match slot.state {
                State::Paused { until } if now >= until => self.begin(i),
                State::Connecting if now >= slot.begun + connect_timeout => {
                    self.give_up(i, now);
                    self.fail(i, Kind::ConnectTimeout);
                }
                State::Exchanging if now >= slot.begun + request_timeout => {
                    self.give_up(i, now);
                    self.fail(i, Kind::Timeout);
                }
                _ => {}
            }
        }
    }
}
