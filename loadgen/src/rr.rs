//! Request/response over kept connections: sends some bytes, expects as many back.
//!
//! A connection has at most one request under way. All events of a round are read first and
//! their time taken, then the next requests are written, so that no connection waits for another
//! one's system calls more than the kernel's order makes it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{self, Read as _, Write as _};

use mio::event::Event;
use mio::net::TcpStream;
use mio::{Events, Token};

use crate::error::Error;
use crate::net::{self, Progress};
use crate::outcome::Kind;
use crate::pacing::{Pacing, Schedule};
use crate::payload::Requests;
use crate::report::{Description, Report};
use crate::size::{Random, Sizes};
use crate::timer::Timer;
use crate::worker::{self, Client, Outcome, Window, Worker};

/// Pause before a broken connection is dialled again, in ns.
const REDIAL_AFTER: u64 = 100_000_000;
/// How often timeouts are looked for, in ns.
const SWEEP_EVERY: u64 = 100_000_000;
/// An open-loop request sent later than this after its time counts as late, in ns.
const LATE_AFTER: u64 = 1_000_000;
/// A share of the schedule that may go unsent before a run counts as saturated.
const SKIPPED_TOLERATED: f64 = 0.01;
const MAX_SIZE: usize = 64 << 20;
const TIMER: Token = Token(usize::MAX);

/// What to send.
#[derive(Clone, Debug)]
pub struct Options {
    /// Connections, times and placement.
    pub client: Client,
    /// Bytes per request and per response, 1 to 67,108,864.
    pub sizes: Sizes,
    /// Closed or open loop.
    pub pacing: Pacing,
    /// Compare every response with the request, byte by byte.
    pub verify: bool,
}

/// Runs the workload.
///
/// # Errors
///
/// A setting out of range, or an event loop that cannot run. Requests that fail are not errors
/// here but counted in the report.
pub fn run(options: &Options) -> Result<Report, Error> {
    let sizes = &options.sizes;
    if sizes.min() < 1 || sizes.max() > MAX_SIZE {
        return Err(Error::Setting {
            name: "--size",
            value: sizes.to_string(),
            allowed: "1 to 67108864",
        });
    }
    if let Pacing::Open { rate, .. } = options.pacing
        && !(rate > 0.0 && rate <= 1e9)
    {
        let value = rate.to_string();
        return Err(Error::Setting {
            name: "--rate",
            value,
            allowed: "above 0, at most 1e9",
        });
    }
    let requests = Requests::new(sizes.max());
    let outcome = worker::run(&options.client, "requests", |worker| {
        let streams = worker.establish()?;
        let established = streams.iter().flatten().count();
        let Some(window) = worker.begin(established) else {
            return Ok(());
        };
        Loop::new(worker, options, &requests, streams, window)?.run()
    })?;
    Ok(Report::of(options, &outcome))
}

impl Description for Options {
    const COMMAND: &'static str = "rr";

    fn client(&self) -> &Client {
        &self.client
    }

