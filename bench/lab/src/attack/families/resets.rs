//! Streams that are opened and given up at once, by peers on either side of a tunnel, and ends that
//! nobody tells of.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use super::{Application, Attack, Expect, Failure, INSIDER, got, judge, small};
use crate::attack::arena::{
    ATTACKER, Arena, HBONE, PATIENCE, VICTIM, accept_all, address, eventually, victim,
};
use crate::attack::catalog::{Bounds, Finding};
use crate::attack::frames::{
    CANCEL, GOAWAY, SETTINGS, connect, data, frame, hello, ping, reset, settings, window_update,
};
use crate::attack::session::{Heard, Session};
use crate::attack::who::Who;

const FAMILY: &str = "resets";

pub(super) fn attacks() -> Vec<Attack> {
    let mut attacks = Vec::new();
    type Unit = fn(u32, &str) -> Vec<u8>;
    let rapid: [(&str, Unit); 3] = [
        ("rapid-reset", |id, to| {
            [connect(id, to), reset(id, CANCEL)].concat()
        }),
        // The server is made to reset.
        ("made-you-reset-by-window", |id, to| {
            [connect(id, to), window_update(id, 0)].concat()
        }),
        ("made-you-reset-by-data", |id, to| {
            let end = frame(0, 1, id, &[]);
            [connect(id, to), end, data(id, b"x")].concat()
        }),
    ];
    for (name, unit) in rapid {
        let must_not = "streams without end, dials for streams that are gone, or descriptors";
        let run = move |arena: &Arena| rapid_reset(arena, unit);
        attacks.push(heavy(name, must_not, Box::new(run)));
    }
    for (name, behaviour) in SERVERS {
        let must_not = "anything of the client's node but that connection";
        let run = move |arena: &Arena| hostile_server(arena, behaviour);
        attacks.push(Attack {
            alone: true,
            ..small(name, FAMILY, must_not, Box::new(run))
        });
    }
    attacks.push(heavy(
        "application-that-does-not-read",
        "connections to the application that outlive stream and tunnel",
        Box::new(unread_application),
    ));
    let complete = heavy(
        "complete-requests-that-nobody-reads",
        "more connections to the application than it may have streams",
        Box::new(complete_and_reset),
    );
    attacks.push(Attack {
        bounds: Bounds {
            // 75 MiB are on their way, worth keeping, and the pool has them in blocks.
            memory: 256 << 20,
            ..complete.bounds
        },
        ..complete
    });
    attacks.push(heavy(
        "application-that-vanishes",
        "connections, of those who do not read, that outlive it",
        Box::new(vanishing_application),
    ));
    attacks
}

fn heavy(name: &str, must_not: &str, run: super::Run) -> Attack {
    Attack {
        alone: true,
        bounds: Bounds {
            descriptors: 2048,
            memory: 128 << 20,
            log: 1 << 20,
            ..Bounds::SMALL
        },
        ..small(name, FAMILY, must_not, run)
    }
}

/// Opens and ends streams, one of each in a record, until the tunnel ends.
fn rapid_reset(arena: &Arena, unit: fn(u32, &str) -> Vec<u8>) -> Finding {
    let application = Application::on_victim(arena)?;
    let to = application.authority()?;
    let listener = application.listener.try_clone()?;
    listener.set_nonblocking(true)?;
    // The application takes what comes and keeps it for a moment, as any does.
    let (stop, dialled) = (AtomicBool::new(false), AtomicUsize::new(0));
    let streams = arena.count(60_000, 12_000);
    let (sent, words, over) = thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let accepted = accept_all(&listener).unwrap_or_default();
                dialled.fetch_add(accepted.len(), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(2));
            }
        });
        let result = reset_all(arena, streams, &to, unit);
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    let dialled = dialled.into_inner();
    if !over {
        return got(format!(
            "{sent} streams on one tunnel, which goes on; {dialled} dialled"
        ));
    }
    // Stream and end come in one record: when it is the request's turn its stream is gone.
    if dialled > 16 {
        return got(format!("{dialled} connections to the application"));
    }
    Ok(format!(
        "over within {sent} streams, {dialled} dialled: {words}"
    ))
}

