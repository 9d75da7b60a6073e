//! Connections that policies have allowed are looked at again when the configuration changes.
//!
//! Every connection to a local pod that was authorized holds a [`Watch`]. When the worker gets
//! another configuration, each of them is authorized again with what was known of it at its start
//! and the policies that apply now; those no longer allowed end with a reset on both sides. This
//! goes on between other work, a few hundred connections at a time; a configuration that arrives
//! meanwhile starts it over.
//!
//! A workload that is no longer in the configuration does not end its connections: its pod may be
//! taking its time to stop, and no policy says that it must not. New connections are refused.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use mesh::{ConnectionFacts, DenyReason, Identity, Snapshot, Verdict, Workload};
use rt::sync::Signal;
use telemetry::{Event, WorkerTelemetry};

use crate::error::ProxyError;

/// Connections looked at between two looks at the ring.
const AT_ONCE: usize = 256;

/// What policies decide by, kept for as long as the connection lives.
#[derive(Debug)]
struct Facts {
    workload: Arc<Workload>,
    identity: Option<Identity>,
    src: IpAddr,
    dst: SocketAddr,
    revoked: RefCell<Option<DenyReason>>,
    signal: Signal,
}

impl Facts {
    fn verdict(&self, snapshot: &Snapshot) -> Verdict {
        let facts = ConnectionFacts {
            identity: self.identity.as_ref(),
            src: self.src,
            dst: self.dst,
        };
        snapshot.authorize(&self.workload, &facts)
    }
}

/// All watched connections of a worker. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Watches(Rc<Inner>);

#[derive(Default)]
struct Inner {
    slots: RefCell<Vec<Option<Rc<Facts>>>>,
    free: RefCell<Vec<usize>>,
    /// Of the configuration they were last compared with.
    generation: Cell<u64>,
}

impl fmt::Debug for Watches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watches")
            .field("slots", &self.0.slots.borrow().len())
            .finish_non_exhaustive()
    }
}

/// One connection's authorization, as long as it holds.
#[derive(Debug)]
pub(crate) struct Watch {
    watches: Watches,
    slot: usize,
    facts: Rc<Facts>,
}

impl Watches {
    /// Authorizes a connection to `workload` by `snapshot` and watches over it from then on.
    ///
    /// # Errors
    /// [`ProxyError::Denied`].
    pub(crate) fn authorize(
        &self,
        snapshot: &Snapshot,
        workload: &Arc<Workload>,
        facts: &ConnectionFacts<'_>,
    ) -> Result<Watch, ProxyError> {
        let facts = Rc::new(Facts {
            workload: Arc::clone(workload),
            identity: facts.identity.cloned(),
            src: facts.src,
            dst: facts.dst,
            revoked: RefCell::default(),
            signal: Signal::default(),
        });
        match facts.verdict(snapshot) {
            Verdict::Allow => {}
            Verdict::Deny(reason) => return Err(ProxyError::Denied(reason)),
        }
        let mut slots = self.0.slots.borrow_mut();
        let slot = match self.0.free.borrow_mut().pop() {
            Some(slot) => {
                slots[slot] = Some(Rc::clone(&facts));
                slot
            }
            None => {
                slots.push(Some(Rc::clone(&facts)));
                slots.len() - 1
            }
        };
        Ok(Watch {
            watches: self.clone(),
            slot,
            facts,
        })
    }

    /// Looks at all of them again, by `snapshot`.
    pub(crate) fn recheck(&self, snapshot: &Arc<Snapshot>, telemetry: &WorkerTelemetry) {
        let generation = self.0.generation.get() + 1;
        self.0.generation.set(generation);
        if self.0.slots.borrow().is_empty() {
            return;
        }
        let (watches, snapshot) = (self.clone(), Arc::clone(snapshot));
        let telemetry = telemetry.clone();
        rt::spawn(async move {
            let mut at = 0;
            while watches.0.generation.get() == generation {
                let Some(revoked) = watches.recheck_some(at, &snapshot) else {
                    return;
                };
                (0..revoked).for_each(|_| telemetry.count_event(Event::Revoked));
                at += AT_ONCE;
                rt::next_turn().await;
            }
        });
    }

    /// Looks at up to [`AT_ONCE`] of them; how many are revoked, `None` behind the last.
    fn recheck_some(&self, at: usize, snapshot: &Snapshot) -> Option<usize> {
        let slots = self.0.slots.borrow();
        let some = slots.get(at..(at + AT_ONCE).min(slots.len()))?;
        if some.is_empty() {
            return None;
        }
        let mut revoked = 0;
        for facts in some.iter().flatten() {
            match facts.verdict(snapshot) {
                Verdict::Allow | Verdict::Deny(DenyReason::UnknownWorkload) => {}
                Verdict::Deny(reason) => {
                    revoked += usize::from(facts.revoked.replace(Some(reason)).is_none());
                    facts.signal.set();
                }
            }
        }
        Some(revoked)
    }
}

impl Watch {
    /// Runs `future` as long as policies allow the connection.
    ///
    /// # Errors
    /// [`ProxyError::Revoked`]; `future` is not polled any more then.
    pub(crate) async fn while_allowed<T>(
        &self,
        mut future: Pin<&mut impl Future<Output = T>>,
    ) -> Result<T, ProxyError> {
        std::future::poll_fn(|cx| {
            // First: what is no longer allowed moves no byte more.
            while self.facts.signal.poll_wait(cx).is_ready() {
                if let Some(reason) = self.facts.revoked.borrow().clone() {
                    return Poll::Ready(Err(ProxyError::Revoked(reason)));
                }
            }
            future.as_mut().poll(cx).map(Ok)
        })
        .await
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let inner = &self.watches.0;
        inner.slots.borrow_mut()[self.slot] = None;
        inner.free.borrow_mut().push(self.slot);
    }
}
