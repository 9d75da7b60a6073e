//! One measured comparison, and where a bench target leaves its own until all are collected.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// A subject beside a baseline.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Row {
    /// Name such as `relay/rr/256`; a further part names another placement.
    pub bench: String,
    /// What is measured.
    pub subject: String,
    /// What it is measured against.
    pub baseline: String,
    /// Quantity with its unit last, such as `cpu_us_per_request`.
    pub metric: String,
    /// The subject's median over trials or samples.
    pub subject_value: f64,
    /// The baseline's.
    pub baseline_value: f64,
    /// `subject_value / baseline_value`.
    pub ratio: f64,
    /// Which processes ran on which CPUs, or how the quantity was obtained.
    pub note: String,
    /// The subject's trials in order; empty where the tool keeps them elsewhere.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subject_values: Vec<f64>,
    /// The baseline's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub baseline_values: Vec<f64>,
}

impl Row {
    /// A row of two numbers.
    #[must_use]
    pub fn new(bench: &str, metric: &str, subject: (&str, f64), baseline: (&str, f64)) -> Self {
        Self {
            bench: bench.to_owned(),
            subject: subject.0.to_owned(),
            baseline: baseline.0.to_owned(),
            metric: metric.to_owned(),
            subject_value: subject.1,
            baseline_value: baseline.1,
            ratio: subject.1 / baseline.1,
            note: String::new(),
            subject_values: Vec::new(),
            baseline_values: Vec::new(),
        }
    }

    /// The same with a note.
    #[must_use]
    pub fn with_note(mut self, note: &str) -> Self {
        note.clone_into(&mut self.note);
        self
    }
}

/// What a bench target measured.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Part {
    /// Its rows.
    pub rows: Vec<Row>,
    /// What could not be measured, as `name: reason`.
    pub skipped: Vec<String>,
}

impl Part {
    /// Keeps this as what bench target `name` measured, instead of what it did before.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn store(&self, name: &str) -> Result<()> {
        self.store_in(&directory()?, name)
    }

    /// As [`Part::store`], into `directory`.
    ///
    /// # Errors
    /// As [`Part::store`].
    pub fn store_in(&self, directory: &Path, name: &str) -> Result<()> {
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        let path = directory.join(format!("{name}.json"));
        fs::write(&path, serde_json::to_string_pretty(self)?)
            .with_context(|| format!("write {}", path.display()))
    }

    /// All that is kept, in the order of the targets' names.
    ///
    /// # Errors
    /// A file cannot be read or is not one of ours.
    pub fn collect() -> Result<Self> {
        Self::collect_from(&directory()?)
    }

    /// As [`Part::collect`], from `directory`.
    ///
    /// # Errors
    /// As [`Part::collect`].
    pub fn collect_from(directory: &Path) -> Result<Self> {
        let mut all = Self::default();
        let entries = fs::read_dir(directory).with_context(|| {
            let path = directory.display();
            format!("read {path}: no benchmark has run yet; `cargo bench -p benches` first")
        })?;
        let mut paths: Vec<PathBuf> = entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()?;
        paths.sort();
        for path in paths {
            let text = fs::read_to_string(&path)?;
            let part: Self = serde_json::from_str(&text)
                .with_context(|| format!("{} is not a part of results", path.display()))?;
            all.rows.extend(part.rows);
            all.skipped.extend(part.skipped);
        }
        Ok(all)
    }
}

/// Whether a first look is enough (`BENCH_QUICK` set and not `0`).
#[must_use]
pub fn quick() -> bool {
    env::var("BENCH_QUICK").is_ok_and(|value| !value.is_empty() && value != "0")
}

/// Where parts are kept: `BENCH_PARTS`, else `bench-parts` in cargo's target directory, which is
/// the one above this program that cargo has tagged.
fn directory() -> Result<PathBuf> {
    if let Some(directory) = env::var_os("BENCH_PARTS") {
        return Ok(directory.into());
    }
    Ok(target_directory()?.join("bench-parts"))
}

/// Cargo's target directory.
///
/// # Errors
/// This program does not lie in one.
pub fn target_directory() -> Result<PathBuf> {
    let program = env::current_exe()?;
    let tagged = |directory: &&Path| directory.join("CACHEDIR.TAG").is_file();
    let target = program.ancestors().skip(1).find(tagged);
    Ok(target
        .context("this program is in no cargo target directory: set BENCH_PARTS")?
        .to_owned())
}

/// The middle of `values`, or the mean of the two in the middle; NaN without any.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
