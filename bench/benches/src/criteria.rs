//! Criterion for the in-process benchmarks: its settings here, and its results as numbers.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use criterion::Criterion;
use serde_json::Value;

use crate::rows::{quick, target_directory};

/// Criterion with command-line arguments applied and times that fit [`quick`].
///
/// # Errors
/// This program is in no cargo target directory.
pub fn criterion() -> Result<Criterion> {
    let (warm_up_ms, measure_ms, samples) = if quick() {
        (100, 300, 10)
    } else {
        (500, 2000, 50)
    };
    Ok(Criterion::default()
        .output_directory(&directory()?)
        .without_plots()
        .warm_up_time(Duration::from_millis(warm_up_ms))
        .measurement_time(Duration::from_millis(measure_ms))
        .sample_size(samples)
        .configure_from_args())
}

/// The median time of one iteration in ns, as the last run of `function` in `group` found it;
/// none if it has never run, for example because a filter left it out.
///
/// # Errors
/// What criterion wrote cannot be read.
pub fn median_ns(group: &str, function: &str) -> Result<Option<f64>> {
    let safe = |name: &str| name.replace('/', "_");
    let path = directory()?
        .join(safe(group))
        .join(safe(function))
        .join("new/estimates.json");
    let Ok(text) = fs::read_to_string(&path) else {
        return Ok(None);
    };
    let estimates: Value = serde_json::from_str(&text)?;
    let median = estimates["median"]["point_estimate"].as_f64();
    let median = median.with_context(|| format!("no median in {}", path.display()))?;
    Ok(Some(median))
}

fn directory() -> Result<PathBuf> {
    Ok(target_directory()?.join("criterion"))
}
