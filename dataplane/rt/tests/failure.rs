//! A connection that fails while nobody receives from it is noticed, at the cost of one operation;
//! one whose peer has only ended its stream is not taken for one that has failed.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rt::net::{Listener, Observer, ReadHalf, WriteHalf};
use rt::{Backend, Runtime};

mod both;
use both::{both_back_ends, with};

/// Longer than any wait should take.
const LIMIT: Duration = Duration::from_secs(30);
/// In which a worker that waits has nothing to do.
const QUIET: Duration = Duration::from_millis(600);
/// Turns of a worker in [`QUIET`]: one for the timer, and some for stragglers.
const TURNS_MAX: u64 = 30;

fn reset(stream: &TcpStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    let size = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: the value lives across the call, and its size is passed.
    unsafe {
        let value = (&raw const linger).cast();
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            value,
            size,
        );
    }
}

type Job = fn(ReadHalf, WriteHalf) -> std::pin::Pin<Box<dyn Future<Output = [Kept; 2]>>>;
/// What a job leaves as it is for the time of the wait.
enum Kept {
    Read(ReadHalf),
    Write(#[allow(dead_code, reason = "only kept")] WriteHalf),
}

/// Lets a worker do `job` on a connection whose client does `first`, and then wait for its failure.
/// The wait costs nothing; it ends when the client does `last`, if that is to be one.
fn noticed(backend: Backend, first: fn(&mut TcpStream), job: Job, last: fn(TcpStream)) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (say, hear) = mpsc::channel();
    let worker = thread::spawn(move || {
        let mut runtime = Runtime::new(with(backend)).unwrap();
        let counters = runtime.counters();
        let main = async {
            let mut listener = Listener::from_std(listener);
            let accepted = listener.accept().await.unwrap();
            let mut observer: Observer = accepted.observer();
            let (read, write) = accepted.split();
            let kept = job(read, write).await;
            say.send(counters).unwrap();
            let wait = poll_fn(|cx| observer.poll_failure(cx));
            let waited = rt::time::timeout(Duration::from_secs(3), wait).await;
            let failed = observer.failure();
            for kept in kept {
                if let (Kept::Read(mut read), true) = (kept, failed.is_some()) {
                    // What was told of it is not an end now.
                    let mut bufs = VecDeque::new();
                    while read.recv(&mut bufs).await.is_ok_and(|n| {
                        assert!(n > 0, "an end behind an error");
                        n > 0
                    }) {}
                }
            }
            match (waited, failed) {
                (Ok(()), Some(error)) => error.kind().to_string(),
                (Err(_), None) => "nothing".to_owned(),
                other => format!("{other:?}"),
            }
        };
        let result = runtime.run(async { rt::time::timeout(LIMIT, main).await });
        result.unwrap().unwrap()
    });
    first(&mut client);
    let counters = hear.recv().unwrap();
    // Past the time in which no operation waits.
    thread::sleep(QUIET);
    let before = counters.ring().enters;
    thread::sleep(QUIET);
    let turns = counters.ring().enters - before;
    assert!(
        turns <= TURNS_MAX,
        "the worker does not wait: {turns} turns"
    );
    last(client);
    worker.join().unwrap()
}

