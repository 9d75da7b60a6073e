//! The log sink: lines from many threads to one writer thread, without ever waiting for output.
//!
//! Every producer has a bounded queue of bytes. The writer swaps a queue's buffer for an empty one
//! and writes outside the lock, so a lock is held for the copy of a line or for a swap, never for
//! a system call, and the two buffers of a queue are reused for ever. A queue that is full because
//! output has stalled drops new lines, counts them, and says so in the log when output goes on.
//!
//! A worker's queue has two slots: the writer holds one at a time, so the worker always gets the
//! other and never waits, not even for a preempted writer.
//!
//! While there is nothing to write the writer sleeps and costs nothing; the first line after that
//! wakes it (one futex call), and until it sleeps again lines cost no system call.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant, SystemTime};

use crate::text::{LogFormat, Timestamps, append_json_string, infallible};

/// How long the writer gathers lines before it writes them.
const GATHER: Duration = Duration::from_millis(10);
/// A drop notice is written at most this often.
const NOTICE_INTERVAL: Duration = Duration::from_secs(1);

/// Bytes one queue holds before it drops lines, unless told otherwise.
pub const QUEUE_BYTES_DEFAULT: usize = 1 << 20;

/// One of the two buffers of a [`LogQueue`].
type Slot = Mutex<Vec<u8>>;

/// A bounded queue of log lines from one producer. See the module's text.
#[derive(Debug)]
pub struct LogQueue {
    slots: [Slot; 2],
    slot_bytes_max: usize,
    dropped: AtomicU64,
    shared: Arc<Shared>,
}

impl LogQueue {
    /// Queues `line` (its newline included), or drops and counts it. Never waits.
    ///
    /// For one producer thread: with several, a line may be dropped because both slots are in use.
    pub fn push(&self, line: &[u8]) -> bool {
        let queued = self.slots.iter().any(|slot| match try_lock(slot) {
            Some(buffer) => append(buffer, line, self.slot_bytes_max),
            None => false,
        });
        if !queued {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        self.shared.wake();
        queued
    }

    /// Queues `line` from any of several threads; waits only while another copies its line.
    pub(crate) fn push_shared(&self, line: &[u8]) -> bool {
        let queued = append(lock(&self.slots[0]), line, self.slot_bytes_max);
        if !queued {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        self.shared.wake();
        queued
    }

    /// Lines dropped since the start.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct Shared {
    queues: Mutex<Vec<Arc<LogQueue>>>,
    sleeping: AtomicBool,
    stopping: AtomicBool,
    /// Rounds of draining that are over, and the signal that another one is.
    rounds: Mutex<u64>,
    round_over: Condvar,
    thread: OnceLock<Thread>,
}

impl Shared {
    /// Wakes the writer if it sleeps. Pairs with the fence in `Writer::sleep`: either this sees
    /// `sleeping`, or the writer sees the line that was queued before.
    fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed)
            && self.sleeping.swap(false, Ordering::Relaxed)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }
}

/// The handle of a sink: makes queues, and flushes. Clones share the sink.
#[derive(Clone, Debug)]
pub struct LogSink {
    shared: Arc<Shared>,
    process: Arc<LogQueue>,
    queue_bytes: usize,
    format: LogFormat,
}

impl LogSink {
    /// A sink that writes to standard output.
    ///
    /// # Errors
    /// The writer thread cannot be started.
    pub fn stdout(format: LogFormat) -> io::Result<Self> {
        Self::new(format, QUEUE_BYTES_DEFAULT, io::stdout())
    }

    /// A sink that writes to `output`, with queues of `queue_bytes` bytes each.
    ///
    /// # Errors
    /// The writer thread cannot be started.
    pub fn new(
        format: LogFormat,
        queue_bytes: usize,
        output: impl Write + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            queues: Mutex::default(),
            sleeping: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            rounds: Mutex::new(0),
            round_over: Condvar::new(),
            thread: OnceLock::new(),
        });
        let process = new_queue(&shared, queue_bytes);
        let mut writer = Writer {
            shared: Arc::clone(&shared),
            output: Box::new(output),
            spare: Vec::new(),
            reported: 0,
            noticed: None,
            format,
            stamps: Timestamps::default(),
        };
        let handle = thread::Builder::new()
            .name("log-writer".to_owned())
            .spawn(move || writer.run())?;
        // Set once, here; a wake-up before it is made up for by the writer's own timed look.
        let _first = shared.thread.set(handle.thread().clone());
        Ok(Self {
            shared,
            process,
            queue_bytes,
            format,
        })
    }

    /// A queue for one more producer, for the life of the sink.
    pub fn queue(&self) -> Arc<LogQueue> {
        new_queue(&self.shared, self.queue_bytes)
    }

    /// The queue that threads outside the data path share.
    pub(crate) fn process_queue(&self) -> &Arc<LogQueue> {
        &self.process
    }

    /// The format of the lines that this sink writes by itself.
    pub fn format(&self) -> LogFormat {
        self.format
    }

    /// Lines dropped by all queues since the start.
    pub fn dropped(&self) -> u64 {
        lock(&self.shared.queues)
            .iter()
            .map(|queue| queue.dropped())
            .sum()
    }

    /// Waits until what is queued now has been written, at most for `timeout`; tells whether it
    /// was. Output that has stalled costs the process no more than that at its end.
    pub fn flush(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut rounds = lock(&self.shared.rounds);
        // The round under way may be past our queue; the one after it is not.
        let wanted = *rounds + 2;
        while *rounds < wanted {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            if let Some(thread) = self.shared.thread.get() {
                thread.unpark();
            }
            let step = left.min(GATHER);
            let waited = self.shared.round_over.wait_timeout(rounds, step);
            rounds = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Ends the writer thread after one more round; for tests and orderly ends.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        if let Some(thread) = self.shared.thread.get() {
            thread.unpark();
        }
    }
}

