//! Decisions of the mesh model by its size.
#![forbid(unsafe_code)]

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use benches::callgrind::{self, Subject, Work};
use benches::criteria::{criterion, median_ns};
use benches::document;
use benches::model::{SIZES, Source, World};
use benches::rows::{Part, Row, median, quick};
use criterion::Criterion;
use std::hint::black_box;

const QUESTIONS: [&str; 3] = ["policy", "route", "lb"];
/// What a row is measured against: the smallest mesh.
const SMALLEST: &str = "1 workload";

fn main() -> Result<()> {
    let mut criterion = criterion()?;
    let mut part = Part::default();
    let mut smallest_build_ms = 0.0;
    for size in SIZES {
        let source = Source::new(size);
        let mut world = World::new(&source)?;
        questions(&mut criterion, size, &mut world);
        for question in QUESTIONS {
            let bench = format!("mesh/{question}");
            let (ns, base) = (
                median_ns(&bench, &size.to_string())?,
                median_ns(&bench, &SIZES[0].to_string())?,
            );
            if let (Some(ns), Some(base)) = (ns, base) {
                let bench = format!("{bench}/{size}");
                let row = Row::new(&bench, "ns_per_call", ("mesh", ns), (SMALLEST, base));
                let note = "one thread, shuffled destinations";
                part.rows.push(row.with_note(note));
            }
        }
        update(size, &source, &mut world, &mut smallest_build_ms, &mut part)?;
    }
    criterion.final_summary();
    instructions(&mut part)?;
    part.store("mesh")?;
    print!("{}", document::table(&part));
    Ok(())
}

/// Not of the largest mesh: building it takes callgrind minutes.
fn instructions(part: &mut Part) -> Result<()> {
    let sizes: &[usize] = if quick() { &SIZES[..2] } else { &SIZES[..3] };
    let cases = [
        ("policy", Subject::MeshPolicy, (1_000, 5_000)),
        ("route", Subject::MeshRoute, (1_000, 5_000)),
        ("lb", Subject::MeshLb, (1_000, 5_000)),
        ("update", Subject::MeshUpdate, (1, 3)),
    ];
    let program = Path::new(env!("CARGO_BIN_EXE_bench-peer"));
    for (name, subject, counts) in cases {
        for &size in sizes {
            let works = (
                (
                    "mesh",
                    Work {
                        size,
                        ..Work::of(subject)
                    },
                ),
                (SMALLEST, Work::of(subject)),
            );
            let note = if name == "update" {
                "per build"
            } else {
                "per call"
            };
            let bench = format!("mesh/{name}/{size}");
            callgrind::compare(part, (&bench, note), program, works, counts)?;
        }
    }
    Ok(())
}

fn questions(criterion: &mut Criterion, size: usize, world: &mut World) {
    let size = size.to_string();
    let mut group = criterion.benchmark_group("mesh/policy");
    group.bench_function(&size, |bencher| {
        bencher.iter(|| black_box(world.authorize()));
    });
    group.finish();
    let mut group = criterion.benchmark_group("mesh/route");
    group.bench_function(&size, |bencher| {
        bencher.iter(|| world.route().expect("every service has endpoints"));
    });
    group.finish();
    let mut group = criterion.benchmark_group("mesh/lb");
    group.bench_function(&size, |bencher| {
        bencher.iter(|| world.balance().expect("the service has endpoints"));
    });
    group.finish();
}

fn update(
    size: usize,
    source: &Source,
    world: &mut World,
    smallest_build_ms: &mut f64,
    part: &mut Part,
) -> Result<()> {
    let builds = if quick() { 1 } else { 5 };
    let build_ms = (0..builds)
        .map(|_| Ok(source.time_build()?.as_secs_f64() * 1e3))
        .collect::<Result<Vec<_>>>()?;
    let build_ms_median = median(&build_ms);
    if size == SIZES[0] {
        *smallest_build_ms = build_ms_median;
    }
    let bench = format!("mesh/update/{size}");
    let baseline = (SMALLEST, *smallest_build_ms);
    let mut row = Row::new(&bench, "build_ms", ("mesh", build_ms_median), baseline);
    row.subject_values = build_ms;
    part.rows.push(row.with_note("off the data path"));
    let duration = Duration::from_millis(if quick() { 200 } else { 1000 });
    let (mut quiet, _) = world.route_while(None, duration)?;
    let (mut busy, arrived) = world.route_while(Some(source), duration)?;
    let note = format!("64 routes a sample; {arrived} snapshots arrived meanwhile");
    for (metric, quantile) in [("route_ns_p50", 0.5), ("route_ns_p99", 0.99)] {
        let subject = ("while updating", at_quantile(&mut busy, quantile));
        let baseline = ("at rest", at_quantile(&mut quiet, quantile));
        let row = Row::new(&bench, metric, subject, baseline);
        part.rows.push(row.with_note(&note));
    }
    Ok(())
}

fn at_quantile(samples: &mut [f64], quantile: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    let last = samples.len().saturating_sub(1);
    let index = (last as f64 * quantile).round() as usize;
    samples.get(index).copied().unwrap_or(f64::NAN)
}
