//! Bulk through a pipe: bytes, half-close, the way back to small messages, errors, cancellation.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::rc::Rc;
use std::thread;
use std::time::Duration;

use rt::net::{ConnectOptions, Listener, ReadHalf, Splice, Spliced, WriteHalf, connect};
use rt::{Backend, Runtime};
use testkit::pattern;

mod both;
use both::{both_back_ends, with};

const LOCAL: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

/// What went through a relay.
#[derive(Debug, Default)]
struct Seen {
    copied: Cell<usize>,
    spliced: Cell<usize>,
    calls: Cell<usize>,
    returns: Cell<usize>,
}

async fn pump(mut from: ReadHalf, mut to: WriteHalf, seen: Rc<Seen>) -> io::Result<()> {
    let mut bufs = VecDeque::new();
    let mut pipe = Splice::new()?;
    let add = |cell: &Cell<usize>, n: usize| cell.set(cell.get() + n);
    loop {
        if Splice::is_possible(&from) {
            let moved = |n| {
                add(&seen.spliced, n);
                add(&seen.calls, 1);
            };
            match pipe.relay(&mut from, &mut to, moved).await? {
                Spliced::End => break,
                Spliced::Small => add(&seen.returns, 1),
            }
        }
        let n = from.recv(&mut bufs).await?;
        if n == 0 {
            break;
        }
        add(&seen.copied, n);
        bufs.drain(..).for_each(|buf| to.push(buf));
        to.hand_over().await?;
    }
    to.flush().await?;
    to.shutdown()
}

/// How a direction ended, and what went through it.
type Outcome = (io::Result<()>, Seen);

/// Relays one connection to `target`; the result of both directions.
fn relay(backend: Backend, target: SocketAddr) -> (SocketAddr, thread::JoinHandle<[Outcome; 2]>) {
    let listener = TcpListener::bind(LOCAL).unwrap();
    let addr = listener.local_addr().unwrap();
    let handle = thread::spawn(move || {
        let mut runtime = Runtime::new(with(backend)).unwrap();
        let main = async {
            let mut listener = Listener::from_std(listener);
            let (near_read, near_write) = listener.accept().await.unwrap().split();
            let far = connect(target, &ConnectOptions::default()).await.unwrap();
            let (far_read, far_write) = far.split();
            let (sender, mut ends) = rt::mailbox::channel(2);
            let seen = [Rc::new(Seen::default()), Rc::new(Seen::default())];
            let pairs = [(near_read, far_write), (far_read, near_write)];
            for (way, (from, to)) in pairs.into_iter().enumerate() {
                let (sender, seen) = (sender.clone(), Rc::clone(&seen[way]));
                rt::spawn(async move {
                    let result = pump(from, to, seen).await;
                    sender.send((way, result)).unwrap();
                });
            }
            let mut results = [ends.recv().await, ends.recv().await];
            results.sort_by_key(|(way, _)| *way);
            rt::yield_now().await;
            let mut seen = seen.into_iter().map(|seen| Rc::try_unwrap(seen).unwrap());
            results.map(|(_, result)| (result, seen.next().unwrap()))
        };
        let limit = Duration::from_secs(30);
        let result = runtime.run(async { rt::time::timeout(limit, main).await });
        result.unwrap().unwrap()
    });
    (addr, handle)
}

/// Bulk one way, the answer after the end of it; then the bytes of both are exact.
fn bulk_is_exact_and_half_closed(backend: Backend) {
    let server = TcpListener::bind(LOCAL).unwrap();
    let target = server.local_addr().unwrap();
    let echo = thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
    });
    let (addr, handle) = relay(backend, target);
    let data = pattern(0, 24 << 20);
    let mut client = TcpStream::connect(addr).unwrap();
    client.write_all(&data).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut back = Vec::new();
    client.read_to_end(&mut back).unwrap();
    assert!(
        back == data,
        "{} of {} bytes, or different ones",
        back.len(),
        data.len()
    );
    for (result, seen) in handle.join().unwrap() {
        result.unwrap();
        let total = seen.copied.get() + seen.spliced.get();
        assert_eq!(total, data.len(), "{seen:?}");
        assert!(
            seen.spliced.get() > total / 2 && seen.calls.get() > 10,
            "{seen:?}"
        );
    }
    echo.join().unwrap();
}

