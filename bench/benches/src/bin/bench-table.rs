//! Prints what all bench targets have measured as one table and writes `bench.json`.
#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use benches::rows::Part;
use benches::{document, machine};
use clap::Parser;

/// One table of all micro-benchmarks that have run, and bench.json in the newest results
/// directory (`results/tmp` where no comparison has run yet).
#[derive(Debug, Parser)]
struct Cli {
    /// Directory to write bench.json into.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

fn main() -> Result<()> {
    let directory = Cli::parse().out.unwrap_or_else(machine::newest_results);
    let part = Part::collect()?;
    let document = document::document(&part)?;
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    let path = directory.join("bench.json");
    fs::write(&path, format!("{document:#}\n"))
        .with_context(|| format!("write {}", path.display()))?;
    print!("{}", document::table(&part));
    let missing = document::missing(&part);
    if !missing.is_empty() {
        println!(
            "not measured, for lack of a benchmark or of a run: {}",
            missing.join(", ")
        );
    }
    println!("{}", path.display());
    Ok(())
}
