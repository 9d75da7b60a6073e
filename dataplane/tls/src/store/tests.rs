use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, mpsc};
use std::thread;

use super::*;
use crate::common::{authority, identity};

const TTL: Duration = Duration::from_secs(1000);

/// An issuer that counts and can be made to fail or to wait.
#[derive(Debug)]
struct Scripted {
    authority: Authority,
    issued: AtomicUsize,
    failing: AtomicBool,
    gate: Mutex<Option<mpsc::Receiver<()>>>,
}

impl Issuer for Scripted {
    fn issue(&self, identity: &Identity) -> Result<WorkloadCertificate, IssueError> {
        self.issued.fetch_add(1, Ordering::SeqCst);
        if let Some(gate) = self.gate.lock().unwrap().take() {
            gate.recv().unwrap();
        }
        if self.failing.load(Ordering::SeqCst) {
            return Err("the CA is on holiday".into());
        }
        Ok(self.authority.issue(identity, TTL)?)
    }
}

fn store() -> (Arc<Scripted>, CertificateStore) {
    let issuer = Arc::new(Scripted {
        authority: authority("mesh"),
        issued: AtomicUsize::new(0),
        failing: AtomicBool::new(false),
        gate: Mutex::new(None),
    });
    let shared: Arc<Scripted> = Arc::clone(&issuer);
    (issuer, CertificateStore::new(shared))
}

/// A time after the start of validity of `tls`, in hundredths of its lifetime.
fn at(tls: &WorkloadTls, hundredths: u32) -> SystemTime {
    let info = tls.info();
    let lifetime = info.not_after.duration_since(info.not_before).unwrap();
    info.not_before + lifetime * hundredths / 100
}

#[test]
fn issued_once_and_renewed_at_half_lifetime() {
    let (issuer, store) = store();
    let id = identity("td", "web");
    let first = store.get(&id).unwrap();
    assert_eq!((first.generation, &first.identity), (1, &id));
    assert!(Arc::ptr_eq(
        &first,
        &store.get_at(&id, at(&first, 49)).unwrap()
    ));
    assert_eq!(issuer.issued.load(Ordering::SeqCst), 1);
    let second = store.get_at(&id, at(&first, 50)).unwrap();
    assert_eq!(second.generation, 2);
    assert_ne!(first.info().serial, second.info().serial);
}

#[test]
fn valid_certificates_are_kept_while_renewal_fails() {
    let (issuer, store) = store();
    let id = identity("td", "web");
    let first = store.get(&id).unwrap();
    issuer.failing.store(true, Ordering::SeqCst);
    let later = at(&first, 60);
    for _ in 0..5 {
        assert!(Arc::ptr_eq(&first, &store.get_at(&id, later).unwrap()));
    }
    assert_eq!(
        issuer.issued.load(Ordering::SeqCst),
        2,
        "one attempt, then a pause"
    );
    let error = store.list()[0].error.clone().unwrap();
    assert_eq!(&*error, "the CA is on holiday");

    let over = at(&first, 101);
    let error = store.get_at(&id, over).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("no certificate for {id}: the CA is on holiday")
    );

    issuer.failing.store(false, Ordering::SeqCst);
    assert!(store.get_at(&id, over).is_err(), "still pausing");
    let second = store.get_at(&id, over + Duration::from_secs(3)).unwrap();
    assert_eq!(second.generation, 2);
    assert_eq!(store.list()[0].error, None);
}

#[test]
fn pauses_grow_to_a_limit() {
    let (issuer, store) = store();
    issuer.failing.store(true, Ordering::SeqCst);
    let id = identity("td", "web");
    let start = SystemTime::now();
    let mut attempts = Vec::new();
    for second in 0..1000 {
        let before = issuer.issued.load(Ordering::SeqCst);
        store
            .get_at(&id, start + Duration::from_secs(second))
            .unwrap_err();
        if issuer.issued.load(Ordering::SeqCst) > before {
            attempts.push(second);
        }
    }
    let pauses: Vec<u64> = attempts.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 150, 150, 150, 150]);
}

#[test]
fn others_do_not_wait_for_a_renewal() {
    let (issuer, store) = store();
    let id = identity("td", "web");
    let first = store.get(&id).unwrap();
    let due = at(&first, 70);
    let (open, gate) = mpsc::channel();
    *issuer.gate.lock().unwrap() = Some(gate);
    thread::scope(|scope| {
        let renewal = scope.spawn(|| store.get_at(&id, due).unwrap());
        while issuer.issued.load(Ordering::SeqCst) < 2 {
            thread::yield_now();
        }
        // The renewal is stuck at its gate: this returns all the same.
        assert!(Arc::ptr_eq(&first, &store.get_at(&id, due).unwrap()));
        open.send(()).unwrap();
        assert_eq!(renewal.join().unwrap().generation, 2);
    });
    assert_eq!(issuer.issued.load(Ordering::SeqCst), 2);
}

#[test]
fn concurrent_first_uses_issue_once() {
    let (issuer, store) = store();
    let id = identity("td", "web");
    let barrier = Barrier::new(8);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                barrier.wait();
                assert_eq!(store.get(&id).unwrap().generation, 1);
            });
        }
    });
    assert_eq!(issuer.issued.load(Ordering::SeqCst), 1);
}

#[test]
fn identities_are_listed_and_dropped() {
    let (_, store) = store();
    for name in ["b", "a", "c"] {
        store.get(&identity("td", name)).unwrap();
    }
    let accounts = |store: &CertificateStore| -> Vec<String> {
        let list = store.list();
        assert!(list.iter().all(|status| status.current.is_some()));
        list.iter()
            .map(|status| status.identity.service_account().to_owned())
            .collect()
    };
    assert_eq!(accounts(&store), ["a", "b", "c"]);
    store.retain(|identity| identity.service_account() != "b");
    assert_eq!(accounts(&store), ["a", "c"]);
}

#[test]
fn local_issuer_gives_usable_certificates() {
    let issuer = LocalIssuer::new(authority("mesh"), TTL);
    let store = CertificateStore::new(Arc::new(issuer));
    let id = identity("td", "web");
    let tls = store.get(&id).unwrap();
    assert_eq!(tls.server.trust_domain(), "td");
    assert!(SystemTime::now() < tls.info().not_after);
}
