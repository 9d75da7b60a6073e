//! Peers of the HBONE port that connect and say nothing, or too little, so that others do not get
//! in. ztunnels with a single worker and few places make a hundred of them a crowd.
//!
//! What must come first tells more than how long anything takes: the honest get in while those who
//! say nothing are still there, or before one that is in nobody's way is given up.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rustls::ClientConnection;
use rustls::pki_types::ServerName;

use super::own_lab::with_small_ztunnels;
use super::resets::gets_in;
use super::slow::HALF_A_HELLO;
use super::{Attack, Expect, Failure, INSIDER, got, judge, small};
use crate::attack::arena::{ATTACKER, Arena, HBONE, PATIENCE, address, eventually, victim};
use crate::attack::catalog::{Finding, took};
use crate::attack::frames::hello;
use crate::attack::session::Session;
use crate::attack::who::Who;

const FAMILY: &str = "silence";

/// Handshakes at a time; as many may wait for a place, and four times as many be silent.
const PLACES: usize = 64;
/// Of those that one address has while others want some.
const HALF_OF_THE_PLACES: usize = PLACES / 2;
/// Peers that may be silent.
const ROOM: usize = 4 * PLACES;
/// Fewer than make room scarce, more than would have a place each.
const CROWD: usize = 110;

/// Who comes honestly, from an address of its own.
const HONEST: &str = "waypoint-b";
const HONEST_WHO: Who = Who::Workload("waypoint-b");
/// Addresses that reach the victim, as many as have a share each.
const ATTACKERS: [&str; 4] = [ATTACKER, "node-a", "ztunnel-a", "outside"];

pub(super) fn attacks() -> Vec<Attack> {
    let must_not = "a place for handshakes, or the time of those who mean it";
    let small = |name, attack: fn(&Arena) -> Finding| Attack {
        alone: true,
        ..small(
            name,
            FAMILY,
            must_not,
            Box::new(move |arena: &Arena| {
                let few =
                    format!("export ZTUNNEL_WORKER_THREADS=1 ZTUNNEL_HANDSHAKES_MAX={PLACES}");
                with_small_ztunnels(arena, "few", &few, attack)
            }),
        )
    };
    vec![
        small("silent-crowd", |few| crowd_costs_nothing(few, &[], None)),
        small("half-hello-crowd", |few| {
            crowd_costs_nothing(few, &HALF_A_HELLO, None)
        }),
        small("byte-by-byte-crowd", |few| {
            crowd_costs_nothing(few, &HALF_A_HELLO[..1], Some(&HALF_A_HELLO[1..]))
        }),
        small("silent-crowd-of-many-addresses", full_room),
        small("silent-crowd-beside-slow-peers", slow_peers),
        small("half-handshake-crowd", half_handshakes),
        small(
            "half-handshake-crowd-of-many-addresses",
            many_half_handshakes,
        ),
    ]
}

/// One peer of a crowd.
struct Peer {
    stream: TcpStream,
    /// It was answered.
    answered: bool,
    ended: bool,
}

impl Peer {
    fn look(&mut self) {
        let mut buffer = [0; 4096];
        while !self.ended {
            match self.stream.read(&mut buffer) {
                Ok(1..) => self.answered = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(0) | Err(_) => self.ended = true,
            }
        }
    }
}

/// Connections that have said what they say at first.
struct Crowd {
    peers: Vec<Peer>,
    /// Those that were not even taken.
    refused: usize,
}

impl Crowd {
    /// `count` from `host`; those that are refused at once have ended.
    fn come(arena: &Arena, host: &str, count: usize, first: &[u8]) -> Result<Self, Failure> {
        let target = victim(HBONE)?;
        let peers = arena.lab.on(host, || {
            let connect = || {
                let mut stream = TcpStream::connect_timeout(&target, PATIENCE).ok()?;
                let ended = stream.write_all(first).is_err();
                stream.set_nonblocking(true).ok()?;
                Some(Peer {
                    stream,
                    answered: false,
                    ended,
                })
            };
            (0..count).filter_map(|_| connect()).collect::<Vec<_>>()
        })?;
        if peers.is_empty() && count > 0 {
            return Err(Failure::Driver(format!("{host} does not reach {target}")));
        }
        let refused = count - peers.len();
        Ok(Self { peers, refused })
    }

