//! The CPU's time for handshakes, one step after another.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// Lets one step of all handshakes run between two looks at the ring. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cpu(Rc<Turns>);

#[derive(Debug, Default)]
struct Turns {
    taken: Cell<bool>,
    waiting: RefCell<VecDeque<Rc<Waiter>>>,
}

#[derive(Debug, Default)]
struct Waiter {
    granted: Cell<bool>,
    left: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

/// The turn of one step.
struct Turn(Rc<Turns>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.pass_on();
    }
}

/// A waiter on its way; passes on what it was granted if it leaves without taking it.
struct Waiting<'a> {
    turns: &'a Turns,
    waiter: Rc<Waiter>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.waiter.left.set(true);
        if self.waiter.granted.get() {
            self.turns.pass_on();
        }
    }
}

impl Turns {
    async fn take(self: &Rc<Self>) -> Turn {
        if !self.taken.replace(true) {
            return Turn(Rc::clone(self));
        }
        let waiting = Waiting {
            turns: self,
            waiter: Rc::default(),
        };
        self.waiting
            .borrow_mut()
            .push_back(Rc::clone(&waiting.waiter));
        poll_fn(|cx| {
            if waiting.waiter.granted.replace(false) {
                return Poll::Ready(());
            }
            *waiting.waiter.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
        Turn(Rc::clone(self))
    }

    fn pass_on(&self) {
        loop {
            let Some(waiter) = self.waiting.borrow_mut().pop_front() else {
                self.taken.set(false);
                return;
            };
            if !waiter.left.get() {
                waiter.granted.set(true);
                if let Some(waker) = waiter.waker.take() {
                    waker.wake();
                }
                return;
            }
        }
    }
}

impl Cpu {
    /// Runs `step` when it is its turn. As many wait as handshakes have places.
    pub(crate) async fn step<T>(&self, step: impl FnOnce() -> T) -> T {
        let turn = self.0.take().await;
        let result = step();
        rt::spawn(async move {
            rt::next_turn().await;
            drop(turn);
        });
        result
    }
}

#[cfg(test)]
mod tests {
    use std::pin::{Pin, pin};
    use std::task::Context;

    use super::*;

    fn poll<T>(future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn turns_go_round_in_order_and_none_is_lost() {
        let turns = Rc::<Turns>::default();
        let Poll::Ready(first) = poll(pin!(turns.take())) else {
            panic!("it is free")
        };
        let mut second = Box::pin(turns.take());
        let mut third = Box::pin(turns.take());
        assert!(poll(second.as_mut()).is_pending() && poll(third.as_mut()).is_pending());
        drop(first);
        assert!(poll(third.as_mut()).is_pending(), "not its turn");
        // The one whose turn it is gives up: the next one gets it.
        drop(second);
        let Poll::Ready(turn) = poll(third.as_mut()) else {
            panic!("granted")
        };
        assert!(turns.taken.get());
        drop((third, turn));
        assert!(!turns.taken.get());
    }

    #[test]
    fn the_ring_is_looked_at_between_two_steps() {
        crate::tests::run(async {
            let cpu = Cpu::default();
            let order: Rc<RefCell<Vec<char>>> = Rc::default();
            for _ in 0..3 {
                let (cpu, order) = (cpu.clone(), Rc::clone(&order));
                rt::spawn(async move { cpu.step(|| order.borrow_mut().push('h')).await });
            }
            let count = |what| order.borrow().iter().filter(|c| **c == what).count();
            while count('h') < 3 {
                order.borrow_mut().push('t');
                rt::next_turn().await;
            }
            let order: String = order.borrow().iter().collect();
            assert!(!order.contains("hh"), "{order}");
        });
    }
}
