//! What costs the victim more than the attacker: memory behind small frames, work behind SETTINGS,
//! lines of log behind refusals.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use super::own_lab::with_small_ztunnels;
use super::resets::unread_listener;
use super::{Application, Attack, Failure, INSIDER, got, small};
use crate::attack::arena::{
    ATTACKER, Arena, HBONE, PATIENCE, VICTIM, accept_all, address, eventually, victim,
};
use crate::attack::catalog::{Bounds, Finding, took};
use crate::attack::frames::{connect, data, hello, settings};
use crate::attack::session::{Heard, Session};

const FAMILY: &str = "spending";
/// Payload of a small frame.
const SMALL: usize = 100;

pub(super) fn attacks() -> Vec<Attack> {
    let bound = format!("ZTUNNEL_TUNNEL_MEMORY_BYTES={BOUND}");
    let log = "a line of log for each refusal, without limit";
    vec![
        fresh("small-data-unread", "", small_data),
        fresh("small-data-not-connected", "", not_connected),
        fresh("small-writes-of-a-pod", "", small_writes),
        fresh("more-than-tunnels-may-keep", &bound, beyond_the_bound),
        Attack {
            bounds: Bounds {
                // It is about work, which is compared with that of a twin; and 3,200 streams end.
                slower: None,
                descriptors: 1024,
                log: 4 << 20,
                ..Bounds::SMALL
            },
            ..alone(
                "settings-of-256",
                "work for each value on each stream",
                Box::new(settings_of_256),
            )
        },
        alone("refusals-in-a-tunnel", log, Box::new(refusals_in_a_tunnel)),
        alone(
            "refusals-in-plain",
            log,
            Box::new(|arena: &Arena| refusals(arena, ATTACKER, address(VICTIM, 9003)?, b"")),
        ),
        alone(
            "refusals-of-a-pod",
            log,
            Box::new(|arena: &Arena| refusals(arena, "client-a", address(VICTIM, 9001)?, b"")),
        ),
        alone(
            "refusals-of-handshakes",
            log,
            Box::new(|arena: &Arena| {
                refusals(arena, ATTACKER, victim(HBONE)?, b"GET / HTTP/1.1\r\n\r\n")
            }),
        ),
    ]
}

/// Against ztunnels of its own: what others have made one grow by would hide what this does.
fn fresh(name: &str, more: &str, attack: fn(&Arena) -> Finding) -> Attack {
    let line = format!("export ZTUNNEL_WORKER_THREADS=1 {more}");
    let must_not = "memory far beyond the bytes it sends, or beyond the bound for all tunnels";
    let run = move |arena: &Arena| with_small_ztunnels(arena, "mem", &line, attack);
    alone(name, must_not, Box::new(run))
}

fn alone(name: &str, must_not: &str, run: super::Run) -> Attack {
    Attack {
        alone: true,
        ..small(name, FAMILY, must_not, run)
    }
}

/// What ztunnels may grow by for each byte that they keep for a receiver, and besides.
const KEPT_TIMES: u64 = 8;
const BESIDES: u64 = 4 << 20;

/// Compares what ztunnels have grown by while `send` sent so many bytes that nobody reads.
fn in_proportion(few: &Arena, send: impl FnOnce() -> Result<(usize, String), Failure>) -> Finding {
    let before = few.sample().rss_bytes;
    let (sent, words) = send()?;
    let grown = few.sample().rss_bytes.saturating_sub(before);
    let told = format!("{} KiB grown for {} KiB {words}", grown >> 10, sent >> 10);
    if grown > KEPT_TIMES * sent as u64 + BESIDES {
        return got(format!("memory: {told}"));
    }
    Ok(told)
}

/// A stream to an application that does not read, in frames that are small, each in a record.
fn small_data(few: &Arena) -> Finding {
    let (listener, port) = unread_listener(few)?;
    let mut session = few.session(INSIDER)?;
    session.send(&hello())?;
    session.send(&connect(1, &victim(port)?.to_string()))?;
    let mut held = Vec::new();
    eventually("the stream reaches the application", || {
        held.extend(accept_all(&listener).unwrap_or_default());
        !held.is_empty()
    })?;
    in_proportion(few, || Ok(drip(few, &mut session)))
}

