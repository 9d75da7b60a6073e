//! What bounds handshakes on a worker: how many are under way, how many wait for their turn, and
//! how much of the CPU they get in one go.
//!
//! A handshake costs some hundred microseconds of CPU in two or three steps. [`Handshakes`] lets
//! each worker do one such step between two looks at its ring, so that established connections
//! wait for one step at most, however many peers arrive at once. Each direction has its own bound:
//! with a common one, two nodes whose outgoing handshakes hold all places would wait for each
//! other's incoming ones.
//!
//! Places are given in order of arrival. The caller's timeout covers waiting and handshake.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// A number of places, given out in order of arrival.
#[derive(Debug)]
struct Places {
    free: Cell<usize>,
    waiting: RefCell<VecDeque<Rc<Waiter>>>,
    waiting_max: usize,
}

#[derive(Debug, Default)]
struct Waiter {
    state: Cell<Wait>,
    waker: RefCell<Option<Waker>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Wait {
    #[default]
    Waiting,
    /// A place is reserved for this waiter.
    Granted,
    /// It does not want one any more.
    Left,
}

/// All places are taken and as many wait as may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Overload;

/// A place. Given back when dropped.
#[derive(Debug)]
pub(crate) struct Place(Rc<Places>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// A waiter on its way; gives up what it was granted if nobody takes it.
struct Waiting {
    places: Rc<Places>,
    waiter: Rc<Waiter>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.waiter.state.replace(Wait::Left) == Wait::Granted {
            self.places.release();
        }
    }
}

impl Places {
    fn new(count: usize, waiting_max: usize) -> Rc<Self> {
        Rc::new(Self {
            free: Cell::new(count),
            waiting: RefCell::default(),
            waiting_max,
        })
    }

    async fn take(self: &Rc<Self>) -> Result<Place, Overload> {
        if self.free.get() > 0 {
            self.free.set(self.free.get() - 1);
            return Ok(Place(Rc::clone(self)));
        }
        let waiter = Rc::new(Waiter::default());
        {
            let mut waiting = self.waiting.borrow_mut();
            if waiting.len() >= self.waiting_max {
                waiting.retain(|waiter| waiter.state.get() == Wait::Waiting);
            }
            if waiting.len() >= self.waiting_max {
                return Err(Overload);
            }
            waiting.push_back(Rc::clone(&waiter));
        }
        let waiting = Waiting {
            places: Rc::clone(self),
            waiter,
        };
        poll_fn(|cx| {
            if waiting.waiter.state.get() == Wait::Granted {
                return Poll::Ready(());
            }
            *waiting.waiter.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
        // Taken: dropping `waiting` must not give it back.
        waiting.waiter.state.set(Wait::Left);
        Ok(Place(Rc::clone(self)))
    }

    fn release(&self) {
        loop {
            let Some(waiter) = self.waiting.borrow_mut().pop_front() else {
                self.free.set(self.free.get() + 1);
                return;
            };
            if waiter.state.get() == Wait::Waiting {
                waiter.state.set(Wait::Granted);
                if let Some(waker) = waiter.waker.take() {
                    waker.wake();
                }
                return;
            }
        }
    }
}

/// One worker's handshakes.
#[derive(Debug)]
pub(crate) struct Handshakes {
    incoming: Rc<Places>,
    outgoing: Rc<Places>,
    cpu: Cpu,
}

impl Handshakes {
    /// At most `max` under way in each direction, and as many waiting.
    pub(crate) fn new(max: usize) -> Self {
        Self {
            incoming: Places::new(max, max),
            outgoing: Places::new(max, max),
            cpu: Cpu::default(),
        }
    }

    /// Waits for a place for the handshake of an accepted connection.
    pub(crate) async fn incoming(&self) -> Result<Place, Overload> {
        self.incoming.take().await
    }

    /// Waits for a place for the handshake of a connection of ours.
    pub(crate) async fn outgoing(&self) -> Result<Place, Overload> {
        self.outgoing.take().await
    }

    /// Whose turn it is to compute.
    pub(crate) fn cpu(&self) -> &Cpu {
        &self.cpu
    }
}

/// Lets one step of all handshakes run between two looks at the ring. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Cpu(Rc<Places>);

impl Default for Cpu {
    fn default() -> Self {
        Self(Places::new(1, usize::MAX))
    }
}

impl Cpu {
    /// Runs `step` when it is its turn.
    pub(crate) async fn step<T>(&self, step: impl FnOnce() -> T) -> T {
        // No overload: as many steps wait as handshakes have places.
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
    use std::pin::pin;
    use std::task::Context;

    use super::*;

    fn poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn places_go_round_in_order_and_none_is_lost() {
        let places = Places::new(1, 2);
        let Poll::Ready(Ok(first)) = poll(pin!(places.take())) else {
            panic!("one is free")
        };
        let mut second = Box::pin(places.take());
        let mut third = Box::pin(places.take());
        assert!(poll(second.as_mut()).is_pending() && poll(third.as_mut()).is_pending());
        assert!(matches!(
            poll(pin!(places.take())),
            Poll::Ready(Err(Overload))
        ));
        drop(first);
        assert!(poll(third.as_mut()).is_pending(), "not its turn");
        // The one whose turn it is gives up: the next one gets it.
        drop(second);
        let Poll::Ready(Ok(place)) = poll(third.as_mut()) else {
            panic!("granted")
        };
        assert_eq!(places.free.get(), 0);
        // One that leaves before its turn makes room at once.
        let mut fourth = Box::pin(places.take());
        assert!(poll(fourth.as_mut()).is_pending());
        drop(fourth);
        let mut waiting: Vec<_> = (0..2).map(|_| Box::pin(places.take())).collect();
        assert!(
            waiting
                .iter_mut()
                .all(|waiter| poll(waiter.as_mut()).is_pending())
        );
        drop((waiting, third, place));
        assert_eq!(places.free.get(), 1);
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
