//! What a session does with records no honest peer of ours would send, built with its own keys.

use proptest::prelude::*;
use rustls::AlertDescription;

use super::*;
use crate::common::{control, open, seal, sessions};
use crate::record::{ALERT, APPLICATION_DATA, HANDSHAKE, MAX_CIPHERTEXT};

/// Allowed during the handshake only.
const CHANGE_CIPHER_SPEC: u8 = 20;

/// A record with any content type and padding, sealed as `session` would.
fn forge(session: &mut Session, content_type: u8, content: &[u8], padding: usize) -> Vec<u8> {
    // The padding goes where the content type would, and that in front of it.
    let mut record = vec![0; RECORD_HEADER];
    record.extend_from_slice(content);
    if padding == 0 {
        record.resize(record.len() + RECORD_TRAILER, 0);
        session
            .in_place()
            .transmit
            .seal(content_type, &mut record)
            .unwrap();
    } else {
        record.push(content_type);
        record.resize(record.len() + padding - 1 + RECORD_TRAILER, 0);
        session.in_place().transmit.seal(0, &mut record).unwrap();
    }
    record
}

/// Opens a record that has to fail; returns the error after checking that the alert it queues
/// reaches the peer and that the session is over.
fn refuse(session: &mut Session, peer: &mut Session, record: &mut [u8]) -> OpenError {
    let error = session.open(record).unwrap_err();
    let mut alert = control(session);
    assert_eq!(
        peer.open(&mut alert),
        Err(OpenError::Alert(error.alert().expect("an alert is due")))
    );
    assert!(!peer.has_control_output(), "no alert answers an alert");
    assert_eq!(session.open(record), Err(OpenError::Failed));
    assert_eq!(session.seal(&mut [0; 100]), Err(SealError::Closed));
    assert!(!session.has_control_output());
    error
}

#[test]
fn tampered_record_is_bad_record_mac() {
    let (mut client, mut server) = sessions();
    let mut record = seal(&mut client, b"transfer 1 to bob");
    record[RECORD_HEADER + 9] ^= 1;
    let error = refuse(&mut server, &mut client, &mut record);
    assert_eq!(error, OpenError::BadRecordMac { sequence: 0 });
    assert_eq!(error.alert(), Some(AlertDescription::BadRecordMac));
}

#[test]
fn reordered_replayed_and_tiny_records_are_bad_record_mac() {
    let (mut client, mut server) = sessions();
    let mut first = seal(&mut client, b"first");
    let again = first.clone();
    assert_eq!(open(&mut server, &mut first).unwrap(), b"first");
    let mut replayed = again;
    let error = server.open(&mut replayed).unwrap_err();
    assert_eq!(error, OpenError::BadRecordMac { sequence: 1 });

    let (mut client, mut server) = sessions();
    let mut tiny = [APPLICATION_DATA, 3, 3, 0, 15].to_vec();
    tiny.resize(RECORD_HEADER + 15, 0);
    let error = refuse(&mut server, &mut client, &mut tiny);
    assert_eq!(error, OpenError::BadRecordMac { sequence: 0 });
}

#[test]
fn oversize_record_is_record_overflow() {
    let (mut client, mut server) = sessions();
    let header = [APPLICATION_DATA, 3, 3, 0x41, 0x01];
    let too_long = Session::record_len(&header).unwrap_err();
    server.fail(&too_long.into());
    let mut alert = control(&mut server);
    let overflow = OpenError::Alert(AlertDescription::RecordOverflow);
    assert_eq!(client.open(&mut alert), Err(overflow));

    // Short enough on the wire, but with more plaintext than allowed.
    let (mut client, mut server) = sessions();
    let mut record = forge_long(&mut client, MAX_PLAINTEXT + 1);
    assert!(record.len() <= RECORD_HEADER + MAX_CIPHERTEXT);
    let error = refuse(&mut server, &mut client, &mut record);
    assert_eq!(error, OpenError::PlaintextTooLong(MAX_PLAINTEXT + 2));
}

/// A record of `length` bytes, beyond what `seal` permits.
fn forge_long(session: &mut Session, length: usize) -> Vec<u8> {
    let mut record = vec![7; RECORD_HEADER + length + RECORD_TRAILER];
    session
        .in_place()
        .transmit
        .seal_any_length(APPLICATION_DATA, &mut record)
        .unwrap();
    record
}

