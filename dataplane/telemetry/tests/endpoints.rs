//! The HTTP endpoints over real sockets.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that fails panics")]

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use telemetry::{
    Admin, HttpLimits, LogFormat, LogSink, Logging, MetricKind, Ready, Registry, Shutdown,
    serve_admin, serve_metrics, serve_readiness,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// Serves all three on a thread of their own; returns metrics, readiness, admin.
fn serve(registry: Registry, ready: Ready, admin: Admin, limits: HttpLimits) -> [SocketAddr; 3] {
    let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let addresses = [0, 1, 2].map(|i: usize| listeners[i].local_addr().unwrap());
    let [metrics, readiness, administration] = listeners;
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            tokio::join!(
                serve_metrics(metrics, registry, limits),
                serve_readiness(readiness, ready, limits),
                serve_admin(administration, admin, limits),
            )
        })
    });
    addresses
}

fn admin(shutdown: Shutdown) -> Admin {
    let sink = LogSink::new(LogFormat::Plain, 1 << 16, io::sink()).unwrap();
    let (logging, subscriber) = Logging::new(sink, None).unwrap();
    // The filter lives in the subscriber: it has to outlive the test.
    std::mem::forget(subscriber);
    let config_dump = Box::new(|| serde_json::json!({"workloads": [{"name": "web"}]}));
    Admin {
        config_dump,
        limits: Box::new(|| "open files: 7 at most".to_owned()),
        logging,
        shutdown,
    }
}

fn all() -> (Registry, Ready, Shutdown, [SocketAddr; 3]) {
    let (registry, ready, shutdown) = (Registry::new("1.2.3"), Ready::new(), Shutdown::new());
    let admin = admin(shutdown.clone());
    let addresses = serve(
        registry.clone(),
        ready.clone(),
        admin,
        HttpLimits::default(),
    );
    (registry, ready, shutdown, addresses)
}

/// One request; status, content type and body.
fn request(to: SocketAddr, method: &str, path: &str, accept: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let content_type = head
        .lines()
        .find_map(|line| line.strip_prefix("content-type: "));
    (
        status,
        content_type.unwrap_or_default().to_owned(),
        body.to_owned(),
    )
}

#[test]
fn metrics_in_both_formats_at_both_paths() {
    let (registry, _, _, [metrics, ..]) = all();
    let name = "ztunnel_worker_loops_total";
    registry
        .register_worker(3, name, "Loops", MetricKind::Counter, || 42)
        .unwrap();
    for path in ["/metrics", "/stats/prometheus"] {
        let (status, kind, body) = request(metrics, "GET", path, "text/plain");
        assert_eq!(
            (status, &*kind),
            (200, "text/plain; version=0.0.4; charset=utf-8")
        );
        assert!(
            body.contains("istio_build{component=\"ztunnel\",tag=\"1.2.3\"} 1\n"),
            "{body}"
        );
        assert!(
            body.contains("\nztunnel_worker_loops_total{worker=\"3\"} 42\n"),
            "{body}"
        );
        assert!(body.contains("\nprocess_open_fds ") && body.contains("\nprocess_max_fds "));
        assert!(!body.contains("# EOF"));
    }
    let accept = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;q=0.4";
    let (status, kind, body) = request(metrics, "GET", "/metrics", accept);
    let expected = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert_eq!((status, &*kind), (200, expected));
    assert!(
        body.contains("# TYPE ztunnel_worker_loops counter\n"),
        "{body}"
    );
    assert!(body.ends_with("# EOF\n"), "{body}");
    assert_eq!(request(metrics, "POST", "/metrics", "*/*").0, 405);
    assert_eq!(request(metrics, "GET", "/other", "*/*").0, 404);
}

#[test]
fn readiness_names_what_is_missing() {
    let (_, ready, _, [_, readiness, _]) = all();
    let (proxy, state) = (ready.task("proxy listeners"), ready.task("mesh state"));
    let (status, _, body) = request(readiness, "GET", "/healthz/ready", "*/*");
    assert_eq!(
        (status, &*body),
        (500, "not ready, pending: mesh state, proxy listeners\n")
    );
    drop(proxy);
    let (status, _, body) = request(readiness, "GET", "/healthz/ready", "*/*");
    assert_eq!((status, &*body), (500, "not ready, pending: mesh state\n"));
    state.ready();
    let (status, _, body) = request(readiness, "GET", "/healthz/ready", "*/*");
    assert_eq!((status, &*body), (200, "ready\n"));
    assert_eq!(request(readiness, "GET", "/", "*/*").0, 404);
}

