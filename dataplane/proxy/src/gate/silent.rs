//! Connections that wait for their peer to say something, the longest silent first.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use super::places::Held;

/// The peer was silent while others waited for what it held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer was silent while others waited")]
pub(crate) struct Displaced;

#[derive(Debug, Default)]
pub(super) struct Silent {
    peers: RefCell<Peers>,
}

#[derive(Debug, Default)]
struct Peers {
    /// By the moment since when, and a number that makes it unique.
    by_age: BTreeMap<(Instant, u64), Rc<Guest>>,
    by_address: HashMap<IpAddr, BTreeSet<(Instant, u64)>>,
    next: u64,
}

#[derive(Debug)]
struct Guest {
    peer: IpAddr,
    /// What it gives back when it is sent away.
    held: Option<Rc<Held>>,
    displaced: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Peers {
    fn enter(&mut self, since: Instant, guest: Rc<Guest>) -> (Instant, u64) {
        let key = (since, self.next);
        self.next += 1;
        self.by_address.entry(guest.peer).or_default().insert(key);
        self.by_age.insert(key, guest);
        key
    }

    fn remove(&mut self, key: (Instant, u64)) -> Option<Rc<Guest>> {
        let guest = self.by_age.remove(&key)?;
        if let Some(keys) = self.by_address.get_mut(&guest.peer) {
            keys.remove(&key);
            if keys.is_empty() {
                self.by_address.remove(&guest.peer);
            }
        }
        Some(guest)
    }
}

impl Silent {
    pub(super) fn len(&self) -> usize {
        self.peers.borrow().by_age.len()
    }

    /// How many of them are from one address.
    pub(super) fn of(&self, peer: IpAddr) -> usize {
        let peers = self.peers.borrow();
        peers.by_address.get(&peer).map_or(0, BTreeSet::len)
    }

    /// For how long the one that has been silent longest has been.
    pub(super) fn oldest(&self) -> Option<Duration> {
        let peers = self.peers.borrow();
        let ((since, _), _) = peers.by_age.first_key_value()?;
        Some(since.elapsed())
    }

    pub(super) fn displace_oldest(&self) {
        let oldest = self
            .peers
            .borrow()
            .by_age
            .first_key_value()
            .map(|(key, _)| *key);
        if let Some(key) = oldest {
            self.displace(key);
        }
    }

    pub(super) fn displace_oldest_of(&self, peer: IpAddr) {
        let peers = self.peers.borrow();
        let oldest = peers
            .by_address
            .get(&peer)
            .and_then(BTreeSet::first)
            .copied();
        drop(peers);
        if let Some(key) = oldest {
            self.displace(key);
        }
    }

    fn displace(&self, key: (Instant, u64)) {
        let Some(guest) = self.peers.borrow_mut().remove(key) else {
            return;
        };
        guest.displaced.set(true);
        if let Some(held) = &guest.held {
            held.give_back();
        }
        if let Some(waker) = guest.waker.take() {
            waker.wake();
        }
    }

    /// Waits for `word` of `peer`, which has been silent since `since` and holds `held`.
    pub(super) async fn listen<T>(
        &self,
        peer: IpAddr,
        since: Instant,
        held: Option<Rc<Held>>,
        word: impl Future<Output = T>,
    ) -> Result<T, Displaced> {
        let mut word = pin!(word);
        let mut listening: Option<Listening<'_>> = None;
        poll_fn(|cx| {
            if let Poll::Ready(word) = word.as_mut().poll(cx) {
                return Poll::Ready(Ok(word));
            }
            let listening = listening.get_or_insert_with(|| {
                let guest = Rc::new(Guest {
                    peer,
                    held: held.clone(),
                    displaced: Cell::new(false),
                    waker: RefCell::default(),
                });
                let key = self.peers.borrow_mut().enter(since, Rc::clone(&guest));
                Listening {
                    silent: self,
                    key,
                    guest,
                }
            });
            if listening.guest.displaced.get() {
                return Poll::Ready(Err(Displaced));
            }
            *listening.guest.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// One that is listed, as long as it waits.
struct Listening<'a> {
    silent: &'a Silent,
    key: (Instant, u64),
    guest: Rc<Guest>,
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        self.silent.peers.borrow_mut().remove(self.key);
    }
}
