//! Receivers that do not read: they hold nobody else up, and no more memory than they may.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hbone::{Config, Connection, ErrorCode, Role};
use rt::net::Listener;

use super::end_to_end::{CLIENT, exchange, worker_with};
use super::peer::{Peer, frame};
use super::{
    Pair, Surroundings, bufs, certificate, listen, pair, pair_in, pattern, request, run, serve,
    serve_by, store,
};
use crate::memory::{TunnelMemory, WorkerMemory};
use crate::tunnel::{StreamFailure, Tunnel, TunnelStream};

/// Sends on `stream` until it fails. What became of it, and how much went.
#[derive(Debug, Default)]
struct Poured {
    bytes: Cell<usize>,
    failed: Cell<bool>,
}

fn pour(tunnel: &Rc<Tunnel>, stream: TunnelStream) -> Rc<Poured> {
    let poured = Rc::new(Poured::default());
    let (count, pool) = (Rc::clone(&poured), tunnel.pool());
    rt::spawn(async move {
        let piece = vec![7; 16_000];
        while stream.send(&mut bufs(&pool, &piece)).await.is_ok() {
            count.bytes.set(count.bytes.get() + piece.len());
        }
        count.failed.set(true);
    });
    poured
}

/// Both ends of a stream in the direction that is tried: sender, receiver.
async fn open(pair: &Pair, down: bool) -> (TunnelStream, TunnelStream) {
    let (near, far) = pair.open().await;
    if down { (far, near) } else { (near, far) }
}

