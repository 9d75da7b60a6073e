//! Instructions of a workload as callgrind counts them: the same on every run, however busy the
//! machine is.
//!
//! `bench-peer` runs the workload twice with different counts; the difference of the two totals
//! divided by that of the counts is free of set-up and tear-down.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};

use crate::accounting::{Ours, Reference, formatting};
use crate::codec;
use crate::model::{Source, World};
use crate::records::{self, Aead, PLAINTEXT, Rustls, RustlsConfigs, Workloads};
use crate::rows::{Part, Row};

/// Copies and fills by vector instructions. glibc would use `rep movsb` for long ones, of which
/// callgrind counts every byte as an instruction: rows would say how many bytes are copied and
/// nothing else.
const VECTOR_COPIES: &str = "glibc.cpu.x86_rep_movsb_threshold=1000000000:\
    glibc.cpu.x86_rep_stosb_threshold=1000000000";

/// The quantity of rows of instructions; their notes say of what.
pub const METRIC: &str = "instructions";

/// Something to count instructions of.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, clap::ValueEnum)]
pub enum Subject {
    /// DATA frames through our codec.
    HboneData,
    /// The same through `h2`.
    H2Data,
    /// Full-size DATA frames through our codec.
    HboneBulk,
    /// The same through `h2`.
    H2Bulk,
    /// Streams through our codec, from CONNECT to the end.
    HboneConnect,
    /// The same through `h2`.
    H2Connect,
    /// Records sealed by our session.
    TlsSeal,
    /// The same by rustls.
    RustlsSeal,
    /// The same by the bare AEAD.
    AeadSeal,
    /// Records sealed and opened by our session.
    TlsSealOpen,
    /// The same by rustls.
    RustlsSealOpen,
    /// The same by the bare AEAD.
    AeadSealOpen,
    /// Handshakes of ours, both ends.
    TlsHandshake,
    /// The same by rustls.
    RustlsHandshake,
    /// Authorizations in a mesh of some size.
    MeshPolicy,
    /// Routes in a mesh of some size.
    MeshRoute,
    /// Choices among all workloads of a mesh of some size.
    MeshLb,
    /// Snapshots of a mesh of some size.
    MeshUpdate,
    /// Connections counted by our telemetry.
    TelemetryMetrics,
    /// The same by the reference.
    ReferenceMetrics,
    /// Connections counted and logged by our telemetry.
    TelemetryLog,
    /// The same by the reference.
    ReferenceLog,
}

impl Subject {
    /// Runs it `count` times, in a mesh of `size` workloads where there is one.
    ///
    /// # Errors
    /// Something was refused: a defect of the benchmark.
    pub fn run(self, size: usize, count: u64) -> Result<()> {
        match self {
            Self::HboneData => codec::ours::data(codec::SMALL, count),
            Self::H2Data => codec::theirs::data(codec::SMALL, count),
            Self::HboneBulk => codec::ours::data(codec::BULK, count),
            Self::H2Bulk => codec::theirs::data(codec::BULK, count),
            Self::HboneConnect => codec::ours::connect(count),
            Self::H2Connect => codec::theirs::connect(count),
            Self::TlsSeal | Self::TlsSealOpen => tls(count, self == Self::TlsSealOpen),
            Self::RustlsSeal | Self::RustlsSealOpen => rustls(count, self == Self::RustlsSealOpen),
            Self::AeadSeal | Self::AeadSealOpen => aead(count, self == Self::AeadSealOpen),
            Self::TlsHandshake => {
                let workloads = Workloads::new()?;
                (0..count).try_for_each(|_| workloads.shake_hands().map(drop))
            }
            Self::RustlsHandshake => {
                let configs = RustlsConfigs::new()?;
                (0..count).try_for_each(|_| Rustls::with(&configs).map(drop))
            }
            Self::MeshPolicy | Self::MeshRoute | Self::MeshLb => self.ask(size, count),
            Self::MeshUpdate => {
                let source = Source::new(size);
                (0..count).try_for_each(|_| source.time_build().map(drop))
            }
            Self::TelemetryMetrics => Ours::new(false)?.time(count).map(drop),
            Self::TelemetryLog => Ours::new(true)?.time(count).map(drop),
            Self::ReferenceMetrics | Self::ReferenceLog => {
                let (reference, log) = (Reference::default(), self == Self::ReferenceLog);
                tracing::subscriber::with_default(formatting(), || {
                    (0..count).for_each(|_| reference.connection(log));
                });
                Ok(())
            }
        }
    }

    fn ask(self, size: usize, count: u64) -> Result<()> {
        let mut world = World::new(&Source::new(size))?;
        (0..count).try_for_each(|_| match self {
            Self::MeshPolicy => {
                std::hint::black_box(world.authorize());
                Ok(())
            }
            Self::MeshLb => world.balance().map(drop),
            _ => world.route().map(drop),
        })
    }
}

