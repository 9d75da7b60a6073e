//! Sleeping, and giving up on what takes too long.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::executor::{Inner, current, next_turn};
use crate::timer::Key;

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
        if let Some(waker) = self.entry.and_then(|key| timers.waker_mut(key)) {
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
            self.timers.timers.borrow_mut().remove(key);
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
}
