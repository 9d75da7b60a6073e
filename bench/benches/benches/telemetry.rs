//! Metrics and access log of one connection.
#![forbid(unsafe_code)]

use std::path::Path;

use anyhow::Result;
use benches::accounting::{Ours, Reference, formatting};
use benches::callgrind::{self, Subject, Work};
use benches::criteria::{criterion, median_ns};
use benches::document;
use benches::rows::{Part, Row, quick};

const BENCHES: [(&str, bool, &str); 2] = [
    ("telemetry/metrics", false, "prometheus-client"),
    ("telemetry/log", true, "prometheus-client + tracing"),
];

const INSTRUCTIONS: [(Subject, Subject); 2] = [
    (Subject::TelemetryMetrics, Subject::ReferenceMetrics),
    (Subject::TelemetryLog, Subject::ReferenceLog),
];

fn main() -> Result<()> {
    let mut criterion = criterion()?;
    let mut part = Part::default();
    for (bench, with_log, baseline) in BENCHES {
        let mut group = criterion.benchmark_group(bench);
        let ours = Ours::new(with_log)?;
        group.bench_function("telemetry", |bencher| {
            // A line is dropped if the thread that writes them does not get a CPU for long.
            let time = |count| (0..5).find_map(|_| ours.time(count).ok());
            bencher.iter_custom(|count| time(count).expect("some try loses no line"));
        });
        let reference = Reference::default();
        tracing::subscriber::with_default(formatting(), || {
            group.bench_function("reference", |bencher| {
                bencher.iter(|| reference.connection(with_log));
            });
        });
        group.finish();
        let medians = (
            median_ns(bench, "telemetry")?,
            median_ns(bench, "reference")?,
        );
        if let (Some(ours), Some(theirs)) = medians {
            let subject = ("telemetry", ours);
            let row = Row::new(bench, "ns_per_connection", subject, (baseline, theirs));
            let note = "wall time of the worker; with the log: metrics included";
            part.rows.push(row.with_note(note));
        }
    }
    criterion.final_summary();
    let counts = if quick() { (256, 1280) } else { (512, 5120) };
    let program = Path::new(env!("CARGO_BIN_EXE_bench-peer"));
    for ((bench, with_log, baseline), (ours, theirs)) in BENCHES.into_iter().zip(INSTRUCTIONS) {
        let works = (("telemetry", Work::of(ours)), (baseline, Work::of(theirs)));
        let note = if with_log {
            "per connection, the log's writer thread included"
        } else {
            "per connection"
        };
        callgrind::compare(&mut part, (bench, note), program, works, counts)?;
    }
    part.store("telemetry")?;
    print!("{}", document::table(&part));
    Ok(())
}
