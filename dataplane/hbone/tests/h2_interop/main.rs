//! Interoperation with the `h2` crate, both roles, over an in-memory pipe.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod side;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use hbone::{Config, ErrorCode, Role};
use http::{Method, Request, Response};
use testkit::Random;
use tokio::io::DuplexStream;

use side::{PIPE, Side, payload};

fn all_ended(side: &Side) -> bool {
    !side.flows.is_empty() && side.flows.values().all(|f| f.ended && f.finished)
}

/// Echoes a body through h2, releasing credit only as it is sent on.
async fn h2_echo(mut body: RecvStream, mut reply: SendStream<Bytes>) {
    while let Some(chunk) = body.data().await {
        let chunk = chunk.unwrap();
        body.flow_control().release_capacity(chunk.len()).unwrap();
        h2_send(&mut reply, &chunk, false).await;
    }
    reply.send_data(Bytes::new(), true).unwrap();
}

async fn h2_send(stream: &mut SendStream<Bytes>, mut bytes: &[u8], end: bool) {
    while !bytes.is_empty() {
        stream.reserve_capacity(bytes.len());
        let capacity = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await;
        let (now, rest) = bytes.split_at(capacity.unwrap().unwrap().min(bytes.len()));
        stream
            .send_data(Bytes::copy_from_slice(now), end && rest.is_empty())
            .unwrap();
        bytes = rest;
    }
}

async fn h2_receive(mut body: RecvStream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.unwrap();
        body.flow_control().release_capacity(chunk.len()).unwrap();
        all.extend_from_slice(&chunk);
    }
    all
}

fn h2_echo_server(io: DuplexStream, builder: h2::server::Builder) {
    tokio::spawn(async move {
        let mut connection = builder.handshake::<_, Bytes>(io).await.unwrap();
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            assert_eq!(request.method(), Method::CONNECT);
            assert_eq!(request.uri().scheme(), None);
            assert_eq!(request.headers()["baggage"], "k8s.namespace.name=default");
            assert_eq!(request.headers()["forwarded"], "for=\"10.0.0.9:1234\"");
            let response = Response::builder()
                .header("baggage", "peer=h2")
                .body(())
                .unwrap();
            let reply = respond.send_response(response, false).unwrap();
            tokio::spawn(h2_echo(request.into_body(), reply));
        }
    });
}

fn connect(authority: &str) -> Request<()> {
    Request::builder()
        .method(Method::CONNECT)
        .uri(authority)
        .header("baggage", "k8s.namespace.name=default,service.name=client")
        .header("forwarded", "for=\"10.0.0.9:1234\"")
        .header(
            "traceparent",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        )
        .body(())
        .unwrap()
}

fn small_windows(base: &Config) -> Config {
    Config {
        stream_window: 20_000,
        connection_window: 65_535,
        max_frame_size: 16_384,
        ..base.clone()
    }
}

#[tokio::test]
async fn our_client_echoes_through_an_h2_server() {
    let defaults = h2::server::Builder::new();
    let mut large = h2::server::Builder::new();
    large
        .initial_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .max_frame_size(1 << 20)
        .max_concurrent_streams(200);
    let mut tiny = h2::server::Builder::new();
    tiny.initial_window_size(1_000).max_frame_size(16_384);
    let cases = [
        (defaults.clone(), Config::client(), 6, 700_000),
        (large.clone(), Config::client(), 3, 3_000_000),
        (defaults, small_windows(&Config::client()), 6, 400_000),
        (tiny, Config::client(), 6, 200_000),
    ];
    for (case, (builder, config, streams, len)) in cases.into_iter().enumerate() {
        let (io, theirs) = tokio::io::duplex(PIPE);
        h2_echo_server(theirs, builder);
        let mut side = Side::new(Role::Client, &config, io, case as u64 + 7);
        for n in 0..streams {
            side.open("10.0.0.1:8080", payload(2 * n + 1, len), true);
        }
        side.run(all_ended).await;
        assert_eq!(side.failure, None);
        for (id, flow) in &side.flows {
            assert_eq!(flow.status, Some(200));
            assert!(
                flow.received == payload(id.get(), len),
                "case {case}, stream {id}"
            );
        }
        assert_eq!(side.connection.active_streams(), 0);
    }
}

