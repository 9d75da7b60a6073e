//! Many handshakes at once, and those that fail.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use tls::{ClientSettings, Handshake, Issuer as _};

use super::end_to_end::{CLIENT, echo, exchange, worker, worker_with};
use super::peer::{Peer, Received};
use super::{identity, issuer, store};

/// A client whose certificate is refused learns so by an alert, although it has sent more by then.
#[test]
fn a_refusal_of_a_certificate_arrives_before_the_close() {
    let (port, _) = echo();
    let worker = worker(port, "");
    // Another mesh's certificate; the server's is fine for it.
    let roots = worker.certificates.get(&identity("app")).unwrap();
    let roots = roots.certificate().roots().to_vec();
    let foreign = issuer().issue(&identity("app")).unwrap();
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

/// As many handshakes as there are places, as many that wait, and one that is too many.
#[test]
fn handshakes_are_bounded_and_wait_in_turn() {
    let (port, _) = echo();
    let worker = worker_with(port, "", &store(), |config| config.handshakes_max = 2);
    let silent = || TcpStream::connect((Ipv4Addr::new(127, 0, 0, 3), worker.hbone)).unwrap();
    let mut waiting: Vec<TcpStream> = (0..4).map(|_| silent()).collect();
    let mut refused = silent();
    let error = refused.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let metric = |reason| format!("ztunnel_hbone_errors_total{{reason=\"{reason}\"}}");
    worker.until(&metric("handshake_overload"), 1);
    // Places that are given up go to those who wait, and then to a peer that means it.
    let rest = waiting.split_off(2);
    drop(waiting);
    worker.until(&metric("handshake_closed"), 2);
    drop(rest);
    worker.until(&metric("handshake_closed"), 4);
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
