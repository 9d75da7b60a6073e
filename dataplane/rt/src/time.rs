//! Timers of a worker, on a wheel. The earliest deadline is the timeout of the worker's own wait;
//! there are no timer operations.

mod wheel;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::exec::{Inner, current, next_turn};
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
    fn insert(&mut self, deadline: Instant, waker: Waker) -> Key {
        let ahead = deadline.saturating_duration_since(self.origin).as_nanos();
        let tick = ahead.div_ceil(1 << TICK_SHIFT);
        let tick = u64::try_from(tick).unwrap_or(u64::MAX);
        self.wheel.insert(tick, waker)
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

/// Completes at a deadline. Made by [`sleep`] and [`sleep_until`].
pub struct Sleep {
    deadline: Instant,
    timers: Rc<Inner>,
    entry: Option<Key>,
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
        if let Some(waker) = self.entry.and_then(|key| timers.wheel.get_mut(key)) {
            waker.clone_from(cx.waker());
            return Poll::Pending;
        }
        self.entry = Some(timers.insert(self.deadline, cx.waker().clone()));
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.entry {
            self.timers.timers.borrow_mut().wheel.remove(key);
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

/// Runs `future` for at most `duration`, and until the worker has looked once more at what the ring
/// has brought: what is late may be the worker itself (suspended, or without a CPU), and what
/// `future` waits for there already.
///
/// # Errors
/// [`Elapsed`] when the time is up; the future is dropped then.
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Result<F::Output, Elapsed> {
    let mut sleep = std::pin::pin!(sleep(duration));
    let mut future = std::pin::pin!(future);
    let mut last_look: Option<Pin<Box<dyn Future<Output = ()>>>> = None;
    std::future::poll_fn(|cx| {
        if let Poll::Ready(value) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(value));
        }
        if last_look.is_none() && sleep.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        let look = last_look.get_or_insert_with(|| Box::pin(next_turn()));
        look.as_mut().poll(cx).map(|()| Err(Elapsed))
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::io::Write;
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;
    use crate::net::{ConnectOptions, connect};
    use crate::sync::Signal;
    use crate::{Runtime, RuntimeConfig};

    /// What arrived in time counts, although the worker computed until after the deadline and the
    /// future was woken by something else before the ring was looked at.
    #[test]
    fn a_late_worker_looks_at_the_ring_before_time_is_up() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addr = listener.local_addr().unwrap();
        let mut runtime = Runtime::new(RuntimeConfig::default()).unwrap();
        let received = runtime.run(async {
            let stream = connect(addr, &ConnectOptions::default()).await.unwrap();
            let (mut peer, _) = listener.accept().unwrap();
            let (mut read, _write) = stream.split();
            let woken = Rc::new(Signal::default());
            crate::spawn({
                let woken = Rc::clone(&woken);
                async move {
                    next_turn().await;
                    peer.write_all(b"x").unwrap();
                    std::thread::sleep(Duration::from_millis(100));
                    woken.set();
                }
            });
            let mut bufs = VecDeque::new();
            let future = std::future::poll_fn(|cx| {
                let _ = woken.poll_wait(cx);
                read.poll_recv(cx, &mut bufs, &mut None)
            });
            timeout(Duration::from_millis(50), future).await
        });
        assert!(matches!(received, Ok(Ok(Ok(1)))), "{received:?}");
    }

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
