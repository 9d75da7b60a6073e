//! What a worker has: the newest certificates in a map of its own, and a way to ask for more.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::SystemTime;

use mesh::Identity;
use rt::mailbox::LatestReceiver;
use rt::sync::Broadcast;
use tokio::sync::mpsc;

use crate::clock::Clock;
use crate::published::{Found, NoCertificate, Published, Request, WorkloadTls, find};

/// Connections of one worker that may wait for certificates.
const WAITING_MAX: usize = 4096;

/// What a worker is started with.
pub struct CertificateFeed {
    pub(crate) newest: LatestReceiver<Arc<Published>>,
    pub(crate) requests: mpsc::Sender<Request>,
    pub(crate) clock: Arc<dyn Clock>,
}

impl fmt::Debug for CertificateFeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateFeed").finish_non_exhaustive()
    }
}

impl CertificateFeed {
    /// What the worker's connections use, and a task of its own that keeps it up to date.
    pub fn open(self) -> (Rc<Certificates>, impl Future<Output = ()>) {
        let Self {
            mut newest,
            requests,
            clock,
        } = self;
        // What is there already need not be waited for.
        let mut cx = Context::from_waker(Waker::noop());
        let first = match pin!(newest.recv()).poll(&mut cx) {
            Poll::Ready(first) => first,
            Poll::Pending => Arc::default(),
        };
        let certificates = Rc::new(Certificates {
            newest: RefCell::new(first),
            waiting: RefCell::default(),
            waiters: Cell::new(0),
            requests,
            clock,
        });
        let follow = {
            let certificates = Rc::clone(&certificates);
            async move {
                loop {
                    certificates.replace(newest.recv().await);
                }
            }
        };
        (certificates, follow)
    }
}

/// One worker's certificates.
pub struct Certificates {
    /// Replaced as a whole, never changed.
    newest: RefCell<Arc<Published>>,
    /// What connections wait for.
    waiting: RefCell<HashMap<Identity, Rc<Asked>>>,
    waiters: Cell<usize>,
    requests: mpsc::Sender<Request>,
    clock: Arc<dyn Clock>,
}

/// One identity that connections wait for.
#[derive(Debug, Default)]
struct Asked {
    waiters: Cell<usize>,
    /// The request that was sent last: which certificate it called useless.
    useless: Cell<Option<u64>>,
    changed: Broadcast,
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates")
            .field("known", &self.newest.borrow().len())
            .field("waiters", &self.waiters)
            .finish_non_exhaustive()
    }
}

impl Certificates {
    /// The certificate of `identity`, if there is one that is valid: a look into a map.
    pub fn ready(&self, identity: &Identity) -> Option<Arc<WorkloadTls>> {
        match self.find(identity) {
            Found::Ready(tls) => Some(tls),
            Found::Hopeless(_) | Found::Missing(_) => None,
        }
    }

    /// As [`ready`](Self::ready); if there is none, it is asked for and waited for, as long as the
    /// caller does.
    ///
    /// # Errors
    /// Several attempts to get one have failed, or too many connections wait.
    pub async fn get(&self, identity: &Identity) -> Result<Arc<WorkloadTls>, NoCertificate> {
        match self.find(identity) {
            Found::Ready(tls) => Ok(tls),
            Found::Hopeless(why) => Err(why),
            Found::Missing(_) => self.wait(identity).await,
        }
    }

    async fn wait(&self, identity: &Identity) -> Result<Arc<WorkloadTls>, NoCertificate> {
        let refused = |reason: &str| NoCertificate {
            identity: identity.clone(),
            reason: reason.into(),
        };
        if self.waiters.get() >= WAITING_MAX {
            return Err(refused(
                "too many connections of this worker wait for certificates",
            ));
        }
        let waiter = Waiter::new(self, identity);
        loop {
            match self.find(identity) {
                Found::Ready(tls) => return Ok(tls),
                Found::Hopeless(why) => return Err(why),
                Found::Missing(useless) if waiter.asked.useless.get() != Some(useless) => {
                    let request = Request {
                        identity: identity.clone(),
                        useless,
                    };
                    if self.requests.try_send(request).is_err() {
                        return Err(refused("the control thread takes no more requests"));
                    }
                    waiter.asked.useless.set(Some(useless));
                }
                Found::Missing(_) => {}
            }
            waiter.asked.changed.wait().await;
        }
    }

    fn find(&self, identity: &Identity) -> Found {
        self.find_at(identity, self.clock.time_of_day())
    }

    fn find_at(&self, identity: &Identity, now: SystemTime) -> Found {
        find(&self.newest.borrow(), identity, now)
    }

    /// Takes what is the newest now, and wakes those whose wait it ends.
    fn replace(&self, newest: Arc<Published>) {
        let replaced = self.newest.replace(newest);
        drop(replaced);
        let now = self.clock.time_of_day();
        for (identity, asked) in &*self.waiting.borrow() {
            match self.find_at(identity, now) {
                Found::Missing(useless) if asked.useless.get() == Some(useless) => {}
                _ => asked.changed.notify(),
            }
        }
    }

    /// Connections that wait.
    pub fn waiting(&self) -> usize {
        self.waiters.get()
    }
}

/// Counts a connection that waits.
struct Waiter<'a> {
    certificates: &'a Certificates,
    identity: &'a Identity,
    asked: Rc<Asked>,
}

impl<'a> Waiter<'a> {
    fn new(certificates: &'a Certificates, identity: &'a Identity) -> Self {
        let mut waiting = certificates.waiting.borrow_mut();
        let asked = Rc::clone(waiting.entry(identity.clone()).or_default());
        asked.waiters.set(asked.waiters.get() + 1);
        certificates.waiters.set(certificates.waiters.get() + 1);
        Self {
            certificates,
            identity,
            asked,
        }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let certificates = self.certificates;
        certificates.waiters.set(certificates.waiters.get() - 1);
        self.asked.waiters.set(self.asked.waiters.get() - 1);
        if self.asked.waiters.get() == 0 {
            certificates.waiting.borrow_mut().remove(self.identity);
        }
    }
}

#[cfg(test)]
mod tests;