/// The same to an application whose connection is not made yet.
fn not_connected(few: &Arena) -> Finding {
    let full = few.lab.on(VICTIM, || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&std::net::SocketAddr::from(([0, 0, 0, 0], 0)).into())?;
        socket.listen(0)?;
        Ok::<TcpListener, std::io::Error>(socket.into())
    })??;
    let port = full.local_addr()?.port();
    // Nobody accepts: after these the kernel answers no more.
    let filled: Vec<_> = few.lab.on(VICTIM, || {
        let to = std::net::SocketAddr::from(([127, 0, 0, 1], port));
        let connect = || TcpStream::connect_timeout(&to, Duration::from_millis(300));
        (0..4).map_while(|_| connect().ok()).collect()
    })?;
    let mut session = few.session(INSIDER)?;
    session.send(&hello())?;
    session.send(&connect(1, &victim(port)?.to_string()))?;
    let finding = in_proportion(few, || Ok(drip(few, &mut session)));
    drop(filled);
    finding
}

/// Small frames, as many as the windows take: how many bytes, and what came back.
fn drip(arena: &Arena, session: &mut Session) -> (usize, String) {
    let frame = data(1, &[7; SMALL]);
    let mut sent = 0;
    while sent < arena.count(24_000, 12_000) && session.send(&frame).is_ok() {
        sent += 1;
        // Each is to arrive by itself.
        thread::sleep(Duration::from_micros(30));
        if sent % 256 == 0 && session.hear(Duration::ZERO, |_| true).over() {
            break;
        }
    }
    // It has all of them once it answers.
    session.lives(PATIENCE);
    let words = session.heard().words();
    (sent * SMALL, format!("in {sent} frames: {words}"))
}

/// A pod without any certificate does the same through its own, honest ztunnel.
fn small_writes(few: &Arena) -> Finding {
    let (listener, port) = unread_listener(few)?;
    let mut stream = few.dial("client-a", victim(port)?)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(Duration::from_secs(3)))?;
    let mut held = Vec::new();
    eventually("the connection reaches the application", || {
        held.extend(accept_all(&listener).unwrap_or_default());
        !held.is_empty()
    })?;
    in_proportion(few, || {
        let mut sent = 0;
        // It is stopped once the windows are full.
        while sent < few.count(24_000, 12_000) && stream.write_all(&[7; SMALL]).is_ok() {
            thread::sleep(Duration::from_micros(30));
            sent += 1;
        }
        Ok((sent * SMALL, format!("in {sent} writes")))
    })
}

/// Bound of the process in [`beyond_the_bound`]: the least there is.
const BOUND: u64 = 16 << 20;

/// As much as the windows of some tunnels take, for applications that do not read: more than the
/// process may keep for all of them.
fn beyond_the_bound(few: &Arena) -> Finding {
    const TUNNELS: usize = 5;
    const STREAMS: u32 = 4;
    const EACH: usize = 3 << 20;
    let (listener, port) = unread_listener(few)?;
    let to = victim(port)?.to_string();
    let (mut held, mut sessions) = (Vec::new(), Vec::new());
    for _ in 0..TUNNELS {
        let mut session = few.session(INSIDER)?;
        session.send(&hello())?;
        for stream in 0..STREAMS {
            session.send(&connect(1 + 2 * stream, &to))?;
        }
        sessions.push(session);
    }
    eventually("every stream reaches the application", || {
        held.extend(accept_all(&listener).unwrap_or_default());
        held.len() >= TUNNELS * STREAMS as usize
    })?;
    let before = few.sample().rss_bytes;
    let piece = vec![7; 16 << 10];
    for session in &mut sessions {
        for stream in 0..STREAMS {
            let frame = data(1 + 2 * stream, &piece);
            for _ in 0..EACH / piece.len() {
                session.send(&frame)?;
            }
            session.hear(Duration::ZERO, |_| true);
        }
        session.lives(PATIENCE);
    }
    let grown = few.sample().rss_bytes.saturating_sub(before);
    // Those who filled the rest are not those who are given up for it.
    let mut reset = 0;
    let told_so = eventually("a stream is given up", || {
        for session in &mut sessions {
            session.hear(Duration::ZERO, |_| true);
        }
        reset = sessions
            .iter()
            .map(|session| session.heard().resets.len())
            .sum();
        reset > 0
    });
    let told = format!(
        "{} MiB grown for {} MiB, where {} are kept at most; {reset} streams given up",
        grown >> 20,
        (TUNNELS * STREAMS as usize * EACH) >> 20,
        BOUND >> 20
    );
    if grown > 3 * BOUND {
        return got(format!("memory: {told}"));
    }
    told_so?;
    Ok(told)
}