/// `len` bytes arrive, exactly.
async fn carries(pair: &Pair, down: bool, len: usize) {
    let (from, to) = open(pair, down).await;
    let data = pattern(len as u64, len);
    let sender = if down { &pair.server } else { &pair.client };
    let mut queue = bufs(&sender.pool(), &data);
    rt::spawn(async move {
        from.send(&mut queue).await.unwrap();
        from.finish().unwrap();
        rt::time::sleep(super::HANG).await; // as long as the test
    });
    let (mut at, mut taken) = (0, VecDeque::new());
    while to.recv(&mut taken).await.unwrap() > 0 {
        for buf in taken.drain(..) {
            assert!(buf[..] == data[at..at + buf.len()], "differs behind {at}");
            at += buf.len();
            to.release(buf.len());
        }
    }
    assert_eq!(at, len);
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let waited = rt::time::timeout(Duration::from_secs(25), async {
        while !is() {
            rt::time::sleep(Duration::from_millis(2)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what}");
}

/// Four streams of 4 MiB fill the connection's 16: the fifth moves, and so does a sixth that comes
/// when eight are stuck, in either direction.
#[test]
fn stuck_readers_stop_nobody_in_their_tunnel() {
    for down in [true, false] {
        run(async move {
            let pair = pair(Config::client(), Config::server()).await;
            let sender = if down { &pair.server } else { &pair.client };
            let mut stuck = Vec::new();
            for round in 0..2 {
                for _ in 0..4 {
                    let (from, to) = open(&pair, down).await;
                    stuck.push((pour(sender, from), to));
                }
                until("stuck streams fill their windows", || {
                    stuck
                        .iter()
                        .all(|(sent, _)| sent.bytes.get() > (4 << 20) - 32_000)
                })
                .await;
                carries(&pair, down, 6 << 20).await;
                assert!(stuck.iter().all(|(sent, _)| !sent.failed.get()), "{round}");
            }
            // They were slow and not lost.
            let (sent, to) = &stuck[0];
            let (mut received, mut taken) = (0, VecDeque::new());
            while received < 8 << 20 {
                received += to.recv(&mut taken).await.unwrap();
                let n: usize = taken.drain(..).map(|buf| buf.len()).sum();
                to.release(n);
            }
            assert!(sent.bytes.get() >= received);
        });
    }
}

/// A stream that its sender resets counts against the window no longer, although its receiver still
/// has all of it in its hands.
#[test]
fn credit_of_a_dead_stream_comes_back_at_once() {
    run(async {
        let pair = pair(Config::client(), Config::server()).await;
        let mut held = Vec::new();
        for _ in 0..4 {
            let (near, far) = pair.open().await;
            let piece = vec![7; 4 << 20];
            far.send(&mut bufs(&pair.server.pool(), &piece))
                .await
                .unwrap();
            held.push((near, far));
        }
        until("the window is held", || !pair.client.can_open()).await;
        let mut receivers = Vec::new();
        for (near, far) in held {
            drop(far); // resets it
            receivers.push(near);
        }
        until("the window is open", || pair.client.can_open()).await;
        assert_eq!(receivers.len(), 4);
    });
}

/// One piece of each stream in every 256 KiB that are received, from a peer that sends what has no
/// meaning in between; nobody reads. Two megabytes held 315 before.
#[test]
fn small_pieces_do_not_keep_large_blocks() {
    const STREAMS: usize = 60;
    for piece in [1, 300, 2_049, 9_000] {
        let pieces = (1_200 * 2_049 / piece).min(1_200);
        let (listener, addr) = listen();
        let tls = certificate(&store());
        let peer = thread::spawn({
            let tls = Arc::clone(&tls);
            move || {
                let mut peer = Peer::connect(addr, &tls);
                let mut codec = Connection::new(Role::Client, &Config::client());
                for _ in 0..STREAMS {
                    codec.open(&request()).unwrap();
                }
                peer.send(codec.output()).unwrap();
                let filler = frame(0xee, 0, 0, &vec![0; 250_000]);
                for n in 0..pieces {
                    let stream = 1 + 2 * (n % STREAMS) as u32;
                    let data = frame(0, 0, stream, &vec![7; piece]);
                    peer.send(&[filler.as_slice(), &data].concat()).unwrap();
                }
                peer // stays until it has been looked at
            }
        });
        run(async {
            let accepted = Listener::from_std(listener).accept().await.unwrap();
            let surroundings = Surroundings::with_memory(256 << 20);
            let (telemetry, config) = (super::registry(), Config::server());
            let setup = surroundings.setup(Role::Server, &config, &telemetry);
            let (tunnel, requests) = serve_by(accepted, &tls, &setup).await;
            until("everything has arrived", || {
                tunnel.held_bytes() == pieces * piece
            })
            .await;
            let (held, pinned) = (pieces * piece, tunnel.pool().bytes_in_use());
            // Four times what is held, and the first piece of each stream may keep its block.
            let first = if piece >= 262_496 / 32 {
                262_496
            } else {
                2 * 16_406
            };
            let most = 4 * held + STREAMS * first + (2 << 20);
            assert!(
                pinned <= most,
                "pieces of {piece}: {held} bytes pin {pinned}"
            );
            let told = surroundings.memory.charged();
            assert!(
                told + (2 << 20) >= pinned,
                "{pinned} pinned, {told} charged"
            );
            requests.clear();
            drop((tunnel, requests));
        });
        drop(peer.join().unwrap());
    }
}

/// At the bound of the process streams that nobody reads are given up, those that somebody reads go
/// on, and the memory is given back.
#[test]
fn at_the_bound_those_who_do_not_read_are_given_up_and_nobody_else() {
    const LIMIT: usize = 24 << 20;
    run(async {
        let surroundings = Surroundings::with_memory(LIMIT);
        let mut tunnels = Vec::new();
        let mut stuck = Vec::new();
        for _ in 0..2 {
            let pair = pair_in(Config::client(), Config::server(), &surroundings).await;
            let mut of_pair = Vec::new();
            for _ in 0..6 {
                let (near, far) = pair.open().await;
                of_pair.push((pour(&pair.server, far), near));
            }
            stuck.extend(of_pair);
            tunnels.push(pair);
        }
        // 12 streams want 48 MiB.
        let shared = &surroundings.limit;
        until("the bound is reached", || shared.streams_given_up() > 0).await;
        for pair in &tunnels {
            carries(pair, true, 6 << 20).await;
        }
        until("all are stuck or given up", || {
            let full = (4 << 20) - 32_000;
            let mut sent = stuck.iter().map(|(sent, _)| sent);
            sent.all(|sent| sent.failed.get() || sent.bytes.get() > full)
        })
        .await;
        assert!(shared.held() <= LIMIT, "{} of {LIMIT}", shared.held());
        // Both ends of one that was given up see a reset, in words that say why.
        let mut given_up = 0;
        for (sent, near) in &stuck {
            if sent.failed.get() {
                given_up += 1;
                let failure = near.recv(&mut VecDeque::new()).await.unwrap_err();
                assert!(
                    matches!(failure, StreamFailure::GivenUp(LIMIT)),
                    "{failure}"
                );
                assert!(!failure.is_clean());
            }
        }
        assert_eq!(given_up, shared.streams_given_up());
        assert!((1..12).contains(&given_up), "{given_up}");
        drop((stuck, tunnels));
        assert!(surroundings.memory.charged() == 0);
    });
}

impl Surroundings {
    fn with_memory(limit: usize) -> Self {
        let limit = TunnelMemory::new(limit);
        Self {
            memory: WorkerMemory::new(&limit),
            limit,
            ..Self::default()
        }
    }
}

/// A request counts until its task has ended, also when its stream is gone: the next ones wait, and
/// those that are reset meanwhile are never seen.
#[test]
fn requests_count_until_their_tasks_have_ended() {
    run(async {
        let server = Config {
            max_concurrent_streams: 4,
            ..Config::server()
        };
        let pair = pair(Config::client(), server).await;
        let mut served = Vec::new();
        for _ in 0..4 {
            let near = pair.client.open(&request()).unwrap();
            served.push(pair.requests.next().await.0);
            drop(near);
        }
        until("the streams are gone", || {
            served.iter().all(TunnelStream::is_gone)
        })
        .await;
        // A hundred are opened and reset, then one is opened that stays.
        for _ in 0..100 {
            drop(pair.client.open(&request()).unwrap());
            rt::next_turn().await;
        }
        let near = pair.client.open(&request()).unwrap();
        rt::time::sleep(Duration::from_millis(50)).await;
        assert!(
            pair.requests.queue.borrow().is_empty(),
            "more than four at a time"
        );
        served.pop();
        assert_eq!(
            pair.requests.queue.borrow().len(),
            1,
            "the next one's turn, at once"
        );
        let (far, _) = pair.requests.next().await;
        far.respond(200, None, false).unwrap();
        assert_eq!(near.response().await.unwrap(), 200);
        rt::time::sleep(Duration::from_millis(50)).await;
        assert!(pair.requests.queue.borrow().is_empty());
        assert!(pair.server.error().is_none());
    });
}

/// Ten thousand tiny records in one receive do not keep the worker from its other connections.
#[test]
fn tiny_records_take_turns() {
    const RECORDS: usize = 20_000;
    let (listener, addr) = listen();
    let tls = certificate(&store());
    let peer = thread::spawn({
        let tls = Arc::clone(&tls);
        move || {
            let mut peer = Peer::connect(addr, &tls);
            let mut codec = Connection::new(Role::Client, &Config::client());
            codec.open(&request()).unwrap();
            peer.send(codec.output()).unwrap();
            let data = frame(0, 0, 1, b"x");
            let records: Vec<u8> = (0..RECORDS).flat_map(|_| peer.record(&data)).collect();
            peer.stream.write_all(&records).unwrap();
            peer
        }
    });
    run(async {
        let accepted = Listener::from_std(listener).accept().await.unwrap();
        let (tunnel, requests) = serve(accepted, &tls, &Config::server()).await;
        let (mut before, mut most) = (0, 0);
        while tunnel.held_bytes() < RECORDS {
            rt::next_turn().await;
            let held = tunnel.held_bytes();
            most = most.max(held - before);
            before = held;
        }
        assert!(most <= 600, "{most} records in one turn");
        requests.clear();
        drop((tunnel, requests));
    });
    drop(peer.join().unwrap());
}

/// Of two workers the one that holds more than its share gives streams up, although nothing but
/// PING arrives there; the other one's stay.
#[test]
fn a_worker_within_its_share_gives_nothing_up() {
    run(async {
        let limit = TunnelMemory::new(15 << 20);
        let of_worker = || Surroundings {
            ping: (Duration::from_millis(100), Duration::from_secs(20)),
            memory: WorkerMemory::new(&limit),
            limit: Arc::clone(&limit),
        };
        let (full, other) = (of_worker(), of_worker());
        let stuck = async |worker: &Surroundings, streams: usize| {
            let pair = pair_in(Config::client(), Config::server(), worker).await;
            let mut all = Vec::new();
            for _ in 0..streams {
                let (near, far) = pair.open().await;
                all.push((pour(&pair.server, far), near));
            }
            until("they fill their windows", || {
                let full = |sent: &Poured| sent.failed.get() || sent.bytes.get() > 4_000_000;
                all.iter().all(|(sent, _)| full(sent))
            })
            .await;
            (pair, all)
        };
        let (_full_pair, full_streams) = stuck(&full, 3).await;
        assert_eq!(limit.streams_given_up(), 0);
        let (other_pair, other_streams) = stuck(&other, 1).await;
        until("the full one gives one up", || limit.streams_given_up() > 0).await;
        carries(&other_pair, true, 1 << 20).await;
        assert!(other_streams.iter().all(|(sent, _)| !sent.failed.get()));
        until("that one knows", || {
            full_streams.iter().any(|(sent, _)| sent.failed.get())
        })
        .await;
        assert!(limit.held() <= limit.limit());
    });
}

/// Half a record, of which more comes now and then, keeps a block for a record and no larger one.
#[test]
fn half_a_record_keeps_a_small_block() {
    let (listener, addr) = listen();
    let tls = certificate(&store());
    let peer = thread::spawn({
        let tls = Arc::clone(&tls);
        move || {
            let mut peer = Peer::connect(addr, &tls);
            let mut codec = Connection::new(Role::Client, &Config::client());
            codec.open(&request()).unwrap();
            peer.send(codec.output()).unwrap();
            // The longest record there is, with a frame that it fills.
            let data = frame(0, 0, 1, &[7; tls::Session::MAX_PLAINTEXT - 9]);
            let record = peer.record(&data);
            for piece in record.chunks(2_000) {
                peer.stream.write_all(piece).unwrap();
                thread::sleep(Duration::from_millis(20));
            }
            peer
        }
    });
    run(async {
        let accepted = Listener::from_std(listener).accept().await.unwrap();
        let (tunnel, requests) = serve(accepted, &tls, &Config::server()).await;
        let mut most = 0;
        while tunnel.held_bytes() == 0 {
            most = most.max(tunnel.pool().bytes_in_use());
            rt::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(most > 16_000 && most < 100_000, "{most} bytes");
        requests.clear();
        drop((tunnel, requests));
    });
    drop(peer.join().unwrap());
}

/// Streams that are given up say so to the peer with a code that nobody takes for an end.
#[test]
fn a_stream_that_is_given_up_is_reset_for_the_peer() {
    run(async {
        let surroundings = Surroundings::with_memory(16 << 20);
        let pair = pair_in(Config::client(), Config::server(), &surroundings).await;
        let mut streams = Vec::new();
        for _ in 0..8 {
            let (near, far) = pair.open().await;
            let pool = pair.server.pool();
            let far = Rc::new(far);
            let sending = Rc::clone(&far);
            rt::spawn(async move {
                let piece = vec![7; 16_000];
                while sending.send(&mut bufs(&pool, &piece)).await.is_ok() {}
            });
            streams.push((near, far));
        }
        until("one is given up", || {
            surroundings.limit.streams_given_up() > 0
        })
        .await;
        until("the peer knows", || {
            streams.iter().any(|(_, far)| far.is_gone())
        })
        .await;
        let (_, far) = streams.iter().find(|(_, far)| far.is_gone()).unwrap();
        let failure = far.recv(&mut VecDeque::new()).await.unwrap_err();
        let calm = ErrorCode::ENHANCE_YOUR_CALM;
        assert!(
            matches!(failure, StreamFailure::Reset(code) if code == calm),
            "{failure}"
        );
    });
}

/// What a server does with the connections it accepts: those whose first byte is `s` are not read.
fn partly_deaf_server() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let mut first = [0];
                if stream.peek(&mut first).is_err() || first[0] == b's' {
                    thread::sleep(super::HANG * 2);
                    return;
                }
                let (mut from, mut to) = (&stream, &stream);
                let _ = std::io::copy(&mut from, &mut to);
                let _ = stream.shutdown(Shutdown::Write);
            });
        }
    });
    port
}

