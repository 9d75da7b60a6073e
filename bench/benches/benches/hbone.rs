//! The HBONE codec against `h2`: wall time by criterion, instructions by callgrind.
#![forbid(unsafe_code)]

use std::path::Path;

use anyhow::Result;
use benches::callgrind::{self, Subject, Work};
use benches::codec::{BULK, SMALL, ours, theirs};
use benches::criteria::{criterion, median_ns};
use benches::document;
use benches::rows::{Part, Row, quick};
use criterion::{Criterion, Throughput};

/// Bench, unit, and whose instructions are counted over which difference of runs.
const CASES: [(&str, &str, Subject, Subject); 3] = [
    (DATA, "frame", Subject::HboneData, Subject::H2Data),
    (DATA_BULK, "frame", Subject::HboneBulk, Subject::H2Bulk),
    (CONNECT, "stream", Subject::HboneConnect, Subject::H2Connect),
];
const DATA: &str = "hbone/data";
const DATA_BULK: &str = "hbone/data/16375";
const CONNECT: &str = "hbone/connect";

fn main() -> Result<()> {
    let mut criterion = criterion()?;
    data(&mut criterion, DATA, SMALL)?;
    data(&mut criterion, DATA_BULK, BULK)?;
    connect(&mut criterion)?;
    criterion.final_summary();
    let mut part = Part::default();
    for (bench, unit, subject, baseline) in CASES {
        if let (Some(ours), Some(theirs)) = (median_ns(bench, "hbone")?, median_ns(bench, "h2")?) {
            let metric = format!("ns_per_{unit}");
            let row = Row::new(bench, &metric, ("hbone", ours), ("h2", theirs));
            part.rows.push(row.with_note("wall time, both ends"));
        }
        let note = format!("per {unit}, both ends");
        let works = (("hbone", Work::of(subject)), ("h2", Work::of(baseline)));
        let program = Path::new(env!("CARGO_BIN_EXE_bench-peer"));
        callgrind::compare(&mut part, (bench, &note), program, works, counts())?;
    }
    part.store("hbone")?;
    print!("{}", document::table(&part));
    Ok(())
}

/// More than a window of bulk frames, so that credit going back is part of both counts.
fn counts() -> (u64, u64) {
    if quick() {
        (100, 1_100)
    } else {
        (1_000, 6_000)
    }
}

fn data(criterion: &mut Criterion, bench: &str, len: usize) -> Result<()> {
    let mut group = criterion.benchmark_group(bench);
    group.throughput(Throughput::Bytes(len as u64));
    let mut pair = ours::Pair::new()?;
    let id = pair.open()?;
    let mut frame = ours::frame(len);
    group.bench_function("hbone", |bencher| {
        bencher.iter(|| pair.send(id, &mut frame).expect("the codecs agree"));
    });
    let mut pair = theirs::Pair::new()?;
    let mut stream = pair.open()?;
    let payload = theirs::payload(len);
    group.bench_function("h2", |bencher| {
        bencher.iter(|| pair.send(&mut stream, &payload).expect("the codecs agree"));
    });
    group.finish();
    Ok(())
}

fn connect(criterion: &mut Criterion) -> Result<()> {
    let mut group = criterion.benchmark_group(CONNECT);
    let mut pair = ours::Pair::new()?;
    group.bench_function("hbone", |bencher| {
        bencher.iter(|| {
            let id = pair.open().expect("the codecs agree");
            pair.close(id).expect("the codecs agree");
        });
    });
    let mut pair = theirs::Pair::new()?;
    group.bench_function("h2", |bencher| {
        bencher.iter(|| {
            let stream = pair.open().expect("the codecs agree");
            pair.close(stream).expect("the codecs agree");
        });
    });
    group.finish();
    Ok(())
}
