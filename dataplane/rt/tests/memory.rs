//! What an idle connection and an idle worker cost, also after a burst. One test, because it
//! measures the process.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rt::net::{ConnectOptions, Listener, ReadHalf, WriteHalf, connect};
use rt::{Backend, Runtime};

mod both;
use both::{is_available, with};

/// Most user memory of a relayed connection that is idle (half of them have moved a message): two
/// sockets, four halves, two receives, the task.
const PER_CONNECTION: usize = 1280;
/// Most resident memory of an idle worker, its thread's stack included.
const PER_WORKER: usize = 256 << 10;

/// Counts what is allocated.
struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(ptr, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

async fn pump(mut from: ReadHalf, mut to: WriteHalf) {
    let mut bufs = VecDeque::new();
    while from.recv(&mut bufs).await.is_ok_and(|n| n > 0) {
        bufs.drain(..).for_each(|buf| to.push(buf));
        if to.hand_over().await.is_err() {
            return;
        }
    }
}

async fn relay(mut listener: Listener, target: SocketAddr) {
    loop {
        let near = listener.accept().await.unwrap();
        rt::spawn(async move {
            let far = connect(target, &ConnectOptions::default()).await.unwrap();
            let (near_read, near_write) = near.split();
            let (far_read, far_write) = far.split();
            let mut one = pin!(pump(near_read, far_write));
            let mut other = pin!(pump(far_read, near_write));
            let mut open = [true; 2];
            std::future::poll_fn(|cx| {
                open[0] = open[0] && one.as_mut().poll(cx).is_pending();
                open[1] = open[1] && other.as_mut().poll(cx).is_pending();
                if open == [false; 2] {
                    return std::task::Poll::Ready(());
                }
                std::task::Poll::Pending
            })
            .await;
        });
    }
}

/// Bytes allocated for each of `count` idle relayed connections.
fn idle_connections(backend: Backend, count: usize) -> usize {
    use std::io::{Read, Write};
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = server.local_addr().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let measured = thread::spawn(move || {
        let mut all = Vec::with_capacity(2 * count);
        thread::sleep(Duration::from_millis(100));
        let before = ALLOCATED.load(Ordering::Relaxed);
        for n in 0..count {
            let mut client = TcpStream::connect(addr).unwrap();
            let (mut accepted, _) = server.accept().unwrap();
            if n % 2 == 0 {
                let mut message = [0; 100];
                client.write_all(&message).unwrap();
                accepted.read_exact(&mut message).unwrap();
            }
            all.push(client);
            all.push(accepted);
        }
        thread::sleep(Duration::from_millis(100));
        (ALLOCATED.load(Ordering::Relaxed) - before) / count
    });
    let mut runtime = Runtime::new(with(backend)).unwrap();
    let main = async {
        rt::spawn(relay(Listener::from_std(listener), target));
        while !measured.is_finished() {
            rt::time::sleep(Duration::from_millis(5)).await;
        }
    };
    runtime.run(main).unwrap();
    measured.join().unwrap()
}

fn resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = text.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// Resident bytes of each of `count` idle workers that have had a little to do.
fn idle_workers(backend: Backend, count: usize) -> usize {
    let before = resident_bytes();
    let ready = std::sync::Arc::new(std::sync::Barrier::new(count + 1));
    let threads: Vec<_> = (0..count)
        .map(|_| {
            let ready = std::sync::Arc::clone(&ready);
            thread::spawn(move || {
                let mut runtime = Runtime::new(with(backend)).unwrap();
                let main = async {
                    for _ in 0..20 {
                        rt::time::sleep(Duration::from_millis(1)).await;
                    }
                };
                runtime.run(main).unwrap();
                ready.wait();
                ready.wait();
            })
        })
        .collect();
    ready.wait();
    let used = resident_bytes().saturating_sub(before) / count;
    ready.wait();
    for thread in threads {
        thread.join().unwrap();
    }
    used
}

/// Blocks of 256 KiB that a burst uses at a time.
const BURST_BLOCKS: usize = 40;

/// Resident bytes that a worker gives back once it has been idle after a burst, without anything
/// waking it, and whether it then works as before.
fn memory_comes_back(backend: Backend) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let mut runtime = Runtime::new(with(backend)).unwrap();
    let main = async {
        let stream = connect(addr, &ConnectOptions::default()).await.unwrap();
        let (_read, mut write) = stream.split();
        let pool = write.pool().clone();
        let mut burst = Vec::new();
        for _ in 0..BURST_BLOCKS {
            let mut buf = pool.large();
            buf.grow_tail(buf.tail_room()); // touches every page
            burst.push(buf);
        }
        let with_burst = resident_bytes();
        drop(burst);
        assert_eq!(pool.spare_blocks(), BURST_BLOCKS, "kept for reuse at first");
        let idle_since = std::time::Instant::now();
        while pool.spare_blocks() > 0 {
            assert!(idle_since.elapsed() < Duration::from_secs(30), "they stay");
            rt::time::sleep(Duration::from_millis(100)).await;
        }
        let given_back = with_burst.saturating_sub(resident_bytes());
        println!("{backend:?}: {given_back} bytes given back");
        assert!(given_back >= BURST_BLOCKS / 2 * (256 << 10), "{given_back}");
        write.push_copy(b"works");
        write.flush().await.unwrap();
    };
    runtime.run(main).unwrap();
}

#[test]
fn idle_connections_and_workers_cost_little() {
    for backend in [Backend::IoUring, Backend::Epoll] {
        if !is_available("idle_connections_and_workers_cost_little", backend) {
            continue;
        }
        let connection = idle_connections(backend, 200);
        let worker = idle_workers(backend, 8);
        println!("{backend:?}: connection {connection} bytes, worker {worker} bytes");
        assert!(
            connection <= PER_CONNECTION,
            "{backend:?}: {connection} bytes"
        );
        assert!(worker <= PER_WORKER, "{backend:?}: {worker} bytes");
        memory_comes_back(backend);
    }
}
