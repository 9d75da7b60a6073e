//! The clients against real servers on the loopback interface.
#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use loadgen::pacing::{Arrivals, Pacing};
use loadgen::report::Report;
use loadgen::search;
use loadgen::serve::{self, Mode, Server};
use loadgen::size::Sizes;
use loadgen::stream::Direction;
use loadgen::worker::Client;
use loadgen::{Error, connect, idle, rr, stream};

fn server(mode: Mode) -> Server {
    Server::start(&serving(mode)).unwrap()
}

fn serving(mode: Mode) -> serve::Options {
    serve::Options {
        listen: ([127, 0, 0, 1], 0).into(),
        mode,
        threads: Some(2),
        cpus: Vec::new(),
        print_peers: false,
    }
}

fn client(to: SocketAddr, connections: usize) -> Client {
    let mut client = Client::new(to);
    client.connections = connections;
    client.warmup = Duration::from_millis(100);
    client.duration = Duration::from_millis(600);
    client.grace = Duration::from_secs(2);
    client
}

fn rr(client: Client, size: usize) -> rr::Options {
    rr::Options {
        client,
        sizes: Sizes::Fixed(size),
        pacing: Pacing::Closed,
        verify: true,
    }
}

/// On a machine that others use as well, times go wrong now and then. What is wrong here goes wrong
/// each time.
fn in_one_of_five_tries(test: fn()) {
    for _ in 0..4 {
        if std::panic::catch_unwind(test).is_ok() {
            return;
        }
    }
    test();
}

fn metric(report: &Report, name: &str) -> f64 {
    report
        .metric(name)
        .unwrap_or_else(|| panic!("no metric {name} in {}", report.json()))
}

/// A server on a thread of its own that gives every connection to `handle`.
fn hand_made(handle: impl Fn(usize, TcpStream) + Clone + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for (i, stream) in listener.incoming().enumerate() {
            let handle = handle.clone();
            thread::spawn(move || handle(i, stream.unwrap()));
        }
    });
    address
}

/// Echoes messages of `size` bytes, after `before` has had its way with them.
fn echo_messages(mut stream: TcpStream, size: usize, mut before: impl FnMut(usize, &mut [u8])) {
    let mut message = vec![0; size];
    for n in 0.. {
        if stream.read_exact(&mut message).is_err() {
            return;
        }
        before(n, &mut message);
        if stream.write_all(&message).is_err() {
            return;
        }
    }
}

#[test]
fn rr_counts_what_the_server_counts() {
    let server = server(Mode::Echo);
    let report = rr::run(&rr(client(server.address(), 32), 100)).unwrap();
    let totals = server.stop().unwrap();
    assert_eq!(totals.connections, 32);
    assert_eq!(totals.received_bytes, totals.sent_bytes);
    assert_eq!(totals.received_bytes % 100, 0);
    // Warm-up requests reach the server and are not in the report.
    assert!(
        totals.received_bytes / 100 > report.ok(),
        "{totals:?} {}",
        report.ok()
    );
    assert!(
        report.errors_by_kind().is_empty(),
        "{:?}",
        report.errors_by_kind()
    );
    let rate = report.ok() as f64 / 0.6;
    assert!((metric(&report, "requests_per_s") / rate - 1.0).abs() < 0.05);
    assert_eq!(metric(&report, "count"), report.ok() as f64);
}

#[test]
fn rr_latencies_are_ordered_and_agree_with_the_closed_loops_rate() {
    in_one_of_five_tries(|| {
        let server = server(Mode::Echo);
        let report = rr::run(&rr(client(server.address(), 1), 64)).unwrap();
        let values: Vec<f64> = ["min_us", "p50_us", "p90_us", "p99_us", "p999_us", "max_us"]
            .iter()
            .map(|name| metric(&report, name))
            .collect();
        assert!(values.is_sorted(), "{values:?}");
        // One connection, one request at a time: rate x mean latency is at most, and nearly, 1 s.
        let busy = metric(&report, "requests_per_s") * metric(&report, "mean_us") / 1e6;
        assert!((0.6..=1.05).contains(&busy), "busy for {busy}");
    });
}

#[test]
fn requests_larger_than_all_socket_buffers_come_back_whole() {
    let server = server(Mode::Echo);
    let report = rr::run(&rr(client(server.address(), 2), 24 << 20)).unwrap();
    assert!(report.ok() > 0);
    assert!(
        report.errors_by_kind().is_empty(),
        "{:?}",
        report.errors_by_kind()
    );
}

