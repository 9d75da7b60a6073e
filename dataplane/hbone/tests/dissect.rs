//! Wireshark's dissector, whose HPACK is nghttp2's, reads what our codec sends: every frame and
//! header field as meant, and nothing to complain about.
//!
//! Needs `tshark`. Skipped by name without it.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::collections::VecDeque;
use std::fs;
use std::process::Command;

use hbone::{Config, ConnectRequest, Connection, ErrorCode, Event, Role, StreamId};

/// One direction of the captured connection.
struct Side {
    codec: Connection,
    /// Everything sent, in the order of the wire.
    sent: Vec<u8>,
}

impl Side {
    fn new(role: Role) -> Self {
        let config = match role {
            Role::Client => Config::client(),
            Role::Server => Config::server(),
        };
        Self {
            codec: Connection::new(role, &config),
            sent: Vec::new(),
        }
    }

    fn flush(&mut self) {
        self.sent.extend_from_slice(self.codec.output());
        self.codec.consume_output(self.codec.output().len());
    }

    fn data(&mut self, id: StreamId, payload: &[u8], end: bool) {
        self.flush();
        let header = self.codec.data_header(id, payload.len(), end).unwrap();
        self.sent.extend_from_slice(&header);
        self.sent.extend_from_slice(payload);
    }
}

/// Ethernet, IPv4 and TCP around pieces of a byte stream, as a pcap file.
struct Capture {
    file: Vec<u8>,
    /// Bytes sent so far, by direction.
    sequence: [u32; 2],
}

impl Capture {
    fn new() -> Self {
        let mut file = Vec::new();
        for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65_535, 1] {
            file.extend(word.to_ne_bytes());
        }
        let mut capture = Self {
            file,
            sequence: [1, 1],
        };
        capture.packet(0, 0x02, &[]);
        capture.packet(1, 0x12, &[]);
        capture.sequence = [2, 2];
        capture
    }

    fn packet(&mut self, from: usize, flags: u8, payload: &[u8]) {
        let length = 40 + payload.len() as u16;
        let mut packet = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0];
        packet.extend(length.to_be_bytes());
        packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        let ends = [[10, 0, 0, 1], [10, 0, 0, 2]];
        packet.extend(ends[from]);
        packet.extend(ends[1 - from]);
        let ports = [40_000_u16, 15_008];
        packet.extend(ports[from].to_be_bytes());
        packet.extend(ports[1 - from].to_be_bytes());
        packet.extend(self.sequence[from].to_be_bytes());
        packet.extend(self.sequence[1 - from].to_be_bytes());
        packet.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        packet.extend(payload);
        self.sequence[from] += payload.len() as u32;
        let length = packet.len() as u32;
        for word in [1, 0, length, length] {
            self.file.extend(word.to_ne_bytes());
        }
        self.file.extend(packet);
    }

    /// What both sides have to say now, each heard by the other.
    fn exchange(&mut self, sides: &mut [Side; 2]) -> Vec<Event> {
        let mut events = VecDeque::new();
        for from in [0, 1] {
            sides[from].flush();
            let sent = std::mem::take(&mut sides[from].sent);
            for piece in sent.chunks(1400) {
                self.packet(from, 0x18, piece);
            }
            sides[1 - from].codec.receive(&sent, &mut events).unwrap();
        }
        events.into()
    }
}

const BAGGAGE: &str = "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,service.name=web";