#[test]
fn padding_is_stripped_up_to_the_limit() {
    let (mut client, mut server) = sessions();
    for padding in [0, 1, 255, MAX_PLAINTEXT - 5] {
        let mut record = forge(&mut client, APPLICATION_DATA, b"hello", padding);
        assert_eq!(open(&mut server, &mut record).unwrap(), b"hello");
    }
    // Content that ends in zeroes keeps them.
    let mut record = forge(&mut client, APPLICATION_DATA, &[0; 40], 9);
    assert_eq!(open(&mut server, &mut record).unwrap(), [0; 40]);
    let mut record = forge(&mut client, 0, &[0; 40], 0);
    let error = refuse(&mut server, &mut client, &mut record);
    assert_eq!(error, OpenError::NoContentType);
}

#[test]
fn records_without_data_are_bounded() {
    let (mut client, mut server) = sessions();
    for _ in 0..2 {
        for _ in 0..MAX_WITHOUT_DATA {
            let mut empty = seal(&mut client, b"");
            assert_eq!(open(&mut server, &mut empty).unwrap(), b"");
        }
        let mut data = seal(&mut client, b"!");
        assert_eq!(open(&mut server, &mut data).unwrap(), b"!");
    }
    for _ in 0..MAX_WITHOUT_DATA {
        assert!(server.open(&mut seal(&mut client, b"")).is_ok());
    }
    let mut record = seal(&mut client, b"");
    let error = refuse(&mut server, &mut client, &mut record);
    assert_eq!(error, OpenError::TooManyWithoutData);
}

#[test]
fn unprotected_records_are_unexpected() {
    for content_type in [CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, 0, 24, 255] {
        let (mut client, mut server) = sessions();
        let mut record = [content_type, 3, 3, 0, 1, 1];
        let error = refuse(&mut server, &mut client, &mut record);
        assert_eq!(error, OpenError::UnexpectedRecord(content_type));
    }
    for content_type in [CHANGE_CIPHER_SPEC, 1, 24, 255] {
        let (mut client, mut server) = sessions();
        let mut record = forge(&mut client, content_type, &[1], 0);
        let error = refuse(&mut server, &mut client, &mut record);
        assert_eq!(error, OpenError::UnexpectedRecord(content_type));
    }
}

#[test]
fn incomplete_slices_do_no_harm() {
    let (mut client, mut server) = sessions();
    let mut record = seal(&mut client, b"whole");
    for length in 0..record.len() {
        let mut part = record[..length].to_vec();
        let error = server.open(&mut part).unwrap_err();
        assert!(
            matches!(error, OpenError::Incomplete { .. }),
            "{length}: {error}"
        );
    }
    let mut long = [&record[..], &[0]].concat();
    assert!(server.open(&mut long).is_err());
    assert!(!server.has_control_output());
    assert_eq!(open(&mut server, &mut record).unwrap(), b"whole");
}

#[test]
fn key_updates_on_both_sides() {
    let (mut client, mut server) = sessions();
    for round in 0..10 {
        client.update_keys(round % 2 == 0);
        let mut update = control(&mut client);
        assert_eq!(open(&mut server, &mut update), None);
        assert_eq!(
            server.has_control_output(),
            round % 2 == 0,
            "answer when asked"
        );
        assert_eq!(server.in_place().receive.sequence(), 0);
        let mut answer = control(&mut server);
        if !answer.is_empty() {
            assert_eq!(open(&mut client, &mut answer), None);
            assert_eq!(client.in_place().receive.sequence(), 0);
            assert!(!client.has_control_output(), "an answer is not answered");
        }
        let mut record = seal(&mut client, b"to the server");
        assert_eq!(open(&mut server, &mut record).unwrap(), b"to the server");
        let mut record = seal(&mut server, b"to the client");
        assert_eq!(open(&mut client, &mut record).unwrap(), b"to the client");
    }
}

#[test]
fn several_requests_get_one_answer() {
    let (mut client, mut server) = sessions();
    for _ in 0..3 {
        client.update_keys(true);
        assert_eq!(open(&mut server, &mut control(&mut client)), None);
    }
    let mut answer = control(&mut server);
    assert_eq!(
        Session::record_len(&answer),
        Ok(Some(answer.len())),
        "one record"
    );
    assert_eq!(open(&mut client, &mut answer), None);
}