/// A server of 64-byte messages that stalls for 200 ms, 300 ms after a connection was made.
fn stalls_once() -> SocketAddr {
    hand_made(|_, stream| {
        let begun = Instant::now();
        let mut stalled = false;
        echo_messages(stream, 64, |_, _| {
            if !stalled && begun.elapsed() > Duration::from_millis(300) {
                stalled = true;
                thread::sleep(Duration::from_millis(200));
            }
        });
    })
}

#[test]
fn a_stall_of_the_server_is_in_the_maximum() {
    let address = stalls_once();
    let report = rr::run(&rr(client(address, 1), 64)).unwrap();
    assert!(
        metric(&report, "max_us") >= 199_000.0,
        "{}",
        metric(&report, "max_us")
    );
    // Closed loop: the stall is a single sample and does not reach the median.
    assert!(metric(&report, "p50_us") < 50_000.0);
}

#[test]
fn an_open_loop_counts_the_requests_a_stall_delayed() {
    in_one_of_five_tries(|| {
        let address = stalls_once();
        let mut options = rr(client(address, 1), 64);
        options.pacing = Pacing::Open {
            rate: 1000.0,
            arrivals: Arrivals::Constant,
        };
        let report = rr::run(&options).unwrap();
        // 200 of 600 requests were due while the server slept: a third waited 0 to 200 ms.
        assert!(
            metric(&report, "p90_us") > 100_000.0,
            "{}",
            metric(&report, "p90_us")
        );
        assert!(metric(&report, "p99_us") > 150_000.0);
        // One request met the stall itself; all others were served at once.
        for quantile in ["service_p90_us", "service_p99_us"] {
            assert!(metric(&report, quantile) < 100_000.0, "{quantile}");
        }
        assert!(metric(&report, "service_max_us") > 190_000.0);
        assert!(metric(&report, "late") > 100.0);
        assert_eq!(metric(&report, "scheduled"), 600.0);
        assert_eq!(report.ok(), 600);
        assert_eq!(report.skipped(), 0);
    });
}

#[test]
fn a_rate_nobody_can_serve_is_saturated_and_says_how_many_were_skipped() {
    in_one_of_five_tries(|| {
        let address = hand_made(|_, stream| {
            echo_messages(stream, 64, |_, _| thread::sleep(Duration::from_millis(10)));
        });
        let mut options = rr(client(address, 2), 64);
        options.pacing = Pacing::Open {
            rate: 2000.0,
            arrivals: Arrivals::Poisson,
        };
        let report = rr::run(&options).unwrap();
        assert!(report.saturated());
        let scheduled = metric(&report, "scheduled");
        assert!((1000.0..1400.0).contains(&scheduled), "{scheduled}");
        assert!(
            report.skipped() as f64 > scheduled * 0.8,
            "{} of {scheduled}",
            report.skipped()
        );
    });
}

#[test]
fn a_server_that_closes_early_is_counted_and_dialled_again() {
    let address = hand_made(|_, stream| {
        let mut stream = stream;
        let mut message = [0; 64];
        for _ in 0..10 {
            if stream.read_exact(&mut message).is_err() || stream.write_all(&message).is_err() {
                return;
            }
        }
        // Half a response, then the end.
        let _ = stream.read_exact(&mut message);
        let _ = stream.write_all(&message[..32]);
    });
    let report = rr::run(&rr(client(address, 2), 64)).unwrap();
    assert!(report.ok() > 0);
    assert!(metric(&report, "reconnects") >= 2.0);
    let early = report
        .errors_by_kind()
        .get("closed_early")
        .copied()
        .unwrap_or(0);
    assert!(early >= 2, "{:?}", report.errors_by_kind());
}

#[test]
fn a_wrong_byte_is_found() {
    let address = hand_made(|_, stream| {
        echo_messages(stream, 64, |n, message| {
            if n == 20 {
                message[40] ^= 1;
            }
        });
    });
    let report = rr::run(&rr(client(address, 1), 64)).unwrap();
    assert!(report.errors_by_kind()["content_mismatch"] >= 1);
}

