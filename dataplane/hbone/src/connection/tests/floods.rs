//! Load without progress ends in ENHANCE_YOUR_CALM; honest use of the same frames does not.

use super::*;

/// Bytes in one call of `receive`: a full TLS record, or one step in a record of its own.
const RECORDS: [usize; 2] = [16_000, 1];

/// Feeds the bytes `step` yields until the connection fails, at least `size` in a call, draining
/// the output in between. Returns how many steps it took.
fn flood(connection: &mut Connection, size: usize, mut step: impl FnMut(u32) -> Vec<u8>) -> u32 {
    let mut record = Vec::new();
    for count in 0..200_000 {
        record.extend(step(count));
        if record.len() < size {
            continue;
        }
        if let Err(error) = feed(connection, &record) {
            assert_eq!(error.code(), ErrorCode::ENHANCE_YOUR_CALM, "{error}");
            return count;
        }
        connection.consume_output(connection.output().len());
        record.clear();
    }
    panic!("the flood was not noticed");
}

#[test]
fn floods_are_stopped() {
    type Step = fn(u32) -> Vec<u8>;
    let cases: [(&str, Step); 11] = [
        ("PING", |_| raw(kind::PING, 0, 0, &[0; 8])),
        ("PONG", |_| raw(kind::PING, flag::ACK, 0, &[0; 8])),
        ("SETTINGS", |_| raw(kind::SETTINGS, 0, 0, &[])),
        ("SETTINGS ACK", |_| raw(kind::SETTINGS, flag::ACK, 0, &[])),
        ("PRIORITY", |_| raw(kind::PRIORITY, 0, 1, &[0; 5])),
        ("unknown", |_| raw(0xee, 0, 1, &[])),
        ("WINDOW_UPDATE", |_| {
            raw(kind::WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1])
        }),
        ("WINDOW_UPDATE of a stream", |_| {
            raw(kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1])
        }),
        ("GOAWAY", |_| raw(kind::GOAWAY, 0, 0, &[0; 8])),
        ("empty DATA", |_| raw(kind::DATA, 0, 1, &[])),
        ("padded empty DATA", |_| {
            raw(kind::DATA, flag::PADDED, 1, &[0])
        }),
    ];
    for ((name, step), size) in cases
        .into_iter()
        .flat_map(|case| RECORDS.map(|s| (case, s)))
    {
        let mut server = server();
        feed(&mut server, &connect(1)).unwrap();
        let steps = flood(&mut server, size, step);
        assert!(steps < 3_000, "{name} in records of {size} took {steps}");
    }
}

fn reset(id: u32) -> Vec<u8> {
    raw(kind::RST_STREAM, 0, id, &[0, 0, 0, 8])
}

#[test]
fn rapid_reset_is_stopped() {
    for size in RECORDS {
        let step = |n: u32| [connect(2 * n + 1), reset(2 * n + 1)].concat();
        let steps = flood(&mut server(), size, step);
        assert!(steps < 1_500, "in records of {size}: {steps}");
    }
}

