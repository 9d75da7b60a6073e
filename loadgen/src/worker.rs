//! What every client command shares: options, worker threads, phases, progress.

use std::io::{self, IsTerminal as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::error::Error;
use crate::net;
use crate::outcome::Kind;
use crate::stats::Tally;

/// Connections one worker dials at a time, so that a server's accept queue is not overrun.
const DIALS_AT_A_TIME: usize = 64;
/// Longest sleep of a worker: how late it notices Ctrl-C.
const TICK: Duration = Duration::from_millis(100);
/// Events taken from the kernel at a time.
const EVENTS: usize = 1024;
const MAX_CONNECTIONS: usize = 1 << 20;

/// Settings all client commands have.
#[derive(Clone, Debug)]
pub struct Client {
    /// Where to connect.
    pub to: SocketAddr,
    /// Source address; `None`: the kernel's choice.
    pub bind: Option<IpAddr>,
    /// Connections kept (for `connect`: at a time), over all threads; 1 to 1,048,576.
    pub connections: usize,
    /// Threads; `None`: as many as CPUs (those of `cpus` if given), at most one per connection.
    pub threads: Option<usize>,
    /// CPUs the threads are bound to, in turn; empty: not bound.
    pub cpus: Vec<usize>,
    /// Load before the measured window.
    pub warmup: Duration,
    /// The measured window.
    pub duration: Duration,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest wait for a response.
    pub request_timeout: Duration,
    /// How long requests may finish after the window.
    pub grace: Duration,
    /// A line per second on stderr; `None`: if it is a terminal.
    pub progress: Option<bool>,
    /// Print `measuring` and `measured` on stdout when the window begins and ends, for a program
    /// that samples counters of other processes then.
    pub markers: bool,
    /// Set from outside (Ctrl-C) to end the run early; results count up to then.
    pub stop: Arc<AtomicBool>,
}

impl Client {
    /// The defaults of the command line for everything but the address.
    #[must_use]
    pub fn new(to: SocketAddr) -> Self {
        Self {
            to,
            bind: None,
            connections: 1,
            threads: None,
            cpus: Vec::new(),
            warmup: Duration::from_secs(1),
            duration: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(10),
            grace: Duration::from_secs(2),
            progress: Some(false),
            markers: false,
            stop: Arc::default(),
        }
    }

    /// The number of threads that will run.
    #[must_use]
    pub fn thread_count(&self) -> usize {
        let cpus = match self.cpus.len() {
            0 => thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        self.threads
            .unwrap_or(cpus)
            .clamp(1, self.connections.max(1))
    }

    fn check(&self) -> Result<(), Error> {
        let out_of_range = |name, value: String, allowed| {
            Err(Error::Setting {
                name,
                value,
                allowed,
            })
        };
        if !(1..=MAX_CONNECTIONS).contains(&self.connections) {
            let value = self.connections.to_string();
            return out_of_range("--connections", value, "1 to 1048576");
        }
        if self.duration.is_zero() {
            return out_of_range("--duration", "0".to_owned(), "longer than 0");
        }
        Ok(())
    }
}

/// ns since the program began to set up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn now(self) -> u64 {
        // 584 years fit.
        self.0.elapsed().as_nanos() as u64
    }
}

/// The measured window, in ns of the run's [`Clock`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) start: u64,
    pub(crate) from: u64,
    pub(crate) until: u64,
}

impl Window {
    pub(crate) fn contains(&self, at: u64) -> bool {
        (self.from..self.until).contains(&at)
    }
}

/// Counters of one worker for the progress line, on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Slot {
    done: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    clock: Clock,
    barrier: Barrier,
    established: AtomicUsize,
    start: AtomicU64,
    /// When the last worker ended its window, in ns of the clock; 0 before.
    ended: AtomicU64,
    slots: Vec<Slot>,
}

/// One thread's event loop and what it counts.
#[derive(Debug)]
pub(crate) struct Worker<'r> {
    pub(crate) client: &'r Client,
    pub(crate) poll: Poll,
    pub(crate) clock: Clock,
    /// The run's connections this worker has.
    pub(crate) share: Range<usize>,
    pub(crate) tally: Tally,
    shared: &'r Shared,
    slot: usize,
    begun: bool,
}