#[test]
fn bytes_nobody_asked_for_are_found() {
    let address = hand_made(|_, mut stream| {
        let mut message = [0; 64];
        while stream.read_exact(&mut message).is_ok() {
            if stream
                .write_all(&[message.as_slice(), b"!"].concat())
                .is_err()
            {
                return;
            }
        }
    });
    let report = rr::run(&rr(client(address, 1), 64)).unwrap();
    assert!(
        report.errors_by_kind()["excess_bytes"] >= 1,
        "{:?}",
        report.errors_by_kind()
    );
}

#[test]
fn a_server_that_never_answers_does_not_hold_the_run() {
    let address = hand_made(|_, stream| {
        thread::sleep(Duration::from_secs(60));
        drop(stream);
    });
    let mut client = client(address, 4);
    client.grace = Duration::from_millis(200);
    client.request_timeout = Duration::from_millis(300);
    let begun = Instant::now();
    let report = rr::run(&rr(client, 64)).unwrap();
    assert!(
        begun.elapsed() < Duration::from_secs(30),
        "it waited for them"
    );
    assert_eq!(report.ok(), 0);
    assert!(
        report.errors_by_kind()["timeout"] >= 4,
        "{:?}",
        report.errors_by_kind()
    );
}

#[test]
fn stream_bytes_agree_with_the_servers() {
    for (direction, mode) in [
        (Direction::Up, Mode::Sink),
        (Direction::Down, Mode::Source),
        (Direction::Both, Mode::Source),
        (Direction::Both, Mode::Echo),
    ] {
        let server = server(mode);
        let options = stream::Options {
            client: client(server.address(), 3),
            direction,
            verify: true,
        };
        let report = stream::run(&options).unwrap();
        let totals = server.stop().unwrap();
        assert!(
            report.errors_by_kind().is_empty(),
            "{:?}",
            report.errors_by_kind()
        );
        assert_eq!(report.ok(), 3);
        let of = |name| metric(&report, name) as u64;
        assert_eq!(
            of("bytes_sent_total"),
            totals.received_bytes,
            "{direction:?} {mode:?}"
        );
        assert_eq!(
            of("bytes_received_total"),
            totals.sent_bytes,
            "{direction:?} {mode:?}"
        );
        assert_eq!(of("bytes_up_per_s") > 0, direction != Direction::Down);
        assert_eq!(of("bytes_down_per_s") > 0, direction != Direction::Up);
    }
}

#[test]
fn connect_makes_a_connection_for_every_request() {
    let server = server(Mode::Echo);
    let options = connect::Options {
        client: client(server.address(), 4),
        size: 64,
        verify: true,
    };
    let report = connect::run(&options).unwrap();
    // What the kernel still queues must be accepted before the totals are read.
    thread::sleep(Duration::from_millis(200));
    let totals = server.stop().unwrap();
    assert!(
        report.errors_by_kind().is_empty(),
        "{:?}",
        report.errors_by_kind()
    );
    assert!(report.ok() > 10);
    assert!(totals.connections > report.ok());
    assert_eq!(totals.connections * 64, totals.received_bytes);
    assert!(metric(&report, "connect_p50_us") <= metric(&report, "p50_us"));
}

#[test]
fn idle_tells_held_connections_from_dropped_ones() {
    let address = hand_made(|i, stream| {
        if i % 2 == 0 {
            thread::sleep(Duration::from_secs(60));
        }
        drop(stream);
    });
    // Many, so that the first are dropped while the last are still being established.
    let mut client = client(address, 400);
    // Time for the server to drop its half also on a machine that is busy otherwise.
    client.duration = Duration::from_secs(2);
    let report = idle::run(&idle::Options { client }).unwrap();
    assert_eq!(report.ok(), 200);
    assert_eq!(report.errors_by_kind()["closed_early"], 200);
}

#[test]
fn nobody_listening_ends_the_run_at_once() {
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let mut client = client(free, 3);
    client.duration = Duration::from_secs(30);
    let begun = Instant::now();
    let report = rr::run(&rr(client, 64)).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(15), "it went on");
    assert_eq!(report.ok(), 0);
    assert_eq!(report.errors_by_kind()["connect_refused"], 3);
}

