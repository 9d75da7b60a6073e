//! The two clocks. What is in a certificate is compared with the time of day, which may be hours
//! off after boot and is then corrected, in either direction. How long something takes, or is put
//! off, is measured by the monotonic clock, which no correction touches.

use std::fmt;
use std::time::{Instant, SystemTime};

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