impl Worker<'_> {
    /// Ends the connect phase: waits for the other workers and starts the clock of the run.
    ///
    /// `None` if no worker has a connection: there is nothing to measure.
    pub(crate) fn begin(&mut self, established: usize) -> Option<Window> {
        self.begun = true;
        self.shared
            .established
            .fetch_add(established, Ordering::SeqCst);
        if self.shared.barrier.wait().is_leader() {
            self.shared.start.store(self.clock.now(), Ordering::SeqCst);
        }
        self.shared.barrier.wait();
        let start = self.shared.start.load(Ordering::SeqCst);
        let from = start + self.client.warmup.as_nanos() as u64;
        let until = from + self.client.duration.as_nanos() as u64;
        (self.shared.established.load(Ordering::SeqCst) > 0).then_some(Window {
            start,
            from,
            until,
        })
    }

    /// Ends the window at `now` if it lasts longer: nothing is begun after this, and what the
    /// grace period still brings is no part of any rate.
    pub(crate) fn end_window(&self, window: &mut Window, now: u64) {
        window.until = window.until.min(now);
        self.shared.ended.fetch_max(window.until, Ordering::SeqCst);
    }

    /// Whether the run was told to end early.
    pub(crate) fn stopped(&self) -> bool {
        self.client.stop.load(Ordering::Relaxed)
    }

    /// Waits for events, at most until `until` and never longer than a tick.
    pub(crate) fn wait(&mut self, events: &mut Events, until: u64) -> io::Result<()> {
        let rest = Duration::from_nanos(until.saturating_sub(self.clock.now()));
        match self.poll.poll(events, Some(rest.min(TICK))) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                events.clear();
                Ok(())
            }
            result => result,
        }
    }

    /// Makes the counts so far visible to the progress line.
    pub(crate) fn publish(&self) {
        let slot = &self.shared.slots[self.slot];
        slot.done
            .store(self.tally.completed_total, Ordering::Relaxed);
        slot.bytes.store(
            self.tally.sent_total + self.tally.received_total,
            Ordering::Relaxed,
        );
        slot.failed
            .store(self.tally.failures.total(), Ordering::Relaxed);
    }

    /// Begins one connection and watches it under `token`.
    pub(crate) fn dial(&self, token: Token) -> Result<TcpStream, Kind> {
        let begun = net::dial(self.client.to, self.client.bind);
        let mut stream = begun.map_err(|e| Kind::of_connect(&e))?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        match self.poll.registry().register(&mut stream, token, interest) {
            Ok(()) => Ok(stream),
            Err(_) => Err(Kind::ConnectOther),
        }
    }

    /// Connects this worker's share, watched under tokens 0.. in order. Failures are counted and
    /// leave `None`.
    pub(crate) fn establish(&mut self) -> io::Result<Vec<Option<TcpStream>>> {
        let mut streams: Vec<Option<TcpStream>> = Vec::new();
        streams.resize_with(self.share.len(), || None);
        let mut events = self.events();
        let mut begun_at = vec![0; streams.len()];
        let mut pending: Vec<usize> = Vec::with_capacity(DIALS_AT_A_TIME);
        let mut next = 0;
        let timeout = self.client.connect_timeout.as_nanos() as u64;
        while (next < streams.len() || !pending.is_empty()) && !self.stopped() {
            while next < streams.len() && pending.len() < DIALS_AT_A_TIME {
                begun_at[next] = self.clock.now();
                match self.dial(Token(next)) {
                    Ok(stream) => {
                        streams[next] = Some(stream);
                        pending.push(next);
                    }
                    Err(kind) => self.tally.fail(kind),
                }
                next += 1;
            }
            let until = self.clock.now() + TICK.as_nanos() as u64;
            self.wait(&mut events, until)?;
            let now = self.clock.now();
            pending.retain(|&i| {
                let Some(stream) = &streams[i] else {
                    return false;
                };
                let kind = match net::established(stream) {
                    Ok(true) => {
                        self.tally.connect(now - begun_at[i], true);
                        return false;
                    }
                    Ok(false) if now - begun_at[i] < timeout => return true,
                    Ok(false) => {
                        self.tally.connecting.record(now - begun_at[i]);
                        Kind::ConnectTimeout
                    }
                    Err(e) => Kind::of_connect(&e),
                };
                self.tally.fail(kind);
                streams[i] = None;
                false
            });
        }
        // Only after Ctrl-C is anything left undecided.
        for i in pending {
            let age = self.clock.now() - begun_at[i];
            self.tally.connecting.record(age);
            self.tally.fail(Kind::Unfinished);
            streams[i] = None;
        }
        Ok(streams)
    }

    /// An event buffer of the usual size.
    pub(crate) fn events(&self) -> Events {
        Events::with_capacity(EVENTS)
    }
}

