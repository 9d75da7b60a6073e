//! The two clocks. What is in a certificate is compared with the time of day, which may be hours
//! off after boot and is then corrected, in either direction. How long something takes, or is put
//! off, is measured by the monotonic clock, which no correction touches.

use std::fmt;
use std::time::{Duration, Instant, SystemTime};

/// Where the time comes from.
pub trait Clock: fmt::Debug + Send + Sync {
    /// Time of day, as far as this machine knows.
    fn time_of_day(&self) -> SystemTime;
    /// Time that only ever goes on.
    fn monotonic(&self) -> Instant;
}

/// The machine's.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn time_of_day(&self) -> SystemTime {
        SystemTime::now()
    }

    fn monotonic(&self) -> Instant {
        Instant::now()
    }
}

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
