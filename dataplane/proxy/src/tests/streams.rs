//! Several streams in one tunnel: exact, independent, bounded, and ended in order.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use hbone::{Config, ErrorCode};

use super::{Random, bufs, pair, pattern, run};
use crate::tunnel::{Tunnel, TunnelStream};

/// Sends `data` in pieces of random sizes, then the end.
async fn send(tunnel: Rc<Tunnel>, stream: Rc<TunnelStream>, data: Vec<u8>, mut random: Random) {
    let mut rest = &data[..];
    while !rest.is_empty() {
        let most = 1 << random.below(18);
        let n = (1 + random.below(most) as usize).min(rest.len());
        let mut pieces = bufs(&tunnel.pool(), &rest[..n]);
        stream.send(&mut pieces).await.unwrap();
        rest = &rest[n..];
        if random.below(8) == 0 {
            rt::yield_now().await;
        }
    }
    stream.finish().unwrap();
}

/// Receives to the end, sometimes pausing, and checks every byte.
async fn receive(stream: Rc<TunnelStream>, expected: Vec<u8>, mut random: Random) {
    let mut at = 0;
    let mut taken = VecDeque::new();
    while stream.recv(&mut taken).await.unwrap() > 0 {
        for buf in taken.drain(..) {
            assert!(
                buf[..] == expected[at..at + buf.len()],
                "differs behind byte {at}"
            );
            at += buf.len();
            stream.release(buf.len());
        }
        if random.below(16) == 0 {
            rt::time::sleep(Duration::from_millis(random.below(3))).await;
        }
    }
    assert_eq!(at, expected.len());
}

/// Both ways at once over many streams, random sizes, windows small enough to matter.
#[test]
fn bytes_are_exact_on_every_stream() {
    for seed in 1..=3 {
        run(async move {
            let small = Config {
                stream_window: 65_535,
                connection_window: 200_000,
                ..Config::server()
            };
            let pair = pair(Config::client(), small).await;
            let mut random = Random(seed);
            let open = Rc::new(Cell::new(0));
            for stream in 0..8 {
                let (near, far) = pair.open().await;
                let (near, far) = (Rc::new(near), Rc::new(far));
                let mut start = |tunnel: &Rc<Tunnel>, from: &Rc<_>, to: &Rc<_>| {
                    let seed = seed << 8 | stream;
                    let data = pattern(seed, random.below(1 << 20) as usize);
                    let tasks: [std::pin::Pin<Box<dyn Future<Output = ()>>>; 2] = [
                        Box::pin(receive(Rc::clone(to), data.clone(), Random(seed))),
                        Box::pin(send(
                            Rc::clone(tunnel),
                            Rc::clone(from),
                            data,
                            Random(seed + 1),
                        )),
                    ];
                    for task in tasks {
                        open.set(open.get() + 1);
                        let open = Rc::clone(&open);
                        rt::spawn(async move {
                            task.await;
                            open.set(open.get() - 1);
                        });
                    }
                };
                start(&pair.client, &near, &far);
                start(&pair.server, &far, &near);
            }
            while open.get() > 0 {
                rt::time::sleep(Duration::from_millis(2)).await;
            }
            assert!(pair.client.error().is_none() && pair.server.error().is_none());
            assert!(pair.client.idle_since().is_some(), "all streams are gone");
        });
    }
}

/// A stream nobody reads takes its window and no more, and does not stop its neighbour.
#[test]
fn a_slow_reader_stops_only_itself() {
    run(async {
        let pair = pair(Config::client(), Config::server()).await;
        let (_slow, stuck) = pair.open().await;
        let window = Config::client().stream_window as usize;
        let sent = Rc::new(Cell::new(0));
        rt::spawn({
            let (sent, pool) = (Rc::clone(&sent), pair.server.pool());
            async move {
                let piece = vec![1; 65_536];
                while stuck.send(&mut bufs(&pool, &piece)).await.is_ok() {
                    sent.set(sent.get() + piece.len());
                }
            }
        });
        for seed in 0..20 {
            let (near, far) = pair.open().await;
            let data = pattern(seed, 500_000);
            let tunnel = Rc::clone(&pair.server);
            rt::spawn(send(tunnel, Rc::new(far), data.clone(), Random(seed)));
            receive(Rc::new(near), data, Random(seed)).await;
        }
        assert!(
            sent.get() <= window,
            "{} of {window} bytes were taken",
            sent.get()
        );
        assert!(sent.get() + 65_536 >= window);
    });
}

/// After the announcement streams finish, none is opened, and the tunnel ends without an error of
/// its streams.
#[test]
fn a_drained_tunnel_finishes_its_streams() {
    run(async {
        let pair = pair(Config::client(), Config::server()).await;
        let (near, far) = pair.open().await;
        pair.server.shutdown_graceful();
        while pair.client.can_open() {
            rt::time::sleep(Duration::from_millis(1)).await;
        }
        let data = pattern(9, 2_000_000);
        let (near, far) = (Rc::new(near), Rc::new(far));
        rt::spawn(send(
            Rc::clone(&pair.server),
            Rc::clone(&far),
            data.clone(),
            Random(9),
        ));
        receive(Rc::clone(&near), data, Random(9)).await;
        assert!(!pair.server.has_ended());
        near.finish().unwrap();
        assert_eq!(far.recv(&mut VecDeque::new()).await.unwrap(), 0);
        drop((near, far));
        while !(pair.server.has_ended() && pair.client.error().is_some()) {
            rt::time::sleep(Duration::from_millis(5)).await;
        }
    });
}

/// A refusal arrives as its status, although the stream is reset behind it.
#[test]
fn a_refusal_arrives() {
    run(async {
        let pair = pair(Config::client(), Config::server()).await;
        for status in [401, 503] {
            let near = pair.client.open(&super::request()).unwrap();
            let (far, head) = pair.requests.next().await;
            assert_eq!(&*head.authority, "10.0.0.1:80");
            far.respond(status, None, true).unwrap();
            drop(far);
            assert_eq!(near.response().await.unwrap(), status);
        }
    });
}

/// Streams see the end of their tunnel, and later ones are refused.
#[test]
fn a_broken_tunnel_ends_its_streams() {
    run(async {
        let pair = pair(Config::client(), Config::server()).await;
        let (near, _far) = pair.open().await;
        let error = crate::tunnel::TunnelError::KeepaliveTimeout;
        pair.server.abort(error, ErrorCode::NO_ERROR);
        assert!(near.recv(&mut VecDeque::new()).await.is_err());
        assert!(pair.client.open(&super::request()).is_err());
    });
}
