//! GOAWAY in both directions.

use super::*;

#[test]
fn a_server_shuts_down_in_two_phases() {
    let mut server = server();
    feed(&mut server, &connect(1)).unwrap();
    server.shutdown_graceful();
    let frames = drain(&mut server);
    assert_eq!(frames[0].0.kind, kind::GOAWAY);
    assert_eq!(frames[0].1[..4], MAX_31.to_be_bytes());
    assert_eq!(frames[1].0.kind, kind::PING);
    // In flight: still accepted.
    assert_eq!(feed(&mut server, &connect(3)).unwrap().len(), 1);
    let pong = raw(kind::PING, flag::ACK, 0, &frames[1].1);
    assert_eq!(feed(&mut server, &pong).unwrap(), []);
    let frames = drain(&mut server);
    assert_eq!(
        (frames[0].0.kind, &frames[0].1[..4]),
        (kind::GOAWAY, &3u32.to_be_bytes()[..])
    );
    // Too late: ignored, as is its DATA.
    let late = [connect(5), raw(kind::DATA, 0, 5, b"x"), connect(5)].concat();
    assert_eq!(feed(&mut server, &late).unwrap(), []);
    assert!(!server.is_closed());
    server.reset(StreamId(1), ErrorCode::CANCEL);
    server.reset(StreamId(3), ErrorCode::CANCEL);
    assert!(server.is_closed());
}

#[test]
fn a_client_told_to_go_away_finishes_what_was_accepted() {
    let mut client = client();
    let (kept, refused) = (
        client.open(&REQUEST).unwrap(),
        client.open(&REQUEST).unwrap(),
    );
    let mut payload = 1u32.to_be_bytes().to_vec();
    payload.extend([0, 0, 0, 0]);
    payload.extend(b"debug data of any length");
    let events = feed(&mut client, &raw(kind::GOAWAY, 0, 0, &payload)).unwrap();
    let code = ErrorCode::REFUSED_STREAM;
    let expected = [
        Event::GoAway {
            last: kept,
            code: ErrorCode::NO_ERROR,
        },
        Event::Reset { id: refused, code },
    ];
    assert_eq!(events, expected);
    assert_eq!(client.open(&REQUEST), Err(OpenError::GoingAway));
    assert!(!client.is_closed());
    feed(&mut client, &ok(1)).unwrap();
    client.data_header(kept, 0, true).unwrap();
    feed(&mut client, &raw(kind::DATA, flag::END_STREAM, 1, &[])).unwrap();
    assert!(client.is_closed());
}