fn conversation() -> Vec<u8> {
    let mut capture = Capture::new();
    let mut sides = [Side::new(Role::Client), Side::new(Role::Server)];
    capture.exchange(&mut sides);
    let long = "x".repeat(14_000);
    let open = |side: &mut Side, authority, baggage| {
        let request = ConnectRequest {
            authority,
            baggage: Some(baggage),
            forwarded: Some("for=\"10.244.1.11:40312\";host=web.shop"),
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"),
            x_forwarded_network: None,
        };
        side.codec.open(&request).unwrap()
    };
    let first = open(&mut sides[0], "10.244.2.11:8080", BAGGAGE);
    let second = open(&mut sides[0], "[fd00::1]:80", &long);
    let third = open(&mut sides[0], "web.shop.svc.cluster.local:80", BAGGAGE);
    capture.exchange(&mut sides);
    let [client, server] = &mut sides;
    server
        .codec
        .respond(first, 200, Some(BAGGAGE), false)
        .unwrap();
    server.codec.respond(second, 200, None, false).unwrap();
    server.codec.respond(third, 503, None, true).unwrap();
    client.codec.ping(*b"12345678");
    capture.exchange(&mut sides);
    for round in 0..40 {
        sides[0].data(first, &vec![round; 16_375], false);
        sides[1].data(second, &vec![round; 1_000], round == 39);
        for event in capture.exchange(&mut sides) {
            if let Event::Data { id, range } = event {
                let to = usize::from(id == first);
                sides[to].codec.release(id, range.len());
            }
        }
    }
    sides[0].data(first, &[], true);
    sides[0].codec.reset(second, ErrorCode::CANCEL);
    capture.exchange(&mut sides);
    sides[1].data(first, b"bye", true);
    sides[1].codec.shutdown_graceful();
    for _ in 0..3 {
        capture.exchange(&mut sides);
    }
    capture.file
}

fn tshark(path: &std::path::Path, arguments: &[&str]) -> String {
    let output = Command::new("tshark")
        .args(["-r", path.to_str().unwrap(), "-d", "tcp.port==15008,http2"])
        .args([
            "-o",
            "tcp.check_checksum:FALSE",
            "-o",
            "ip.check_checksum:FALSE",
        ])
        .args(arguments)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn tshark_understands_every_frame() {
    if Command::new("tshark").arg("-v").output().is_err() {
        eprintln!("skipped: tshark_understands_every_frame: no tshark (apt-get install tshark)");
        return;
    }
    let path = std::env::temp_dir().join(format!("hbone-{}.pcap", std::process::id()));
    fs::write(&path, conversation()).unwrap();
    let complaints = tshark(
        &path,
        &["-Y", "_ws.malformed || _ws.expert.severity >= 6291456"],
    );
    let field = |name: &str| -> Vec<String> {
        let text = tshark(&path, &["-Y", "http2", "-T", "fields", "-e", name]);
        text.split(['\n', ','])
            .filter(|value| !value.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let (authorities, statuses) = (
        field("http2.headers.authority"),
        field("http2.headers.status"),
    );
    let (kinds, codes) = (field("http2.type"), field("http2.rst_stream.error"));
    let baggage = tshark(
        &path,
        &[
            "-Y",
            "http2.header.name == \"baggage\"",
            "-T",
            "fields",
            "-E",
            "aggregator=;",
            "-e",
            "http2.header.value",
        ],
    );
    fs::remove_file(&path).unwrap();
    assert_eq!(complaints, "");
    let expected = [
        "10.244.2.11:8080",
        "[fd00::1]:80",
        "web.shop.svc.cluster.local:80",
    ];
    assert_eq!(authorities, expected);
    assert_eq!(statuses, ["200", "200", "503"]);
    assert_eq!(codes, ["8"]);
    assert!(
        baggage.contains(BAGGAGE) && baggage.contains(&"x".repeat(14_000)),
        "{baggage}"
    );
    let count = |kind: &str| kinds.iter().filter(|found| *found == kind).count();
    // DATA, HEADERS, RST_STREAM, SETTINGS and acknowledgements, PING, GOAWAY, WINDOW_UPDATE.
    assert_eq!(count("0"), 40 + 40 + 1 + 1);
    assert_eq!(count("1"), 6);
    assert_eq!((count("3"), count("4")), (1, 4));
    assert_eq!(count("6"), 4);
    assert_eq!(count("7"), 2);
    assert!(count("8") >= 2);
}
