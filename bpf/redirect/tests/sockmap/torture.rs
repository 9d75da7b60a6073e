//! Many connections at once whose ends do everything sockets can do, with every byte checked.
//!
//! A stream's bytes are a function of its number and of their place in it, so that loss, repetition
//! and a wrong order all show. Peers block or poll, write pieces of any size, pause, close one half
//! at any point, reset, or stop reading for a while. The seed is printed if something fails.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use socket2::SockRef;

use crate::support::{
    Net, POD, POD6, Peer, ZTUNNEL, ZTUNNEL6, can_run, connect, exchange, free_memory, wait,
};

/// A small generator of numbers that look random; the same for the same seed.
#[derive(Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Mostly small, sometimes more than any budget.
    pub(crate) fn size(&mut self) -> usize {
        let most = if self.below(10) == 0 { 20 } else { 14 };
        let bits = self.below(most);
        (1 + self.below(1 << bits)) as usize
    }
}

/// Byte `at` of stream `stream`.
pub(crate) fn byte(stream: u64, at: u64) -> u8 {
    ((at ^ (at >> 8) ^ (at >> 16)).wrapping_mul(31) ^ stream.wrapping_mul(7)) as u8
}

/// How an end behaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Habits {
    pub(crate) seed: u64,
    /// Bytes it sends before it closes its half.
    pub(crate) sends: u64,
    pub(crate) pauses: bool,
    /// Stops reading for a while in the middle.
    pub(crate) dozes: bool,
}

/// Sends `habits.sends` bytes and then ends the stream.
pub(crate) fn send(stream: &TcpStream, number: u64, habits: Habits) -> io::Result<()> {
    let mut random = Random(habits.seed);
    let mut at = 0;
    while at < habits.sends {
        let size = (random.size() as u64).min(habits.sends - at);
        let piece: Vec<u8> = (at..at + size).map(|at| byte(number, at)).collect();
        write_all(stream, &piece)?;
        at += size;
        if habits.pauses && random.below(4) == 0 {
            thread::sleep(Duration::from_micros(random.below(1500)));
        }
    }
    stream.shutdown(Shutdown::Write)
}

