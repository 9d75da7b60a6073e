//! A receiver that has ended its own stream and does not read: what is sent to it waits for room,
//! which costs nothing meanwhile. io_uring ends each wait for room at once on such sockets.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::collections::VecDeque;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rt::net::{ConnectOptions, Listener, ReadHalf, Splice, Spliced, WriteHalf, connect};
use rt::{Backend, Runtime};
use testkit::pattern;

mod both;
use both::{both_back_ends, with};

const LOCAL: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);
/// More than the sockets of a connection hold.
const BYTES: usize = 24 << 20;
/// System calls of a worker in [`QUIET`] that has nothing to do, and some for stragglers.
const CALLS_MAX: u64 = 100;
const QUIET: Duration = Duration::from_millis(300);

/// Threads that io_uring made for the ring of `owner`, a thread's directory below `/proc`.
fn kernel_threads(owner: &Path) -> usize {
    let name = format!("iou-wrk-{}", owner.file_name().unwrap().display());
    let names = fs::read_dir("/proc/self/task").unwrap().map(|task| {
        // It may end meanwhile.
        fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default()
    });
    names.filter(|comm| comm.trim_end() == name).count()
}

/// What a worker does with one connection.
type Job = fn(ReadHalf, WriteHalf, SocketAddr) -> std::pin::Pin<Box<dyn Future<Output = ()>>>;

/// Ends the client's stream, lets the worker fill the connection, reads late. Everything arrives.
fn a_late_reader_gets_everything(backend: Backend, target: SocketAddr, job: Job) {
    let listener = TcpListener::bind(LOCAL).unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let (say, hear) = mpsc::channel();
    let worker = thread::spawn(move || {
        let mut runtime = Runtime::new(with(backend)).unwrap();
        let own = fs::read_link("/proc/thread-self").unwrap();
        say.send((runtime.counters(), own)).unwrap();
        let main = async {
            let mut listener = Listener::from_std(listener);
            let (read, write) = listener.accept().await.unwrap().split();
            job(read, write, target).await;
        };
        let limit = Duration::from_secs(30);
        let done = runtime.run(async { rt::time::timeout(limit, main).await });
        done.unwrap().unwrap();
    });
    let (counters, thread) = hear.recv().unwrap();
    let calls = || {
        let before = counters.ring().enters;
        thread::sleep(QUIET);
        counters.ring().enters - before
    };
    // It may take some time until everything is full.
    let quiet = (0..20).any(|_| calls() <= CALLS_MAX);
    assert!(quiet, "the worker does not wait");
    assert_eq!(kernel_threads(&thread), 0, "the kernel waits in a thread");
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert!(
        got == pattern(0, BYTES),
        "{} bytes, or different",
        got.len()
    );
    worker.join().unwrap();
}

/// Sends the pattern in pieces of `size`.
async fn send(mut from: ReadHalf, mut to: WriteHalf, size: usize) {
    let mut bufs = VecDeque::new();
    assert_eq!(from.recv(&mut bufs).await.unwrap(), 0);
    let data = pattern(0, BYTES);
    for pieces in data.chunks(size * 16) {
        for piece in pieces.chunks(size) {
            to.push_copy(piece);
        }
        to.flush().await.unwrap();
    }
    to.shutdown().unwrap();
}

fn nobody() -> SocketAddr {
    LOCAL.into()
}

fn many_pieces_at_a_time(backend: Backend) {
    a_late_reader_gets_everything(backend, nobody(), |from, to, _| {
        Box::pin(send(from, to, 10_000))
    });
}

fn small_pieces_handed_over(backend: Backend) {
    a_late_reader_gets_everything(backend, nobody(), |_from, mut to, _| {
        Box::pin(async move {
            for piece in pattern(0, BYTES).chunks(4096) {
                to.push_copy(piece);
                to.hand_over().await.unwrap();
            }
            to.flush().await.unwrap();
            to.shutdown().unwrap();
        })
    });
}

fn spliced_data(backend: Backend) {
    let server = TcpListener::bind(LOCAL).unwrap();
    let target = server.local_addr().unwrap();
    let source = thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        stream.write_all(&pattern(0, BYTES)).unwrap();
    });
    a_late_reader_gets_everything(backend, target, |_from, mut to, target| {
        Box::pin(async move {
            let far = connect(target, &ConnectOptions::default()).await.unwrap();
            let (mut far_read, _far_write) = far.split();
            let mut bufs = VecDeque::new();
            while !Splice::is_possible(&far_read) {
                far_read.recv(&mut bufs).await.unwrap();
                bufs.drain(..).for_each(|buf| to.push(buf));
                to.hand_over().await.unwrap();
            }
            let mut pipe = Splice::new().unwrap();
            let end = pipe.relay(&mut far_read, &mut to, |_| {}).await.unwrap();
            assert_eq!(end, Spliced::End);
            to.shutdown().unwrap();
        })
    });
    source.join().unwrap();
}

both_back_ends! {
    many_pieces_at_a_time,
    small_pieces_handed_over,
    spliced_data,
}
