//! Peers that have a certificate and mean harm: they do not read, or ask for more than they take.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use hbone::{Config, Connection, Role};
use identity::WorkloadTls;
use rt::net::Listener;
use telemetry::Event;

use super::peer::{Peer, Received, frame};
use super::{bufs, certificate, listen, pair, registry, request, run, serve, serve_with, store};
use crate::tunnel::{Tunnel, TunnelError, TunnelStream};

/// A peer with a small receive buffer: what it does not read, we notice soon.
fn connect(addr: SocketAddr, tls: &WorkloadTls) -> Peer {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
    let socket = socket.unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&addr.into()).unwrap();
    Peer::client(socket.into(), tls)
}

/// Blocks that a tunnel itself may hold while its streams wait: those being filled and sent
/// ([`SEND_HIGH`](crate::tunnel::SEND_HIGH)), and those being received.
const MEMORY_OF_A_TUNNEL: usize = crate::tunnel::SEND_HIGH / 16_384 + 8;

fn preface() -> Connection {
    let config = Config {
        stream_window: 64 << 20,
        connection_window: 64 << 20,
        ..Config::client()
    };
    Connection::new(Role::Client, &config)
}

/// A tunnel that has failed goes away, although its peer does not take what was on its way.
#[test]
fn a_peer_that_does_not_read_keeps_nothing() {
    let (listener, addr) = listen();
    let tls = certificate(&store());
    let (done, wait) = mpsc::channel::<()>();
    let peer = thread::spawn({
        let tls = Arc::clone(&tls);
        move || {
            let mut peer = connect(addr, &tls);
            let mut codec = preface();
            codec.open(&request()).unwrap();
            peer.send(codec.output()).unwrap();
            let _ = wait.recv(); // its socket stays open, unread, until the test is over
        }
    });
    run(async {
        let accepted = Listener::from_std(listener).accept().await.unwrap();
        let (tunnel, requests) = serve(accepted, &tls, &Config::server()).await;
        let stream = requests.accept().await;
        let chunk = vec![7; 1 << 20];
        let stuck = async {
            loop {
                let mut bufs = bufs(&tunnel.pool(), &chunk);
                stream.send(&mut bufs).await.unwrap();
            }
        };
        assert!(
            rt::time::timeout(Duration::from_millis(500), stuck)
                .await
                .is_err()
        );
        tunnel.abort(TunnelError::KeepaliveTimeout, hbone::ErrorCode::NO_ERROR);
        drop(stream);
        let left = Rc::downgrade(&tunnel);
        drop((tunnel, requests));
        while left.strong_count() > 0 {
            rt::time::sleep(Duration::from_millis(20)).await;
        }
    });
    drop(done);
    peer.join().unwrap();
}

/// Sends `frames` over and over, reading nothing, until the tunnel ends; returns why it did.
fn flood(frames: &'static [u8]) -> TunnelError {
    let (listener, addr) = listen();
    let tls = certificate(&store());
    let peer = thread::spawn({
        let tls = Arc::clone(&tls);
        move || {
            let mut peer = connect(addr, &tls);
            let mut codec = preface();
            codec.open(&request()).unwrap();
            peer.send(codec.output()).unwrap();
            let limit = 200_000;
            (0..limit).any(|_| peer.send(frames).is_err())
        }
    });
    let error = run(async {
        let accepted = Listener::from_std(listener).accept().await.unwrap();
        let (tunnel, requests) = serve(accepted, &tls, &Config::server()).await;
        loop {
            rt::time::sleep(Duration::from_millis(5)).await;
            if let Some(error) = tunnel.error() {
                requests.clear(); // streams hold their tunnel
                break error;
            }
        }
    });
    assert!(peer.join().unwrap(), "the tunnel was not closed");
    error
}