/// Works for sockets that block and for those that do not.
fn write_all(mut stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => wait(stream, PollFlags::POLLOUT),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Receives until the end and checks every byte; returns how many there were.
pub(crate) fn receive(
    mut stream: &TcpStream,
    number: u64,
    habits: Habits,
    blocks: bool,
) -> io::Result<u64> {
    let mut random = Random(!habits.seed);
    let mut buffer = vec![0; 128 * 1024];
    let mut at = 0;
    loop {
        let size = random.size().min(buffer.len());
        match stream.read(&mut buffer[..size]) {
            Ok(0) => return Ok(at),
            Ok(n) => {
                for received in &buffer[..n] {
                    assert_eq!(*received, byte(number, at), "byte {at} of stream {number}");
                    at += 1;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && !blocks => {
                wait(stream, PollFlags::POLLIN);
            }
            Err(e) => return Err(e),
        }
        if habits.dozes && random.below(64) == 0 {
            thread::sleep(Duration::from_millis(random.below(60)));
        }
    }
}

/// Both directions of one end at once, as a full-duplex application does.
pub(crate) fn live(stream: &TcpStream, numbers: [u64; 2], habits: Habits, blocks: bool) -> u64 {
    let [own, other] = numbers;
    thread::scope(|scope| {
        let sender = scope.spawn(move || send(stream, own, habits));
        let received = receive(stream, other, habits, blocks);
        sender
            .join()
            .unwrap()
            .unwrap_or_else(|e| panic!("stream {own}: {e}"));
        received.unwrap_or_else(|e| panic!("stream {other}: {e}"))
    })
}

fn habits(random: &mut Random) -> Habits {
    let most = [0, 1, 100, 10_000, 300_000, 3_000_000][random.below(6) as usize];
    Habits {
        seed: random.next(),
        sends: if most == 0 { 0 } else { random.below(most) },
        pauses: random.below(2) == 0,
        dozes: random.below(3) == 0,
    }
}

/// Lets a server's first connection show that it blocks: that one may see EAGAIN if it is reset or
/// sends more than fits while it waits.
fn blocks_once(net: &Net, listener: &TcpListener) {
    let to = listener.local_addr().unwrap();
    let mut zt = Peer(net.dial(to));
    let (mut server, _) = listener.accept().unwrap();
    zt.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
    server.write_all(b"y").unwrap();
    zt.expect(b"y");
}

/// Connections one after the other: either family, either end opening, blocking or not.
fn one_worker(net: &Net, seed: u64, deadline: Instant) -> u64 {
    let mut random = Random(seed);
    let listen = |address: IpAddr| net.on("pod", || TcpListener::bind((address, 0)).unwrap());
    let listeners = [
        ("pod", net.listener(IpAddr::V4(ZTUNNEL))),
        ("pod", net.listener(IpAddr::V6(ZTUNNEL6))),
        ("zt", listen(IpAddr::V4(POD))),
        ("zt", listen(IpAddr::V6(POD6))),
    ];
    let blocking = [listen(IpAddr::V4(POD)), listen(IpAddr::V6(POD6))];
    for listener in &blocking {
        blocks_once(net, listener);
    }
    let mut count = 0;
    while Instant::now() < deadline {
        let choice = random.below(4) as usize;
        let blocks = random.below(4) == 0;
        let (from, listener) = match &listeners[choice] {
            ("zt", _) if blocks => ("zt", &blocking[choice - 2]),
            (from, listener) => (*from, listener),
        };
        let to = listener.local_addr().unwrap();
        // ztunnel never blocks, pods do as they like.
        let (client_blocks, server_blocks) = (blocks && from == "pod", blocks && from == "zt");
        let client = match from {
            "zt" => net.dial(to),
            _ => net.on("pod", || connect(to, client_blocks)),
        };
        let (server, _) = listener.accept().unwrap();
        server.set_nonblocking(!server_blocks).unwrap();
        let (one, other) = (habits(&mut random), habits(&mut random));
        let numbers = [random.next(), random.next()];
        let case = format!("seed {seed:#x} connection {count} from {from} {one:?} {other:?}");
        let received = thread::scope(|scope| {
            let server =
                scope.spawn(|| live(&server, [numbers[1], numbers[0]], other, server_blocks));
            let client = scope.spawn(|| live(&client, numbers, one, client_blocks));
            [client.join(), server.join()]
        });
        match received {
            [Ok(by_client), Ok(by_server)] => {
                assert_eq!([by_client, by_server], [other.sends, one.sends], "{case}");
            }
            _ => panic!("{case}"),
        }
        count += 1;
    }
    count
}

#[test]
fn every_byte_arrives_in_order_whatever_the_ends_do() {
    if !can_run("every_byte_arrives_in_order_whatever_the_ends_do") {
        return;
    }
    let net = Net::up();
    let start = Random(u64::from(std::process::id())).next();
    let deadline = Instant::now() + Duration::from_secs(15);
    let total: u64 = thread::scope(|scope| {
        let workers: Vec<_> = (0..8)
            .map(|i| {
                scope.spawn({
                    let net = &net;
                    move || one_worker(net, start + i, deadline)
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap())
            .sum()
    });
    let counters = net.status().counters;
    assert!(total > 100, "{total} connections");
    // All of it was exercised.
    for counter in [
        "to_ztunnel_bytes",
        "bypassed_bytes",
        "demoted_budget",
        "demoted_blocking",
    ] {
        assert!(counters[counter] > 0, "{counter}: {counters:?}");
    }
    net.expect_empty_maps();
}

#[test]
fn resets_at_any_point_are_errors_or_ends_and_never_wrong_bytes() {
    if !can_run("resets_at_any_point_are_errors_or_ends_and_never_wrong_bytes") {
        return;
    }
    let net = Net::up();
    let listener = net.listener(IpAddr::V4(ZTUNNEL));
    let mut random = Random(u64::from(std::process::id()));
    for round in 0..300 {
        let (app, zt) = net.connect(&listener);
        let (number, sends) = (random.next(), 1 + random.below(200_000));
        let survives = random.below(sends);
        let habits = Habits {
            seed: random.next(),
            sends,
            pauses: true,
            dozes: false,
        };
        thread::scope(|scope| {
            let sender = scope.spawn(|| send(&app.0, number, habits));
            let mut left = survives;
            let mut buffer = vec![0; 16 * 1024];
            let mut zt = zt;
            let mut at = 0;
            while left > 0 {
                let n = zt
                    .read(&mut buffer[..(left as usize).min(16 * 1024)])
                    .unwrap();
                assert!(n > 0, "round {round}");
                for received in &buffer[..n] {
                    assert_eq!(*received, byte(number, at), "byte {at} in round {round}");
                    at += 1;
                }
                left -= n as u64;
            }
            SockRef::from(&zt.0)
                .set_linger(Some(Duration::ZERO))
                .unwrap();
            drop(zt);
            // Done before the reset, or told of it.
            if let Err(error) = sender.join().unwrap() {
                let gone = [
                    io::ErrorKind::BrokenPipe,
                    io::ErrorKind::ConnectionReset,
                    io::ErrorKind::NotConnected,
                ];
                assert!(gone.contains(&error.kind()), "round {round}: {error}");
            }
        });
    }
    net.expect_empty_maps();
}

#[test]
fn a_thousand_connections_share_the_maps_within_bounds() {
    if !can_run("a_thousand_connections_share_the_maps_within_bounds") {
        return;
    }
    let net = Net::up_alone();
    let limit = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, hard) = nix::sys::resource::getrlimit(limit).unwrap();
    nix::sys::resource::setrlimit(limit, hard, hard).unwrap();
    let listener = net.listener(IpAddr::V4(ZTUNNEL));
    let before = free_memory();
    let to = listener.local_addr().unwrap();
    let mut pairs: Vec<_> = net.on("pod", || {
        (0..1000)
            .map(|_| (Peer(connect(to, false)), Peer(listener.accept().unwrap().0)))
            .collect()
    });
    for round in 0..5_u8 {
        for (index, (app, zt)) in pairs.iter_mut().enumerate() {
            let message = vec![round ^ index as u8; 1 + index % 3000];
            exchange(app, zt, &message);
            if index % 3 == 0 {
                app.write_all(&message).unwrap(); // and left unread for now
            }
        }
        for (index, (_, zt)) in pairs.iter_mut().enumerate().step_by(3) {
            zt.expect(&vec![round ^ index as u8; 1 + index % 3000]);
        }
    }
    let counters = net.status().counters;
    assert_eq!(counters["bypassed_bytes"], 0, "{counters:?}");
    assert_eq!(counters["sockets"], 2000, "{counters:?}");
    // None reads, all send without end: what the sockmap takes is bounded for each of them.
    let piece = vec![1; 32 * 1024];
    for (app, _) in &mut pairs {
        while app.0.write(&piece).is_ok_and(|n| n == piece.len()) {
            if net_is_short(before) {
                break;
            }
        }
    }
    let redirected = net.counter("to_ztunnel_bytes") - counters["to_ztunnel_bytes"];
    assert!(redirected <= 1000 * 256 * 1024, "{redirected} bytes");
    drop(pairs);
    net.expect_empty_maps();
}

/// TCP's own buffers are what fills memory here; not more of it than the test needs.
fn net_is_short(before: u64) -> bool {
    before.saturating_sub(free_memory()) > 1 << 30
}
