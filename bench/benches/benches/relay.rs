//! The relay on `rt` beside tokio, tokio-uring and monoio. `BENCH_TRIALS=N` sets the trials.
#![forbid(unsafe_code)]

use std::path::Path;

use anyhow::{Context as _, Result};
use benches::document;
use benches::relay::measure;
use benches::relay::plan::Plan;
use benches::rows::quick;

fn main() -> Result<()> {
    let mut plan = Plan::new(quick());
    if let Ok(trials) = std::env::var("BENCH_TRIALS") {
        let parsed = trials.parse::<usize>().ok().filter(|&n| n > 0);
        plan.trials = parsed.with_context(|| format!("BENCH_TRIALS={trials}: at least 1"))?;
    }
    // `cargo bench -- words` narrows it down to workloads whose names hold one of the words.
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    plan.workloads.retain(|workload| {
        let name = workload.name();
        words.is_empty() || words.iter().any(|word| name.contains(word))
    });
    let part = measure::run(&plan, Path::new(env!("CARGO_BIN_EXE_bench-peer")))?;
    part.store("relay")?;
    print!("{}", document::table(&part));
    Ok(())
}
