//! Mutated byte streams: whatever a peer sends, nothing panics, everything stays bounded and the
//! caller is told only what it can act on. A fixed seed makes failures repeatable.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::collections::{BTreeSet, VecDeque};

use hbone::{Config, ConnectRequest, Connection, ErrorCode, Event, Role, StreamId};
use testkit::Random;

fn raw(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// `:authority` by the static table with Huffman code, as in RFC 7541 C.4.1, kept in the table.
const AUTHORITY: &[u8] = &[
    0x41, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff,
];
/// `:method: CONNECT`, kept in the table.
const METHOD: &[u8] = b"\x42\x07CONNECT";

fn client_frames() -> Vec<Vec<u8>> {
    let mut client = Connection::new(Role::Client, &Config::client());
    let preface = client.output().to_vec();
    client.consume_output(preface.len());
    let request = ConnectRequest {
        authority: "10.1.2.3:80",
        baggage: Some("k8s.namespace.name=x"),
        forwarded: Some("for=\"1.2.3.4:5\""),
        ..ConnectRequest::default()
    };
    client.open(&request).unwrap();
    let open = client.output().to_vec();
    vec![
        preface,
        open,
        raw(1, 4, 3, &[METHOD, AUTHORITY].concat()),
        raw(1, 5, 5, &[0xbf, 0xbe]),
        raw(1, 0, 7, METHOD),
        raw(9, 0, 7, &AUTHORITY[..3]),
        raw(9, 4, 7, &AUTHORITY[3..]),
        raw(
            1,
            0x2c,
            9,
            &[&[2, 0, 0, 0, 0, 9], METHOD, AUTHORITY, &[0, 0]].concat(),
        ),
        raw(0, 0, 1, &[7; 200]),
        raw(0, 8, 3, &[[9].as_slice(), &[1; 40]].concat()),
        raw(0, 1, 1, b"end"),
        raw(8, 0, 0, &[0, 1, 0, 0]),
        raw(8, 0, 3, &[0, 0, 1, 0]),
        raw(
            4,
            0,
            0,
            &[0, 4, 0, 0, 0x20, 0, 0, 5, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0],
        ),
        raw(4, 1, 0, &[]),
        raw(6, 0, 0, b"pingping"),
        raw(3, 0, 3, &[0, 0, 0, 8]),
        raw(2, 0, 3, &[0; 5]),
        raw(0x55, 3, 1, &[3; 30]),
        raw(7, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 0, b'd']),
    ]
}

fn server_frames() -> Vec<Vec<u8>> {
    vec![
        raw(4, 0, 0, &[0, 3, 0, 0, 0, 50, 0, 4, 0, 0, 0x10, 0]),
        raw(4, 1, 0, &[]),
        raw(1, 4, 1, &[0x88]),
        raw(1, 4, 3, b"\x48\x03503"),
        raw(1, 5, 5, &[0xbe]),
        raw(1, 5, 3, b"\x40\x01a\x01b"),
        raw(0, 0, 1, &[7; 300]),
        raw(0, 9, 1, &[[200].as_slice(), &[1; 240]].concat()),
        raw(8, 0, 0, &[0, 1, 0, 0]),
        raw(8, 0, 1, &[0, 0, 1, 0]),
        raw(6, 1, 0, b"pingping"),
        raw(3, 0, 7, &[0, 0, 0, 7]),
        raw(7, 0, 0, &[0, 0, 0, 5, 0, 0, 0, 0]),
    ]
}

