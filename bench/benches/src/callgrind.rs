//! Instructions of a workload as callgrind counts them: the same on every run, however busy the
//! machine is.
//!
//! `bench-peer` runs the workload twice with different counts; the difference of the two totals
//! divided by that of the counts is free of set-up and tear-down.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::codec;

/// Something to count instructions of.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
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
}

impl Subject {
    /// Runs it `count` times.
    ///
    /// # Errors
    /// The codec refused something: a defect of the benchmark.
    pub fn run(self, count: u64) -> Result<()> {
        match self {
            Self::HboneData => codec::ours::data(codec::SMALL, count),
            Self::H2Data => codec::theirs::data(codec::SMALL, count),
            Self::HboneBulk => codec::ours::data(codec::BULK, count),
            Self::H2Bulk => codec::theirs::data(codec::BULK, count),
            Self::HboneConnect => codec::ours::connect(count),
            Self::H2Connect => codec::theirs::connect(count),
        }
    }
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
pub fn instructions(program: &Path, subject: Subject, counts: (u64, u64)) -> Result<f64> {
    let (few, many) = counts;
    let low = total(program, subject, few)?;
    let high = total(program, subject, many)?;
    ensure!(high > low, "more work took no more instructions");
    Ok((high - low) as f64 / (many - few) as f64)
}

fn total(program: &Path, subject: Subject, count: u64) -> Result<u64> {
    let name = clap::ValueEnum::to_possible_value(&subject).context("every subject has a name")?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args(["instructions", name.get_name(), &count.to_string()])
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
