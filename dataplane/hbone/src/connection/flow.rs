//! Flow control windows (RFC 9113 section 5.2), for a stream or for the connection.

use crate::frame::MAX_31;

/// What the peer allows us to send. Negative after a reduced SETTINGS_INITIAL_WINDOW_SIZE.
#[derive(Clone, Copy, Debug)]
pub(super) struct SendWindow(i32);

/// A window would exceed 2^31-1.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct WindowOverflow;

impl SendWindow {
    pub(super) const ZERO: Self = Self(0);

    pub(super) fn new(size: u32) -> Self {
        Self(i32::try_from(size).unwrap_or(i32::MAX))
    }

    #[inline]
    pub(super) fn available(self) -> u32 {
        u32::try_from(self.0).unwrap_or(0)
    }

    /// The caller has checked `len` against `available`.
    #[inline]
    pub(super) fn debit(&mut self, len: u32) {
        debug_assert!(len <= self.available());
        self.0 -= len as i32;
    }

    /// Adds `delta`; tells whether the window became positive by it.
    pub(super) fn adjust(&mut self, delta: i64) -> Result<bool, WindowOverflow> {
        let before = self.0;
        self.0 = i32::try_from(i64::from(before) + delta).map_err(|_| WindowOverflow)?;
        Ok(before <= 0 && self.0 > 0)
    }
}

/// What we allow the peer to send. At all times
/// `remaining + in flight in the current frame + unreleased + credit == size + lent`.
#[derive(Clone, Copy, Debug)]
pub(super) struct RecvWindow {
    size: u32,
    /// What the peer may still send. Negative only while a reduced setting takes effect.
    remaining: i32,
    /// Delivered to the caller and not yet released.
    unreleased: u32,
    /// Released, and not yet announced to the peer.
    credit: u32,
    /// Announced beyond the size, for data that is held; released bytes pay it back first.
    lent: u32,
}

impl RecvWindow {
    pub(super) const ZERO: Self = Self {
        size: 0,
        remaining: 0,
        unreleased: 0,
        credit: 0,
        lent: 0,
    };

    pub(super) fn new(size: u32) -> Self {
        let size = size.min(MAX_31);
        Self {
            size,
            remaining: size as i32,
            unreleased: 0,
            credit: 0,
            lent: 0,
        }
    }

    /// Takes a DATA frame's length off the window; false if the peer exceeded it.
    #[inline]
    pub(super) fn debit(&mut self, len: u32) -> bool {
        // An empty frame fits even a negative window.
        let fits = i64::from(len) <= i64::from(self.remaining.max(0));
        if fits {
            self.remaining -= len as i32;
        }
        fits
    }

    #[inline]
    pub(super) fn deliver(&mut self, len: u32) {
        self.unreleased += len;
    }

    /// Credit for delivered bytes. More than was delivered is cut off, so that a caller's mistake
    /// cannot raise the window above its size.
    #[inline]
    pub(super) fn release(&mut self, len: usize) {
        debug_assert!(
            len <= self.unreleased as usize,
            "more released than delivered"
        );
        let len = u32::try_from(len).unwrap_or(u32::MAX).min(self.unreleased);
        self.unreleased -= len;
        let repaid = len.min(self.lent);
        self.lent -= repaid;
        self.credit += len - repaid;
    }

    /// Credit for bytes that were never delivered: padding and discarded payload.
    #[inline]
    pub(super) fn refund(&mut self, len: u32) {
        self.credit += len;
    }

    /// Whether less than a quarter is left to use. Receivers hold the rest, or it is credit that is
    /// announced with the next release: there may be none.
    #[inline]
    pub(super) fn is_scarce(&self) -> bool {
        i64::from(self.remaining) < i64::from(self.size / 4)
    }

    /// Opens the window again although its bytes are held, to half of the size. The increment.
    pub(super) fn lend(&mut self) -> Option<u32> {
        // What was released is the peer's anyway.
        let target = i64::from(self.size / 2);
        let missing = target - i64::from(self.remaining) - i64::from(self.credit);
        let lent = u32::try_from(missing.max(0)).ok()?.min(MAX_31 - self.lent);
        self.lent += lent;
        let increment = lent + std::mem::take(&mut self.credit);
        self.remaining += increment as i32;
        (increment > 0).then_some(increment)
    }

    /// Whether slow receivers hold three quarters of the window.
    pub(super) fn is_held(&self) -> bool {
        self.unreleased > self.size / 4 * 3
    }

    /// The increment to announce, once it is half the window.
    #[inline]
    pub(super) fn take_update(&mut self) -> Option<u32> {
        if self.credit == 0 || self.credit < self.size / 2 {
            return None;
        }
        self.remaining += self.credit as i32;
        Some(std::mem::take(&mut self.credit))
    }

