//! Certificates of a CA made for the test, from a control thread of its own.

use std::fmt;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::thread;

use identity::{
    CertificateFeed, Certificates, Handle, Issuer, Manager, NoCertificate, WorkloadTls,
};
use mesh::Identity;
use tls::RecordPath;
use tokio::runtime;

/// Workers that one store may serve.
const FEEDS: usize = 4;

pub(super) struct Store {
    handle: Handle,
    control: runtime::Handle,
    feeds: Mutex<Vec<CertificateFeed>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Store {
    pub(super) fn new(issuer: impl Issuer + 'static) -> Arc<Self> {
        Self::with_records(issuer, RecordPath::default())
    }

    pub(super) fn with_records(issuer: impl Issuer + 'static, records: RecordPath) -> Arc<Self> {
        let mut manager = Manager::new(Arc::new(issuer)).with_records(records);
        let handle = manager.handle();
        let feeds = (0..FEEDS).map(|_| manager.feed()).collect();
        let mut control = runtime::Builder::new_current_thread();
        let control = control.enable_all().build().unwrap();
        let reach = control.handle().clone();
        thread::spawn(move || control.block_on(manager.run()));
        Arc::new(Self {
            handle,
            control: reach,
            feeds: Mutex::new(feeds),
        })
    }

    /// For a worker.
    pub(super) fn feed(&self) -> CertificateFeed {
        let feed = self.feeds.lock().unwrap().pop();
        feed.expect("a worker more than a store may serve")
    }

    /// What a worker would have that knows these accounts and hears of no others.
    pub(super) fn certificates(&self, accounts: &[&str]) -> Rc<Certificates> {
        for account in accounts {
            self.get(&super::identity(account)).unwrap();
        }
        self.feed().open().0
    }

    /// For a peer that the test plays; waits for it on this thread.
    pub(super) fn get(&self, identity: &Identity) -> Result<Arc<WorkloadTls>, NoCertificate> {
        self.control.block_on(self.handle.certificate(identity))
    }
}
