//! Timers of a worker. Deadlines ride on the ring's own wait timeout; no timer operations.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::exec::{Inner, current};

#[derive(Debug)]
struct Slot {
    generation: u32,
    waker: Option<Waker>,
}

/// Pending deadlines, earliest first. Cancelled ones are skipped when they surface, and swept when
/// they outnumber the live ones, so that the heap stays proportional to the live timers.
#[derive(Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(Instant, u32, u32)>>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    live: usize,
}

impl Timers {
    fn insert(&mut self, deadline: Instant, waker: Waker) -> (u32, u32) {
        self.live += 1;
        let index = if let Some(index) = self.free.pop() {
            index
        } else {
            self.slots.push(Slot {
                generation: 0,
                waker: None,
            });
            (self.slots.len() - 1) as u32
        };
        let slot = &mut self.slots[index as usize];
        slot.waker = Some(waker);
        let generation = slot.generation;
        self.heap.push(Reverse((deadline, index, generation)));
        (index, generation)
    }

    fn is_live(&self, index: u32, generation: u32) -> bool {
        self.slots[index as usize].generation == generation
    }

    fn remove(&mut self, index: u32, generation: u32) -> Option<Waker> {
        if !self.is_live(index, generation) {
            return None;
        }
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
        self.live -= 1;
        let waker = slot.waker.take();
        if self.heap.len() > 64 && self.heap.len() > self.live * 4 {
            let slots = &self.slots;
            self.heap.retain(|Reverse((_, index, generation))| {
                slots[*index as usize].generation == *generation
            });
        }
        waker
    }

    /// Time until the earliest live deadline.
    pub(crate) fn next_timeout(&mut self, now: Instant) -> Option<Duration> {
        while let Some(Reverse((deadline, index, generation))) = self.heap.peek().copied() {
            if self.is_live(index, generation) {
                return Some(deadline.saturating_duration_since(now));
            }
            self.heap.pop();
        }
        None
    }

    /// Wakes every task whose deadline has passed.
    pub(crate) fn fire(&mut self, now: Instant) {
        while let Some(Reverse((deadline, index, generation))) = self.heap.peek().copied() {
            if deadline > now && self.is_live(index, generation) {
                return;
            }
            self.heap.pop();
            if let Some(waker) = self.remove(index, generation) {
                waker.wake();
            }
        }
    }
}

impl fmt::Debug for Timers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timers")
            .field("live", &self.live)
            .finish_non_exhaustive()
    }
}

/// Completes at a deadline. Made by [`sleep`] and [`sleep_until`].
pub struct Sleep {
    deadline: Instant,
    timers: Rc<Inner>,
    entry: Option<(u32, u32)>,
}

impl fmt::Debug for Sleep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sleep")
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.deadline {
            return Poll::Ready(());
        }
        let inner = Rc::clone(&self.timers);
        let mut timers = inner.timers.borrow_mut();
        if let Some((index, generation)) = self.entry
            && timers.is_live(index, generation)
        {
            timers.slots[index as usize].waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        self.entry = Some(timers.insert(self.deadline, cx.waker().clone()));
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some((index, generation)) = self.entry {
            self.timers.timers.borrow_mut().remove(index, generation);
        }
    }
}

/// Sleeps for `duration`.
#[must_use]
pub fn sleep(duration: Duration) -> Sleep {
    sleep_until(Instant::now() + duration)
}

/// Sleeps until `deadline`.
#[must_use]
pub fn sleep_until(deadline: Instant) -> Sleep {
    Sleep {
        deadline,
        timers: current(),
        entry: None,
    }
}

/// The deadline passed before the future was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("deadline has elapsed")]
pub struct Elapsed;

/// Runs `future` for at most `duration`.
///
/// # Errors
/// [`Elapsed`] when the time is up; the future is dropped then.
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Result<F::Output, Elapsed> {
    let mut sleep = std::pin::pin!(sleep(duration));
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|cx| {
        if let Poll::Ready(value) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(value));
        }
        sleep.as_mut().poll(cx).map(|()| Err(Elapsed))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn churn(live: u64, rounds: u64) -> f64 {
        let mut timers = Timers::default();
        let start = Instant::now();
        let ahead = |n: u64| start + Duration::from_micros(10_000_000 + n % 997);
        let mut armed: std::collections::VecDeque<_> = (0..live)
            .map(|n| timers.insert(ahead(n), Waker::noop().clone()))
            .collect();
        let started = Instant::now();
        for n in 0..rounds {
            armed.push_back(timers.insert(ahead(n), Waker::noop().clone()));
            let (index, generation) = armed.pop_front().unwrap();
            timers.remove(index, generation);
            if n.is_multiple_of(8) {
                timers.next_timeout(start);
            }
        }
        let taken = started.elapsed();
        assert!(
            timers.heap.len() as u64 <= (live * 4).max(64) + 1,
            "cancelled ones are swept"
        );
        taken.as_secs_f64() * 1e9 / rounds as f64
    }

    /// A deadline per connection, armed when it connects and cancelled when it is connected.
    #[test]
    fn cancelled_timers_are_swept() {
        for live in [0, 32, 1_000] {
            println!(
                "{live} live timers: {:.0} ns to arm and cancel",
                churn(live, 100_000)
            );
        }
    }
}
