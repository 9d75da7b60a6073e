//! Metrics and access log of connections, through the public interface.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that fails panics")]

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use mesh::{Service, ServiceConfig, Snapshot, Workload, WorkloadConfig};
use telemetry::{
    ConnectionInfo, Exposition, HboneTarget, LogFormat, LogSink, Logging, Registry, Reporter,
    ResponseFlags, Security, WorkerTelemetry,
};

const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A registry, logging, and the output that logging writes to.
struct Bench {
    registry: Registry,
    logging: Logging,
    output: Output,
}

impl Bench {
    fn new(format: LogFormat, filter: &str, registry: Registry) -> Self {
        let output = Output::default();
        let sink = LogSink::new(format, 1 << 20, output.clone()).unwrap();
        let (logging, subscriber) = Logging::new(sink, Some(filter)).unwrap();
        // The filter lives in the subscriber: it has to outlive the test.
        std::mem::forget(subscriber);
        Self {
            registry,
            logging,
            output,
        }
    }

    fn plain() -> Self {
        Self::new(LogFormat::Plain, "info", Registry::new("test"))
    }

    fn worker(&self) -> WorkerTelemetry {
        self.registry.worker(self.logging.access_log())
    }

    fn log(&self) -> String {
        assert!(self.logging.sink().flush(PATIENCE));
        String::from_utf8(self.output.0.lock().unwrap().clone()).unwrap()
    }

    /// The log's lines from the level on, with the duration's number taken out.
    fn lines(&self) -> Vec<String> {
        let line = |line: &str| {
            let line = line[27..].to_owned();
            match line.split_once("duration=\"") {
                Some((before, after)) => {
                    let (number, after) = after.split_once("ms\"").unwrap();
                    assert!(number.parse::<u32>().is_ok(), "{number}");
                    format!("{before}duration=\"Nms\"{after}")
                }
                None => line,
            }
        };
        self.log().lines().map(line).collect()
    }

    /// The samples of one family.
    fn samples(&self, family: &str) -> Vec<(String, u64)> {
        let text = self.registry.encode(Exposition::Text);
        let of_family = text
            .lines()
            .filter(|line| line.starts_with(&format!("{family}{{")));
        of_family
            .map(|line| {
                let (labels, value) = line[family.len()..].rsplit_once(' ').unwrap();
                (labels.to_owned(), value.parse().unwrap())
            })
            .collect()
    }

    fn total(&self, family: &str) -> u64 {
        self.samples(family).iter().map(|(_, value)| value).sum()
    }
}

fn workload(name: &str, deployment: &str) -> WorkloadConfig {
    WorkloadConfig {
        uid: format!("cluster1//v1/Pod/shop/{name}").into(),
        name: name.into(),
        namespace: "shop".into(),
        service_account: deployment.into(),
        workload_name: deployment.into(),
        canonical_name: deployment.into(),
        canonical_revision: "v1".into(),
        cluster_id: "cluster1".into(),
        ..WorkloadConfig::default()
    }
}

struct Model {
    client: Arc<Workload>,
    server: Arc<Workload>,
    service: Arc<Service>,
}

