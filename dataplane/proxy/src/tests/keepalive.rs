//! Silent tunnels between healthy ends live, whatever else the machine does.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hbone::Config;
use rt::{Runtime, RuntimeConfig};

use super::{Pair, Surroundings, pair_in};

/// Tunnels that say nothing but PING.
const TUNNELS: usize = 16;

/// As many threads that only compute as there are CPUs, and one more.
struct Hog {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Hog {
    fn new() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let count = thread::available_parallelism().map_or(2, usize::from) + 1;
        let threads = (0..count).map(|_| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        });
        Self {
            threads: threads.collect(),
            stop,
        }
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

/// Silence for `time`, with the periods of PING and its answer in `ping`; every tunnel has asked
/// and been answered, and none is lost. Sometimes the worker computes for longer than an answer may
/// take.
fn silence(time: Duration, ping: (Duration, Duration), stall: bool) {
    let mut runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let main = async {
        let mut pairs: Vec<Pair> = Vec::new();
        let surroundings = Surroundings {
            ping,
            ..Surroundings::default()
        };
        for _ in 0..TUNNELS {
            pairs.push(pair_in(Config::client(), Config::server(), &surroundings).await);
        }
        let begin = Instant::now();
        let mut stalled = begin;
        while begin.elapsed() < time {
            rt::time::sleep(ping.0 / 3).await;
            if stall && stalled.elapsed() > ping.1 * 3 {
                // As a process that was suspended, or had no CPU.
                thread::sleep(ping.1 * 3 / 2);
                stalled = Instant::now();
            }
        }
        for tunnel in pairs.iter().flat_map(|pair| [&pair.client, &pair.server]) {
            assert!(tunnel.error().is_none(), "{tunnel:?} after {time:?}");
        }
        // All of them still carry a stream.
        for pair in &pairs {
            let (near, far) = pair.open().await;
            assert_eq!(Rc::as_ptr(near.tunnel()), Rc::as_ptr(&pair.client));
            drop((near, far));
        }
    };
    runtime.run(main).unwrap();
}

const SHORT: (Duration, Duration) = (Duration::from_millis(200), Duration::from_millis(400));

#[test]
fn silent_tunnels_live() {
    silence(Duration::from_secs(4), SHORT, false);
}

#[test]
fn silent_tunnels_live_beside_a_cpu_hog_and_stalls() {
    let _hog = Hog::new();
    silence(Duration::from_secs(5), SHORT, true);
}

/// `make soak`: five minutes with the periods of production.
#[test]
#[ignore = "takes five minutes: make soak"]
fn silent_tunnels_live_for_five_minutes() {
    let ping = (Duration::from_secs(10), Duration::from_secs(20));
    silence(Duration::from_secs(300), ping, false);
}

#[test]
#[ignore = "takes five minutes: make soak"]
fn silent_tunnels_live_for_five_minutes_beside_a_cpu_hog() {
    let ping = (Duration::from_secs(10), Duration::from_secs(20));
    let _hog = Hog::new();
    silence(Duration::from_secs(300), ping, true);
}
