//! What an attack costs: descriptors, memory and log of the ztunnels, and the latency of honest
//! connections, before, during and after.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::Serialize;

use super::arena::log_since;
use crate::network::namespace;

/// Pause between two requests of an honest connection.
const PAUSE: Duration = Duration::from_millis(4);
/// Pause between two new honest connections.
const NEW_PAUSE: Duration = Duration::from_millis(40);
/// Pause after an exchange that failed.
const FAILED_PAUSE: Duration = Duration::from_millis(200);
/// How often the ztunnels are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// An honest exchange that takes longer has failed.
const HONEST_LIMIT: Duration = Duration::from_secs(15);

/// Figures of all ztunnels together, at one time.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub(super) struct Sample {
    pub(super) descriptors: u64,
    pub(super) rss_bytes: u64,
    pub(super) cpu_ms: u64,
}

impl Sample {
    /// The larger of each.
    fn max(self, other: Self) -> Self {
        Self {
            descriptors: self.descriptors.max(other.descriptors),
            rss_bytes: self.rss_bytes.max(other.rss_bytes),
            cpu_ms: self.cpu_ms.max(other.cpu_ms),
        }
    }
}

/// The ztunnels whose figures are read.
#[derive(Clone, Debug)]
pub(super) struct Watched {
    pub(super) pids: Vec<u32>,
    pub(super) logs: Vec<PathBuf>,
}

impl Watched {
    /// How long the logs are.
    pub(super) fn log_lengths(&self) -> Vec<u64> {
        let length = |log| fs::metadata(log).map_or(0, |metadata| metadata.len());
        self.logs.iter().map(length).collect()
    }

    /// Bytes that the logs got since, but for lines about the honest: connections of `address` that
    /// ended well.
    pub(super) fn log_since(&self, lengths: &[u64], address: IpAddr) -> u64 {
        let honest = format!("src.addr={address}:");
        let mut bytes = 0;
        for (log, from) in self.logs.iter().zip(lengths) {
            let text = log_since(log, *from).unwrap_or_default();
            for line in text.lines() {
                let well = line.contains("connection complete") && !line.contains("error=");
                if !(well && line.contains(&honest)) {
                    bytes += line.len() as u64 + 1;
                }
            }
        }
        bytes
    }

    /// Reads the figures now; a process that is gone has none.
    pub(super) fn sample(&self) -> Sample {
        let mut sample = Sample::default();
        for pid in &self.pids {
            let process = Path::new("/proc").join(pid.to_string());
            sample.descriptors += descriptors(&process.join("fd"));
            let statm = fs::read_to_string(process.join("statm")).unwrap_or_default();
            let pages: u64 = field(&statm, 1);
            sample.rss_bytes += pages * 4096;
            let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
            // Behind the program's name, which may hold blanks: state is the first field.
            let rest = stat.rsplit(") ").next().unwrap_or_default();
            sample.cpu_ms += (field(rest, 11) + field(rest, 12)) * 10;
        }
        sample
    }
}

fn field(text: &str, index: usize) -> u64 {
    let found = text.split_ascii_whitespace().nth(index);
    found.and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// The size of the directory where the kernel tells it (since Linux 6.2), which costs nothing.
fn descriptors(directory: &Path) -> u64 {
    match fs::metadata(directory).map_or(0, |metadata| metadata.len()) {
        0 => fs::read_dir(directory).map_or(0, |entries| entries.count() as u64),
        count => count,
    }
}

/// Latencies of honest exchanges in some span of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Latency {
    pub(super) count: usize,
    pub(super) p50_us: u64,
    pub(super) p90_us: u64,
    pub(super) p99_us: u64,
    pub(super) failed: usize,
}

/// What honest connections met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Honest {
    /// Requests on connections that were there before, one on each CPU.
    pub(super) kept: Latency,
    /// New connections with one request.
    pub(super) new: Latency,
    /// Requests between two pods outside the mesh, on the same machine at the same time.
    pub(super) twin: Latency,
}

/// When an exchange began, how long it took, and whether it went well.
#[derive(Clone, Copy, Debug)]
struct Exchange {
    begun: Instant,
    took: Duration,
    well: bool,
}

type Log = Arc<Mutex<Vec<Exchange>>>;

/// Honest connections that go on until this is dropped.
#[derive(Debug)]
pub(super) struct Prober {
    stop: Arc<AtomicBool>,
    kept: Log,
    new: Log,
    twin: Log,
    threads: Vec<JoinHandle<()>>,
}

/// From the namespace in a file to an address.
pub(super) type Way = (PathBuf, SocketAddr);

impl Prober {
    /// Begins: `mesh` is the honest way through ztunnels, `plain` one without.
    pub(super) fn start(mesh: &Way, plain: &Way) -> Self {
        let mut prober = Self {
            stop: Arc::default(),
            kept: Log::default(),
            new: Log::default(),
            twin: Log::default(),
            threads: Vec::new(),
        };
        // A ztunnel has a worker for each CPU, and a connection goes to that of the CPU it came by.
        for cpu in cpus() {
            let log = Arc::clone(&prober.kept);
            prober.spawn(mesh, Some(cpu), log, keep_asking);
        }
        let log = Arc::clone(&prober.new);
        prober.spawn(mesh, None, log, keep_connecting);
        let log = Arc::clone(&prober.twin);
        prober.spawn(plain, None, log, keep_asking);
        prober
    }

