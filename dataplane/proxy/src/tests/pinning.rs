//! What tunnels keep for receivers that do not read, driven by a seed: peers that open some streams
//! and send pieces of all sizes, each in a record of its own, to applications that take little or
//! nothing.
//!
//! Looked at all the time, and once everything has arrived: the blocks that are in use, as the pool
//! counts them, are those that streams are charged with; those are not many times what was sent;
//! and all of them together stay within the process's bound. `make test` runs it for [`SECONDS`],
//! `make soak` for as long as [`whole_tunnels`](super::whole_tunnels), with the same variables.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hbone::{Config, Connection, Role};
use identity::WorkloadTls;
use rt::buf::Pool;
use rt::net::Listener;
use rt::{Runtime, RuntimeConfig};

use super::peer::{Peer, frame};
use super::whole_tunnels::number;
use super::{
    Random, Requests, Surroundings, certificate, listen, registry, request, serve_by, store,
};
use crate::memory::{TunnelMemory, WorkerMemory};
use crate::tunnel::TunnelStream;

/// How long `make test` runs it.
const SECONDS: u64 = 6;
/// Everything ends within this.
const PATIENCE: Duration = Duration::from_secs(300);
/// The largest block of the pool.
const BLOCK: usize = 262_496;
/// What a tunnel uses besides what it keeps: a block it receives into, one it has just received,
/// and small ones for records on their way out and for packing.
const OWN: usize = 2 * BLOCK + 64 * 1024;
/// What is kept may pin so many times as much (`tunnel/queue.rs`).
const PINNED_MAX: usize = 4;
/// The bounds on what is kept: by turns one that is not reached and one that is.
const BOUNDS: [usize; 2] = [256 << 20, 2 << 20];
/// By how much the bound may be passed before streams are given up: what arrives in one turn.
const OVER: usize = 2 << 20;
const STREAM_WINDOW: usize = 1 << 20;
const STREAMS_MAX: u64 = 4;

#[test]
fn whole_tunnels_pin_what_is_charged_and_no_more() {
    let seconds = number("PROXY_FUZZ_SECONDS").unwrap_or(SECONDS);
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let first = number("PROXY_FUZZ_SEED").unwrap_or(clock.as_millis() as u64);
    let tls = certificate(&store());
    let started = Instant::now();
    let (mut seed, mut sent, mut given_up) = (first, 0, 0);
    while started.elapsed() < Duration::from_secs(seconds) || seed - first < 4 {
        let _named = super::whole_tunnels::Named(seed);
        let (bytes, streams) = scenario(seed, &tls);
        sent += bytes;
        given_up += streams;
        seed += 1;
    }
    println!(
        "{} scenarios from seed {first}: {sent} bytes, {given_up} streams given up",
        seed - first
    );
    assert!(
        sent > 1 << 20 && given_up > 0,
        "nothing was put to the test"
    );
}

/// Some tunnels and what is kept in them. Returns the bytes sent and the streams given up.
fn scenario(seed: u64, tls: &Arc<WorkloadTls>) -> (usize, u64) {
    let bound = BOUNDS[(seed % 2) as usize];
    let limit = TunnelMemory::new(bound);
    let surroundings = Surroundings {
        memory: WorkerMemory::new(&limit),
        limit,
        ..Surroundings::default()
    };
    let tls = Arc::clone(tls);
    let mut runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let ended = runtime.run(rt::time::timeout(PATIENCE, async move {
        let mut random = Random(seed);
        let tunnels = 1 + random.below(4) as usize;
        let kept = Rc::new(Kept {
            bound,
            tunnels,
            surroundings,
            sent: Arc::default(),
            streams: Cell::new(0),
            held: RefCell::default(),
        });
        let mut peers = Vec::new();
        for n in 0..tunnels as u64 {
            peers.push(kept.tunnel(&tls, seed << 8 | n).await);
        }
        let pool = peers[0].0.pool();
        while peers.iter().any(|(_, requests, _)| !requests.is_over.get()) {
            kept.look(&pool);
            rt::time::sleep(Duration::from_millis(1)).await;
        }
        kept.look(&pool);
        for (tunnel, requests, peer) in peers {
            drop(peer.join().unwrap());
            requests.queue.clear();
            drop((tunnel, requests));
        }
        kept.held.borrow_mut().clear();
        while kept.surroundings.memory.charged() > 0 {
            rt::time::sleep(Duration::from_millis(2)).await;
        }
        let given_up = kept.surroundings.limit.streams_given_up();
        (kept.sent.load(Ordering::Relaxed), given_up)
    }));
    match ended.unwrap() {
        Ok(counts) => counts,
        Err(_) => panic!("the scenario of seed {seed} does not end"),
    }
}

