//! Many short connections through one worker: afterwards nothing is left, and memory has not grown.
//!
//! `RT_SOAK_CONNECTIONS=1000000 cargo test -p rt --release --test soak` is the long one.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::cell::Cell;
use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::rc::Rc;
use std::time::Duration;

use rt::net::{ConnectOptions, Listener, TcpStream, connect};
use rt::{Backend, Runtime};

mod both;
use both::{is_available, with};

/// Clients at a time.
const CLIENTS: u64 = 32;
/// Resident memory may grow by this much after the first tenth of the connections.
const GROWTH: usize = 8 << 20;

async fn echo(stream: TcpStream) {
    let (mut read, mut write) = stream.split();
    let mut bufs = VecDeque::new();
    while read.recv(&mut bufs).await.is_ok_and(|n| n > 0) {
        bufs.drain(..).for_each(|buf| write.push(buf));
        if write.hand_over().await.is_err() {
            return;
        }
    }
    if write.flush().await.is_ok() {
        let _ = write.shutdown(); // the client may be gone
    }
}

async fn request(to: SocketAddr, number: u64) {
    let options = ConnectOptions::default();
    let stream = connect(to, &options).await.unwrap();
    let (mut read, mut write) = stream.split();
    let message = number.to_be_bytes();
    write.push_copy(&message);
    write.flush().await.unwrap();
    if number.is_multiple_of(3) {
        write.shutdown().unwrap();
    }
    let mut bufs = VecDeque::new();
    let mut answer = Vec::new();
    while answer.len() < message.len() {
        assert!(
            read.recv(&mut bufs).await.unwrap() > 0,
            "connection {number}"
        );
        bufs.drain(..)
            .for_each(|buf| answer.extend_from_slice(&buf));
    }
    assert_eq!(answer, message);
    if number.is_multiple_of(5) {
        write.reset_on_close().unwrap();
    }
}

fn resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = text.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn soak(backend: Backend, connections: u64) {
    let mut runtime = Runtime::new(with(backend)).unwrap();
    let counters = runtime.counters();
    let before = descriptors();
    let main = async {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        rt::spawn(async move {
            let mut listener = Listener::from_std(listener);
            loop {
                rt::spawn(echo(listener.accept().await.unwrap()));
            }
        });
        let (next, running) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(CLIENTS)));
        for _ in 0..CLIENTS {
            let (next, running) = (Rc::clone(&next), Rc::clone(&running));
            rt::spawn(async move {
                while next.get() < connections {
                    let number = next.replace(next.get() + 1);
                    // Every client port can be used again with each of 65,536 addresses.
                    let [.., high, low] = number.to_be_bytes();
                    let to = SocketAddr::from(([127, 1, high, low], port));
                    request(to, number).await;
                }
                running.set(running.get() - 1);
            });
        }
        let mut warm = None;
        while running.get() > 0 {
            rt::time::sleep(Duration::from_millis(2)).await;
            if next.get() >= connections / 10 {
                warm.get_or_insert_with(resident_bytes);
            }
        }
        // The listener's task, its accept and its descriptor stay.
        for _ in 0..500 {
            let left = (
                descriptors() - before,
                counters.operations(),
                counters.tasks(),
            );
            if left == (1, 1, 2) {
                let growth = resident_bytes().saturating_sub(warm.unwrap_or_default());
                assert!(
                    growth < GROWTH,
                    "{backend:?}: memory grew by {growth} bytes"
                );
                return;
            }
            rt::time::sleep(Duration::from_millis(2)).await;
        }
        panic!(
            "{backend:?}: {} descriptors, {} operations, {} tasks left",
            descriptors() - before,
            counters.operations(),
            counters.tasks()
        );
    };
    runtime.run(main).unwrap();
}

#[test]
fn short_connections_leave_nothing() {
    let chosen = std::env::var("RT_SOAK_CONNECTIONS").ok();
    let connections = chosen.map_or(10_000, |number| number.parse().unwrap());
    for backend in [Backend::IoUring, Backend::Epoll] {
        if is_available("short_connections_leave_nothing", backend) {
            soak(backend, connections);
        }
    }
}