fn reset_all(
    arena: &Arena,
    streams: usize,
    to: &str,
    unit: fn(u32, &str) -> Vec<u8>,
) -> Result<(usize, String, bool), Failure> {
    let mut session = arena.session(INSIDER)?;
    session.send(&hello())?;
    let mut sent = 0;
    while sent < streams && session.send(&unit(1 + 2 * sent as u32, to)).is_ok() {
        sent += 1;
        if sent % 64 == 0 && session.hear(Duration::ZERO, |_| true).over() {
            break;
        }
    }
    let heard = session.hear(Duration::from_secs(3), Heard::over);
    Ok((sent, heard.words(), heard.over()))
}

/// What a server with a good certificate does to an honest client's tunnel.
#[derive(Clone, Copy, Debug)]
enum Behaviour {
    /// Resets each stream.
    Resets,
    /// Says GOAWAY to each tunnel at once.
    GoesAway,
    /// Answers and resets.
    AnswersAndResets,
    /// PING without end.
    Pings,
    /// SETTINGS without end.
    Settings,
    /// Bytes that are no frames.
    Garbage,
    /// Answers a stream that was never opened.
    AnswersNobody,
    /// Payload before the answer.
    SpeaksFirst,
    /// A frame longer than any may be.
    TooLong,
    /// Says nothing in HTTP/2 at all, then hangs up.
    HangsUp,
}

const SERVERS: [(&str, Behaviour); 10] = [
    ("server-that-resets", Behaviour::Resets),
    ("server-that-goes-away", Behaviour::GoesAway),
    (
        "server-that-answers-and-resets",
        Behaviour::AnswersAndResets,
    ),
    ("server-that-floods-with-pings", Behaviour::Pings),
    ("server-that-floods-with-settings", Behaviour::Settings),
    ("server-that-sends-garbage", Behaviour::Garbage),
    ("server-that-answers-nobody", Behaviour::AnswersNobody),
    ("server-that-speaks-first", Behaviour::SpeaksFirst),
    ("server-that-sends-frames-too-long", Behaviour::TooLong),
    ("server-that-hangs-up", Behaviour::HangsUp),
];

/// Clients of a server that does this: each connection must end, and no more than that.
fn hostile_server(arena: &Arena, behaviour: Behaviour) -> Finding {
    const CLIENTS: usize = 12;
    let config = arena.tls_server(Who::Workload("waypoint-b"))?;
    let listener = arena.listen("waypoint-b", HBONE)?;
    listener.set_nonblocking(true)?;
    let (stop, tunnels) = (AtomicBool::new(false), AtomicUsize::new(0));
    let ended = thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for tcp in accept_all(&listener).unwrap_or_default() {
                    tunnels.fetch_add(1, Ordering::Relaxed);
                    let (config, stop) = (Arc::clone(&config), &stop);
                    scope.spawn(move || misbehave(tcp, &config, behaviour, stop));
                }
                thread::sleep(Duration::from_millis(2));
            }
        });
        let ended = clients(arena, CLIENTS);
        stop.store(true, Ordering::Relaxed);
        ended
    })?;
    let tunnels = tunnels.into_inner();
    if ended < CLIENTS {
        return got(format!("{} clients that wait for ever", CLIENTS - ended));
    }
    // A client that tries again and again would be a flood of its own.
    if tunnels > 3 * CLIENTS {
        return got(format!("{tunnels} tunnels for {CLIENTS} connections"));
    }
    Ok(format!("{CLIENTS} connections ended, {tunnels} tunnels"))
}

/// One connection after the other; how many ended by themselves.
fn clients(arena: &Arena, count: usize) -> Result<usize, Failure> {
    use std::io::{Read as _, Write as _};
    let mut ended = 0;
    for _ in 0..count {
        // What is reset at once may be so while it is being made.
        let Ok(mut client) = arena.dial("client-a", address("waypoint-b", 8080)?) else {
            ended += 1;
            continue;
        };
        let _ = client.write_all(b"hello");
        client.set_read_timeout(Some(PATIENCE))?;
        let mut buffer = vec![0; 64 << 10];
        let begun = Instant::now();
        ended += usize::from(loop {
            match client.read(&mut buffer) {
                Ok(0) => break true,
                // Payload of a server who does answer.
                Ok(_) if begun.elapsed() < PATIENCE => {}
                Ok(_) => break false,
                Err(error) => break error.kind() != std::io::ErrorKind::WouldBlock,
            }
        });
    }
    Ok(ended)
}