/// A flow that was bulk and turns into requests and answers goes on without delay.
fn a_quiet_flow_is_copied_again(backend: Backend) {
    let server = TcpListener::bind(LOCAL).unwrap();
    let target = server.local_addr().unwrap();
    let echo = thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        let mut buf = vec![0; 1 << 16];
        while let Ok(n @ 1..) = stream.read(&mut buf) {
            stream.write_all(&buf[..n]).unwrap();
        }
    });
    let (addr, handle) = relay(backend, target);
    let mut client = TcpStream::connect(addr).unwrap();
    client.set_nodelay(true).unwrap();
    for len in [4 << 20, 8 << 20] {
        let data = pattern(0, len);
        let (sent, mut writer) = (data.clone(), client.try_clone().unwrap());
        let sender = thread::spawn(move || writer.write_all(&sent).unwrap());
        let mut back = vec![0; len];
        client.read_exact(&mut back).unwrap();
        sender.join().unwrap();
        assert!(back == data);
        for n in 0..100_u8 {
            client.write_all(&[n; 33]).unwrap();
            let mut answer = [0; 33];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(answer, [n; 33]);
        }
    }
    drop(client);
    for (result, seen) in handle.join().unwrap() {
        result.unwrap();
        assert!(
            seen.returns.get() > 0 && seen.copied.get() > 3_300,
            "{seen:?}"
        );
    }
    echo.join().unwrap();
}

/// A receiver that goes away in the middle is an error of its direction, not a hang.
fn a_receiver_that_leaves_is_an_error(backend: Backend) {
    let server = TcpListener::bind(LOCAL).unwrap();
    let target = server.local_addr().unwrap();
    let leaver = thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        stream.read_exact(&mut vec![0; 3 << 20]).unwrap();
    });
    let (addr, handle) = relay(backend, target);
    let mut client = TcpStream::connect(addr).unwrap();
    let chunk = vec![3; 1 << 16];
    while client.write_all(&chunk).is_ok() {}
    drop(client);
    let [(forward, seen), _] = handle.join().unwrap();
    assert!(forward.is_err(), "{seen:?}");
    leaver.join().unwrap();
}

/// Dropped with bytes in the pipe: the receiver must not take what it has for everything.
fn a_cancelled_splice_does_not_look_whole(backend: Backend) {
    let server = TcpListener::bind(LOCAL).unwrap();
    let target = server.local_addr().unwrap();
    let source = TcpListener::bind(LOCAL).unwrap();
    let addr = source.local_addr().unwrap();
    let flood = thread::spawn(move || {
        let mut client = TcpStream::connect(addr).unwrap();
        while client.write_all(&[1; 1 << 16]).is_ok() {}
    });
    let mut runtime = Runtime::new(with(backend)).unwrap();
    let main = async {
        let mut listener = Listener::from_std(source);
        let (mut from, _from_write) = listener.accept().await.unwrap().split();
        let far = connect(target, &ConnectOptions::default()).await.unwrap();
        let (_far_read, mut to) = far.split();
        let mut bufs = VecDeque::new();
        while !Splice::is_possible(&from) {
            from.recv(&mut bufs).await.unwrap();
            bufs.clear();
        }
        let mut pipe = Splice::new().unwrap();
        let relay = pipe.relay(&mut from, &mut to, |_| {});
        // Nobody reads: the socket fills, then the pipe.
        let cancelled = rt::time::timeout(Duration::from_millis(200), relay).await;
        assert!(cancelled.is_err());
    };
    runtime.run(main).unwrap();
    drop(runtime);
    let (mut stream, _) = server.accept().unwrap();
    let error = stream.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    flood.join().unwrap();
}

both_back_ends! {
    bulk_is_exact_and_half_closed,
    a_quiet_flow_is_copied_again,
    a_receiver_that_leaves_is_an_error,
    a_cancelled_splice_does_not_look_whole,
}
