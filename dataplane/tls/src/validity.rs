//! Whether a certificate may be shown and accepted, by the time of day, which may be hours off
//! after boot and is then corrected, in either direction.

use std::fmt;
use std::time::{Duration, SystemTime};

/// Where a time of day is relative to a span of validity.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Validity {
    /// Before it: this machine's clock is behind, or the issuer's was ahead.
    NotYet(Duration),
    /// Within it.
    Valid,
    /// After it.
    Over,
}

impl Validity {
    /// Of a span that includes its start and not its end.
    pub fn at(now: SystemTime, (start, end): (SystemTime, SystemTime)) -> Self {
        match start.duration_since(now) {
            Ok(left) if !left.is_zero() => Self::NotYet(left),
            _ if now < end => Self::Valid,
            _ => Self::Over,
        }
    }
}

impl fmt::Display for Validity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotYet(left) => write!(
                f,
                "not valid yet, for {} s: was the clock of whoever issued it ahead, or is this \
                 machine's behind?",
                left.as_secs().max(1)
            ),
            Self::Valid => f.write_str("valid"),
            Self::Over => f.write_str("expired"),
        }
    }
}
