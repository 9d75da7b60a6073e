//! Frames of ours read by nghttp2, and its frames by us: its server takes a tunnel's requests, its
//! client gets a server's answers. Both print every frame as they decode it.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use hbone::{Config, ConnectRequest, Connection, Event, Role};

const PATIENCE: Duration = Duration::from_secs(30);
const BAGGAGE: &str = "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,service.name=web";

/// Whether `program` is there; says what is skipped if not.
fn installed(test: &str, program: &str, package: &str) -> bool {
    let there = Command::new(program).arg("--version").output().is_ok();
    if !there {
        eprintln!("skipped: {test}: no {program} (apt-get install {package})");
    }
    there
}

/// A program that does not outlive the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One end on a socket.
struct End {
    stream: TcpStream,
    codec: Connection,
    events: VecDeque<Event>,
}

impl End {
    fn new(stream: TcpStream, role: Role) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let config = match role {
            Role::Client => Config::client(),
            Role::Server => Config::server(),
        };
        Self {
            stream,
            codec: Connection::new(role, &config),
            events: VecDeque::new(),
        }
    }

    fn flush(&mut self) {
        let waiting = self.codec.output().to_vec();
        self.codec.consume_output(waiting.len());
        self.stream.write_all(&waiting).unwrap();
    }

    /// The next event; none at the end of the connection.
    fn event(&mut self) -> Option<Event> {
        loop {
            self.flush();
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            let mut input = [0; 16_384];
            match self.stream.read(&mut input) {
                Ok(n @ 1..) => self.codec.receive(&input[..n], &mut self.events).unwrap(),
                Ok(_) => return None,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("nghttp2 says nothing: {error}"),
            }
        }
    }
}

fn no_complaints(printed: &str) {
    for complaint in ["[ERROR]", "[INVALID", "PROTOCOL_ERROR", "COMPRESSION_ERROR"] {
        assert!(!printed.contains(complaint), "{complaint} in:\n{printed}");
    }
}

/// nghttp2's server, listening.
fn nghttpd(documents: &std::path::Path) -> (Running, SocketAddr) {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        // Free now; somebody may be quicker, and then this is done again.
        let addr = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .unwrap();
        let child = Command::new("nghttpd")
            .args(["--no-tls", "-v", "-a", "127.0.0.1", "-d"])
            .arg(documents)
            .arg(addr.port().to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut running = Running(child);
        while running.0.try_wait().unwrap().is_none() {
            if TcpStream::connect(addr).is_ok() {
                return (running, addr);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
    panic!("nghttpd does not start");
}

#[test]
fn nghttp2_serves_our_client() {
    if !installed("nghttp2_serves_our_client", "nghttpd", "nghttp2-server") {
        return;
    }
    let (mut server, addr) = nghttpd(&std::env::temp_dir());
    let mut client = End::new(TcpStream::connect(addr).unwrap(), Role::Client);
    let long = "x".repeat(5_000);
    let requests = [
        ("10.244.2.11:8080", BAGGAGE),
        ("[fd00::1]:80", &*long),
        ("web.shop.svc.cluster.local:80", BAGGAGE),
    ];
    let mut open = Vec::new();
    for (authority, baggage) in requests {
        let request = ConnectRequest {
            authority,
            baggage: Some(baggage),
            forwarded: Some("for=\"10.244.1.11:40312\";host=web.shop"),
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"),
            x_forwarded_network: None,
        };
        let id = client.codec.open(&request).unwrap();
        client.flush();
        // It answers requests that are whole.
        let end = client.codec.data_header(id, 0, true).unwrap();
        client.stream.write_all(&end).unwrap();
        open.push(id);
    }
    client.codec.ping(*b"12345678");
    // It is no proxy, so it refuses; by an answer or a reset, which both end the stream.
    let mut pongs = 0;
    while !open.is_empty() || pongs == 0 {
        match client.event().expect("nghttpd goes on") {
            Event::Response { status, .. } => assert!((400..600).contains(&status), "{status}"),
            Event::Data { id, range } => client.codec.release(id, range.len()),
            Event::End { id } | Event::Reset { id, .. } => open.retain(|other| *other != id),
            Event::Pong(_) => pongs += 1,
            _ => {}
        }
    }
    client.codec.shutdown_graceful();
    client.flush();
    drop(client);
    thread::sleep(Duration::from_millis(200)); // for it to print the last frames
    server.0.kill().unwrap();
    let mut printed = String::new();
    let mut stdout = server.0.stdout.take().unwrap();
    stdout.read_to_string(&mut printed).unwrap();
    no_complaints(&printed);
    assert_eq!(printed.matches(":method: CONNECT").count(), 3, "{printed}");
    for (authority, baggage) in requests {
        assert!(
            printed.contains(&format!(":authority: {authority}")),
            "{printed}"
        );
        assert!(
            printed.contains(&format!("baggage: {baggage}")),
            "{printed}"
        );
    }
    for frame in ["SETTINGS", "WINDOW_UPDATE", "HEADERS", "PING"] {
        assert!(
            printed.contains(&format!("recv {frame} frame")),
            "{frame}: {printed}"
        );
    }
}

#[test]
fn nghttp2_understands_our_server() {
    if !installed("nghttp2_understands_our_server", "nghttp", "nghttp2-client") {
        return;
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut server = End::new(stream, Role::Server);
        while let Some(event) = server.event() {
            let Event::Request { id, head } = event else {
                continue;
            };
            assert_eq!((&*head.method, head.is_connect()), ("GET", false));
            server.codec.respond(id, 200, Some(BAGGAGE), false).unwrap();
            server.flush();
            for (len, end) in [(10_000, false), (1, false), (0, true)] {
                let header = server.codec.data_header(id, len, end).unwrap();
                server.stream.write_all(&header).unwrap();
                server.stream.write_all(&vec![b'.'; len]).unwrap();
            }
        }
    });
    let output = Command::new("nghttp")
        .args(["-v", "-n", "--timeout=20", &format!("http://{addr}/")])
        .output()
        .unwrap();
    server.join().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{printed}");
    no_complaints(&printed);
    for wanted in [
        ":status: 200",
        &format!("baggage: {BAGGAGE}"),
        "recv DATA frame <length=10000",
        "SETTINGS_MAX_CONCURRENT_STREAMS",
        "recv WINDOW_UPDATE frame",
    ] {
        assert!(printed.contains(wanted), "{wanted}: {printed}");
    }
}
