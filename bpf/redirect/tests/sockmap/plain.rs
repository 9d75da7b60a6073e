//! What ztunnel is told of its sockets: those that may use the sockmap, and those that have left
//! it, so that it may splice. Its relay is rebuilt here with every byte checked.

use std::io;
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags, splice};
use nix::poll::PollFlags;
use nix::unistd::pipe2;
use redirect::sockmap::Sockets;
use socket2::SockRef;

use crate::support::{
    Net, POD, Peer, ZTUNNEL, ZTUNNEL6, can_run, connect, eventually, exchange, wait,
};
use crate::torture::{Habits, Random, byte, live};

fn is_plain(net: &Net, peer: &Peer) -> bool {
    net.sockets.is_plain(peer.0.as_fd())
}

/// Sends more than the budget at once and has it read after a moment.
fn overfill(from: &mut Peer, to: &mut Peer) {
    let bulk = vec![9; 1 << 20];
    thread::scope(|scope| {
        scope.spawn(|| from.write_all(&bulk).unwrap());
        thread::sleep(Duration::from_millis(20));
        to.expect(&bulk);
    });
}

#[test]
fn a_socket_is_plain_once_it_has_left_the_maps() {
    if !can_run("a_socket_is_plain_once_it_has_left_the_maps") {
        return;
    }
    let net = Net::up();
    for address in [IpAddr::V4(ZTUNNEL), IpAddr::V6(ZTUNNEL6)] {
        let listener = net.listener(address);
        let (mut app, mut zt) = net.connect(&listener);
        assert!(!is_plain(&net, &zt), "it has just been entered");
        exchange(&mut app, &mut zt, b"question");
        exchange(&mut zt, &mut app, b"answer");
        assert!(!is_plain(&net, &zt), "it is in the sockmap");
        overfill(&mut app, &mut zt);
        eventually("it is plain", || {
            exchange(&mut app, &mut zt, b"question");
            is_plain(&net, &zt)
        });
        eventually("both have left", || {
            exchange(&mut app, &mut zt, b"question");
            net.sockets_in_maps() == 0
        });
        exchange(&mut zt, &mut app, b"answer");
    }
    // Connections that ztunnel opens.
    let listener = net.on("pod", || TcpListener::bind((POD, 0)).unwrap());
    let mut zt = Peer(net.dial(listener.local_addr().unwrap()));
    let accepted = listener.accept().unwrap().0;
    accepted.set_nonblocking(true).unwrap();
    let mut app = Peer(accepted);
    assert!(!is_plain(&net, &zt), "it has just been entered");
    exchange(&mut zt, &mut app, b"question");
    overfill(&mut zt, &mut app);
    eventually("it is plain", || {
        exchange(&mut zt, &mut app, b"question");
        is_plain(&net, &zt)
    });
}

/// Only one end ever sends: the other one leaves as well, and what it sends shows it.
#[test]
fn bulk_in_one_direction_only_lets_both_ends_leave() {
    if !can_run("bulk_in_one_direction_only_lets_both_ends_leave") {
        return;
    }
    let net = Net::up();
    for upload in [true, false] {
        let (app, zt) = net.pair();
        let zt_fd = zt.0.try_clone().unwrap();
        let (mut from, mut to) = if upload { (app, zt) } else { (zt, app) };
        exchange(&mut from, &mut to, b"header");
        overfill(&mut from, &mut to);
        eventually("ztunnel's is plain", || {
            exchange(&mut from, &mut to, &[1; 4000]);
            net.sockets.is_plain(zt_fd.as_fd())
        });
        eventually("both have left", || {
            exchange(&mut from, &mut to, &[1; 4000]);
            net.sockets_in_maps() == 0
        });
    }
}

/// As one with `SOCKMAP=off`: none of its sockets is entered, and pods' ones leave at once.
#[test]
fn a_ztunnel_that_does_not_ask_for_it_is_left_alone() {
    if !can_run("a_ztunnel_that_does_not_ask_for_it_is_left_alone") {
        return;
    }
    let net = Net::up();
    let unmarked = net.on("zt", || TcpListener::bind((ZTUNNEL, 0)).unwrap());
    let (mut app, mut zt) = net.connect(&unmarked);
    assert!(is_plain(&net, &zt), "it is not marked");
    eventually("the pod's socket leaves", || net.sockets_in_maps() == 0);
    for size in [1, 3000, 100_000] {
        exchange(&mut app, &mut zt, &vec![1; size]);
        exchange(&mut zt, &mut app, &vec![2; size]);
    }
    let server = net.on("pod", || TcpListener::bind((POD, 0)).unwrap());
    let to = server.local_addr().unwrap();
    let mut zt = Peer(net.on("zt", || connect(to, false)));
    let accepted = server.accept().unwrap().0;
    accepted.set_nonblocking(true).unwrap();
    let mut app = Peer(accepted);
    assert_eq!(net.sockets_in_maps(), 0);
    exchange(&mut app, &mut zt, &[1; 3000]);
    exchange(&mut zt, &mut app, &[2; 3000]);
    let counters = net.status().counters;
    for name in ["to_ztunnel_bytes", "to_pod_bytes", "bypassed_bytes"] {
        assert_eq!(counters[name], 0, "{counters:?}");
    }
    // Side by side with one that does ask, as during an upgrade.
    let marked = net.listener(IpAddr::V4(ZTUNNEL));
    let (mut app, mut zt) = net.connect(&marked);
    assert!(!is_plain(&net, &zt));
    exchange(&mut app, &mut zt, b"question");
    assert_eq!(net.counter("to_ztunnel_bytes"), 8);
}

