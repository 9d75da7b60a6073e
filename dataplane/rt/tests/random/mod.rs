//! Numbers that look random and are the same for the same seed.

/// A xorshift generator.
#[derive(Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// Any seed will do: it is spread over all bits.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 40)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % end
    }

    /// True one time in `one_in`.
    #[allow(dead_code, reason = "not every test program asks for it")]
    pub(crate) fn chance(&mut self, one_in: usize) -> bool {
        self.below(one_in) == 0
    }
}
