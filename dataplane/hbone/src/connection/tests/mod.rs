//! Tests of the state machine. Helpers, and the ordinary life of connections and streams.

mod floods;
mod lending;
mod scripts;
mod shutdown;
mod violations;

use super::*;
use crate::error::{OpenError, StreamError};
use crate::frame::{FrameHeader, HEADER_LEN, PREFACE, flag, kind};
use crate::headers::ConnectRequest;
use crate::hpack;

pub(super) const REQUEST: ConnectRequest<'static> = ConnectRequest {
    authority: "10.0.0.1:80",
    forwarded: None,
    baggage: None,
    traceparent: None,
    x_forwarded_network: None,
};

/// A frame as raw bytes.
pub(super) fn raw(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    frame::write_header(&mut out, payload.len(), kind, flags, stream);
    out.extend_from_slice(payload);
    out
}

/// A header block of literals.
pub(super) fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in fields {
        hpack::literal(&mut out, name, value);
    }
    out
}

pub(super) fn connect_block() -> Vec<u8> {
    block(&[(":method", "CONNECT"), (":authority", "10.0.0.1:80")])
}

/// HEADERS that open a tunnel.
pub(super) fn connect(stream: u32) -> Vec<u8> {
    raw(kind::HEADERS, flag::END_HEADERS, stream, &connect_block())
}

/// HEADERS that answer 200.
pub(super) fn ok(stream: u32) -> Vec<u8> {
    raw(kind::HEADERS, flag::END_HEADERS, stream, &[0x88])
}

pub(super) fn drain(connection: &mut Connection) -> Vec<(FrameHeader, Vec<u8>)> {
    let bytes = connection.output().to_vec();
    connection.consume_output(bytes.len());
    let mut rest = bytes.strip_prefix(&PREFACE[..]).unwrap_or(&bytes);
    let mut frames = Vec::new();
    while let Some(header) = rest.first_chunk::<HEADER_LEN>() {
        let header = FrameHeader::parse(header);
        let (payload, tail) = rest[HEADER_LEN..].split_at(header.length as usize);
        frames.push((header, payload.to_vec()));
        rest = tail;
    }
    assert!(rest.is_empty());
    frames
}

/// A connection that has exchanged SETTINGS with a peer of default settings.
pub(super) fn ready(role: Role, config: &Config) -> Connection {
    let mut connection = Connection::new(role, config);
    let mut hello = match role {
        Role::Server => PREFACE.to_vec(),
        Role::Client => Vec::new(),
    };
    hello.extend(raw(kind::SETTINGS, 0, 0, &[]));
    hello.extend(raw(kind::SETTINGS, flag::ACK, 0, &[]));
    assert_eq!(feed(&mut connection, &hello).unwrap(), [Event::Settings]);
    drain(&mut connection);
    connection
}

pub(super) fn server() -> Connection {
    ready(Role::Server, &Config::server())
}

pub(super) fn client() -> Connection {
    ready(Role::Client, &Config::client())
}

pub(super) fn feed(
    connection: &mut Connection,
    bytes: &[u8],
) -> Result<Vec<Event>, ConnectionError> {
    let mut events = VecDeque::new();
    connection.receive(bytes, &mut events)?;
    Ok(events.into())
}

fn pump(from: &mut Connection, to: &mut Connection) -> Vec<Event> {
    let bytes = from.output().to_vec();
    from.consume_output(bytes.len());
    feed(to, &bytes).unwrap()
}

