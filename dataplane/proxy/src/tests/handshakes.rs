//! Many handshakes at once, and those that fail.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};

use tls::{ClientSettings, Handshake};

use super::HANG;
use super::end_to_end::{CLIENT, Worker, echo, exchange, worker, worker_with};
use super::peer::{Peer, Received};
use super::{Ca, identity, store};

/// A client whose certificate is refused learns so by an alert, although it has sent more by then.
#[test]
fn a_refusal_of_a_certificate_arrives_before_the_close() {
    let (port, _) = echo();
    let worker = worker(port, "");
    // Another mesh's certificate; the server's is fine for it.
    let roots = worker.certificates.get(&identity("app")).unwrap();
    let roots = roots.certificate().roots().to_vec();
    let foreign = Ca::new().authority().issue(&identity("app"), HANG).unwrap();
    let foreign = foreign.with_roots(roots).unwrap();
    let settings = ClientSettings::new(&foreign).unwrap();
    for _ in 0..20 {
        let stream = TcpStream::connect((Ipv4Addr::new(127, 0, 0, 3), worker.hbone)).unwrap();
        let handshake = Handshake::client(&settings, &identity("server")).unwrap();
        let mut peer = Peer::over(stream, handshake);
        // As an eager client does: more behind its Finished.
        peer.send(&[0; 10_000]).unwrap();
        let Some(Received::Failed(text)) = peer.receive() else {
            panic!("no alert");
        };
        assert!(
            text.contains("UnknownCA") || text.contains("DecryptError"),
            "{text}"
        );
    }
    worker.drain();
}

/// A connection to the worker's HBONE port, from an address of its own.
fn from(last: u8, worker: &Worker) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
    let socket = socket.unwrap();
    let source = SocketAddr::from(([127, 0, 1, last], 0));
    socket.bind(&source.into()).unwrap();
    let to = SocketAddr::from(([127, 0, 0, 3], worker.hbone));
    socket.connect(&to.into()).unwrap();
    socket.set_read_timeout(Some(HANG)).unwrap();
    socket.into()
}

/// What a client says first.
fn client_hello(worker: &Worker) -> Vec<u8> {
    let tls = worker.certificates.get(&identity("app")).unwrap();
    let mut handshake = Handshake::client(&tls.client, &identity("server")).unwrap();
    let mut hello = Vec::new();
    handshake.advance(&[], &mut hello).unwrap();
    hello
}

const fn fault(reason: &'static str) -> (&'static str, &'static str) {
    ("ztunnel_hbone_errors_total", reason)
}

fn counted(worker: &Worker, (name, reason): (&str, &str), value: u64) {
    worker.until(&format!("{name}{{reason=\"{reason}\"}}"), value);
}

/// Many times as many as there is room for, and every one is there before the honest one: those
/// who have said nothing, or half of something, are in nobody's way.
#[test]
fn silent_connections_keep_no_tunnel_out() {
    let (port, _) = echo();
    let worker = worker_with(port, "", &store(), |config| {
        config.handshakes_max = 2;
        config.handshake_timeout = HANG; // nobody goes because it is time
    });
    let hello = client_hello(&worker);
    let mut silent = Vec::new();
    for number in 0..60 {
        let mut stream = from(number % 6, &worker);
        let cut = hello.len() - 1;
        // Nothing, the first byte, and all but the last.
        let part = [0, 1, cut][usize::from(number) % 3];
        stream.write_all(&hello[..part]).unwrap();
        silent.push(stream);
    }
    // The oldest went, which were 60 less the room for 8.
    counted(&worker, fault("handshake_timeout"), 52);
    assert_eq!(exchange(&worker.connect(CLIENT), b"x"), b"x");
    // The newest are still there: the last of them may go on.
    let last = silent.pop().unwrap();
    (&last).write_all(&hello[hello.len() - 1..]).unwrap();
    let answered = (&last).read(&mut [0; 5]).unwrap();
    assert_eq!(answered, 5, "a ServerHello");
    let gone = (&silent[0]).read(&mut [0; 1]);
    assert!(matches!(gone, Ok(0) | Err(_)), "{gone:?}");
    drop((silent, last));
    worker.drain();
}

