//! A channel from any thread into a worker: configuration, drain and stop commands.
//!
//! Not for the data path. Bounded: a worker that does not read makes [`Sender::send`] fail rather
//! than grow memory.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
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
}
