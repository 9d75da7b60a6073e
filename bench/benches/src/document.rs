//! The table on the terminal and `bench.json`.

use std::fmt::Write as _;

use anyhow::Result;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::machine;
use crate::rows::{Part, Row};

/// Version of `bench.json`'s layout.
pub const SCHEMA: u32 = 1;

/// Everything that is to be measured, by the beginnings of names.
const NAMES: [&str; 17] = [
    "relay/rr/",
    "relay/stream/",
    "relay/stream-splice/",
    "relay/connect/",
    "relay/idle/",
    "hbone/data",
    "hbone/connect",
    "tls/seal/16384",
    "tls/open/16384",
    "tls/handshake",
    "mesh/policy/",
    "mesh/route/",
    "mesh/lb/",
    "mesh/update/",
    "dns/answer",
    "telemetry/metrics",
    "telemetry/log",
];

/// What is to be measured and was not.
#[must_use]
pub fn missing(part: &Part) -> Vec<&'static str> {
    let measured = |name: &str| part.rows.iter().any(|row| row.bench.starts_with(name));
    let names = NAMES.into_iter().filter(|name| !measured(name));
    names.map(|name| name.trim_end_matches('/')).collect()
}

/// `bench.json`.
///
/// # Errors
/// The time of day cannot be written.
pub fn document(part: &Part) -> Result<Value> {
    let now = OffsetDateTime::now_utc().replace_nanosecond(0)?;
    Ok(json!({
        "schema": SCHEMA,
        "when": now.format(&Rfc3339)?,
        "git": machine::git(),
        "machine": machine::machine(),
        "quick": crate::rows::quick(),
        "rows": part.rows,
        "skipped": part.skipped,
        "missing": missing(part),
    }))
}

/// The table; every line ends with what the ratio means.
#[must_use]
pub fn table(part: &Part) -> String {
    let cells: Vec<[String; 7]> = part.rows.iter().map(cells).collect();
    let head = [
        "bench", "metric", "subject", "value", "baseline", "value", "ratio",
    ]
    .map(str::to_owned);
    let mut widths = head.clone().map(|cell| cell.len());
    for line in &cells {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for line in std::iter::once(&head).chain(&cells) {
        for (index, (cell, width)) in line.iter().zip(widths).enumerate() {
            // Values are aligned by their last digit.
            let _ = match index {
                3 | 5 | 6 => write!(text, "{cell:>width$}  "),
                _ => write!(text, "{cell:<width$}  "),
            };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    for skipped in &part.skipped {
        let _ = writeln!(text, "skipped: {skipped}");
    }
    text
}

fn cells(row: &Row) -> [String; 7] {
    [
        row.bench.clone(),
        row.metric.clone(),
        row.subject.clone(),
        number(row.subject_value),
        row.baseline.clone(),
        number(row.baseline_value),
        format!("{:.2}", row.ratio),
    ]
}

/// Four significant digits, without an exponent.
fn number(value: f64) -> String {
    let digits = value.abs().log10().floor();
    let decimals = if digits.is_finite() {
        (3.0 - digits).clamp(0.0, 6.0) as usize
    } else {
        0
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        let shown = [0.012_345, 1.234_56, 123.456, 123_456.7, 0.0].map(number);
        assert_eq!(shown, ["0.01235", "1.235", "123.5", "123457", "0"]);
    }

    #[test]
    fn the_table_has_a_line_for_every_row_and_every_skip() {
        let row = Row::new("relay/rr/1", "p50_us", ("rt", 10.0), ("tokio", 20.0));
        let part = Part {
            rows: vec![row],
            skipped: vec!["hbone/data: no valgrind".to_owned()],
        };
        let text = table(&part);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].ends_with("0.50"), "{}", lines[1]);
        assert!(lines[2].starts_with("skipped: hbone/data"));
    }
}