/// SETTINGS with as many values as fit a small frame, on a tunnel with many streams. The twin sends
/// as many bytes in values without a meaning.
fn settings_of_256(arena: &Arena) -> Finding {
    let application = Application::on_victim(arena)?;
    let to = application.authority()?;
    let windows: Vec<_> = (0..256).map(|i| (4, 65_535 + (i & 1))).collect();
    let nothing: Vec<_> = (0..256).map(|i| (0xa5a5, 65_535 + (i & 1))).collect();
    let twin = work_of(arena, (&to, &application.listener), &settings(&nothing))?;
    let cost = work_of(arena, (&to, &application.listener), &settings(&windows))?;
    let told = format!("{cost} ms of CPU, without a meaning {twin} ms");
    // A clock tick is 10 ms; a walk for each value costs hundreds of them.
    if cost > (twin + 30) * 3 {
        return took(format!("work: {told}"));
    }
    Ok(told)
}

/// CPU of the ztunnels for tunnels on which `frame` is sent until they end, or often enough.
fn work_of(
    arena: &Arena,
    (to, listener): (&str, &TcpListener),
    frame: &[u8],
) -> Result<u64, Failure> {
    let mut cost = 0;
    for _ in 0..16 {
        let mut session = arena.session(INSIDER)?;
        session.send(&hello())?;
        for i in 0..100 {
            session.send(&connect(1 + 2 * i, to))?;
        }
        let mut held = Vec::new();
        eventually("a hundred streams reach the application", || {
            held.extend(accept_all(listener).unwrap_or_default());
            session.hear(Duration::ZERO, |_| true);
            held.len() >= 100 || session.heard().over()
        })?;
        let before = arena.sample().cpu_ms;
        let mut sent = 0;
        while sent < 120 && session.send(frame).is_ok() {
            sent += 1;
        }
        session.hear(PATIENCE, |heard| heard.over() || heard.acks > sent);
        cost += arena.sample().cpu_ms - before;
    }
    Ok(cost)
}

/// Requests for a port that nobody may have, thousands of them.
fn refusals_in_a_tunnel(arena: &Arena) -> Finding {
    let to = victim(9003)?.to_string();
    let count = arena.count(6_000, 2_000);
    let mut session = arena.session(INSIDER)?;
    session.send(&hello())?;
    let mut asked = 0;
    while asked < count && !session.heard().over() {
        let batch: Vec<u8> = (asked..asked + 50)
            .flat_map(|i| connect(1 + 2 * i as u32, &to))
            .collect();
        if session.send(&batch).is_err() {
            break;
        }
        asked += 50;
        session.hear(PATIENCE, |heard| {
            heard.over() || heard.statuses.len() + heard.resets.len() >= asked
        });
    }
    let heard = session.hear(Duration::ZERO, Heard::over);
    let words = heard.words();
    if heard.statuses.iter().any(|(_, status)| *status == 200) {
        return got("a port that nobody may have");
    }
    Ok(format!("{asked} refused: {words}"))
}

/// Connections that are refused, one after the other.
fn refusals(arena: &Arena, host: &str, to: std::net::SocketAddr, first: &[u8]) -> Finding {
    let count = arena.count(6_000, 2_000);
    let answered = arena.lab.on(host, || {
        let mut answered = 0;
        for _ in 0..count {
            let Ok(mut stream) = TcpStream::connect_timeout(&to, PATIENCE) else {
                continue;
            };
            let _ = stream.set_read_timeout(Some(PATIENCE));
            let _ = stream.write_all(first);
            let mut byte = [0];
            // An alert of TLS is one byte of 21.
            answered += usize::from(matches!(stream.read(&mut byte), Ok(1)) && byte[0] != 21);
        }
        answered
    })?;
    if answered > 0 {
        return got(format!("{answered} answers"));
    }
    Ok(format!("{count} refused"))
}
