//! Numbers and bytes that look random and are the same for the same seed.

/// A xorshift generator.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Any seed will do: it is spread over all bits.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 40)
    }

    /// 64 bits, not all of them zero.
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`; 0 if that is 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() >> 11) as usize % end.max(1)
    }

    /// True one time in `one_in`.
    pub fn chance(&mut self, one_in: usize) -> bool {
        self.below(one_in) == 0
    }
}

/// Bytes that differ from place to place, and from seed to seed.
#[must_use]
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let words = (0..len.div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
    let mut bytes: Vec<u8> = words.collect();
    bytes.truncate(len);
    bytes
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn numbers_are_the_same_for_the_same_seed_and_cover_their_range() {
        let drawn = |seed| {
            let mut random = Random::new(seed);
            (0..1000).map(|_| random.below(50)).collect::<Vec<_>>()
        };
        assert_eq!(drawn(7), drawn(7));
        for seed in 0..20 {
            let different: BTreeSet<usize> = drawn(seed).into_iter().collect();
            assert_eq!(different.len(), 50, "seed {seed}");
            assert_ne!(drawn(seed), drawn(seed + 1));
        }
        assert_eq!(Random::new(1).below(0), 0);
    }

    #[test]
    fn a_pattern_has_its_length_and_no_two_places_alike() {
        for len in [0, 1, 7, 8, 9, 4096] {
            assert_eq!(pattern(3, len).len(), len);
        }
        let bytes = pattern(3, 4096);
        let windows: BTreeSet<&[u8]> = bytes.windows(8).collect();
        assert_eq!(windows.len(), 4096 - 7);
        assert_eq!(pattern(3, 100), bytes[..100]);
        assert_ne!(pattern(4, 100), bytes[..100]);
    }
}