#[test]
fn a_tunnel_opens_carries_data_and_ends() {
    let mut client = Connection::new(Role::Client, &Config::client());
    let mut server = Connection::new(Role::Server, &Config::server());
    let id = client.open(&REQUEST).unwrap();
    let head = RequestHeadOf::new("10.0.0.1:80");
    let request = Event::Request {
        id,
        head: Box::new(head.0),
    };
    assert_eq!(pump(&mut client, &mut server), [Event::Settings, request]);
    server.respond(id, 200, Some("a=b"), false).unwrap();
    let response = Event::Response {
        id,
        status: 200,
        baggage: Some("a=b".into()),
    };
    assert_eq!(pump(&mut server, &mut client), [Event::Settings, response]);
    assert_eq!(pump(&mut client, &mut server), []);

    let mut wire = client.data_header(id, 5, false).unwrap().to_vec();
    wire.extend_from_slice(b"hello");
    assert_eq!(
        feed(&mut server, &wire).unwrap(),
        [Event::Data { id, range: 9..14 }]
    );
    server.release(id, 5);
    let end = client.data_header(id, 0, true).unwrap();
    assert_eq!(feed(&mut server, &end).unwrap(), [Event::End { id }]);
    assert_eq!((client.active_streams(), server.active_streams()), (1, 1));
    assert_eq!(client.send_capacity(id), 0);
    assert!(server.send_capacity(id) > 0);
    let end = server.data_header(id, 0, true).unwrap();
    assert_eq!(feed(&mut client, &end).unwrap(), [Event::End { id }]);
    assert_eq!((client.active_streams(), server.active_streams()), (0, 0));
    assert_eq!(
        client.data_header(id, 0, false),
        Err(StreamError::Closed { stream: 1 })
    );
}

struct RequestHeadOf(crate::RequestHead);

impl RequestHeadOf {
    fn new(authority: &str) -> Self {
        Self(crate::RequestHead {
            method: "CONNECT".into(),
            authority: authority.into(),
            ..crate::RequestHead::default()
        })
    }
}

#[test]
fn the_announcement_is_what_ztunnel_sends() {
    let mut client = Connection::new(Role::Client, &Config::client());
    assert!(client.output().starts_with(PREFACE));
    let frames = drain(&mut client);
    let settings: Vec<_> = frames[0]
        .1
        .chunks(6)
        .map(|s| (s[1], u32::from_be_bytes([s[2], s[3], s[4], s[5]])))
        .collect();
    assert_eq!(
        settings,
        [(4, 4 << 20), (5, 1 << 20), (6, 16 << 10), (2, 0)]
    );
    assert_eq!(frames[1].0.kind, kind::WINDOW_UPDATE);
    assert_eq!(frames[1].1, ((16u32 << 20) - 65_535).to_be_bytes());
    let mut server = Connection::new(Role::Server, &Config::server());
    let frames = drain(&mut server);
    assert_eq!(frames[0].1[18..], [0, 3, 0, 0, 0, 200]);
}

#[test]
fn padding_counts_against_the_windows_and_is_credited_at_once() {
    let config = Config {
        stream_window: 600,
        connection_window: 65_535,
        ..Config::server()
    };
    let mut server = ready(Role::Server, &config);
    feed(&mut server, &connect(1)).unwrap();
    let id = StreamId(1);
    // 1 byte of length, 40 of payload, 255 of padding.
    let mut payload = vec![255];
    payload.extend([7; 40 + 255]);
    let padded = raw(kind::DATA, flag::PADDED, 1, &payload);
    assert_eq!(
        feed(&mut server, &padded).unwrap(),
        [Event::Data { id, range: 10..50 }]
    );
    assert!(drain(&mut server).is_empty());
    feed(&mut server, &padded).unwrap();
    let updates = drain(&mut server);
    assert_eq!(
        updates.len(),
        1,
        "half the stream's window is reached by padding alone"
    );
    assert_eq!(
        (updates[0].0.stream, &updates[0].1[..]),
        (1, &512u32.to_be_bytes()[..])
    );
    server.release(id, 80);
    assert_eq!(server.streams.get(1).unwrap().recv.total(), 600);
    assert_eq!(server.recv.total(), 65_535);
}

