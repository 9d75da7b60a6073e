//! When what failed is tried again: after one poll, then two, four and so on.

/// Most polls between two attempts.
const PAUSE_MAX: u32 = 32;

/// What could not be applied: an interface may yet come, a lock may yet be free.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Retry {
    /// Polls from the last attempt to the next.
    pause: u32,
    /// Polls left.
    left: u32,
    /// Whether it concerns more than single pods.
    pub(crate) whole: bool,
}

impl Retry {
    /// After an attempt that failed; `last` is what that attempt was due to.
    pub(crate) fn after(last: Option<Self>, whole: bool) -> Self {
        let pause = last.map_or(1, |last| (last.pause * 2).min(PAUSE_MAX));
        Self {
            pause,
            left: pause,
            whole,
        }
    }

    /// To be called at each poll: whether it is time.
    pub(crate) fn is_due(&mut self) -> bool {
        self.left = self.left.saturating_sub(1);
        self.left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Polls until it is due.
    fn polls(mut retry: Retry) -> u32 {
        (1..).find(|_| retry.is_due()).unwrap()
    }

    #[test]
    fn pauses_double_up_to_a_bound() {
        let mut last = None;
        for expected in [1, 2, 4, 8, 16, 32, 32, 32] {
            let retry = Retry::after(last, false);
            assert_eq!(polls(retry), expected);
            last = Some(retry);
        }
        assert_eq!(polls(Retry::after(None, true)), 1, "something else failed");
    }
}
