//! Both ways to handle TLS records (`ZTUNNEL_TLS_RECORDS`), between whole workers.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;

use tls::RecordPath;

use super::end_to_end::{CLIENT, echo, worker_via};
use super::store::Store;
use super::{Ca, pattern};

/// Traffic from a worker of `near` to one of `far`: small messages, then bulk, then the end.
fn carry(near: RecordPath, far: RecordPath) {
    let ca = Ca::new();
    let store = |path| Store::with_records(ca.issuer(), path);
    let (server, _) = echo();
    let gateway = worker_via(server, "", None, &store(far));
    let worker = worker_via(server, "", Some(gateway.hbone), &store(near));
    let mut client = worker.connect(CLIENT);
    for (round, len) in [1, 100, 1024, 1025, 5000].into_iter().enumerate() {
        let sent = pattern(round as u64, len);
        client.write_all(&sent).unwrap();
        let mut received = vec![0; len];
        client.read_exact(&mut received).unwrap();
        assert_eq!(received, sent, "{near} to {far}: {len} bytes");
    }
    let bulk = pattern(9, 3 << 20);
    let sending = thread::spawn({
        let (mut client, bulk) = (client.try_clone().unwrap(), bulk.clone());
        move || {
            client.write_all(&bulk).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
        }
    });
    let mut received = Vec::new();
    client.read_to_end(&mut received).unwrap();
    sending.join().unwrap();
    assert!(received == bulk, "{near} to {far}: {}", received.len());
    // Of both, the tunnel's certificate says who did its records.
    for (worker, path) in [(&worker, near), (&gateway, far)] {
        let tls = worker.certificates.get(&super::identity("client"));
        assert_eq!(tls.unwrap().client.records(), path);
    }
    worker.drain();
    gateway.drain();
}

#[test]
fn records_by_rustls_on_both_sides() {
    carry(RecordPath::Rustls, RecordPath::Rustls);
}

#[test]
fn records_by_rustls_on_one_side() {
    carry(RecordPath::Own, RecordPath::Rustls);
    carry(RecordPath::Rustls, RecordPath::Own);
}
