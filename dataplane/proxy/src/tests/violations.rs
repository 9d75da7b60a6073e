//! What peers with a certificate must not do, over real sockets: each ends with the code the
//! standards ask for, memory that stays bounded, and a count of its reason.

use std::io::Write;
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use hbone::{Config, Connection, ErrorCode, Role};
use identity::WorkloadTls;
use rt::net::Listener;
use telemetry::Fault;

use super::peer::{Peer, Received, frame};
use super::{certificate, listen, registry, request, run, serve_with, store};
use crate::tunnel::TunnelError;

/// How a connection ended for the peer.
#[derive(Debug, Default)]
struct End {
    /// Code of the GOAWAY.
    go_away: Option<u32>,
    /// Codes of the RST_STREAMs.
    resets: Vec<u32>,
    close_notify: bool,
    alert: Option<String>,
}

impl End {
    /// Reads to the end and takes note of what was said.
    fn of(mut peer: Peer) -> Self {
        let (mut end, mut all) = (Self::default(), Vec::new());
        while let Some(received) = peer.receive() {
            match received {
                Received::Data(piece) => all.extend_from_slice(&piece),
                Received::Control => {}
                Received::Closed => end.close_notify = true,
                Received::Failed(told) => {
                    end.alert = Some(told);
                    break;
                }
            }
        }
        let mut rest = &all[..];
        while let [a, b, c, kind, _, _, _, _, _, payload @ ..] = rest {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            let word = |at| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
            match kind {
                3 => end.resets.push(word(0)),
                7 => end.go_away = Some(word(4)),
                _ => {}
            }
            rest = &payload[length..];
        }
        end
    }
}

/// Preface, SETTINGS and what else an honest client begins with, and one CONNECT.
fn honest() -> Vec<u8> {
    let mut codec = Connection::new(Role::Client, &Config::client());
    codec.open(&request()).unwrap();
    codec.output().to_vec()
}

/// Serves one tunnel for `peer`. Returns how it ended for the peer and for us, and every fault the
/// worker counted.
fn served<T: Send + 'static>(
    peer: impl FnOnce(SocketAddr, Arc<WorkloadTls>) -> T + Send + 'static,
) -> (T, TunnelError, Vec<Fault>) {
    let (listener, addr) = listen();
    let tls = certificate(&store());
    let thread = thread::spawn({
        let tls = Arc::clone(&tls);
        move || peer(addr, tls)
    });
    let (error, faults) = run(async {
        let accepted = Listener::from_std(listener).accept().await.unwrap();
        let telemetry = registry();
        let config = Config::server();
        let (tunnel, requests) = serve_with(accepted, &tls, &config, &telemetry).await;
        let error = loop {
            rt::time::sleep(Duration::from_millis(2)).await;
            // Streams the peer has given up are dropped, as their tasks would do.
            requests.clear();
            if let Some(error) = tunnel.error() {
                break error;
            }
        };
        while !tunnel.has_ended() {
            rt::time::sleep(Duration::from_millis(2)).await;
        }
        let count = |fault: &Fault| telemetry.hbone_errors(*fault) > 0;
        (error, Fault::ALL.into_iter().filter(count).collect())
    });
    (thread.join().unwrap(), error, faults)
}

/// An honest beginning, then `bytes`, again and again if need be; to the end.
fn sends(bytes: &[u8], times: u32) -> (End, TunnelError, Vec<Fault>) {
    let bytes = bytes.to_vec();
    served(move |addr, tls| {
        let mut peer = Peer::connect(addr, &tls);
        peer.send(&honest()).unwrap();
        // What does not fit any more says that the tunnel has ended.
        let _ = (0..times).try_for_each(|_| peer.send(&bytes));
        End::of(peer)
    })
}

