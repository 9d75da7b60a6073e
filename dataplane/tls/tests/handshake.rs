//! Handshakes between our own client and server: who is refused, by whom, and what is said.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::sync::Arc;

use common::{Outcome, authority, control, handshake, identity, open, seal, workload};
use proptest::prelude::*;
use rustls::AlertDescription;
use tls::{
    Authority, ClientSettings, ExpectedPeers, Handshake, HandshakeError, OpenError, Opened,
    ServerSettings, WorkloadCertificate,
};

fn settings(
    client: &WorkloadCertificate,
    server: &WorkloadCertificate,
) -> (ClientSettings, ServerSettings) {
    (
        ClientSettings::new(client).unwrap(),
        ServerSettings::new(server).unwrap(),
    )
}

/// A handshake that the client refuses and the server learns about.
fn client_refuses(outcome: Outcome, alert: AlertDescription) -> String {
    let Err(HandshakeError::Refused(refused)) = outcome.client else {
        panic!("{:?}", outcome.client);
    };
    match outcome.server {
        Err(HandshakeError::Alert(received)) => assert_eq!(received, alert),
        other => panic!("{other:?}"),
    }
    one_line(refused.to_string())
}

/// A handshake that the server refuses. In TLS 1.3 the client is done by then and gets the alert
/// on its established session.
fn server_refuses(outcome: Outcome, alert: AlertDescription) -> String {
    let Err(HandshakeError::Refused(refused)) = outcome.server else {
        panic!("{:?}", outcome.server);
    };
    let mut client = outcome.client.unwrap();
    let mut record = outcome.to_client;
    assert_eq!(client.open(&mut record), Err(OpenError::Alert(alert)));
    one_line(refused.to_string())
}

fn one_line(message: String) -> String {
    assert!(!message.contains('\n'), "{message}");
    message
}

#[test]
fn both_sides_learn_who_the_peer_is() {
    let authority = authority("mesh");
    let (a, b) = (identity("td", "client"), identity("td", "server"));
    let (client, server) = settings(&workload(&authority, &a), &workload(&authority, &b));
    for portion in [1, 7, 1000, usize::MAX] {
        let outcome = handshake(&client, &server, &b, portion);
        let (mut client, mut server) = (outcome.client.unwrap(), outcome.server.unwrap());
        assert_eq!(client.peer().identity(), Some(&b));
        assert_eq!(server.peer().identity(), Some(&a));
        assert_eq!(server.peer().uri(), a.uri());
        // No tickets: nothing may follow the server's flight.
        assert_eq!(outcome.to_client, []);
        let mut record = seal(&mut client, b"ping");
        assert_eq!(open(&mut server, &mut record).unwrap(), b"ping");
        let mut record = seal(&mut server, b"pong");
        assert_eq!(open(&mut client, &mut record).unwrap(), b"pong");
    }
}

#[test]
fn bytes_behind_the_handshake_stay_ours() {
    let authority = authority("mesh");
    let (a, b) = (identity("td", "client"), identity("td", "server"));
    let (client, server) = settings(&workload(&authority, &a), &workload(&authority, &b));
    let mut client = Handshake::client(&client, &b).unwrap();
    let mut server = Handshake::server(&server).unwrap();
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    client.advance(&[], &mut to_server).unwrap();
    server.advance(&to_server, &mut to_client).unwrap();
    to_server.clear();
    let progress = client.advance(&to_client, &mut to_server).unwrap();
    assert_eq!(progress.consumed, to_client.len());
    let mut session = progress.established.unwrap();
    // As a client that does not wait: its first requests leave with its last flight.
    for part in [&b"PRI * HTTP/2.0"[..], b"SETTINGS"] {
        to_server.extend(seal(&mut session, part));
    }
    let progress = server.advance(&to_server, &mut Vec::new()).unwrap();
    let mut session = progress.established.unwrap();
    let rest = &mut to_server[progress.consumed..];
    let first = tls::Session::record_len(rest).unwrap().unwrap();
    let (first, second) = rest.split_at_mut(first);
    assert_eq!(open(&mut session, first).unwrap(), b"PRI * HTTP/2.0");
    assert_eq!(open(&mut session, second).unwrap(), b"SETTINGS");
    let error = server.advance(&[], &mut Vec::new()).unwrap_err();
    assert!(matches!(error, HandshakeError::Over), "{error}");
}

