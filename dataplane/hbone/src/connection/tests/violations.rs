//! What a peer must not do, and what it is told.

use super::*;

const PROTOCOL: ErrorCode = ErrorCode::PROTOCOL_ERROR;
const SIZE: ErrorCode = ErrorCode::FRAME_SIZE_ERROR;
const FLOW: ErrorCode = ErrorCode::FLOW_CONTROL_ERROR;

fn code_of(connection: &mut Connection, bytes: &[u8]) -> ErrorCode {
    let error = feed(connection, bytes).unwrap_err();
    let frames = drain(connection);
    let (header, payload) = frames.last().unwrap();
    assert_eq!(header.kind, kind::GOAWAY, "{error}");
    assert_eq!(payload[4..8], error.code().0.to_be_bytes(), "{error}");
    assert_eq!(feed(connection, bytes), Err(error), "the failure lasts");
    assert!(connection.is_closed());
    assert!(connection.output().is_empty());
    error.code()
}

/// Code and stream of the only RST_STREAM in the output.
fn reset_of(connection: &mut Connection) -> (u32, ErrorCode) {
    let frames = drain(connection);
    let resets: Vec<_> = frames
        .iter()
        .filter(|(h, _)| h.kind == kind::RST_STREAM)
        .collect();
    let [(header, payload)] = resets[..] else {
        panic!("{frames:?}")
    };
    (
        header.stream,
        ErrorCode(u32::from_be_bytes(*payload.first_chunk().unwrap())),
    )
}

/// A frame on a fresh connection: name, type, flags, stream, payload, and the code it causes.
type Frame = (&'static str, u8, u8, u32, &'static [u8], ErrorCode);

#[rustfmt::skip]
const FRAMES: [Frame; 29] = [
    ("DATA on stream 0", kind::DATA, 0, 0, b"x", PROTOCOL),
    ("DATA on idle", kind::DATA, 0, 1, b"x", PROTOCOL),
    ("HEADERS on stream 0", kind::HEADERS, 4, 0, &[0x82], PROTOCOL),
    ("even identifier", kind::HEADERS, 4, 2, &[0x82], PROTOCOL),
    ("bad block", kind::HEADERS, 4, 1, &[0x80], ErrorCode::COMPRESSION_ERROR),
    ("HEADERS padding", kind::HEADERS, 0xc, 1, &[9, 0x88], PROTOCOL),
    ("HEADERS empty padded", kind::HEADERS, 0xc, 1, &[], SIZE),
    ("HEADERS short priority", kind::HEADERS, 0x24, 1, &[0; 4], SIZE),
    ("lone CONTINUATION", kind::CONTINUATION, 4, 1, &[], PROTOCOL),
    ("PRIORITY on stream 0", kind::PRIORITY, 0, 0, &[0; 5], PROTOCOL),
    ("RST_STREAM on stream 0", kind::RST_STREAM, 0, 0, &[0; 4], PROTOCOL),
    ("RST_STREAM on idle", kind::RST_STREAM, 0, 1, &[0; 4], PROTOCOL),
    ("RST_STREAM length", kind::RST_STREAM, 0, 1, &[0; 3], SIZE),
    ("SETTINGS on a stream", kind::SETTINGS, 0, 1, &[], PROTOCOL),
    ("SETTINGS length", kind::SETTINGS, 0, 0, &[0; 5], SIZE),
    ("SETTINGS ACK with payload", kind::SETTINGS, 1, 0, &[0; 6], SIZE),
    ("ENABLE_PUSH of 2", kind::SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 2], PROTOCOL),
    ("window of 2^31", kind::SETTINGS, 0, 0, &[0, 4, 0x80, 0, 0, 0], FLOW),
    ("frames of 16383", kind::SETTINGS, 0, 0, &[0, 5, 0, 0, 0x3f, 0xff], PROTOCOL),
    ("frames of 2^24", kind::SETTINGS, 0, 0, &[0, 5, 1, 0, 0, 0], PROTOCOL),
    ("PUSH_PROMISE", kind::PUSH_PROMISE, 4, 1, &[0; 4], PROTOCOL),
    ("PING on a stream", kind::PING, 0, 1, &[0; 8], PROTOCOL),
    ("PING length", kind::PING, 0, 0, &[0; 7], SIZE),
    ("GOAWAY on a stream", kind::GOAWAY, 0, 1, &[0; 8], PROTOCOL),
    ("GOAWAY length", kind::GOAWAY, 0, 0, &[0; 7], SIZE),
    ("WINDOW_UPDATE length", kind::WINDOW_UPDATE, 0, 0, &[0; 5], SIZE),
    ("WINDOW_UPDATE on idle", kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1], PROTOCOL),
    ("WINDOW_UPDATE of 0", kind::WINDOW_UPDATE, 0, 0, &[0; 4], PROTOCOL),
    ("WINDOW_UPDATE overflow", kind::WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff], FLOW),
];

