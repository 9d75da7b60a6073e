//! Random scripts: two connections back to back over a wire that delivers in pieces, and the same
//! bytes cut in different ways.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// One side, with what it has sent and got.
struct Side {
    connection: Connection,
    /// Bytes on their way to the other side.
    wire: VecDeque<u8>,
    events: VecDeque<Event>,
    /// Streams this side may act on.
    ids: Vec<StreamId>,
    sent: BTreeMap<StreamId, Vec<u8>>,
    received: BTreeMap<StreamId, Vec<u8>>,
    /// Delivered and not yet released.
    owed: Vec<(StreamId, usize)>,
}

impl Side {
    fn new(role: Role, config: &Config) -> Self {
        Self {
            connection: Connection::new(role, config),
            wire: VecDeque::new(),
            events: VecDeque::new(),
            ids: Vec::new(),
            sent: BTreeMap::new(),
            received: BTreeMap::new(),
            owed: Vec::new(),
        }
    }

    fn pick(&self, index: u16) -> Option<StreamId> {
        self.ids
            .get(usize::from(index) % self.ids.len().max(1))
            .copied()
    }

    fn flush(&mut self) {
        self.wire.extend(self.connection.output());
        self.connection
            .consume_output(self.connection.output().len());
    }

    fn send(&mut self, id: StreamId, len: usize, end: bool) {
        let max = self
            .connection
            .send_capacity(id)
            .min(self.connection.max_data_len());
        let Ok(header) = self.connection.data_header(id, len.min(max), end) else {
            return;
        };
        self.flush_before(header);
        let log = self.sent.entry(id).or_default();
        for _ in 0..len.min(max) {
            let byte = (log.len() * 7 + id.get() as usize) as u8;
            log.push(byte);
            self.wire.push_back(byte);
        }
    }

    fn flush_before(&mut self, header: [u8; HEADER_LEN]) {
        self.flush();
        self.wire.extend(header);
    }

    fn take(&mut self, from: &mut Self, len: usize) {
        from.flush();
        let len = len.min(from.wire.len());
        let input: Vec<u8> = from.wire.drain(..len).collect();
        self.connection.receive(&input, &mut self.events).unwrap();
        for event in self.events.drain(..) {
            match event {
                Event::Request { id, .. } => self.ids.push(id),
                Event::Data { id, range } => {
                    self.owed.push((id, range.len()));
                    self.received.entry(id).or_default().extend(&input[range]);
                }
                _ => {}
            }
        }
    }

    fn release(&mut self, index: u16) {
        if !self.owed.is_empty() {
            let (id, len) = self.owed.swap_remove(usize::from(index) % self.owed.len());
            // Twice a part: releases need not match deliveries.
            self.connection.release(id, len / 3);
            self.connection.release(id, len - len / 3);
        }
    }

    fn act(&mut self, op: u8, a: u16, b: u16) {
        let id = self.pick(a);
        match (op, id) {
            (0, _) => {
                if let Ok(id) = self.connection.open(&REQUEST) {
                    self.ids.push(id);
                }
            }
            (1, Some(id)) => drop(self.connection.respond(id, 200, Some("a=b"), false)),
            (2, Some(id)) if b.is_multiple_of(8) => self.send(id, usize::from(b), true),
            (3, Some(id)) if b.is_multiple_of(8) => self.connection.reset(id, ErrorCode::CANCEL),
            (4, _) => self.release(a),
            (5, _) if b.is_multiple_of(4) => self.connection.ping([a as u8; 8]),
            (6, Some(id)) if b.is_multiple_of(16) => {
                drop(self.connection.respond(id, 503, None, true));
            }
            (7.., Some(id)) => self.send(id, usize::from(b), false),
            _ => {}
        }
    }

    fn check(&self) {
        let recv = &self.connection.recv;
        assert!(recv.total() <= i64::from(self.connection.config.connection_window));
        let unreleased: usize = self.owed.iter().map(|(_, len)| len).sum();
        assert_eq!(recv.unreleased() as usize, unreleased);
    }
}

fn settle(client: &mut Side, server: &mut Side) {
    for round in 0.. {
        assert!(round < 100, "the connections do not come to rest");
        server.take(client, usize::MAX);
        client.take(server, usize::MAX);
        while !server.owed.is_empty() {
            server.release(0);
        }
        while !client.owed.is_empty() {
            client.release(0);
        }
        client.flush();
        server.flush();
        if client.wire.is_empty() && server.wire.is_empty() {
            return;
        }
    }
}