#[test]
fn keys_are_updated_when_the_limit_nears() {
    let (mut client, mut server) = sessions();
    client.set_key_update_after(4);
    let mut updates = 0;
    for _ in 0..20 {
        let mut record = seal(&mut client, b"x");
        assert_eq!(open(&mut server, &mut record).unwrap(), b"x");
        if client.has_control_output() {
            updates += 1;
            assert_eq!(open(&mut server, &mut control(&mut client)), None);
            assert_eq!(client.in_place().transmit.sequence(), 0);
        }
    }
    assert_eq!(updates, 5);
    assert!(!server.has_control_output(), "not asked to update");
}

#[test]
fn a_used_up_key_seals_nothing() {
    let (mut client, _) = sessions();
    client.in_place().transmit.set_sequence(KEY_LIMIT - 1);
    seal(&mut client, b"the last");
    let mut record = [0; 100];
    assert_eq!(client.seal(&mut record), Err(SealError::KeyExhausted));
    assert!(client.has_control_output(), "the update still helps");
    assert!(!control(&mut client).is_empty());
    seal(&mut client, b"with the next key");
}

#[test]
fn close_notify_closes_one_direction() {
    let (mut client, mut server) = sessions();
    client.update_keys(false);
    let mut output = Vec::new();
    client.close_notify(&mut output);
    client.close_notify(&mut output);
    assert_eq!(client.seal(&mut [0; 100]), Err(SealError::Closed));
    client.update_keys(true);
    assert!(!client.has_control_output());
    let update = Session::record_len(&output).unwrap().unwrap();
    let (update, close) = output.split_at_mut(update);
    assert_eq!(open(&mut server, update), None);
    assert!(!server.received_close_notify());
    assert_eq!(server.open(close), Ok(Opened::Closed));
    assert!(server.received_close_notify());
    assert_eq!(
        server.open(&mut [1, 2, 3, 0, 0]),
        Ok(Opened::Closed),
        "ignored"
    );
    let mut record = seal(&mut server, b"still");
    assert_eq!(open(&mut client, &mut record).unwrap(), b"still");
}

#[test]
fn alerts() {
    let (mut client, mut server) = sessions();
    let mut record = forge(&mut client, ALERT, &[1, 90], 0);
    assert_eq!(
        server.open(&mut record),
        Ok(Opened::Handled),
        "user_canceled"
    );
    let mut record = forge(&mut client, ALERT, &[2, 48], 0);
    let error = server.open(&mut record).unwrap_err();
    assert_eq!(error, OpenError::Alert(AlertDescription::UnknownCA));
    assert!(
        error.to_string().contains("does not trust the CA"),
        "{error}"
    );
    assert!(!server.has_control_output());
    for content in [&[][..], &[2], &[2, 40, 0]] {
        let (mut client, mut server) = sessions();
        let mut record = forge(&mut client, ALERT, content, 0);
        let error = refuse(&mut server, &mut client, &mut record);
        assert_eq!(error, OpenError::MalformedAlert(content.len()));
    }
}

#[test]
fn handshake_messages_must_not_be_interleaved() {
    let ticket_start = [4, 0, 0, 200, 1, 2, 3];
    for (content_type, content) in [(APPLICATION_DATA, &b"x"[..]), (ALERT, &[1, 0])] {
        let (mut client, mut server) = sessions();
        let mut record = forge(&mut server, HANDSHAKE, &ticket_start, 0);
        assert_eq!(open(&mut client, &mut record), None);
        let mut record = forge(&mut server, content_type, content, 0);
        let error = refuse(&mut client, &mut server, &mut record);
        assert_eq!(error, OpenError::Interleaved(content_type));
    }
}

#[test]
fn bad_handshake_messages() {
    for (message, alert) in [
        (&[24, 0, 0, 1, 2][..], AlertDescription::IllegalParameter),
        (&[24, 0, 0, 2, 0, 0], AlertDescription::DecodeError),
        (&[24, 0, 0, 1, 0, 24], AlertDescription::UnexpectedMessage),
        (&[4, 0, 0, 1, 0], AlertDescription::UnexpectedMessage),
        (&[1, 0, 0, 1, 0], AlertDescription::UnexpectedMessage),
        (&[], AlertDescription::UnexpectedMessage),
    ] {
        let (mut client, mut server) = sessions();
        let mut record = forge(&mut client, HANDSHAKE, message, 0);
        let error = refuse(&mut server, &mut client, &mut record);
        assert_eq!(error.alert(), Some(alert), "{message:?}");
    }
}

