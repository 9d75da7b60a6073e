//! Timers of a worker, on a wheel. The earliest deadline is the timeout of the worker's own wait;
//! there are no timer operations.

mod wheel;

use std::fmt;
use std::task::Waker;
use std::time::{Duration, Instant};

pub(crate) use wheel::Key;
use wheel::Wheel;

/// Length of a tick: 131 us. A timer fires with the first tick that is not before its deadline.
const TICK_SHIFT: u32 = 17;

/// Pending deadlines of a worker.
pub(crate) struct Timers {
    /// Tick 0.
    origin: Instant,
    wheel: Wheel<Waker>,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            origin: Instant::now(),
            wheel: Wheel::default(),
        }
    }
}

impl Timers {
    /// Wakes `waker` with the first tick that is not before `deadline`.
    pub(crate) fn insert(&mut self, deadline: Instant, waker: Waker) -> Key {
        let ahead = deadline.saturating_duration_since(self.origin).as_nanos();
        let tick = ahead.div_ceil(1 << TICK_SHIFT);
        let tick = u64::try_from(tick).unwrap_or(u64::MAX);
        self.wheel.insert(tick, waker)
    }

    /// The waker of a timer that has neither fired nor been removed.
    pub(crate) fn waker_mut(&mut self, key: Key) -> Option<&mut Waker> {
        self.wheel.get_mut(key)
    }

    /// Takes a timer out; no effect if it has fired.
    pub(crate) fn remove(&mut self, key: Key) {
        self.wheel.remove(key);
    }

    /// Ends the worker's wait at `deadline`, for the worker itself.
    pub(crate) fn time_out(&mut self, deadline: Instant) -> Key {
        self.insert(deadline, Waker::noop().clone())
    }

    /// Whether a timer has neither fired nor been removed.
    pub(crate) fn is_armed(&mut self, key: Key) -> bool {
        self.wheel.get_mut(key).is_some()
    }

    /// Time until a timer may be due; `None` without timers. Never too long; too short only where
    /// many timers lie far ahead together.
    pub(crate) fn next_timeout(&self) -> Option<Duration> {
        let tick = self.wheel.next()?;
        let ahead = Duration::from_nanos(tick.saturating_mul(1 << TICK_SHIFT));
        Some(ahead.saturating_sub(self.origin.elapsed()))
    }

    /// Wakes every task whose deadline has passed.
    pub(crate) fn fire(&mut self) {
        if self.wheel.len() == 0 {
            return; // without timers nobody looks at the clock
        }
        let ticks = self.origin.elapsed().as_nanos() >> TICK_SHIFT;
        let now = u64::try_from(ticks).unwrap_or(u64::MAX);
        self.wheel.advance(now, Waker::wake);
    }
}

impl fmt::Debug for Timers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timers")
            .field("live", &self.wheel.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_end_with_the_tick_behind_the_deadline() {
        let mut timers = Timers::default();
        assert_eq!(timers.next_timeout(), None);
        let day = Duration::from_secs(86_400);
        let far = timers.insert(timers.origin + day, Waker::noop().clone());
        let timeout = timers.next_timeout().unwrap();
        let tick = Duration::from_nanos(1 << TICK_SHIFT);
        assert!(timeout <= day + tick && timeout > day / 2, "{timeout:?}");
        timers.insert(timers.origin, Waker::noop().clone());
        assert!(timers.next_timeout().unwrap() <= tick);
        std::thread::sleep(tick * 2);
        timers.fire();
        assert_eq!(timers.wheel.len(), 1, "the one that is due has fired");
        assert!(timers.wheel.remove(far).is_some());
        assert_eq!(timers.next_timeout(), None);
    }
}