/// The maps are gone and others have come: what ztunnel knows of its older sockets stays right, and
/// its listeners are marked for the new ones.
#[test]
fn sockets_are_followed_from_maps_to_maps() {
    if !can_run("sockets_are_followed_from_maps_to_maps") {
        return;
    }
    let mut net = Net::up();
    let listener = net.on("zt", || TcpListener::bind((ZTUNNEL, 0)).unwrap());
    let sockets = Sockets::new(&net.bpffs().join("listeners"));
    let follow = || sockets.follow([listener.as_fd()]).unwrap();
    assert!(follow());
    assert!(!follow(), "the maps are the same");
    let (mut app, mut zt) = net.connect(&listener);
    exchange(&mut app, &mut zt, b"question");
    app.write_all(b"unread ").unwrap();
    // The old sockets stay in their map; new ones are not entered there any more.
    drop(net.sockmap.take());
    let hidden = net.bpffs().with_file_name("hidden");
    std::fs::rename(net.bpffs(), &hidden).unwrap();
    std::fs::remove_file(hidden.join("sockmap/shortcut_sockets")).unwrap();
    assert!(!follow(), "there are none");
    let net = net.install();
    assert!(follow());
    assert!(!sockets.is_plain(zt.0.as_fd()), "it is in the old map");
    zt.expect(b"unread ");
    // The kernel lets go of the old program a little after its link, and a socket has room for one.
    eventually("new connections take the new sockmap", || {
        let (mut app, mut zt) = net.connect(&listener);
        exchange(&mut app, &mut zt, b"question");
        assert!(!sockets.is_plain(zt.0.as_fd()));
        net.counter("to_ztunnel_bytes") > 0
    });
}

/// What went through a relay.
#[derive(Debug, Default)]
struct Seen {
    copied: AtomicU64,
    spliced: AtomicU64,
}

/// One direction as ztunnel's relay does it: copies until both sockets are plain, then splices.
fn pump(net: &Net, from: &TcpStream, to: &TcpStream, seen: &Seen) -> io::Result<()> {
    let (mut reader, mut writer) = (
        Peer(from.try_clone().unwrap()),
        Peer(to.try_clone().unwrap()),
    );
    let mut buffer = vec![0; 256 * 1024];
    let mut since_asked = u64::MAX;
    loop {
        if since_asked > 256 * 1024 {
            since_asked = 0;
            if net.sockets.is_plain(from.as_fd()) && net.sockets.is_plain(to.as_fd()) {
                return pump_spliced(from, to, seen);
            }
        }
        let n = reader.read(&mut buffer)?;
        if n == 0 {
            return to.shutdown(Shutdown::Write);
        }
        writer.write_all(&buffer[..n])?;
        since_asked += n as u64;
        seen.copied.fetch_add(n as u64, Ordering::Relaxed);
    }
}

fn pump_spliced(from: &TcpStream, to: &TcpStream, seen: &Seen) -> io::Result<()> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    loop {
        let mut inside = move_some(from, &writer, 1 << 20, || {
            wait(from, PollFlags::POLLIN);
        })?;
        if inside == 0 {
            return to.shutdown(Shutdown::Write);
        }
        seen.spliced.fetch_add(inside as u64, Ordering::Relaxed);
        while inside > 0 {
            inside -= move_some(&reader, to, inside, || wait(to, PollFlags::POLLOUT))?;
        }
    }
}

fn move_some(
    from: &impl std::os::fd::AsFd,
    to: &impl std::os::fd::AsFd,
    bytes: usize,
    wait: impl Fn(),
) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    loop {
        match splice(from, None, to, None, bytes, flags) {
            Err(Errno::EAGAIN) => wait(),
            other => return Ok(other?),
        }
    }
}

/// Both directions of a connection from `near` to `far`. One that fails ends for its receiver, too.
fn relay(net: &Net, near: &TcpStream, far: &TcpStream, seen: &Seen) -> [io::Result<()>; 2] {
    let pump = |from: &TcpStream, to: &TcpStream| {
        let result = pump(net, from, to, seen);
        if result.is_err() {
            let _ = to.shutdown(Shutdown::Write); // it may be gone as well
        }
        result
    };
    thread::scope(|scope| {
        let up = scope.spawn(|| pump(near, far));
        let down = pump(far, near);
        [up.join().unwrap(), down]
    })
}