#[test]
fn handshakes_in_turns_keep_their_own_peers() {
    let authority = authority("mesh");
    let account = |n: usize| identity("td", &format!("server-{n}"));
    let client = workload(&authority, &identity("td", "client"));
    let client = ClientSettings::new(&client).unwrap();
    let servers = (0..4).map(|n| ServerSettings::new(&workload(&authority, &account(n))));
    // All of one client configuration; every second one expects somebody else.
    let mut pairs: Vec<_> = servers
        .enumerate()
        .map(|(n, server)| {
            let near = Handshake::client(&client, &account(n - n % 2)).unwrap();
            let far = Handshake::server(&server.unwrap()).unwrap();
            (near, far, Vec::new(), Vec::new())
        })
        .collect();
    for (near, _, up, _) in &mut pairs {
        near.advance(&[], up).unwrap();
    }
    for (_, far, up, down) in &mut pairs {
        far.advance(up, down).unwrap();
    }
    let longest = pairs.iter().map(|pair| pair.3.len()).max().unwrap();
    let mut outcomes: [Option<bool>; 4] = [None; 4];
    // A piece for each in turn, from one flight's first byte to its last.
    for start in (0..longest).step_by(100) {
        for (n, (near, _, up, down)) in pairs.iter_mut().enumerate() {
            let piece = &down[start.min(down.len())..(start + 100).min(down.len())];
            if outcomes[n].is_some() || piece.is_empty() {
                continue;
            }
            match near.advance(piece, up) {
                Ok(progress) => {
                    if let Some(session) = progress.established {
                        assert_eq!(session.peer().identity(), Some(&account(n)));
                        outcomes[n] = Some(true);
                    }
                }
                Err(error) => {
                    let HandshakeError::Refused(refused) = error else {
                        panic!("{error}");
                    };
                    let shown = format!("[{}]", account(n).uri());
                    assert_eq!(refused.presented(), shown);
                    outcomes[n] = Some(false);
                }
            }
        }
    }
    assert_eq!(outcomes, [true, false, true, false].map(Some));
}

#[test]
fn certificates_of_another_ca_are_refused() {
    let (ours, theirs) = (authority("mesh"), authority("elsewhere"));
    let (a, b) = (identity("td", "client"), identity("td", "server"));
    let (client, server) = settings(&workload(&ours, &a), &workload(&theirs, &b));
    let outcome = handshake(&client, &server, &b, usize::MAX);
    let message = client_refuses(outcome, AlertDescription::UnknownCA);
    assert!(message.contains(b.uri()), "who: {message}");
    assert!(message.contains("chain does not verify"), "why: {message}");

    // The server alone distrusts: the client's roots hold both CAs.
    let certificate = trusting(&ours, &a, &[&ours, &theirs]);
    let (client, server) = settings(&certificate, &workload(&theirs, &b));
    let outcome = handshake(&client, &server, &b, usize::MAX);
    let message = server_refuses(outcome, AlertDescription::UnknownCA);
    assert!(message.contains(a.uri()), "who: {message}");
    assert!(
        message.contains("trust domain td"),
        "what was expected: {message}"
    );
    assert!(message.contains("UnknownIssuer"), "why: {message}");
}

#[test]
fn certificates_of_a_ca_with_the_same_name_are_refused() {
    let (ours, theirs) = (authority("mesh"), authority("mesh"));
    let (a, b) = (identity("td", "client"), identity("td", "server"));
    let (client, server) = settings(&workload(&ours, &a), &workload(&theirs, &b));
    let outcome = handshake(&client, &server, &b, usize::MAX);
    let message = client_refuses(outcome, AlertDescription::DecryptError);
    assert!(message.contains("another CA of the same name"), "{message}");
}

/// A certificate of `issuer` whose holder trusts all of `roots`.
fn trusting(
    issuer: &Authority,
    identity: &mesh::Identity,
    roots: &[&Authority],
) -> WorkloadCertificate {
    let roots = roots
        .iter()
        .flat_map(|root| workload(root, identity).roots().to_vec())
        .collect();
    workload(issuer, identity).with_roots(roots).unwrap()
}

