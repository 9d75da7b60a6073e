//! A known slowdown on request, to show that measurements find one.
//!
//! Part of builds with the feature `slowdown` only: the lab's, never a release.
//! `ZTUNNEL_DEBUG_SLOWDOWN_PERCENT`, 0 to 1000, is burnt in addition to the CPU time that the
//! worker has used, as chunks are relayed.

use std::cell::Cell;
use std::env;
use std::sync::LazyLock;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

const NAME: &str = "ZTUNNEL_DEBUG_SLOWDOWN_PERCENT";
/// Chunks between two looks at the clock, which is a system call and not to be part of the cost.
const CHUNKS: u32 = 16;

static SHARE: LazyLock<f64> = LazyLock::new(|| share(env::var(NAME).ok().as_deref()));

thread_local! {
    /// Chunks since the last look, and the thread's CPU time then.
    static SEEN: Cell<(u32, Duration)> = const { Cell::new((0, Duration::ZERO)) };
}

/// A chunk has been relayed.
pub(super) fn relayed() {
    if *SHARE <= 0.0 {
        return;
    }
    let (chunks, before) = SEEN.get();
    if chunks + 1 < CHUNKS {
        SEEN.set((chunks + 1, before));
        return;
    }
    let mut now = cpu_time();
    // What came before the first look was the start-up.
    let used = if before.is_zero() {
        Duration::ZERO
    } else {
        now.saturating_sub(before)
    };
    let until = now + used.mul_f64(*SHARE);
    while now < until {
        now = cpu_time();
    }
    SEEN.set((0, now));
}

/// CPU time of this thread. Should the clock fail nothing is burnt.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::MAX, Duration::from)
}

fn share(value: Option<&str>) -> f64 {
    let Some(value) = value else {
        return 0.0;
    };
    match value.parse::<f64>() {
        Ok(percent) if (0.0..=1000.0).contains(&percent) => percent / 100.0,
        _ => {
            tracing::error!("{NAME}=`{value}` is not valid: expected 0 to 1000; nothing is slowed");
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_a_percentage() {
        assert_eq!(share(None), 0.0);
        assert_eq!(share(Some("20")), 0.2);
        for wrong in ["", "-1", "2000", "a fifth", "NaN"] {
            assert_eq!(share(Some(wrong)), 0.0, "{wrong}");
        }
    }
}
