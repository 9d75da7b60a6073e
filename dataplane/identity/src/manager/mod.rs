//! The schedule at work, on the control thread.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use mesh::Identity;
use rt::mailbox::{self, LatestSender};
use tls::{RecordPath, Validity};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::clock::{Clock, SystemClock};
use crate::issuer::Issuer;
use crate::published::{
    CertificateStatus, Found, NoCertificate, Published, Request, WorkloadTls, find, statuses,
};
use crate::schedule::{Now, Schedule, Span, Wanted};
use crate::worker::CertificateFeed;

/// How long an issuer may take to answer.
pub const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Requests of all workers that the control thread has not looked at, at most. A worker sends one
/// for each identity that connections wait for.
const REQUESTS_MAX: usize = 4096;

/// Asks for certificates, renews them, and hands them to workers.
#[derive(Debug)]
pub struct Manager {
    issuer: Arc<dyn Issuer>,
    records: RecordPath,
    clock: Arc<dyn Clock>,
    schedule: Schedule,
    newest: Arc<Published>,
    /// `newest` has changed and is not published yet.
    changed: bool,
    workers: Vec<LatestSender<Arc<Published>>>,
    published: watch::Sender<Arc<Published>>,
    wanted: watch::Sender<Option<Wanted>>,
    requests: (mpsc::Sender<Request>, mpsc::Receiver<Request>),
}

/// What the control thread does with a [`Manager`] that runs. Clones are of the same.
#[derive(Clone, Debug)]
pub struct Handle {
    clock: Arc<dyn Clock>,
    published: watch::Receiver<Arc<Published>>,
    wanted: watch::Sender<Option<Wanted>>,
    requests: mpsc::Sender<Request>,
}

type Attempt = (Identity, Result<WorkloadTls, String>);

impl Manager {
    /// Gets certificates from `issuer`. Nothing happens before it [runs](Self::run).
    pub fn new(issuer: Arc<dyn Issuer>) -> Self {
        Self::with_clock(issuer, Arc::new(SystemClock))
    }

    /// As [`new`](Self::new), with other clocks than the machine's.
    pub fn with_clock(issuer: Arc<dyn Issuer>, clock: Arc<dyn Clock>) -> Self {
        let seed = RandomState::new().hash_one(0);
        Self {
            issuer,
            records: RecordPath::default(),
            schedule: Schedule::new(now(&*clock), seed),
            clock,
            newest: Arc::default(),
            changed: false,
            workers: Vec::new(),
            published: watch::Sender::default(),
            wanted: watch::Sender::default(),
            requests: mpsc::channel(REQUESTS_MAX),
        }
    }

    /// Has connections leave their records to `records`.
    #[must_use]
    pub const fn with_records(mut self, records: RecordPath) -> Self {
        self.records = records;
        self
    }

    /// What one more worker gets.
    pub fn feed(&mut self) -> CertificateFeed {
        let (sender, newest) = mailbox::latest();
        let _ = sender.send(Arc::clone(&self.newest)); // its reader is in our hands
        self.workers.push(sender);
        CertificateFeed {
            newest,
            requests: self.requests.0.clone(),
            clock: Arc::clone(&self.clock),
        }
    }

    /// What the control thread gets.
    pub fn handle(&self) -> Handle {
        Handle {
            clock: Arc::clone(&self.clock),
            published: self.published.subscribe(),
            wanted: self.wanted.clone(),
            requests: self.requests.0.clone(),
        }
    }