    fn describe(&self, outcome: &Outcome, report: &mut Report) {
        let tally = &outcome.tally;
        report.set_loop(self.pacing.label());
        match &self.sizes {
            Sizes::Fixed(size) => report.set_setting("size_bytes", *size),
            sizes => report.set_setting("size_bytes", sizes.mean()),
        }
        report.set_setting("sizes", self.sizes.to_string());
        report.set_setting("verify", self.verify);
        report.set("requests_total", tally.completed_total as f64);
        report.set_rate("requests_per_s", tally.completed);
        report.set_rate("bytes_per_s", tally.sent + tally.received);
        report.set("reconnects", tally.reconnects as f64);
        report.set_latency("", &tally.latency);
        report.set("unfinished", tally.unfinished as f64);
        if let Pacing::Open { rate, arrivals } = self.pacing {
            report.set_setting("rate", rate);
            report.set_setting("arrivals", arrivals.name());
            report.set_latency("service_", &tally.service);
            report.set("scheduled", tally.scheduled as f64);
            report.set("late", tally.late as f64);
            report.set_service_distribution(&tally.service);
            let tolerated = tally.scheduled as f64 * SKIPPED_TOLERATED;
            report.set_saturated(tally.skipped as f64 > tolerated);
        }
        report.set_distribution(&tally.latency);
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// No connection; dialled again at this time.
    Down { retry_at: u64 },
    /// Dialling since then.
    Connecting { since: u64 },
    /// Connected, nothing under way.
    Idle,
    /// A request is being sent or its response awaited.
    Busy,
}

/// One connection and its request.
#[derive(Debug)]
struct Lane {
    stream: Option<TcpStream>,
    state: State,
    /// Length of the request under way.
    size: usize,
    random: Random,
    sent: usize,
    received: usize,
    /// When the request should have been sent (closed loop: was), ns.
    intended: u64,
    /// When it was sent, ns.
    actual: u64,
    schedule: Option<Schedule>,
}

#[derive(Debug)]
struct Loop<'w, 'r> {
    worker: &'w mut Worker<'r>,
    requests: &'w Requests,
    sizes: &'w Sizes,
    verify: bool,
    window: Window,
    lanes: Vec<Lane>,
    /// First lane's number in the whole run: picks the request's bytes.
    first: usize,
    buffer: Vec<u8>,
    /// Lanes that may send now.
    ready: Vec<usize>,
    /// Open loop: idle lanes by the time of their next request.
    due: BinaryHeap<Reverse<(u64, usize)>>,
    timer: Option<Timer>,
    busy: usize,
    /// No new requests any more.
    closing: bool,
}

impl<'w, 'r> Loop<'w, 'r> {
    fn new(
        worker: &'w mut Worker<'r>,
        options: &'w Options,
        requests: &'w Requests,
        streams: Vec<Option<TcpStream>>,
        window: Window,
    ) -> io::Result<Self> {
        let first = worker.share.start;
        let connections = options.client.connections;
        let schedule = |i| match options.pacing {
            Pacing::Closed => None,
            Pacing::Open { rate, arrivals } => Some(Schedule::new(
                rate,
                arrivals,
                first + i,
                connections,
                window.start,
            )),
        };
        let lane = |(i, stream): (usize, Option<TcpStream>)| Lane {
            state: match stream {
                Some(_) => State::Idle,
                None => State::Down {
                    retry_at: window.start + REDIAL_AFTER,
                },
            },
            stream,
            size: 0,
            random: Random::of(first + i),
            sent: 0,
            received: 0,
            intended: 0,
            actual: 0,
            schedule: schedule(i),
        };
        let lanes: Vec<Lane> = streams.into_iter().enumerate().map(lane).collect();
        let timer = match options.pacing {
            Pacing::Closed => None,
            Pacing::Open { .. } => Some(Timer::new(worker.poll.registry(), TIMER)?),
        };
        Ok(Self {
            requests,
            sizes: &options.sizes,
            verify: options.verify,
            window,
            first,
            // One byte more than a response, so that a read tells whether more came.
            buffer: vec![0; (requests.size() + 1).clamp(16 * 1024, 256 * 1024)],
            ready: Vec::with_capacity(lanes.len()),
            due: BinaryHeap::with_capacity(lanes.len()),
            lanes,
            worker,
            timer,
            busy: 0,
            closing: false,
        })
    }

    fn run(mut self) -> io::Result<()> {
        let mut events = self.worker.events();
        for i in 0..self.lanes.len() {
            if self.lanes[i].state == State::Idle {
                self.enqueue(i, self.window.start);
            }
        }
        let mut next_sweep = self.window.start + SWEEP_EVERY;
        let mut until = self.window.until;
        loop {
            let now = self.worker.clock.now();
            if !self.closing && (now >= self.window.until || self.worker.stopped()) {
                self.closing = true;
                self.worker.end_window(&mut self.window, now);
                until = now + self.worker.client.grace.as_nanos() as u64;
            }
            if self.closing && (self.busy == 0 || now >= until) {
                break;
            }
            if now >= next_sweep {
                self.sweep(now);
                next_sweep = now + SWEEP_EVERY;
            }
            self.send_due(now)?;
            self.worker.wait(&mut events, until)?;
            self.take(&events);
            self.worker.publish();
        }
        self.give_up();
        Ok(())
    }

    /// Reads what has arrived on all lanes with events.
    fn take(&mut self, events: &Events) {
        for event in events {
            let Token(i) = event.token();
            if event.token() != TIMER {
                self.handle(i, event);
            }
        }
    }