/// Through whole workers: six applications that do not read, each sent as much as their windows and
/// sockets take, and one that does in the same tunnel. How many of the six were reset.
fn beside_deaf_applications(limit: usize) -> usize {
    let memory = TunnelMemory::new(limit);
    let port = partly_deaf_server();
    let worker = worker_with(port, "", &store(), {
        let memory = Arc::clone(&memory);
        move |config| config.tunnel_memory = memory
    });
    let mut moving = worker.connect(CLIENT);
    let mut back = [0; 5];
    moving.write_all(b"hello").unwrap();
    moving.read_exact(&mut back).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let stuck = Arc::new(AtomicUsize::new(0));
    let deaf: Vec<_> = (0..DEAF)
        .map(|_| {
            let (done, stuck) = (Arc::clone(&done), Arc::clone(&stuck));
            let mut stream = worker.connect(CLIENT);
            thread::spawn(move || {
                stream
                    .set_write_timeout(Some(Duration::from_millis(1_500)))
                    .unwrap();
                let (piece, mut is_stuck) = (vec![b's'; 100_000], false);
                while !done.load(Ordering::Relaxed) {
                    match stream.write(&piece) {
                        Ok(_) => {}
                        Err(error) if error.kind() == ErrorKind::WouldBlock && !is_stuck => {
                            is_stuck = true;
                            stuck.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                        Err(_) => {
                            stuck.fetch_add(usize::from(!is_stuck), Ordering::Relaxed);
                            return true;
                        }
                    }
                }
                false
            })
        })
        .collect();
    wait("all are stuck or reset", || {
        stuck.load(Ordering::Relaxed) == DEAF
    });
    wait("they hold no more than they may", || memory.held() <= limit);
    let data = pattern(3, 3_000_000);
    assert!(exchange(&moving, &data) == data);
    let data = pattern(4, 100_000);
    assert!(exchange(&worker.connect(CLIENT), &data) == data);
    let given_up = memory.streams_given_up() > 0;
    if given_up {
        wait("those who are given up are told", || {
            deaf.iter().any(|t| t.is_finished())
        });
    }
    done.store(true, Ordering::Relaxed);
    let reset = deaf
        .into_iter()
        .map(|thread| usize::from(thread.join().unwrap()));
    let resets: usize = reset.sum();
    assert_eq!(given_up, resets > 0);
    resets
}

const DEAF: usize = 6;

fn wait(what: &str, mut is: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is() {
        assert!(started.elapsed() < super::HANG, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn applications_that_do_not_read_stop_nobody() {
    assert_eq!(beside_deaf_applications(512 << 20), 0);
}

#[test]
fn applications_that_do_not_read_are_given_up_at_the_bound_and_only_they() {
    assert!(beside_deaf_applications(16 << 20) > 0);
}
