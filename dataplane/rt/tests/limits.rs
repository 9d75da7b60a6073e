//! Bounds: a full completion queue loses nothing, a busy task starves nobody, an idle worker and an
//! idle connection cost little.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rt::net::Listener;
use rt::{Backend, Runtime};

mod both;
use both::{both_back_ends, with};

/// More completions at once than the queue holds: the kernel keeps them, and all arrive.
fn a_full_completion_queue_loses_nothing(backend: Backend) {
    let mut config = with(backend);
    config.entries = 1;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let mut runtime = Runtime::new(config).unwrap();
    let counters = runtime.counters();
    let clients: Vec<TcpStream> = (0..100)
        .map(|_| TcpStream::connect(addr).unwrap())
        .collect();
    let accepting = async {
        let mut listener = Listener::from_std(listener);
        let mut streams = Vec::new();
        for client in &clients {
            streams.push(listener.accept().await.unwrap().split());
            let mut client = client;
            client.write_all(b"x").unwrap();
        }
        // All receives are armed before any data is looked at.
        let (done, mut results) = rt::mailbox::channel(200);
        for (mut read, write) in streams {
            let done = done.clone();
            rt::spawn(async move {
                let mut bufs = VecDeque::new();
                let n = read.recv(&mut bufs).await.unwrap();
                done.send(n).unwrap();
                drop(write);
            });
        }
        for _ in 0..clients.len() {
            assert_eq!(results.recv().await, 1);
        }
    };
    let limit = Duration::from_secs(20);
    let result = runtime.run(async { rt::time::timeout(limit, accepting).await });
    result.unwrap().unwrap();
    if backend == Backend::IoUring {
        let ring = counters.ring();
        assert!(ring.overflows > 0, "the case was not exercised: {ring:?}");
    }
}

/// Tasks that are always ready, and a flow that always has data, leave room for timers and others.
fn busy_tasks_starve_nobody(backend: Backend) {
    let mut config = with(backend);
    config.completions_per_turn = 4;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let mut flood = TcpStream::connect(addr).unwrap();
    let mut other = TcpStream::connect(addr).unwrap();
    let flooder = std::thread::spawn(move || while flood.write_all(&[1; 1 << 16]).is_ok() {});
    let mut runtime = Runtime::new(config).unwrap();
    let main = async {
        let mut listener = Listener::from_std(listener);
        let (mut flood, _flood_write) = listener.accept().await.unwrap().split();
        let (mut read, _write) = listener.accept().await.unwrap().split();
        for _ in 0..3 {
            rt::spawn(async {
                loop {
                    rt::yield_now().await;
                }
            });
        }
        rt::spawn(async move {
            let mut bufs = VecDeque::new();
            while flood.recv(&mut bufs).await.is_ok_and(|n| n > 0) {
                bufs.clear();
            }
        });
        // Starved, it would never end; a busy machine may take its time.
        rt::time::sleep(Duration::from_millis(10)).await;
        other.write_all(b"hello").unwrap();
        let mut bufs = VecDeque::new();
        let received = read.recv(&mut bufs);
        let n = rt::time::timeout(Duration::from_secs(30), received).await;
        assert_eq!(n.unwrap().unwrap(), 5);
    };
    runtime.run(main).unwrap();
    drop(runtime);
    flooder.join().unwrap();
}

/// Takes that much of the worker's time.
fn work(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

/// However many of those that give way are ready, the worker looks at its ring after a few.
fn those_who_give_way_run_a_few_at_a_time(backend: Backend) {
    const CROWD: usize = 400;
    let mut runtime = Runtime::new(with(backend)).unwrap();
    let main = async {
        let done = Rc::new(Cell::new(0));
        for _ in 0..CROWD {
            let done = Rc::clone(&done);
            rt::spawn_giving_way(async move {
                work(Duration::from_micros(50));
                done.set(done.get() + 1);
            });
        }
        let (mut turns, mut most) = (0, 0);
        while done.get() < CROWD {
            let before = done.get();
            rt::next_turn().await;
            most = most.max(done.get() - before);
            turns += 1;
        }
        // Each takes a fifth of what they may take together, or more.
        assert!((1..=6).contains(&most), "{most} in {turns} turns");
    };
    runtime.run(main).unwrap();
}

/// Tasks that are always ready go before them, but not for ever.
fn those_who_give_way_come_behind_and_come(backend: Backend) {
    let mut runtime = Runtime::new(with(backend)).unwrap();
    let main = async {
        let order = Rc::<RefCell<Vec<usize>>>::default();
        for number in 0..100 {
            let order = Rc::clone(&order);
            rt::spawn_giving_way(async move {
                rt::yield_now().await;
                order.borrow_mut().push(number);
            });
        }
        for number in 100..110 {
            let order = Rc::clone(&order);
            rt::spawn(async move {
                order.borrow_mut().push(number);
                loop {
                    rt::yield_now().await;
                }
            });
        }
        while order.borrow().len() < 110 {
            rt::next_turn().await;
        }
        let usual_first: Vec<_> = (100..110).chain(0..100).collect();
        assert_eq!(*order.borrow(), usual_first);
    };
    let limit = Duration::from_secs(60);
    let result = runtime.run(async { rt::time::timeout(limit, main).await });
    result.unwrap().unwrap();
}

both_back_ends! {
    a_full_completion_queue_loses_nothing,
    busy_tasks_starve_nobody,
    those_who_give_way_run_a_few_at_a_time,
    those_who_give_way_come_behind_and_come,
}