/// PINGs among payload, so that the codec takes them for the life of the tunnel.
#[test]
fn answers_to_a_peer_that_does_not_read_are_bounded() {
    const ROUND: [u8; 27] = [
        0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, // PING
        0, 0, 1, 0, 0, 0, 0, 0, 1, b'x', // DATA
    ];
    static ROUNDS: [u8; 27 * 8] = {
        let mut all = [0; 27 * 8];
        let mut at = 0;
        while at < all.len() {
            all[at] = ROUND[at % 27];
            at += 1;
        }
        all
    };
    let error = flood(&ROUNDS);
    assert!(matches!(error, TunnelError::Unread(_)), "{error}");
}

/// Payload without a stream, and nothing but an abort.
#[test]
fn a_peer_that_breaks_http2_is_named() {
    let error = flood(&[0, 0, 1, 0, 0, 0, 0, 0, 9, b'x']);
    assert!(matches!(error, TunnelError::Http2(_)), "{error}");
}

/// SETTINGS_INITIAL_WINDOW_SIZE.
fn initial_window(bytes: u32) -> Vec<u8> {
    let mut setting = vec![0, 4];
    setting.extend(bytes.to_be_bytes());
    frame(4, 0, 0, &setting)
}

/// Payload bytes of DATA frames by stream.
#[derive(Default)]
struct Payload {
    plaintext: Vec<u8>,
    by_stream: BTreeMap<u32, usize>,
}

impl Payload {
    fn take(&mut self, data: &[u8]) {
        self.plaintext.extend_from_slice(data);
        while let [a, b, c, kind, _, id @ ..] = &self.plaintext[..]
            && let Some((id, rest)) = id.split_first_chunk()
            && let length = u32::from_be_bytes([0, *a, *b, *c]) as usize
            && length <= rest.len()
        {
            if *kind == 0 {
                *self.by_stream.entry(u32::from_be_bytes(*id)).or_default() += length;
            }
            self.plaintext.drain(..9 + length);
        }
    }
}

/// Tries to send on `stream` for ever, a piece at a time as a relay does; counts what went.
fn pour(tunnel: &Rc<Tunnel>, stream: TunnelStream) -> Rc<Cell<usize>> {
    let poured = Rc::new(Cell::new(0));
    let (count, pool) = (Rc::clone(&poured), tunnel.pool());
    rt::spawn(async move {
        let piece = vec![7; 16_000];
        while stream.send(&mut bufs(&pool, &piece)).await.is_ok() {
            count.set(count.get() + piece.len());
        }
    });
    poured
}

/// A peer that opens no window for some streams stalls those and no other, and what they wanted to
/// send takes a piece of memory each.
#[test]
fn streams_without_a_window_stall_alone_in_bounded_memory() {
    const STALLED: usize = 20;
    const SERVED: usize = 2 << 20;
    let (listener, addr) = listen();
    let tls = certificate(&store());
    let peer = thread::spawn({
        let tls = Arc::clone(&tls);
        move || {
            let mut peer = Peer::connect(addr, &tls);
            let mut codec = preface();
            peer.send(codec.output()).unwrap();
            codec.consume_output(codec.output().len());
            peer.send(&initial_window(0)).unwrap();
            for _ in 0..=STALLED {
                codec.open(&request()).unwrap();
            }
            peer.send(codec.output()).unwrap();
            // The last one gets a window.
            let served = 2 * STALLED as u32 + 1;
            let window = (SERVED as u32).to_be_bytes();
            peer.send(&frame(8, 0, served, &window)).unwrap();
            let mut payload = Payload::default();
            while payload.by_stream.get(&served) != Some(&SERVED) {
                match peer.receive() {
                    Some(Received::Data(data)) => payload.take(&data),
                    Some(Received::Control) => {}
                    _ => panic!("ended after {:?}", payload.by_stream),
                }
            }
            payload.by_stream
        }
    });
    run(async {
        let accepted = Listener::from_std(listener).accept().await.unwrap();
        let telemetry = registry();
        let (tunnel, requests) = serve_with(accepted, &tls, &Config::server(), &telemetry).await;
        let mut poured = Vec::new();
        for _ in 0..=STALLED {
            poured.push(pour(&tunnel, requests.accept().await));
        }
        while tunnel.error().is_none() {
            let blocks = tunnel.pool().other_blocks_in_use();
            let bound = STALLED + MEMORY_OF_A_TUNNEL;
            assert!(blocks <= bound, "{blocks} blocks of at most {bound}");
            rt::time::sleep(Duration::from_millis(1)).await;
        }
        let served = poured.pop().unwrap();
        assert!(served.get() + 16_000 > SERVED, "{}", served.get());
        assert!(poured.iter().all(|stalled| stalled.get() == 0));
        let stalls = telemetry.events(Event::WindowStall);
        assert!(stalls > STALLED as u64, "{stalls} stalls counted");
    });
    let by_stream = peer.join().unwrap();
    assert_eq!(by_stream.len(), 1, "{by_stream:?}");
}