#[test]
fn nothing_secret_is_printed() {
    let (client, _) = sessions();
    let printed = format!("{client:?}");
    assert!(
        printed.contains("spiffe://td/ns/default/sa/server"),
        "{printed}"
    );
    assert!(!printed.contains("key"), "{printed}");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_records_never_panic(
        content_type in any::<u8>(),
        body in prop::collection::vec(any::<u8>(), 0..600),
        length in any::<u16>(),
    ) {
        let (_, mut server) = sessions();
        let mut record = vec![content_type, 3, 3];
        record.extend(length.to_be_bytes());
        record.extend(&body);
        prop_assert!(server.open(&mut record).is_err());
        let length = u16::try_from(body.len()).unwrap();
        let (_, mut server) = sessions();
        record[3..5].copy_from_slice(&length.to_be_bytes());
        prop_assert!(server.open(&mut record).is_err());
    }

    #[test]
    fn random_authenticated_content_never_panics(
        records in prop::collection::vec(
            (0..6_usize, prop::collection::vec(any::<u8>(), 0..300), 0..40_usize),
            1..40,
        ),
    ) {
        let (mut client, mut server) = sessions();
        for (kind, content, padding) in records {
            let content_type = [0, ALERT, HANDSHAKE, HANDSHAKE, APPLICATION_DATA, 99][kind];
            let mut record = forge(&mut server, content_type, &content, padding);
            if client.open(&mut record).is_err() {
                prop_assert_eq!(client.open(&mut record), Err(OpenError::Failed));
            }
            let _ = control(&mut client);
        }
    }
}

/// Remembers the first application secrets.
#[derive(Debug, Default)]
struct Secrets(std::sync::Mutex<Vec<(String, Vec<u8>)>>);

impl rustls::KeyLog for Secrets {
    fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
        let mut all = self.0.lock().unwrap();
        all.push((label.to_owned(), secret.to_vec()));
    }
}

/// HKDF-Expand-Label of AES-256-GCM's suite without context (RFC 8446, 7.1).
fn expand_label<const N: usize>(secret: &[u8], label: &[u8]) -> [u8; N] {
    use aws_lc_rs::hkdf;
    struct Length(usize);
    impl hkdf::KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let (length, label_length) = ([0, N as u8], [6 + label.len() as u8]);
    let info: [&[u8]; 5] = [&length, &label_length, b"tls13 ", label, &[0]];
    let mut out = [0; N];
    let prk = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA384, secret);
    prk.expand(&info, Length(N))
        .unwrap()
        .fill(&mut out)
        .unwrap();
    out
}

/// Opens the first record under the keys of `secret`, by the RFC's text and the bare AEAD.
fn open_by_hand(secret: &[u8], record: &[u8]) -> Vec<u8> {
    use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    let key: [u8; 32] = expand_label(secret, b"key");
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).unwrap());
    let nonce = Nonce::assume_unique_for_key(expand_label(secret, b"iv"));
    let (header, body) = record.split_at(RECORD_HEADER);
    let mut body = body.to_vec();
    let opened = key.open_in_place(nonce, Aad::from(header), &mut body);
    opened.expect("the keys are those of the secret").to_vec()
}

/// A real session's keys are the ones of its traffic secret, before and after updates.
#[test]
fn keys_come_from_the_traffic_secret() {
    let authority = crate::common::authority("mesh");
    let account = |name| crate::common::identity("td", name);
    let (a, b) = (account("client"), account("server"));
    let settings = |identity| crate::common::workload(&authority, identity);
    let mut client = crate::ClientSettings::new(&settings(&a)).unwrap();
    let server = crate::ServerSettings::new(&settings(&b)).unwrap();
    let log = std::sync::Arc::new(Secrets::default());
    client.log_keys(log.clone());
    let outcome = crate::common::handshake(&client, &server, &b, usize::MAX);
    let mut client = outcome.client.unwrap();
    let logged = log.0.lock().unwrap().clone();
    let find = |(label, _): &&(String, Vec<u8>)| label == "CLIENT_TRAFFIC_SECRET_0";
    let mut secret = logged.iter().find(find).unwrap().1.clone();
    assert_eq!(secret.len(), 48, "SHA-384");
    for round in 0..3 {
        let record = seal(&mut client, b"by the book");
        let inner = [&b"by the book"[..], &[APPLICATION_DATA]].concat();
        assert_eq!(open_by_hand(&secret, &record), inner, "round {round}");
        client.update_keys(false);
        control(&mut client);
        secret = expand_label::<48>(&secret, b"traffic upd").to_vec();
    }
}