fn new_queue(shared: &Arc<Shared>, queue_bytes: usize) -> Arc<LogQueue> {
    let queue = Arc::new(LogQueue {
        slots: [Slot::default(), Slot::default()],
        slot_bytes_max: queue_bytes / 2,
        dropped: AtomicU64::new(0),
        shared: Arc::clone(shared),
    });
    lock(&shared.queues).push(Arc::clone(&queue));
    queue
}

struct Writer {
    shared: Arc<Shared>,
    output: Box<dyn Write + Send>,
    spare: Vec<u8>,
    reported: u64,
    noticed: Option<Instant>,
    format: LogFormat,
    stamps: Timestamps,
}

impl Writer {
    fn run(&mut self) {
        loop {
            let stopping = self.shared.stopping.load(Ordering::Acquire);
            let wrote = self.round();
            *lock(&self.shared.rounds) += 1;
            self.shared.round_over.notify_all();
            if stopping {
                return;
            }
            if wrote {
                thread::park_timeout(GATHER);
            } else {
                self.sleep();
            }
        }
    }

    /// Writes what is queued now; tells whether there was anything.
    fn round(&mut self) -> bool {
        let queues = lock(&self.shared.queues).clone();
        let mut wrote = false;
        for queue in &queues {
            for slot in &queue.slots {
                self.spare.clear();
                std::mem::swap(&mut *lock(slot), &mut self.spare);
                if !self.spare.is_empty() {
                    wrote = true;
                    // Nowhere is left to report that output is gone; the next line tries again.
                    let _unwritable = self.output.write_all(&self.spare);
                }
            }
        }
        let noticed = self.report_drops(queues.iter().map(|queue| queue.dropped()).sum());
        if wrote || noticed {
            let _unwritable = self.output.flush();
        }
        wrote
    }

    fn report_drops(&mut self, dropped: u64) -> bool {
        let due = self
            .noticed
            .is_none_or(|at| at.elapsed() >= NOTICE_INTERVAL);
        if dropped == self.reported || !due {
            return false;
        }
        let mut line = String::new();
        let count = dropped - self.reported;
        append_notice(
            &mut line,
            self.format,
            &mut self.stamps,
            SystemTime::now(),
            count,
        );
        self.reported = dropped;
        self.noticed = Some(Instant::now());
        let _unwritable = self.output.write_all(line.as_bytes());
        true
    }

    fn sleep(&self) {
        self.shared.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let queues = lock(&self.shared.queues).clone();
        let empty = queues
            .iter()
            .flat_map(|q| &q.slots)
            .all(|slot| lock(slot).is_empty());
        if empty {
            // A second, not for ever: it bounds how long a drop notice can be overdue.
            thread::park_timeout(NOTICE_INTERVAL);
        }
        self.shared.sleeping.store(false, Ordering::Relaxed);
    }
}

fn append_notice(
    line: &mut String,
    format: LogFormat,
    stamps: &mut Timestamps,
    now: SystemTime,
    count: u64,
) {
    use std::fmt::Write as _;
    const MESSAGE: &str = "log lines dropped: output is slower than the log";
    match format {
        LogFormat::Plain => {
            stamps.append(line, now);
            infallible(writeln!(
                line,
                "\twarn\ttelemetry::sink\t{MESSAGE}\tcount={count}"
            ));
        }
        LogFormat::Json => {
            line.push_str(r#"{"level":"warn","time":""#);
            stamps.append(line, now);
            line.push_str(r#"","scope":"telemetry::sink","message":"#);
            append_json_string(line, MESSAGE);
            infallible(writeln!(line, ",\"count\":{count}}}"));
        }
    }
}

fn append(mut buffer: MutexGuard<'_, Vec<u8>>, line: &[u8], bytes_max: usize) -> bool {
    let fits = buffer.len() + line.len() <= bytes_max;
    if fits {
        buffer.extend_from_slice(line);
    }
    fits
}

/// A thread that panicked with the lock held left bytes, which are worth writing all the same.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(std::sync::TryLockError::WouldBlock) => None,
    }
}

#[cfg(test)]
pub(crate) mod tests;
