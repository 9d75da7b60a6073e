//! The tunnels of one key, and the queue of those who wait for room in one.
//!
//! Places are given out in order of arrival: as many are woken as there is room for, each once, and
//! nobody who comes later is served before. One task ([`serve`]) does that for as long as somebody
//! waits. It also opens tunnels: one at first, for nobody knows yet whether the destination can be
//! reached, and then as many at a time as the queue needs, up to [`DIALS_MAX`].

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use rt::sync::Signal;

use super::{Key, establish};
use crate::context::Context;
use crate::error::ProxyError;
use crate::tunnel::Tunnel;

/// Tunnels of one key that are being set up at a time, at most.
const DIALS_MAX: usize = 8;

/// Who wait are woken so many at a time: the worker looks at its ring in between, so that a crowd
/// does not keep others waiting.
const PLACES_PER_TURN: usize = 32;

/// What there is for one key.
#[derive(Debug, Default)]
pub(super) struct Entry {
    slots: RefCell<Vec<Rc<Slot>>>,
    waiting: RefCell<VecDeque<Rc<Waiter>>>,
    /// Tunnels being set up.
    dials: Cell<usize>,
    /// One of them has failed, and none has come about since: those under way decide.
    doubtful: Cell<bool>,
    /// Streams that the newest tunnel had room for at first.
    usual_room: Cell<usize>,
    /// [`serve`] is running.
    served: Cell<bool>,
    /// There may be room, or one waiter less.
    changed: Rc<Signal>,
}

/// A tunnel, and how much of its room is promised.
#[derive(Debug)]
struct Slot {
    tunnel: Rc<Tunnel>,
    promised: Cell<usize>,
}

impl Slot {
    fn room(&self) -> usize {
        self.tunnel.room().saturating_sub(self.promised.get())
    }
}

/// Room for one stream in a tunnel, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    slot: Rc<Slot>,
    changed: Rc<Signal>,
}

impl Place {
    pub(super) fn tunnel(&self) -> &Rc<Tunnel> {
        &self.slot.tunnel
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.slot.promised.set(self.slot.promised.get() - 1);
        self.changed.set();
    }
}

#[derive(Debug, Default)]
struct Waiter {
    outcome: RefCell<Option<Result<Place, Rc<ProxyError>>>>,
    waker: RefCell<Option<Waker>>,
    /// Nobody is there any more.
    left: Cell<bool>,
}

impl Waiter {
    fn settle(&self, outcome: Result<Place, Rc<ProxyError>>) {
        *self.outcome.borrow_mut() = Some(outcome);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// Says that a waiter has left, whatever made it leave.
struct Leaving(Rc<Waiter>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.left.set(true);
        // A place that was promised and not taken goes back.
        drop(self.0.outcome.take());
    }
}

impl Entry {
    /// Room for one stream, unless others have waited for it.
    pub(super) fn place(&self) -> Option<Place> {
        if !self.waiting.borrow().is_empty() {
            return None;
        }
        self.find(&mut 0)
    }

    /// The first room from the tunnel with index `from` on, which is left there.
    fn find(&self, from: &mut usize) -> Option<Place> {
        let mut slots = self.slots.borrow_mut();
        while let Some(slot) = slots.get(*from) {
            if slot.tunnel.error().is_some() {
                slots.remove(*from);
            } else if slot.room() > 0 {
                slot.promised.set(slot.promised.get() + 1);
                return Some(Place {
                    slot: Rc::clone(slot),
                    changed: Rc::clone(&self.changed),
                });
            } else {
                *from += 1;
            }
        }
        None
    }

    /// Waits for room. `again` goes before all others: it has waited already, and what it got was
    /// gone when it came.
    pub(super) async fn wait(
        self: Rc<Self>,
        context: &Rc<Context>,
        key: &Key,
        again: bool,
    ) -> Result<Place, ProxyError> {
        let leaving = Leaving(Rc::default());
        let waiter = &leaving.0;
        match again {
            true => self.waiting.borrow_mut().push_front(Rc::clone(waiter)),
            false => self.waiting.borrow_mut().push_back(Rc::clone(waiter)),
        }
        if !self.served.replace(true) {
            rt::spawn(serve(Rc::clone(&self), Rc::clone(context), key.clone()));
        }
        let outcome = poll_fn(|cx| match waiter.outcome.take() {
            Some(outcome) => Poll::Ready(outcome),
            None => {
                *waiter.waker.borrow_mut() = Some(cx.waker().clone());
                Poll::Pending
            }
        });
        outcome.await.map_err(ProxyError::Shared)
    }

    fn next_waiter(&self) -> Option<Rc<Waiter>> {
        let mut waiting = self.waiting.borrow_mut();
        while let Some(waiter) = waiting.pop_front() {
            if !waiter.left.get() {
                return Some(waiter);
            }
        }
        None
    }