fn check_server_fails(name: &str, bytes: &[u8], code: ErrorCode) {
    assert_eq!(code_of(&mut server(), bytes), code, "{name}");
    let mut slow = server();
    let outcome = bytes
        .iter()
        .try_for_each(|byte| feed(&mut slow, &[*byte]).map(|_| ()));
    assert_eq!(outcome.unwrap_err().code(), code, "{name} byte by byte");
}

#[test]
fn a_frame_ends_the_connection() {
    for (name, kind, flags, stream, payload, code) in FRAMES {
        check_server_fails(name, &raw(kind, flags, stream, payload), code);
    }
    let too_long = [0x10, 0, 1, 0, 0, 0, 0, 0, 1];
    check_server_fails("frame above the maximum", &too_long, SIZE);
}

#[test]
fn a_sequence_ends_the_connection() {
    let open = raw(kind::HEADERS, 0, 1, &connect_block());
    let reset = [connect(1), raw(kind::RST_STREAM, 0, 1, &[0, 0, 0, 8])].concat();
    let closed = ErrorCode::STREAM_CLOSED;
    let cases = [
        ("lower identifier", connect(5), connect(3), PROTOCOL),
        (
            "interrupted block",
            open.clone(),
            raw(kind::PING, 0, 0, &[0; 8]),
            PROTOCOL,
        ),
        (
            "other stream's block",
            open,
            raw(kind::CONTINUATION, 0, 3, &[0; 8]),
            PROTOCOL,
        ),
        (
            "DATA padding",
            connect(1),
            raw(kind::DATA, 8, 1, &[3, 0, 0]),
            PROTOCOL,
        ),
        (
            "DATA empty padded",
            connect(1),
            raw(kind::DATA, 8, 1, &[]),
            SIZE,
        ),
        (
            "DATA after its RST_STREAM",
            reset.clone(),
            raw(kind::DATA, 0, 1, b"x"),
            closed,
        ),
        ("HEADERS after its RST_STREAM", reset, connect(1), closed),
    ];
    for (name, before, bytes, code) in cases {
        check_server_fails(name, &[before, bytes].concat(), code);
    }
}

#[test]
fn a_client_ends_the_connection() {
    let cases = [
        ("unknown stream", ok(3), PROTOCOL),
        ("push stream", ok(2), PROTOCOL),
        (
            "PUSH_PROMISE",
            raw(kind::PUSH_PROMISE, 4, 1, &[0; 4]),
            PROTOCOL,
        ),
        (
            "push",
            raw(kind::SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 1]),
            PROTOCOL,
        ),
    ];
    for (name, bytes, code) in cases {
        let mut client = client();
        client.open(&REQUEST).unwrap();
        assert_eq!(code_of(&mut client, &bytes), code, "{name}");
    }
}

#[test]
fn the_first_bytes_must_be_http2() {
    let mut server = Connection::new(Role::Server, &Config::server());
    let error = feed(&mut server, b"GET / HTTP/1.1\r\n").unwrap_err();
    assert_eq!(
        error,
        ConnectionError::Preface {
            offset: 0,
            found: b'G'
        }
    );
    assert_eq!(error.code(), PROTOCOL);

    let mut server = Connection::new(Role::Server, &Config::server());
    let late = [PREFACE.to_vec(), raw(kind::PING, 0, 0, &[0; 8])].concat();
    assert_eq!(code_of(&mut server, &late), PROTOCOL);

    let mut client = Connection::new(Role::Client, &Config::client());
    let ack = raw(kind::SETTINGS, flag::ACK, 0, &[]);
    assert_eq!(code_of(&mut client, &ack), PROTOCOL);
}

#[test]
fn a_server_resets_the_stream() {
    let headers = |flags: u8, fields: &[(&str, &str)]| {
        raw(kind::HEADERS, flag::END_HEADERS | flags, 1, &block(fields))
    };
    let half_closed = [connect(1), raw(kind::DATA, flag::END_STREAM, 1, &[])].concat();
    let authority = (":authority", "a:1");
    let cases: Vec<(&str, Vec<u8>, bool, ErrorCode)> = vec![
        (
            "CONNECT with :path",
            headers(0, &[(":method", "CONNECT"), authority, (":path", "/")]),
            false,
            PROTOCOL,
        ),
        ("no method", headers(0, &[authority]), false, PROTOCOL),
        (
            "header list",
            headers(0, &vec![(":method", "x"); 2000]),
            false,
            ErrorCode::ENHANCE_YOUR_CALM,
        ),
        (
            "trailers on a tunnel",
            [connect(1), headers(flag::END_STREAM, &[("a", "b")])].concat(),
            true,
            PROTOCOL,
        ),
        (
            "DATA after the end",
            [half_closed.clone(), raw(kind::DATA, 0, 1, b"x")].concat(),
            true,
            ErrorCode::STREAM_CLOSED,
        ),
        (
            "HEADERS after the end",
            [half_closed, headers(flag::END_STREAM, &[("a", "b")])].concat(),
            true,
            ErrorCode::STREAM_CLOSED,
        ),
        (
            "WINDOW_UPDATE of 0",
            [connect(1), raw(kind::WINDOW_UPDATE, 0, 1, &[0; 4])].concat(),
            true,
            PROTOCOL,
        ),
        (
            "WINDOW_UPDATE overflow",
            [
                connect(1),
                raw(kind::WINDOW_UPDATE, 0, 1, &[0x7f, 0xff, 0xff, 0xff]),
            ]
            .concat(),
            true,
            FLOW,
        ),
    ];
    for (name, bytes, known, code) in cases {
        let mut server = server();
        let events = feed(&mut server, &bytes).unwrap();
        let told = events.contains(&Event::Reset {
            id: StreamId(1),
            code,
        });
        assert_eq!(told, known, "{name}: {events:?}");
        assert_eq!(reset_of(&mut server), (1, code), "{name}");
        assert_eq!(server.active_streams(), 0, "{name}");
        // The connection lives on.
        assert_eq!(feed(&mut server, &connect(3)).unwrap().len(), 1, "{name}");
    }
}