    /// Starts the requests whose time has come and sets the timer for the next one.
    fn send_due(&mut self, now: u64) -> io::Result<()> {
        while let Some(&Reverse((at, i))) = self.due.peek() {
            if at > now {
                break;
            }
            self.due.pop();
            self.ready.push(i);
        }
        for k in 0..self.ready.len() {
            self.start(self.ready[k]);
        }
        self.ready.clear();
        if let (Some(timer), Some(&Reverse((at, _)))) = (&mut self.timer, self.due.peek()) {
            timer.arm(self.worker.clock.now(), at)?;
        }
        Ok(())
    }

    /// Gives an idle lane its next turn: at once, or when its schedule says.
    fn enqueue(&mut self, i: usize, now: u64) {
        if self.closing {
            return;
        }
        match &self.lanes[i].schedule {
            Some(schedule) if schedule.next() > now => self.due.push(Reverse((schedule.next(), i))),
            _ => self.ready.push(i),
        }
    }

    fn start(&mut self, i: usize) {
        let lane = &mut self.lanes[i];
        if lane.state != State::Idle || self.closing {
            return;
        }
        let now = self.worker.clock.now();
        if lane
            .schedule
            .as_ref()
            .is_some_and(|schedule| schedule.next() > now)
        {
            // A turn left over from before a reconnection; the right one is queued as well.
            return;
        }
        lane.actual = now;
        lane.intended = now;
        if let Some(schedule) = &mut lane.schedule {
            lane.intended = schedule.next();
            schedule.advance();
            if self.window.contains(lane.intended) {
                self.worker.tally.scheduled += 1;
                self.worker.tally.late += u64::from(now > lane.intended + LATE_AFTER);
            }
        }
        lane.size = self.sizes.draw(&mut lane.random);
        lane.sent = 0;
        lane.received = 0;
        lane.state = State::Busy;
        self.busy += 1;
        self.push(i);
    }

    /// Sends as much of the request as the socket takes.
    fn push(&mut self, i: usize) {
        let lane = &mut self.lanes[i];
        let request = &self.requests.of(self.first + i)[..lane.size];
        let Some(stream) = &mut lane.stream else {
            return;
        };
        while lane.sent < request.len() {
            match net::progress(stream.write(&request[lane.sent..])) {
                Ok(Progress::Moved(n)) => {
                    lane.sent += n;
                    let measured = self.window.contains(lane.actual);
                    self.worker.tally.moved(n, 0, measured);
                }
                Ok(Progress::Blocked | Progress::Ended) => return,
                Err(e) => return self.fail(i, Kind::of_io(&e)),
            }
        }
    }

    fn handle(&mut self, i: usize, event: &Event) {
        match self.lanes[i].state {
            State::Down { .. } => {}
            State::Connecting { since } => self.finish_connecting(i, since),
            State::Idle | State::Busy => {
                if event.is_readable() || event.is_read_closed() || event.is_error() {
                    self.pull(i, event.is_read_closed() || event.is_error());
                }
                if event.is_writable() && self.lanes[i].state == State::Busy {
                    self.push(i);
                }
            }
        }
    }

    fn finish_connecting(&mut self, i: usize, since: u64) {
        let Some(stream) = &self.lanes[i].stream else {
            return;
        };
        match net::established(stream) {
            Ok(true) => {
                let now = self.worker.clock.now();
                self.worker.tally.connect(now - since, true);
                self.lanes[i].state = State::Idle;
                self.enqueue(i, now);
            }
            Ok(false) => {}
            Err(e) => self.fail(i, Kind::of_connect(&e)),
        }
    }

    /// Reads until the socket is empty; a short read says so without another call, unless the
    /// peer has closed (`closed`), which no further event would tell.
    fn pull(&mut self, i: usize, closed: bool) {
        loop {
            let Some(stream) = &mut self.lanes[i].stream else {
                return;
            };
            let n = match net::progress(stream.read(&mut self.buffer)) {
                Ok(Progress::Moved(n)) => n,
                Ok(Progress::Blocked) => return,
                Ok(Progress::Ended) => return self.fail(i, Kind::ClosedEarly),
                Err(e) => return self.fail(i, Kind::of_io(&e)),
            };
            if !self.accept(i, n) {
                return;
            }
            if n < self.buffer.len() && !closed {
                return;
            }
        }
    }