/// What a run came to.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) tally: Tally,
    /// Length of the measured window in s, shorter than asked for after Ctrl-C.
    pub(crate) measured_s: f64,
    pub(crate) interrupted: bool,
    pub(crate) established: usize,
    /// CPU time this process used from the first dial to the end, in s.
    pub(crate) cpu_s: f64,
}

/// Runs `work` on every thread and merges what the workers counted.
///
/// `unit` names what the progress line counts.
pub(crate) fn run<W>(client: &Client, unit: &str, work: W) -> Result<Outcome, Error>
where
    W: Fn(&mut Worker<'_>) -> io::Result<()> + Sync,
{
    client.check()?;
    let threads = client.thread_count();
    let shared = Shared {
        clock: Clock(Instant::now()),
        barrier: Barrier::new(threads),
        established: AtomicUsize::new(0),
        start: AtomicU64::new(0),
        ended: AtomicU64::new(0),
        slots: (0..threads).map(|_| Slot::default()).collect(),
    };
    let cpu_before = process_cpu_s();
    let mut workers = Vec::with_capacity(threads);
    for index in 0..threads {
        let poll = Poll::new().map_err(Error::worker("create an epoll instance"))?;
        workers.push(Worker {
            client,
            poll,
            clock: shared.clock,
            share: share(client.connections, threads, index),
            tally: Tally::default(),
            shared: &shared,
            slot: index,
            begun: false,
        });
    }
    let tallies = in_threads(client, &shared, workers, unit, &work)?;
    let mut tally = Tally::default();
    for one in &tallies {
        tally.merge(one);
    }
    let interrupted = client.stop.load(Ordering::Relaxed);
    let mut measured = client.duration;
    if interrupted {
        let start = shared.start.load(Ordering::SeqCst) + client.warmup.as_nanos() as u64;
        let ended = shared.ended.load(Ordering::SeqCst);
        let so_far = Duration::from_nanos(ended.saturating_sub(start));
        measured = measured.min(so_far);
    }
    Ok(Outcome {
        tally,
        measured_s: measured.as_secs_f64(),
        interrupted,
        established: shared.established.load(Ordering::SeqCst),
        cpu_s: process_cpu_s() - cpu_before,
    })
}

fn in_threads<W>(
    client: &Client,
    shared: &Shared,
    workers: Vec<Worker<'_>>,
    unit: &str,
    work: &W,
) -> Result<Vec<Tally>, Error>
where
    W: Fn(&mut Worker<'_>) -> io::Result<()> + Sync,
{
    let (done, finished) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let mut handles = Vec::with_capacity(workers.len());
        for mut worker in workers {
            let done = done.clone();
            handles.push(scope.spawn(move || {
                let pinned = pin(&client.cpus, worker.slot);
                let result = pinned
                    .and_then(|()| work(&mut worker).map_err(Error::worker("drive connections")));
                if !worker.begun {
                    // The others wait for this one.
                    worker.begin(0);
                }
                drop(done);
                result.map(|()| worker.tally)
            }));
        }
        drop(done);
        if client.markers {
            mark(client, shared, &finished);
        } else {
            show_progress(client, shared, unit, &finished);
        }
        handles
            .into_iter()
            .enumerate()
            .map(|(i, handle)| handle.join().map_err(|_| Error::Panicked(i))?)
            .collect()
    })
}