const IDLE: Job = |read, write| Box::pin(async { [Kept::Read(read), Kept::Write(write)] });
/// Has read, and left its multishot receive as it is.
const AFTER_A_MESSAGE: Job = |mut read, write| {
    Box::pin(async {
        let mut bufs = VecDeque::new();
        assert!(read.recv(&mut bufs).await.unwrap() >= 4);
        [Kept::Read(read), Kept::Write(write)]
    })
};
/// Has found that the flow is bulk.
const AMID_BULK: Job = |mut read, write| {
    Box::pin(async {
        let mut bufs = VecDeque::new();
        while !read.is_bulk() {
            assert!(read.recv(&mut bufs).await.unwrap() > 0);
        }
        assert!(read.recv(&mut bufs).await.unwrap() > 0);
        [Kept::Read(read), Kept::Write(write)]
    })
};
const AFTER_THE_END: Job = |mut read, write| {
    Box::pin(async {
        let mut bufs = VecDeque::new();
        while read.recv(&mut bufs).await.unwrap() > 0 {}
        [Kept::Read(read), Kept::Write(write)]
    })
};
/// Waits for room, which there will not be.
const WRITING: Job = |read, mut write| {
    Box::pin(async {
        for _ in 0..1_000 {
            write.push_copy(&[1; 16_384]);
        }
        let flushed = rt::time::timeout(Duration::from_millis(100), write.flush());
        assert!(flushed.await.is_err());
        [Kept::Read(read), Kept::Write(write)]
    })
};
/// Both directions have ended.
const AFTER_BOTH_ENDS: Job = |mut read, write| {
    Box::pin(async {
        let mut bufs = VecDeque::new();
        while read.recv(&mut bufs).await.unwrap() > 0 {}
        write.shutdown().unwrap();
        [Kept::Read(read), Kept::Write(write)]
    })
};

fn say(client: &mut TcpStream) {
    client.write_all(b"four").unwrap();
}

fn end(client: &mut TcpStream) {
    say(client);
    client.shutdown(Shutdown::Write).unwrap();
}

/// What its peer sends is never read: the queue in front of the error does not hide it.
fn flood(client: &mut TcpStream) {
    for _ in 0..200 {
        say(client);
        thread::sleep(Duration::from_micros(200));
    }
}

fn bulk(client: &mut TcpStream) {
    client.write_all(&[1; 1 << 20]).unwrap();
}

fn a_reset_is_noticed(backend: Backend) {
    type Case = (&'static str, fn(&mut TcpStream), Job);
    let cases: [Case; 8] = [
        ("idle", |_| {}, IDLE),
        ("unread", say, IDLE),
        ("after a message", say, AFTER_A_MESSAGE),
        ("after many", flood, AFTER_A_MESSAGE),
        ("amid bulk", bulk, AMID_BULK),
        ("after its end", end, AFTER_THE_END),
        ("while it does not read", |_| {}, WRITING),
        ("while it does not read, after its end", end, WRITING),
    ];
    for (name, first, job) in cases {
        let told = noticed(backend, first, job, |client| reset(&client));
        // EPIPE is the reset of a peer that had ended its stream.
        let known = ["connection reset", "broken pipe"].contains(&told.as_str());
        assert!(known, "{name}: {told}");
    }
}

fn an_end_is_no_failure(backend: Backend) {
    let stay: fn(TcpStream) = |client| {
        thread::sleep(Duration::from_secs(3));
        drop(client);
    };
    let read_all: fn(TcpStream) = |mut client| {
        client.read_to_end(&mut Vec::new()).unwrap();
    };
    assert_eq!(noticed(backend, end, AFTER_THE_END, stay), "nothing");
    assert_eq!(noticed(backend, end, AFTER_BOTH_ENDS, read_all), "nothing");
}

/// A flow that waits for room again and again is watched by one operation, however often.
fn a_watch_is_one_operation(backend: Backend) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut runtime = Runtime::new(with(backend)).unwrap();
    let counters = runtime.counters();
    let submissions = move || counters.ring().submissions;
    let operations = runtime.run(async move {
        let mut listener = Listener::from_std(listener);
        let accepted = listener.accept().await.unwrap();
        let mut observer = accepted.observer();
        let before = submissions();
        for _ in 0..100 {
            let watched = poll_fn(|cx| {
                assert!(observer.poll_failure(cx).is_pending());
                std::task::Poll::Ready(())
            });
            watched.await;
            rt::time::sleep(Duration::from_millis(5)).await;
        }
        submissions() - before
    });
    // The counters are a turn late: the accept may be among them.
    let operations = operations.unwrap();
    assert!((1..=2).contains(&operations), "{operations} operations");
}

both_back_ends! {
    a_watch_is_one_operation,
    a_reset_is_noticed,
    an_end_is_no_failure,
}