#[test]
fn credit_returns_for_streams_that_are_gone() {
    let mut server = ready(
        Role::Server,
        &Config {
            connection_window: 65_535,
            ..Config::server()
        },
    );
    feed(&mut server, &connect(1)).unwrap();
    let id = StreamId(1);
    let data = raw(kind::DATA, 0, 1, &[0; 16_000]);
    // Reset in the middle of a frame: the first part was delivered, the rest is discarded.
    let events = feed(&mut server, &data[..9 + 6_000]).unwrap();
    assert_eq!(
        events,
        [Event::Data {
            id,
            range: 9..6_009
        }]
    );
    server.reset(id, ErrorCode::CANCEL);
    assert_eq!(feed(&mut server, &data[9 + 6_000..]).unwrap(), []);
    assert_eq!(feed(&mut server, &data).unwrap(), []);
    let frames = drain(&mut server);
    assert_eq!(
        frames.len(),
        1,
        "only the reset, 26000 bytes are less than half a window"
    );
    assert_eq!(frames[0].0.kind, kind::RST_STREAM);
    server.release(id, 6_000);
    assert_eq!(server.recv.total(), 65_535);
    feed(&mut server, &data).unwrap();
    let frames = drain(&mut server);
    assert_eq!(frames[0].1, (48_000u32).to_be_bytes());
}

#[test]
fn settings_move_the_windows_of_open_streams() {
    let mut client = client();
    let id = client.open(&REQUEST).unwrap();
    feed(&mut client, &ok(1)).unwrap();
    assert_eq!(client.send_capacity(id), 65_535);
    client.data_header(id, 10_000, false).unwrap();
    let window = |value: u32| {
        let mut payload = vec![0, 4];
        payload.extend(value.to_be_bytes());
        raw(kind::SETTINGS, 0, 0, &payload)
    };
    assert_eq!(
        feed(&mut client, &window(4_000)).unwrap(),
        [Event::Settings]
    );
    assert_eq!(client.send_capacity(id), 0);
    let capacity = StreamError::Capacity {
        stream: 1,
        len: 1,
        max: 0,
    };
    assert_eq!(client.data_header(id, 1, false), Err(capacity));
    let update = raw(kind::WINDOW_UPDATE, 0, 1, &6_000u32.to_be_bytes());
    assert_eq!(
        feed(&mut client, &update).unwrap(),
        [],
        "4000 - 10000 + 6000 is still 0"
    );
    let events = feed(&mut client, &window(4_001)).unwrap();
    assert_eq!(events, [Event::Settings, Event::Writable { id }]);
    assert_eq!(client.send_capacity(id), 1);
    assert!(
        client.data_header(id, 0, true).is_ok(),
        "the end needs no window"
    );
}

#[test]
fn the_connection_window_wakes_every_stream_that_can_send() {
    let mut client = client();
    let a = client.open(&REQUEST).unwrap();
    let b = client.open(&REQUEST).unwrap();
    let ended = client.open(&REQUEST).unwrap();
    client.data_header(ended, 0, true).unwrap();
    for _ in 0..3 {
        client.data_header(a, 16_384, false).unwrap();
    }
    client.data_header(b, 16_383, false).unwrap();
    assert_eq!((client.send_capacity(a), client.send_capacity(b)), (0, 0));
    let update = raw(kind::WINDOW_UPDATE, 0, 0, &5u32.to_be_bytes());
    let mut events = feed(&mut client, &update).unwrap();
    events.sort_by_key(|event| format!("{event:?}"));
    assert_eq!(
        events,
        [Event::Writable { id: a }, Event::Writable { id: b }]
    );
    assert_eq!((client.send_capacity(a), client.send_capacity(b)), (5, 5));
}

#[test]
fn frames_are_limited_by_the_peers_maximum() {
    let mut client = client();
    let id = client.open(&REQUEST).unwrap();
    assert_eq!(client.max_data_len(), 16_384);
    let too_long = StreamError::Capacity {
        stream: 1,
        len: 16_385,
        max: 16_384,
    };
    assert_eq!(client.data_header(id, 16_385, false), Err(too_long));
    let settings = raw(kind::SETTINGS, 0, 0, &[0, 5, 0, 0, 0x80, 0]);
    feed(&mut client, &settings).unwrap();
    assert_eq!(client.max_data_len(), 32_768);
    assert!(client.data_header(id, 32_768, false).is_ok());
}