    /// Gives what room there is to those who have waited longest, up to [`PLACES_PER_TURN`].
    /// Returns whether it stopped because of that.
    fn give_places(&self) -> bool {
        let mut from = 0;
        for _ in 0..PLACES_PER_TURN {
            while self.first_has_left() {
                self.waiting.borrow_mut().pop_front();
            }
            if self.waiting.borrow().is_empty() {
                return false;
            }
            let Some(place) = self.find(&mut from) else {
                return false;
            };
            if let Some(waiter) = self.next_waiter() {
                waiter.settle(Ok(place));
            }
        }
        true
    }

    fn first_has_left(&self) -> bool {
        let waiting = self.waiting.borrow();
        waiting.front().is_some_and(|waiter| waiter.left.get())
    }

    /// Tells all who wait that there will be no room.
    fn refuse(&self, error: &Rc<ProxyError>) {
        while let Some(waiter) = self.next_waiter() {
            waiter.settle(Err(Rc::clone(error)));
        }
    }

    /// How many tunnels more should be set up for those who wait.
    fn missing_dials(&self) -> usize {
        let dials = self.dials.get();
        let wanted = if self.slots.borrow().is_empty() || self.doubtful.get() {
            1
        } else {
            let waiting = self.waiting.borrow().len();
            waiting
                .div_ceil(self.usual_room.get().max(1))
                .min(DIALS_MAX)
        };
        wanted.saturating_sub(dials)
    }

    /// A tunnel was set up.
    fn add(&self, tunnel: Rc<Tunnel>) {
        tunnel.tell_changes(Rc::clone(&self.changed));
        self.doubtful.set(false);
        let room = tunnel.room();
        if room == 0 {
            // A tunnel more would have none either.
            let (active, max) = (0, 0);
            let error = hbone::OpenError::Exhausted { active, max };
            self.refuse(&Rc::new(error.into()));
        }
        self.usual_room.set(room);
        self.slots.borrow_mut().push(Rc::new(Slot {
            tunnel,
            promised: Cell::new(0),
        }));
    }

    /// A tunnel could not be set up.
    fn add_failure(&self, error: ProxyError) {
        if self.dials.get() > 0 {
            self.doubtful.set(true);
            return;
        }
        self.doubtful.set(false);
        self.refuse(&Rc::new(error));
    }

    /// Whether nobody would miss it.
    pub(super) fn is_unused(&self) -> bool {
        self.slots.borrow().is_empty() && self.dials.get() == 0 && !self.served.get()
    }

    /// Takes out the tunnels that no stream has used for `unused`; those that have ended go, too.
    pub(super) fn take_idle(&self, unused: Duration) -> Vec<Rc<Tunnel>> {
        let mut idle = Vec::new();
        self.slots.borrow_mut().retain(|slot| {
            let tunnel = &slot.tunnel;
            let is_idle = slot.promised.get() == 0
                && tunnel
                    .idle_since()
                    .is_some_and(|since| since.elapsed() >= unused);
            if is_idle {
                idle.push(Rc::clone(tunnel));
            }
            !is_idle && tunnel.error().is_none()
        });
        idle
    }

    pub(super) fn tunnels(&self) -> Vec<Rc<Tunnel>> {
        let slots = self.slots.borrow();
        slots.iter().map(|slot| Rc::clone(&slot.tunnel)).collect()
    }
}

/// Serves the queue until it is empty.
async fn serve(entry: Rc<Entry>, context: Rc<Context>, key: Key) {
    loop {
        while entry.give_places() {
            rt::next_turn().await;
        }
        if entry.waiting.borrow().is_empty() {
            entry.served.set(false);
            context.pool.forget_unused(&key);
            return;
        }
        for _ in 0..entry.missing_dials() {
            let dialling = Dialling::new(&entry);
            rt::spawn_giving_way(dial(dialling, Rc::clone(&context), key.clone()));
        }
        entry.changed.wait().await;
    }
}

/// Counts a tunnel that is being set up, and tells [`serve`] when it is over.
struct Dialling(Option<Rc<Entry>>);

impl Dialling {
    fn new(entry: &Rc<Entry>) -> Self {
        entry.dials.set(entry.dials.get() + 1);
        Self(Some(Rc::clone(entry)))
    }

    fn end(&mut self) -> Option<Rc<Entry>> {
        let entry = self.0.take()?;
        entry.dials.set(entry.dials.get() - 1);
        entry.changed.set();
        Some(entry)
    }
}

impl Drop for Dialling {
    fn drop(&mut self) {
        self.end();
    }
}

async fn dial(mut dialling: Dialling, context: Rc<Context>, key: Key) {
    let established = establish(&context, &key).await;
    let Some(entry) = dialling.end() else {
        return;
    };
    match established {
        Ok(tunnel) => entry.add(tunnel),
        Err(error) => {
            if let Some(fault) = error.fault() {
                context.telemetry.hbone_error(fault);
            }
            entry.add_failure(error);
        }
    }
    context.pool.forget_unused(&key);
}
