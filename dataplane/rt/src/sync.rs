//! Wake-ups between tasks of one worker. Nothing here may cross threads.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Context, Poll, Waker};

/// A one-slot signal: [`Signal::set`] wakes the one task that waits in [`Signal::wait`]; a signal
/// set before the wait is not lost.
#[derive(Debug, Default)]
pub struct Signal {
    set: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Signal {
    /// Sets the signal and wakes the waiting task.
    pub fn set(&self) {
        self.set.set(true);
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }

    /// Ready once the signal is set; clears it.
    pub fn poll_wait(&self, cx: &Context<'_>) -> Poll<()> {
        if self.set.replace(false) {
            return Poll::Ready(());
        }
        let mut waker = self.waker.borrow_mut();
        if !waker
            .as_ref()
            .is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            *waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Waits until the signal is set and clears it.
    pub async fn wait(&self) {
        poll_fn(|cx| self.poll_wait(cx)).await;
    }
}

/// Wakes every waiting task once. The list of waiters is emptied by each notification.
#[derive(Debug, Default)]
pub struct Broadcast {
    waiters: RefCell<Vec<Waker>>,
}

impl Broadcast {
    /// Registers the task of `cx` for the next notification.
    pub fn register(&self, cx: &Context<'_>) {
        let mut waiters = self.waiters.borrow_mut();
        if !waiters.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiters.push(cx.waker().clone());
        }
    }

    /// Wakes all registered tasks.
    pub fn notify(&self) {
        for waker in self.waiters.borrow_mut().drain(..) {
            waker.wake();
        }
    }
}
