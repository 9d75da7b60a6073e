//! A number of places, given out by address in turn.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::poll_fn;
use std::net::IpAddr;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use super::share;
use super::silent::{Displaced, Silent};

/// The part of patience that is left where nobody more may wait.
const HURRY: u32 = 8;

/// All places are taken and as many wait as may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Overload;

#[derive(Debug)]
pub(super) struct Places {
    max: usize,
    /// How long who has a place may be silent while others wait for one.
    patience: Duration,
    state: RefCell<State>,
    /// Of those who have a place, the ones that wait for their peer.
    silent: Silent,
    /// [`Places::displace_silent`] is running.
    displacing: Cell<bool>,
}

#[derive(Debug, Default)]
struct State {
    taken: usize,
    held: HashMap<IpAddr, usize>,
    queues: HashMap<IpAddr, BTreeMap<u64, Rc<Waiter>>>,
    /// The addresses of `queues`, in the order in which it is their turn.
    turns: VecDeque<IpAddr>,
    waiting: usize,
    next: u64,
}

#[derive(Debug, Default)]
struct Waiter {
    outcome: RefCell<Option<Result<Place, Overload>>>,
    waker: RefCell<Option<Waker>>,
}

impl Waiter {
    fn settle(&self, outcome: Result<Place, Overload>) {
        *self.outcome.borrow_mut() = Some(outcome);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// What a place is held by.
#[derive(Debug)]
pub(super) struct Held {
    places: Rc<Places>,
    peer: IpAddr,
    given_back: Cell<bool>,
    /// Since when it has not heard from its peer, from the first time it listened.
    silent_since: Cell<Option<Instant>>,
}

impl Held {
    /// Gives the place to the next one, once.
    pub(super) fn give_back(&self) {
        if !self.given_back.replace(true) {
            self.places.release(self.peer);
        }
    }
}

/// A place. Given back when dropped.
#[derive(Debug)]
pub(crate) struct Place(Rc<Held>);

impl Place {
    fn new(places: &Rc<Places>, peer: IpAddr) -> Self {
        Self(Rc::new(Held {
            places: Rc::clone(places),
            peer,
            given_back: Cell::new(false),
            silent_since: Cell::new(None),
        }))
    }

    /// Waits for `word` of the peer; the place is lost if that takes long and others want it.
    pub(crate) async fn listen<T>(&self, word: impl Future<Output = T>) -> Result<T, Displaced> {
        let since = self.0.silent_since.get().unwrap_or_else(Instant::now);
        self.0.silent_since.set(Some(since));
        let silent = &self.0.places.silent;
        let held = Some(Rc::clone(&self.0));
        silent.listen(self.0.peer, since, held, word).await
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.give_back();
    }
}

/// A waiter on its way.
struct Waiting<'a> {
    places: &'a Rc<Places>,
    peer: IpAddr,
    number: u64,
    waiter: Rc<Waiter>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.places.state.borrow_mut().leave(self.peer, self.number);
        // What it was granted and has not taken goes to the next.
        let outcome = self.waiter.outcome.take();
        drop(outcome);
    }
}

impl State {
    fn may_hold(&self, peer: IpAddr, max: usize) -> bool {
        let held = self.held.get(&peer).copied().unwrap_or(0);
        self.taken < max && (self.taken < max / 2 || held < share(max))
    }

    fn hold(&mut self, peer: IpAddr) {
        self.taken += 1;
        *self.held.entry(peer).or_default() += 1;
    }

    fn queue(&mut self, peer: IpAddr, waiter: Rc<Waiter>) -> u64 {
        let number = self.next;
        self.next += 1;
        self.waiting += 1;
        let queue = self.queues.entry(peer).or_default();
        if queue.is_empty() {
            self.turns.push_back(peer);
        }
        queue.insert(number, waiter);
        number
    }

    fn leave(&mut self, peer: IpAddr, number: u64) -> Option<Rc<Waiter>> {
        let queue = self.queues.get_mut(&peer)?;
        let waiter = queue.remove(&number)?;
        self.waiting -= 1;
        if queue.is_empty() {
            self.queues.remove(&peer);
            self.turns.retain(|turn| *turn != peer);
        }
        Some(waiter)
    }