#[test]
fn streams_are_limited_both_ways() {
    let mut client = client();
    feed(&mut client, &raw(kind::SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 2])).unwrap();
    let id = client.open(&REQUEST).unwrap();
    client.open(&REQUEST).unwrap();
    assert!(!client.can_open());
    assert_eq!(
        client.open(&REQUEST),
        Err(OpenError::Exhausted { active: 2, max: 2 })
    );
    client.reset(id, ErrorCode::CANCEL);
    assert!(client.can_open());

    let mut server = ready(
        Role::Server,
        &Config {
            max_concurrent_streams: 1,
            ..Config::server()
        },
    );
    let events = feed(&mut server, &[connect(1), connect(3)].concat()).unwrap();
    assert_eq!(
        events.len(),
        1,
        "the second is refused without being shown: {events:?}"
    );
    let frames = drain(&mut server);
    assert_eq!(
        (frames[0].0.kind, frames[0].0.stream),
        (kind::RST_STREAM, 3)
    );
    assert_eq!(frames[0].1, 7u32.to_be_bytes());
    let late = raw(kind::DATA, flag::END_STREAM, 3, b"late");
    assert_eq!(
        feed(&mut server, &late).unwrap(),
        [],
        "in flight before the refusal arrived"
    );
}

#[test]
fn ping_is_answered_and_pong_is_told() {
    let mut client = client();
    feed(&mut client, &raw(kind::PING, 0, 0, b"12345678")).unwrap();
    assert_eq!(client.output(), raw(kind::PING, flag::ACK, 0, b"12345678"));
    client.ping(*b"abcdefgh");
    let pong = raw(kind::PING, flag::ACK, 0, b"abcdefgh");
    assert_eq!(
        feed(&mut client, &pong).unwrap(),
        [Event::Pong(*b"abcdefgh")]
    );
}

#[test]
fn a_stream_ends_in_every_order() {
    for server_first in [true, false] {
        let mut server = server();
        let id = StreamId(1);
        feed(&mut server, &connect(1)).unwrap();
        assert_eq!(server.send_capacity(id), 0, "not answered");
        assert!(matches!(
            server.data_header(id, 0, false),
            Err(StreamError::State { .. })
        ));
        server.respond(id, 200, None, false).unwrap();
        assert!(matches!(
            server.respond(id, 200, None, false),
            Err(StreamError::State { .. })
        ));
        let end = raw(kind::DATA, flag::END_STREAM, 1, b"bye");
        if server_first {
            server.data_header(id, 0, true).unwrap();
            let ended = StreamError::AlreadyEnded { stream: 1 };
            assert_eq!(server.data_header(id, 0, false), Err(ended));
        }
        let events = feed(&mut server, &end).unwrap();
        assert_eq!(
            events,
            [Event::Data { id, range: 9..12 }, Event::End { id }]
        );
        if !server_first {
            server.data_header(id, 0, true).unwrap();
        }
        assert_eq!(server.active_streams(), 0);
        server.release(id, 3);
        assert_eq!(
            server.recv.total(),
            i64::from(server.config.connection_window)
        );
    }
}

#[test]
fn an_error_answer_may_be_followed_by_a_reset() {
    let mut server = server();
    feed(&mut server, &connect(1)).unwrap();
    server.respond(StreamId(1), 503, None, true).unwrap();
    assert_eq!(server.active_streams(), 1);
    server.reset(StreamId(1), ErrorCode::NO_ERROR);
    assert_eq!(server.active_streams(), 0);
    let mut client = client();
    let id = client.open(&REQUEST).unwrap();
    let events = pump(&mut server, &mut client);
    let expected = [
        Event::Response {
            id,
            status: 503,
            baggage: None,
        },
        Event::End { id },
        Event::Reset {
            id,
            code: ErrorCode::NO_ERROR,
        },
    ];
    assert_eq!(events, expected);
}

