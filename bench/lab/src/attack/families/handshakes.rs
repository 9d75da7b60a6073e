//! Peers without a certificate of the mesh, or with one that says the wrong thing: as clients of
//! the HBONE port, and as impostors in a server's place.

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustls::{ServerConnection, StreamOwned};

use super::{Application, Attack, INSIDER, got, small};
use crate::attack::arena::{ATTACKER, Arena, HBONE, PATIENCE, address, victim};
use crate::attack::catalog::Finding;
use crate::attack::frames::{connect, hello};
use crate::attack::session::Session;
use crate::attack::who::{Manner, Who};

const FAMILY: &str = "handshake";

const STRANGERS: [(&str, Who); 13] = [
    ("no-certificate", Who::Nobody),
    ("certificate-of-another-ca", Who::OtherCa),
    ("certificate-self-signed", Who::SelfSigned),
    ("certificate-expired", Who::Expired),
    ("certificate-not-yet-valid", Who::NotYet),
    ("certificate-without-name", Who::Nameless),
    (
        "certificate-of-another-domain",
        Who::Uri("spiffe://evil.example/ns/default/sa/client-a"),
    ),
    (
        "certificate-of-a-longer-domain",
        Who::Uri("spiffe://cluster.locale/ns/default/sa/client-a"),
    ),
    (
        "certificate-of-a-shorter-domain",
        Who::Uri("spiffe://cluster.loca/ns/default/sa/client-a"),
    ),
    (
        "certificate-of-a-domain-in-capitals",
        Who::Uri("spiffe://CLUSTER.LOCAL/ns/default/sa/client-a"),
    ),
    (
        "certificate-with-another-scheme",
        Who::Uri("https://cluster.local/ns/default/sa/client-a"),
    ),
    (
        "certificate-without-account",
        Who::Uri("spiffe://cluster.local/client-a"),
    ),
    (
        "certificate-with-a-dot-segment",
        Who::Uri("spiffe://cluster.local/ns/default/sa/../sa/client-a"),
    ),
];

/// In a server's place, towards an honest client.
const IMPOSTORS: [(&str, Who); 5] = [
    ("impostor-with-another-identity", Who::Workload("server-b")),
    ("impostor-of-another-ca", Who::OtherCa),
    ("impostor-self-signed", Who::SelfSigned),
    ("impostor-expired", Who::Expired),
    (
        "impostor-of-another-domain",
        Who::Uri("spiffe://evil.example/ns/default/sa/waypoint-b"),
    ),
];

pub(super) fn attacks() -> Vec<Attack> {
    let mut attacks = Vec::new();
    for (name, who) in STRANGERS {
        let run = move |arena: &Arena| stranger(arena, who);
        let run = Box::new(run);
        attacks.push(small(name, FAMILY, "a tunnel, or the application", run));
    }
    let manners = [
        (
            "tls-1-2",
            Manner {
                old: true,
                ..Manner::default()
            },
        ),
        (
            "alpn-http1",
            Manner {
                alpn: Some(&[b"http/1.1"]),
                ..Manner::default()
            },
        ),
        (
            "alpn-unknown",
            Manner {
                alpn: Some(&[b"x"]),
                ..Manner::default()
            },
        ),
    ];
    for (name, manner) in manners {
        let run = move |arena: &Arena| manners_matter(arena, manner);
        attacks.push(small(
            name,
            FAMILY,
            "a tunnel, or the application",
            Box::new(run),
        ));
    }
    for (index, (name, who)) in IMPOSTORS.into_iter().enumerate() {
        // A port of the waypoint for each would not help: it is one HBONE port. They take turns.
        let run = move |arena: &Arena| impostor(arena, who, index);
        let must_not = "a request of an honest client, or a byte of it";
        attacks.push(Attack {
            alone: true,
            ..small(name, FAMILY, must_not, Box::new(run))
        });
    }
    attacks
}

/// A client whom nobody knows: no tunnel.
fn stranger(arena: &Arena, who: Who) -> Finding {
    let application = Application::on_victim(arena)?;
    let finding = match arena.session(who) {
        Ok(session) => asks(session, &application),
        Err(error) => Ok(format!("refused: {error}")),
    };
    application.reached(0)?;
    finding
}

/// TLS 1.3 tells a client of its certificate's refusal after the handshake.
fn asks(mut session: Session, application: &Application) -> Finding {
    let _ = session.send(&hello());
    let _ = session.send(&connect(1, &application.authority()?));
    let heard = session.hear(PATIENCE, |heard| heard.over() || !heard.statuses.is_empty());
    let words = heard.words();
    if heard.ended.is_none() || !heard.statuses.is_empty() {
        return got(format!("a tunnel: {words}"));
    }
    Ok(words)
}

fn manners_matter(arena: &Arena, manner: Manner) -> Finding {
    let application = Application::on_victim(arena)?;
    let tcp = arena.dial(ATTACKER, victim(HBONE)?)?;
    let finding = match Session::open(tcp, &arena.tls_as(INSIDER, manner)?) {
        Ok(session) => asks(session, &application),
        Err(error) => Ok(format!("refused: {error}")),
    };
    application.reached(0)?;
    finding
}

/// A server that is not who it should be, where an honest client's tunnel leads.
fn impostor(arena: &Arena, who: Who, index: usize) -> Finding {
    let config = arena.tls_server(who)?;
    let listener = arena.listen("waypoint-b", HBONE)?;
    listener.set_nonblocking(true)?;
    let port = 8100 + index as u16;
    let mut client = arena.dial("client-a", address("waypoint-b", port)?)?;
    client.write_all(b"secret")?;
    client.set_read_timeout(Some(Duration::from_millis(20)))?;
    let deadline = std::time::Instant::now() + PATIENCE;
    let mut met = 0;
    loop {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let connection = ServerConnection::new(Arc::clone(&config));
            let connection = connection.map_err(std::io::Error::other)?;
            let mut tls = StreamOwned::new(connection, stream);
            let mut first = [0; 64];
            // The client hangs up once it has seen the certificate.
            if matches!(tls.read(&mut first), Ok(1..)) {
                return got("what the client says to its tunnel");
            }
            met += 1;
        }
        match client.read(&mut [0; 16]) {
            Ok(1..) => return got("an answer passed on to the client"),
            Ok(0) => break,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
        if std::time::Instant::now() >= deadline {
            return got("a client that waits for it");
        }
        thread::sleep(Duration::from_millis(2));
    }
    if met == 0 {
        return Err(super::Failure::Driver("no client came".to_owned()));
    }
    Ok(format!("the client hangs up ({met} handshakes)"))
}