/// The sibling: a ClientHello costs nothing either. Who sends one and no more has its share of the
/// places, and others have theirs.
#[test]
fn half_handshakes_of_one_address_keep_no_other_out() {
    let (port, _) = echo();
    let worker = worker_with(port, "", &store(), |config| {
        config.handshakes_max = 16;
        config.handshake_timeout = HANG;
    });
    let hello = client_hello(&worker);
    let mut half = Vec::new();
    for _ in 0..30 {
        let mut stream = from(1, &worker);
        stream.write_all(&hello).unwrap();
        half.push(stream);
    }
    // Eight hold places, sixteen wait, and the rest is too many.
    counted(&worker, fault("handshake_overload"), 6);
    assert_eq!(exchange(&worker.connect(CLIENT), b"x"), b"x");
    drop(half);
    worker.drain();
}

/// And from as many addresses as one likes: silence lasts for a moment where others wait.
#[test]
fn half_handshakes_of_many_addresses_last_for_a_moment() {
    let (port, _) = echo();
    let worker = worker_with(port, "", &store(), |config| {
        config.handshakes_max = 4;
        config.handshake_timeout = HANG; // nobody goes because it is time
    });
    let hello = client_hello(&worker);
    let mut half: Vec<TcpStream> = (0..8).map(|last| from(last, &worker)).collect();
    for stream in &mut half[..7] {
        stream.write_all(&hello).unwrap();
    }
    for stream in &half[..4] {
        let mut stream = stream;
        assert_eq!(stream.read(&mut [0; 5]).unwrap(), 5, "it has a place");
    }
    assert_eq!(exchange(&worker.connect(CLIENT), b"x"), b"x");
    drop(half);
    worker.drain();
}

/// As many handshakes as there are places, as many that wait, and one that is too many.
#[test]
fn handshakes_are_bounded_and_wait_in_turn() {
    let (port, _) = echo();
    let worker = worker_with(port, "", &store(), |config| config.handshakes_max = 2);
    let hello = client_hello(&worker);
    let half = |last| {
        let mut stream = from(last, &worker);
        stream.write_all(&hello).unwrap();
        stream
    };
    let mut waiting: Vec<TcpStream> = Vec::new();
    for last in 0..2 {
        waiting.push(half(last));
        assert_eq!(waiting[usize::from(last)].read(&mut [0; 5]).unwrap(), 5);
    }
    waiting.extend([half(3), half(4)]);
    let mut refused = half(5);
    let error = refused.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    counted(&worker, fault("handshake_overload"), 1);
    // Places that are given up go to those who wait, and then to a peer that means it.
    let rest = waiting.split_off(2);
    for stream in waiting {
        stream.shutdown(Shutdown::Both).unwrap();
    }
    counted(&worker, fault("handshake_closed"), 2);
    for stream in &rest {
        let mut stream = stream;
        assert_eq!(stream.read(&mut [0; 5]).unwrap(), 5, "it has a place now");
        stream.shutdown(Shutdown::Both).unwrap();
    }
    counted(&worker, fault("handshake_closed"), 4);
    assert_eq!(exchange(&worker.connect(CLIENT), b"x"), b"x");
    worker.drain();
}

/// Those who say nothing are given up.
#[test]
fn silent_peers_are_given_up() {
    let (port, _) = echo();
    let worker = worker_with(port, "", &store(), |config| {
        config.handshake_timeout = std::time::Duration::from_millis(100);
    });
    let mut silent = TcpStream::connect((Ipv4Addr::new(127, 0, 0, 3), worker.hbone)).unwrap();
    assert_eq!(silent.read(&mut [0; 1]).unwrap(), 0);
    worker.until(
        "ztunnel_hbone_errors_total{reason=\"handshake_timeout\"}",
        1,
    );
    let mut plain = TcpStream::connect((Ipv4Addr::new(127, 0, 0, 3), worker.hbone)).unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let _ = plain.read(&mut [0; 100]); // an alert or the end
    worker.until("ztunnel_hbone_errors_total{reason=\"handshake\"}", 1);
    worker.drain();
}
