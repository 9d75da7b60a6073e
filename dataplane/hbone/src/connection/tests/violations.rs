//! What a peer must not do, and what it is told.

use super::*;

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

#[test]
fn a_server_ends_the_connection() {
    let continued = |kind_after, stream| {
        let open = raw(kind::HEADERS, 0, 1, &connect_block());
        [open, raw(kind_after, 0, stream, &[0; 8])].concat()
    };
    let ended = [connect(1), raw(kind::RST_STREAM, 0, 1, &[0, 0, 0, 8])].concat();
    let cases: Vec<(&str, Vec<u8>, ErrorCode)> = vec![
        (
            "DATA on stream 0",
            raw(kind::DATA, 0, 0, b"x"),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "DATA on idle",
            raw(kind::DATA, 0, 1, b"x"),
            ErrorCode::PROTOCOL_ERROR,
        ),
        ("HEADERS on stream 0", connect(0), ErrorCode::PROTOCOL_ERROR),
        ("even identifier", connect(2), ErrorCode::PROTOCOL_ERROR),
        (
            "lower identifier",
            [connect(5), connect(3)].concat(),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "bad block",
            raw(kind::HEADERS, 4, 1, &[0x80]),
            ErrorCode::COMPRESSION_ERROR,
        ),
        (
            "HEADERS padding",
            raw(kind::HEADERS, 0xc, 1, &[9, 0x88]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "HEADERS empty padded",
            raw(kind::HEADERS, 0xc, 1, &[]),
            ErrorCode::FRAME_SIZE_ERROR,
        ),
        (
            "HEADERS short priority",
            raw(kind::HEADERS, 0x24, 1, &[0; 4]),
            ErrorCode::FRAME_SIZE_ERROR,
        ),
        (
            "interrupted block",
            continued(kind::PING, 0),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "other stream's block",
            continued(kind::CONTINUATION, 3),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "lone CONTINUATION",
            raw(kind::CONTINUATION, 4, 1, &[]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "PRIORITY on 0",
            raw(kind::PRIORITY, 0, 0, &[0; 5]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "RST_STREAM on 0",
            raw(kind::RST_STREAM, 0, 0, &[0; 4]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "RST_STREAM on idle",
            raw(kind::RST_STREAM, 0, 1, &[0; 4]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "RST_STREAM length",
            raw(kind::RST_STREAM, 0, 1, &[0; 3]),
            ErrorCode::FRAME_SIZE_ERROR,
        ),
        (
            "SETTINGS on stream",
            raw(kind::SETTINGS, 0, 1, &[]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "SETTINGS length",
            raw(kind::SETTINGS, 0, 0, &[0; 5]),
            ErrorCode::FRAME_SIZE_ERROR,
        ),
        (
            "ACK with payload",
            raw(kind::SETTINGS, 1, 0, &[0; 6]),
            ErrorCode::FRAME_SIZE_ERROR,
        ),
        (
            "push value",
            raw(kind::SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 2]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "window setting",
            raw(kind::SETTINGS, 0, 0, &[0, 4, 0x80, 0, 0, 0]),
            ErrorCode::FLOW_CONTROL_ERROR,
        ),
        (
            "small frame setting",
            raw(kind::SETTINGS, 0, 0, &[0, 5, 0, 0, 0x3f, 0xff]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "large frame setting",
            raw(kind::SETTINGS, 0, 0, &[0, 5, 1, 0, 0, 0]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "PUSH_PROMISE",
            raw(kind::PUSH_PROMISE, 4, 1, &[0; 4]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "PING on stream",
            raw(kind::PING, 0, 1, &[0; 8]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "PING length",
            raw(kind::PING, 0, 0, &[0; 7]),
            ErrorCode::FRAME_SIZE_ERROR,
        ),
        (
            "GOAWAY on stream",
            raw(kind::GOAWAY, 0, 1, &[0; 8]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "GOAWAY length",
            raw(kind::GOAWAY, 0, 0, &[0; 7]),
            ErrorCode::FRAME_SIZE_ERROR,
        ),
        (
            "WINDOW_UPDATE length",
            raw(kind::WINDOW_UPDATE, 0, 0, &[0; 5]),
            ErrorCode::FRAME_SIZE_ERROR,
        ),
        (
            "WINDOW_UPDATE on idle",
            raw(kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "WINDOW_UPDATE of 0",
            raw(kind::WINDOW_UPDATE, 0, 0, &[0; 4]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "WINDOW_UPDATE overflow",
            raw(kind::WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]),
            ErrorCode::FLOW_CONTROL_ERROR,
        ),
        (
            "frame too long",
            vec![0x10, 0, 1, 0, 0, 0, 0, 0, 1],
            ErrorCode::FRAME_SIZE_ERROR,
        ),
        (
            "DATA padding",
            [connect(1), raw(kind::DATA, 8, 1, &[3, 0, 0])].concat(),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "DATA empty padded",
            [connect(1), raw(kind::DATA, 8, 1, &[])].concat(),
            ErrorCode::FRAME_SIZE_ERROR,
        ),
        (
            "DATA after its RST_STREAM",
            [ended.clone(), raw(kind::DATA, 0, 1, b"x")].concat(),
            ErrorCode::STREAM_CLOSED,
        ),
        (
            "HEADERS after its RST_STREAM",
            [ended, connect(1)].concat(),
            ErrorCode::STREAM_CLOSED,
        ),
    ];
    for (name, bytes, code) in cases {
        assert_eq!(code_of(&mut server(), &bytes), code, "{name}");
        // The same, byte by byte.
        let mut slow = server();
        let outcome = bytes
            .iter()
            .try_for_each(|byte| feed(&mut slow, &[*byte]).map(|_| ()));
        assert_eq!(outcome.unwrap_err().code(), code, "{name} byte by byte");
    }
}

#[test]
fn a_client_ends_the_connection() {
    let cases = [
        ("unknown stream", ok(3), ErrorCode::PROTOCOL_ERROR),
        ("push stream", ok(2), ErrorCode::PROTOCOL_ERROR),
        (
            "PUSH_PROMISE",
            raw(kind::PUSH_PROMISE, 4, 1, &[0; 4]),
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "push",
            raw(kind::SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 1]),
            ErrorCode::PROTOCOL_ERROR,
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
    assert_eq!(error.code(), ErrorCode::PROTOCOL_ERROR);

    let mut server = Connection::new(Role::Server, &Config::server());
    let late = [PREFACE.to_vec(), raw(kind::PING, 0, 0, &[0; 8])].concat();
    assert_eq!(code_of(&mut server, &late), ErrorCode::PROTOCOL_ERROR);

    let mut client = Connection::new(Role::Client, &Config::client());
    let ack = raw(kind::SETTINGS, flag::ACK, 0, &[]);
    assert_eq!(code_of(&mut client, &ack), ErrorCode::PROTOCOL_ERROR);
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
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "no method",
            headers(0, &[authority]),
            false,
            ErrorCode::PROTOCOL_ERROR,
        ),
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
            ErrorCode::PROTOCOL_ERROR,
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
            ErrorCode::PROTOCOL_ERROR,
        ),
        (
            "WINDOW_UPDATE overflow",
            [
                connect(1),
                raw(kind::WINDOW_UPDATE, 0, 1, &[0x7f, 0xff, 0xff, 0xff]),
            ]
            .concat(),
            true,
            ErrorCode::FLOW_CONTROL_ERROR,
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
        let code = ErrorCode::PROTOCOL_ERROR;
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
    assert_eq!(code, ErrorCode::FLOW_CONTROL_ERROR);

    let config = Config {
        stream_window: 100,
        ..Config::server()
    };
    let mut server = ready(Role::Server, &config);
    feed(&mut server, &connect(1)).unwrap();
    let events = feed(&mut server, &raw(kind::DATA, 0, 1, &[0; 101])).unwrap();
    assert_eq!(events.len(), 1, "nothing of it is delivered: {events:?}");
    assert_eq!(reset_of(&mut server), (1, ErrorCode::FLOW_CONTROL_ERROR));
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