#[test]
fn making_us_reset_is_stopped() {
    let malformed = block(&[(":method", "CONNECT")]);
    type Step<'a> = &'a dyn Fn(u32) -> Vec<u8>;
    let update = |id, by: u32| raw(kind::WINDOW_UPDATE, 0, id, &by.to_be_bytes());
    let cases: [(&str, Step<'_>); 5] = [
        ("no increment", &|id| [connect(id), update(id, 0)].concat()),
        ("overflow", &|id| [connect(id), update(id, MAX_31)].concat()),
        ("DATA behind the end", &|id| {
            let end = raw(kind::DATA, flag::END_STREAM, id, &[]);
            [connect(id), end, raw(kind::DATA, 0, id, b"x")].concat()
        }),
        ("HEADERS on a tunnel", &|id| {
            [connect(id), connect(id)].concat()
        }),
        ("malformed", &|id| {
            raw(kind::HEADERS, flag::END_HEADERS, id, &malformed)
        }),
    ];
    for ((name, step), size) in cases
        .into_iter()
        .flat_map(|case| RECORDS.map(|s| (case, s)))
    {
        let steps = flood(&mut server(), size, |n| step(2 * n + 1));
        assert!(steps < 2_000, "{name} in records of {size}: {steps}");
    }
}

#[test]
fn opening_beyond_the_limit_is_stopped() {
    for size in RECORDS {
        let mut server = server();
        assert!(flood(&mut server, size, |n| connect(2 * n + 1)) < 2_000);
    }
}

/// A peer whose streams come to nothing may open no more, and is told; the stream that somebody
/// uses goes on. Success, and time, make up for failures.
#[test]
fn streams_that_come_to_nothing_end_in_a_goaway_and_not_the_others() {
    let mut server = server();
    feed(&mut server, &connect(1)).unwrap();
    server.respond(StreamId(1), 200, None, false).unwrap();
    let most = Config::server().flood_budget / 2;
    let mut id = 1;
    let mut fail = |server: &mut Connection| {
        id += 2;
        let opened = feed(server, &connect(id)).unwrap().len();
        feed(server, &reset(id)).unwrap();
        opened
    };
    for second in 0..100 {
        // As many a second as ever: clients that give up on a server that does not answer.
        (0..UNITS_PER_SECOND).for_each(|_| assert_eq!(fail(&mut server), 1, "{second}"));
        server.pass_time(1);
    }
    assert!(!server.is_calmed());
    for _ in 0..most {
        assert_eq!(fail(&mut server), 1);
    }
    drain(&mut server);
    fail(&mut server);
    assert!(server.is_calmed());
    let frames = drain(&mut server);
    let calm = ErrorCode::ENHANCE_YOUR_CALM.0.to_be_bytes();
    let told = |frame: &&(FrameHeader, Vec<u8>)| frame.0.kind == kind::GOAWAY;
    assert_eq!(frames.iter().find(told).unwrap().1[4..8], calm);
    assert_eq!(fail(&mut server), 0, "nothing is opened any more");
    feed(&mut server, &raw(kind::DATA, 0, 1, b"goes on")).unwrap();
    assert!(!server.is_closed() && server.send_capacity(StreamId(1)) > 0);
    feed(&mut server, &raw(kind::RST_STREAM, 0, 1, &[0; 4])).unwrap();
    assert!(server.is_closed(), "with its last stream");
}

#[test]
fn a_server_that_breaks_every_stream_is_left() {
    let mut client = client();
    let broken = (0..10_000).find_map(|_| {
        let id = client.open(&REQUEST).unwrap().get();
        client.consume_output(client.output().len());
        feed(&mut client, &raw(kind::DATA, 0, id, b"x")).err()
    });
    assert_eq!(broken.unwrap().code(), ErrorCode::ENHANCE_YOUR_CALM);
}

/// The windows of all streams move once for a frame, however often it sets them.
#[test]
fn settings_walk_the_streams_once_for_a_frame() {
    let mut server = server();
    feed(&mut server, &connect(1)).unwrap();
    server.respond(StreamId(1), 200, None, false).unwrap();
    let windows: Vec<u8> = (0..256u32)
        .flat_map(|n| [[0, 4].as_slice(), &(n * 1000).to_be_bytes()].concat())
        .collect();
    feed(&mut server, &raw(kind::SETTINGS, 0, 0, &windows)).unwrap();
    assert_eq!(server.window_walks.get(), 1);
    // The last value holds.
    assert_eq!(server.send_capacity(StreamId(1)), 65_535);
    feed(
        &mut server,
        &raw(kind::WINDOW_UPDATE, 0, 0, &[0, 0xff, 0, 0]),
    )
    .unwrap();
    assert_eq!(server.send_capacity(StreamId(1)), 255_000);
    // The same again walks nothing; a value that may not be is refused wherever it stands.
    feed(&mut server, &raw(kind::SETTINGS, 0, 0, &windows[255 * 6..])).unwrap();
    assert_eq!(server.window_walks.get(), 1);
    let mut bad = windows;
    bad[2] = 0x80;
    let error = feed(&mut server, &raw(kind::SETTINGS, 0, 0, &bad)).unwrap_err();
    assert_eq!(error.code(), ErrorCode::FLOW_CONTROL_ERROR);
}

#[test]
fn endless_header_blocks_are_stopped() {
    let open = raw(kind::HEADERS, 0, 1, &connect_block());
    let mut server = server();
    feed(&mut server, &open).unwrap();
    assert!(flood(&mut server, 16_000, |_| raw(kind::CONTINUATION, 0, 1, &[])) < 2_000);

    let mut server = ready(Role::Server, &Config::server());
    feed(&mut server, &open).unwrap();
    let fragment = block(&[("x", &"y".repeat(3_000))]);
    let steps = flood(&mut server, 16_000, |_| {
        raw(kind::CONTINUATION, 0, 1, &fragment)
    });
    assert!(steps < 40, "{steps}");

    // One frame that announces more than we take: refused before it is buffered.
    let mut server = ready(Role::Server, &Config::server());
    let error = feed(&mut server, &[1, 0x10, 0, kind::HEADERS, 4, 0, 0, 0, 1]).unwrap_err();
    assert_eq!(error.code(), ErrorCode::ENHANCE_YOUR_CALM);
}

#[test]
fn replies_nobody_reads_are_bounded() {
    let mut server = server();
    let ping = raw(kind::PING, 0, 0, &[0; 8]);
    let error = (0..10_000).find_map(|_| feed(&mut server, &ping).err());
    assert_eq!(error.unwrap().code(), ErrorCode::ENHANCE_YOUR_CALM);
    assert!(server.output().len() < 32_000);
}

#[test]
fn honest_peers_are_not_disturbed() {
    let mut server = server();
    feed(&mut server, &connect(1)).unwrap();
    server.respond(StreamId(1), 200, None, false).unwrap();
    for n in 0..20_000u32 {
        // A keepalive on an idle connection, for days.
        feed(&mut server, &raw(kind::PING, 0, 0, &[0; 8])).unwrap();
        // Very small writes, each credited at once by a peer that does so.
        feed(&mut server, &raw(kind::DATA, 0, 1, b"x")).unwrap();
        server.release(StreamId(1), 1);
        server.data_header(StreamId(1), 1, false).unwrap();
        let update = |stream| raw(kind::WINDOW_UPDATE, 0, stream, &[0, 0, 0, 1]);
        feed(&mut server, &[update(0), update(1)].concat()).unwrap();
        // Health checks that connect and go.
        let id = 2 * n + 3;
        feed(&mut server, &connect(id)).unwrap();
        server.respond(StreamId(id), 200, None, false).unwrap();
        feed(&mut server, &raw(kind::RST_STREAM, 0, id, &[0, 0, 0, 8])).unwrap();
        server.consume_output(server.output().len());
    }
    assert_eq!(server.active_streams(), 1);
}

/// Nothing but a keepalive, for months.
#[test]
fn a_silent_tunnel_may_ask_for_ever() {
    let mut server = server();
    for _ in 0..1_000_000 {
        feed(&mut server, &raw(kind::PING, 0, 0, &[0; 8])).unwrap();
        server.consume_output(server.output().len());
        server.pass_time(10);
    }
}

/// A peer that gives credit in small pieces as its application reads.
#[test]
fn credit_in_small_pieces_is_no_flood() {
    let mut server = server();
    feed(&mut server, &connect(1)).unwrap();
    server.respond(StreamId(1), 200, None, false).unwrap();
    let update = |stream| raw(kind::WINDOW_UPDATE, 0, stream, &1024u32.to_be_bytes());
    for _ in 0..10_000 {
        server.data_header(StreamId(1), 16_384, false).unwrap();
        for _ in 0..16 {
            feed(&mut server, &[update(0), update(1)].concat()).unwrap();
        }
    }
}

#[test]
fn a_burst_of_cancellations_is_accepted() {
    let mut server = server();
    let opens: Vec<u8> = (0..200).flat_map(|n| connect(2 * n + 1)).collect();
    assert_eq!(feed(&mut server, &opens).unwrap().len(), 200);
    let resets: Vec<u8> = (0..200)
        .flat_map(|n| raw(kind::RST_STREAM, 0, 2 * n + 1, &[0, 0, 0, 8]))
        .collect();
    assert_eq!(feed(&mut server, &resets).unwrap().len(), 200);
}

/// A peer that opens a window by a byte has every stream that waits for it woken: with two hundred
/// of them it may not do so for ever, with few it may.
#[test]
fn windows_opened_by_next_to_nothing_are_a_flood() {
    let open = |streams: u32| {
        let mut server = server();
        for id in (0..streams).map(|n| 2 * n + 1) {
            feed(&mut server, &connect(id)).unwrap();
            server.respond(StreamId(id), 200, None, false).unwrap();
        }
        while server.send_capacity(StreamId(1)) > 0 {
            let n = server.send_capacity(StreamId(1)).min(16_384);
            server.data_header(StreamId(1), n, false).unwrap();
        }
        let update = raw(kind::WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]);
        let failed = (0..10_000).find(|_| {
            let Ok(told) = feed(&mut server, &update) else {
                return true;
            };
            let last = told.into_iter().last();
            if let Some(Event::Writable { id }) = last {
                server.data_header(id, 1, false).unwrap();
            }
            server.consume_output(server.output().len());
            false
        });
        (failed, server)
    };
    let (failed, server) = open(200);
    assert!(failed.is_some_and(|updates| updates < 1_000), "{failed:?}");
    assert!(server.is_closed());
    let (failed, _) = open(20);
    assert_eq!(failed, None);
}
