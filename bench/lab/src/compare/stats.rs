//! Statistics on trial-level figures: medians, bootstrap intervals, paired ratios, verdicts.
//!
//! Requests within a trial depend on each other, so a trial counts as one observation. Paths are
//! compared round by round, which cancels what drifts slowly. All resampling is seeded: the same
//! figures give the same report.

use crate::report::schema::{Estimate, Verdict};

/// Resamples of the bootstrap.
const RESAMPLES: usize = 4000;
/// Fewer pairs than this show nothing: with four, chance alone puts all on one side in one of
/// eight cases.
const PAIRS_FOR_A_VERDICT: usize = 5;
/// The noise threshold is never below this.
const LEAST_NOISE: f64 = 0.02;

/// The median; `NaN` for no values.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile_of_sorted(&sorted, 0.5)
}

fn quantile_of_sorted(sorted: &[f64], quantile: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let position = quantile * last as f64;
    let below = sorted[position.floor() as usize];
    let above = sorted[position.ceil() as usize];
    below + (above - below) * position.fract()
}

/// Median with the percentile bootstrap's 95 % interval.
#[must_use]
pub fn estimate(values: &[f64]) -> Estimate {
    Estimate {
        median: median(values),
        ci95: interval(values),
        values: values.to_vec(),
    }
}

fn interval(values: &[f64]) -> [f64; 2] {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut sample = vec![0.0; values.len()];
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            for slot in &mut sample {
                *slot = values[random.below(values.len())];
            }
            median(&sample)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    [
        quantile_of_sorted(&medians, 0.025),
        quantile_of_sorted(&medians, 0.975),
    ]
}

/// Ratios of two paths, paired by round; `None` if there is no pair.
#[must_use]
pub fn paired_ratio(of: &[f64], to: &[f64]) -> Option<Estimate> {
    let pairs = of.iter().zip(to).filter(|(_, to)| **to > 0.0);
    let ratios: Vec<f64> = pairs.map(|(of, to)| of / to).collect();
    (!ratios.is_empty()).then(|| estimate(&ratios))
}

/// What a paired ratio shows, given the noise threshold and whether more is better.
#[must_use]
pub fn verdict(ratio: &Estimate, noise: f64, more_is_better: bool) -> Verdict {
    if ratio.values.len() < PAIRS_FOR_A_VERDICT {
        return Verdict::NoDifference;
    }
    let [low, high] = ratio.ci95;
    let more = low > 1.0 + noise;
    let less = high < 1.0 / (1.0 + noise);
    match (more, less) {
        (true, _) if more_is_better => Verdict::Better,
        (true, _) => Verdict::Worse,
        (_, true) if more_is_better => Verdict::Worse,
        (_, true) => Verdict::Better,
        _ => Verdict::NoDifference,
    }
}

/// The noise threshold: how far medians of even and odd rounds of the *same* path lie apart,
/// relatively, in the typical (median) row of those given; at least 2 %. Intervals show how far
/// trials scatter; this keeps differences from being claimed that a row has with itself.
#[must_use]
pub fn noise_threshold<'a>(rows: impl Iterator<Item = &'a [f64]>) -> f64 {
    let mut differences: Vec<f64> = rows
        .filter(|values| values.len() >= 2)
        .map(|values| {
            let half = |start| {
                median(
                    &values
                        .iter()
                        .skip(start)
                        .step_by(2)
                        .copied()
                        .collect::<Vec<_>>(),
                )
            };
            let (even, odd): (f64, f64) = (half(0), half(1));
            let (low, high) = (even.min(odd), even.max(odd));
            if low > 0.0 { high / low - 1.0 } else { 0.0 }
        })
        .collect();
    differences.sort_by(f64::total_cmp);
    // `max` prefers the number if there were no rows.
    quantile_of_sorted(&differences, 0.5).max(LEAST_NOISE)
}

/// xorshift64*.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize) % n
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_counts() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn the_interval_holds_the_median_and_narrows_with_trials() {
        let values = |n: usize| {
            (0..n)
                .map(|i| 100.0 + (i * 37 % 11) as f64)
                .collect::<Vec<_>>()
        };
        let (few, many) = (estimate(&values(5)), estimate(&values(50)));
        for e in [&few, &many] {
            assert!(e.ci95[0] <= e.median && e.median <= e.ci95[1], "{e:?}");
        }
        assert!(many.ci95[1] - many.ci95[0] < few.ci95[1] - few.ci95[0]);
    }

    #[test]
    fn a_clear_difference_is_told_and_its_direction_depends_on_the_metric() {
        let slow = [100.0, 102.0, 99.0, 101.0, 100.0];
        let fast: Vec<f64> = slow.iter().map(|v| v * 1.2).collect();
        let ratio = paired_ratio(&fast, &slow).unwrap();
        assert!((ratio.median - 1.2).abs() < 1e-9);
        assert_eq!(verdict(&ratio, 0.05, true), Verdict::Better);
        assert_eq!(verdict(&ratio, 0.05, false), Verdict::Worse);
        let inverse = paired_ratio(&slow, &fast).unwrap();
        assert_eq!(verdict(&inverse, 0.05, true), Verdict::Worse);
        assert_eq!(verdict(&inverse, 0.05, false), Verdict::Better);
        // The same difference is nothing where noise is as large.
        assert_eq!(verdict(&ratio, 0.25, true), Verdict::NoDifference);
    }

    /// A round's state of the machine moves both paths, each trial scatters on its own.
    #[test]
    fn a_path_against_itself_shows_no_difference() {
        let mut random = Random(7);
        for rounds in [5, 10] {
            let mut differing = 0;
            for _ in 0..100 {
                let mut draw = || random.below(1000) as f64 / 1000.0 - 0.5;
                let (mut a, mut b) = (Vec::new(), Vec::new());
                for _ in 0..rounds {
                    let round = 1.0 + 0.3 * draw();
                    a.push(round * (1.0 + 0.1 * (draw() + draw())));
                    b.push(round * (1.0 + 0.1 * (draw() + draw())));
                }
                let noise = noise_threshold([a.as_slice(), b.as_slice()].into_iter());
                let ratio = paired_ratio(&a, &b).unwrap();
                differing += usize::from(verdict(&ratio, noise, true) != Verdict::NoDifference);
            }
            assert!(differing <= 5, "{rounds} rounds: {differing} of 100");
        }
    }

    #[test]
    fn few_pairs_show_nothing() {
        let ratio = paired_ratio(&[2.0; 4], &[1.0; 4]).unwrap();
        assert_eq!(verdict(&ratio, 0.02, true), Verdict::NoDifference);
        assert!(paired_ratio(&[1.0], &[0.0]).is_none());
    }

    #[test]
    fn noise_is_what_halves_of_a_row_differ_by() {
        let steady: &[f64] = &[100.0; 10];
        let drifting: &[f64] = &[100.0, 110.0, 100.0, 110.0];
        assert_eq!(noise_threshold([steady].into_iter()), LEAST_NOISE);
        assert!((noise_threshold([drifting].into_iter()) - 0.1).abs() < 1e-9);
        assert_eq!(noise_threshold([].into_iter()), LEAST_NOISE);
    }
}