    /// Accounts for `n` received bytes; false if the lane broke over them.
    fn accept(&mut self, i: usize, n: usize) -> bool {
        let now = self.worker.clock.now();
        self.worker.tally.moved(0, n, self.window.contains(now));
        let lane = &mut self.lanes[i];
        let request = &self.requests.of(self.first + i)[..lane.size];
        let end = lane.received + n;
        if lane.state != State::Busy || end > lane.sent {
            self.fail(i, Kind::ExcessBytes);
            return false;
        }
        if self.verify && request[lane.received..end] != self.buffer[..n] {
            self.fail(i, Kind::ContentMismatch);
            return false;
        }
        lane.received = end;
        if end < request.len() {
            return true;
        }
        lane.state = State::Idle;
        self.busy -= 1;
        // A closed loop has no time but that of sending, and a stall that began before the window
        // is a stall in it. In an open loop what was due before the window stays out of the
        // latencies, or a backlog of the warm-up would fill them.
        let finished_in_time = now >= self.window.from;
        if lane.intended >= self.window.from || (finished_in_time && lane.schedule.is_none()) {
            self.worker.tally.latency.record(now - lane.intended);
            if lane.schedule.is_some() {
                self.worker.tally.service.record(now - lane.actual);
            }
        }
        self.worker.tally.ok += u64::from(finished_in_time);
        self.worker.tally.complete(self.window.contains(now));
        self.enqueue(i, now);
        true
    }

    /// Counts a failure and drops the connection; it is dialled again later.
    fn fail(&mut self, i: usize, kind: Kind) {
        let lane = &mut self.lanes[i];
        // A connection the peer closes between the last response and the end is no failure.
        if lane.state == State::Busy || !self.closing {
            self.worker.tally.fail(kind);
        }
        self.busy -= usize::from(lane.state == State::Busy);
        lane.stream = None;
        lane.state = State::Down {
            retry_at: self.worker.clock.now() + REDIAL_AFTER,
        };
    }

    /// Finds lanes that wait too long, and dials those that are down.
    fn sweep(&mut self, now: u64) {
        let request_timeout = self.worker.client.request_timeout.as_nanos() as u64;
        let connect_timeout = self.worker.client.connect_timeout.as_nanos() as u64;
        for i in 0..self.lanes.len() {
            match self.lanes[i].state {
                State::Busy if now >= self.lanes[i].actual + request_timeout => {
                    self.give_up_lane(i, now);
                    self.fail(i, Kind::Timeout);
                }
                State::Connecting { since } if now >= since + connect_timeout => {
                    self.worker.tally.connecting.record(now - since);
                    self.fail(i, Kind::ConnectTimeout);
                }
                State::Down { retry_at } if now >= retry_at && !self.closing => {
                    self.worker.tally.reconnects += 1;
                    match self.worker.dial(Token(i)) {
                        Ok(stream) => {
                            self.lanes[i].stream = Some(stream);
                            self.lanes[i].state = State::Connecting { since: now };
                        }
                        Err(kind) => self.fail(i, kind),
                    }
                }
                _ => {}
            }
        }
    }

    /// Accounts at the end for all that never finished, with the age it has now: requests under
    /// way, and those that were due and never sent, which are the skipped ones.
    fn give_up(&mut self) {
        let now = self.worker.clock.now();
        for i in 0..self.lanes.len() {
            match self.lanes[i].state {
                State::Busy => {
                    self.give_up_lane(i, now);
                    self.worker.tally.fail(Kind::Unfinished);
                }
                State::Connecting { since } => self.worker.tally.connecting.record(now - since),
                State::Down { .. } | State::Idle => {}
            }
            let Some(schedule) = self.lanes[i].schedule.take() else {
                continue;
            };
            let tally = &mut self.worker.tally;
            schedule.end(self.window.from, self.window.until, |part| {
                tally.scheduled += part.count;
                tally.skipped += part.count;
                tally.unfinished += part.count;
                let (youngest, oldest) = (now - part.until, now - part.from);
                tally.latency.record_even(youngest, oldest, part.count);
            });
        }
    }

    /// Counts the age of the request under way on a lane.
    fn give_up_lane(&mut self, i: usize, now: u64) {
        let lane = &self.lanes[i];
        // What was given up in the warm-up is part of that; what outlived it is not.
        if now < self.window.from {
            return;
        }
        self.worker.tally.give_up(now - lane.intended);
        if lane.schedule.is_some() {
            self.worker.tally.service.record(now - lane.actual);
        }
    }
}