    /// The next one that may have a place, which it then holds.
    fn next(&mut self, max: usize) -> Option<(IpAddr, Rc<Waiter>)> {
        for _ in 0..self.turns.len() {
            let peer = self.turns.pop_front()?;
            self.turns.push_back(peer);
            if self.may_hold(peer, max) {
                let number = *self.queues.get(&peer)?.first_key_value()?.0;
                let waiter = self.leave(peer, number)?;
                self.hold(peer);
                return Some((peer, waiter));
            }
        }
        None
    }

    /// Room for one more of `peer` among those who wait: of the address with most of them the
    /// newest goes, unless that is `peer`.
    fn make_room(&mut self, peer: IpAddr) -> Option<Rc<Waiter>> {
        let of = |state: &Self, peer| state.queues.get(&peer).map_or(0, BTreeMap::len);
        let longest = self
            .turns
            .iter()
            .copied()
            .max_by_key(|turn| of(self, *turn));
        let longest = longest.filter(|longest| of(self, *longest) > of(self, peer) + 1)?;
        let (newest, _) = self.queues.get(&longest)?.last_key_value()?;
        let newest = *newest;
        self.leave(longest, newest)
    }
}

impl Places {
    pub(super) fn new(max: usize, patience: Duration) -> Rc<Self> {
        Rc::new(Self {
            max,
            patience,
            state: RefCell::default(),
            silent: Silent::default(),
            displacing: Cell::new(false),
        })
    }

    pub(super) async fn take(self: &Rc<Self>, peer: IpAddr) -> Result<Place, Overload> {
        let waiter = Rc::<Waiter>::default();
        let number = {
            let mut state = self.state.borrow_mut();
            // Those who wait are the ones that may not have what is free.
            if state.may_hold(peer, self.max) && !state.queues.contains_key(&peer) {
                state.hold(peer);
                drop(state);
                return Ok(Place::new(self, peer));
            }
            if state.waiting >= self.max {
                match state.make_room(peer) {
                    Some(newest) => newest.settle(Err(Overload)),
                    None => {
                        drop(state);
                        self.hurry()?;
                        state = self.state.borrow_mut();
                    }
                }
            }
            state.queue(peer, Rc::clone(&waiter))
        };
        let waiting = Waiting {
            places: self,
            peer,
            number,
            waiter,
        };
        if !self.displacing.replace(true) {
            rt::spawn(Rc::clone(self).displace_silent());
        }
        poll_fn(|cx| match waiting.waiter.outcome.take() {
            Some(outcome) => Poll::Ready(outcome),
            None => {
                *waiting.waiter.waker.borrow_mut() = Some(cx.waker().clone());
                Poll::Pending
            }
        })
        .await
    }

    fn release(self: &Rc<Self>, peer: IpAddr) {
        let next = {
            let mut state = self.state.borrow_mut();
            state.taken -= 1;
            if let Some(held) = state.held.get_mut(&peer) {
                *held -= 1;
                if *held == 0 {
                    state.held.remove(&peer);
                }
            }
            state.next(self.max)
        };
        if let Some((peer, waiter)) = next {
            waiter.settle(Ok(Place::new(self, peer)));
        }
    }

    /// Nobody more may wait: who has been silent longest goes at once, unless that is no time.
    fn hurry(&self) -> Result<(), Overload> {
        let long = self.patience / HURRY;
        if self.silent.oldest().is_none_or(|age| age < long) {
            return Err(Overload);
        }
        self.silent.displace_oldest();
        Ok(())
    }

    /// As long as anybody waits: who has been silent for long loses its place.
    async fn displace_silent(self: Rc<Self>) {
        while self.state.borrow().waiting > 0 {
            let left = match self.silent.oldest() {
                Some(age) if age >= self.patience => {
                    self.silent.displace_oldest();
                    continue;
                }
                Some(age) => self.patience.saturating_sub(age),
                None => self.patience,
            };
            rt::time::sleep(left).await;
        }
        self.displacing.set(false);
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::net::Ipv4Addr;

    use super::*;

    const PATIENCE: Duration = Duration::from_millis(20);

    fn address(last: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, last).into()
    }

