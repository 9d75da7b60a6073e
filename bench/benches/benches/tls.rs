//! TLS: records of 16 KiB by us, rustls' buffered interface and the bare AEAD; handshakes by us and
//! rustls' buffered interface.
#![forbid(unsafe_code)]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use benches::callgrind::{self, Subject, Work};
use benches::criteria::{criterion, median_ns};
use benches::document;
use benches::records::{Aead, PLAINTEXT, Rustls, RustlsConfigs, Workloads, open, record, sessions};
use benches::rows::{Part, Row, quick};
use criterion::{Criterion, Throughput};

/// Records sealed ahead of timing their opening: few enough to stay in the cache.
const BATCH: u64 = 8;
const SEAL: &str = "tls/seal/16384";
const OPEN: &str = "tls/open/16384";
const HANDSHAKE: &str = "tls/handshake";

fn main() -> Result<()> {
    let mut criterion = criterion()?;
    seal(&mut criterion)?;
    opening(&mut criterion)?;
    handshake(&mut criterion)?;
    criterion.final_summary();
    let mut part = Part::default();
    for bench in [SEAL, OPEN] {
        for baseline in ["rustls", "aead"] {
            let medians = (median_ns(bench, "tls")?, median_ns(bench, baseline)?);
            if let (Some(ours), Some(theirs)) = medians {
                let metric = "ns_per_record";
                let row = Row::new(bench, metric, ("tls", ours), (baseline, theirs));
                part.rows.push(row.with_note("wall time of one thread"));
            }
        }
    }
    let medians = (
        median_ns(HANDSHAKE, "tls")?,
        median_ns(HANDSHAKE, "rustls")?,
    );
    if let (Some(ours), Some(theirs)) = medians {
        let metric = "ns_per_handshake";
        let row = Row::new(HANDSHAKE, metric, ("tls", ours), ("rustls", theirs));
        part.rows.push(row.with_note("wall time, both ends"));
    }
    instructions(&mut part)?;
    part.store("tls")?;
    print!("{}", document::table(&part));
    Ok(())
}

/// valgrind's processor lacks the widest vector instructions: what does the work differs from
/// what the wall times are of, alike for all three.
fn instructions(part: &mut Part) -> Result<()> {
    // Keys and signatures of the set-up differ from run to run: enough records to drown that.
    let counts = if quick() { (50, 550) } else { (200, 3_200) };
    let program = Path::new(env!("CARGO_BIN_EXE_bench-peer"));
    let sealed = |subject| Work::of(subject);
    // Opening is what sealing and opening take beyond sealing.
    let opened = |subject, seal| Work {
        without: Some(seal),
        ..Work::of(subject)
    };
    use Subject::{AeadSeal, AeadSealOpen, RustlsSeal, RustlsSealOpen, TlsSeal, TlsSealOpen};
    let cases = [
        (SEAL, sealed(TlsSeal), "rustls", sealed(RustlsSeal)),
        (SEAL, sealed(TlsSeal), "aead", sealed(AeadSeal)),
        (
            OPEN,
            opened(TlsSealOpen, TlsSeal),
            "rustls",
            opened(RustlsSealOpen, RustlsSeal),
        ),
        (
            OPEN,
            opened(TlsSealOpen, TlsSeal),
            "aead",
            opened(AeadSealOpen, AeadSeal),
        ),
    ];
    for (bench, ours, name, theirs) in cases {
        let works = (("tls", ours), (name, theirs));
        callgrind::compare(part, (bench, "per record"), program, works, counts)?;
    }
    let counts = if quick() { (5, 25) } else { (20, 120) };
    let works = (
        ("tls", Work::of(Subject::TlsHandshake)),
        ("rustls", Work::of(Subject::RustlsHandshake)),
    );
    let note = "per handshake, both ends";
    callgrind::compare(part, (HANDSHAKE, note), program, works, counts)
}