#[test]
fn an_occupied_address_is_refused() {
    let first = server(Mode::Echo);
    let again = serve::Options {
        listen: first.address(),
        threads: None,
        ..serving(Mode::Echo)
    };
    let error = Server::start(&again).unwrap_err();
    assert!(matches!(error, Error::Listen { .. }));
    assert!(
        error.to_string().contains("another process listens there"),
        "{error}"
    );
}

#[test]
fn what_others_listen_on_is_served() {
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let addresses = [0, 1].map(|i: usize| listeners[i].local_addr().unwrap());
    let server = Server::over(listeners.into(), &serving(Mode::Echo)).unwrap();
    assert_eq!(server.address(), addresses[0]);
    for address in addresses {
        let report = rr::run(&rr(client(address, 4), 100)).unwrap();
        assert!(report.ok() > 0 && report.errors_by_kind().is_empty());
    }
    assert_eq!(server.stop().unwrap().connections, 8);
    let none = Server::over(Vec::new(), &serving(Mode::Echo));
    assert!(matches!(none, Err(Error::Listen { .. })));
}

#[test]
fn requests_of_many_sizes_come_back_whole_and_in_their_shares() {
    let server = server(Mode::Echo);
    let mut options = rr(client(server.address(), 8), 1);
    options.verify = true;
    options.sizes = "100:3,10000:1".parse().unwrap();
    let report = rr::run(&options).unwrap();
    assert!(
        report.errors_by_kind().is_empty(),
        "{:?}",
        report.errors_by_kind()
    );
    let totals = server.stop().unwrap();
    let mean = totals.received_bytes as f64 / metric(&report, "requests_total");
    assert!(
        (mean / options.sizes.mean() - 1.0).abs() < 0.15,
        "{mean} of {}",
        options.sizes.mean()
    );
}

#[test]
fn the_search_finds_what_a_server_can_serve() {
    in_one_of_five_tries(|| {
        // One at a time, 2 ms each: some 450 requests a second on one connection, whatever happens.
        let address = hand_made(|_, stream| {
            echo_messages(stream, 64, |_, _| thread::sleep(Duration::from_millis(2)));
        });
        let options = rr(client(address, 1), 64);
        let mut told = 0;
        let report = search::run(
            &options,
            Arrivals::Constant,
            &"p90<100ms".parse().unwrap(),
            |_| told += 1,
        )
        .unwrap();
        let steps = report.json()["search"]["steps"].as_array().unwrap().len();
        assert_eq!(told, steps + 1);
        let rate = metric(&report, "max_sustainable_per_s");
        assert!((100.0..600.0).contains(&rate), "{rate}");
        let none = search::run(
            &options,
            Arrivals::Constant,
            &"p50<1us".parse().unwrap(),
            |_| {},
        );
        assert_eq!(none.unwrap().metric("max_sustainable_per_s"), None);
    });
}

/// A server of 64-byte messages that stops answering `after` a connection was made.
fn stalls_for_good(after: Duration) -> SocketAddr {
    hand_made(move |_, stream| {
        let begun = Instant::now();
        echo_messages(stream, 64, |_, _| {
            if begun.elapsed() > after {
                thread::sleep(Duration::from_secs(60));
            }
        });
    })
}

fn open_loop(mut options: rr::Options, rate: f64) -> rr::Options {
    options.pacing = Pacing::Open {
        rate,
        arrivals: Arrivals::Constant,
    };
    options
}

#[test]
fn a_stall_that_lasts_to_the_end_is_in_the_tail() {
    let address = stalls_for_good(Duration::from_millis(400));
    let mut client = client(address, 1);
    client.grace = Duration::from_millis(300);
    let report = rr::run(&open_loop(rr(client.clone(), 64), 1000.0)).unwrap();
    // Due in the last 300 ms and never answered: half of all, each at least as old as the grace.
    let (scheduled, unfinished) = (metric(&report, "scheduled"), metric(&report, "unfinished"));
    assert_eq!(scheduled, 600.0);
    assert!(unfinished >= 250.0, "{unfinished}");
    assert_eq!(report.skipped() as f64 + 1.0, unfinished);
    assert!(metric(&report, "count") >= scheduled, "each counts once");
    for name in ["p90_us", "p99_us", "p999_us", "max_us", "service_max_us"] {
        assert!(metric(&report, name) >= 300_000.0, "{name}");
    }
    let closed = rr::run(&rr(client, 64)).unwrap();
    assert!(metric(&closed, "max_us") >= 590_000.0, "{}", closed.json());
    assert_eq!(metric(&closed, "unfinished"), 1.0);
}