fn misbehave(
    tcp: TcpStream,
    config: &Arc<rustls::ServerConfig>,
    behaviour: Behaviour,
    stop: &AtomicBool,
) {
    // Whatever fails here ends the tunnel, which is what it is about.
    let _ = tcp.set_nonblocking(false);
    let Ok(mut session) = Session::accept(tcp, config) else {
        return;
    };
    let answer = |stream| frame(1, 4, stream, &[0x88]);
    if !matches!(behaviour, Behaviour::Garbage | Behaviour::HangsUp) {
        let _ = session.send(&[settings(&[]), frame(SETTINGS, 1, 0, &[])].concat());
    }
    let mut seen = 0;
    while !stop.load(Ordering::Relaxed) && !session.heard().over() {
        session.hear(Duration::from_millis(20), |heard| heard.opened.len() > seen);
        let opened: Vec<u32> = session.heard().opened[seen..].to_vec();
        seen += opened.len();
        for stream in opened {
            let bytes = match behaviour {
                Behaviour::Resets => reset(stream, 7),
                Behaviour::GoesAway => frame(GOAWAY, 0, 0, &[0; 8]),
                Behaviour::AnswersAndResets => [answer(stream), reset(stream, 2)].concat(),
                Behaviour::Pings => ping().repeat(50_000),
                Behaviour::Settings => settings(&[]).repeat(50_000),
                Behaviour::Garbage => vec![0xa5; 64 << 10],
                Behaviour::AnswersNobody => answer(stream + 100),
                Behaviour::SpeaksFirst => data(stream, b"x"),
                Behaviour::TooLong => vec![0xff, 0, 0, 0, 0, 0, 0, 0, 1],
                Behaviour::HangsUp => return,
            };
            let _ = session.send(&bytes);
            if matches!(behaviour, Behaviour::GoesAway) {
                return;
            }
        }
    }
}

/// An application that takes connections and reads nothing; its streams are filled, half of them
/// reset, then the tunnel closed.
fn unread_application(arena: &Arena) -> Finding {
    let streams = arena.count(150, 40);
    let (listener, port) = unread_listener(arena)?;
    let to = victim(port)?.to_string();
    let mut session = arena.session(INSIDER)?;
    session.send(&hello())?;
    for i in 0..streams {
        session.send(&connect(1 + 2 * i as u32, &to))?;
    }
    let mut held = Vec::new();
    eventually("every stream reaches the application", || {
        held.extend(accept_all(&listener).unwrap_or_default());
        session.hear(Duration::ZERO, |_| true);
        held.len() >= streams
    })?;
    // 16 MiB of window for all: each gets what is sure to be more than sockets take.
    let share = (15 << 20) / streams;
    for i in 0..streams {
        let piece = vec![7; 16 << 10];
        for _ in 0..share / piece.len() {
            session.send(&data(1 + 2 * i as u32, &piece))?;
        }
    }
    for i in 0..streams / 2 {
        session.send(&reset(1 + 2 * i as u32, CANCEL))?;
    }
    session.hear(Duration::from_millis(200), Heard::over);
    drop(session);
    let begun = Instant::now();
    // Lingering is fine, for ever is not.
    while begun.elapsed() < Duration::from_secs(60) {
        held.retain(|stream| matches!(stream.take_error(), Ok(None)));
        if held.is_empty() {
            let seconds = begun.elapsed().as_secs_f64();
            return Ok(format!("{streams} connections reset within {seconds:.0} s"));
        }
        thread::sleep(Duration::from_millis(100));
    }
    got(format!(
        "{} of {streams} connections 60 s later",
        held.len()
    ))
}