/// Both build their configurations once; what a connection costs is here.
fn handshake(criterion: &mut Criterion) -> Result<()> {
    let mut group = criterion.benchmark_group(HANDSHAKE);
    let workloads = Workloads::new()?;
    group.bench_function("tls", |bencher| {
        bencher.iter(|| workloads.shake_hands().expect("the handshake succeeds"));
    });
    let configs = RustlsConfigs::new()?;
    group.bench_function("rustls", |bencher| {
        bencher.iter(|| Rustls::with(&configs).expect("the handshake succeeds"));
    });
    group.finish();
    Ok(())
}

fn seal(criterion: &mut Criterion) -> Result<()> {
    let mut group = criterion.benchmark_group(SEAL);
    group.throughput(Throughput::Bytes(PLAINTEXT as u64));
    let (mut session, _server) = sessions()?;
    let mut ours = record();
    group.bench_function("tls", |bencher| {
        bencher.iter(|| session.seal(&mut ours).expect("a record can be sealed"));
    });
    let mut rustls = Rustls::new()?;
    let (plaintext, mut wire) = (vec![7; PLAINTEXT], Vec::new());
    group.bench_function("rustls", |bencher| {
        bencher.iter(|| {
            rustls
                .seal(&plaintext, &mut wire)
                .expect("a record can be sealed");
        });
    });
    let mut aead = Aead::new()?;
    let mut bare = record();
    group.bench_function("aead", |bencher| {
        bencher.iter(|| aead.seal(&mut bare).expect("a record can be sealed"));
    });
    group.finish();
    Ok(())
}

fn opening(criterion: &mut Criterion) -> Result<()> {
    let mut group = criterion.benchmark_group(OPEN);
    group.throughput(Throughput::Bytes(PLAINTEXT as u64));
    let (mut sealing, mut session) = sessions()?;
    group.bench_function("tls", |bencher| {
        let mut records = vec![record(); BATCH as usize];
        bencher.iter_custom(|count| {
            batches(
                count,
                &mut records,
                |record| {
                    record.fill(7);
                    sealing.seal(record).expect("a record can be sealed");
                },
                |record| open(&mut session, record).expect("what was sealed opens"),
            )
        });
    });
    let rustls = std::cell::RefCell::new(Rustls::new()?);
    let (plaintext, mut opened) = (vec![7; PLAINTEXT], vec![0; PLAINTEXT]);
    group.bench_function("rustls", |bencher| {
        let mut wires = vec![Vec::new(); BATCH as usize];
        bencher.iter_custom(|count| {
            batches(
                count,
                &mut wires,
                |wire| {
                    let sealed = rustls.borrow_mut().seal(&plaintext, wire);
                    sealed.expect("a record can be sealed");
                },
                |wire| {
                    let result = rustls.borrow_mut().open(wire, &mut opened);
                    result.expect("what was sealed opens");
                },
            )
        });
    });
    let aead = std::cell::RefCell::new(Aead::new()?);
    group.bench_function("aead", |bencher| {
        let mut records = vec![record(); BATCH as usize];
        bencher.iter_custom(|count| {
            batches(
                count,
                &mut records,
                |record| {
                    record.fill(7);
                    let sealed = aead.borrow_mut().seal(record);
                    sealed.expect("a record can be sealed");
                },
                |record| {
                    let result = aead.borrow_mut().open(record);
                    result.expect("what was sealed opens");
                },
            )
        });
    });
    group.finish();
    Ok(())
}

/// Prepares and works on `count` items in batches of at most those in `items`; only the work is
/// timed.
fn batches<T>(
    mut count: u64,
    items: &mut [T],
    mut prepare: impl FnMut(&mut T),
    mut work: impl FnMut(&mut T),
) -> Duration {
    let mut spent = Duration::ZERO;
    while count > 0 {
        let n = count.min(items.len() as u64);
        let batch = &mut items[..n as usize];
        batch.iter_mut().for_each(&mut prepare);
        let start = Instant::now();
        batch.iter_mut().for_each(&mut work);
        spent += start.elapsed();
        count -= n;
    }
    spent
}
