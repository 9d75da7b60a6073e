//! Known answers of RFC 8448, 3 ("Simple 1-RTT Handshake"), and an independent construction.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::crypto::cipher::{AeadKey, Iv};

use super::*;
use crate::record::{ALERT, APPLICATION_DATA, HANDSHAKE};

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// An AES-128-GCM key from hexadecimal key and nonce base.
fn key128(key: &str, iv: &str, sequence: u64) -> TrafficKey {
    let mut padded = [0; 32];
    padded[..16].copy_from_slice(&unhex(key));
    let unbound = UnboundKey::new(&AES_128_GCM, &padded[..16]).unwrap();
    TrafficKey {
        key: LessSafeKey::new(unbound),
        iv: Zeroizing::new(unhex(iv).try_into().unwrap()),
        sequence,
    }
}

fn key256(sequence: u64) -> TrafficKey {
    let secrets = ConnectionTrafficSecrets::Aes256Gcm {
        key: AeadKey::from([0x42; 32]),
        iv: Iv::from([0x24; 12]),
    };
    TrafficKey::new(secrets, sequence).unwrap()
}

fn record(plaintext: &[u8]) -> Vec<u8> {
    let mut record = vec![0xaa; RECORD_HEADER];
    record.extend_from_slice(plaintext);
    record.resize(record.len() + RECORD_TRAILER, 0xbb);
    record
}

const CLIENT_KEY: &str = "17422dda596ed5d9acd890e3c63f5051";
const CLIENT_IV: &str = "5b78923dee08579033e523d9";
const SERVER_KEY: &str = "9f02283b6c9c07efc26bb9f2ac92e356";
const SERVER_IV: &str = "cf782b88dd83549aadf1e984";

#[test]
fn rfc8448_client_application_data() {
    let expected = unhex(
        "1703030043 a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a
         9a20441e2b62974e1f5a6292a2977014bd1e3deae63aeebb21694915e4",
    );
    let plaintext: Vec<u8> = (0..50).collect();
    let mut sealed = record(&plaintext);
    let mut key = key128(CLIENT_KEY, CLIENT_IV, 0);
    key.seal(APPLICATION_DATA, &mut sealed).unwrap();
    assert_eq!(sealed, expected);
    assert_eq!(key.sequence(), 1);

    let mut alert = record(&[1, 0]);
    key.seal(ALERT, &mut alert).unwrap();
    assert_eq!(
        alert,
        unhex("1703030013 c9872760655666b74d7ff1153efd6db6d0b0e3")
    );
}

#[test]
fn rfc8448_server_records() {
    let mut sealed = unhex(
        "1703030043 2e937e11ef4ac740e538ad36005fc4a46932fc3225d05f82aa1b36e30efaf97d90e6dffc602d
         cb501a59a8fcc49c4bf2e5f0a21c0047c2abf332540dd032e167c2955d",
    );
    // The server's first record is a ticket; this is its second.
    let mut key = key128(SERVER_KEY, SERVER_IV, 1);
    assert_eq!(key.open(&mut sealed), Ok(51));
    let expected: Vec<u8> = (0..50).chain([APPLICATION_DATA]).collect();
    assert_eq!(sealed[RECORD_HEADER..RECORD_HEADER + 51], expected);

    let mut alert = unhex("1703030013 b58fd67166ebf599d24720cfbe7efa7a8864a9");
    assert_eq!(key.open(&mut alert), Ok(3));
    assert_eq!(alert[RECORD_HEADER..RECORD_HEADER + 3], [1, 0, ALERT]);
}

/// The same record built step by step from the RFC's text, with another call of the library.
#[test]
fn aes256_matches_an_independent_construction() {
    let sequence = 0x0102_0304_0506_0708_u64;
    let mut inner = b"attack at dawn".to_vec();
    inner.push(HANDSHAKE);
    let length = u16::try_from(inner.len() + 16).unwrap().to_be_bytes();
    let header = [23, 3, 3, length[0], length[1]];
    let mut nonce = [0x24; 12];
    for (index, byte) in sequence.to_be_bytes().into_iter().enumerate() {
        nonce[4 + index] ^= byte;
    }
    let aead = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[0x42; 32]).unwrap());
    let nonce = Nonce::assume_unique_for_key(nonce);
    aead.seal_in_place_append_tag(nonce, Aad::from(header), &mut inner)
        .unwrap();
    let expected = [&header[..], &inner].concat();

    let mut sealed = record(b"attack at dawn");
    key256(sequence).seal(HANDSHAKE, &mut sealed).unwrap();
    assert_eq!(sealed, expected);
}

#[test]
fn sizes_are_bounded() {
    for total in [0, 5, 21, RECORD_HEADER + MAX_PLAINTEXT + 1 + RECORD_TRAILER] {
        let error = key256(0).seal(APPLICATION_DATA, &mut vec![0; total]);
        assert_eq!(error, Err(ProtectionError::BadLength(total)));
    }
    for plaintext in [0, 1, MAX_PLAINTEXT] {
        let mut sealed = record(&vec![7; plaintext]);
        key256(0).seal(APPLICATION_DATA, &mut sealed).unwrap();
        assert_eq!(key256(0).open(&mut sealed), Ok(plaintext + 1));
    }
    for total in 0..RECORD_HEADER + TAG {
        let error = key256(0).open(&mut vec![0; total]);
        assert_eq!(error, Err(ProtectionError::BadRecord));
    }
}

#[test]
fn sequence_numbers_never_wrap() {
    let mut key = key256(u64::MAX - 1);
    key.seal(APPLICATION_DATA, &mut record(b"last")).unwrap();
    let error = key.seal(APPLICATION_DATA, &mut record(b"one too many"));
    assert_eq!(error, Err(ProtectionError::Exhausted));
}

#[test]
fn every_altered_bit_is_noticed() {
    let mut sealed = record(b"x");
    key256(9).seal(APPLICATION_DATA, &mut sealed).unwrap();
    for bit in 0..sealed.len() * 8 {
        let mut altered = sealed.clone();
        altered[bit / 8] ^= 1 << (bit % 8);
        let error = key256(9).open(&mut altered);
        assert_eq!(error, Err(ProtectionError::BadRecord), "bit {bit}");
    }
    assert_eq!(
        key256(10).open(&mut sealed),
        Err(ProtectionError::BadRecord)
    );
}