#[tokio::test]
async fn our_server_echoes_for_an_h2_client() {
    let defaults = h2::client::Builder::new();
    let mut large = h2::client::Builder::new();
    large
        .initial_window_size(4 << 20)
        .initial_connection_window_size(16 << 20);
    large.max_frame_size(1 << 20);
    let mut tiny = h2::client::Builder::new();
    tiny.initial_window_size(1_000);
    let cases = [
        (defaults.clone(), Config::server(), 6, 700_000),
        (large, Config::server(), 3, 3_000_000),
        (defaults, small_windows(&Config::server()), 6, 400_000),
        (tiny, Config::server(), 6, 200_000),
    ];
    for (case, (builder, config, streams, len)) in cases.into_iter().enumerate() {
        let (io, theirs) = tokio::io::duplex(PIPE);
        let mut side = Side::new(Role::Server, &config, io, case as u64 + 77);
        let ours = tokio::spawn(async move {
            side.run(|_| false).await;
            side
        });
        let (mut client, connection) = builder.handshake::<_, Bytes>(theirs).await.unwrap();
        let driver = tokio::spawn(connection);
        let mut tunnels = Vec::new();
        for n in 0..streams {
            client = client.ready().await.unwrap();
            let (response, mut send) = client.send_request(connect("[fd00::1]:80"), false).unwrap();
            tunnels.push(tokio::spawn(async move {
                let response = response.await.unwrap();
                assert_eq!(response.status(), 200);
                assert_eq!(response.headers()["baggage"], "peer=ours");
                let body = payload(n, len);
                let expected = body.clone();
                let sender = async move {
                    let mut random = Random::new(u64::from(n) + 5);
                    let mut rest = &body[..];
                    while !rest.is_empty() {
                        let (now, tail) = rest.split_at(rest.len().min(1 + random.below(90_000)));
                        h2_send(&mut send, now, tail.is_empty()).await;
                        rest = tail;
                    }
                };
                let (_, got) = tokio::join!(sender, h2_receive(response.into_body()));
                assert!(got == expected, "tunnel {n}");
            }));
        }
        for tunnel in tunnels {
            tunnel.await.unwrap();
        }
        drop(client);
        driver.await.unwrap().unwrap();
        let side = ours.await.unwrap();
        assert_eq!(side.failure, None);
        assert_eq!(side.connection.active_streams(), 0);
        let head = side.flows.values().next().unwrap().head.as_ref().unwrap();
        assert_eq!(
            (&*head.method, &*head.authority),
            ("CONNECT", "[fd00::1]:80")
        );
        let baggage = Some("k8s.namespace.name=default,service.name=client");
        assert_eq!(head.baggage.as_deref(), baggage);
        assert_eq!(head.traceparent.as_deref().map(str::len), Some(55));
    }
}

#[tokio::test]
async fn compressed_headers_of_h2_are_understood() {
    let (io, theirs) = tokio::io::duplex(PIPE);
    let mut side = Side::new(Role::Server, &Config::server(), io, 3);
    let ours = tokio::spawn(async move {
        side.run(|_| false).await;
        side
    });
    let (mut client, connection) = h2::client::handshake(theirs).await.unwrap();
    let driver = tokio::spawn(connection);
    let mut random = Random::new(99);
    let mut expected = Vec::new();
    for n in 0..400usize {
        // Few distinct values and long ones: hits, misses and evictions in the dynamic table.
        let printable = |r: &mut Random, max| -> String {
            (0..1 + r.below(max))
                .map(|_| (b'!' + r.below(94) as u8) as char)
                .collect()
        };
        let baggage = match n % 3 {
            0 => printable(&mut random, 1500),
            1 => format!("k8s.pod.name=pod-{}", random.below(20)),
            _ => "k8s.namespace.name=default".to_owned(),
        };
        let authority = format!(
            "10.0.{}.{}:{}",
            n % 7,
            random.below(255),
            1 + random.below(60_000)
        );
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri(&authority)
            .header("baggage", &baggage)
            .header("x-other", printable(&mut random, 60))
            .body(())
            .unwrap();
        client = client.ready().await.unwrap();
        let (response, _) = client.send_request(request, true).unwrap();
        assert_eq!(response.await.unwrap().status(), 200);
        expected.push((authority, baggage));
    }
    drop(client);
    driver.await.unwrap().unwrap();
    let side = ours.await.unwrap();
    assert_eq!(side.failure, None);
    let heads = side.flows.values().map(|flow| flow.head.as_ref().unwrap());
    let found: Vec<_> = heads
        .map(|h| {
            (
                h.authority.to_string(),
                h.baggage.as_deref().unwrap().to_owned(),
            )
        })
        .collect();
    assert!(found == expected);
}