fn model() -> Model {
    let client = workload("web-1", "web");
    let mut server = workload("pay-1", "pay");
    server.locality.region = "eu".into();
    server.locality.zone = "eu-1".into();
    let uids = [client.uid.clone(), server.uid.clone()];
    let service = ServiceConfig {
        name: "pay".into(),
        namespace: "shop".into(),
        hostname: "pay.shop.svc.cluster.local".into(),
        ..ServiceConfig::default()
    };
    let snapshot = Snapshot::build(vec![client, server], vec![service], vec![]).unwrap();
    let [client, server] = uids.map(|uid| Arc::clone(snapshot.workload_by_uid(&uid).unwrap()));
    let service = snapshot
        .service("shop", "pay.shop.svc.cluster.local")
        .unwrap();
    Model {
        client,
        server,
        service: Arc::clone(service),
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// An HBONE connection as the client's proxy reports it.
fn outbound(model: &Model) -> ConnectionInfo {
    ConnectionInfo {
        reporter: Reporter::Source,
        source: Some(Arc::clone(&model.client)),
        destination: Some(Arc::clone(&model.server)),
        service: Some(Arc::clone(&model.service)),
        source_identity: Some(model.client.identity()),
        destination_identity: Some(model.server.identity()),
        security: Security::MutualTls,
        src: address("10.0.0.1:40000"),
        dst: address("10.0.0.2:15008"),
        hbone_dst: Some(address("10.0.0.2:8080").into()),
    }
}

/// The same as the server's proxy reports it.
fn inbound(model: &Model) -> ConnectionInfo {
    ConnectionInfo {
        reporter: Reporter::Destination,
        dst: address("10.0.0.2:8080"),
        ..outbound(model)
    }
}

const LABELS: &str = "{reporter=\"source\",source_workload=\"web\",\
    source_canonical_service=\"web\",source_canonical_revision=\"v1\",\
    source_workload_namespace=\"shop\",\
    source_principal=\"spiffe://cluster.local/ns/shop/sa/web\",source_app=\"web\",\
    source_version=\"v1\",source_cluster=\"cluster1\",\
    destination_service=\"pay.shop.svc.cluster.local\",destination_service_namespace=\"shop\",\
    destination_service_name=\"pay\",destination_workload=\"pay\",\
    destination_canonical_service=\"pay\",destination_canonical_revision=\"v1\",\
    destination_workload_namespace=\"shop\",\
    destination_principal=\"spiffe://cluster.local/ns/shop/sa/pay\",destination_app=\"pay\",\
    destination_version=\"v1\",destination_cluster=\"cluster1\",request_protocol=\"tcp\",\
    response_flags=\"-\",connection_security_policy=\"mutual_tls\",source_region=\"unknown\",\
    source_zone=\"unknown\",destination_region=\"eu\",destination_zone=\"eu-1\"}";

#[test]
fn every_label_in_istios_order() {
    let (bench, model) = (Bench::plain(), model());
    let worker = bench.worker();
    let record = worker.opened(outbound(&model));
    assert_eq!(
        bench.samples("istio_tcp_connections_opened_total"),
        [(LABELS.to_owned(), 1)]
    );
    assert_eq!(bench.samples("istio_tcp_connections_closed_total"), []);
    record.close(None, ResponseFlags::None);
    assert_eq!(
        bench.samples("istio_tcp_connections_closed_total"),
        [(LABELS.to_owned(), 1)]
    );
    assert_eq!(bench.samples("istio_tcp_connections_failed_total"), []);
}

#[test]
fn what_is_not_known_says_so() {
    let bench = Bench::plain();
    let (src, dst) = (address("10.0.0.9:1"), address("10.0.0.8:2"));
    let info = ConnectionInfo::new(Reporter::Destination, src, dst);
    bench.worker().opened(info).close(None, ResponseFlags::None);
    let [(labels, 1)] = &bench.samples("istio_tcp_connections_opened_total")[..] else {
        panic!("one sample expected");
    };
    assert_eq!(labels.matches("=\"").count(), 27);
    assert_eq!(labels.matches("=\"unknown\"").count(), 24);
    assert!(labels.starts_with("{reporter=\"destination\",source_workload=\"unknown\","));
    assert!(labels.contains("connection_security_policy=\"unknown\""));
    let fields = "src.addr=10.0.0.9:1 dst.addr=10.0.0.8:2 direction=\"inbound\" \
                  bytes_sent=0 bytes_recv=0 duration=\"Nms\"";
    assert_eq!(
        bench.lines(),
        [format!("\tinfo\taccess\tconnection complete\t{fields}")]
    );
}

#[test]
fn the_server_that_answered_is_named() {
    let (bench, model) = (Bench::plain(), model());
    let worker = bench.worker();
    let expected = |account: &str| mesh::Identity::new("cluster.local", "shop", account).unwrap();
    let info = ConnectionInfo {
        destination_identity: Some(expected("pay-former")),
        ..outbound(&model)
    };
    let record = worker.opening(info.clone());
    assert_eq!(bench.samples("istio_tcp_connections_opened_total"), []);
    assert_eq!(bench.total("istio_tcp_sockets_open"), 1);
    let record = record.proved(Some(&expected("pay")));
    let counted = [(LABELS.to_owned(), 1)];
    assert_eq!(bench.samples("istio_tcp_connections_opened_total"), counted);
    record.sent(3);
    assert_eq!(
        bench.samples("istio_tcp_sent_bytes_total"),
        [(LABELS.to_owned(), 3)]
    );
    record.close(None, ResponseFlags::None);
    assert_eq!(bench.samples("istio_tcp_connections_opened_total"), counted);
    assert_eq!(bench.samples("istio_tcp_connections_closed_total"), counted);
    let lines = bench.lines();
    assert!(
        lines[0].contains("dst.identity=\"spiffe://cluster.local/ns/shop/sa/pay\""),
        "{lines:?}"
    );
    // One that nobody answered is counted at its end, and so is one that a drain ended.
    let error = "nobody answers";
    worker
        .opening(info.clone())
        .close(Some(&error), ResponseFlags::Connect);
    drop(worker.opening(info));
    assert_eq!(bench.total("istio_tcp_connections_opened_total"), 3);
    assert_eq!(bench.total("istio_tcp_connections_closed_total"), 3);
    assert_eq!(bench.total("istio_tcp_sockets_open"), 0);
}

#[test]
fn bytes_advance_while_the_connection_lasts() {
    let (bench, model) = (Bench::plain(), model());
    let worker = bench.worker();
    let record = worker.opened(outbound(&model));
    record.received(100);
    record.sent(7);
    assert_eq!(bench.total("istio_tcp_received_bytes_total"), 100);
    assert_eq!(bench.total("istio_tcp_sent_bytes_total"), 7);
    record.sent(3);
    assert_eq!(bench.total("istio_tcp_sent_bytes_total"), 10);
    let open = || bench.samples("istio_tcp_sockets_open");
    let samples = |source, destination| {
        [
            ("{reporter=\"source\"}", source),
            ("{reporter=\"destination\"}", destination),
        ]
        .map(|(label, value)| (label.to_owned(), value))
    };
    assert_eq!(open(), samples(1, 0));
    record.close(None, ResponseFlags::None);
    assert_eq!(open(), samples(0, 0));
    assert_eq!(bench.total("istio_tcp_sent_bytes_total"), 10);
}

#[test]
fn the_log_line_is_exactly_istios() {
    let (bench, model) = (Bench::plain(), model());
    let worker = bench.worker();
    let record = worker.opened(outbound(&model));
    record.received(100);
    record.sent(7);
    record.close(None, ResponseFlags::None);
    let record = worker.opened(inbound(&model));
    record.received(100);
    record.sent(7);
    record.close(Some(&"io error: \"broken\"\npipe"), ResponseFlags::None);
    let source = "src.addr=10.0.0.1:40000 src.workload=\"web-1\" src.namespace=\"shop\" \
                  src.identity=\"spiffe://cluster.local/ns/shop/sa/web\" \
                  src.cluster=\"cluster1\"";
    let destination = "dst.service=\"pay.shop.svc.cluster.local\" dst.workload=\"pay-1\" \
                       dst.namespace=\"shop\" \
                       dst.identity=\"spiffe://cluster.local/ns/shop/sa/pay\" \
                       dst.cluster=\"cluster1\"";
    let addresses = ["15008", "8080"]
        .map(|port| format!("dst.addr=10.0.0.2:{port} dst.hbone_addr=10.0.0.2:8080"));
    // The client's proxy calls sent what came from the client; the server's the other way round.
    let expected = [
        format!(
            "\tinfo\taccess\tconnection complete\t{source} {} {destination} \
             direction=\"outbound\" bytes_sent=100 bytes_recv=7 duration=\"Nms\"",
            addresses[0]
        ),
        format!(
            "\terror\taccess\tconnection complete\t{source} {} {destination} \
             direction=\"inbound\" bytes_sent=7 bytes_recv=100 duration=\"Nms\" \
             error=\"io error: \\\"broken\\\"\\npipe\"",
            addresses[1]
        ),
    ];
    assert_eq!(bench.lines(), expected);
}

/// As upstream's: neither end of what goes around the mesh, though its workloads are known.
#[test]
fn without_proof_the_log_names_no_identity() {
    let (bench, model) = (Bench::plain(), model());
    let mut info = outbound(&model);
    info.security = Security::Unknown;
    (info.source_identity, info.destination_identity) = (None, None);
    info.hbone_dst = Some(HboneTarget::Host("pay.example.com:443".into()));
    bench.worker().opened(info).close(None, ResponseFlags::None);
    let line = bench.lines().remove(0);
    assert!(!line.contains("identity"), "{line}");
    assert!(
        line.contains(" dst.hbone_addr=pay.example.com:443 "),
        "{line}"
    );
}

/// From pod to pod of one node in one hop: who they are is known, and that there was no tunnel.
#[test]
fn one_hop_names_both_identities_and_no_tunnel() {
    let (bench, model) = (Bench::plain(), model());
    let mut info = inbound(&model);
    info.security = Security::Unknown;
    info.hbone_dst = None;
    bench.worker().opened(info).close(None, ResponseFlags::None);
    let line = bench.lines().remove(0);
    for part in [
        " src.identity=\"spiffe://cluster.local/ns/shop/sa/web\" ",
        " dst.addr=10.0.0.2:8080 dst.service=",
        " dst.identity=\"spiffe://cluster.local/ns/shop/sa/pay\" ",
    ] {
        assert!(line.contains(part), "no {part} in {line}");
    }
    let opened = bench.samples("istio_tcp_connections_opened_total");
    let [(labels, 1)] = &opened[..] else {
        panic!("{opened:?}")
    };
    for label in [
        "source_principal=\"spiffe://cluster.local/ns/shop/sa/web\"",
        "destination_principal=\"spiffe://cluster.local/ns/shop/sa/pay\"",
        "connection_security_policy=\"unknown\"",
    ] {
        assert!(labels.contains(label), "no {label} in {labels}");
    }
}

#[test]
fn the_json_line_has_the_same_fields() {
    let bench = Bench::new(LogFormat::Json, "info", Registry::new("test"));
    let model = model();
    let record = bench.worker().opened(outbound(&model));
    record.received(100);
    record.close(Some(&"http status: 401 Unauthorized"), ResponseFlags::Deny);
    let log = bench.log();
    let (_, line) = log.split_once("\",\"scope\"").unwrap();
    let (line, _) = line.split_once("\"duration\"").unwrap();
    assert_eq!(
        line,
        ":\"access\",\"message\":\"connection complete\",\"src.addr\":\"10.0.0.1:40000\",\
         \"src.workload\":\"web-1\",\"src.namespace\":\"shop\",\
         \"src.identity\":\"spiffe://cluster.local/ns/shop/sa/web\",\"src.cluster\":\"cluster1\",\
         \"dst.addr\":\"10.0.0.2:15008\",\"dst.hbone_addr\":\"10.0.0.2:8080\",\
         \"dst.service\":\"pay.shop.svc.cluster.local\",\"dst.workload\":\"pay-1\",\
         \"dst.namespace\":\"shop\",\"dst.identity\":\"spiffe://cluster.local/ns/shop/sa/pay\",\
         \"dst.cluster\":\"cluster1\",\"direction\":\"outbound\",\"bytes_sent\":100,\
         \"bytes_recv\":0,"
    );
    let value: serde_json::Value = serde_json::from_str(&log).unwrap();
    assert_eq!(value["level"], "error");
    assert_eq!(value["error"], "http status: 401 Unauthorized");
}

/// Many refusals cost few lines, and none of them is lost: told, summed up, and counted.
#[test]
fn refusals_are_told_within_a_budget_and_counted_exactly() {
    let registry = Registry::new("test");
    let bench = Bench::new(LogFormat::Plain, "access=info", registry.clone());
    let worker = bench.worker();
    let dst = address("10.0.0.8:80");
    for port in 1..=5000 {
        let src = SocketAddr::new([10, 0, 0, 9].into(), port);
        worker.failed_early(Reporter::Source, src, dst, ("no route", &"no way there"));
    }
    let quiet = address("10.0.0.10:1");
    worker.failed_early(Reporter::Source, quiet, dst, ("no route", &"no way there"));
    worker.tell_left_out();
    worker.tell_left_out();
    let lines = bench.lines();
    let (one_by_one, summed): (Vec<_>, Vec<_>) = lines
        .iter()
        .partition(|line| line.contains("\tconnection failed\t"));
    // As many more as seconds have passed.
    assert!(
        (21..100).contains(&one_by_one.len()),
        "{}",
        one_by_one.len()
    );
    assert!(one_by_one.iter().any(|line| line.contains("10.0.0.10:1")));
    let [summed] = &summed[..] else {
        panic!("{summed:?}")
    };
    let left_out = 5001 - one_by_one.len();
    let expected = format!(
        "\twarn\taccess\tconnections failed, not told one by one\tsrc.ip=10.0.0.9 \
         direction=\"outbound\" reason=\"no route\" count={left_out}"
    );
    assert_eq!(**summed, expected);
    let page = registry.encode(Exposition::Text);
    let all = "ztunnel_connections_refused_early_total{reporter=\"source\"} 5001\n";
    assert!(page.contains(all), "{page}");
    let out = format!("ztunnel_refusal_lines_left_out_total {left_out}\n");
    assert!(page.contains(&out), "{page}");
}

/// What a policy refuses is refused early or late, and costs the log as little.
#[test]
fn denied_connections_are_told_within_the_same_budget() {
    let registry = Registry::new("test");
    let bench = Bench::new(LogFormat::Plain, "access=info", registry);
    let worker = bench.worker();
    let dst = address("10.0.0.8:80");
    for port in 1..=5000 {
        let src = SocketAddr::new([10, 0, 0, 9].into(), port);
        let info = ConnectionInfo::new(Reporter::Destination, src, dst);
        worker
            .opened(info)
            .close(Some(&"policy"), ResponseFlags::Deny);
    }
    // Those that came to be are told, however they end.
    for port in 1..=100 {
        let src = SocketAddr::new([10, 0, 0, 9].into(), port);
        let info = ConnectionInfo::new(Reporter::Destination, src, dst);
        worker
            .opened(info)
            .close(Some(&"reset"), ResponseFlags::None);
    }
    worker.tell_left_out();
    let lines = bench.lines();
    let of = |word: &str| lines.iter().filter(|line| line.contains(word)).count();
    assert!((20..100).contains(&of("policy")), "{}", of("policy"));
    assert_eq!(of("reset"), 100);
    let left_out = format!("reason=\"DENY\" count={}", 5000 - of("policy"));
    assert_eq!(of(&left_out), 1, "{left_out}");
}

#[test]
fn early_failures_and_openings() {
    let bench = Bench::new(LogFormat::Plain, "access=debug", Registry::new("test"));
    let worker = bench.worker();
    let (src, dst) = (address("10.0.0.9:1"), address("[fd00::8]:2"));
    worker.failed_early(Reporter::Destination, src, dst, ("why", &"unknown source"));
    drop(worker.opened(ConnectionInfo::new(Reporter::Source, src, dst)));
    let fields = "src.addr=10.0.0.9:1 dst.addr=[fd00::8]:2";
    assert_eq!(
        bench.lines(),
        [
            format!(
                "\twarn\taccess\tconnection failed\t{fields} direction=\"inbound\" \
                 error=\"unknown source\""
            ),
            format!("\tdebug\taccess\tconnection opened\t{fields} direction=\"outbound\""),
            format!(
                "\terror\taccess\tconnection complete\t{fields} direction=\"outbound\" \
                 bytes_sent=0 bytes_recv=0 duration=\"Nms\" \
                 error=\"connection closed due to connection drain\""
            ),
        ]
    );
    let refused = bench.samples("ztunnel_connections_refused_early_total");
    assert_eq!(refused[1], ("{reporter=\"destination\"}".to_owned(), 1));
    assert_eq!(refused[0].1, 0);
}

#[test]
fn the_level_silences_the_log_but_not_the_metrics() {
    let (bench, model) = (Bench::plain(), model());
    let worker = bench.worker();
    bench.logging.change(false, "access=off").unwrap();
    worker
        .opened(outbound(&model))
        .close(Some(&"x"), ResponseFlags::None);
    bench.logging.change(false, "access=error").unwrap();
    worker
        .opened(outbound(&model))
        .close(None, ResponseFlags::None);
    worker
        .opened(outbound(&model))
        .close(Some(&"y"), ResponseFlags::None);
    let lines = bench.lines();
    assert!(
        lines.len() == 1 && lines[0].ends_with("error=\"y\""),
        "{lines:?}"
    );
    assert_eq!(bench.total("istio_tcp_connections_closed_total"), 3);
}

#[test]
fn failures_are_counted_under_their_flag() {
    let (bench, model) = (Bench::plain(), model());
    let worker = bench.worker();
    let flags = [
        (ResponseFlags::Deny, "DENY"),
        (ResponseFlags::Connect, "CONNECT"),
        (ResponseFlags::TlsFailure, "TLS_FAILURE"),
        (ResponseFlags::H2HandshakeFailure, "H2_HANDSHAKE_FAILURE"),
        (ResponseFlags::NetworkPolicy, "NETWORK_POLICY"),
        (ResponseFlags::IdentityError, "IDENTITY_ERROR"),
        (ResponseFlags::CertRevoked, "CERT_REVOKED"),
    ];
    for (flag, _) in flags {
        worker.opened(outbound(&model)).close(Some(&"no"), flag);
    }
    for (_, label) in flags {
        let labels = LABELS.replace(
            "response_flags=\"-\"",
            &format!("response_flags=\"{label}\""),
        );
        for family in [
            "istio_tcp_connections_failed_total",
            "istio_tcp_connections_closed_total",
        ] {
            assert!(
                bench.samples(family).contains(&(labels.clone(), 1)),
                "{family} {label}"
            );
        }
    }
    let opened = bench.samples("istio_tcp_connections_opened_total");
    assert_eq!(opened, [(LABELS.to_owned(), flags.len() as u64)]);
    assert_eq!(bench.samples("istio_tcp_received_bytes_total").len(), 1);
}

#[test]
fn workers_are_merged_while_they_run() {
    const WORKERS: u64 = 4;
    const CONNECTIONS: u64 = 5_000;
    let (bench, model) = (Bench::plain(), model());
    bench.logging.change(false, "access=off").unwrap();
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            let (registry, access) = (bench.registry.clone(), bench.logging.access_log());
            let model = &model;
            scope.spawn(move || {
                let worker = registry.worker(access);
                for _ in 0..CONNECTIONS {
                    let record = worker.opened(outbound(model));
                    record.received(3);
                    record.sent(2);
                    record.sent(2);
                    record.close(None, ResponseFlags::None);
                }
            });
        }
        let mut last = 0;
        for _ in 0..50 {
            let now = bench.total("istio_tcp_sent_bytes_total");
            assert!(now >= last, "a counter went back from {last} to {now}");
            last = now;
        }
    });
    let all = WORKERS * CONNECTIONS;
    assert_eq!(
        bench.samples("istio_tcp_connections_opened_total"),
        [(LABELS.to_owned(), all)]
    );
    assert_eq!(bench.total("istio_tcp_connections_closed_total"), all);
    assert_eq!(bench.total("istio_tcp_received_bytes_total"), 3 * all);
    assert_eq!(bench.total("istio_tcp_sent_bytes_total"), 4 * all);
}