#[test]
fn interim_answers_are_skipped_and_trailers_end_a_refused_tunnel() {
    let mut client = client();
    let id = client.open(&REQUEST).unwrap();
    let head = |flags, fields: &[(&str, &str)]| {
        raw(kind::HEADERS, flag::END_HEADERS | flags, 1, &block(fields))
    };
    assert_eq!(
        feed(&mut client, &head(0, &[(":status", "103")])).unwrap(),
        []
    );
    let events = feed(&mut client, &head(0, &[(":status", "503")])).unwrap();
    assert_eq!(
        events,
        [Event::Response {
            id,
            status: 503,
            baggage: None
        }]
    );
    let events = feed(&mut client, &head(flag::END_STREAM, &[("x", "y")])).unwrap();
    assert_eq!(events, [Event::End { id }]);
}

#[test]
fn a_reduced_header_table_is_acknowledged_in_the_next_block() {
    let mut client = client();
    feed(&mut client, &raw(kind::SETTINGS, 0, 0, &[0, 1, 0, 0, 0, 0])).unwrap();
    drain(&mut client);
    client.open(&REQUEST).unwrap();
    client.open(&REQUEST).unwrap();
    let frames = drain(&mut client);
    assert_eq!(frames[0].1[0], 0x20);
    assert_ne!(frames[1].1[0], 0x20);
}

#[test]
fn a_small_stream_window_applies_after_the_acknowledgement() {
    let config = Config {
        stream_window: 100,
        ..Config::server()
    };
    let mut server = Connection::new(Role::Server, &config);
    let hello = [PREFACE.to_vec(), raw(kind::SETTINGS, 0, 0, &[]), connect(1)].concat();
    feed(&mut server, &hello).unwrap();
    // The peer has not seen our setting yet and uses the default.
    let events = feed(&mut server, &raw(kind::DATA, 0, 1, &[0; 200])).unwrap();
    assert!(matches!(events[..], [Event::Data { .. }]), "{events:?}");
    feed(&mut server, &raw(kind::SETTINGS, flag::ACK, 0, &[])).unwrap();
    let empty = raw(kind::DATA, 0, 1, &[]);
    assert_eq!(
        feed(&mut server, &empty).unwrap(),
        [],
        "a negative window admits empty frames"
    );
    server.release(StreamId(1), 200);
    let frames = drain(&mut server);
    let update = frames
        .iter()
        .find(|(header, _)| header.stream == 1)
        .unwrap();
    assert_eq!(update.1, 200u32.to_be_bytes());
    let events = feed(&mut server, &raw(kind::DATA, 0, 1, &[0; 101])).unwrap();
    let code = ErrorCode::FLOW_CONTROL_ERROR;
    assert_eq!(
        events,
        [Event::Reset {
            id: StreamId(1),
            code
        }]
    );
}

#[test]
fn requests_are_limited_by_the_peers_header_list() {
    let mut client = client();
    feed(
        &mut client,
        &raw(kind::SETTINGS, 0, 0, &[0, 6, 0, 0, 0, 200]),
    )
    .unwrap();
    let long = "x".repeat(200);
    let request = ConnectRequest {
        baggage: Some(&long),
        ..REQUEST
    };
    assert!(matches!(
        client.open(&request),
        Err(OpenError::HeaderListTooLarge { max: 200, .. })
    ));
    assert_eq!(
        client.open(&REQUEST).unwrap().get(),
        1,
        "no identifier was used up"
    );
}

#[test]
fn data_allocates_nothing_here() {
    let mut server = server();
    feed(&mut server, &connect(1)).unwrap();
    let id = StreamId(1);
    let mut events = VecDeque::with_capacity(64);
    let before = (server.output.buffer().capacity(), events.capacity());
    let frame = raw(kind::DATA, 0, 1, &[0; 16_384]);
    for _ in 0..1000 {
        server.receive(&frame, &mut events).unwrap();
        for event in events.drain(..) {
            let Event::Data { range, .. } = event else {
                panic!("{event:?}")
            };
            server.release(id, range.len());
        }
        server.consume_output(server.output().len());
    }
    assert_eq!(
        (server.output.buffer().capacity(), events.capacity()),
        before
    );
    assert!(size_of::<Event>() <= 24, "events are moved for every piece");
}
