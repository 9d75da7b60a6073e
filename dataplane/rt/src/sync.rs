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
    /// Waiters that leave the list when they are dropped, by ascending ticket.
    tickets: RefCell<Vec<(u64, Waker)>>,
    next_ticket: Cell<u64>,
}

impl Broadcast {
    /// Waits for the next notification. A wait that is given up leaves nothing behind: for tasks
    /// that come and go while notifications are rare.
    pub async fn wait(&self) {
        let mut ticket = Ticket {
            broadcast: self,
            number: None,
        };
        poll_fn(|cx| ticket.poll(cx)).await;
    }

    /// Tasks that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiters.borrow().len() + self.tickets.borrow().len()
    }

    /// Registers the task of `cx` for the next notification. It stays registered until then, also
    /// when the task ends.
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
        for (_, waker) in self.tickets.borrow_mut().drain(..) {
            waker.wake();
        }
    }
}

/// A place in [`Broadcast::tickets`].
struct Ticket<'a> {
    broadcast: &'a Broadcast,
    number: Option<u64>,
}

impl Ticket<'_> {
    fn poll(&mut self, cx: &Context<'_>) -> Poll<()> {
        let mut tickets = self.broadcast.tickets.borrow_mut();
        let Some(number) = self.number else {
            let number = self.broadcast.next_ticket.get();
            self.broadcast.next_ticket.set(number + 1);
            self.number = Some(number);
            tickets.push((number, cx.waker().clone()));
            return Poll::Pending;
        };
        match tickets.binary_search_by_key(&number, |(number, _)| *number) {
            Ok(at) => {
                tickets[at].1.clone_from(cx.waker());
                Poll::Pending
            }
            Err(_) => Poll::Ready(()),
        }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            let mut tickets = self.broadcast.tickets.borrow_mut();
            if let Ok(at) = tickets.binary_search_by_key(&number, |(number, _)| *number) {
                tickets.remove(at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    #[test]
    fn a_wait_that_is_given_up_leaves_nothing() {
        let broadcast = Broadcast::default();
        let mut cx = Context::from_waker(Waker::noop());
        {
            let mut waits: Vec<_> = (0..5).map(|_| Box::pin(broadcast.wait())).collect();
            for wait in &mut waits {
                assert!(wait.as_mut().poll(&mut cx).is_pending());
                assert!(wait.as_mut().poll(&mut cx).is_pending());
            }
            assert_eq!(broadcast.waiting(), 5);
            drop(waits.remove(2));
            assert_eq!(broadcast.waiting(), 4);
            broadcast.notify();
            assert_eq!(broadcast.waiting(), 0);
            assert!(
                waits
                    .iter_mut()
                    .all(|wait| wait.as_mut().poll(&mut cx).is_ready())
            );
        }
        let mut again = pin!(broadcast.wait());
        assert!(
            again.as_mut().poll(&mut cx).is_pending(),
            "a later wait is for the next one"
        );
    }
}
