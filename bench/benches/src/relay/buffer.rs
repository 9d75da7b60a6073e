//! Growing copy buffers for the runtimes that need one per direction.
//!
//! A flow starts with little and gets more when it fills what it has: an idle connection is cheap
//! and a bulk flow soon moves 256 KiB per system call, which is where throughput stops growing.

/// Capacity at first, in bytes.
pub const START: usize = 2 << 10;
/// Most capacity, in bytes.
pub const MAX: usize = 256 << 10;
const GROWTH: usize = 8;

/// A buffer for a new direction.
#[must_use]
pub fn first() -> Vec<u8> {
    Vec::with_capacity(START)
}

/// The buffer for the next read, empty: the same one, or a larger one if the last read filled it.
#[must_use]
pub fn next(mut used: Vec<u8>) -> Vec<u8> {
    if used.len() == used.capacity() && used.capacity() < MAX {
        return Vec::with_capacity((used.capacity() * GROWTH).min(MAX));
    }
    used.clear();
    used
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_buffer_grows_to_the_limit_and_others_stay() {
        let mut buffer = first();
        buffer.push(1);
        let mut buffer = next(buffer);
        assert_eq!((buffer.len(), buffer.capacity()), (0, START));
        let mut sizes = Vec::new();
        for _ in 0..4 {
            buffer.resize(buffer.capacity(), 0);
            buffer = next(buffer);
            sizes.push(buffer.capacity());
        }
        assert_eq!(sizes, [16 << 10, 128 << 10, MAX, MAX]);
    }
}
