//! Whole tunnels, from the TLS record to what applications get, driven by a seed.
//!
//! Half of the scenarios are two tunnels of ours with a wire between them that cuts what it carries
//! anywhere, stalls and sometimes breaks; streams send, pause, stop reading, end and reset, sides
//! update their keys and drain. The others are a peer with a valid certificate that sends what it
//! likes: frames that are right, wrong, out of order, too many, cut anywhere. Many of them run at a
//! time on one worker, within a bound on memory that they reach.
//!
//! Checked: nothing panics; every byte of a stream is the one that was sent, in order, and a stream
//! that ended without a failure has all of them; everything ends; no memory stays. `make test` runs
//! it for [`SECONDS`], `make soak` for an hour (`PROXY_FUZZ_SECONDS`). A failure names its seed:
//! `PROXY_FUZZ_SEED=N` begins there.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hbone::{Config, Connection, ErrorCode, Role};
use identity::WorkloadTls;
use rt::net::{ConnectOptions, Listener, TcpStream};
use rt::{Runtime, RuntimeConfig};
use tls::Handshake;

use super::peer::{Peer, frame};
use super::{
    Random, Requests, Surroundings, bufs, certificate, identity, listen, pattern, registry,
    request, serve_by, store,
};
use crate::memory::{TunnelMemory, WorkerMemory};
use crate::tunnel::{self, ClientSide, Tunnel, TunnelError, TunnelStream};

/// How long `make test` runs it.
const SECONDS: u64 = 20;
/// Scenarios on one worker at a time.
const AT_A_TIME: u64 = 96;
/// Bounds on what tunnels hold, by turns: one is reached.
const MEMORY: [usize; 2] = [64 << 20, 1 << 20];
/// Everything ends within this.
const PATIENCE: Duration = Duration::from_secs(300);

pub(super) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Names the seed of a scenario that panics, whichever of its tasks does.
pub(super) struct Named(pub(super) u64);

impl Drop for Named {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("seeds from {}: PROXY_FUZZ_SEED={}", self.0, self.0);
        }
    }
}

#[test]
fn whole_tunnels_survive_what_a_seed_makes_of_them() {
    let seconds = number("PROXY_FUZZ_SECONDS").unwrap_or(SECONDS);
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let first = number("PROXY_FUZZ_SEED").unwrap_or(clock.as_millis() as u64);
    let started = Instant::now();
    let (mut seed, mut totals) = (first, Totals::default());
    while started.elapsed() < Duration::from_secs(seconds) {
        let _named = Named(seed);
        totals.add(&batch(seed));
        seed += AT_A_TIME;
    }
    println!("{} scenarios from seed {first}: {totals:?}", seed - first);
    // A driver that breaks everything at once would find nothing.
    assert!(totals.complete > totals.scenarios / 8, "{totals:?}");
    assert!(totals.bytes > 1 << 20, "{totals:?}");
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    scenarios: u64,
    /// Streams whose every byte arrived, and their end.
    complete: u64,
    /// Streams that failed, on purpose or by what was done to their tunnels.
    failed: u64,
    bytes: u64,
    given_up: u64,
}

impl Totals {
    fn add(&mut self, other: &Self) {
        self.scenarios += other.scenarios;
        self.complete += other.complete;
        self.failed += other.failed;
        self.bytes += other.bytes;
        self.given_up += other.given_up;
    }
}

/// What the scenarios of a batch share.
#[derive(Debug)]
struct Batch {
    tls: Arc<WorkloadTls>,
    surroundings: Surroundings,
    totals: Cell<Totals>,
    tunnels: RefCell<Vec<Weak<Tunnel>>>,
    /// Tasks that have not ended.
    tasks: Cell<usize>,
}

impl Batch {
    fn note(&self, change: impl FnOnce(&mut Totals)) {
        let mut totals = self.totals.get();
        change(&mut totals);
        self.totals.set(totals);
    }

    fn spawn(self: &Rc<Self>, task: impl Future<Output = ()> + 'static) {
        self.tasks.set(self.tasks.get() + 1);
        let batch = Rc::clone(self);
        rt::spawn(async move {
            task.await;
            batch.tasks.set(batch.tasks.get() - 1);
        });
    }

    fn keep_eye_on(&self, tunnel: &Rc<Tunnel>) {
        self.tunnels.borrow_mut().push(Rc::downgrade(tunnel));
    }
}