/// What applications do with their streams.
struct Kept {
    bound: usize,
    tunnels: usize,
    surroundings: Surroundings,
    /// By all peers; more than what is kept now.
    sent: Arc<AtomicUsize>,
    streams: Cell<usize>,
    held: RefCell<Vec<TunnelStream>>,
}

/// The requests of one tunnel.
struct Arriving {
    queue: Rc<Requests>,
    /// The last one is there, and so is all that was sent before it.
    is_over: Cell<bool>,
}

type Served = (
    Rc<crate::tunnel::Tunnel>,
    Rc<Arriving>,
    thread::JoinHandle<Peer>,
);

impl Kept {
    async fn tunnel(self: &Rc<Self>, tls: &Arc<WorkloadTls>, seed: u64) -> Served {
        let (listener, addr) = listen();
        let (sender, sent) = (Arc::clone(tls), Arc::clone(&self.sent));
        let streams = 1 + Random(seed).below(STREAMS_MAX) as usize;
        let peer = thread::spawn(move || {
            let mut peer = Peer::connect(addr, &sender);
            send(&mut peer, streams, seed, &sent);
            peer
        });
        let accepted = Listener::from_std(listener).accept().await.unwrap();
        let mut config = Config::server();
        config.stream_window = STREAM_WINDOW as u32;
        config.connection_window = (STREAMS_MAX as usize * STREAM_WINDOW) as u32;
        let telemetry = registry();
        let setup = self.surroundings.setup(Role::Server, &config, &telemetry);
        let (tunnel, queue) = serve_by(accepted, tls, &setup).await;
        let arriving = Rc::new(Arriving {
            queue,
            is_over: Cell::new(false),
        });
        rt::spawn(Rc::clone(self).serve(Rc::clone(&arriving), streams, seed));
        (tunnel, arriving, peer)
    }

    /// Keeps every stream; some are answered, and of some a little is taken.
    async fn serve(self: Rc<Self>, arriving: Rc<Arriving>, streams: usize, seed: u64) {
        let mut random = Random(seed ^ 0x5a5a);
        for _ in 0..streams {
            let (stream, _) = arriving.queue.next().await;
            self.streams.set(self.streams.get() + 1);
            let kind = random.below(3);
            if kind > 0 {
                let _ = stream.respond(200, None, false);
            }
            if kind == 2 {
                let mut taken = VecDeque::new();
                if stream.recv(&mut taken).await.is_ok() {
                    stream.release(taken.drain(..).map(|buf| buf.len()).sum());
                }
            }
            self.held.borrow_mut().push(stream);
        }
        let last = arriving.queue.next().await;
        drop(last);
        arriving.is_over.set(true);
    }

    fn look(&self, pool: &Pool) {
        let (used, charged) = (pool.bytes_in_use(), self.surroundings.memory.charged());
        let sent = self.sent.load(Ordering::Relaxed);
        let own = self.tunnels * OWN;
        assert!(used <= charged + own, "{used} in use, {charged} charged");
        let blocks = (self.streams.get() + self.tunnels) * BLOCK;
        let most = PINNED_MAX * sent + blocks;
        assert!(charged <= most, "{charged} charged for {sent} sent");
        let most = self.bound + OVER + own;
        assert!(used <= most, "{used} in use, {} is the bound", self.bound);
    }
}

/// Opens streams and fills them, then opens another one.
fn send(peer: &mut Peer, streams: usize, seed: u64, sent: &AtomicUsize) {
    let mut random = Random(seed ^ 0x33);
    let mut codec = Connection::new(Role::Client, &Config::client());
    let mut open = |peer: &mut Peer| {
        codec.open(&request()).unwrap();
        let headers = codec.output().to_vec();
        codec.consume_output(headers.len());
        peer.send(&headers)
    };
    // Who is given up, or found out, is so.
    let mut room = Vec::new();
    for _ in 0..streams {
        if open(peer).is_err() {
            return;
        }
        room.push(STREAM_WINDOW);
    }
    // Pieces up to this size, on this tunnel.
    let most = [16, 300, 3_000, 9_000, 16_000][random.below(5) as usize];
    for _ in 0..100 + random.below(500) {
        let at = random.below(streams as u64) as usize;
        let len = (1 + random.below(most) as usize).min(room[at]);
        room[at] -= len;
        // Counted first: what has arrived is never more.
        sent.fetch_add(len, Ordering::Relaxed);
        let id = 1 + 2 * at as u32;
        if peer.send(&frame(0, 0, id, &vec![7; len])).is_err() {
            return;
        }
        match random.below(8) {
            0 => thread::sleep(Duration::from_micros(random.below(300))),
            1..4 => thread::yield_now(),
            _ => {}
        }
    }
    let _ = open(peer);
}