    fn look(&mut self) {
        self.peers.iter_mut().for_each(Peer::look);
    }

    fn ended(&mut self) -> usize {
        self.look();
        self.refused + self.peers.iter().filter(|peer| peer.ended).count()
    }

    /// How many hold a place at one moment: all were answered before it, and none had ended after
    /// it.
    fn hold_places(&mut self) -> usize {
        self.look();
        let answered: Vec<_> = self.peers.iter().map(|peer| peer.answered).collect();
        self.look();
        let peers = self.peers.iter().zip(answered);
        peers
            .filter(|(peer, answered)| *answered && !peer.ended)
            .count()
    }

    fn say(&mut self, byte: u8) {
        for peer in &mut self.peers {
            // Who is hung up on says no more.
            let _ = peer.stream.write_all(&[byte]);
        }
    }
}

/// The first message of an honest client.
fn whole_hello(arena: &Arena) -> Result<Vec<u8>, Failure> {
    let name = ServerName::IpAddress(victim(HBONE)?.ip().into());
    let mut client = ClientConnection::new(arena.tls(INSIDER)?, name).map_err(io::Error::other)?;
    let mut hello = Vec::new();
    client.write_tls(&mut hello)?;
    Ok(hello)
}

/// More than there are places, from one address, and room for all: who means it gets in at once,
/// also from that address, and none of the crowd has to go for it. `more` is said by and by.
fn crowd_costs_nothing(arena: &Arena, first: &[u8], more: Option<&[u8]>) -> Finding {
    let mut crowd = Crowd::come(arena, ATTACKER, CROWD, first)?;
    let mut more = more.unwrap_or_default().iter();
    let tries = 5;
    for tried in 0..tries {
        if let Some(byte) = more.next() {
            crowd.say(*byte);
        }
        for (host, who) in [(ATTACKER, INSIDER), (HONEST, HONEST_WHO)] {
            if let Err(failure) = gets_in(arena, host, who) {
                return took(format!("a handshake from {host}: {failure:?}"));
            }
            let gone = crowd.ended();
            if gone > 0 {
                return took(format!(
                    "places: {gone} of {CROWD} silent ones had to go before {host} got in for the \
                     {}. time",
                    tried + 1
                ));
            }
        }
    }
    Ok(format!("{} handshakes beside {CROWD} that wait", 2 * tries))
}

/// All the room there is taken by silent ones of many addresses, who come again as often as they
/// are hung up on: an honest one that has just come is not who has to go.
fn full_room(arena: &Arena) -> Finding {
    const EACH: usize = ROOM / ATTACKERS.len() + 8;
    const AGAIN: Duration = Duration::from_millis(300);
    let tries = 20;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let keep_full = |host| {
        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
            let mut crowd = Crowd::come(arena, host, EACH, &[])?;
            let until = Instant::now() + Duration::from_millis(1500);
            while Instant::now() < until && !stop.load(std::sync::atomic::Ordering::Relaxed) {
                thread::sleep(AGAIN);
                crowd.look();
                crowd.peers.retain(|peer| !peer.ended);
                let missing = EACH.saturating_sub(crowd.peers.len());
                crowd
                    .peers
                    .extend(Crowd::come(arena, host, missing, &[])?.peers);
            }
        }
        Ok::<(), Failure>(())
    };
    let refused = thread::scope(|scope| {
        let crowds: Vec<_> = ATTACKERS
            .map(|host| scope.spawn(move || keep_full(host)))
            .into();
        thread::sleep(AGAIN);
        let mut refused = Vec::new();
        for _ in 0..tries {
            if let Err(failure) = gets_in(arena, HONEST, HONEST_WHO) {
                refused.push(format!("{failure:?}"));
            }
            thread::sleep(Duration::from_millis(50));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        for crowd in crowds {
            crowd.join().unwrap_or(Ok(()))?;
        }
        Ok::<_, Failure>(refused)
    })?;
    let told = format!(
        "{} of {tries} honest handshakes beside all the silent ones that fit",
        tries - refused.len()
    );
    match refused.last() {
        // A machine that is late may have one of them be the oldest.
        Some(last) if refused.len() > tries / 10 => took(format!("room: {told}: {last}")),
        _ => Ok(told),
    }
}

