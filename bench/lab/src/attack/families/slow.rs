//! Peers that say nothing, or little at a time.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::{Attack, INSIDER, got, small};
use crate::attack::arena::{ATTACKER, Arena, HBONE, victim};
use crate::attack::catalog::Finding;
use crate::attack::frames::PREFACE;

const FAMILY: &str = "slow";
/// A handshake has 10 s, a tunnel without an answer to PING 30 s; on a loaded machine more.
const HANDSHAKE_ENDS: Duration = Duration::from_secs(25);
const TUNNEL_ENDS: Duration = Duration::from_secs(70);

/// The beginning of a ClientHello of 512 bytes.
pub(super) const HALF_A_HELLO: [u8; 11] = [22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];

pub(super) fn attacks() -> Vec<Attack> {
    let must_not = "a place for longer than a handshake may take";
    let of = |name, run| small(name, FAMILY, must_not, run);
    let mut attacks = vec![
        of("silent", Box::new(|arena: &Arena| drips(arena, &[], None))),
        of(
            "half-a-hello",
            Box::new(|arena: &Arena| drips(arena, &HALF_A_HELLO, None)),
        ),
        of(
            "hello-a-byte-a-second",
            Box::new(|arena: &Arena| {
                let every = Some(Duration::from_secs(1));
                drips(arena, &HALF_A_HELLO[..6], every)
            }),
        ),
    ];
    for (name, bytes) in [
        ("silent-after-tls", &[][..]),
        ("half-a-preface", &PREFACE[..10]),
    ] {
        attacks.push(Attack {
            long: true,
            ..small(
                name,
                FAMILY,
                "a tunnel for ever without a preface",
                Box::new(move |arena: &Arena| silent_inside(arena, bytes)),
            )
        });
    }
    attacks
}

/// Sends `first`, then a zero each `every`; the connection must end.
fn drips(arena: &Arena, first: &[u8], every: Option<Duration>) -> Finding {
    let mut stream = arena.dial(ATTACKER, victim(HBONE)?)?;
    let begun = Instant::now();
    stream.write_all(first)?;
    stream.set_read_timeout(Some(every.unwrap_or(Duration::from_millis(500))))?;
    while begun.elapsed() < HANDSHAKE_ENDS {
        if ended(&mut stream) || every.is_some() && stream.write_all(&[0]).is_err() {
            return Ok(format!(
                "closed after {:.0} s",
                begun.elapsed().as_secs_f64()
            ));
        }
    }
    got(format!("{} s in the handshake", HANDSHAKE_ENDS.as_secs()))
}

fn ended(stream: &mut TcpStream) -> bool {
    match stream.read(&mut [0; 64]) {
        Ok(n) => n == 0,
        Err(error) => !matches!(
            error.kind(),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
        ),
    }
}

/// Shakes hands, then says nothing that counts.
fn silent_inside(arena: &Arena, bytes: &[u8]) -> Finding {
    let mut session = arena.session(INSIDER)?;
    if !bytes.is_empty() {
        session.send(bytes)?;
    }
    let begun = Instant::now();
    if session
        .hear(TUNNEL_ENDS, |heard| heard.ended.is_some())
        .ended
        .is_none()
    {
        return got(format!("a tunnel for {} s", TUNNEL_ENDS.as_secs()));
    }
    Ok(format!(
        "closed after {:.0} s",
        begun.elapsed().as_secs_f64()
    ))
}
