//! What an application sees when the other side stops early, and when a tunnel breaks.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use hbone::{Config, ErrorCode};
use rt::net::Listener;
use telemetry::{ConnectionInfo, ConnectionRecord, Reporter};

use super::{Pair, bufs, listen, pair, pattern, registry, run};
use crate::error::ProxyError;
use crate::relay;
use crate::tunnel::{StreamFailure, TunnelError, TunnelStream};

fn record() -> ConnectionRecord {
    let addr = "127.0.0.1:1".parse().unwrap();
    registry().opened(ConnectionInfo::new(Reporter::Source, addr, addr))
}

/// An application whose connection is relayed into a tunnel; `server` is the tunnel's other end.
async fn relayed<T: Send + 'static>(
    app: impl FnOnce(TcpStream) -> T + Send + 'static,
    server: impl AsyncFnOnce(&Pair, TunnelStream) -> (),
) -> (T, Result<(), ProxyError>) {
    let (listener, addr) = listen();
    let app = thread::spawn(move || {
        let stream = TcpStream::connect(addr).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        app(stream)
    });
    let accepted = Listener::from_std(listener).accept().await.unwrap();
    let pair = pair(Config::client(), Config::server()).await;
    let (near, far) = pair.open().await;
    let (sender, mut ended) = rt::mailbox::channel(1);
    rt::spawn(async move {
        let result = relay::client_to_tunnel(accepted, &near, &record()).await;
        let text = result.map_err(|error| match error {
            ProxyError::Stream(failure) => failure.to_string(),
            other => format!("unexpected: {other}"),
        });
        sender.send(text).unwrap();
    });
    server(&pair, far).await;
    let result = ended
        .recv()
        .await
        .map_err(|text| ProxyError::Stream(StreamFailure::from(TunnelError::Tls(text.into()))));
    // The connection is closed when the relay's halves are.
    rt::time::sleep(Duration::from_millis(20)).await;
    (
        thread::spawn(move || app.join().unwrap()).join().unwrap(),
        result,
    )
}

/// A server that answers before it has read everything, and goes: the answer arrives whole.
#[test]
fn an_early_answer_is_delivered() {
    let answer = pattern(3, 300_000);
    let expected = answer.clone();
    run(async move {
        let app = |mut stream: TcpStream| {
            let mut writer = stream.try_clone().unwrap();
            let upload = thread::spawn(move || while writer.write_all(&[1; 65_536]).is_ok() {});
            // Slow to read: the refusal overtakes the answer if it can.
            thread::sleep(Duration::from_millis(300));
            let mut received = vec![0; 300_000];
            let result = stream.read_exact(&mut received).map(|()| received);
            let _ = stream.shutdown(Shutdown::Both);
            upload.join().unwrap();
            result
        };
        let (received, result) = relayed(app, async |pair, far| {
            rt::time::sleep(Duration::from_millis(50)).await; // the window is full by now
            far.send(&mut bufs(&pair.server.pool(), &answer))
                .await
                .unwrap();
            far.finish().unwrap();
            drop(far);
        })
        .await;
        assert!(received.unwrap() == expected);
        assert!(result.is_ok(), "{result:?}");
    });
}

/// What a broken tunnel has cut off does not look complete.
#[test]
fn a_broken_tunnel_resets_the_application() {
    run(async {
        let app = |mut stream: TcpStream| stream.read_to_end(&mut Vec::new());
        let (seen, result) = relayed(app, async |pair, far| {
            far.send(&mut bufs(&pair.server.pool(), b"half an ans"))
                .await
                .unwrap();
            rt::time::sleep(Duration::from_millis(50)).await;
            pair.client
                .abort(TunnelError::KeepaliveTimeout, ErrorCode::NO_ERROR);
        })
        .await;
        assert_eq!(seen.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(result.is_err());
    });
}

/// A tunnel that breaks while nobody sends ends the connection all the same.
#[test]
fn a_half_closed_connection_ends_with_its_tunnel() {
    run(async {
        let app = |mut stream: TcpStream| {
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            (all, stream) // its sending direction stays open
        };
        let (seen, result) = relayed(app, async |pair, far| {
            far.send(&mut bufs(&pair.server.pool(), b"all of it"))
                .await
                .unwrap();
            far.finish().unwrap();
            rt::time::sleep(Duration::from_millis(50)).await;
            pair.client
                .abort(TunnelError::KeepaliveTimeout, ErrorCode::NO_ERROR);
        })
        .await;
        assert_eq!(seen.0, b"all of it");
        assert!(result.is_err());
    });
}

/// Sends more than anything between it and an application that does not read can hold.
async fn fill(pair: &Pair, far: &TunnelStream) {
    let mut much = bufs(&pair.server.pool(), &vec![1; 16 << 20]);
    let sending = rt::time::timeout(Duration::from_millis(500), far.send(&mut much));
    assert!(sending.await.is_err(), "it was taken");
}

/// An application that does not read does not keep its connection when nobody is left behind it,
/// whichever way that has come about.
#[test]
fn an_application_that_does_not_read_is_reset() {
    type Leave = fn(&Pair, TunnelStream);
    let ways: [(&str, Leave); 5] = [
        ("the stream is dropped", |_, far| drop(far)),
        ("the stream is cut off", |_, far| far.cut_off()),
        (
            "the stream is reset, then the tunnel closed",
            |pair, far| {
                drop(far);
                pair.server.shutdown_graceful();
            },
        ),
        ("the tunnel breaks", |pair, far| {
            let error = TunnelError::KeepaliveTimeout;
            pair.client.abort(error, ErrorCode::NO_ERROR);
            drop(far);
        }),
        ("the peer goes with the tunnel", |pair, far| {
            let error = TunnelError::KeepaliveTimeout;
            pair.server.abort(error, ErrorCode::NO_ERROR);
            drop(far);
        }),
    ];
    for (name, leave) in ways {
        run(async move {
            let app = |stream: TcpStream| {
                let started = std::time::Instant::now();
                loop {
                    if let Some(error) = stream.take_error().unwrap() {
                        return error.kind();
                    }
                    assert!(started.elapsed() < Duration::from_secs(20), "it stays");
                    thread::sleep(Duration::from_millis(10));
                }
            };
            let (seen, result) = relayed(app, async move |pair, far| {
                fill(pair, &far).await;
                leave(pair, far);
            })
            .await;
            assert_eq!(seen, ErrorKind::ConnectionReset, "{name}");
            assert!(result.is_err(), "{name}");
        });
    }
}

/// What was complete when its sender left, or its tunnel broke, is kept for a receiver that takes
/// its time.
#[test]
fn a_late_reader_gets_a_complete_answer() {
    for tunnel_breaks in [false, true] {
        let answer = pattern(9, 3_000_000);
        let expected = answer.clone();
        run(async move {
            let app = |mut stream: TcpStream| {
                thread::sleep(Duration::from_secs(3));
                let mut all = Vec::new();
                stream.read_to_end(&mut all).map(|_| all)
            };
            let (received, result) = relayed(app, async |pair, far| {
                far.send(&mut bufs(&pair.server.pool(), &answer))
                    .await
                    .unwrap();
                far.finish().unwrap();
                rt::time::sleep(Duration::from_millis(500)).await;
                if tunnel_breaks {
                    let error = TunnelError::KeepaliveTimeout;
                    pair.client.abort(error, ErrorCode::NO_ERROR);
                }
                drop(far);
            })
            .await;
            assert!(received.unwrap() == expected, "{tunnel_breaks}");
            assert_eq!(result.is_err(), tunnel_breaks, "{result:?}");
        });
    }
}
