//! The shortest run of the relay benchmark, through to `bench.json`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use benches::callgrind::{self, Subject, Work};
use benches::relay::measure;
use benches::relay::plan::{Kind, Placement, Plan, Workload};
use benches::rows::Part;
use serde_json::Value;

const PEER: &str = env!("CARGO_BIN_EXE_bench-peer");
const TABLE: &str = env!("CARGO_BIN_EXE_bench-table");

fn plan() -> Plan {
    let workload = |(kind, connections)| Workload {
        kind,
        connections,
        placement: Placement::OneCore,
    };
    let workloads = [
        (Kind::Rr, 8),
        (Kind::Stream, 1),
        (Kind::StreamSplice, 1),
        (Kind::Connect, 2),
        (Kind::Idle, 100),
    ];
    Plan {
        trials: 1,
        warmup: Duration::from_millis(20),
        duration: Duration::from_millis(100),
        workloads: workloads.map(workload).to_vec(),
    }
}

#[test]
fn relays_are_measured_and_written_down() {
    let part = measure::run(&plan(), Path::new(PEER)).unwrap();
    assert_eq!(part.skipped, [""; 0]);
    let metrics: usize = plan()
        .workloads
        .iter()
        .map(|workload| workload.kind.metrics().len())
        .sum();
    // Each against tokio, tokio-uring and monoio.
    assert_eq!(part.rows.len(), 3 * metrics);
    let directory = tempfile::tempdir().unwrap();
    part.store_in(directory.path(), "relay").unwrap();
    let output = Command::new(TABLE)
        .args(["--out".as_ref(), directory.path()])
        .env("BENCH_PARTS", directory.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let table = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        table.lines().count(),
        part.rows.len() + 3,
        "head, what is missing, file name: {table}"
    );
    let missing = table.lines().rev().nth(1).unwrap();
    assert!(
        missing.contains("dns/answer") && !missing.contains("relay/rr"),
        "{missing}"
    );
    let text = std::fs::read_to_string(directory.path().join("bench.json")).unwrap();
    check_shape(&serde_json::from_str(&text).unwrap(), part.rows.len());
}

/// Schema 1.
fn check_shape(document: &Value, rows: usize) {
    assert_eq!(document["schema"], 1);
    assert!(document["when"].as_str().unwrap().ends_with('Z'));
    assert!(document["git"]["sha"].is_string() && document["git"]["dirty"].is_boolean());
    assert!(document["machine"]["cores"].as_u64().unwrap() >= 1);
    assert!(document["machine"]["memory_bytes"].as_u64().unwrap() > 1 << 20);
    let all = document["rows"].as_array().unwrap();
    assert_eq!(all.len(), rows);
    for row in all {
        for name in ["bench", "subject", "baseline", "metric", "note"] {
            assert!(!row[name].as_str().unwrap().is_empty(), "{name} of {row}");
        }
        let number = |name: &str| row[name].as_f64().unwrap_or(f64::NAN);
        let (subject, baseline) = (number("subject_value"), number("baseline_value"));
        assert!(subject > 0.0 && baseline > 0.0, "{row}");
        let ratio = subject / baseline;
        assert!((number("ratio") / ratio - 1.0).abs() < 1e-9, "{row}");
    }
}

#[test]
fn instructions_per_frame_do_not_depend_on_the_count() {
    if let Some(reason) = callgrind::missing() {
        eprintln!("skipped: instructions_per_frame_do_not_depend_on_the_count: {reason}");
        return;
    }
    let peer = Path::new(PEER);
    for subject in [Subject::HboneData, Subject::AeadSeal, Subject::MeshRoute] {
        let count = |counts| callgrind::instructions(peer, Work::of(subject), counts).unwrap();
        let (few, many) = (count((100, 300)), count((200, 600)));
        assert!(
            (few / many - 1.0).abs() < 0.02,
            "{subject:?}: {few} and {many}"
        );
    }
}

#[test]
fn every_subject_runs() {
    for subject in <Subject as clap::ValueEnum>::value_variants() {
        subject.run(3, 2).unwrap();
    }
}

#[test]
fn without_any_results_the_table_says_what_to_do() {
    let output = Command::new(TABLE)
        .env("BENCH_PARTS", "/nonexistent/parts")
        .args(["--out", "/nonexistent/out"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("cargo bench -p benches"), "{text}");
    let parts = Part::collect_from(Path::new("/nonexistent/parts"));
    assert!(parts.is_err());
}
