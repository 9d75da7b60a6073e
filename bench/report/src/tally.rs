//! How often one path is better than another: the comparison in a sentence.

use super::schema::{
    Document, Ratio, Verdict, cpu_metrics, is_redirection_only, throughput_metric,
};

/// Whether a ratio is counted.
type Belongs = fn(&Ratio) -> bool;

/// What the sentence counts, by name.
const PARTS: [(&str, Belongs); 5] = [
    ("throughput", |r| r.metric == throughput_metric(&r.workload)),
    ("median latency", |r| r.metric == "p50_us"),
    ("p99", |r| r.metric == "p99_us"),
    ("ztunnel CPU", |r| r.metric == cpu_metrics(&r.workload)[0]),
    ("machine CPU", |r| r.metric == cpu_metrics(&r.workload)[1]),
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
    let parts = PARTS.map(|(name, belongs)| {
        let ratios = rivals(document).filter(|r| r.of == of && r.to == to && belongs(r));
        let (mut better, mut worse, mut all) = (0, 0, 0);
        for ratio in ratios {
            better += usize::from(ratio.verdict == Verdict::Better);
            worse += usize::from(ratio.verdict == Verdict::Worse);
            all += 1;
        }
        format!("{name} better in {better}, worse in {worse} of {all}")
    });
    parts.join("; ")
}

fn rivals(document: &Document) -> impl Iterator<Item = &Ratio> {
    let ratios = document.ratios.iter();
    ratios.filter(|ratio| {
        let meshed = ratio.to != "none" && !is_redirection_only(&ratio.workload);
        meshed && !document.is_against_itself(ratio)
    })
}