/// `frames` break HTTP/2: GOAWAY with `code`, counted as `fault`.
#[track_caller]
fn breaks(name: &str, frames: &[u8], times: u32, code: ErrorCode, fault: Fault) {
    let (end, error, faults) = sends(frames, times);
    assert!(matches!(error, TunnelError::Http2(_)), "{name}: {error}");
    assert!(faults.contains(&fault), "{name}: {faults:?}");
    // A peer that sends on while we close may lose the GOAWAY to a reset.
    if times == 1 {
        assert_eq!(end.go_away, Some(code.0), "{name}: {end:?}");
        assert!(end.close_notify, "{name}: {end:?}");
    }
}

#[test]
fn what_breaks_http2_is_told_and_counted() {
    let ping = frame(6, 0, 0, &[0; 8]);
    let settings = frame(4, 0, 0, &[]);
    let calm = ErrorCode::ENHANCE_YOUR_CALM;
    let continuation = [frame(1, 0, 3, &[0x82]), frame(9, 0, 3, &[]).repeat(100)].concat();
    // A field of 4 KiB in the table, then a reference to it as often as a block admits.
    let mut bomb = vec![0x40, 1, b'a', 0x7f, 0x80 + 0x41, 0x1e];
    bomb.extend(vec![b'b'; 4032]);
    bomb.extend(vec![0xbe; 12_000]);
    let bomb = frame(1, 4, 3, &bomb);
    let increment = 0x7fff_ffff_u32.to_be_bytes();
    let cases: [(&str, Vec<u8>, ErrorCode, Fault); 10] = [
        ("CONTINUATION flood", continuation, calm, Fault::Flood),
        ("PING flood", ping.repeat(2_000), calm, Fault::Flood),
        ("SETTINGS flood", settings.repeat(2_000), calm, Fault::Flood),
        (
            "empty DATA flood",
            frame(0, 0, 1, &[]).repeat(4_000),
            calm,
            Fault::Flood,
        ),
        ("rapid reset", rapid_reset(), calm, Fault::Flood),
        (
            "oversized header block",
            frame(1, 4, 3, &vec![0; 70_000]),
            calm,
            Fault::Flood,
        ),
        (
            "bad HPACK index",
            frame(1, 4, 3, &[0xff, 0xff, 0xff, 0x7f]),
            ErrorCode::COMPRESSION_ERROR,
            Fault::Compression,
        ),
        (
            "window overflow",
            frame(8, 0, 0, &increment),
            ErrorCode::FLOW_CONTROL_ERROR,
            Fault::FlowControl,
        ),
        (
            "frame above the maximum",
            vec![0xff, 0, 0, 0, 0, 0, 0, 0, 1],
            ErrorCode::FRAME_SIZE_ERROR,
            Fault::FrameSize,
        ),
        (
            "DATA on a stream that never was",
            frame(0, 0, 9, b"x"),
            ErrorCode::PROTOCOL_ERROR,
            Fault::Protocol,
        ),
    ];
    for (name, frames, code, fault) in cases {
        breaks(name, &frames, 1, code, fault);
    }
    // An HPACK bomb ends its stream only; the table and the list are bounded.
    let (end, _, faults) = sends(&[bomb, frame(7, 0, 0, &[0; 8])].concat(), 1);
    assert!(
        end.resets.contains(&ErrorCode::ENHANCE_YOUR_CALM.0),
        "{end:?}"
    );
    assert!(faults.contains(&Fault::Stream), "{faults:?}");
}

fn rapid_reset() -> Vec<u8> {
    let mut codec = Connection::new(Role::Client, &Config::client());
    codec.consume_output(codec.output().len());
    let mut frames = Vec::new();
    for _ in 0..1_000 {
        let id = codec.open(&request()).unwrap();
        codec.reset(id, ErrorCode::CANCEL);
        frames.extend_from_slice(codec.output());
        codec.consume_output(codec.output().len());
    }
    // The first identifier is that of the honest request.
    frames[frames_of(&frames, 2)..].to_vec()
}

/// Where the frame number `n` begins.
fn frames_of(frames: &[u8], n: usize) -> usize {
    (0..n).fold(0, |at, _| {
        at + 9 + u32::from_be_bytes([0, frames[at], frames[at + 1], frames[at + 2]]) as usize
    })
}

