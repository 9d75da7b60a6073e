//! Random schedules of sends, receives, half-closes, resets and cancellations between loopback
//! sockets, against a model: what arrives is a prefix of what was sent, all of it if both ends
//! behaved, and afterwards nothing is left (descriptors, operations, buffers, tasks).
//!
//! One test in a process of its own, because it counts the process's descriptors. A failure
//! names its seed.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::cell::Cell;
use std::collections::VecDeque;
use std::net::{Ipv4Addr, TcpListener};
use std::rc::Rc;
use std::time::Duration;

use rt::buf::Pool;
use rt::net::{ConnectOptions, Listener, Placement, ReadHalf, WriteHalf, connect};
use rt::{Backend, Runtime};
use testkit::Random;

mod both;
use both::{is_available, with};

async fn pause(random: &mut Random) {
    match random.below(8) {
        0 => rt::time::sleep(Duration::from_micros(random.below(1500) as u64)).await,
        1 | 2 => rt::yield_now().await,
        _ => {}
    }
}

/// How one direction is going to go.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// Everything is sent, then FIN; everything is read.
    Whole,
    /// The sender goes away in the middle, with or without RST.
    SenderDrops { reset: bool },
    /// The receiver goes away in the middle.
    ReceiverDrops,
}

fn byte(seed: u64, at: usize) -> u8 {
    ((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 29) as u8 ^ seed as u8
}

/// Sends `len` bytes in random portions; flushes are cancelled now and then and taken up again.
async fn sender(
    mut half: WriteHalf,
    seed: u64,
    len: usize,
    fate: Fate,
    mut random: Random,
) -> bool {
    let stop = match fate {
        Fate::SenderDrops { .. } => random.below(len + 1),
        _ => len,
    };
    let mut at = 0;
    while at < stop {
        let largest = 1 << random.below(19);
        let n = (1 + random.below(largest)).min(stop - at);
        let piece: Vec<u8> = (at..at + n).map(|at| byte(seed, at)).collect();
        half.push_copy(&piece);
        at += n;
        if random.chance(4) {
            let limit = Duration::from_micros(random.below(400) as u64);
            let _ = rt::time::timeout(limit, half.flush()).await; // the send goes on regardless
        } else if random.chance(2) {
            if half.hand_over().await.is_err() {
                return false;
            }
        } else if half.flush().await.is_err() {
            return false;
        }
        pause(&mut random).await;
    }
    if let Fate::SenderDrops { reset } = fate {
        if reset {
            let _ = half.reset_on_close(); // the peer may be gone
        }
        return false; // dropped, perhaps with a send under way
    }
    half.flush().await.is_ok() && half.shutdown().is_ok()
}

/// Receives and compares; receives are cancelled now and then. Returns whether the end came, and
/// how much before it.
async fn receiver(mut half: ReadHalf, seed: u64, fate: Fate, mut random: Random) -> (bool, usize) {
    let stop = random.below(300_000);
    let mut bufs = VecDeque::new();
    let mut held = VecDeque::new();
    let mut at = 0;
    loop {
        if random.chance(6) {
            let layout = [Placement::Flat, Placement::Parsed, Placement::Segmented];
            half.set_placement(layout[random.below(3)]);
        }
        let result = if random.chance(4) {
            let limit = Duration::from_micros(random.below(400) as u64);
            rt::time::timeout(limit, half.recv(&mut bufs)).await
        } else {
            Ok(half.recv(&mut bufs).await)
        };
        let n = match result {
            Err(_) => continue, // cancelled: what comes meanwhile comes next time
            Ok(Err(_)) => return (false, at),
            Ok(Ok(n)) => n,
        };
        assert_eq!(
            n,
            bufs.iter().map(|buf| buf.len()).sum::<usize>(),
            "seed {seed}"
        );
        if n == 0 {
            return (true, at);
        }
        for buf in bufs.drain(..) {
            let right = buf
                .iter()
                .enumerate()
                .all(|(i, found)| *found == byte(seed, at + i));
            assert!(right, "seed {seed}: differs behind byte {at}");
            at += buf.len();
            held.push_back(buf);
        }
        // Some data lies about for a while: the ring of blocks runs dry.
        while held.len() > 40 || !held.is_empty() && random.chance(2) {
            held.pop_front();
        }
        if fate == Fate::ReceiverDrops && at >= stop {
            return (false, at);
        }
        pause(&mut random).await;
    }
}

/// Both directions of one connection.
async fn connection(ends: [(ReadHalf, WriteHalf); 2], seed: u64, running: Rc<Cell<usize>>) {
    let mut random = Random::new(seed);
    let mut fate = || match random.below(6) {
        0 => Fate::SenderDrops {
            reset: random.chance(2),
        },
        1 => Fate::ReceiverDrops,
        _ => Fate::Whole,
    };
    let mut fates = [fate(), fate()];
    if std::mem::discriminant(&fates[0]) == std::mem::discriminant(&fates[1]) {
        // Two receivers, or two senders, that leave have nobody left to end the connection.
        fates[1] = Fate::Whole;
    }
    let kind = fates == [Fate::Whole; 2];
    let [(read0, write0), (read1, write1)] = ends;
    let halves = [(write0, read1), (write1, read0)];
    for (way, (write, read)) in halves.into_iter().enumerate() {
        let seed = seed << 1 | way as u64;
        let mut random = Random::new(seed);
        let largest = 1 << (4 + random.below(17));
        let len = random.below(largest);
        let fate = fates[way];
        let received = Rc::new(Cell::new(None));
        let (told, running_sender) = (Rc::clone(&received), Rc::clone(&running));
        let sending = random.clone();
        running.set(running.get() + 2);
        rt::spawn(async move {
            let sent = sender(write, seed, len, fate, sending).await;
            assert!(
                sent || !kind,
                "seed {seed}: sending failed although nobody left"
            );
            running_sender.set(running_sender.get() - 1);
        });
        let running = Rc::clone(&running);
        rt::spawn(async move {
            let (ended, n) = receiver(read, seed, fate, random).await;
            told.set(Some(n));
            assert!(n <= len, "seed {seed}: {n} of {len} bytes");
            if kind {
                assert!(
                    ended && n == len,
                    "seed {seed}: {n} of {len} bytes, ended {ended}"
                );
            }
            running.set(running.get() - 1);
        });
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Runs `connections` at once; returns what is left afterwards.
fn schedule(backend: Backend, seed: u64, connections: u64) {
    let mut config = with(backend);
    let mut random = Random::new(seed);
    config.pool.ring_entries = 1 << (1 + random.below(6));
    config.pool.segments = 1 << random.below(5);
    config.pool.huge_segments = config.pool.segments * 4;
    config.pool.huge_blocks = random.below(4);
    config.entries = 4 << random.below(5);
    config.polls_per_turn = 1 + random.below(64);
    config.completions_per_turn = 1 + random.below(64);
    let mut runtime = Runtime::new(config).unwrap();
    let counters = runtime.counters();
    let before = descriptors();
    let running = Rc::new(Cell::new(0));
    let main = async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addr = listener.local_addr().unwrap();
        let mut listener = Listener::from_std(listener);
        let mut pool: Option<Pool> = None;
        for n in 0..connections {
            let near = connect(addr, &ConnectOptions::default())
                .await
                .unwrap()
                .split();
            let far = listener.accept().await.unwrap().split();
            pool.get_or_insert_with(|| near.1.pool().clone());
            connection([near, far], seed << 8 | n, Rc::clone(&running)).await;
        }
        drop(listener);
        while running.get() > 0 {
            rt::time::sleep(Duration::from_millis(1)).await;
        }
        let left = || {
            let blocks = pool.as_ref().map_or(0, |pool| {
                pool.ring_blocks_in_use() as usize + pool.other_blocks_in_use()
            });
            (
                descriptors() - before,
                counters.operations(),
                counters.tasks(),
                blocks,
            )
        };
        // Cancelled operations may take a few turns to come back.
        for _ in 0..500 {
            if left() == (0, 0, 1, 0) {
                return;
            }
            rt::time::sleep(Duration::from_millis(2)).await;
        }
        panic!(
            "seed {seed}: descriptors, operations, tasks, blocks left: {:?}",
            left()
        );
    };
    let limit = Duration::from_secs(60);
    let result = runtime
        .run(async { rt::time::timeout(limit, main).await })
        .unwrap();
    assert!(
        result.is_ok(),
        "seed {seed} hangs with {} tasks",
        running.get()
    );
}

#[test]
fn random_schedules_match_the_model_and_leave_nothing() {
    let chosen = std::env::var("RT_SEED")
        .ok()
        .map(|seed| seed.parse().unwrap());
    let seeds: Vec<u64> = chosen.map_or_else(|| (1..=30).collect(), |seed| vec![seed]);
    for backend in [Backend::IoUring, Backend::Epoll] {
        if is_available(
            "random_schedules_match_the_model_and_leave_nothing",
            backend,
        ) {
            for &seed in &seeds {
                schedule(backend, seed, 12);
            }
        }
    }
}
