//! Busy polling before sleeping: messages, timers and other threads' wake-ups arrive as ever,
//! and an idle worker does not burn its CPU.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rt::net::Listener;
use rt::{Backend, Runtime};

mod both;
use both::{both_back_ends, with};

const ROUND_TRIPS: usize = 200;

fn messages_timers_and_wake_ups_arrive(backend: Backend) {
    let mut config = with(backend);
    config.busy_poll = Duration::from_micros(200);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let mut runtime = Runtime::new(config).unwrap();
    let (sender, mut mailbox) = rt::mailbox::channel(4);
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(addr).unwrap();
        let mut answer = [0; 5];
        for _ in 0..ROUND_TRIPS {
            stream.write_all(b"hello").unwrap();
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"hello");
        }
        thread::sleep(Duration::from_millis(20)); // the worker sleeps by now
        sender.send("stop").unwrap();
    });
    let serving = async {
        let mut listener = Listener::from_std(listener);
        let (mut read, mut write) = listener.accept().await.unwrap().split();
        let mut bufs = VecDeque::new();
        while read.recv(&mut bufs).await.unwrap() > 0 {
            bufs.drain(..).for_each(|buf| write.push(buf));
            write.hand_over().await.unwrap();
        }
        assert_eq!(mailbox.recv().await, "stop");
        let started = Instant::now();
        rt::time::sleep(Duration::from_millis(3)).await;
        assert!(started.elapsed() >= Duration::from_millis(3));
    };
    let limit = Duration::from_secs(30);
    let result = runtime.run(async { rt::time::timeout(limit, serving).await });
    result.unwrap().unwrap();
    client.join().unwrap();
}

fn an_idle_worker_sleeps(backend: Backend) {
    // Looking all the time takes 400 ms at least, each time; a machine may be slow for once.
    let mut used = Vec::new();
    while used
        .last()
        .is_none_or(|last| *last >= Duration::from_millis(200))
    {
        assert!(used.len() < 3, "{used:?} of CPU time");
        used.push(cpu_time_of_an_idle_worker(backend));
    }
}

fn cpu_time_of_an_idle_worker(backend: Backend) -> Duration {
    let mut config = with(backend);
    config.busy_poll = Duration::from_millis(1);
    let mut runtime = Runtime::new(config).unwrap();
    let counters = runtime.counters();
    let before = counters.cpu_time().unwrap();
    runtime
        .run(async {
            // A wake-up each millisecond that no poll finds.
            for _ in 0..400 {
                rt::time::sleep(Duration::from_micros(1_500)).await;
            }
        })
        .unwrap();
    let time = counters.cpu_time().unwrap();
    (time.user + time.kernel).saturating_sub(before.user + before.kernel)
}

both_back_ends! {
    messages_timers_and_wake_ups_arrive,
    an_idle_worker_sleeps,
}