#[test]
fn a_client_resets_the_stream() {
    let headers = |flags: u8, fields: &[(&str, &str)]| {
        raw(kind::HEADERS, flag::END_HEADERS | flags, 1, &block(fields))
    };
    let cases = [
        ("DATA before the answer", raw(kind::DATA, 0, 1, b"x")),
        ("no status", headers(0, &[("a", "b")])),
        (
            "interim end",
            headers(flag::END_STREAM, &[(":status", "103")]),
        ),
        (
            "HEADERS on a tunnel",
            [ok(1), headers(0, &[("a", "b")])].concat(),
        ),
        (
            "trailers on a tunnel",
            [ok(1), headers(1, &[("a", "b")])].concat(),
        ),
    ];
    for (name, bytes) in cases {
        let mut client = client();
        let id = client.open(&REQUEST).unwrap();
        drain(&mut client);
        let events = feed(&mut client, &bytes).unwrap();
        let code = PROTOCOL;
        assert_eq!(events.last(), Some(&Event::Reset { id, code }), "{name}");
        assert_eq!(reset_of(&mut client), (1, code), "{name}");
        assert_eq!(
            client.recv.total(),
            i64::from(client.config.connection_window),
            "{name}"
        );
    }
}

#[test]
fn the_windows_are_enforced() {
    let config = Config {
        connection_window: 65_535,
        stream_window: 70_000,
        ..Config::server()
    };
    let mut server = ready(Role::Server, &config);
    feed(&mut server, &connect(1)).unwrap();
    feed(&mut server, &raw(kind::DATA, 0, 1, &[0; 65_535])).unwrap();
    let code = code_of(&mut server, &raw(kind::DATA, 0, 1, &[0]));
    assert_eq!(code, FLOW);

    let config = Config {
        stream_window: 100,
        ..Config::server()
    };
    let mut server = ready(Role::Server, &config);
    feed(&mut server, &connect(1)).unwrap();
    let events = feed(&mut server, &raw(kind::DATA, 0, 1, &[0; 101])).unwrap();
    assert_eq!(events.len(), 1, "nothing of it is delivered: {events:?}");
    assert_eq!(reset_of(&mut server), (1, FLOW));
    assert_eq!(
        server.recv.total(),
        i64::from(server.config.connection_window)
    );
}

#[test]
fn what_has_no_meaning_is_ignored() {
    let mut server = server();
    feed(&mut server, &connect(1)).unwrap();
    drain(&mut server);
    let frames = [
        raw(0xfa, 0xff, 0, &[1; 300]),
        raw(0x10, 0, 1, b"u=1"),
        raw(kind::PRIORITY, 0, 1, &[0; 5]),
        raw(kind::PRIORITY, 0, 77, &[0; 5]),
        raw(kind::SETTINGS, 0, 0, &[0x0a, 0x0a, 1, 2, 3, 4]),
        raw(kind::PING, 0xfe, 0, &[0; 8]),
    ];
    assert_eq!(
        feed(&mut server, &frames.concat()).unwrap(),
        [Event::Settings]
    );
    let kinds: Vec<_> = drain(&mut server)
        .iter()
        .map(|(h, _)| (h.kind, h.flags))
        .collect();
    assert_eq!(kinds, [(kind::SETTINGS, 1), (kind::PING, 1)]);
    let get = block(&[(":method", "GET"), (":scheme", "https"), (":path", "/")]);
    let events = feed(&mut server, &raw(kind::HEADERS, 0x5, 3, &get)).unwrap();
    let [Event::Request { head, .. }, Event::End { .. }] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!(head.method, "GET");
    let padded_with_priority = [&[2, 0, 0, 0, 0, 9][..], &connect_block(), &[0, 0]].concat();
    let events = feed(
        &mut server,
        &raw(kind::HEADERS, 0x2c, 5, &padded_with_priority),
    )
    .unwrap();
    assert!(matches!(events[..], [Event::Request { .. }]), "{events:?}");
}
