//! Both ways to handle records, side by side: same inputs, same outcomes.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::{authority, control, handshake, identity, open, seal, sessions_by, workload};
use proptest::prelude::*;
use rustls::AlertDescription;
use tls::{
    ClientSettings, HandshakeError, OpenError, Opened, RecordPath, SealError, ServerSettings,
    Session,
};

const PATHS: [RecordPath; 2] = [RecordPath::Own, RecordPath::Rustls];

fn pairs() -> impl Iterator<Item = (RecordPath, RecordPath)> {
    PATHS
        .into_iter()
        .flat_map(|near| PATHS.map(|far| (near, far)))
}

#[test]
fn settings_hand_the_choice_on() {
    let app = identity("td", "app");
    let certificate = workload(&authority("mesh"), &app);
    let (mut client, mut server) = tls::settings::both(&certificate).unwrap();
    assert_eq!(client.records(), RecordPath::Own);
    assert_eq!(server.records(), RecordPath::Own);
    client.set_records(RecordPath::Rustls);
    server.set_records(RecordPath::Rustls);
    let outcome = handshake(&client, &server, &app, usize::MAX);
    assert_eq!(outcome.client.unwrap().records(), RecordPath::Rustls);
    assert_eq!(outcome.server.unwrap().records(), RecordPath::Rustls);
}

#[test]
fn peers_are_judged_alike() {
    let (ours, theirs) = (authority("mesh"), authority("elsewhere"));
    let (a, b) = (identity("td", "client"), identity("td", "server"));
    for (near, far) in pairs() {
        let settings = |authority, portion| {
            let mut client = ClientSettings::new(&workload(&ours, &a)).unwrap();
            let mut server = ServerSettings::new(&workload(authority, &b)).unwrap();
            client.set_records(near);
            server.set_records(far);
            move |expected| handshake(&client, &server, expected, portion)
        };
        for portion in [1, 100, usize::MAX] {
            let outcome = settings(&ours, portion)(&b);
            assert_eq!(outcome.client.unwrap().peer().identity(), Some(&b));
            assert_eq!(outcome.server.unwrap().peer().identity(), Some(&a));
            assert_eq!(outcome.to_client, []);
        }
        for (authority, expected, alert) in [
            (&theirs, &b, AlertDescription::UnknownCA),
            (&ours, &a, AlertDescription::BadCertificate),
        ] {
            let outcome = settings(authority, 1000)(expected);
            let refused = outcome.client.unwrap_err();
            assert!(matches!(refused, HandshakeError::Refused(_)), "{refused}");
            let told = outcome.server.unwrap_err();
            assert!(
                matches!(told, HandshakeError::Alert(told) if told == alert),
                "{told}"
            );
        }
    }
}

#[test]
fn altered_records_end_alike() {
    for (near, far) in pairs() {
        let (mut client, mut server) = sessions_by(near, far);
        let mut good = seal(&mut client, b"first");
        assert_eq!(open(&mut server, &mut good).unwrap(), b"first");
        let mut record = seal(&mut client, b"transfer 1 to bob");
        record[9] ^= 1;
        let error = server.open(&mut record).unwrap_err();
        assert_eq!(error, OpenError::BadRecordMac { sequence: 1 }, "{far}");
        let mut alert = control(&mut server);
        let told = OpenError::Alert(AlertDescription::BadRecordMac);
        assert_eq!(client.open(&mut alert), Err(told));
        assert_eq!(server.open(&mut good), Err(OpenError::Failed));
        assert_eq!(server.seal(&mut [0; 100]), Err(SealError::Closed));
        assert!(!server.has_control_output());
    }
}

#[test]
fn oversize_records_end_alike() {
    for (near, far) in pairs() {
        let (mut client, mut server) = sessions_by(near, far);
        let too_long = Session::record_len(&[23, 3, 3, 0x41, 0x01]).unwrap_err();
        server.fail(&too_long.into());
        let mut alert = control(&mut server);
        let told = client.open(&mut alert).unwrap_err();
        // rustls takes a header it cannot believe for a malformed one.
        let expected = match far {
            RecordPath::Own => AlertDescription::RecordOverflow,
            RecordPath::Rustls => AlertDescription::DecodeError,
        };
        assert_eq!(told, OpenError::Alert(expected));
        assert_eq!(server.seal(&mut [0; 100]), Err(SealError::Closed));
    }
}

