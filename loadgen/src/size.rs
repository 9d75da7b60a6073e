//! Sizes of requests: one for all, or drawn for each from a distribution.

use std::fmt;
use std::str::FromStr;

/// Entries of a weighted list.
const ENTRIES_MAX: usize = 64;

/// How long requests are, in bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Sizes {
    /// All of one length.
    Fixed(usize),
    /// Every length from the first to the second equally likely, both included.
    Uniform(usize, usize),
    /// Lengths with their weights.
    Weighted(Vec<(usize, u32)>),
}

impl Sizes {
    /// The shortest request.
    #[must_use]
    pub fn min(&self) -> usize {
        match self {
            Self::Fixed(size) => *size,
            Self::Uniform(low, _) => *low,
            Self::Weighted(entries) => entries.iter().map(|&(size, _)| size).min().unwrap_or(0),
        }
    }

    /// The longest request.
    #[must_use]
    pub fn max(&self) -> usize {
        match self {
            Self::Fixed(size) => *size,
            Self::Uniform(_, high) => *high,
            Self::Weighted(entries) => entries.iter().map(|&(size, _)| size).max().unwrap_or(0),
        }
    }

    /// The mean length.
    #[must_use]
    pub fn mean(&self) -> f64 {
        match self {
            Self::Fixed(size) => *size as f64,
            Self::Uniform(low, high) => (*low as f64 + *high as f64) / 2.0,
            Self::Weighted(entries) => {
                let sum: f64 = entries.iter().map(|&(s, w)| s as f64 * f64::from(w)).sum();
                sum / total(entries) as f64
            }
        }
    }

    /// The next length, from the drawing's own random numbers.
    pub(crate) fn draw(&self, random: &mut Random) -> usize {
        match self {
            Self::Fixed(size) => *size,
            Self::Uniform(low, high) => low + random.below((high - low) as u64 + 1) as usize,
            Self::Weighted(entries) => {
                let mut at = random.below(total(entries));
                for &(size, weight) in entries {
                    if at < u64::from(weight) {
                        return size;
                    }
                    at -= u64::from(weight);
                }
                self.max()
            }
        }
    }
}

fn total(entries: &[(usize, u32)]) -> u64 {
    entries.iter().map(|&(_, weight)| u64::from(weight)).sum()
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(size) => write!(f, "{size}"),
            Self::Uniform(low, high) => write!(f, "uniform:{low}-{high}"),
            Self::Weighted(entries) => {
                let entries: Vec<String> =
                    entries.iter().map(|(s, w)| format!("{s}:{w}")).collect();
                f.write_str(&entries.join(","))
            }
        }
    }
}

impl FromStr for Sizes {
    type Err = String;

    /// `64`, `fixed:64`, `uniform:1-1000`, or `64:9,16384:1` (length and weight).
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` must be BYTES, fixed:BYTES, uniform:LOW-HIGH or BYTES:WEIGHT,... with \
                 weights from 1 and at most {ENTRIES_MAX} entries"
            )
        };
        let number = |text: &str| text.parse::<usize>().map_err(|_| wrong());
        if let Some(size) = text.strip_prefix("fixed:") {
            return number(size).map(Self::Fixed);
        }
        if let Some(range) = text.strip_prefix("uniform:") {
            let (low, high) = range.split_once('-').ok_or_else(wrong)?;
            let (low, high) = (number(low)?, number(high)?);
            return if low <= high {
                Ok(Self::Uniform(low, high))
            } else {
                Err(wrong())
            };
        }
        if !text.contains(':') {
            return number(text).map(Self::Fixed);
        }
        let mut entries = Vec::new();
        for entry in text.split(',') {
            let (size, weight) = entry.split_once(':').ok_or_else(wrong)?;
            let weight = weight
                .parse()
                .ok()
                .filter(|&weight| weight > 0)
                .ok_or_else(wrong)?;
            entries.push((number(size)?, weight));
        }
        if entries.len() > ENTRIES_MAX {
            return Err(wrong());
        }
        Ok(Self::Weighted(entries))
    }
}

/// xorshift64*.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// Numbers of connection `index`: different for each, the same in every run.
    pub(crate) fn of(index: usize) -> Self {
        // Odd multiples of a large constant are distinct and not zero.
        Self((index as u64 * 2 + 1).wrapping_mul(0xd134_2543_de82_ef95))
    }

    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let random = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        // Lengths and weights are far below 2^32: the remainder's bias does not show.
        random % n.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(text: &str) -> Vec<usize> {
        let sizes: Sizes = text.parse().unwrap();
        let mut random = Random::of(3);
        (0..100_000).map(|_| sizes.draw(&mut random)).collect()
    }

    fn mean(values: &[usize]) -> f64 {
        values.iter().sum::<usize>() as f64 / values.len() as f64
    }

    #[test]
    fn every_form_is_read_and_written_back() {
        for text in ["64", "uniform:1-1000", "64:9,16384:1"] {
            assert_eq!(text.parse::<Sizes>().unwrap().to_string(), text);
        }
        assert_eq!("fixed:64".parse(), Ok(Sizes::Fixed(64)));
        for wrong in [
            "",
            "x",
            "fixed:",
            "uniform:5",
            "uniform:9-1",
            "64:0",
            "64:1,",
            "1-2",
        ] {
            let error = wrong.parse::<Sizes>().unwrap_err();
            assert!(error.contains("must be BYTES"), "{error}");
        }
    }

    #[test]
    fn lengths_are_drawn_as_often_as_they_should_be() {
        assert!(drawn("64").iter().all(|&size| size == 64));
        let uniform = drawn("uniform:10-20");
        assert_eq!(uniform.iter().min(), Some(&10));
        assert_eq!(uniform.iter().max(), Some(&20));
        assert!((mean(&uniform) - 15.0).abs() < 0.05, "{}", mean(&uniform));
        let weighted = drawn("1:1,100:9");
        let long = weighted.iter().filter(|&&size| size == 100).count();
        assert!((89_000..91_000).contains(&long), "{long}");
        let sizes: Sizes = "1:1,100:9".parse().unwrap();
        assert!((sizes.mean() - 90.1).abs() < 1e-9);
        assert_eq!((sizes.min(), sizes.max()), (1, 100));
    }

    #[test]
    fn connections_draw_differently() {
        let sizes = Sizes::Uniform(1, 1_000_000);
        let first = |index| sizes.draw(&mut Random::of(index));
        assert_ne!(first(0), first(1));
    }
}