    fn spawn(
        &mut self,
        (netns, to): &Way,
        cpu: Option<usize>,
        log: Log,
        work: fn(SocketAddr, &AtomicBool, &Log),
    ) {
        let (netns, to, stop) = (netns.clone(), *to, Arc::clone(&self.stop));
        self.threads.push(thread::spawn(move || {
            let mut set = CpuSet::new();
            if let Some(cpu) = cpu
                && set.set(cpu).is_ok()
            {
                // Unpinned it measures as well, perhaps one worker twice.
                let _ = sched_setaffinity(Pid::from_raw(0), &set);
            }
            if namespace::enter(&netns).is_ok() {
                work(to, &stop, &log);
            }
        }));
    }

    /// What was met by exchanges that began since `from`. An exchange under way counts when it has
    /// ended, so ask once the attack is over.
    pub(super) fn since(&self, from: Instant) -> Honest {
        Honest {
            kept: summary(&self.kept, from),
            new: summary(&self.new, from),
            twin: summary(&self.twin, from),
        }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that panicked has told so.
            let _ = thread.join();
        }
    }
}

fn summary(log: &Log, from: Instant) -> Latency {
    let log = log.lock().unwrap_or_else(PoisonError::into_inner);
    let since = log.iter().filter(|exchange| exchange.begun >= from);
    let mut took = Vec::new();
    let mut failed = 0;
    for exchange in since {
        took.push(exchange.took);
        failed += usize::from(!exchange.well);
    }
    took.sort_unstable();
    let at = |part: usize| {
        let index = (took.len() * part / 100).min(took.len().saturating_sub(1));
        took.get(index).map_or(0, |took| took.as_micros() as u64)
    };
    Latency {
        count: took.len(),
        p50_us: at(50),
        p90_us: at(90),
        p99_us: at(99),
        failed,
    }
}

fn cpus() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
    let all = (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false));
    all.take(4).collect()
}

fn keep_asking(to: SocketAddr, stop: &AtomicBool, log: &Log) {
    let mut kept = None;
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let result = match kept.take() {
            Some(stream) => ask(stream),
            None => connect(to).and_then(ask),
        };
        note(log, begun, result.is_ok());
        // What fails at once is not tried a hundred times a second: it would fill logs itself.
        thread::sleep(if result.is_ok() { PAUSE } else { FAILED_PAUSE });
        kept = result.ok();
    }
}

fn keep_connecting(to: SocketAddr, stop: &AtomicBool, log: &Log) {
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let result = connect(to).and_then(ask);
        note(log, begun, result.is_ok());
        thread::sleep(if result.is_ok() {
            NEW_PAUSE
        } else {
            FAILED_PAUSE
        });
    }
}

fn note(log: &Log, begun: Instant, well: bool) {
    let exchange = Exchange {
        begun,
        took: begun.elapsed(),
        well,
    };
    log.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(exchange);
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, HONEST_LIMIT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HONEST_LIMIT))?;
    stream.set_write_timeout(Some(HONEST_LIMIT))?;
    Ok(stream)
}

/// One request of an echo server; gives the connection back.
fn ask(mut stream: TcpStream) -> io::Result<TcpStream> {
    let mut echo = [0; 64];
    stream.write_all(&[7; 64])?;
    stream.read_exact(&mut echo)?;
    Ok(stream)
}

/// Looks at the ztunnels while an attack lasts.
#[derive(Debug)]
pub(super) struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Sample>,
}

impl Watch {
    pub(super) fn start(watched: &Watched) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (watched, seen) = (watched.clone(), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut most = watched.sample();
            while !seen.load(Ordering::Relaxed) {
                thread::sleep(LOOK_EVERY);
                most = most.max(watched.sample());
            }
            most
        });
        Self { stop, thread }
    }

    /// The most of each figure that was seen.
    pub(super) fn most(self) -> Sample {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_figures() {
        let watched = Watched {
            pids: vec![std::process::id()],
            logs: vec!["/proc/version".into()],
        };
        let before = watched.sample();
        assert!(before.descriptors >= 3 && before.rss_bytes > 1 << 20);
        let files: Vec<_> = (0..20).map(|_| fs::File::open("/dev/null")).collect();
        assert!(watched.sample().descriptors >= before.descriptors + 20);
        drop(files);
    }

    #[test]
    fn a_summary_is_of_what_began_in_time() {
        let from = Instant::now();
        let exchange = |ms, well| Exchange {
            begun: from + Duration::from_millis(ms),
            took: Duration::from_millis(ms),
            well,
        };
        let log: Log = Arc::new(Mutex::new(
            (0..200).map(|i| exchange(i, i != 150)).collect(),
        ));
        let summary = summary(&log, from + Duration::from_millis(100));
        assert_eq!((summary.count, summary.failed), (100, 1));
        assert_eq!((summary.p50_us, summary.p99_us), (150_000, 199_000));
    }
}