#[test]
fn plaintext_behind_the_handshake_is_refused_alike() {
    for (near, far) in pairs() {
        for content_type in [20, 21, 22] {
            let (_, mut server) = sessions_by(near, far);
            let mut record = [content_type, 3, 3, 0, 2, 1, 0];
            let error = server.open(&mut record).unwrap_err();
            assert_eq!(
                error,
                OpenError::UnexpectedRecord(content_type),
                "{near} {far}"
            );
        }
    }
}

#[test]
fn closing_is_alike() {
    for (near, far) in pairs() {
        let (mut client, mut server) = sessions_by(near, far);
        let mut output = Vec::new();
        client.close_notify(&mut output);
        assert_eq!(client.seal(&mut [0; 100]), Err(SealError::Closed));
        assert_eq!(server.open(&mut output), Ok(Opened::Closed));
        assert!(server.received_close_notify());
        let mut record = seal(&mut server, b"still mine");
        assert_eq!(open(&mut client, &mut record).unwrap(), b"still mine");
        let mut output = Vec::new();
        server.close_notify(&mut output);
        assert_eq!(client.open(&mut output), Ok(Opened::Closed));
    }
}

#[test]
fn records_without_data_are_bounded_alike() {
    for far in PATHS {
        let (mut client, mut server) = sessions_by(RecordPath::Own, far);
        for _ in 0..tls::session::MAX_WITHOUT_DATA {
            assert!(server.open(&mut seal(&mut client, b"")).is_ok());
        }
        let error = server.open(&mut seal(&mut client, b"")).unwrap_err();
        assert_eq!(error, OpenError::TooManyWithoutData);
    }
}

#[test]
fn several_requests_for_new_keys_get_one_answer() {
    for (near, far) in pairs() {
        let (mut client, mut server) = sessions_by(near, far);
        for _ in 0..3 {
            client.update_keys(true);
            let mut update = control(&mut client);
            assert_eq!(open(&mut server, &mut update), None, "{near} {far}");
        }
        if far == RecordPath::Rustls {
            let due = server.seal(&mut [0; 100]);
            assert_eq!(due, Err(SealError::KeyUpdateDue));
        }
        let mut answer = control(&mut server);
        let one = Session::record_len(&answer);
        assert_eq!(one, Ok(Some(answer.len())), "{near} {far}");
        assert_eq!(open(&mut client, &mut answer), None);
        let mut record = seal(&mut server, b"new key");
        assert_eq!(open(&mut client, &mut record).unwrap(), b"new key");
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 32,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Data both ways with key updates in between: what is sent arrives, and records have the
    /// same lengths whoever makes them.
    #[test]
    fn same_bytes_whoever_does_the_records(
        lengths in prop::collection::vec((any::<bool>(), 1..=16_384_usize), 1..24),
        update_after in 1..8_u64,
        near in 0..2_usize,
        far in 0..2_usize,
    ) {
        let (mut client, mut server) = sessions_by(PATHS[near], PATHS[far]);
        client.set_key_update_after(update_after);
        server.set_key_update_after(update_after + 1);
        for (up, length) in lengths {
            let (from, to) = if up {
                (&mut client, &mut server)
            } else {
                (&mut server, &mut client)
            };
            let mut controls = control(from);
            let mut rest = &mut controls[..];
            while let Some(length) = Session::record_len(rest).unwrap() {
                let (first, more) = rest.split_at_mut(length);
                prop_assert_eq!(open(to, first), None);
                rest = more;
            }
            let plaintext: Vec<u8> = (0..length).map(|index| (index % 251) as u8).collect();
            let mut record = seal(from, &plaintext);
            let room = Session::RECORD_HEADER + Session::RECORD_TRAILER;
            prop_assert_eq!(record.len(), length + room);
            prop_assert_eq!(open(to, &mut record).unwrap(), plaintext);
        }
    }
}