    /// Does its work, until all workers and handles are gone.
    pub async fn run(mut self) {
        let mut wanted = self.wanted.subscribe();
        wanted.mark_changed(); // it may have been said already
        let (sender, mut requests) = self.requests;
        drop(sender);
        self.requests = mpsc::channel(1);
        let mut under_way: JoinSet<Attempt> = JoinSet::new();
        loop {
            self.schedule.fire(now(&*self.clock));
            self.forget();
            while let Some(identity) = self.schedule.next() {
                under_way.spawn(self.attempt(identity));
            }
            self.publish();
            let wait = self.schedule.wake_at();
            let wait = wait.saturating_duration_since(self.clock.monotonic());
            tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => self.demand(&request),
                    None => return,
                },
                Ok(()) = wanted.changed() => {
                    if let Some(wanted) = wanted.borrow_and_update().clone() {
                        self.schedule.want(wanted);
                    }
                }
                Some(Ok(attempt)) = under_way.join_next() => self.finished(attempt),
                () = tokio::time::sleep(wait) => {}
            }
            // What has come in the same moment is published together.
            while let Ok(request) = requests.try_recv() {
                self.demand(&request);
            }
            while let Some(Ok(attempt)) = under_way.try_join_next() {
                self.finished(attempt);
            }
        }
    }

    fn demand(&mut self, request: &Request) {
        let known = self.newest.get(&request.identity);
        let newest = known.and_then(|known| known.current.as_ref());
        let useless = newest.is_some_and(|tls| tls.generation <= request.useless);
        let now = now(&*self.clock);
        self.schedule.demand(&request.identity, useless, now);
    }

    /// One request to the issuer.
    fn attempt(&self, identity: Identity) -> impl Future<Output = Attempt> + Send + 'static {
        let generation = self.newest.get(&identity).map_or(0, |known| known.issued) + 1;
        let (issuer, clock) = (Arc::clone(&self.issuer), Arc::clone(&self.clock));
        let records = self.records;
        async move {
            let issued = tokio::time::timeout(ANSWER_MAX, issuer.issue(&identity)).await;
            let outcome = match issued {
                Err(_) => Err(format!(
                    "the CA has not answered in {} s",
                    ANSWER_MAX.as_secs()
                )),
                Ok(Err(error)) => Err(error.to_string()),
                Ok(Ok(certificate)) => check(&identity, &certificate, &*clock).and_then(|()| {
                    WorkloadTls::new(&identity, generation, certificate, records)
                        .map_err(|error| error.to_string())
                }),
            };
            (identity, outcome)
        }
    }

    fn finished(&mut self, (identity, outcome): Attempt) {
        let span = outcome.as_ref().ok().map(|tls| Span {
            start: tls.info().not_before,
            end: tls.info().not_after,
        });
        let hopeless = self.schedule.finished(&identity, span, now(&*self.clock));
        let known = Arc::make_mut(&mut self.newest)
            .entry(identity.clone())
            .or_default();
        known.hopeless = hopeless;
        match outcome {
            Ok(tls) => {
                known.issued = tls.generation;
                known.current = Some(Arc::new(tls));
                known.error = None;
            }
            Err(reason) => {
                tracing::debug!("no certificate for {identity}: {reason}");
                known.error = Some(reason.into());
            }
        }
        self.changed = true;
        self.forget();
    }

    fn forget(&mut self) {
        for identity in self.schedule.take_forgotten() {
            if self.newest.contains_key(&identity) {
                Arc::make_mut(&mut self.newest).remove(&identity);
                self.changed = true;
            }
        }
    }

    fn publish(&mut self) {
        if !std::mem::take(&mut self.changed) {
            return;
        }
        let newest = &self.newest;
        // One that has drained takes nothing more. What the control thread sees, workers have.
        self.workers
            .retain(|worker| worker.send(Arc::clone(newest)).is_ok());
        self.published.send_replace(Arc::clone(newest));
    }
}

/// Whether `certificate` is what was asked for, and of use now.
fn check(
    identity: &Identity,
    certificate: &tls::WorkloadCertificate,
    clock: &dyn Clock,
) -> Result<(), String> {
    match certificate.identity() {
        Some(found) if found == *identity => {}
        Some(found) => return Err(format!("the certificate that was issued is of {found}")),
        None => return Err("the certificate that was issued is of no workload".to_owned()),
    }
    match certificate.info().validity(clock.time_of_day()) {
        Validity::Valid => Ok(()),
        validity => Err(format!("the certificate that was issued is {validity}")),
    }
}

fn now(clock: &dyn Clock) -> Now {
    Now {
        monotonic: clock.monotonic(),
        time_of_day: clock.time_of_day(),
    }
}

impl Handle {
    /// Says which identities this node's workloads have, and of which certificates are fetched
    /// ahead. Those of others are forgotten; connections that use them go on.
    pub fn want(&self, wanted: Wanted) {
        self.wanted.send_replace(Some(wanted));
    }

    /// All identities that were asked for, sorted, with their certificates.
    pub fn list(&self) -> Vec<CertificateStatus> {
        statuses(&self.published.borrow())
    }

    /// The certificate of `identity`, which is asked for if there is none.
    ///
    /// # Errors
    /// Several attempts to get one have failed, or the [`Manager`] has ended.
    pub async fn certificate(
        &self,
        identity: &Identity,
    ) -> Result<Arc<WorkloadTls>, NoCertificate> {
        let ended = |_| NoCertificate {
            identity: identity.clone(),
            reason: "nobody issues certificates any more".into(),
        };
        let mut published = self.published.clone();
        let mut asked = None;
        loop {
            let newest = Arc::clone(&published.borrow_and_update());
            match find(&newest, identity, self.clock.time_of_day()) {
                Found::Ready(tls) => return Ok(tls),
                Found::Hopeless(why) => return Err(why),
                Found::Missing(useless) if asked != Some(useless) => {
                    asked = Some(useless);
                    let identity = identity.clone();
                    let request = Request { identity, useless };
                    self.requests.send(request).await.map_err(|_| ended(()))?;
                }
                Found::Missing(_) => {}
            }
            published.changed().await.map_err(|_| ended(()))?;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
