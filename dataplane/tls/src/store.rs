//! Certificates by identity: issued on first use, renewed at half their lifetime.
//!
//! Data-plane workers call [`CertificateStore::get`] synchronously. It takes a read lock for a
//! look-up and a per-identity lock for a clone; only the caller that finds a certificate missing
//! or due issues one. While a renewal runs, or fails, others keep getting the certificate that is
//! valid. Failed attempts are repeated after a delay that doubles from one second to 150.
//!
//! A certificate is used from the start of its validity to its end by this machine's time of day,
//! which may be corrected at any moment: one that turns out not to be valid yet is no better than
//! an expired one, and another is issued. Delays do not depend on the time of day.
//!
//! Limits: one entry per identity ever asked for, until [`CertificateStore::retain`] drops it;
//! the caller bounds which identities it asks for.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use mesh::Identity;

use crate::authority::Authority;
use crate::certificate::{CertificateInfo, WorkloadCertificate};
use crate::clock::{Clock, SystemClock, Validity};
use crate::record::RecordPath;
use crate::settings::{self, ClientSettings, ServerSettings, SettingsError};

/// Delay after the first failed attempt; it doubles with each further one.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest delay between attempts.
const RETRY_MAX: Duration = Duration::from_secs(150);

/// Where certificates come from.
pub trait Issuer: fmt::Debug + Send + Sync {
    /// Issues a certificate for `identity`. Called by the worker that needs it, so it must not
    /// take long: an issuer behind a network fetches ahead and answers from what it has.
    ///
    /// # Errors
    /// Why there is none, in one line.
    fn issue(&self, identity: &Identity) -> Result<WorkloadCertificate, IssueError>;
}

/// Why an issuer has no certificate.
pub type IssueError = Box<dyn std::error::Error + Send + Sync>;

/// Issues from a local [`Authority`].
#[derive(Debug)]
pub struct LocalIssuer {
    authority: Authority,
    ttl: Duration,
}

impl LocalIssuer {
    /// Issues certificates valid for `ttl`.
    pub const fn new(authority: Authority, ttl: Duration) -> Self {
        Self { authority, ttl }
    }
}

impl Issuer for LocalIssuer {
    fn issue(&self, identity: &Identity) -> Result<WorkloadCertificate, IssueError> {
        Ok(self.authority.issue(identity, self.ttl)?)
    }
}

/// Why there is no certificate for an identity.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// It could not be issued; the next attempt is made later.
    #[error("no certificate for {identity}: {reason}")]
    Unavailable {
        /// For whom.
        identity: Identity,
        /// The last attempt's error.
        reason: Arc<str>,
    },
}

/// What one workload needs for TLS, from one certificate.
#[derive(Debug)]
pub struct WorkloadTls {
    /// To connect to others.
    pub client: Arc<ClientSettings>,
    /// To accept connections.
    pub server: Arc<ServerSettings>,
    /// Whose certificate it is.
    pub identity: Identity,
    /// Counts the certificates of this identity, from 1.
    pub generation: u64,
    certificate: WorkloadCertificate,
}

impl WorkloadTls {
    fn new(
        identity: &Identity,
        generation: u64,
        certificate: WorkloadCertificate,
        records: RecordPath,
    ) -> Result<Self, SettingsError> {
        let (mut client, mut server) = settings::both(&certificate)?;
        client.set_records(records);
        server.set_records(records);
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            identity: identity.clone(),
            generation,
            certificate,
        })
    }

    /// Serial number and validity.
    pub const fn info(&self) -> &CertificateInfo {
        self.certificate.info()
    }

    /// The certificate itself.
    pub const fn certificate(&self) -> &WorkloadCertificate {
        &self.certificate
    }

    /// Half the lifetime is over.
    fn renewal_due(&self) -> SystemTime {
        let info = self.info();
        let lifetime = info
            .not_after
            .duration_since(info.not_before)
            .unwrap_or_default();
        info.not_before + lifetime / 2
    }
}

/// One line of [`CertificateStore::list`].
#[derive(Clone, Debug)]
pub struct CertificateStatus {
    /// Whose.
    pub identity: Identity,
    /// The certificate in use, if there is one.
    pub current: Option<Arc<WorkloadTls>>,
    /// The error of the last attempt, if it failed.
    pub error: Option<Arc<str>>,
}

/// Certificates by identity, shared by all workers.
#[derive(Debug)]
pub struct CertificateStore {
    issuer: Arc<dyn Issuer>,
    records: RecordPath,
    clock: Arc<dyn Clock>,
    slots: RwLock<HashMap<Identity, Arc<Mutex<Slot>>>>,
}

#[derive(Debug, Default)]
struct Slot {
    current: Option<Arc<WorkloadTls>>,
    error: Option<Arc<str>>,
    /// A worker is issuing.
    renewing: bool,
    failures: u32,
    /// No attempt before this.
    retry_at: Option<Instant>,
    issued: u64,
}