#[tokio::test]
async fn half_closed_streams_go_on_in_the_other_direction() {
    // Our client ends at once, the h2 server then sends 2 MB.
    let (io, theirs) = tokio::io::duplex(PIPE);
    tokio::spawn(async move {
        let mut connection = h2::server::handshake(theirs).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        tokio::spawn(async move { while connection.accept().await.is_some() {} });
        let mut reply = respond.send_response(Response::new(()), false).unwrap();
        assert_eq!(h2_receive(request.into_body()).await, b"get");
        h2_send(&mut reply, &payload(1, 2_000_000), true).await;
    });
    let mut side = Side::new(Role::Client, &Config::client(), io, 5);
    let id = side.open("a:1", b"get".to_vec(), true);
    side.run(all_ended).await;
    assert!(side.flows[&id].received == payload(1, 2_000_000));

    // The h2 server ends first, our client then sends 2 MB.
    let (io, theirs) = tokio::io::duplex(PIPE);
    let server = tokio::spawn(async move {
        let mut connection = h2::server::handshake(theirs).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        let driver = tokio::spawn(async move { while connection.accept().await.is_some() {} });
        let mut reply = respond.send_response(Response::new(()), false).unwrap();
        reply.send_data(Bytes::from_static(b"bye"), true).unwrap();
        let received = h2_receive(request.into_body()).await;
        driver.abort();
        received
    });
    let mut side = Side::new(Role::Client, &Config::client(), io, 5);
    let id = side.open("a:1", Vec::new(), false);
    side.run(|side| side.flows.values().all(|flow| flow.ended))
        .await;
    assert_eq!(side.flows[&id].received, b"bye");
    let flow = side.flows.get_mut(&id).unwrap();
    (flow.queued, flow.finish) = (payload(9, 2_000_000).into(), true);
    side.run(all_ended).await;
    side.run(|_| false).await;
    assert!(server.await.unwrap() == payload(9, 2_000_000));
}

