//! How often one path is better than another: the comparison in a sentence.

use super::metric::Metric;
use super::schema::{Document, Ratio, Verdict, is_redirection_only};

/// What the sentence counts, by name, in the order of [`Metric::headlines`].
const PARTS: [&str; 5] = [
    "throughput",
    "median latency",
    "p99",
    "ztunnel CPU",
    "machine CPU",
];

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

/// In how many ratios `of` is better or worse than `to`, for each kind of metric.
pub(super) fn sentence(document: &Document, of: &str, to: &str) -> String {
    let parts = PARTS.iter().enumerate().map(|(i, name)| {
        let belongs = |r: &&Ratio| r.metric == Metric::headlines(&r.workload)[i];
        let ratios = rivals(document).filter(|r| r.of == of && r.to == to);
        let ratios = ratios.filter(belongs);
        let (mut better, mut worse, mut all) = (0, 0, 0);
        for ratio in ratios {
            better += usize::from(ratio.verdict == Verdict::Better);
            worse += usize::from(ratio.verdict == Verdict::Worse);
            all += 1;
        }
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
