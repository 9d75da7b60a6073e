//! Bytes below TLS and records that must not be there.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use super::{Application, Attack, INSIDER, got, small};
use crate::attack::arena::{ATTACKER, Arena, HBONE, PATIENCE, accept_all, eventually, victim};
use crate::attack::catalog::Finding;
use crate::attack::frames::{connect, data, hello};
use crate::attack::session::Heard;

const FAMILY: &str = "records";

pub(super) fn attacks() -> Vec<Attack> {
    let mut attacks = Vec::new();
    for (name, bytes) in before_tls() {
        let run = move |arena: &Arena| unheard(arena, &bytes);
        attacks.push(small(
            name,
            FAMILY,
            "an answer in plain, or a process",
            Box::new(run),
        ));
    }
    for (name, bytes) in inside_tls() {
        let run = move |arena: &Arena| tampered(arena, &bytes);
        attacks.push(small(name, FAMILY, "a tunnel that goes on", Box::new(run)));
    }
    attacks.push(small(
        "key-update-flood",
        FAMILY,
        "keys made without end",
        Box::new(key_updates),
    ));
    attacks.push(small(
        "cut-off-in-mid-stream",
        FAMILY,
        "an end that looks like the application's own",
        Box::new(cut_off),
    ));
    attacks
}

/// Sent in place of a ClientHello.
fn before_tls() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("plain-http-on-15008", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("plain-http2-on-15008", hello()),
        ("ssh-on-15008", b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
        (
            "sslv2-hello",
            vec![0x80, 0x2e, 1, 0, 2, 0, 0x15, 0, 0, 0, 0x10, 7, 0, 0xc0],
        ),
        ("record-of-64-kib", vec![22, 3, 3, 0xff, 0xff, 1, 2, 3]),
        (
            "hello-of-16-mib",
            vec![22, 3, 1, 0, 5, 1, 0xff, 0xff, 0xff, 0],
        ),
        ("record-of-nothing", [22, 3, 3, 0, 0].repeat(2000)),
        ("early-data", [&[23, 3, 3, 1, 0][..], &[0; 256]].concat()),
        ("alert-first", vec![21, 3, 3, 0, 2, 1, 0]),
        (
            "change-cipher-spec-flood",
            [20, 3, 3, 0, 1, 1].repeat(10_000),
        ),
        (
            "random-bytes",
            (0..4096_u32)
                .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
                .collect(),
        ),
    ]
}

/// Sends bytes without a handshake: the end of the connection is the only answer, but for an alert.
fn unheard(arena: &Arena, bytes: &[u8]) -> Finding {
    let mut stream = arena.dial(ATTACKER, victim(HBONE)?)?;
    // It may hang up meanwhile.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) if answer.len() < 1 << 20 => answer.extend_from_slice(&buffer[..n]),
            Ok(_) => return got("more than 1 MiB of answer"),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => return got(format!("no end of the connection: {error}")),
        }
    }
    if !(answer.is_empty() || answer[0] == 21) {
        return got(format!("{} bytes that are no alert", answer.len()));
    }
    Ok(if answer.is_empty() { "closed" } else { "alert" }.to_owned())
}

/// Sent below TLS once the tunnel is up.
fn inside_tls() -> Vec<(&'static str, Vec<u8>)> {
    let sealed = |kind: u8, length: usize| {
        let size = (length as u16).to_be_bytes();
        [&[kind, 3, 3, size[0], size[1]][..], &vec![0x5a; length]].concat()
    };
    vec![
        ("record-altered", sealed(23, 200)),
        ("record-too-short", sealed(23, 3)),
        ("record-too-long", vec![23, 3, 3, 0xff, 0xff]),
        ("record-in-plain", b"GET / HTTP/1.1\r\n".repeat(2_000)),
        ("renegotiation", vec![22, 3, 3, 0, 4, 0, 0, 0, 0]),
        ("handshake-in-plain", sealed(22, 64)),
        ("alert-in-plain", vec![21, 3, 3, 0, 2, 2, 40]),
    ]
}

fn tampered(arena: &Arena, bytes: &[u8]) -> Finding {
    let application = Application::on_victim(arena)?;
    let mut session = arena.session(INSIDER)?;
    session.send(&hello())?;
    session.send(&connect(1, &application.authority()?))?;
    session.hear(PATIENCE, |heard| !heard.statuses.is_empty() || heard.over());
    // It may hang up meanwhile.
    let _ = session.send_raw(bytes);
    let heard = session.hear(PATIENCE, |heard| heard.ended.is_some());
    let words = heard.words();
    if heard.ended.is_none() {
        return got(format!("a tunnel that goes on: {words}"));
    }
    application.reached(1)?;
    Ok(words)
}

fn key_updates(arena: &Arena) -> Finding {
    let mut session = arena.session(INSIDER)?;
    session.send(&hello())?;
    let mut sent = 0;
    while sent < 20_000 && session.update_keys().is_ok() {
        sent += 1;
        if sent % 100 == 0 && session.hear(Duration::ZERO, |_| true).over() {
            break;
        }
    }
    let heard = session.hear(PATIENCE, Heard::over);
    let words = heard.words();
    if !heard.over() {
        return got(format!("{sent} key updates in a row"));
    }
    Ok(format!("over within {sent}: {words}"))
}

/// The attacker cuts the tunnel's TCP connection without TLS's close: the application behind it
/// must see a reset, as its peer's message may be incomplete.
fn cut_off(arena: &Arena) -> Finding {
    let application = Application::on_victim(arena)?;
    let mut session = arena.session(INSIDER)?;
    session.send(&hello())?;
    session.send(&connect(1, &application.authority()?))?;
    session.send(&data(1, b"half a mess"))?;
    let mut accepted = Vec::new();
    eventually("the honest request reaches the application", || {
        accepted.extend(accept_all(&application.listener).unwrap_or_default());
        !accepted.is_empty()
    })?;
    session.cut()?;
    let mut stream = accepted.swap_remove(0);
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut received = Vec::new();
    match stream.read_to_end(&mut received) {
        Ok(_) => got("a clean end of half a message"),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
            Ok("the application sees a reset".to_owned())
        }
        Err(error) => got(format!("a connection that stays: {error}")),
    }
}
