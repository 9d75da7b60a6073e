//! When a relay between two sockets splices where a sockmap may be at work.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rt::net::{ConnectOptions, Listener, connect};
use rt::{Runtime, RuntimeConfig};
use telemetry::{ConnectionInfo, Reporter};

use super::{HANG, listen, pattern, registry};
use crate::config::SockmapBypass;
use crate::relay;

/// Bytes each way.
const BYTES: usize = 16 << 20;

/// Says that sockets are plain once it was asked so many times.
#[derive(Debug)]
struct Fake {
    asked: AtomicUsize,
    plain_after: usize,
}

impl SockmapBypass for Fake {
    fn offer(&self, _: BorrowedFd<'_>) {}

    fn is_plain(&self, _: BorrowedFd<'_>) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed) >= self.plain_after
    }
}

/// Relays [`BYTES`] to an echo server and back; returns how many were spliced.
fn relayed(sockmap: Option<&Fake>) -> u64 {
    let (server, target) = listen();
    let echo = thread::spawn(move || {
        let (mut from, _) = server.accept().unwrap();
        let mut to = from.try_clone().unwrap();
        std::io::copy(&mut from, &mut to).unwrap();
        to.shutdown(Shutdown::Write).unwrap();
    });
    let (listener, addr) = listen();
    let client = thread::spawn(move || {
        let data = pattern(5, BYTES);
        let mut stream = TcpStream::connect(addr).unwrap();
        let mut writer = stream.try_clone().unwrap();
        let sent = data.clone();
        let upload = thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        upload.join().unwrap();
        assert!(received == data, "{} bytes, or others", received.len());
    });
    let mut runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let main = async {
        let client = Listener::from_std(listener).accept().await.unwrap();
        let server = connect(target, &ConnectOptions::default()).await.unwrap();
        let record = registry().opened(ConnectionInfo::new(Reporter::Source, addr, target));
        let sockmap = sockmap.map(|fake| fake as &dyn SockmapBypass);
        relay::client_to_server(client, server, &[&record], None, sockmap)
            .await
            .unwrap();
        rt::next_turn().await; // counters are told once per turn
        rt::next_turn().await;
    };
    let finished = runtime.run(async { rt::time::timeout(HANG, main).await });
    assert!(finished.unwrap().is_ok(), "the relay hangs");
    client.join().unwrap();
    echo.join().unwrap();
    runtime.counters().ring().spliced
}

#[test]
fn nothing_is_spliced_before_both_sockets_are_plain() {
    let fake = |plain_after| Fake {
        asked: AtomicUsize::new(0),
        plain_after,
    };
    let never = fake(usize::MAX);
    assert_eq!(relayed(Some(&never)), 0);
    let asked = never.asked.load(Ordering::Relaxed);
    assert!(asked > 2, "it was not asked again: {asked}");
    let most = 2 * ((BYTES >> 20) + 1);
    assert!(asked <= most, "asked {asked} times, more than once per MiB");
    // Some of it: how much shows how fast the machine is.
    let soon = fake(3);
    assert!(relayed(Some(&soon)) > 0);
    let asked = soon.asked.load(Ordering::Relaxed);
    assert!(asked <= most, "asked {asked} times");
}

#[test]
fn without_a_sockmap_nobody_is_asked() {
    assert!(relayed(None) > 0);
}
