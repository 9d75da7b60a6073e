//! Streams that are opened and reset as fast as may be, by a peer with a certificate, at a whole
//! worker: they cost it next to nothing, and the peer is shown the door.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hbone::{Config, ConnectRequest, Connection, ErrorCode, Role};
use tls::Handshake;

use super::end_to_end::{CLIENT, Worker, exchange, worker};
use super::peer::{Peer, Received, frame};
use super::{HANG, identity, pattern, request};

/// A server that echoes, and counts its connections.
fn counting_echo() -> (u16, Arc<AtomicU32>) {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = Arc::new(AtomicU32::new(0));
    let accepted = Arc::clone(&count);
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            accepted.fetch_add(1, Ordering::Relaxed);
            thread::spawn(move || {
                let (mut from, mut to) = (&stream, &stream);
                let _ = std::io::copy(&mut from, &mut to);
                let _ = stream.shutdown(std::net::Shutdown::Write);
            });
        }
    });
    (port, count)
}

fn connect(worker: &Worker) -> Peer {
    let server = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 3), worker.hbone));
    let client = worker.certificates.get(&identity("client")).unwrap();
    let handshake = Handshake::client(&client.client, &identity("server")).unwrap();
    Peer::over(TcpStream::connect(server).unwrap(), handshake)
}

fn to(authority: &str) -> ConnectRequest<'_> {
    ConnectRequest {
        authority,
        ..request()
    }
}

/// Sockets hold tens of thousands that are written and not read.
const STREAMS: u32 = 400_000;

/// Opens streams and makes each come to nothing by `end`, until the worker ends the tunnel; HEADERS
/// and what follows are records of their own, `pause` apart. How many were opened, and the code of
/// the first GOAWAY.
fn flood(worker: &Worker, port: u16, pause: Option<Duration>, end: fn(u32) -> Vec<u8>) -> u32 {
    let mut peer = connect(worker);
    let mut codec = Connection::new(Role::Client, &Config::client());
    peer.send(codec.output()).unwrap();
    codec.consume_output(codec.output().len());
    let authority = format!("127.0.0.3:{port}");
    let mut opened = 0;
    while opened < STREAMS {
        let Ok(id) = codec.open(&to(&authority)) else {
            panic!("the codec of the test has had enough")
        };
        let headers = peer.record(codec.output());
        codec.reset(id, ErrorCode::CANCEL);
        codec.consume_output(codec.output().len());
        let rest = peer.record(&end(id.get()));
        opened += 1;
        let sent = match pause {
            None => peer.stream.write_all(&[headers, rest].concat()),
            Some(pause) => {
                let sent = peer.stream.write_all(&headers);
                thread::sleep(pause);
                sent.and_then(|()| peer.stream.write_all(&rest))
            }
        };
        if sent.is_err() {
            break;
        }
    }
    assert!(opened < STREAMS, "the flood was not stopped");
    // What the worker said, as far as the end of the connection did not take it along.
    let mut said = Vec::new();
    while let Some(Received::Data(data)) = peer.receive() {
        said.extend(data);
    }
    let calm = ErrorCode::ENHANCE_YOUR_CALM.0.to_be_bytes();
    let go_away = said.windows(17).any(|at| at[3] == 7 && at[13..17] == calm);
    assert!(
        go_away || said.is_empty(),
        "no GOAWAY among {} bytes",
        said.len()
    );
    opened
}

fn reset(id: u32) -> Vec<u8> {
    frame(3, 0, id, &8u32.to_be_bytes())
}

/// WINDOW_UPDATE without an increment: the worker resets the stream.
fn broken(id: u32) -> Vec<u8> {
    frame(8, 0, id, &[0; 4])
}

fn until(what: &str, mut is: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is() {
        assert!(started.elapsed() < HANG, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Streams that are gone before anybody looked at them dial nothing; whoever opens hundreds of them
/// is shown the door, and an honest client beside it notices nothing.
#[test]
fn rapid_reset_dials_nothing_and_is_shown_the_door() {
    for end in [reset, broken] {
        let (port, dialled) = counting_echo();
        let worker = worker(port, "");
        let honest = worker.connect(CLIENT);
        let data = pattern(1, 100_000);
        let opened = flood(&worker, port, None, end);
        assert!(opened > 400, "{opened} are no flood");
        // Now and then the two records come apart; the honest one is one.
        let dialled = dialled.load(Ordering::Relaxed);
        assert!(dialled < 100, "{dialled} of {opened} dialled");
        let flood = "ztunnel_hbone_errors_total{reason=\"flood\"}";
        until("it is counted", || worker.metric(flood) > 0);
        assert!(exchange(&honest, &data) == data, "beside {opened} streams");
        assert!(exchange(&worker.connect(CLIENT), &data) == data);
        drop(honest);
        worker.drain();
    }
}

/// Streams that dial before they are reset are bounded, and leave nothing behind.
#[test]
fn slow_rapid_reset_leaves_nothing_behind() {
    let (port, dialled) = counting_echo();
    let worker = worker(port, "");
    let opened = flood(&worker, port, Some(Duration::from_micros(300)), reset);
    let dialled = dialled.load(Ordering::Relaxed);
    assert!(dialled <= opened, "{dialled} of {opened}");
    let open = "istio_tcp_sockets_open{reporter=\"destination\"}";
    until("nothing is open", || worker.metric(open) == 0);
    let data = pattern(2, 10_000);
    assert!(exchange(&worker.connect(CLIENT), &data) == data);
    worker.drain();
}
