//! Urgent data (`MSG_OOB`, telnet's and FTP's interrupts) stay in the stream, in their place,
//! however it is received: one message at a time, in bulk, scattered, or through a pipe.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rt::net::{ConnectOptions, Listener, Placement, ReadHalf, Splice, Spliced, WriteHalf, connect};
use rt::{Backend, Runtime};
use testkit::pattern;

mod both;
use both::{both_back_ends, with};

const LOCAL: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

/// How a direction is relayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Copied(Placement),
    Spliced,
}

async fn pump(mut from: ReadHalf, mut to: WriteHalf, how: How) -> io::Result<()> {
    let mut bufs = VecDeque::new();
    let mut pipe = Splice::new()?;
    if let How::Copied(placement) = how {
        from.set_placement(placement);
    }
    loop {
        if how == How::Spliced
            && Splice::is_possible(&from)
            && pipe.relay(&mut from, &mut to, |_| {}).await? == Spliced::End
        {
            break;
        }
        if from.recv(&mut bufs).await? == 0 {
            break;
        }
        bufs.drain(..).for_each(|buf| to.push(buf));
        to.hand_over().await?;
    }
    to.flush().await?;
    to.shutdown()
}

/// Relays one connection to `target`.
fn relay(backend: Backend, target: SocketAddr, how: How) -> (SocketAddr, thread::JoinHandle<()>) {
    let listener = TcpListener::bind(LOCAL).unwrap();
    let addr = listener.local_addr().unwrap();
    let (say, hear) = mpsc::channel();
    let handle = thread::spawn(move || {
        let mut runtime = Runtime::new(with(backend)).unwrap();
        let main = async {
            let mut listener = Listener::from_std(listener);
            say.send(()).unwrap();
            let (near_read, near_write) = listener.accept().await.unwrap().split();
            let options = ConnectOptions::default();
            let far = connect(target, &options).await.unwrap();
            let (far_read, far_write) = far.split();
            let (sender, mut ends) = rt::mailbox::channel(2);
            for (from, to) in [(near_read, far_write), (far_read, near_write)] {
                let sender = sender.clone();
                rt::spawn(async move { sender.send(pump(from, to, how).await).unwrap() });
            }
            ends.recv().await.unwrap();
            ends.recv().await.unwrap();
        };
        let limit = Duration::from_secs(60);
        let done = runtime.run(async { rt::time::timeout(limit, main).await });
        done.unwrap().unwrap();
    });
    hear.recv().unwrap();
    (addr, handle)
}

/// Sends `data`, the last byte of every piece as urgent, with pauses after some pieces. The end is
/// sent only when all has arrived: it would hide a relay that waits for more.
fn send(
    to: &TcpStream,
    data: &[u8],
    (piece, pause_every): (usize, usize),
    arrived: &mpsc::Receiver<()>,
) {
    for (at, piece) in data.chunks(piece).enumerate() {
        let (last, before) = piece.split_last().unwrap();
        for (bytes, flags) in [(before, 0), (std::slice::from_ref(last), libc::MSG_OOB)] {
            let mut rest = bytes;
            while !rest.is_empty() {
                // SAFETY: address and length are those of a live slice.
                let n = unsafe {
                    let flags = flags | libc::MSG_NOSIGNAL;
                    libc::send(to.as_raw_fd(), rest.as_ptr().cast(), rest.len(), flags)
                };
                assert!(n > 0, "{}", io::Error::last_os_error());
                rest = &rest[n as usize..];
            }
        }
        if at % pause_every == 0 {
            thread::sleep(Duration::from_millis(5));
        }
    }
    let _ = arrived.recv(); // not, if less than that has arrived
    to.shutdown(Shutdown::Write).unwrap();
}

/// Both ways: through the accepted connection and through the dialled one.
fn check(backend: Backend, how: How, (len, piece, pause_every): (usize, usize, usize)) {
    let server = TcpListener::bind(LOCAL).unwrap();
    let (addr, handle) = relay(backend, server.local_addr().unwrap(), how);
    let client = TcpStream::connect(addr).unwrap();
    let (served, _) = server.accept().unwrap();
    let data = pattern(0, len);
    let limit = Some(Duration::from_secs(30));
    for (from, to) in [(&client, &served), (&served, &client)] {
        to.set_read_timeout(limit).unwrap();
        let set = 1_i32;
        // SAFETY: the value lives across the call, and its size is passed. What the relay sends is
        // not urgent any more; only its place counts.
        unsafe {
            let value = (&raw const set).cast();
            libc::setsockopt(
                to.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_OOBINLINE,
                value,
                4,
            );
        }
        thread::scope(|scope| {
            let (say, arrived) = mpsc::channel();
            let data = &data;
            scope.spawn(move || send(from, data, (piece, pause_every), &arrived));
            let (mut got, mut to) = (vec![0; len], to);
            to.read_exact(&mut got)
                .unwrap_or_else(|error| panic!("{how:?}, pieces of {piece}: {error}"));
            say.send(()).unwrap();
            to.read_to_end(&mut got).unwrap();
            assert!(
                got == *data,
                "{how:?}, pieces of {piece}: {} of {len} bytes, or different ones",
                got.len()
            );
        });
    }
    handle.join().unwrap();
}

fn one_byte_is_not_lost(backend: Backend) {
    check(backend, How::Copied(Placement::Flat), (1, 1, 1));
    check(backend, How::Copied(Placement::Flat), (2_000, 100, 1));
}

fn bulk_is_exact(backend: Backend) {
    for placement in [Placement::Flat, Placement::Parsed, Placement::Segmented] {
        check(backend, How::Copied(placement), (4 << 20, 99_991, 4));
    }
}

fn a_pipe_passes_it_too(backend: Backend) {
    check(backend, How::Spliced, (8 << 20, 1_000_003, 2));
    check(backend, How::Spliced, (4 << 20, 99_991, 8));
    // The last byte before the end is one, in the middle of bulk.
    check(backend, How::Spliced, (4 << 20, 4 << 20, 2));
}

both_back_ends! {
    one_byte_is_not_lost,
    bulk_is_exact,
    a_pipe_passes_it_too,
}