/// Requests that are complete, reset at once, for an application that reads nothing of them: what
/// is left is worth delivering, so each keeps its connection for long. A stream that is gone counts
/// all the same, until then.
fn complete_and_reset(arena: &Arena) -> Finding {
    // Streams that a peer may have open, and some more.
    const STREAMS_MAX: usize = 200;
    const STREAMS: u32 = 240;
    // Sure to be more than sockets take.
    let pieces = (384 << 10) / (16 << 10);
    let (listener, port) = unread_listener(arena)?;
    let to = victim(port)?.to_string();
    let mut session = arena.session(INSIDER)?;
    session.send(&hello())?;
    let mut held = Vec::new();
    let piece = vec![7; 16 << 10];
    for stream in (0..STREAMS).map(|i| 1 + 2 * i) {
        session.send(&connect(stream, &to))?;
        for _ in 1..pieces {
            session.send(&data(stream, &piece))?;
        }
        session.send(&frame(0, 1, stream, &piece))?;
        // What has not reached the application yet is not worth much.
        let open = held.len();
        let full = open >= STREAMS_MAX;
        let patience = if full {
            Duration::from_millis(20)
        } else {
            PATIENCE
        };
        let deadline = Instant::now() + patience;
        while held.len() == open && Instant::now() < deadline && !session.heard().over() {
            held.extend(accept_all(&listener)?);
            session.hear(Duration::ZERO, |_| true);
            thread::sleep(Duration::from_millis(1));
        }
        session.send(&reset(stream, CANCEL))?;
    }
    if !session.lives(PATIENCE) {
        let words = session.heard().words();
        return Err(Failure::Driver(format!("the tunnel is over: {words}")));
    }
    // Whatever is on its way arrives.
    thread::sleep(Duration::from_millis(300));
    held.extend(accept_all(&listener)?);
    held.retain(|stream| matches!(stream.take_error(), Ok(None)));
    let told = format!("{} connections for {STREAMS} requests", held.len());
    if held.len() > STREAMS_MAX {
        return got(told);
    }
    if held.len() < STREAMS_MAX / 2 {
        return Err(Failure::Driver(format!("they were not kept: {told}")));
    }
    Ok(told)
}

/// An application that writes until nobody takes any more, and then is no more. Its clients, in a
/// tunnel, in plain and captured, read nothing, so that every relay waits for them: they are to
/// hear of it all the same.
fn vanishing_application(arena: &Arena) -> Finding {
    const EACH: usize = 4;
    let (listener, port) = unread_listener(arena)?;
    let mut session = arena.session(INSIDER)?;
    session.send(&hello())?;
    let mut clients = Vec::new();
    for i in 0..EACH as u32 {
        session.send(&connect(1 + 2 * i, &victim(port)?.to_string()))?;
        clients.push(arena.dial(ATTACKER, victim(port)?)?);
        clients.push(arena.dial("client-a", victim(port)?)?);
    }
    let mut servers = Vec::new();
    eventually("every client reaches the application", || {
        servers.extend(accept_all(&listener).unwrap_or_default());
        session.hear(Duration::ZERO, |_| true);
        servers.len() >= 3 * EACH
    })?;
    let piece = vec![7; 64 << 10];
    let mut last = Instant::now();
    for server in &servers {
        server.set_nonblocking(true)?;
    }
    while last.elapsed() < Duration::from_millis(500) {
        let took = |server: &TcpStream| std::io::Write::write(&mut &*server, &piece).is_ok();
        if servers.iter().filter(|server| took(server)).count() > 0 {
            last = Instant::now();
        }
    }
    for server in servers.drain(..) {
        socket2::SockRef::from(&server).set_linger(Some(Duration::ZERO))?;
    }
    let begun = Instant::now();
    let mut left = usize::MAX;
    while left > 0 && begun.elapsed() < Duration::from_secs(60) {
        clients.retain(|client| matches!(client.take_error(), Ok(None)));
        let resets = session
            .hear(Duration::from_millis(50), Heard::over)
            .resets
            .len();
        left = clients.len() + EACH.saturating_sub(resets);
    }
    if left > 0 {
        let in_plain = clients.len();
        return got(format!(
            "{left} of {} connections 60 s later, {in_plain} of them outside the tunnel",
            3 * EACH
        ));
    }
    Ok(format!("{} connections reset", 3 * EACH))
}

/// A listener on the victim whose connections take little that is not read.
pub(super) fn unread_listener(arena: &Arena) -> Result<(std::net::TcpListener, u16), Failure> {
    let listener = arena.lab.on(VICTIM, || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_recv_buffer_size(4096)?;
        socket.bind(&std::net::SocketAddr::from(([0, 0, 0, 0], 0)).into())?;
        socket.listen(1024)?;
        Ok::<std::net::TcpListener, std::io::Error>(socket.into())
    })??;
    let port = listener.local_addr()?.port();
    Ok((listener, port))
}

/// Whether a tunnel of a fresh peer is taken: the honest can still get in.
pub(super) fn gets_in(arena: &Arena, host: &str, who: Who) -> Finding {
    let mut session = arena.session_from(host, who)?;
    session.send(&hello())?;
    judge(&mut session, Expect::Ignore)
}