    /// Who has come by, in order.
    type Came = Rc<RefCell<Vec<(u8, bool)>>>;

    /// Takes a place in a task of its own, and keeps it until the peer speaks, which it never does.
    fn come(places: &Rc<Places>, last: u8, came: &Came) {
        let (places, came) = (Rc::clone(places), Rc::clone(came));
        rt::spawn(async move {
            let place = places.take(address(last)).await;
            came.borrow_mut().push((last, place.is_ok()));
            if let Ok(place) = place {
                let _ = place.listen(pending::<()>()).await;
            }
        });
    }

    async fn until(condition: impl Fn() -> bool) {
        while !condition() {
            rt::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Silence holds no place while an honest peer waits, however often it comes back.
    #[test]
    fn those_who_hold_a_place_and_say_nothing_lose_it_to_those_who_wait() {
        crate::tests::run(async {
            let places = Places::new(8, PATIENCE);
            let came = Came::default();
            for last in 0..15 {
                come(&places, last, &came);
            }
            rt::yield_now().await;
            assert_eq!(places.state.borrow().taken, 8);
            let start = Instant::now();
            let place = places.take(address(100)).await;
            // No more than 8 are before it, and all of those go together.
            assert!(
                place.is_ok(),
                "after {:?}: {:?}",
                start.elapsed(),
                came.borrow()
            );
            drop(place);
            until(|| places.state.borrow().waiting == 0).await;
            assert!(came.borrow().iter().all(|(_, got)| *got));
        });
    }

    /// Without anybody who waits, nobody is hurried.
    #[test]
    fn who_is_in_nobodys_way_may_be_silent() {
        crate::tests::run(async {
            let places = Places::new(2, PATIENCE);
            let place = places.take(address(1)).await.unwrap();
            let silent = place.listen(rt::time::sleep(PATIENCE * 4)).await;
            assert_eq!(silent, Ok(()));
        });
    }

    /// One address with a thousand does not come before another with one.
    #[test]
    fn addresses_take_turns_and_have_their_share() {
        crate::tests::run(async {
            let places = Places::new(16, Duration::from_secs(3600));
            let came = Came::default();
            for _ in 0..32 {
                come(&places, 1, &came);
            }
            until(|| places.state.borrow().waiting == 16).await;
            // Half of all, and the rest of them wait or were sent away.
            assert_eq!(places.state.borrow().taken, 8);
            let refused = came.borrow().iter().filter(|(_, got)| !got).count();
            assert_eq!(refused, 8);
            let honest = places.take(address(2)).await.unwrap();
            // All is full: the newest of the many make room for others.
            let mut others = Vec::new();
            for last in 3..10 {
                others.push(places.take(address(last)).await.unwrap());
            }
            assert_eq!(places.state.borrow().taken, 16);
            come(&places, 50, &came);
            rt::yield_now().await;
            assert_eq!(places.state.borrow().queues[&address(50)].len(), 1);
            drop(honest);
            until(|| came.borrow().contains(&(50, true))).await;
        });
    }

    #[test]
    fn nothing_is_lost_when_waiters_leave() {
        crate::tests::run(async {
            let places = Places::new(1, Duration::from_secs(3600));
            for _ in 0..10 {
                let place = places.take(address(1)).await.unwrap();
                let waiter = rt::time::timeout(PATIENCE / 10, places.take(address(2)));
                assert!(waiter.await.is_err());
                let mut granted = Box::pin(places.take(address(3)));
                poll_fn(|cx| Poll::Ready(granted.as_mut().poll(cx).is_pending())).await;
                drop(place);
                drop(granted);
            }
            let state = places.state.borrow();
            assert_eq!((state.taken, state.waiting), (0, 0));
            assert!(state.held.is_empty() && state.queues.is_empty() && state.turns.is_empty());
        });
    }
}
