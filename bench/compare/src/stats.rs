//! Statistics on trial-level figures: medians, bootstrap intervals, paired ratios, verdicts.
//!
//! Requests within a trial depend on each other, so a trial counts as one observation. Paths are
//! compared round by round, which cancels what drifts slowly. All resampling is seeded: the same
//! figures give the same report.

use report::metric::Better;
use report::schema::{Estimate, Verdict};

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

/// What a paired ratio shows, given the noise threshold and which way the metric gets better.
#[must_use]
pub fn verdict(ratio: &Estimate, noise: f64, better: Better) -> Verdict {
    if ratio.values.len() < PAIRS_FOR_A_VERDICT {
        return Verdict::NoDifference;
    }
    let [low, high] = ratio.ci95;
    let more = low > 1.0 + noise;
    let less = high < 1.0 / (1.0 + noise);
    match (better, more, less) {
        (Better::More, true, _) | (Better::Less, _, true) => Verdict::Better,
        (Better::More, _, true) | (Better::Less, true, _) => Verdict::Worse,
        _ => Verdict::NoDifference,
    }
}

/// How far two labs or two halves with the *same* path lie apart that noise is judged by: nine in
/// ten such differences are smaller.
const NOISE_QUANTILE: f64 = 0.9;

/// The noise threshold from logarithmic differences of a path from itself (A/A ratios, or
/// [`halves_difference`]): what nine in ten of them stay below, at least 2 %. `None` for none.
///
/// Intervals show how far trials scatter. They do not show what two labs differ by that should be
/// equal, such as which CPU a worker runs on; this does, so it is asked for in addition.
#[must_use]
pub fn noise_threshold(differences: &[f64]) -> Option<f64> {
    let mut sorted: Vec<f64> = differences.iter().map(|d| d.abs()).collect();
    sorted.sort_by(f64::total_cmp);
    let noise = quantile_of_sorted(&sorted, NOISE_QUANTILE).exp_m1();
    (!sorted.is_empty()).then(|| noise.max(LEAST_NOISE))
}