/// Peers that are slow, and then a crowd from another address that would fill all the room.
fn slow_peers(arena: &Arena) -> Finding {
    const SLOW: usize = 20;
    let config = arena.tls(HONEST_WHO)?;
    let slow: Vec<_> = (0..SLOW)
        .map(|_| arena.dial(HONEST, victim(HBONE)?))
        .collect::<io::Result<_>>()?;
    let mut crowd = Crowd::come(arena, ATTACKER, ROOM, &[])?;
    let mut late = 0;
    for tcp in slow {
        let session = Session::open(tcp, &config).map_err(Failure::from);
        let tunnel = session.and_then(|mut session| {
            session.send(&hello())?;
            judge(&mut session, Expect::Ignore)
        });
        late += usize::from(tunnel.is_err());
    }
    let gone = crowd.ended();
    if late > 0 {
        return took(format!(
            "room: {late} of {SLOW} slow peers were hung up on, {gone} of {ROOM} silent ones"
        ));
    }
    Ok(format!(
        "{SLOW} slow handshakes, {gone} of {ROOM} silent ones had to go"
    ))
}

/// One address that shakes hands by half: it has its share of the places.
fn half_handshakes(arena: &Arena) -> Finding {
    let mut crowd = Crowd::come(arena, ATTACKER, CROWD, &whole_hello(arena)?)?;
    let mut most = 0;
    // Until those who hold places are hung up on for their silence.
    eventually("a place is given back", || {
        most = most.max(crowd.hold_places());
        crowd.peers.iter().any(|peer| peer.answered && peer.ended)
    })?;
    let told = format!("{most} of {PLACES} places at a time");
    if most > HALF_OF_THE_PLACES {
        return got(told);
    }
    if most == 0 {
        return Err(Failure::Driver("nobody was answered".to_owned()));
    }
    match gets_in(arena, HONEST, HONEST_WHO) {
        Ok(_) => Ok(told),
        Err(failure) => took(format!("an honest handshake: {failure:?}")),
    }
}

/// All places held, from many addresses, by half a handshake each, and others wait: whoever is
/// silent meanwhile goes soon. One that does the same where nobody waits has all the time that a
/// handshake has, and is given up after an honest one has got in beside the crowd.
fn many_half_handshakes(arena: &Arena) -> Finding {
    let whole = whole_hello(arena)?;
    let calm: SocketAddr = address("server-a", HBONE)?;
    let mut stream = arena.dial(ATTACKER, calm)?;
    stream.write_all(&whole)?;
    stream.set_nonblocking(true)?;
    let mut twin = Peer {
        stream,
        answered: false,
        ended: false,
    };
    let mut crowds = Vec::new();
    for host in ATTACKERS {
        crowds.push(Crowd::come(arena, host, PLACES / 2, &whole)?);
    }
    eventually("all places are held", || {
        let held: usize = crowds.iter_mut().map(Crowd::hold_places).sum();
        let given_back = crowds.iter_mut().map(Crowd::ended).sum::<usize>();
        held >= PLACES * 3 / 4 || given_back > 0
    })?;
    let tunnel = gets_in(arena, HONEST, HONEST_WHO);
    twin.look();
    if !twin.answered {
        return Err(Failure::Driver("the twin was not answered".to_owned()));
    }
    match tunnel {
        Ok(_) if !twin.ended => Ok("the honest got in long before it was time".to_owned()),
        Ok(_) => took("all the time of a handshake".to_owned()),
        Err(failure) => took(format!("an honest handshake: {failure:?}")),
    }
}