#[tokio::test]
async fn resets_carry_their_code_both_ways() {
    // h2 resets.
    let (io, theirs) = tokio::io::duplex(PIPE);
    tokio::spawn(async move {
        let mut connection = h2::server::handshake(theirs).await.unwrap();
        let (_request, mut respond) = connection.accept().await.unwrap().unwrap();
        let mut reply: SendStream<Bytes> = respond.send_response(Response::new(()), false).unwrap();
        reply.send_reset(h2::Reason::CONNECT_ERROR);
        while connection.accept().await.is_some() {}
    });
    let mut side = Side::new(Role::Client, &Config::client(), io, 5);
    let id = side.open("a:1", vec![1; 1000], false);
    side.run(|side| side.flows.values().all(|flow| flow.reset.is_some()))
        .await;
    assert_eq!(side.flows[&id].reset, Some(ErrorCode::CONNECT_ERROR));

    // We reset.
    let (io, theirs) = tokio::io::duplex(PIPE);
    let mut side = Side::new(Role::Server, &Config::server(), io, 5);
    let ours = tokio::spawn(async move {
        side.run(|side| side.flows.values().any(|flow| flow.received.len() > 3))
            .await;
        let id = *side.flows.keys().next().unwrap();
        side.connection.reset(id, ErrorCode::REFUSED_STREAM);
        side.flows.get_mut(&id).unwrap().reset = Some(ErrorCode::REFUSED_STREAM);
        side.run(|_| false).await;
        side
    });
    let (client, connection) = h2::client::handshake(theirs).await.unwrap();
    let driver = tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let (response, mut send) = client.send_request(connect("a:1"), false).unwrap();
    let mut body = response.await.unwrap().into_body();
    h2_send(&mut send, b"four", false).await;
    let error = loop {
        match body.data().await.unwrap() {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.reason(), Some(h2::Reason::REFUSED_STREAM));
    drop((send, body));
    // h2 cancels when a stream is dropped.
    let (response, send) = client.send_request(connect("a:2"), false).unwrap();
    let response = response.await.unwrap();
    drop((response, send, client));
    driver.await.unwrap().unwrap();
    let side = ours.await.unwrap();
    assert_eq!(side.failure, None);
    assert_eq!(
        side.flows.values().last().unwrap().reset,
        Some(ErrorCode::CANCEL)
    );
}

#[tokio::test]
async fn pings_are_answered_both_ways() {
    let (io, theirs) = tokio::io::duplex(PIPE);
    let mut side = Side::new(Role::Server, &Config::server(), io, 5);
    side.connection.ping(*b"ourpings");
    let ours = tokio::spawn(async move {
        side.run(|_| false).await;
        side
    });
    let (client, mut connection) = h2::client::handshake(theirs).await.unwrap();
    let mut pings = connection.ping_pong().unwrap();
    let driver = tokio::spawn(connection);
    for _ in 0..3 {
        pings.ping(h2::Ping::opaque()).await.unwrap();
    }
    drop(client);
    driver.await.unwrap().unwrap();
    assert_eq!(ours.await.unwrap().pongs, [*b"ourpings"]);
}

#[tokio::test]
async fn an_h2_server_shuts_down_gracefully() {
    let (io, theirs) = tokio::io::duplex(PIPE);
    let server = tokio::spawn(async move {
        let mut connection = h2::server::handshake(theirs).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        connection.graceful_shutdown();
        let reply = respond.send_response(Response::new(()), false).unwrap();
        tokio::spawn(h2_echo(request.into_body(), reply));
        assert!(connection.accept().await.is_none());
    });
    let mut side = Side::new(Role::Client, &Config::client(), io, 5);
    let id = side.open("a:1", payload(1, 300_000), false);
    side.run(|side| side.go_away.is_some_and(|(last, _)| last == 1))
        .await;
    assert_eq!(side.go_away, Some((1, ErrorCode::NO_ERROR)));
    assert!(!side.connection.can_open());
    side.flows.get_mut(&id).unwrap().finish = true;
    side.run(all_ended).await;
    assert!(side.flows[&id].received == payload(1, 300_000));
    assert!(side.connection.is_closed());
    drop(side);
    server.await.unwrap();
}

#[tokio::test]
async fn our_server_shuts_down_gracefully() {
    let (io, theirs) = tokio::io::duplex(PIPE);
    let mut side = Side::new(Role::Server, &Config::server(), io, 5);
    let ours = tokio::spawn(async move {
        side.run(|side| !side.flows.is_empty()).await;
        side.connection.shutdown_graceful();
        side.run(|side| side.connection.is_closed()).await;
        side
    });
    let (client, connection) = h2::client::handshake(theirs).await.unwrap();
    let driver = tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let (response, mut send) = client.send_request(connect("a:1"), false).unwrap();
    let response = response.await.unwrap();
    let body = payload(4, 500_000);
    let (_, got) = tokio::join!(
        h2_send(&mut send, &body, true),
        h2_receive(response.into_body())
    );
    assert!(got == body);
    let side = ours.await.unwrap();
    assert_eq!((side.failure, side.connection.is_closed()), (None, true));
    drop(side);
    driver.await.unwrap().unwrap();
    assert!(client.ready().await.is_err(), "h2 knows that it is over");
}

#[tokio::test]
async fn refusals_and_other_methods_reach_h2() {
    let (io, theirs) = tokio::io::duplex(PIPE);
    let mut side = Side::new(Role::Server, &Config::server(), io, 5);
    side.echo = false;
    let ours = tokio::spawn(async move {
        side.run(|side| side.flows.len() == 2).await;
        let ids: Vec<_> = side.flows.keys().copied().collect();
        assert!(side.flows[&ids[0]].head.as_ref().unwrap().is_connect());
        assert!(!side.flows[&ids[1]].head.as_ref().unwrap().is_connect());
        side.connection.respond(ids[0], 401, None, true).unwrap();
        side.connection.respond(ids[1], 400, None, true).unwrap();
        side.connection.reset(ids[0], ErrorCode::NO_ERROR);
        side.run(|_| false).await;
        side
    });
    let (client, connection) = h2::client::handshake(theirs).await.unwrap();
    let driver = tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let (refused, _send) = client.send_request(connect("a:1"), false).unwrap();
    let get = Request::get("https://a:1/path").body(()).unwrap();
    let (bad, _) = client.send_request(get, true).unwrap();
    let refused = refused.await.unwrap();
    assert_eq!(refused.status(), 401);
    assert!(h2_receive(refused.into_body()).await.is_empty());
    assert_eq!(bad.await.unwrap().status(), 400);
    drop((client, _send));
    driver.await.unwrap().unwrap();
    assert_eq!(ours.await.unwrap().failure, None);
}