/// A peer that never gives the connection's window back gets the first 64 KiB, and holds no more
/// memory than that; the worker's other tunnels go on.
#[test]
fn a_connection_without_a_window_stalls_alone_in_bounded_memory() {
    const STREAMS: usize = 20;
    const FIRST_WINDOW: usize = 65_535;
    let (listener, addr) = listen();
    let tls = certificate(&store());
    let (done, wait) = mpsc::channel::<()>();
    let peer = thread::spawn({
        let tls = Arc::clone(&tls);
        move || {
            let mut peer = Peer::connect(addr, &tls);
            let config = Config {
                connection_window: FIRST_WINDOW as u32,
                ..Config::client()
            };
            let mut codec = Connection::new(Role::Client, &config);
            for _ in 0..STREAMS {
                codec.open(&request()).unwrap();
            }
            peer.send(codec.output()).unwrap();
            let mut payload = Payload::default();
            while payload.by_stream.values().sum::<usize>() < FIRST_WINDOW {
                match peer.receive() {
                    Some(Received::Data(data)) => payload.take(&data),
                    Some(Received::Control) => {}
                    _ => panic!("ended after {:?}", payload.by_stream),
                }
            }
            let _ = wait.recv();
            payload.by_stream.values().sum::<usize>()
        }
    });
    run(async {
        let accepted = Listener::from_std(listener).accept().await.unwrap();
        let telemetry = registry();
        let (tunnel, requests) = serve_with(accepted, &tls, &Config::server(), &telemetry).await;
        let mut poured = Vec::new();
        for _ in 0..STREAMS {
            poured.push(pour(&tunnel, requests.accept().await));
        }
        while telemetry.events(Event::WindowStall) < STREAMS as u64 {
            rt::time::sleep(Duration::from_millis(1)).await;
        }
        // Another tunnel of the same worker carries more than the stalled one ever may.
        let pair = pair(Config::client(), Config::server()).await;
        let (near, far) = pair.open().await;
        pour(&pair.server, far);
        let (mut received, mut bufs) = (0, VecDeque::new());
        while received < 4 << 20 {
            let n = near.recv(&mut bufs).await.unwrap();
            bufs.clear();
            near.release(n);
            received += n;
        }
        drop((near, pair));
        rt::time::sleep(Duration::from_millis(50)).await;
        let blocks = tunnel.pool().other_blocks_in_use();
        let bound = STREAMS + MEMORY_OF_A_TUNNEL;
        assert!(blocks <= bound, "{blocks} blocks of at most {bound}");
        let sent: usize = poured.iter().map(|stalled| stalled.get()).sum();
        assert!(sent <= FIRST_WINDOW, "{sent} bytes");
        drop(done);
        while tunnel.error().is_none() {
            rt::time::sleep(Duration::from_millis(1)).await;
        }
    });
    assert_eq!(peer.join().unwrap(), FIRST_WINDOW);
}

/// More connections than descriptors: new ones are reset, and nothing else is.
#[test]
fn connections_beyond_the_limit_of_descriptors_are_reset() {
    use std::io::{ErrorKind, Read as _};
    let (port, _) = super::end_to_end::echo();
    let worker = super::end_to_end::worker_with(port, "", &store(), |config| {
        config.descriptors_max = 0;
    });
    for _ in 0..5 {
        let mut stream = worker.connect(super::end_to_end::CLIENT);
        let error = stream.read(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    worker.drain();
}