#[test]
fn a_new_model_continues_the_old_series() {
    let bench = Bench::plain();
    let worker = bench.worker();
    for _ in 0..3 {
        // Equal workloads, but other objects, as after every change of configuration.
        let model = model();
        let weak = Arc::downgrade(&model.server);
        worker
            .opened(outbound(&model))
            .close(None, ResponseFlags::None);
        drop(model);
        assert!(weak.upgrade().is_some(), "what a key points to must stay");
        worker.model_changed();
        assert!(weak.upgrade().is_none(), "an old model is not kept");
    }
    assert_eq!(
        bench.samples("istio_tcp_connections_opened_total"),
        [(LABELS.to_owned(), 3)]
    );
}

#[test]
fn label_sets_are_bounded_and_the_rest_counted() {
    const MAX: usize = 10;
    let bench = Bench::new(
        LogFormat::Plain,
        "off",
        Registry::with_label_sets_max("test", MAX),
    );
    let model = model();
    let workers = [bench.worker(), bench.worker()];
    for number in 0..50 {
        let mut info = outbound(&model);
        let name = format!("client-{number}");
        info.source_identity = Some(mesh::Identity::new("td", "shop", &name).unwrap());
        workers[number % 2]
            .opened(info)
            .close(None, ResponseFlags::None);
    }
    let samples = bench.samples("istio_tcp_connections_opened_total");
    assert_eq!(samples.len(), MAX + 1);
    let distinct: BTreeSet<_> = samples.iter().map(|(labels, _)| labels).collect();
    assert_eq!(distinct.len(), MAX + 1);
    let (overflow, count) = samples.last().unwrap();
    assert_eq!(*count, 50 - MAX as u64);
    assert!(overflow.starts_with("{reporter=\"source\",source_workload=\"overflow\","));
    assert!(
        overflow.contains("destination_workload=\"overflow\""),
        "{overflow}"
    );
    assert!(!overflow.contains("client-"), "{overflow}");
    let text = bench.registry.encode(Exposition::Text);
    assert!(text.contains("\nztunnel_metric_label_sets 11\n"), "{text}");
    assert!(
        text.contains("\nztunnel_metric_label_sets_overflowed_total 40\n"),
        "{text}"
    );
    // Known label sets go on being counted apart.
    let mut info = outbound(&model);
    info.source_identity = Some(mesh::Identity::new("td", "shop", "client-0").unwrap());
    workers[1].opened(info).close(None, ResponseFlags::None);
    let samples = bench.samples("istio_tcp_connections_opened_total");
    assert!(
        samples
            .iter()
            .any(|(labels, n)| labels.contains("client-0") && *n == 2)
    );
}

