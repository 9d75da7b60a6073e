//! What is fuzzed, without a fuzzer: each function takes any bytes and panics if they do harm.
//!
//! `cargo +nightly fuzz run records` (in `dataplane/tls`) searches with libFuzzer; the tests of
//! `tls` run the same functions on stable, over the committed corpus and seeded mutations of it.
#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::time::Duration;

use mesh::Identity;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose};
use tls::{Authority, ClientSettings, Handshake, OpenError, Opened, ServerSettings, Session};

/// Output of a handshake for a peer that sends what it likes, in bytes.
const OUTPUT_MAX: usize = 16 << 10;

fn identity() -> Identity {
    Identity::new("cluster.local", "default", "app").expect("a valid identity")
}

/// One workload's settings in both roles, made once.
fn settings() -> &'static (ClientSettings, ServerSettings) {
    static SETTINGS: OnceLock<(ClientSettings, ServerSettings)> = OnceLock::new();
    SETTINGS.get_or_init(|| {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate").pem();
        let key = key.serialize_pem();
        let authority = Authority::from_pem(certificate.as_bytes(), key.as_bytes());
        let issued = authority
            .expect("an authority")
            .issue(&identity(), Duration::from_secs(3600));
        tls::settings::both(&issued.expect("a certificate")).expect("settings")
    })
}

/// Bytes of a peer during the handshake, to both roles, in pieces whose size the first byte
/// decides. A session must not come of it: the bytes know no key.
pub fn handshake(data: &[u8]) {
    let Some((&cut, bytes)) = data.split_first() else {
        return;
    };
    let (client, server) = settings();
    let sides = [
        Handshake::client(client, &identity()).expect("a client"),
        Handshake::server(server).expect("a server"),
    ];
    for mut side in sides {
        let mut output = Vec::new();
        let first = side
            .advance(&[], &mut output)
            .expect("nothing is wrong yet");
        assert!(first.established.is_none());
        for piece in bytes.chunks(usize::from(cut).max(1) * 8) {
            let progress = side.advance(piece, &mut output);
            assert!(
                output.len() <= OUTPUT_MAX,
                "{} bytes of output",
                output.len()
            );
            match progress {
                Ok(progress) => {
                    assert!(progress.established.is_none(), "a session out of nothing");
                    assert_eq!(progress.consumed, piece.len());
                }
                Err(error) => {
                    assert!(!error.to_string().contains('\n'));
                    assert!(side.advance(piece, &mut output).is_err(), "over means over");
                    break;
                }
            }
        }
    }
}

/// Two sessions that have shaken hands, the client's first.
fn sessions() -> [Session; 2] {
    let (client, server) = settings();
    let mut near = Handshake::client(client, &identity()).expect("a client");
    let mut far = Handshake::server(server).expect("a server");
    let (mut up, mut down) = (Vec::new(), Vec::new());
    near.advance(&[], &mut up).expect("hello");
    let (mut first, mut second) = (None, None);
    while first.is_none() || second.is_none() {
        if second.is_none() {
            let input = std::mem::take(&mut up);
            second = far.advance(&input, &mut down).expect("honest").established;
        }
        if first.is_none() {
            let input = std::mem::take(&mut down);
            first = near.advance(&input, &mut up).expect("honest").established;
        }
    }
    let established = "the loop ends when both are";
    [first.expect(established), second.expect(established)]
}

/// What two sessions do to each other as the bytes say: records of any size, key updates, the end;
/// and records altered, cut, repeated or made up, which must be noticed. Until then every byte
/// arrives, and after it nothing does.
pub fn records(data: &[u8]) {
    let mut sides = sessions();
    let mut sealed = [0_u8; 2];
    // Once a record of a direction was lost or altered its next ones do not open either.
    let mut honest = [true; 2];
    for op in data.chunks_exact(3).take(300) {
        let from = usize::from(op[0] >> 7);
        let size = usize::from(op[1]) << (op[0] >> 4 & 7);
        sealed[from] = sealed[from].wrapping_add(1);
        let mut wire = Vec::new();
        sides[from].take_control_output(&mut wire);
        let fill = sealed[from];
        match op[0] & 15 {
            0..=8 => {
                let start = wire.len();
                let size = size.min(Session::MAX_PLAINTEXT);
                let total = Session::RECORD_HEADER + size + Session::RECORD_TRAILER;
                wire.resize(start + total, fill);
                if sides[from].seal(&mut wire[start..]).is_err() {
                    wire.truncate(start);
                }
            }
            9 => sides[from].update_keys(op[1] & 1 == 1),
            10 => sides[from].close_notify(&mut wire),
            11 => wire.extend_from_slice(data),
            _ => {}
        }
        let alter = op[0] & 15 >= 11 || op[2] >= 250;
        if alter && !wire.is_empty() {
            honest[from] = false;
            let at = usize::from(op[1]) % wire.len();
            match op[2] % 3 {
                0 => wire[at] ^= 1 << (op[2] & 7),
                1 => wire.truncate(at),
                _ => wire.extend_from_within(..),
            }
        }
        if !deliver(
            &mut sides[1 - from],
            &mut wire,
            honest[from].then_some(fill),
        ) {
            return;
        }
    }
}

/// Opens all records in `wire`; with `fill`, they hold nothing else. False when the session ended.
fn deliver(to: &mut Session, wire: &mut [u8], fill: Option<u8>) -> bool {
    let mut rest = wire;
    loop {
        let len = match Session::record_len(rest) {
            Ok(Some(len)) if len <= rest.len() => len,
            Ok(_) => return true,
            Err(error) => {
                assert!(fill.is_none(), "{error}");
                return false;
            }
        };
        let (record, behind) = rest.split_at_mut(len);
        match to.open(record) {
            Ok(Opened::Data(range)) => {
                let plaintext = &record[range];
                assert!(plaintext.len() <= Session::MAX_PLAINTEXT);
                assert!(fill.is_none_or(|fill| plaintext.iter().all(|byte| *byte == fill)));
            }
            Ok(Opened::Handled) => {}
            Ok(Opened::Closed) => return false,
            Err(error) => {
                // 33 key updates in a row are too many from an honest side as well.
                let noticed = fill.is_none() || error == OpenError::TooManyWithoutData;
                assert!(noticed, "an honest record is refused: {error}");
                assert_eq!(to.open(record), Err(OpenError::Failed), "over means over");
                let mut alert = Vec::new();
                to.take_control_output(&mut alert);
                assert!(alert.len() <= 64 && !to.has_control_output());
                return false;
            }
        }
        rest = behind;
    }
}