/// How far even and odd rounds of one row lie apart, as the logarithm of their medians' ratio, as
/// a stand-in for an A/A ratio where there is none. Halves have half of the trials, so they
/// scatter more by the root of two, which is taken out again. It cannot see what a whole lab
/// differs by from another.
#[must_use]
pub fn halves_difference(values: &[f64]) -> Option<f64> {
    if values.len() < 4 {
        return None;
    }
    let half = |start| {
        let values: Vec<f64> = values.iter().skip(start).step_by(2).copied().collect();
        median(&values)
    };
    let (even, odd): (f64, f64) = (half(0), half(1));
    (even > 0.0 && odd > 0.0).then(|| (even / odd).ln().abs() / std::f64::consts::SQRT_2)
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
        assert_eq!(verdict(&ratio, 0.05, Better::More), Verdict::Better);
        assert_eq!(verdict(&ratio, 0.05, Better::Less), Verdict::Worse);
        let inverse = paired_ratio(&slow, &fast).unwrap();
        assert_eq!(verdict(&inverse, 0.05, Better::More), Verdict::Worse);
        assert_eq!(verdict(&inverse, 0.05, Better::Less), Verdict::Better);
        // The same difference is nothing where noise is as large.
        assert_eq!(verdict(&ratio, 0.25, Better::More), Verdict::NoDifference);
    }

    /// A made-up session: `cells` cells of one path in two labs, the second slower by `slower`.
    /// A round's state of the machine moves both labs (which pairing must cancel), each trial
    /// scatters on its own, and each lab has a bias of its own at each cell. Returns the
    /// verdicts, each with the noise of the other cells' A/A ratios.
    fn session(random: &mut Random, cells: usize, rounds: usize, slower: f64) -> Vec<Verdict> {
        let mut draw = || random.below(1_000_000) as f64 / 1e6 - 0.5;
        let mut pair = |slower: f64| {
            let biases = [1.0 + 0.02 * draw(), (1.0 + 0.02 * draw()) / slower];
            let mut values = [Vec::new(), Vec::new()];
            for _ in 0..rounds {
                let round = 1.0 + 0.3 * draw();
                for (values, bias) in values.iter_mut().zip(biases) {
                    // Now and then a trial is disturbed badly.
                    let upset = if draw() > 0.45 { 0.8 } else { 1.0 };
                    values.push(1000.0 * round * bias * upset * (1.0 + 0.05 * (draw() + draw())));
                }
            }
            let [a, b] = values;
            paired_ratio(&b, &a).unwrap()
        };
        let same: Vec<f64> = (0..cells).map(|_| pair(1.0).median.ln()).collect();
        (0..cells)
            .map(|cell| {
                let others: Vec<f64> = (0..cells).filter(|&c| c != cell).map(|c| same[c]).collect();
                verdict(
                    &pair(slower),
                    noise_threshold(&others).unwrap(),
                    Better::More,
                )
            })
            .collect()
    }

    #[test]
    fn a_path_against_itself_shows_no_difference_in_nineteen_of_twenty_ratios() {
        let mut random = Random(7);
        for rounds in [5, 10] {
            let verdicts: Vec<Verdict> = (0..100)
                .flat_map(|_| session(&mut random, 8, rounds, 1.0))
                .collect();
            let wrong = verdicts
                .iter()
                .filter(|v| **v != Verdict::NoDifference)
                .count();
            assert!(
                wrong * 20 <= verdicts.len(),
                "{wrong} of {}",
                verdicts.len()
            );
        }
    }

    #[test]
    fn a_fifth_slower_is_found() {
        let mut random = Random(11);
        let verdicts: Vec<Verdict> = (0..50)
            .flat_map(|_| session(&mut random, 8, 10, 1.25))
            .collect();
        let found = verdicts.iter().filter(|v| **v == Verdict::Worse).count();
        assert!(
            found * 20 >= verdicts.len() * 19,
            "{found} of {}",
            verdicts.len()
        );
    }

    #[test]
    fn the_bootstraps_interval_of_five_values_spans_them() {
        // The median of a resample is the least value with probability 0.058, more than 2.5 %.
        let five = estimate(&[5.0, 1.0, 3.0, 2.0, 4.0]);
        assert_eq!(five.median, 3.0);
        assert_eq!(five.ci95, [1.0, 5.0]);
        // Of 1..=99, the interval of the median is some 1.96 * sqrt(99) / 2 ranks to each side.
        let many: Vec<f64> = (1..=99).map(f64::from).collect();
        let [low, high] = estimate(&many).ci95;
        assert!(
            (39.0..=42.0).contains(&low) && (58.0..=61.0).contains(&high),
            "{low} {high}"
        );
    }

    #[test]
    fn the_interval_holds_the_true_median_as_often_as_it_says() {
        let mut random = Random(3);
        let hits = (0..400)
            .filter(|_| {
                let values: Vec<f64> = (0..10).map(|_| random.below(10_001) as f64).collect();
                let [low, high] = estimate(&values).ci95;
                low <= 5000.0 && 5000.0 <= high
            })
            .count();
        // The percentile bootstrap falls a little short of 95 % at ten values.
        assert!((360..=395).contains(&hits), "{hits} of 400");
    }

    #[test]
    fn few_pairs_show_nothing() {
        let ratio = paired_ratio(&[2.0; 4], &[1.0; 4]).unwrap();
        assert_eq!(verdict(&ratio, 0.02, Better::More), Verdict::NoDifference);
        assert!(paired_ratio(&[1.0], &[0.0]).is_none());
    }

    #[test]
    fn noise_is_what_nine_in_ten_differences_stay_below() {
        assert_eq!(noise_threshold(&[]), None);
        assert_eq!(noise_threshold(&[0.0, 0.001]), Some(LEAST_NOISE));
        let differences: Vec<f64> = (0..=10).map(|i| f64::from(i) / 100.0).collect();
        let noise = noise_threshold(&differences).unwrap();
        assert!((noise - 0.09f64.exp_m1()).abs() < 1e-9, "{noise}");
        // Their direction does not matter.
        let flipped: Vec<f64> = differences.iter().map(|d| -d).collect();
        assert_eq!(noise_threshold(&flipped), Some(noise));
    }

    #[test]
    fn halves_of_a_row_differ_by_what_alternates() {
        assert_eq!(halves_difference(&[100.0; 10]), Some(0.0));
        assert_eq!(halves_difference(&[100.0; 3]), None);
        let difference = halves_difference(&[100.0, 110.0, 100.0, 110.0]).unwrap();
        assert!((difference * std::f64::consts::SQRT_2 - 1.1f64.ln()).abs() < 1e-9);
    }
}
