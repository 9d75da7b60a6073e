//! Metrics and access log say what happened.

use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{PATIENCE, TestLab, accept, at, eventually};

/// Opens `count` connections from client-a to `server`; on each `up` bytes go there and `down`
/// bytes come back.
pub(super) fn exchange(lab: &TestLab, server: &str, count: usize, up: usize, down: usize) {
    let listener = lab.listen(server, 8080);
    for _ in 0..count {
        let mut client = lab.connect("client-a", at(server, 8080));
        client.write_all(&vec![1; up]).unwrap();
        let (mut served, _) = accept(&listener);
        served.read_exact(&mut vec![0; up]).unwrap();
        served.write_all(&vec![2; down]).unwrap();
        drop(served);
        let mut got = Vec::new();
        client.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), down);
    }
}

/// Where client-a's connections to a server are accounted for, and as what.
struct Way {
    server: &'static str,
    /// The server's side; the client's is ztunnel-a.
    ztunnel: &'static str,
    security: &'static str,
    /// What the log says of where they went.
    dst: &'static str,
}

/// To another node by a tunnel, and on one node in one hop: both sides are the same ztunnel then,
/// which knows both pods as well, and says that there is no TLS.
const WAYS: [Way; 2] = [
    Way {
        server: "server-b",
        ztunnel: "ztunnel-b",
        security: "mutual_tls",
        dst: " dst.hbone_addr=10.244.2.11:8080 ",
    },
    Way {
        server: "server-a",
        ztunnel: "ztunnel-a",
        security: "unknown",
        dst: " dst.addr=10.244.1.12:8080 dst.workload=",
    },
];

pub(super) fn metrics_agree_with_the_traffic(lab: &mut TestLab) {
    for way in &WAYS {
        metrics_agree(lab, way);
    }
}

fn metrics_agree(lab: &TestLab, way: &Way) {
    const COUNT: usize = 5;
    const UP: usize = 10_000;
    const DOWN: usize = 20_000;
    let server = way.server;
    let reports = [
        ("ztunnel-a", "reporter=\"source\""),
        (way.ztunnel, "reporter=\"destination\""),
    ];
    let read = |(ztunnel, reporter): (&str, &str)| {
        let labels = [
            reporter,
            "source_workload=\"client-a\"",
            &format!("destination_workload=\"{server}\""),
            &format!("connection_security_policy=\"{}\"", way.security),
            "source_principal=\"spiffe://cluster.local/ns/default/sa/client-a\"",
            &format!("destination_principal=\"spiffe://cluster.local/ns/default/sa/{server}\""),
        ];
        let metrics = lab.metrics(ztunnel);
        [
            "connections_opened",
            "connections_closed",
            "sent_bytes",
            "received_bytes",
        ]
        .map(|family| metrics.sum(&format!("istio_tcp_{family}_total"), &labels))
    };
    let before = reports.map(read);
    exchange(lab, server, COUNT, UP, DOWN);
    // Upstream's meaning on both sides: received is what the destination received (the request),
    // sent is what it sent (the response).
    let expected = [COUNT, COUNT, COUNT * DOWN, COUNT * UP].map(|n| n as u64);
    for (report, before) in reports.into_iter().zip(before) {
        let mut seen = [0; 4];
        let deadline = Instant::now() + PATIENCE;
        while seen != expected && Instant::now() < deadline {
            let now = read(report);
            seen = std::array::from_fn(|index| now[index] - before[index]);
            thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(seen, expected, "{report:?}: opened, closed, sent, received");
    }
}

pub(super) fn one_log_line_per_connection(lab: &mut TestLab) {
    for way in &WAYS {
        one_line_and_side(lab, way);
    }
}

fn one_line_and_side(lab: &TestLab, way: &Way) {
    const COUNT: usize = 3;
    let server = way.server;
    let sides = [
        ("ztunnel-a", "direction=\"outbound\""),
        (way.ztunnel, "direction=\"inbound\""),
    ];
    let marks = sides.map(|(ztunnel, _)| lab.log_length(ztunnel));
    exchange(lab, server, COUNT, 1234, 5678);
    for ((ztunnel, direction), mark) in sides.into_iter().zip(marks) {
        let own = |line: &String| line.contains("connection complete") && line.contains(direction);
        let lines = eventually("an access log line per connection", || {
            let lines: Vec<_> = lab
                .log_since(ztunnel, mark)
                .into_iter()
                .filter(own)
                .collect();
            (lines.len() >= COUNT).then_some(lines)
        });
        assert_eq!(lines.len(), COUNT, "{ztunnel}: {lines:#?}");
        for line in lines {
            let keys = [
                "src.addr=10.244.1.11:",
                "src.workload=\"client-a\"",
                "src.namespace=\"default\"",
                "src.identity=\"spiffe://cluster.local/ns/default/sa/client-a\"",
                way.dst,
                &format!("dst.workload=\"{server}\""),
                "dst.namespace=\"default\"",
                &format!("dst.identity=\"spiffe://cluster.local/ns/default/sa/{server}\""),
                "duration=\"",
            ];
            for key in keys {
                assert!(line.contains(key), "{ztunnel}: no {key} in {line}");
            }
            // Each side's log speaks from its own workload's side.
            let (sent, received) = if direction.contains("outbound") {
                (1234, 5678)
            } else {
                (5678, 1234)
            };
            let bytes = format!("bytes_sent={sent} bytes_recv={received} ");
            assert!(line.contains(&bytes), "{ztunnel}: no {bytes} in {line}");
        }
    }
}

/// The admin endpoint tells that pods of one node are served without a tunnel.
pub(super) fn the_setting_is_told(lab: &mut TestLab) {
    let dump = lab.config_dump("ztunnel-a");
    assert_eq!(dump["config"]["redirectMode"], "node", "{dump:#}");
    assert_eq!(dump["config"]["sameNodeTunnel"], false, "{dump:#}");
}