#[test]
fn clients_of_another_trust_domain_are_refused() {
    let authority = authority("mesh");
    let (a, b) = (identity("elsewhere", "client"), identity("td", "server"));
    let (client, server) = settings(&workload(&authority, &a), &workload(&authority, &b));
    let outcome = handshake(&client, &server, &b, usize::MAX);
    let message = server_refuses(outcome, AlertDescription::BadCertificate);
    assert_eq!(
        message,
        "client refused: presented [spiffe://elsewhere/ns/default/sa/client], expected a SPIFFE \
         identity of trust domain td: no identity of this trust domain; trust domain aliases are \
         not supported"
    );
}

#[test]
fn servers_with_another_identity_are_refused() {
    let authority = authority("mesh");
    let (a, b) = (identity("td", "client"), identity("td", "server"));
    let (client, server) = settings(&workload(&authority, &a), &workload(&authority, &b));
    let other = identity("td", "other");
    let outcome = handshake(&client, &server, &other, usize::MAX);
    let message = client_refuses(outcome, AlertDescription::BadCertificate);
    assert!(
        message.contains("presented [spiffe://td/ns/default/sa/server]"),
        "{message}"
    );
    assert!(
        message.contains("one of [spiffe://td/ns/default/sa/other]"),
        "{message}"
    );

    // Nobody at all is expected.
    let outcome = handshake(&client, &server, ExpectedPeers::new([], []), usize::MAX);
    client_refuses(outcome, AlertDescription::BadCertificate);
    // A part of the identity is not the identity.
    for name in [
        "spiffe://td/ns/default/sa/serve",
        "spiffe://td/ns/default/sa/server/",
        "",
    ] {
        let expected = ExpectedPeers::new([], [Arc::from(name)]);
        let outcome = handshake(&client, &server, expected, usize::MAX);
        client_refuses(outcome, AlertDescription::BadCertificate);
    }
}

#[test]
fn any_expected_name_will_do() {
    let authority = authority("mesh");
    let (a, b) = (identity("td", "client"), identity("other-td", "server"));
    let (client, server) = settings(&workload(&authority, &a), &workload(&authority, &b));
    for expected in [
        ExpectedPeers::new([identity("td", "x"), b.clone()], []),
        ExpectedPeers::new([identity("td", "x")], [Arc::from("y"), Arc::from(b.uri())]),
    ] {
        let outcome = handshake(&client, &server, expected, usize::MAX);
        assert_eq!(outcome.client.unwrap().peer().identity(), Some(&b));
        // Our server is of another trust domain than the client, so it refuses in turn.
        assert!(matches!(outcome.server, Err(HandshakeError::Refused(_))));
    }
}

#[test]
fn expired_certificates_are_refused() {
    let authority = authority("mesh");
    let (a, b) = (identity("td", "client"), identity("td", "server"));
    // Backdated to start two minutes ago, so this one ends now.
    let expired = authority.issue(&a, std::time::Duration::ZERO).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(2100));
    let (client, server) = settings(&expired, &workload(&authority, &b));
    let outcome = handshake(&client, &server, &b, usize::MAX);
    let message = server_refuses(outcome, AlertDescription::CertificateExpired);
    assert!(message.contains("or a clock is wrong"), "{message}");
}

#[test]
fn endless_handshakes_are_given_up() {
    let authority = authority("mesh");
    let b = identity("td", "server");
    let server = ServerSettings::new(&workload(&authority, &b)).unwrap();
    let mut server = Handshake::server(&server).unwrap();
    // A ClientHello that never ends, in records of four bytes.
    let mut output = Vec::new();
    server
        .advance(&[22, 3, 1, 0, 4, 1, 0, 0xff, 0xff], &mut output)
        .unwrap();
    let error = (0..100_000)
        .find_map(|_| {
            server
                .advance(&[22, 3, 1, 0, 4, 0, 0, 0, 0], &mut output)
                .err()
        })
        .expect("given up");
    assert!(
        matches!(error, HandshakeError::TooLarge | HandshakeError::Tls(_)),
        "{error}"
    );
}