#[test]
fn label_values_are_escaped() {
    let bench = Bench::plain();
    let mut client = workload("web-1", "web");
    client.canonical_name = "we\"b\\\n}".into();
    let uid = client.uid.clone();
    let snapshot = Snapshot::build(vec![client], vec![], vec![]).unwrap();
    let (src, dst) = (address("10.0.0.9:1"), address("10.0.0.8:2"));
    let mut info = ConnectionInfo::new(Reporter::Source, src, dst);
    info.source = Some(Arc::clone(snapshot.workload_by_uid(&uid).unwrap()));
    let _record = bench.worker().opened(info);
    let (labels, _) = bench
        .samples("istio_tcp_connections_opened_total")
        .remove(0);
    assert!(
        labels.contains(r#"source_canonical_service="we\"b\\\n}","#),
        "{labels}"
    );
}

#[test]
fn extra_metrics_are_checked() {
    use telemetry::{MetricError, MetricKind::*};
    let registry = Registry::new("test");
    let name = "ztunnel_worker_wakeups_total";
    registry
        .register_worker(0, name, "Wake-ups", Counter, || 1)
        .unwrap();
    registry
        .register_worker(1, name, "Wake-ups", Counter, || 2)
        .unwrap();
    registry
        .register(
            "istio_xds_message_total",
            "m",
            Counter,
            &[("url", "a\"b")],
            || 3,
        )
        .unwrap();
    let again = registry.register_worker(1, name, "Wake-ups", Counter, || 2);
    assert!(matches!(again, Err(MetricError::Duplicate { .. })));
    let bad = [
        registry.register_worker(0, "other_total", "x", Counter, || 0),
        registry.register("no_total_suffix", "x", Counter, &[], || 0),
        registry.register("gauge_total", "x", Gauge, &[], || 0),
        registry.register("bad-name", "x", Gauge, &[], || 0),
    ];
    assert!(
        bad.iter()
            .all(|result| matches!(result, Err(MetricError::Name(_)))),
        "{bad:?}"
    );
    let label = registry.register("good", "x", Gauge, &[("__x", "")], || 0);
    assert!(matches!(label, Err(MetricError::Label { .. })));
    let own = registry.register("istio_tcp_sent_bytes_total", "x", Counter, &[], || 0);
    assert!(matches!(own, Err(MetricError::Duplicate { .. })));
    let text = registry.encode(Exposition::Text);
    let family = "# HELP ztunnel_worker_wakeups_total Wake-ups\n\
                  # TYPE ztunnel_worker_wakeups_total counter\n\
                  ztunnel_worker_wakeups_total{worker=\"0\"} 1\n\
                  ztunnel_worker_wakeups_total{worker=\"1\"} 2\n";
    assert!(text.contains(family), "{text}");
    assert!(
        text.contains("istio_xds_message_total{url=\"a\\\"b\"} 3\n"),
        "{text}"
    );
    assert!(!text.contains("good"), "{text}");
}

/// Every reason has its row, and every metric its line.
#[test]
fn the_documentation_lists_what_is_counted() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/metrics.md");
    let text = std::fs::read_to_string(path).unwrap();
    for fault in telemetry::Fault::ALL {
        let row = format!("| `{}` |", fault.label());
        assert!(text.contains(&row), "no row {row}");
    }
    let bench = Bench::plain();
    let _worker = bench.worker();
    let page = bench.registry.encode(Exposition::Text);
    let names = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ztunnel_"));
    let names: Vec<_> = names.filter(|name| !name.starts_with("worker_")).collect();
    assert!(names.len() >= 7, "{names:?}");
    for name in names {
        let name = format!("ztunnel_{}", name.split(' ').next().unwrap());
        assert!(text.contains(&name), "{name} is not in docs/metrics.md");
    }
}
