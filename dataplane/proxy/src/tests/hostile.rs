//! Peers that have a certificate and mean harm: they do not read, or ask for more than they take.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use hbone::{Config, Connection, Role};
use rt::net::Listener;
use tls::{Handshake, Session, WorkloadTls};

use super::{bufs, certificate, identity, listen, request, run, serve, store};
use crate::tunnel::TunnelError;

/// A peer that speaks TLS and sends whatever it is told to.
struct Peer {
    stream: TcpStream,
    session: Session,
}

impl Peer {
    fn connect(addr: SocketAddr, tls: &WorkloadTls) -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        let socket = socket.unwrap();
        socket.set_recv_buffer_size(4096).unwrap(); // what it does not read, we notice soon
        socket.connect(&addr.into()).unwrap();
        let mut stream = TcpStream::from(socket);
        let mut handshake = Handshake::client(&tls.client, &identity("app")).unwrap();
        let (mut output, mut input) = (Vec::new(), [0; 4096]);
        let mut n = 0;
        loop {
            let progress = handshake.advance(&input[..n], &mut output).unwrap();
            stream.write_all(&output).unwrap();
            output.clear();
            if let Some(session) = progress.established {
                return Self { stream, session };
            }
            n = stream.read(&mut input).unwrap();
        }
    }

    fn send(&mut self, plaintext: &[u8]) -> std::io::Result<()> {
        let mut record = vec![0; Session::RECORD_HEADER];
        record.extend_from_slice(plaintext);
        record.resize(record.len() + Session::RECORD_TRAILER, 0);
        self.session.seal(&mut record).unwrap();
        self.stream.write_all(&record)
    }
}

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
        let tls = std::sync::Arc::clone(&tls);
        move || {
            let mut peer = Peer::connect(addr, &tls);
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
        let tls = std::sync::Arc::clone(&tls);
        move || {
            let mut peer = Peer::connect(addr, &tls);
            peer.send(preface().output()).unwrap();
            let limit = 200_000;
            (0..limit).any(|_| peer.send(frames).is_err())
        }
    });
    let error = run(async {
        let accepted = Listener::from_std(listener).accept().await.unwrap();
        let (tunnel, _requests) = serve(accepted, &tls, &Config::server()).await;
        loop {
            rt::time::sleep(Duration::from_millis(5)).await;
            if let Some(error) = tunnel.error() {
                break error;
            }
        }
    });
    assert!(peer.join().unwrap(), "the tunnel was not closed");
    error
}

/// Eight PINGs in a record: few enough that the codec takes them for the life of the tunnel.
#[test]
fn answers_to_a_peer_that_does_not_read_are_bounded() {
    const PING: [u8; 17] = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    static PINGS: [u8; 17 * 8] = {
        let mut all = [0; 17 * 8];
        let mut at = 0;
        while at < all.len() {
            all[at] = PING[at % 17];
            at += 1;
        }
        all
    };
    let error = flood(&PINGS);
    assert!(matches!(error, TunnelError::Unread(_)), "{error}");
}

/// Payload without a stream, and nothing but an abort.
#[test]
fn a_peer_that_breaks_http2_is_named() {
    let error = flood(&[0, 0, 1, 0, 0, 0, 0, 0, 9, b'x']);
    assert!(matches!(error, TunnelError::Http2(_)), "{error}");
}
