//! What is fuzzed, without a fuzzer: each function takes any bytes and panics if they do harm.
//!
//! `cargo +nightly fuzz run frames` (in `dataplane/hbone`) searches with libFuzzer; the tests of
//! `hbone` run the same functions on stable, over the committed corpus and seeded mutations of it.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use hbone::{Config, ConnectRequest, Connection, ErrorCode, Event, Role, StreamId};

/// The client preface and empty SETTINGS.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// A connection holds no more than this for a peer that sends what it likes.
const OUTPUT_MAX: usize = 64 << 10;

fn request() -> ConnectRequest<'static> {
    ConnectRequest {
        authority: "10.0.0.1:80",
        ..ConnectRequest::default()
    }
}

/// A connection, and a caller that does what it is told.
struct Side {
    connection: Connection,
    events: VecDeque<Event>,
    open: Vec<StreamId>,
    failed: bool,
}

impl Side {
    fn new(role: Role) -> Self {
        let config = match role {
            Role::Client => Config::client(),
            Role::Server => Config::server(),
        };
        let mut connection = Connection::new(role, &config);
        let mut open = Vec::new();
        if role == Role::Client {
            open.extend((0..3).filter_map(|_| connection.open(&request()).ok()));
        }
        Self {
            connection,
            events: VecDeque::new(),
            open,
            failed: false,
        }
    }

    /// Takes one piece of input. Every range must lie in it and belong to an open stream.
    fn receive(&mut self, input: &[u8]) {
        let result = self.connection.receive(input, &mut self.events);
        let mut ended = Vec::new();
        while let Some(event) = self.events.pop_front() {
            match event {
                Event::Request { id, .. } => {
                    assert!(!self.open.contains(&id), "{id:?} opens twice");
                    self.open.push(id);
                    // Fails if it was reset further on in the same input.
                    let _ = self.connection.respond(id, 200, None, false);
                }
                Event::Data { id, range } => {
                    assert!(range.start < range.end && range.end <= input.len());
                    assert!(self.open.contains(&id), "DATA of {id:?}, which is not open");
                    self.connection.release(id, range.len());
                }
                Event::Reset { id, .. } => {
                    assert!(self.open.contains(&id), "{id:?} is reset and not open");
                    self.open.retain(|open| *open != id);
                }
                Event::End { id } => {
                    assert!(self.open.contains(&id), "{id:?} ends and is not open");
                    ended.push(id);
                }
                Event::Response { id, .. } | Event::Writable { id } => {
                    assert!(self.open.contains(&id), "{id:?} is not open");
                }
                Event::GoAway { .. } | Event::Settings | Event::Pong(_) => {}
            }
        }
        // Answered behind the last event: the peer may have done more to the stream since.
        for id in ended {
            if self.connection.data_header(id, 0, true).is_err() {
                self.connection.reset(id, ErrorCode::CANCEL);
            }
            self.open.retain(|open| *open != id);
        }
        assert!(
            self.connection.output().len() <= OUTPUT_MAX,
            "replies pile up"
        );
        if let Err(error) = result {
            assert!(self.connection.is_closed() && self.connection.active_streams() == 0);
            assert!(!error.to_string().contains('\n'));
            self.failed = true;
        } else if !self.connection.is_closed() {
            assert_eq!(self.connection.active_streams(), self.open.len());
        }
    }
}

/// Bytes of a peer, to both roles, in pieces whose size the first byte decides. However they are
/// cut, the outcome is the same.
pub fn frames(data: &[u8]) {
    let Some((&cut, bytes)) = data.split_first() else {
        return;
    };
    for role in [Role::Server, Role::Client] {
        let preface = match role {
            Role::Server => PREFACE,
            Role::Client => &PREFACE[24..],
        };
        let mut side = Side::new(role);
        side.receive(preface);
        for piece in bytes.chunks(usize::from(cut).max(1)) {
            if side.failed {
                break;
            }
            side.receive(piece);
            let n = side.connection.output().len();
            side.connection.consume_output(n);
        }
    }
}