/// Floods that go on and on, from a peer that reads nothing meanwhile.
#[test]
fn floods_end_also_when_nothing_is_read() {
    let calm = ErrorCode::ENHANCE_YOUR_CALM;
    let many = frame(6, 0, 0, &[0; 8]).repeat(900);
    breaks("PING", &many, 10_000, calm, Fault::Flood);
}

#[test]
fn another_protocol_is_told_and_counted() {
    let (end, error, faults) = served(|addr, tls| {
        let mut peer = Peer::connect(addr, &tls);
        peer.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
        End::of(peer)
    });
    assert!(matches!(error, TunnelError::Http2(_)), "{error}");
    assert_eq!(end.go_away, Some(ErrorCode::PROTOCOL_ERROR.0));
    assert_eq!(faults, [Fault::Preface]);
}

/// Changes the records of an honest client on their way.
fn tampered(
    change: impl FnOnce(&mut Vec<u8>) + Send + 'static,
    stay: bool,
) -> (End, TunnelError, Vec<Fault>) {
    served(move |addr, tls| {
        let mut peer = Peer::connect(addr, &tls);
        let mut record = peer.record(&honest());
        change(&mut record);
        peer.stream.write_all(&record).unwrap();
        if !stay {
            peer.stream.shutdown(Shutdown::Write).unwrap();
        }
        End::of(peer)
    })
}

#[test]
fn what_breaks_tls_is_told_by_alert_and_counted() {
    type Change = fn(&mut Vec<u8>);
    let cases: [(&str, Change, &str); 4] = [
        ("altered", |record| record[40] ^= 1, "BadRecordMac"),
        // A TLS 1.2 HelloRequest, which asks for renegotiation.
        (
            "renegotiation",
            |record| *record = vec![22, 3, 3, 0, 4, 0, 0, 0, 0],
            "UnexpectedMessage",
        ),
        (
            "too long",
            |record| record[3..5].copy_from_slice(&[0xff, 0xff]),
            "RecordOverflow",
        ),
        ("plain text", |record| record[0] = b'G', "UnexpectedMessage"),
    ];
    for (name, change, alert) in cases {
        let (end, error, faults) = tampered(change, true);
        assert!(matches!(error, TunnelError::Tls(_)), "{name}: {error}");
        assert_eq!(faults, [Fault::TlsRecord], "{name}");
        let told = end.alert.unwrap_or_default();
        assert!(told.contains(alert), "{name}: {told}");
    }
}

#[test]
fn a_cut_off_connection_is_not_a_closed_one() {
    for keep in [100, 3, usize::MAX] {
        let cut = move |record: &mut Vec<u8>| record.truncate(keep);
        let (_, error, faults) = tampered(cut, false);
        assert!(matches!(error, TunnelError::Truncated), "{keep}: {error}");
        assert_eq!(faults, [Fault::Truncated], "{keep}");
    }
    let (_, error, faults) = served(|addr, tls| {
        let mut peer = Peer::connect(addr, &tls);
        let mut bytes = peer.record(&honest());
        peer.session.close_notify(&mut bytes);
        peer.stream.write_all(&bytes).unwrap();
        End::of(peer)
    });
    assert!(matches!(error, TunnelError::Closed), "{error}");
    assert_eq!(faults, []);
}

/// A peer that updates its keys, or sends nothing but padding, makes us work a bounded time.
#[test]
fn endless_key_updates_are_stopped() {
    let (end, error, faults) = served(|addr, tls| {
        let mut peer = Peer::connect(addr, &tls);
        let mut bytes = peer.record(&honest());
        for _ in 0..100 {
            peer.session.update_keys(true);
            peer.session.take_control_output(&mut bytes);
        }
        peer.stream.write_all(&bytes).unwrap();
        End::of(peer)
    });
    assert!(matches!(error, TunnelError::Tls(_)), "{error}");
    assert_eq!(faults, [Fault::TlsRecord]);
    assert!(
        end.alert
            .is_some_and(|alert| alert.contains("UnexpectedMessage")),
        "{error}"
    );
}
