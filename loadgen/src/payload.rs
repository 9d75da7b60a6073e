//! The bytes sent: fixed pseudo-random patterns both ends can build, made before the clock starts.

/// Length of the pattern that `stream` and `serve --mode source` repeat, in bytes.
pub const STREAM_PATTERN: usize = 256 * 1024;

/// How many different requests there are; connection `n` sends number `n % REQUEST_VARIANTS`.
///
/// A prime, so that neighbours differ and a response given to the wrong connection is noticed by
/// `--verify`.
pub const REQUEST_VARIANTS: usize = 251;

/// `len` bytes of the pattern.
#[must_use]
pub fn pattern(len: usize) -> Vec<u8> {
    // Any fixed seed does; the generator is xorshift64*, incompressible enough for a payload.
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Requests of one size for any number of connections, sharing one buffer.
#[derive(Clone, Debug)]
pub struct Requests {
    bytes: Vec<u8>,
    size: usize,
}

impl Requests {
    /// Requests of `size` bytes.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self {
            bytes: pattern(size + REQUEST_VARIANTS),
            size,
        }
    }

    /// The request that connection number `connection` sends every time.
    #[must_use]
    pub fn of(&self, connection: usize) -> &[u8] {
        let offset = connection % REQUEST_VARIANTS;
        &self.bytes[offset..offset + self.size]
    }

    /// Bytes per request.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }
}

/// Whether `received` is what the repeated [`STREAM_PATTERN`] holds from byte `position` on.
#[must_use]
pub fn matches_stream(pattern: &[u8], position: u64, received: &[u8]) -> bool {
    let mut at = (position % pattern.len() as u64) as usize;
    let mut rest = received;
    while !rest.is_empty() {
        let n = rest.len().min(pattern.len() - at);
        if rest[..n] != pattern[at..at + n] {
            return false;
        }
        rest = &rest[n..];
        at = 0;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_connections_send_different_requests() {
        let requests = Requests::new(64);
        assert_eq!(requests.of(3).len(), 64);
        assert_ne!(requests.of(3), requests.of(4));
        assert_eq!(requests.of(3), requests.of(3 + REQUEST_VARIANTS));
    }

    #[test]
    fn a_stream_is_checked_across_the_patterns_end() {
        let pattern = pattern(100);
        let mut received = pattern[90..].to_vec();
        received.extend_from_slice(&pattern);
        received.extend_from_slice(&pattern[..5]);
        assert!(matches_stream(&pattern, 190, &received));
        assert!(!matches_stream(&pattern, 191, &received));
        received[50] ^= 1;
        assert!(!matches_stream(&pattern, 190, &received));
    }
}