/// Header blocks, one after the other on one connection so that the dynamic table lives on. The
/// first byte decides how long they are.
pub fn hpack(data: &[u8]) {
    let Some((&size, bytes)) = data.split_first() else {
        return;
    };
    let mut side = Side::new(Role::Server);
    side.receive(PREFACE);
    for (number, block) in (0_u32..).zip(bytes.chunks(usize::from(size).max(1) * 4)) {
        if side.failed {
            return;
        }
        // In two frames, cut in the middle.
        let (front, back) = block.split_at(block.len() / 2);
        let id = 2 * number + 1;
        let mut input = frame(1, 0, id, front);
        input.extend(frame(9, 4, id, back));
        side.receive(&input);
        for id in std::mem::take(&mut side.open) {
            side.connection.reset(id, ErrorCode::CANCEL);
        }
        let n = side.connection.output().len();
        side.connection.consume_output(n);
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, a, b, c] = (payload.len() as u32).to_be_bytes();
    let mut frame = vec![a, b, c, kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Two honest ends that do what the bytes say, over a transport that cuts anywhere: neither may
/// find the other at fault, and in the end all streams are gone and all credit is back.
pub fn streams(data: &[u8]) {
    let small = |config| Config {
        stream_window: 3_000,
        connection_window: 65_535,
        max_concurrent_streams: 5,
        ..config
    };
    let mut ends = [
        End::new(Role::Client, &small(Config::client())),
        End::new(Role::Server, &small(Config::server())),
    ];
    for op in data.chunks_exact(2).take(2_000) {
        let at = usize::from(op[0] >> 7);
        ends[at].act(op[0] & 0x7f, op[1]);
        if op[0] & 8 != 0 {
            let [a, b] = &mut ends;
            let (from, to) = if at == 0 { (a, b) } else { (b, a) };
            from.deliver(to, usize::from(op[1]) * 16);
        }
    }
    for _ in 0..4 {
        let [a, b] = &mut ends;
        a.deliver(b, usize::MAX);
        b.deliver(a, usize::MAX);
        ends.iter_mut().for_each(End::finish);
    }
    assert!(ends.iter().all(|end| end.connection.active_streams() == 0));
}

/// One honest end: its connection, and what it has sent and not yet delivered.
struct End {
    connection: Connection,
    wire: Vec<u8>,
    open: Vec<StreamId>,
    held: Vec<(StreamId, usize)>,
}

impl End {
    fn new(role: Role, config: &Config) -> Self {
        Self {
            connection: Connection::new(role, config),
            wire: Vec::new(),
            open: Vec::new(),
            held: Vec::new(),
        }
    }

    fn flush(&mut self) {
        self.wire.extend_from_slice(self.connection.output());
        let n = self.connection.output().len();
        self.connection.consume_output(n);
    }

    fn act(&mut self, op: u8, argument: u8) {
        let chosen = match self.open.len() {
            0 => None,
            n => Some(self.open[usize::from(argument) % n]),
        };
        match (op % 7, chosen) {
            (0, _) => self.open.extend(self.connection.open(&request()).ok()),
            (1 | 2, Some(id)) => {
                self.flush();
                let room = self.connection.send_capacity(id);
                let len = room.min(usize::from(argument) * 20);
                let end = op % 7 == 2;
                if let Ok(header) = self.connection.data_header(id, len, end) {
                    self.wire.extend_from_slice(&header);
                    self.wire.resize(self.wire.len() + len, 7);
                }
            }
            (3, Some(id)) => self.reset(id),
            (4, _) => {
                for (id, n) in self.held.drain(..) {
                    self.connection.release(id, n);
                }
            }
            (5, Some(id)) => drop(self.connection.respond(id, 200, None, false)),
            (6, _) => self.connection.ping([argument; 8]),
            _ => {}
        }
    }

    fn reset(&mut self, id: StreamId) {
        self.connection.reset(id, ErrorCode::CANCEL);
        self.open.retain(|open| *open != id);
    }

    /// Moves up to `most` bytes to `to`.
    fn deliver(&mut self, to: &mut Self, most: usize) {
        self.flush();
        let input: Vec<u8> = self.wire.drain(..most.min(self.wire.len())).collect();
        let mut events = VecDeque::new();
        let received = to.connection.receive(&input, &mut events);
        received.expect("an honest peer is not at fault");
        for event in events {
            match event {
                Event::Request { id, .. } => to.open.push(id),
                Event::Data { id, range } => to.held.push((id, range.len())),
                Event::Reset { id, .. } => to.open.retain(|open| *open != id),
                _ => {}
            }
        }
    }

    fn finish(&mut self) {
        self.act(4, 0);
        for id in self.open.clone() {
            self.reset(id);
        }
    }
}
