//! How often one path is better than another.

use super::metric::Metric;
use super::schema::{Document, Ratio, Verdict, is_redirection_only};

/// What is counted, by name, in the order of [`Metric::headlines`].
pub(super) const PARTS: [&str; 5] = [
    "throughput",
    "median latency",
    "p99",
    "ztunnel CPU",
    "machine CPU",
];

/// Ratios of two paths at one kind of metric.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Count {
    pub(super) better: usize,
    pub(super) worse: usize,
    pub(super) all: usize,
}

/// The pairs of paths that have ratios, in their order. `none` is no rival, nor is a path to
/// itself; and this is about meshes.
pub(super) fn pairs(document: &Document) -> Vec<(&str, &str)> {
    let mut pairs = Vec::new();
    for ratio in rivals(document) {
        let pair = (ratio.of.as_str(), ratio.to.as_str());
        if !pairs.contains(&pair) {
            pairs.push(pair);
        }
    }
    pairs
}

/// In how many ratios `of` is better or worse than `to`, for each of [`PARTS`].
pub(super) fn counts(document: &Document, of: &str, to: &str) -> [Count; PARTS.len()] {
    let mut counts = [Count::default(); PARTS.len()];
    for ratio in rivals(document).filter(|r| r.of == of && r.to == to) {
        let metrics = Metric::headlines(&ratio.workload);
        for (count, _) in counts
            .iter_mut()
            .zip(metrics)
            .filter(|(_, m)| *m == ratio.metric)
        {
            count.better += usize::from(ratio.verdict == Verdict::Better);
            count.worse += usize::from(ratio.verdict == Verdict::Worse);
            count.all += 1;
        }
    }
    counts
}

/// The same as a sentence.
pub(super) fn sentence(document: &Document, of: &str, to: &str) -> String {
    let counts = counts(document, of, to);
    let parts = PARTS.iter().zip(counts).map(|(name, count)| {
        let Count { better, worse, all } = count;
        format!("{name} better in {better}, worse in {worse} of {all}")
    });
    parts.collect::<Vec<_>>().join("; ")
}

fn rivals(document: &Document) -> impl Iterator<Item = &Ratio> {
    let ratios = document.ratios.iter();
    ratios.filter(|ratio| {
        let meshed = ratio.to != "none" && !is_redirection_only(&ratio.workload);
        meshed && !document.is_against_itself(ratio)
    })
}