fn tls(count: u64, open: bool) -> Result<()> {
    let (mut client, mut server) = records::sessions()?;
    let mut record = records::record();
    for _ in 0..count {
        client.seal(&mut record)?;
        if open {
            records::open(&mut server, &mut record)?;
        }
    }
    Ok(())
}

fn rustls(count: u64, open: bool) -> Result<()> {
    let mut pair = Rustls::new()?;
    let (mut plaintext, mut wire) = (vec![7; PLAINTEXT], Vec::new());
    for _ in 0..count {
        pair.seal(&plaintext, &mut wire)?;
        if open {
            pair.open(&wire, &mut plaintext)?;
        }
    }
    Ok(())
}

fn aead(count: u64, open: bool) -> Result<()> {
    let mut aead = Aead::new()?;
    let mut record = records::record();
    for _ in 0..count {
        aead.seal(&mut record)?;
        if open {
            aead.open(&mut record)?;
        }
    }
    Ok(())
}

/// What is counted for one side of a row.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// What is run.
    pub subject: Subject,
    /// What is part of it and not wanted.
    pub without: Option<Subject>,
    /// Workloads of the mesh, where there is one.
    pub size: usize,
}

impl Work {
    /// All of `subject`.
    #[must_use]
    pub fn of(subject: Subject) -> Self {
        let (without, size) = (None, 1);
        Self {
            subject,
            without,
            size,
        }
    }
}

/// Adds the row of the instructions of `ours` beside `theirs`, or says why there is none.
///
/// # Errors
/// As [`instructions`].
pub fn compare(
    part: &mut Part,
    (bench, note): (&str, &str),
    program: &Path,
    (ours, theirs): ((&str, Work), (&str, Work)),
    counts: (u64, u64),
) -> Result<()> {
    if let Some(reason) = missing() {
        part.skipped.push(format!("{bench} {METRIC}: {reason}"));
        return Ok(());
    }
    let counted = |(name, work)| Ok((name, instructions(program, work, counts)?));
    let counted: [Result<(&str, f64)>; 2] = [ours, theirs].map(counted);
    let [ours, theirs] = counted;
    let row = Row::new(bench, METRIC, ours?, theirs?);
    part.rows.push(row.with_note(&format!("callgrind; {note}")));
    Ok(())
}

/// Why instructions cannot be counted here; none if they can.
#[must_use]
pub fn missing() -> Option<&'static str> {
    let version = Command::new("valgrind").arg("--version").output();
    match version {
        Ok(output) if output.status.success() => None,
        _ => Some("valgrind is not installed (apt-get install valgrind)"),
    }
}

/// Instructions of one run of the workload.
///
/// # Errors
/// callgrind could not run the `bench-peer` binary `program`.
pub fn instructions(program: &Path, work: Work, counts: (u64, u64)) -> Result<f64> {
    let all = each(program, work.subject, work.size, counts)?;
    match work.without {
        Some(part) => Ok(all - each(program, part, work.size, counts)?),
        None => Ok(all),
    }
}

fn each(program: &Path, subject: Subject, size: usize, (few, many): (u64, u64)) -> Result<f64> {
    let low = total(program, subject, size, few)?;
    let high = total(program, subject, size, many)?;
    ensure!(
        high > low,
        "{subject:?}: more work took no more instructions"
    );
    Ok((high - low) as f64 / (many - few) as f64)
}

/// Totals by what was run. A subject of several rows is counted once.
static TOTALS: Mutex<Option<Totals>> = Mutex::new(None);

type Totals = HashMap<(Subject, usize, u64), u64>;

fn total(program: &Path, subject: Subject, size: usize, count: u64) -> Result<u64> {
    let mut totals = TOTALS.lock().unwrap_or_else(PoisonError::into_inner);
    let totals = totals.get_or_insert_default();
    let key = (subject, size, count);
    if let Some(known) = totals.get(&key) {
        return Ok(*known);
    }
    let counted = run_counted(program, subject, size, count)?;
    totals.insert(key, counted);
    Ok(counted)
}

fn run_counted(program: &Path, subject: Subject, size: usize, count: u64) -> Result<u64> {
    let name = clap::ValueEnum::to_possible_value(&subject).context("every subject has a name")?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args(["instructions", name.get_name(), &count.to_string()])
        .args(["--size", &size.to_string()])
        .env("GLIBC_TUNABLES", VECTOR_COPIES)
        .stdin(Stdio::null())
        .output()
        .context("start valgrind")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "callgrind failed: {text}");
    parse_total(&text).with_context(|| format!("callgrind printed no total: {text}"))
}

/// The number behind `Collected :`.
fn parse_total(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.contains("Collected :"))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_found() {
        let text = "==1== Events    : Ir\n==1== Collected : 1234\n==1== \n";
        assert_eq!(parse_total(text), Some(1234));
        assert_eq!(parse_total("==1== nothing"), None);
    }
}
