//! A relay on the runtime between real sockets: bytes, half-close, resets, cancellation.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::pin::pin;
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use rt::net::{ConnectOptions, Listener, Placement, ReadHalf, WriteHalf, connect};
use rt::{Backend, Runtime, RuntimeConfig};
use testkit::pattern;

mod both;
use both::{both_back_ends, with};

const LOCAL: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

async fn pump(mut from: ReadHalf, mut to: WriteHalf) -> io::Result<u64> {
    let mut bufs = VecDeque::new();
    let mut total = 0;
    loop {
        let n = from.recv(&mut bufs).await?;
        if n == 0 {
            to.flush().await?;
            to.shutdown()?;
            return Ok(total);
        }
        total += n as u64;
        for buf in bufs.drain(..) {
            to.push(buf);
        }
        if total.is_multiple_of(2) {
            to.flush().await?;
        } else {
            to.hand_over().await?;
        }
    }
}

/// Runs both directions; an error in one ends the other too.
async fn both_ways(
    one: impl Future<Output = io::Result<u64>>,
    other: impl Future<Output = io::Result<u64>>,
) {
    let (mut one, mut other) = (pin!(one), pin!(other));
    let mut open = [true; 2];
    poll_fn(|cx| {
        if open[0]
            && let Poll::Ready(result) = one.as_mut().poll(cx)
        {
            open[0] = false;
            if result.is_err() {
                return Poll::Ready(());
            }
        }
        if open[1]
            && let Poll::Ready(result) = other.as_mut().poll(cx)
        {
            open[1] = false;
            if result.is_err() {
                return Poll::Ready(());
            }
        }
        if open == [false; 2] {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

/// Runs a relay to `target` on its own thread until `connections` have ended both ways.
fn relay(
    target: SocketAddr,
    connections: usize,
    placement: Placement,
    config: RuntimeConfig,
) -> (SocketAddr, thread::JoinHandle<rt::Counters>) {
    let listener = TcpListener::bind(LOCAL).unwrap();
    let addr = listener.local_addr().unwrap();
    let handle = thread::spawn(move || {
        let mut runtime = Runtime::new(config).unwrap();
        let counters = runtime.counters();
        runtime
            .run(async move {
                let mut listener = Listener::from_std(listener);
                let (done, mut ended) = rt::mailbox::channel(1024);
                for _ in 0..connections {
                    let near = listener.accept().await.unwrap();
                    near.set_nodelay().unwrap();
                    let done = done.clone();
                    rt::spawn(async move {
                        let far = connect(target, &ConnectOptions::default()).await.unwrap();
                        let (mut near_read, near_write) = near.split();
                        let (mut far_read, far_write) = far.split();
                        near_read.set_placement(placement);
                        far_read.set_placement(placement);
                        both_ways(pump(far_read, near_write), pump(near_read, far_write)).await;
                        done.send(()).unwrap();
                    });
                }
                for _ in 0..connections {
                    ended.recv().await;
                }
            })
            .unwrap();
        counters.ring()
    });
    (addr, handle)
}

fn echo_server(connections: usize) -> (SocketAddr, thread::JoinHandle<()>) {
    let listener = TcpListener::bind(LOCAL).unwrap();
    let addr = listener.local_addr().unwrap();
    let handle = thread::spawn(move || {
        let mut threads = Vec::new();
        for _ in 0..connections {
            let (mut stream, _) = listener.accept().unwrap();
            threads.push(thread::spawn(move || {
                let mut buf = vec![0; 100_000];
                while let Ok(n @ 1..) = stream.read(&mut buf) {
                    if stream.write_all(&buf[..n]).is_err() {
                        return;
                    }
                }
                let _ = stream.shutdown(Shutdown::Write);
            }));
        }
        for thread in threads {
            thread.join().unwrap();
        }
    });
    (addr, handle)
}

fn send_and_check(addr: SocketAddr, seed: u64, len: usize, chunk: usize) {
    let stream = TcpStream::connect(addr).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let data = pattern(seed, len);
    let mut writer = stream.try_clone().unwrap();
    let sent = data.clone();
    let sender = thread::spawn(move || {
        for piece in sent.chunks(chunk) {
            writer.write_all(piece).unwrap();
        }
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    (&stream).read_to_end(&mut back).unwrap();
    sender.join().unwrap();
    assert!(
        back == data,
        "seed {seed}: got {} of {} bytes or different ones",
        back.len(),
        len
    );
}

fn bytes_are_exact_in_every_mode(backend: Backend) {
    for placement in [Placement::Flat, Placement::Parsed, Placement::Segmented] {
        let cases = [
            (1, 1),
            (64, 64),
            (5_000, 7),
            (300_000, 1_000),
            (8 << 20, 333_333),
        ];
        let (server, echo) = echo_server(cases.len());
        let (addr, handle) = relay(server, cases.len(), placement, with(backend));
        for (seed, (len, chunk)) in cases.into_iter().enumerate() {
            send_and_check(addr, seed as u64 + 1, len, chunk);
        }
        handle.join().unwrap();
        echo.join().unwrap();
    }
}

fn many_connections_with_few_buffers_all_finish(backend: Backend) {
    let mut config = with(backend);
    config.pool.ring_entries = 4; // the ring of buffers runs dry all the time
    config.entries = 8; // and so does the submission queue
    let count = 64;
    let (server, echo) = echo_server(count);
    let (addr, handle) = relay(server, count, Placement::Segmented, config);
    let clients: Vec<_> = (0..count as u64)
        .map(|seed| {
            thread::spawn(move || send_and_check(addr, seed + 1, 200_000, 1 + seed as usize * 37))
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    let counters = handle.join().unwrap();
    assert!(
        counters.starved > 0,
        "the case was not exercised: {counters:?}"
    );
    echo.join().unwrap();
}

fn a_reader_that_stops_bounds_memory_and_others_go_on(backend: Backend) {
    let (server, echo) = echo_server(2);
    let (addr, handle) = relay(server, 2, Placement::Flat, with(backend));
    let stuck = TcpStream::connect(addr).unwrap();
    stuck
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let chunk = vec![7; 1 << 16];
    let mut sent = 0_usize;
    while (&stuck).write_all(&chunk).is_ok() {
        sent += chunk.len();
        assert!(
            sent < 256 << 20,
            "the relay took {sent} bytes for a reader that never reads"
        );
    }
    send_and_check(addr, 9, 100_000, 999);
    drop(stuck);
    handle.join().unwrap();
    echo.join().unwrap();
}

fn connect_errors_and_cancelled_operations_are_clean(backend: Backend) {
    let mut runtime = Runtime::new(with(backend)).unwrap();
    let closed = TcpListener::bind(LOCAL).unwrap().local_addr().unwrap();
    let quiet = TcpListener::bind(LOCAL).unwrap();
    let quiet_addr = quiet.local_addr().unwrap();
    runtime
        .run(async move {
            let error = connect(closed, &ConnectOptions::default())
                .await
                .unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
            let stream = connect(quiet_addr, &ConnectOptions::default())
                .await
                .unwrap();
            let (mut read, mut write) = stream.split();
            let mut bufs = VecDeque::new();
            let wait = Duration::from_millis(20);
            assert!(rt::time::timeout(wait, read.recv(&mut bufs)).await.is_err());
            // The receive is still armed: what comes now is not lost.
            let (mut peer, _) = quiet.accept().unwrap();
            peer.write_all(b"late").unwrap();
            assert_eq!(read.recv(&mut bufs).await.unwrap(), 4);
            assert_eq!(&bufs.pop_front().unwrap()[..], b"late");
            write.push_copy(b"answer");
            write.flush().await.unwrap();
            let mut answer = [0; 6];
            peer.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"answer");
            drop((read, write));
        })
        .unwrap();
}

fn a_dropped_connection_is_closed_although_a_receive_was_armed(backend: Backend) {
    let listener = TcpListener::bind(LOCAL).unwrap();
    let addr = listener.local_addr().unwrap();
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(addr).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream.read(&mut [0; 1])
    });
    let mut runtime = Runtime::new(with(backend)).unwrap();
    runtime
        .run(async move {
            let mut listener = Listener::from_std(listener);
            let (mut read, write) = listener.accept().await.unwrap().split();
            let mut bufs = VecDeque::new();
            let wait = Duration::from_millis(10);
            assert!(rt::time::timeout(wait, read.recv(&mut bufs)).await.is_err());
            drop((read, write));
            rt::time::sleep(Duration::from_millis(50)).await;
        })
        .unwrap();
    assert_eq!(
        client.join().unwrap().unwrap(),
        0,
        "the client sees the end of the stream"
    );
}

fn timers_fire_in_order_and_messages_cross_threads(backend: Backend) {
    let mut runtime = Runtime::new(with(backend)).unwrap();
    let (sender, mut receiver) = rt::mailbox::channel(4);
    let started = Instant::now();
    let other = thread::spawn(move || {
        thread::sleep(Duration::from_millis(60));
        sender.send(3).unwrap();
    });
    let seen = runtime
        .run(async move {
            let (order, mut turns) = rt::mailbox::channel(4);
            for (name, delay) in [(2, 30_u64), (1, 10)] {
                let order = order.clone();
                rt::spawn(async move {
                    rt::time::sleep(Duration::from_millis(delay)).await;
                    order.send(name).unwrap();
                });
            }
            vec![
                turns.recv().await,
                turns.recv().await,
                receiver.recv().await,
            ]
        })
        .unwrap();
    assert_eq!(seen, [1, 2, 3]);
    assert!(started.elapsed() >= Duration::from_millis(60));
    other.join().unwrap();
}

/// What was handed over is sent although the connection is dropped at once, and the connection ends
/// although nothing else happens on the worker.
fn a_handed_over_message_survives_the_drop(backend: Backend) {
    let listener = TcpListener::bind(LOCAL).unwrap();
    let addr = listener.local_addr().unwrap();
    let (sender, mut told) = rt::mailbox::channel(1);
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(addr).unwrap();
        let limit = Duration::from_secs(5);
        stream.set_read_timeout(Some(limit)).unwrap();
        let mut all = Vec::new();
        let ended = stream.read_to_end(&mut all);
        sender.send(()).unwrap();
        (ended.is_ok(), all)
    });
    let mut runtime = Runtime::new(with(backend)).unwrap();
    runtime
        .run(async move {
            let mut listener = Listener::from_std(listener);
            let (read, mut write) = listener.accept().await.unwrap().split();
            write.push_copy(b"last words");
            write.hand_over().await.unwrap();
            drop((read, write));
            told.recv().await;
        })
        .unwrap();
    assert_eq!(client.join().unwrap(), (true, b"last words".to_vec()));
}

/// A flow that fills large blocks gets huge ones while there are any; its bytes stay in order.
fn a_flow_that_fills_large_blocks_gets_huge_ones(backend: Backend) {
    let mut config = with(backend);
    config.pool.segments = 1; // a large block is soon filled
    config.pool.huge_segments = 4;
    config.pool.huge_blocks = 2;
    let (large, huge) = (16_406, 4 * 16_406);
    let sent = pattern(7, 8 << 20);
    let listener = TcpListener::bind(LOCAL).unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let data = sent.clone();
    let sender = thread::spawn(move || client.write_all(&data));
    let mut runtime = Runtime::new(config).unwrap();
    let main = async {
        let stream = Listener::from_std(listener).accept().await.unwrap();
        let (mut read, write) = stream.split();
        let (mut bufs, mut held) = (VecDeque::new(), Vec::new());
        let mut received: Vec<u8> = Vec::new();
        while read.recv(&mut bufs).await.unwrap() > 0 {
            for buf in bufs.drain(..) {
                assert!(buf.len() <= huge);
                received.extend_from_slice(&buf);
                if buf.len() > large {
                    held.push(buf);
                }
            }
            if held.len() < 2 {
                rt::time::sleep(Duration::from_millis(5)).await; // the socket's buffer fills
            }
        }
        assert_eq!(held.len(), 2, "huge blocks in use are bounded");
        assert!(received == sent);
        let pool = write.pool().clone();
        drop(held);
        assert_eq!(pool.other_blocks_in_use(), 0);
    };
    runtime.run(main).unwrap();
    sender.join().unwrap().unwrap();
}

both_back_ends! {
    a_flow_that_fills_large_blocks_gets_huge_ones,
    a_handed_over_message_survives_the_drop,
    bytes_are_exact_in_every_mode,
    many_connections_with_few_buffers_all_finish,
    a_reader_that_stops_bounds_memory_and_others_go_on,
    connect_errors_and_cancelled_operations_are_clean,
    a_dropped_connection_is_closed_although_a_receive_was_armed,
    timers_fire_in_order_and_messages_cross_threads,
}