/// A client in the pod, ztunnel's two sockets, and a server in the pod.
fn chain(net: &Net, listener: &TcpListener, server: &TcpListener) -> [TcpStream; 4] {
    let (client, near) = net.connect(listener);
    let far = net.dial(server.local_addr().unwrap());
    let accepted = server.accept().unwrap().0;
    accepted.set_nonblocking(true).unwrap();
    [client.0, near.0, far, accepted]
}

/// From the sockmap to TCP to splice, in both directions at once, whichever ends first.
#[test]
fn every_byte_arrives_in_order_from_the_sockmap_to_splice() {
    if !can_run("every_byte_arrives_in_order_from_the_sockmap_to_splice") {
        return;
    }
    let net = Net::up();
    let seed = u64::from(std::process::id());
    let seen = Seen::default();
    let deadline = Instant::now() + Duration::from_secs(8);
    thread::scope(|scope| {
        for worker in 0..3 {
            let (net, seen) = (&net, &seen);
            scope.spawn(move || {
                let mut random = Random(seed.wrapping_add(worker << 32));
                let listener = net.listener(IpAddr::V4(ZTUNNEL));
                let server = net.on("pod", || TcpListener::bind((POD, 0)).unwrap());
                while Instant::now() < deadline {
                    one_chain(net, &chain(net, &listener, &server), &mut random, seen);
                }
            });
        }
    });
    // One more as long as it takes, however slow the machine was.
    let listener = net.listener(IpAddr::V4(ZTUNNEL));
    let server = net.on("pod", || TcpListener::bind((POD, 0)).unwrap());
    let mut random = Random(seed);
    for _ in 0..100 {
        if seen.spliced.load(Ordering::Relaxed) > 0 {
            break;
        }
        one_chain(&net, &chain(&net, &listener, &server), &mut random, &seen);
    }
    assert!(seen.spliced.load(Ordering::Relaxed) > 0, "{seen:?}");
    assert!(seen.copied.load(Ordering::Relaxed) > 0, "{seen:?}");
    let counters = net.status().counters;
    assert!(counters["to_ztunnel_bytes"] > 0, "{counters:?}");
    net.expect_empty_maps();
}

fn one_chain(net: &Net, sockets: &[TcpStream; 4], random: &mut Random, seen: &Seen) {
    let [client, near, far, server] = sockets;
    let mut habits = || Habits {
        seed: random.next(),
        sends: [1000, 3_000_000, 30_000_000][random.below(3) as usize],
        pauses: random.below(4) == 0,
        dozes: random.below(4) == 0,
    };
    let (one, other) = (habits(), habits());
    let numbers = [random.next(), random.next()];
    let received = thread::scope(|scope| {
        let relay = scope.spawn(|| relay(net, near, far, seen));
        let server = scope.spawn(|| live(server, [numbers[1], numbers[0]], other, false));
        let client = live(client, numbers, one, false);
        for result in relay.join().unwrap() {
            result.unwrap();
        }
        [client, server.join().unwrap()]
    });
    assert_eq!(received, [other.sends, one.sends], "{one:?} {other:?}");
}

/// The client resets: the server gets the beginning of what was sent, and not one other byte.
#[test]
fn resets_across_the_change_to_splice_show_no_wrong_byte() {
    if !can_run("resets_across_the_change_to_splice_show_no_wrong_byte") {
        return;
    }
    let net = Net::up();
    let listener = net.listener(IpAddr::V4(ZTUNNEL));
    let server = net.on("pod", || TcpListener::bind((POD, 0)).unwrap());
    let mut random = Random(u64::from(std::process::id()));
    let seen = Seen::default();
    for round in 0..40 {
        let [client, near, far, accepted] = chain(&net, &listener, &server);
        let (number, sends) = (random.next(), random.below(1 << (10 + round % 16)));
        let got = thread::scope(|scope| {
            let seen = &seen;
            let net = &net;
            scope.spawn(move || {
                let _ = relay(net, &near, &far, seen); // one of them sees the reset
                drop((near, far));
            });
            let reader = scope.spawn(move || read_prefix(Peer(accepted), number));
            let mut client = Peer(client);
            let mut at = 0;
            while at < sends {
                let end = sends.min(at + 50_000);
                let piece: Vec<u8> = (at..end).map(|at| byte(number, at)).collect();
                client.write_all(&piece).unwrap();
                at = end;
            }
            SockRef::from(&client.0)
                .set_linger(Some(Duration::ZERO))
                .unwrap();
            drop(client);
            reader.join().unwrap()
        });
        assert!(got <= sends, "round {round}: {got} of {sends}");
    }
    net.expect_empty_maps();
}

/// Reads to the end or an error; every byte must be the stream's.
fn read_prefix(mut from: Peer, number: u64) -> u64 {
    let mut buffer = vec![0; 64 * 1024];
    let mut at = 0;
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) | Err(_) => {
                // So that the relay's other direction ends, too.
                let _ = from.0.shutdown(Shutdown::Both);
                return at;
            }
            Ok(n) => n,
        };
        for received in &buffer[..n] {
            assert_eq!(*received, byte(number, at), "byte {at} of stream {number}");
            at += 1;
        }
    }
}