#[test]
fn administration() {
    let (_, _, shutdown, [_, _, admin]) = all();
    let (status, kind, body) = request(admin, "GET", "/", "*/*");
    assert_eq!((status, &*kind), (200, "text/html; charset=utf-8"));
    assert!(body.contains("config_dump") && body.contains("open files: 7 at most"));
    let (status, kind, body) = request(admin, "GET", "/config_dump", "*/*");
    assert_eq!((status, &*kind), (200, "application/json"));
    let dump: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(dump["workloads"][0]["name"], "web");

    let logging = |query: &str| {
        let (status, _, body) = request(admin, "POST", &format!("/logging{query}"), "*/*");
        (status, body)
    };
    let shows = |level: &str| (200, format!("current log level is {level}\n"));
    assert_eq!(logging(""), shows("hickory_server::server=off,info"));
    assert_eq!(
        logging("?level=debug"),
        shows("hickory_server::server=off,debug")
    );
    assert_eq!(logging(""), shows("hickory_server::server=off,debug"));
    assert_eq!(logging("?reset"), shows("hickory_server::server=off,info"));
    let (status, body) = logging("?level=loud");
    assert_eq!(status, 400);
    assert!(
        body.starts_with("log filter `loud` must be") && body.contains("usage:"),
        "{body}"
    );
    assert_eq!(logging("?levle=info").0, 400);
    assert_eq!(logging(""), shows("hickory_server::server=off,info"));
    assert_eq!(request(admin, "GET", "/logging", "*/*").0, 405);

    assert_eq!(request(admin, "GET", "/quitquitquit", "*/*").0, 405);
    assert_eq!(request(admin, "GET", "/nothing", "*/*").0, 404);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let asked = |limit| {
        runtime.block_on(async {
            tokio::time::timeout(limit, shutdown.triggered())
                .await
                .is_ok()
        })
    };
    assert!(!asked(Duration::from_millis(1)), "nobody has asked yet");
    let (status, _, body) = request(admin, "POST", "/quitquitquit", "*/*");
    assert_eq!((status, &*body), (200, "shutdown now\n"));
    assert!(asked(PATIENCE));
}

#[test]
fn slow_and_hostile_clients_are_bounded() {
    let limits = HttpLimits {
        connections_max: 4,
        header_timeout: Duration::from_millis(300),
        connection_age_max: Duration::from_millis(900),
        grace: Duration::from_millis(300),
    };
    let admin = admin(Shutdown::new());
    let [metrics, ..] = serve(Registry::new("x"), Ready::new(), admin, limits);
    // As many connections as there may be, none of which ever completes a header.
    let mut silent: Vec<_> = (0..4)
        .map(|_| TcpStream::connect(metrics).unwrap())
        .collect();
    for stream in &mut silent {
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nhost: ")
            .unwrap();
    }
    let start = Instant::now();
    let (status, ..) = request(metrics, "GET", "/metrics", "*/*");
    assert_eq!(status, 200);
    assert!(
        start.elapsed() < PATIENCE,
        "the silent ones kept their places"
    );
    for stream in &mut silent {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut rest = Vec::new();
        // Closed or reset, both are an end.
        let _ended = stream.read_to_end(&mut rest);
        assert!(
            rest.is_empty() || rest.starts_with(b"HTTP/1.1 408"),
            "{rest:?}"
        );
    }
    // A header without end is refused once it is too long.
    let mut endless = TcpStream::connect(metrics).unwrap();
    endless.set_read_timeout(Some(PATIENCE)).unwrap();
    let _cut = endless.write_all(format!("GET /{} HTTP/1.1\r\n", "a".repeat(1 << 16)).as_bytes());
    let mut answer = Vec::new();
    let _ended = endless.read_to_end(&mut answer);
    assert!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"),
        "{answer:?}"
    );
    // An idle connection is ended by its age, even though its requests were fine.
    let mut idle = TcpStream::connect(metrics).unwrap();
    idle.set_read_timeout(Some(PATIENCE)).unwrap();
    idle.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    let mut answer = Vec::new();
    idle.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"));
}

/// Every one of the three ports: whoever holds connections open, and however fast new ones come, a
/// probe is answered, on a new connection and on one that is kept.
#[test]
fn idle_connections_keep_no_probe_out() {
    // Nobody goes because it is time.
    let limits = HttpLimits {
        header_timeout: Duration::from_secs(3600),
        connection_age_max: Duration::from_secs(3600),
        ..HttpLimits::default()
    };
    let admin = admin(Shutdown::new());
    let [metrics, readiness, admin] = serve(Registry::new("x"), Ready::new(), admin, limits);
    for (to, path) in [
        (metrics, "/metrics"),
        (readiness, "/healthz/ready"),
        (admin, "/"),
    ] {
        let idle = |_| TcpStream::connect(to).unwrap();
        let mut held: Vec<TcpStream> = (0..200).map(idle).collect();
        for probe in 0..20 {
            held.extend((0..20).map(idle));
            let (status, _, body) = request(to, "GET", path, "*/*");
            assert_eq!(status, 200, "{path}, probe {probe}: {body}");
        }
        // The oldest have gone, the newest are there.
        let first = &mut held[0];
        first.set_read_timeout(Some(PATIENCE)).unwrap();
        let ended = first.read(&mut [0; 1]);
        assert!(matches!(ended, Ok(0) | Err(_)), "{path}: {ended:?}");
        let last = held.last_mut().unwrap();
        last.set_read_timeout(Some(PATIENCE)).unwrap();
        last.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes())
            .unwrap();
        let mut answer = [0; 12];
        last.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200", "{path}");
    }
}