/// Binds the calling thread to one of `cpus`, if there are any.
pub(crate) fn pin(cpus: &[usize], worker: usize) -> Result<(), Error> {
    if cpus.is_empty() {
        return Ok(());
    }
    let cpu = cpus[worker % cpus.len()];
    let mut set = CpuSet::new();
    set.set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .map_err(|e| Error::Pin {
            cpu,
            source: e.into(),
        })
}

/// Worker `index`'s part of `connections`: contiguous, sizes differing by at most one.
fn share(connections: usize, threads: usize, index: usize) -> Range<usize> {
    let at = |i: usize| i * connections / threads;
    at(index)..at(index + 1)
}

/// CPU time of this process so far, user and system, in s.
fn process_cpu_s() -> f64 {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike as _;
    getrusage(UsageWho::RUSAGE_SELF).map_or(0.0, |usage| {
        let us = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
        us as f64 / 1e6
    })
}

/// Prints when the measured window begins and ends; returns after that or when the workers ended.
fn mark(client: &Client, shared: &Shared, finished: &mpsc::Receiver<()>) {
    let wait = |until: &dyn Fn() -> Option<u64>| {
        loop {
            let now = shared.clock.now();
            let rest = match until() {
                Some(at) if now >= at => return true,
                Some(at) => Duration::from_nanos(at - now),
                None => Duration::from_millis(2),
            };
            if finished.recv_timeout(rest) != Err(mpsc::RecvTimeoutError::Timeout) {
                return false;
            }
        }
    };
    let after = |time: Duration| {
        let start = shared.start.load(Ordering::SeqCst);
        (start > 0).then(|| start + time.as_nanos() as u64)
    };
    // A reader that went away does not want to know.
    if wait(&|| after(client.warmup)) {
        let _ = writeln!(io::stdout(), "measuring");
        // Workers that end a moment before this thread wakes end the window as well.
        wait(&|| after(client.warmup + client.duration));
        let _ = writeln!(io::stdout(), "measured");
    }
}

/// Prints a line per second until every worker has dropped its end of the channel.
fn show_progress(client: &Client, shared: &Shared, unit: &str, finished: &mpsc::Receiver<()>) {
    let show = client
        .progress
        .unwrap_or_else(|| io::stderr().is_terminal());
    let total = (client.warmup + client.duration).as_secs_f64();
    let sum = |f: fn(&Slot) -> &AtomicU64| -> u64 {
        shared
            .slots
            .iter()
            .map(|slot| f(slot).load(Ordering::Relaxed))
            .sum()
    };
    let (mut last_done, mut last_bytes, mut last_at) = (0, 0, shared.clock.now());
    let second = Duration::from_secs(1);
    while let Err(mpsc::RecvTimeoutError::Timeout) = finished.recv_timeout(second) {
        if !show {
            continue;
        }
        let (done, bytes, failed) = (sum(|s| &s.done), sum(|s| &s.bytes), sum(|s| &s.failed));
        let now = shared.clock.now();
        let seconds = (now - last_at) as f64 / 1e9;
        let (phase, at) = match shared.start.load(Ordering::SeqCst) {
            0 => ("connecting", 0.0),
            start => match now.saturating_sub(start) as f64 / 1e9 {
                t if t < client.warmup.as_secs_f64() => ("warm-up", t),
                t if t < total => ("measuring", t),
                t => ("finishing", t),
            },
        };
        // Nobody to tell if stderr is closed.
        let _ = writeln!(
            io::stderr(),
            "{at:6.1}/{total:.0} s  {phase:10}  {:9.0} {unit}/s  {:9.1} MB/s  {failed} failed",
            (done - last_done) as f64 / seconds,
            (bytes - last_bytes) as f64 / seconds / 1e6,
        );
        (last_done, last_bytes, last_at) = (done, bytes, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_connection_has_exactly_one_worker() {
        for (connections, threads) in [(1, 1), (7, 3), (256, 5)] {
            let all: Vec<usize> = (0..threads)
                .flat_map(|i| share(connections, threads, i))
                .collect();
            assert_eq!(all, (0..connections).collect::<Vec<_>>());
        }
    }

    #[test]
    fn there_are_no_threads_without_connections() {
        let mut client = Client::new(([127, 0, 0, 1], 1).into());
        client.threads = Some(8);
        client.connections = 3;
        assert_eq!(client.thread_count(), 3);
    }
}