    /// As [`Self::take_update`], for the window that streams share: also announces credit as soon
    /// as it is half of what is left to use. Streams whose receivers are slow may hold more than
    /// half the window for good, and the others would wait for credit that never adds up to half.
    #[inline]
    pub(super) fn take_shared_update(&mut self) -> Option<u32> {
        let scarce = self.credit > 0 && i64::from(self.credit) >= i64::from(self.remaining);
        if !scarce {
            return self.take_update();
        }
        self.remaining += self.credit as i32;
        Some(std::mem::take(&mut self.credit))
    }

    /// The peer has applied a smaller initial window.
    pub(super) fn shrink(&mut self, by: u32) {
        self.size -= by;
        self.remaining -= by as i32;
    }

    #[cfg(test)]
    pub(super) fn remaining(&self) -> i32 {
        self.remaining
    }

    #[cfg(test)]
    pub(super) fn unreleased(&self) -> u32 {
        self.unreleased
    }

    /// `remaining + unreleased + credit - lent`: the size, unless a DATA frame is in flight.
    #[cfg(test)]
    pub(super) fn total(&self) -> i64 {
        let announced = i64::from(self.remaining) + i64::from(self.credit);
        announced + i64::from(self.unreleased) - i64::from(self.lent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn send_window_moves_and_refuses_to_overflow() {
        let mut window = SendWindow::new(10);
        window.debit(10);
        assert_eq!(window.available(), 0);
        assert_eq!(window.adjust(-5), Ok(false));
        assert_eq!(window.available(), 0);
        assert_eq!(window.adjust(5), Ok(false));
        assert_eq!(window.adjust(1), Ok(true));
        assert_eq!(window.adjust(i64::from(MAX_31)), Err(WindowOverflow));
        assert_eq!(window.adjust(i64::from(MAX_31) - 1), Ok(false));
    }

    #[test]
    fn credit_is_announced_at_half_the_window_and_conserved() {
        let mut window = RecvWindow::new(100);
        assert!(window.debit(100));
        assert!(!window.debit(1));
        window.deliver(90);
        window.refund(10);
        assert_eq!(window.take_update(), None);
        window.release(39);
        assert_eq!(window.take_update(), None);
        window.release(1);
        assert_eq!(window.take_update(), Some(50));
        assert_eq!(window.take_update(), None);
        assert_eq!(window.total(), 100);
        assert!(window.debit(50));
        assert!(!window.debit(1));
    }

    #[test]
    fn a_window_is_held_when_most_of_it_is_not_released() {
        let mut window = RecvWindow::new(100);
        assert!(window.debit(76));
        window.deliver(76);
        assert!(window.is_held());
        window.release(1);
        assert!(!window.is_held());
    }

    #[test]
    fn shared_credit_is_announced_although_most_of_the_window_is_held() {
        let mut window = RecvWindow::new(100);
        assert!(window.debit(75));
        window.deliver(75);
        // Held by a stream that nobody reads; the other streams live on the rest.
        assert!(window.debit(13));
        window.deliver(13);
        window.release(11);
        assert_eq!(window.take_shared_update(), None);
        window.release(2);
        assert_eq!(window.take_update(), None);
        assert_eq!(window.take_shared_update(), Some(13));
        assert_eq!(window.take_shared_update(), None);
        assert_eq!(window.total(), 100);
    }

    #[test]
    fn what_is_held_is_lent_and_paid_back_before_more_is_announced() {
        let mut window = RecvWindow::new(100);
        assert!(window.debit(80));
        window.deliver(80);
        assert!(window.is_scarce());
        assert_eq!(window.lend(), Some(30));
        assert!(!window.is_scarce());
        assert_eq!(window.lend(), None);
        assert!(window.debit(50));
        assert!(!window.debit(1));
        window.deliver(50);
        assert_eq!(window.lend(), Some(50));
        assert_eq!(window.total(), 100);
        // 80 bytes of credit are owed: what is released first makes up for that.
        window.release(80);
        assert_eq!(window.take_shared_update(), None);
        window.release(50);
        assert_eq!(window.take_update(), Some(50));
        assert_eq!((window.remaining(), window.total()), (100, 100));
    }

    #[test]
    fn credit_that_was_too_little_is_announced_when_nothing_else_is_left() {
        let mut window = RecvWindow::new(100);
        assert!(window.debit(50));
        window.deliver(50);
        window.release(40);
        assert_eq!(window.take_shared_update(), None);
        // Now everybody stops: nothing is released any more.
        assert!(window.debit(50));
        window.deliver(50);
        assert!(window.is_scarce());
        assert_eq!(window.lend(), Some(50));
        assert_eq!((window.remaining(), window.total()), (50, 100));
        // Credit alone may be enough.
        let mut window = RecvWindow::new(100);
        assert!(window.debit(80));
        window.deliver(60);
        window.refund(20);
        window.release(45);
        assert_eq!(window.lend(), Some(65));
        assert_eq!(window.total(), 100);
    }

    #[test]
    fn a_window_of_one_byte_is_announced() {
        let mut window = RecvWindow::new(1);
        assert_eq!(window.take_update(), None);
        assert!(window.debit(1));
        window.deliver(1);
        window.release(1);
        assert_eq!(window.take_update(), Some(1));
    }
}