fn compare(from: &Side, to: &Side) {
    let window = i64::from(to.connection.config.connection_window);
    assert_eq!(
        to.connection.recv.total(),
        window,
        "no credit is lost or made"
    );
    let announced = to.connection.recv.remaining();
    assert_eq!(
        i64::from(from.connection.send.available()),
        i64::from(announced)
    );
    for stream in from.connection.streams.iter() {
        let Some(other) = to.connection.streams.get(stream.id) else {
            panic!("stream {} is open on one side only", stream.id)
        };
        assert_eq!(stream.local_ended, other.remote_ended);
        if !stream.local_ended {
            assert_eq!(
                other.recv.total(),
                i64::from(to.connection.config.stream_window)
            );
            assert_eq!(
                i64::from(stream.send.available()),
                i64::from(other.recv.remaining())
            );
        }
        let id = StreamId(stream.id);
        let empty = Vec::new();
        let sent = from.sent.get(&id).unwrap_or(&empty);
        let received = to.received.get(&id).unwrap_or(&empty);
        assert_eq!(sent, received, "stream {id}");
    }
    for (id, received) in &to.received {
        assert!(from.sent[id].starts_with(received), "stream {id}");
    }
}

/// Whether the client acts, what it does, and two numbers that say with what.
fn step() -> impl Strategy<Value = (bool, u8, u16, u16)> {
    (any::<bool>(), 0u8..14, any::<u16>(), any::<u16>())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn windows_are_conserved_and_bytes_arrive(
        stream_window in prop_oneof![1u32..300, 60_000u32..200_000],
        script in prop::collection::vec(step(), 1..400),
    ) {
        let config = Config { stream_window, connection_window: 65_535, ..Config::server() };
        let mut client = Side::new(Role::Client, &config);
        let mut server = Side::new(Role::Server, &config);
        settle(&mut client, &mut server);
        for (at_client, op, a, b) in script {
            let (side, other) = match at_client {
                true => (&mut client, &mut server),
                false => (&mut server, &mut client),
            };
            side.act(op, a, b);
            if op % 2 == 0 {
                other.take(side, usize::from(b) % 3000);
            }
            client.check();
            server.check();
        }
        settle(&mut client, &mut server);
        compare(&client, &server);
        compare(&server, &client);
    }

    #[test]
    fn cuts_change_nothing(
        cuts in prop::collection::vec(1usize..200, 1..400),
        mutation in prop::option::of((any::<prop::sample::Index>(), any::<u8>())),
    ) {
        let mut bytes = recorded_client();
        if let Some((at, value)) = mutation {
            *at.get_mut(&mut bytes) = value;
        }
        let whole = observe([&bytes[..]].into_iter());
        let mut rest = &bytes[..];
        let mut pieces = Vec::new();
        for cut in cuts {
            let (piece, tail) = rest.split_at(cut.min(rest.len()));
            pieces.push(piece);
            rest = tail;
        }
        pieces.push(rest);
        prop_assert_eq!(observe(pieces.into_iter()), whole);
    }
}

/// What a client sends that uses every kind of frame.
fn recorded_client() -> Vec<u8> {
    let mut client = Connection::new(Role::Client, &Config::client());
    client
        .open(&ConnectRequest {
            baggage: Some("k=v"),
            ..REQUEST
        })
        .unwrap();
    let mut bytes = client.output().to_vec();
    bytes.extend(raw(kind::DATA, 0, 1, &[1; 300]));
    bytes.extend(raw(
        kind::DATA,
        flag::PADDED,
        1,
        &[[5].as_slice(), &[2; 100]].concat(),
    ));
    bytes.extend(raw(kind::HEADERS, 0, 3, &connect_block()[..5]));
    bytes.extend(raw(
        kind::CONTINUATION,
        flag::END_HEADERS,
        3,
        &connect_block()[5..],
    ));
    bytes.extend(raw(kind::PING, 0, 0, b"01234567"));
    bytes.extend(raw(0x77, 0, 9, &[0; 50]));
    bytes.extend(raw(kind::WINDOW_UPDATE, 0, 0, &[0, 0, 1, 0]));
    bytes.extend(raw(kind::DATA, flag::END_STREAM, 1, &[]));
    bytes.extend(raw(kind::RST_STREAM, 0, 3, &[0, 0, 0, 8]));
    bytes.extend(raw(kind::SETTINGS, flag::ACK, 0, &[]));
    bytes.extend(raw(kind::GOAWAY, 0, 0, &[0; 20]));
    bytes
}

/// Events with adjacent payload joined, the output, and the failure.
type Observed = (Vec<(String, Vec<u8>)>, Vec<u8>, Option<ConnectionError>);

/// Everything a server does with the pieces.
fn observe<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Observed {
    let mut server = Connection::new(Role::Server, &Config::server());
    let mut seen: Vec<(String, Vec<u8>)> = Vec::new();
    let mut failure = None;
    for piece in pieces {
        let mut events = VecDeque::new();
        failure = server.receive(piece, &mut events).err();
        for event in events {
            match event {
                Event::Data { id, range } => {
                    let name = format!("data {id}");
                    match seen.last_mut() {
                        Some((last, bytes)) if *last == name => bytes.extend(&piece[range]),
                        _ => seen.push((name, piece[range].to_vec())),
                    }
                }
                // Reported at the end of a call, so it depends on the cuts by design.
                Event::Writable { .. } => {}
                other => seen.push((format!("{other:?}"), Vec::new())),
            }
        }
        if failure.is_some() {
            break;
        }
    }
    (seen, server.output().to_vec(), failure)
}