impl CertificateStore {
    /// An empty store that gets its certificates from `issuer`.
    pub fn new(issuer: Arc<dyn Issuer>) -> Self {
        Self {
            issuer,
            records: RecordPath::default(),
            clock: Arc::new(SystemClock),
            slots: RwLock::default(),
        }
    }

    /// Has connections leave their records to `records`.
    #[must_use]
    pub const fn with_records(mut self, records: RecordPath) -> Self {
        self.records = records;
        self
    }

    /// Has it tell the time by `clock`.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// The certificate of `identity`, issued now if there is none yet or it is due.
    ///
    /// # Errors
    /// There is no valid certificate and none can be issued at the moment.
    pub fn get(&self, identity: &Identity) -> Result<Arc<WorkloadTls>, StoreError> {
        let slot = self.slot(identity);
        let mut locked = lock(&slot);
        let (now, monotonic) = (self.clock.time_of_day(), self.clock.monotonic());
        let usable = locked
            .current
            .clone()
            .filter(|tls| tls.info().validity(now) == Validity::Valid);
        let waiting = locked.retry_at.is_some_and(|retry_at| monotonic < retry_at);
        let issue = match &usable {
            // One worker renews; the others need not wait for it.
            Some(tls) => now >= tls.renewal_due() && !waiting && !locked.renewing,
            None => !waiting,
        };
        if !issue {
            return usable.ok_or_else(|| locked.unavailable(identity, now));
        }
        let Some(usable) = usable else {
            // Nothing to hand out: others of this identity wait here rather than issue as well.
            let generation = locked.issued + 1;
            let outcome = self.issue(identity, generation);
            return locked
                .conclude(outcome, self.clock.monotonic())
                .ok_or_else(|| locked.unavailable(identity, now));
        };
        let generation = locked.issued + 1;
        locked.renewing = true;
        drop(locked);
        let outcome = self.issue(identity, generation);
        let mut locked = lock(&slot);
        locked.renewing = false;
        let renewed = locked.conclude(outcome, self.clock.monotonic());
        Ok(renewed.unwrap_or(usable))
    }

    /// All identities, sorted, with their certificates.
    pub fn list(&self) -> Vec<CertificateStatus> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<CertificateStatus> = slots
            .iter()
            .map(|(identity, slot)| {
                let slot = lock(slot);
                CertificateStatus {
                    identity: identity.clone(),
                    current: slot.current.clone(),
                    error: slot.error.clone(),
                }
            })
            .collect();
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }

    /// Drops the certificates of all identities for which `keep` says false. Connections that
    /// use them go on.
    pub fn retain(&self, mut keep: impl FnMut(&Identity) -> bool) {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|identity, _| keep(identity));
    }

    fn slot(&self, identity: &Identity) -> Arc<Mutex<Slot>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get(identity) {
            return Arc::clone(slot);
        }
        drop(slots);
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(slots.entry(identity.clone()).or_default())
    }

    fn issue(&self, identity: &Identity, generation: u64) -> Result<WorkloadTls, String> {
        let certificate = self
            .issuer
            .issue(identity)
            .map_err(|error| error.to_string())?;
        let validity = certificate.info().validity(self.clock.time_of_day());
        if validity != Validity::Valid {
            return Err(format!("the certificate that was issued is {validity}"));
        }
        WorkloadTls::new(identity, generation, certificate, self.records)
            .map_err(|error| error.to_string())
    }
}

impl Slot {
    /// Takes note of an attempt. Returns the new certificate, if there is one.
    fn conclude(
        &mut self,
        outcome: Result<WorkloadTls, String>,
        now: Instant,
    ) -> Option<Arc<WorkloadTls>> {
        match outcome {
            Ok(tls) => {
                let tls = Arc::new(tls);
                self.issued = tls.generation;
                self.current = Some(Arc::clone(&tls));
                self.error = None;
                self.failures = 0;
                self.retry_at = None;
                Some(tls)
            }
            Err(reason) => {
                let delay = RETRY_FIRST.saturating_mul(1 << self.failures.min(8));
                self.error = Some(reason.into());
                self.failures += 1;
                self.retry_at = Some(now + delay.min(RETRY_MAX));
                None
            }
        }
    }

    fn unavailable(&self, identity: &Identity, now: SystemTime) -> StoreError {
        let current = self.current.as_ref().map(|tls| tls.info().validity(now));
        let over = || Arc::from(current.unwrap_or(Validity::Over).to_string());
        StoreError::Unavailable {
            identity: identity.clone(),
            reason: self.error.clone().unwrap_or_else(over),
        }
    }
}

/// A panic while a slot was locked leaves it consistent: fields are set together at the end.
fn lock(slot: &Mutex<Slot>) -> MutexGuard<'_, Slot> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