#[test]
fn a_stall_that_begins_in_the_warm_up_is_in_the_figures() {
    let address = stalls_for_good(Duration::ZERO);
    let mut client = client(address, 2);
    client.grace = Duration::from_millis(50);
    let options = connect::Options {
        client: client.clone(),
        size: 64,
        verify: false,
    };
    for report in [
        rr::run(&rr(client, 64)).unwrap(),
        connect::run(&options).unwrap(),
    ] {
        assert_eq!(report.ok(), 0);
        assert_eq!(report.errors_by_kind()["unfinished"], 2);
        assert_eq!(metric(&report, "unfinished"), 2.0);
        assert!(metric(&report, "p50_us") >= 600_000.0);
    }
}

#[test]
fn requests_that_time_out_are_in_the_latencies() {
    let address = stalls_for_good(Duration::ZERO);
    let mut client = client(address, 2);
    client.request_timeout = Duration::from_millis(200);
    client.grace = Duration::from_millis(300);
    let options = connect::Options {
        client: client.clone(),
        size: 64,
        verify: false,
    };
    for report in [
        rr::run(&rr(client, 64)).unwrap(),
        connect::run(&options).unwrap(),
    ] {
        assert!(report.errors_by_kind()["timeout"] >= 2);
        assert!(metric(&report, "p50_us") >= 200_000.0, "{}", report.json());
    }
}

#[test]
fn an_overloaded_run_ends_in_time_and_counts_what_was_served() {
    let server = server(Mode::Echo);
    for connections in [1, 4] {
        for arrivals in [Arrivals::Constant, Arrivals::Poisson] {
            let mut options = rr(client(server.address(), connections), 64);
            options.pacing = Pacing::Open {
                rate: 1e9,
                arrivals,
            };
            let begun = Instant::now();
            let report = rr::run(&options).unwrap();
            // 0.7 s of load. Counting the backlog one by one took as many seconds as billions.
            assert!(
                begun.elapsed() < Duration::from_secs(10),
                "{:?}",
                begun.elapsed()
            );
            assert!(report.ok() > 0 && report.saturated());
            assert!(metric(&report, "requests_per_s") > 0.0);
            let scheduled = metric(&report, "scheduled");
            assert!((5.9e8..6.1e8).contains(&scheduled), "{scheduled}");
            // Nobody gets through: half of the requests have waited for half of the time.
            let p50 = metric(&report, "p50_us");
            assert!(p50 >= 290_000.0, "{p50}");
        }
    }
}

#[test]
fn a_stream_that_is_never_closed_does_not_ask_whether_anybody_listens() {
    let address = hand_made(|_, mut stream| {
        let mut buffer = [0; 65536];
        while stream.read(&mut buffer).is_ok_and(|n| n > 0) {}
        thread::sleep(Duration::from_secs(60));
    });
    let mut client = client(address, 2);
    client.grace = Duration::from_millis(200);
    let options = stream::Options {
        client,
        direction: Direction::Up,
        verify: false,
    };
    let report = stream::run(&options).unwrap();
    assert!(metric(&report, "bytes_up_per_s") > 0.0);
    assert_eq!((report.ok(), report.errors_by_kind()["unfinished"]), (0, 2));
    let told = report.nothing_succeeded();
    assert!(
        told.contains("2 connections stood") && !told.contains("listening"),
        "{told}"
    );
}

#[test]
fn rates_of_an_interrupted_run_do_not_count_the_grace_period() {
    let address = stalls_for_good(Duration::from_millis(150));
    let mut client = client(address, 1);
    client.warmup = Duration::ZERO;
    client.duration = Duration::from_secs(30);
    let stop = client.stop.clone();
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(500));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let report = rr::run(&rr(client, 64)).unwrap();
    // Stopped after 0.5 s, then 2 s of grace for the request that is stuck.
    let measured = report.json()["measured_s"].as_f64().unwrap();
    let rate = metric(&report, "requests_per_s");
    assert!((rate * measured / report.ok() as f64 - 1.0).abs() < 0.01);
    let age = metric(&report, "max_us") / 1e6;
    assert!(
        measured + 1.5 < age + 0.4,
        "measured {measured} s, stuck for {age} s"
    );
}
