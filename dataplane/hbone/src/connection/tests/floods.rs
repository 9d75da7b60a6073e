//! Load without progress ends in ENHANCE_YOUR_CALM; honest use of the same frames does not.

use super::*;

/// Feeds the bytes `step` yields until the connection fails, in calls of about 16 KiB as TLS
/// records would be, draining the output in between. Returns how many steps it took.
fn flood(connection: &mut Connection, mut step: impl FnMut(u32) -> Vec<u8>) -> u32 {
    let mut record = Vec::new();
    for count in 0..200_000 {
        record.extend(step(count));
        if record.len() < 16_000 {
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
    let cases: [(&str, Step); 9] = [
        ("PING", |_| raw(kind::PING, 0, 0, &[0; 8])),
        ("PONG", |_| raw(kind::PING, flag::ACK, 0, &[0; 8])),
        ("SETTINGS", |_| raw(kind::SETTINGS, 0, 0, &[])),
        ("SETTINGS ACK", |_| raw(kind::SETTINGS, flag::ACK, 0, &[])),
        ("PRIORITY", |_| raw(kind::PRIORITY, 0, 1, &[0; 5])),
        ("unknown", |_| raw(0xee, 0, 1, &[])),
        ("GOAWAY", |_| raw(kind::GOAWAY, 0, 0, &[0; 8])),
        ("empty DATA", |_| raw(kind::DATA, 0, 1, &[])),
        ("padded empty DATA", |_| {
            raw(kind::DATA, flag::PADDED, 1, &[0])
        }),
    ];
    for (name, step) in cases {
        let mut server = server();
        feed(&mut server, &connect(1)).unwrap();
        let steps = flood(&mut server, step);
        assert!(steps < 3_000, "{name} took {steps}");
    }
}

#[test]
fn rapid_reset_is_stopped() {
    let step = |n: u32| {
        let id = 2 * n + 1;
        [connect(id), raw(kind::RST_STREAM, 0, id, &[0, 0, 0, 8])].concat()
    };
    assert!(flood(&mut server(), step) < 2_000);
}

#[test]
fn making_us_reset_is_stopped() {
    let step = |n: u32| {
        let id = 2 * n + 1;
        [connect(id), raw(kind::WINDOW_UPDATE, 0, id, &[0; 4])].concat()
    };
    assert!(flood(&mut server(), step) < 2_000);
    let malformed = block(&[(":method", "CONNECT")]);
    let step = |n: u32| raw(kind::HEADERS, flag::END_HEADERS, 2 * n + 1, &malformed);
    assert!(flood(&mut server(), step) < 2_000);
}

#[test]
fn opening_beyond_the_limit_is_stopped() {
    let mut server = server();
    assert!(flood(&mut server, |n| connect(2 * n + 1)) < 2_000);
}

#[test]
fn endless_header_blocks_are_stopped() {
    let open = raw(kind::HEADERS, 0, 1, &connect_block());
    let mut server = server();
    feed(&mut server, &open).unwrap();
    assert!(flood(&mut server, |_| raw(kind::CONTINUATION, 0, 1, &[])) < 2_000);

    let mut server = ready(Role::Server, &Config::server());
    feed(&mut server, &open).unwrap();
    let fragment = block(&[("x", &"y".repeat(3_000))]);
    let steps = flood(&mut server, |_| raw(kind::CONTINUATION, 0, 1, &fragment));
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
