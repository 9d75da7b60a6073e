//! Channels from any thread into a worker, in two shapes.
//!
//! * [`channel`]: a queue of orders, each of which counts (drain, stop). Bounded: a worker that
//!   does not read makes [`Sender::send`] fail rather than grow memory.
//! * [`latest`]: a cell whose newest value alone counts (configuration). It is never full: what a
//!   worker has not read yet is replaced, and what it reads is always the newest.
//!
//! Not for the data path: both take a lock, for as long as a value takes to move.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

struct Shared<T> {
    state: Mutex<State<T>>,
}

struct State<T> {
    queue: VecDeque<T>,
    waker: Option<Waker>,
    capacity: usize,
    closed: bool,
}

/// The receiver is gone or its queue is full; the value comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The worker has ended.
    #[error("the worker has ended")]
    Closed,
    /// The worker has not read for long.
    #[error("the worker's mailbox is full")]
    Full,
}

/// Sending half; clone it freely.
pub struct Sender<T>(Arc<Shared<T>>);

/// Receiving half, used on the worker.
pub struct Receiver<T>(Arc<Shared<T>>);

/// Creates a mailbox that holds at most `capacity` messages.
#[must_use]
pub fn channel<T: Send>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let state = State {
        queue: VecDeque::new(),
        waker: None,
        capacity,
        closed: false,
    };
    let shared = Arc::new(Shared {
        state: Mutex::new(state),
    });
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

impl<T> Sender<T> {
    /// Queues a message and wakes the worker.
    ///
    /// # Errors
    /// [`SendError`] when the worker has ended or does not read.
    pub fn send(&self, message: T) -> Result<(), SendError> {
        let waker = {
            let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
            if state.closed {
                return Err(SendError::Closed);
            }
            if state.queue.len() >= state.capacity {
                return Err(SendError::Full);
            }
            state.queue.push_back(message);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Receiver<T> {
    /// Waits for the next message.
    pub async fn recv(&mut self) -> T {
        poll_fn(|cx| {
            let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(message) = state.queue.pop_front() {
                return Poll::Ready(message);
            }
            state.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.0
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .closed = true;
    }
}

struct Cell<T> {
    value: Option<T>,
    waker: Option<Waker>,
    closed: bool,
}

fn lock<T>(cell: &Mutex<Cell<T>>) -> MutexGuard<'_, Cell<T>> {
    cell.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the newest value is put; clone it freely.
pub struct LatestSender<T>(Arc<Mutex<Cell<T>>>);

/// Where the worker finds it.
pub struct LatestReceiver<T>(Arc<Mutex<Cell<T>>>);

/// Creates an empty cell.
#[must_use]
pub fn latest<T: Send>() -> (LatestSender<T>, LatestReceiver<T>) {
    let cell = Arc::new(Mutex::new(Cell {
        value: None,
        waker: None,
        closed: false,
    }));
    (LatestSender(Arc::clone(&cell)), LatestReceiver(cell))
}

impl<T> LatestSender<T> {
    /// Puts `value` in place of one that was not read, which is dropped here, and wakes the worker.
    ///
    /// # Errors
    /// [`SendError::Closed`] when the worker has ended.
    pub fn send(&self, value: T) -> Result<(), SendError> {
        let (replaced, waker) = {
            let mut cell = lock(&self.0);
            if cell.closed {
                return Err(SendError::Closed);
            }
            (cell.value.replace(value), cell.waker.take())
        };
        drop(replaced); // it may take long, so not under the lock
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }
}

impl<T> Clone for LatestSender<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> LatestReceiver<T> {
    /// Waits for a value newer than the last one.
    pub async fn recv(&mut self) -> T {
        poll_fn(|cx| {
            let mut cell = lock(&self.0);
            if let Some(value) = cell.value.take() {
                return Poll::Ready(value);
            }
            cell.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

impl<T> Drop for LatestReceiver<T> {
    fn drop(&mut self) {
        let unread = {
            let mut cell = lock(&self.0);
            cell.closed = true;
            cell.value.take()
        };
        drop(unread);
    }
}

impl<T> fmt::Debug for LatestSender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LatestSender").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for LatestReceiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LatestReceiver").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Wake};

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_mailbox_is_bounded_wakes_its_reader_and_knows_when_it_is_gone() {
        let (sender, mut receiver) = channel(2);
        let wakes = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let mut cx = Context::from_waker(&waker);
        {
            let mut reading = pin!(receiver.recv());
            assert!(reading.as_mut().poll(&mut cx).is_pending());
            let others = sender.clone();
            std::thread::spawn(move || others.send(1).unwrap())
                .join()
                .unwrap();
            assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
            assert_eq!(reading.as_mut().poll(&mut cx), Poll::Ready(1));
        }
        sender.send(2).unwrap();
        sender.send(3).unwrap();
        assert_eq!(sender.send(4), Err(SendError::Full));
        assert_eq!(pin!(receiver.recv()).poll(&mut cx), Poll::Ready(2));
        drop(receiver);
        assert_eq!(sender.send(5), Err(SendError::Closed));
    }

    /// However much is sent while the worker does not read: the newest arrives, and only that.
    #[test]
    fn a_cell_is_never_full_and_holds_the_newest() {
        let (sender, mut receiver) = latest();
        let wakes = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let mut cx = Context::from_waker(&waker);
        assert!(pin!(receiver.recv()).poll(&mut cx).is_pending());
        let values: Vec<_> = (0..10_000).map(Arc::new).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for value in &values {
                    sender.send(Arc::clone(value)).unwrap();
                }
            });
        });
        assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
        assert!(
            values[..9_999]
                .iter()
                .all(|value| Arc::strong_count(value) == 1)
        );
        assert_eq!(
            pin!(receiver.recv()).poll(&mut cx),
            Poll::Ready(Arc::new(9_999))
        );
        assert!(pin!(receiver.recv()).poll(&mut cx).is_pending());
        sender.send(Arc::clone(&values[0])).unwrap();
        drop(receiver);
        assert_eq!(Arc::strong_count(&values[0]), 1, "nobody reads it");
        assert_eq!(sender.send(Arc::clone(&values[1])), Err(SendError::Closed));
    }
}
