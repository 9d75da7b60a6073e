//! Known answers: of RFC 8448, 3 ("Simple 1-RTT Handshake"), from traffic secrets to records, and
//! of Python's `cryptography` for both suites over two key updates (`tests/vectors/make.py`).

use aws_lc_rs::hkdf;
use rustls::crypto::cipher::{AeadKey, Iv};

use super::*;
use crate::record::{ALERT, APPLICATION_DATA};

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// HKDF-Expand-Label without context (RFC 8446, 7.1).
fn expand_label(algorithm: hkdf::Algorithm, secret: &[u8], label: &str, length: usize) -> Vec<u8> {
    struct Length(usize);
    impl hkdf::KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let label = format!("tls13 {label}");
    let length_bytes = u16::try_from(length).unwrap().to_be_bytes();
    let label_length = [u8::try_from(label.len()).unwrap()];
    let info: [&[u8]; 4] = [&length_bytes, &label_length, label.as_bytes(), &[0]];
    let mut expanded = vec![0; length];
    hkdf::Prk::new_less_safe(algorithm, secret)
        .expand(&info, Length(length))
        .unwrap()
        .fill(&mut expanded)
        .unwrap();
    expanded
}

/// Secrets as the handshake hands them over. rustls' keys are 32 bytes inside, and only it can
/// make shorter ones of them: an AES-128 key is set up by hand.
fn traffic_key(key: &[u8], iv: &[u8], sequence: u64) -> TrafficKey {
    let iv: [u8; NONCE_LEN] = iv.try_into().unwrap();
    if let Ok(key) = <[u8; 32]>::try_from(key) {
        let (key, iv) = (AeadKey::from(key), Iv::from(iv));
        let secrets = ConnectionTrafficSecrets::Aes256Gcm { key, iv };
        return TrafficKey::new(secrets, sequence).unwrap();
    }
    TrafficKey {
        key: LessSafeKey::new(UnboundKey::new(&AES_128_GCM, key).unwrap()),
        iv: Zeroizing::new(iv),
        sequence,
    }
}

/// The key that RFC 8448's traffic secret gives.
fn of_secret(secret: &str, key: &str, iv: &str, sequence: u64) -> TrafficKey {
    let secret = unhex(secret);
    let derived = expand_label(hkdf::HKDF_SHA256, &secret, "key", 16);
    assert_eq!(derived, unhex(key));
    let derived_iv = expand_label(hkdf::HKDF_SHA256, &secret, "iv", NONCE_LEN);
    assert_eq!(derived_iv, unhex(iv));
    traffic_key(&derived, &derived_iv, sequence)
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

const CLIENT_SECRET: &str = "9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5";
const CLIENT_KEY: &str = "17422dda596ed5d9acd890e3c63f5051";
const CLIENT_IV: &str = "5b78923dee08579033e523d9";
const SERVER_SECRET: &str = "a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643";
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
    let mut key = of_secret(CLIENT_SECRET, CLIENT_KEY, CLIENT_IV, 0);
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
    let mut key = of_secret(SERVER_SECRET, SERVER_KEY, SERVER_IV, 1);
    assert_eq!(key.open(&mut sealed), Ok(51));
    let expected: Vec<u8> = (0..50).chain([APPLICATION_DATA]).collect();
    assert_eq!(sealed[RECORD_HEADER..RECORD_HEADER + 51], expected);

    let mut alert = unhex("1703030013 b58fd67166ebf599d24720cfbe7efa7a8864a9");
    assert_eq!(key.open(&mut alert), Ok(3));
    assert_eq!(alert[RECORD_HEADER..RECORD_HEADER + 3], [1, 0, ALERT]);
}

/// Both suites, from the traffic secret over two key updates to records, and back.
#[test]
fn records_of_another_implementation() {
    let vectors = include_str!("../../../tests/vectors/records.txt");
    let mut count = 0;
    let mut previous: Option<(Vec<u8>, &str)> = None;
    for line in vectors.lines().filter(|line| !line.starts_with('#')) {
        let fields: Vec<&str> = line.split(' ').collect();
        let [
            suite,
            secret,
            generation,
            key,
            iv,
            sequence,
            kind,
            content,
            padding,
            sealed,
        ] = fields[..]
        else {
            panic!("{line}");
        };
        let (algorithm, key_len, secret_len) = match suite {
            "AES_128_GCM_SHA256" => (hkdf::HKDF_SHA256, 16, 32),
            "AES_256_GCM_SHA384" => (hkdf::HKDF_SHA384, 32, 48),
            other => panic!("{other}"),
        };
        let secret = unhex(secret);
        match &previous {
            Some((before, number)) if *number != generation && generation != "0" => {
                let updated = expand_label(algorithm, before, "traffic upd", secret_len);
                assert_eq!(updated, secret, "{suite} {generation}");
            }
            _ => {}
        }
        assert_eq!(
            expand_label(algorithm, &secret, "key", key_len),
            unhex(key),
            "{line}"
        );
        assert_eq!(
            expand_label(algorithm, &secret, "iv", NONCE_LEN),
            unhex(iv),
            "{line}"
        );
        let (content, sealed) = (unhex(content), unhex(sealed));
        let (kind, padding): (u8, usize) = (kind.parse().unwrap(), padding.parse().unwrap());
        let new_key = || traffic_key(&unhex(key), &unhex(iv), sequence.parse().unwrap());
        let mut inner = content.clone();
        inner.push(kind);
        inner.resize(inner.len() + padding, 0);
        if padding == 0 {
            let mut ours = record(&content);
            new_key().seal(kind, &mut ours).unwrap();
            assert_eq!(ours, sealed, "{line}");
        }
        let mut opened = sealed;
        assert_eq!(new_key().open(&mut opened), Ok(inner.len()), "{line}");
        assert_eq!(opened[RECORD_HEADER..RECORD_HEADER + inner.len()], inner);
        previous = Some((secret, generation));
        count += 1;
    }
    assert_eq!(count, 42);
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