/// Runs scenarios side by side to their ends.
fn batch(seed: u64) -> Totals {
    let bound = MEMORY[(seed / AT_A_TIME % 2) as usize];
    let limit = TunnelMemory::new(bound);
    let surroundings = Surroundings {
        // Nobody is given up for silence here: scenarios stall.
        ping: (Duration::from_millis(300), Duration::from_secs(30)),
        memory: WorkerMemory::new(&limit),
        limit,
    };
    let mut runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let ended = runtime.run(rt::time::timeout(PATIENCE, async move {
        let batch = Rc::new(Batch {
            tls: certificate(&store()),
            surroundings,
            totals: Cell::default(),
            tunnels: RefCell::default(),
            tasks: Cell::new(0),
        });
        for seed in seed..seed + AT_A_TIME {
            let shared = Rc::clone(&batch);
            batch.spawn(async move {
                if seed % 2 == 0 {
                    pair_over_a_wire(&shared, seed).await;
                } else {
                    hostile_peer(&shared, seed).await;
                }
            });
        }
        while batch.tasks.get() > 0 {
            let held = batch.surroundings.limit.held();
            assert!(held < bound + (4 << 20), "{held} bytes of {bound}");
            rt::time::sleep(Duration::from_millis(5)).await;
        }
        let alive = |tunnel: &Weak<Tunnel>| tunnel.strong_count() > 0;
        while batch.tunnels.borrow().iter().any(alive) {
            rt::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(
            batch.surroundings.memory.charged(),
            0,
            "charged for nothing"
        );
        let mut totals = batch.totals.get();
        totals.scenarios = AT_A_TIME;
        totals.given_up = batch.surroundings.limit.streams_given_up();
        totals
    }));
    match ended.unwrap() {
        Ok(totals) => totals,
        Err(_) => panic!("scenarios from seed {seed} do not end"),
    }
}

fn config(random: &mut Random, mut config: Config) -> Config {
    if random.below(2) == 0 {
        config.stream_window = 65_535 + random.below(200_000) as u32;
        config.connection_window = 65_535 + random.below(400_000) as u32;
        config.max_frame_size = 16_384 + random.below(50_000) as u32;
        config.max_concurrent_streams = 3 + random.below(20) as u32;
    }
    config
}

/// A connection, its accepting end first.
async fn connected() -> (TcpStream, TcpStream) {
    let (listener, addr) = listen();
    let mut listener = Listener::from_std(listener);
    let near = rt::net::connect(addr, &ConnectOptions::default()).await;
    (listener.accept().await.unwrap(), near.unwrap())
}

/// Carries one direction in pieces of any size, with pauses; breaks after some bytes, perhaps.
async fn wire(from: TcpStream, to: TcpStream, batch: Rc<Batch>, seed: u64) {
    let (from_read, from_write) = from.split();
    let (to_read, to_write) = to.split();
    let mut random = Random(seed ^ 0x5151);
    let breaks = (random.below(3) == 0).then(|| random.below(3 << 20) as usize);
    let broken = Rc::new(Cell::new(false));
    for (n, (mut read, mut write)) in [(from_read, to_write), (to_read, from_write)]
        .into_iter()
        .enumerate()
    {
        let broken = Rc::clone(&broken);
        let mut random = Random(seed ^ (0x77 + n as u64));
        batch.spawn(async move {
            let (mut bufs, mut carried) = (VecDeque::new(), 0);
            loop {
                let received =
                    rt::time::timeout(Duration::from_millis(500), read.recv(&mut bufs)).await;
                if broken.get() {
                    return;
                }
                match received {
                    Err(_) => continue,
                    Ok(Ok(1..)) => {}
                    Ok(_) => {
                        let _ = write.flush().await;
                        let _ = write.shutdown();
                        return;
                    }
                }
                for buf in bufs.drain(..) {
                    let mut rest = &buf[..];
                    while !rest.is_empty() {
                        let most = 1 << random.below(18);
                        let n = (1 + random.below(most) as usize).min(rest.len());
                        write.push_copy(&rest[..n]);
                        if write.flush().await.is_err() {
                            broken.set(true);
                            return;
                        }
                        rest = &rest[n..];
                        carried += n;
                        match random.below(64) {
                            0 => rt::time::sleep(Duration::from_millis(random.below(9))).await,
                            1..8 => rt::next_turn().await,
                            _ => {}
                        }
                        if breaks.is_some_and(|at| carried > at) {
                            let _ = write.reset_on_close();
                            broken.set(true);
                            return;
                        }
                    }
                }
            }
        });
    }
}

/// Two of ours.
async fn pair_over_a_wire(batch: &Rc<Batch>, seed: u64) {
    let mut random = Random(seed);
    let (near_wire, near) = connected().await;
    let (far, far_wire) = connected().await;
    wire(near_wire, far_wire, Rc::clone(batch), seed).await;
    let requests = Rc::new(Requests::default());
    let (client_config, server_config) = (
        config(&mut random, Config::client()),
        config(&mut random, Config::server()),
    );
    batch.spawn({
        let (batch, requests) = (Rc::clone(batch), Rc::clone(&requests));
        async move {
            let owner = Box::new(super::Owner(Rc::clone(&requests)));
            let peer = far.peer_addr().unwrap();
            let handshake = Handshake::server(&batch.tls.server).unwrap();
            let telemetry = registry();
            let setup = batch
                .surroundings
                .setup(Role::Server, &server_config, &telemetry);
            if let Ok(tunnel) = tunnel::run(far, peer, handshake, &setup, owner).await {
                batch.keep_eye_on(&tunnel);
                serve_streams(&batch, tunnel, requests, seed).await;
            }
        }
    });
    let peer = near.peer_addr().unwrap();
    let handshake = Handshake::client(&batch.tls.client, &identity("app")).unwrap();
    let telemetry = registry();
    let setup = batch
        .surroundings
        .setup(Role::Client, &client_config, &telemetry);
    let owner = Box::new(ClientSide);
    let Ok(tunnel) = tunnel::run(near, peer, handshake, &setup, owner).await else {
        return; // the wire broke
    };
    batch.keep_eye_on(&tunnel);
    for _ in 0..1 + random.below(12) {
        let Ok(near) = tunnel.open(&request()) else {
            break;
        };
        let seed = seed << 16 | u64::from(near.id().get());
        let talking = Rc::clone(batch);
        batch.spawn(async move {
            if near.response().await.is_ok_and(|status| status == 200) {
                talk(&talking, Rc::new(near), seed, 1).await;
            }
        });
        meddle(&tunnel, &mut random).await;
    }
    meddle(&tunnel, &mut random).await;
    tunnel.shutdown_graceful();
}

/// What happens to a tunnel besides its streams.
async fn meddle(tunnel: &Rc<Tunnel>, random: &mut Random) {
    match random.below(12) {
        0 => tunnel.update_keys(random.below(2) == 0),
        1 => rt::time::sleep(Duration::from_millis(random.below(30))).await,
        2 if random.below(4) == 0 => tunnel.shutdown_graceful(),
        3 if random.below(8) == 0 => {
            tunnel.abort(TunnelError::KeepaliveTimeout, ErrorCode::NO_ERROR);
        }
        4..8 => rt::next_turn().await,
        _ => {}
    }
}

/// Answers every request until the tunnel is over.
async fn serve_streams(batch: &Rc<Batch>, tunnel: Rc<Tunnel>, requests: Rc<Requests>, seed: u64) {
    let mut random = Random(seed ^ 0xabcd);
    loop {
        let next = rt::time::timeout(Duration::from_millis(20), requests.next()).await;
        if tunnel.error().is_some() || tunnel.has_ended() {
            requests.clear(); // streams hold their tunnel
            return;
        }
        meddle(&tunnel, &mut random).await;
        let Ok((far, head)) = next else { continue };
        if &*head.authority != request().authority || random.below(12) == 0 {
            let _ = far.respond(503, None, true);
            continue;
        }
        if far.respond(200, None, false).is_ok() {
            let seed = seed << 16 | u64::from(far.id().get());
            let talking = Rc::clone(batch);
            batch.spawn(async move { talk(&talking, Rc::new(far), seed, 0).await });
        }
    }
}

/// One end of a stream: both sides know the seed, so each knows what the other one sends.
async fn talk(batch: &Rc<Batch>, stream: Rc<TunnelStream>, seed: u64, side: u64) {
    let mine = data(seed, side);
    let sending = Rc::clone(&stream);
    let mut random = Random(seed ^ (side << 40) ^ 0x1234);
    let stop = (random.below(10) == 0).then(|| random.below(1 << 17) as usize);
    batch.spawn(async move {
        let mut rest = &mine[..];
        let pool = sending.tunnel().pool();
        while !rest.is_empty() {
            if stop.is_some_and(|at| mine.len() - rest.len() > at) {
                return; // the stream is reset when the other half is through, too
            }
            let most = 1 << random.below(17);
            let n = (1 + random.below(most) as usize).min(rest.len());
            if sending.send(&mut bufs(&pool, &rest[..n])).await.is_err() {
                return;
            }
            rest = &rest[n..];
            if random.below(16) == 0 {
                rt::time::sleep(Duration::from_millis(random.below(4))).await;
            }
        }
        let _ = sending.finish();
    });
    receive(batch, &stream, &data(seed, 1 - side), Random(seed ^ side)).await;
}

fn data(seed: u64, side: u64) -> Vec<u8> {
    let mut random = Random(seed ^ (side << 20));
    let most = 1 << (4 + random.below(17));
    let len = random.below(most) as usize;
    pattern(seed ^ side, len)
}

async fn receive(batch: &Batch, stream: &TunnelStream, expected: &[u8], mut random: Random) {
    let (mut at, mut taken) = (0, VecDeque::new());
    // Some stop reading for a while, some give credit late, some leave.
    let leaves = (random.below(12) == 0).then(|| random.below(1 << 16) as usize);
    let stops = (random.below(8) == 0).then(|| random.below(1 << 16) as usize);
    let mut stopped = false;
    let ended = loop {
        match stream.recv(&mut taken).await {
            Ok(0) => break true,
            Err(_) => break false,
            Ok(_) => {}
        }
        for buf in taken.drain(..) {
            assert!(
                expected.get(at..at + buf.len()) == Some(&buf[..]),
                "differs behind byte {at} of {}",
                expected.len()
            );
            at += buf.len();
            stream.release(buf.len());
        }
        if leaves.is_some_and(|leaves| at > leaves) {
            break false;
        }
        if !stopped && stops.is_some_and(|stops| at > stops) {
            stopped = true;
            rt::time::sleep(Duration::from_millis(200 + random.below(800))).await;
        }
    };
    let complete = ended && at == expected.len();
    // An end that is no failure has everything before it, unless the peer has left with a code that
    // says no harm is meant, as one does that stops in the middle.
    assert!(
        !ended || complete || !stream.is_complete(),
        "{at} of {}",
        expected.len()
    );
    batch.note(|totals| {
        totals.bytes += at as u64;
        totals.complete += u64::from(complete);
        totals.failed += u64::from(!complete);
    });
}

/// A peer that has a certificate and sends what it likes.
async fn hostile_peer(batch: &Rc<Batch>, seed: u64) {
    let (listener, addr) = listen();
    let tls = Arc::clone(&batch.tls);
    let peer = thread::spawn(move || Hostile::connect(addr, &tls, seed).run());
    let accepted = Listener::from_std(listener).accept().await.unwrap();
    let telemetry = registry();
    let config = config(&mut Random(seed ^ 0x99), Config::server());
    let setup = batch.surroundings.setup(Role::Server, &config, &telemetry);
    let (tunnel, requests) = serve_by(accepted, &batch.tls, &setup).await;
    batch.keep_eye_on(&tunnel);
    let mut random = Random(seed ^ 0xdead);
    while tunnel.error().is_none() && !tunnel.has_ended() {
        let next = rt::time::timeout(Duration::from_millis(10), requests.next()).await;
        let Ok((stream, _)) = next else { continue };
        batch.spawn(host(stream, random.below(6), random.below(1 << 30)));
    }
    requests.clear(); // streams hold their tunnel
    drop((tunnel, requests));
    while !peer.is_finished() {
        rt::time::sleep(Duration::from_millis(5)).await;
    }
    peer.join().unwrap();
}

/// What is done with a stream of a hostile peer. It ends with the stream.
async fn host(stream: TunnelStream, kind: u64, seed: u64) {
    let gone = || std::future::poll_fn(|cx| stream.poll_failure(cx));
    if kind == 0 {
        return;
    }
    if kind == 1 {
        gone().await; // connecting, for ever
        return;
    }
    if stream.respond(200, None, false).is_err() {
        return;
    }
    match kind {
        2 => {
            gone().await; // nobody reads
        }
        3 => {
            let piece = vec![seed as u8; 20_000];
            let pool = stream.tunnel().pool();
            while stream.send(&mut bufs(&pool, &piece)).await.is_ok() {}
        }
        _ => {
            let mut taken = VecDeque::new();
            while let Ok(1..) = stream.recv(&mut taken).await {
                let n = taken.drain(..).map(|buf| buf.len()).sum();
                if kind == 4 {
                    rt::time::sleep(Duration::from_millis(seed % 5)).await;
                }
                stream.release(n);
            }
            let _ = stream.finish();
        }
    }
}

struct Hostile {
    peer: Peer,
    codec: Connection,
    random: Random,
}

impl Hostile {
    fn connect(addr: std::net::SocketAddr, tls: &WorkloadTls, seed: u64) -> Self {
        let peer = Peer::connect(addr, tls);
        let patience = Some(Duration::from_millis(200));
        peer.stream.set_write_timeout(patience).unwrap();
        Self {
            peer,
            codec: Connection::new(Role::Client, &Config::client()),
            random: Random(seed),
        }
    }

    fn run(mut self) {
        let mut plaintext = self.codec.output().to_vec();
        self.codec.consume_output(plaintext.len());
        // Most do little that ends the tunnel at once.
        let wild = self.random.below(3) == 0;
        for _ in 0..1 + self.random.below(400) {
            plaintext.extend(self.frame(wild));
            if self.random.below(3) == 0 && self.send(&std::mem::take(&mut plaintext)).is_err() {
                return;
            }
        }
        let _ = self.send(&plaintext);
        match self.random.below(4) {
            0 => {
                let mut close = Vec::new();
                self.peer.session.close_notify(&mut close);
                let _ = self.peer.stream.write_all(&close);
            }
            1 => {
                // Half a record, and silence for a while.
                let record = self.peer.record(&[0; 100]);
                let _ = self.peer.stream.write_all(&record[..50]);
                thread::sleep(Duration::from_millis(self.random.below(300)));
            }
            _ => {}
        }
    }

    /// In records of any size, cut anywhere on their way.
    fn send(&mut self, mut plaintext: &[u8]) -> std::io::Result<()> {
        let mut wire = Vec::new();
        while !plaintext.is_empty() {
            let most = 1 << (1 + self.random.below(14));
            let n = (1 + self.random.below(most) as usize).min(plaintext.len());
            wire.extend(self.peer.record(&plaintext[..n]));
            plaintext = &plaintext[n..];
            if self.random.below(200) == 0 {
                self.peer.session.update_keys(self.random.below(2) == 0);
                self.peer.session.take_control_output(&mut wire);
            }
        }
        let cut = self.random.below(wire.len() as u64 + 1) as usize;
        self.peer.stream.write_all(&wire[..cut])?;
        if self.random.below(8) == 0 {
            thread::sleep(Duration::from_millis(self.random.below(3)));
        }
        self.peer.stream.write_all(&wire[cut..])?;
        if self.random.below(4) == 0 {
            let patience = Some(Duration::from_millis(1));
            self.peer.stream.set_read_timeout(patience)?;
            let _ = self.peer.stream.read(&mut [0; 65_536]); // nothing, as likely as not
        }
        Ok(())
    }

    fn frame(&mut self, wild: bool) -> Vec<u8> {
        let random = &mut self.random;
        let id = 1 + 2 * random.below(12) as u32;
        let word = |random: &mut Random, most: u64| (random.below(most) as u32).to_be_bytes();
        let kinds = if wild { 18 } else { 12 };
        match random.below(kinds) {
            0..3 => {
                if self.codec.open(&request()).is_err() {
                    self.codec = Connection::new(Role::Client, &Config::client());
                    self.codec.consume_output(self.codec.output().len());
                }
                let headers = self.codec.output().to_vec();
                self.codec.consume_output(headers.len());
                headers
            }
            3..8 => {
                let most = 1 << random.below(14);
                let flags = u8::from(random.below(20) == 0);
                let payload = vec![7; random.below(most) as usize];
                frame(0, flags, self.last(id), &payload)
            }
            8 => frame(
                8,
                0,
                [0, self.last(id)][id as usize / 2 % 2],
                &word(&mut self.random, 70_000),
            ),
            9 => {
                let setting = [&[0, 4][..], &word(random, 1 << 20)].concat();
                frame(4, 0, 0, &setting.repeat(1 + random.below(20) as usize))
            }
            10 => frame(3, 0, self.last(id), &8u32.to_be_bytes()),
            11 => {
                let (kind, len) = (0x40 + random.below(99) as u8, random.below(9_000) as usize);
                frame(kind, 0, id, &vec![0; len])
            }
            12 => frame(6, random.below(2) as u8, 0, &[1; 8]),
            13 => frame(2, 0, id, &[0; 5]),
            14 => frame(1, random.below(256) as u8, id, &pattern(u64::from(id), 40)),
            15 => frame(0, 9, id, &[3, 1, 2, 3, 0, 0, 0]),
            16 => frame(7, 0, 0, &[0; 8]),
            _ => {
                let len = random.below(30) as usize;
                (0..len).map(|_| random.below(256) as u8).collect()
            }
        }
    }

    /// A stream that is open, most often.
    fn last(&self, id: u32) -> u32 {
        let open = self.codec.active_streams() as u32;
        if open == 0 {
            id
        } else {
            1 + 2 * (id / 2 % open)
        }
    }
}