/// Reorders and repeats some frames and damages some bytes. The first frame stays in front, so
/// that most inputs get beyond it.
fn mutate(frames: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut order: Vec<usize> = (0..frames.len()).collect();
    for _ in 0..random.below(6) {
        let (a, b) = (
            1 + random.below(frames.len() - 1),
            1 + random.below(frames.len() - 1),
        );
        match random.below(3) {
            0 => order.swap(a, b),
            1 => order[a] = order[b],
            _ => order.extend(vec![a; random.below(30)]),
        }
    }
    let mut bytes: Vec<u8> = order
        .iter()
        .flat_map(|&at| frames[at].iter().copied())
        .collect();
    for _ in 0..random.below(5) {
        let at = frames[0].len() / 2 + random.below(bytes.len());
        let Some(byte) = bytes.get_mut(at) else {
            continue;
        };
        match random.below(5) {
            0 => *byte = random.below(256) as u8,
            1 => *byte ^= 1 << random.below(8),
            2 => drop(bytes.remove(at)),
            3 => bytes.insert(at, random.below(256) as u8),
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// A caller that does something with every event, and checks what it is told.
struct Caller {
    connection: Connection,
    role: Role,
    open: BTreeSet<StreamId>,
    /// Streams to reset once the events that are already there are handled.
    ended: Vec<StreamId>,
}

impl Caller {
    fn new(role: Role) -> Self {
        let config = match role {
            Role::Client => Config::client(),
            Role::Server => Config::server(),
        };
        let mut connection = Connection::new(role, &config);
        let request = ConnectRequest {
            authority: "a:1",
            ..ConnectRequest::default()
        };
        let mut open = BTreeSet::new();
        if role == Role::Client {
            open.extend((0..5).map(|_| connection.open(&request).unwrap()));
        }
        Self {
            connection,
            role,
            open,
            ended: Vec::new(),
        }
    }

    fn run(mut self, bytes: &[u8], random: &mut Random) -> Option<ErrorCode> {
        let mut events = VecDeque::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at(1 + random.below(rest.len().min(600)));
            let outcome = self.connection.receive(piece, &mut events);
            assert!(
                events.len() <= piece.len() + 200,
                "events are bounded by the input"
            );
            while let Some(event) = events.pop_front() {
                self.on_event(event, piece.len(), outcome.is_err(), random);
            }
            for id in self.ended.drain(..) {
                self.connection.reset(id, ErrorCode::CANCEL);
                self.open.remove(&id);
            }
            assert!(self.connection.output().len() < 64 << 10);
            if let Err(error) = outcome {
                assert!(self.connection.is_closed());
                assert_eq!(self.connection.active_streams(), 0);
                assert!(!error.to_string().contains('\n'));
                return Some(error.code());
            }
            let len = self.connection.output().len();
            self.connection.consume_output(random.below(len + 1));
            assert_eq!(self.connection.active_streams(), self.open.len());
            rest = tail;
        }
        None
    }

    fn on_event(&mut self, event: Event, input: usize, failed: bool, random: &mut Random) {
        match event {
            Event::Request { id, head } => {
                assert_eq!(self.role, Role::Server);
                assert!(!head.method.is_empty() || !head.is_connect());
                assert!(self.open.insert(id), "a stream opens once");
                if !failed && random.below(2) == 0 {
                    // The peer may have reset the stream later in the same input.
                    let _ = self.connection.respond(id, 200, None, false);
                }
            }
            Event::Data { id, range } => {
                assert!(range.start < range.end && range.end <= input);
                assert!(self.open.contains(&id), "DATA on a closed stream");
                if !failed && random.below(3) > 0 {
                    self.connection.release(id, range.len());
                }
            }
            Event::Reset { id, .. } => {
                assert!(self.open.remove(&id), "a stream is reset once");
            }
            Event::End { id } => {
                assert!(self.open.contains(&id), "the end of a closed stream");
                self.ended.push(id);
            }
            Event::Writable { id } => {
                let room = self
                    .connection
                    .send_capacity(id)
                    .min(self.connection.max_data_len());
                if room > 0 {
                    self.connection
                        .data_header(id, 1 + random.below(room), false)
                        .unwrap();
                }
            }
            Event::Response { id, status, .. } => {
                assert_eq!(self.role, Role::Client);
                assert!(self.open.contains(&id) && (200..=999).contains(&status));
            }
            Event::GoAway { .. } | Event::Settings | Event::Pong(_) => {}
        }
    }
}

#[test]
fn mutated_streams_do_no_harm() {
    let (client_frames, server_frames) = (client_frames(), server_frames());
    let mut codes = BTreeSet::new();
    let mut survived = 0;
    for round in 0..ROUNDS as u64 {
        for (role, frames, seed) in [
            (Role::Server, &client_frames, 2 * round),
            (Role::Client, &server_frames, 2 * round + 1),
        ] {
            let outcome = std::panic::catch_unwind(|| {
                let mut random = Random::new(seed);
                let bytes = mutate(frames, &mut random);
                Caller::new(role).run(&bytes, &mut random)
            });
            match outcome {
                Ok(Some(code)) => drop(codes.insert(code.0)),
                Ok(None) => survived += 1,
                Err(panic) => {
                    eprintln!("{role:?} with seed {seed}");
                    std::panic::resume_unwind(panic);
                }
            }
        }
    }
    assert!(
        survived > ROUNDS / 10,
        "most inputs should reach the end: {survived}"
    );
    let expected = [1, 3, 5, 6, 9, 11];
    assert!(
        expected.iter().all(|code| codes.contains(code)),
        "codes seen: {codes:?}"
    );
}

#[test]
fn noise_does_no_harm() {
    let mut random = Random::new(77);
    let preface = &client_frames()[0];
    for _ in 0..ROUNDS / 4 {
        let noise: Vec<u8> = (0..random.below(400))
            .map(|_| random.below(256) as u8)
            .collect();
        Caller::new(Role::Client).run(&noise, &mut random);
        Caller::new(Role::Server).run(&[preface, &noise[..]].concat(), &mut random);
        // A header block of noise: HPACK sees all of it.
        let block = raw(1, 4, 1, &noise);
        Caller::new(Role::Server).run(&[preface, &block[..]].concat(), &mut random);
    }
}

const ROUNDS: usize = 10_000;