#[test]
fn plaintext_is_not_taken_for_tls() {
    let authority = authority("mesh");
    let b = identity("td", "server");
    let server = ServerSettings::new(&workload(&authority, &b)).unwrap();
    let mut server = Handshake::server(&server).unwrap();
    let error = server
        .advance(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", &mut Vec::new())
        .unwrap_err();
    assert!(matches!(error, HandshakeError::NotTls(b'G')), "{error}");
}

#[test]
fn errors_after_refusal_stay_errors() {
    let authority = authority("mesh");
    let (a, b) = (identity("td", "client"), identity("td", "server"));
    let (client, server) = settings(&workload(&authority, &a), &workload(&authority, &b));
    let mut client = Handshake::client(&client, &a).unwrap();
    let mut server = Handshake::server(&server).unwrap();
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    client.advance(&[], &mut to_server).unwrap();
    server.advance(&to_server, &mut to_client).unwrap();
    to_server.clear();
    client.advance(&to_client, &mut to_server).unwrap_err();
    // The refusal, and not a byte of our certificate: a change_cipher_spec and one alert.
    assert!(to_server.len() < 64, "{}", to_server.len());
    let length = to_server.len();
    for _ in 0..3 {
        let error = client.advance(&to_client, &mut to_server).unwrap_err();
        assert!(matches!(error, HandshakeError::Over), "{error}");
    }
    assert_eq!(to_server.len(), length);
}

#[test]
fn truncation_is_told_from_closing() {
    let (mut client, mut server) = common::sessions();
    let mut record = seal(&mut client, b"part");
    assert_eq!(open(&mut server, &mut record).unwrap(), b"part");
    assert!(
        !server.received_close_notify(),
        "an end of file now is a truncation"
    );
    let mut close = Vec::new();
    client.close_notify(&mut close);
    assert_eq!(server.open(&mut close), Ok(Opened::Closed));
    assert!(server.received_close_notify());
    assert_eq!(control(&mut server), []);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 256,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_bytes_never_panic(
        input in prop::collection::vec(any::<u8>(), 0..2000),
        as_client in any::<bool>(),
        framed in any::<bool>(),
        portion in 1..500_usize,
    ) {
        let authority = authority("mesh");
        let a = identity("td", "a");
        let certificate = workload(&authority, &a);
        let mut handshake = if as_client {
            Handshake::client(&ClientSettings::new(&certificate).unwrap(), &a).unwrap()
        } else {
            Handshake::server(&ServerSettings::new(&certificate).unwrap()).unwrap()
        };
        let mut input = input;
        if framed {
            let length = u16::try_from(input.len()).unwrap().to_be_bytes();
            input.splice(0..0, [22, 3, 3, length[0], length[1]]);
        }
        let mut output = Vec::new();
        for part in input.chunks(portion) {
            match handshake.advance(part, &mut output) {
                Ok(progress) => prop_assert!(progress.established.is_none()),
                Err(_) => break,
            }
        }
    }

    #[test]
    fn altered_flights_neither_establish_nor_panic(
        position in any::<prop::sample::Index>(),
        bit in 0..8_u32,
        flight in 0..3_usize,
    ) {
        let authority = authority("mesh");
        let (a, b) = (identity("td", "client"), identity("td", "server"));
        let (client, server) = settings(&workload(&authority, &a), &workload(&authority, &b));
        let mut client = Handshake::client(&client, &b).unwrap();
        let mut server = Handshake::server(&server).unwrap();
        let mut flights = [Vec::new(), Vec::new(), Vec::new()];
        let mut tolerated = false;
        let mut alter = |index: usize, bytes: &mut Vec<u8>| {
            if index == flight {
                let position = position.index(bytes.len());
                tolerated = header_byte(bytes, position);
                bytes[position] ^= 1 << bit;
            }
        };
        client.advance(&[], &mut flights[0]).unwrap();
        alter(0, &mut flights[0]);
        let mut established = false;
        let [hello, answer, finish] = &mut flights;
        if server.advance(hello, answer).is_ok() {
            alter(1, answer);
            if client.advance(answer, finish).is_ok() {
                alter(2, finish);
                let progress = server.advance(finish, &mut Vec::new());
                established = progress.is_ok_and(|progress| progress.established.is_some());
            }
        }
        // The version in a record header is ignored, as RFC 8446 wants; everything else is
        // covered by the record protection or the transcript.
        prop_assert!(!established || tolerated);
    }
}

/// Whether `position` lies in a record header or in a change_cipher_spec.
fn header_byte(flight: &[u8], position: usize) -> bool {
    let mut start = 0;
    while start + 5 <= flight.len() {
        let length = 5 + usize::from(u16::from_be_bytes([flight[start + 3], flight[start + 4]]));
        if position < start + length {
            return position < start + 5 || length == 6;
        }
        start += length;
    }
    true
}
