use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, mpsc};
use std::thread;

use super::*;
use crate::common::{authority, identity};

const TTL: Duration = Duration::from_secs(1000);

/// Clocks that tests set.
#[derive(Debug)]
struct FakeClock(Mutex<(SystemTime, Instant)>);

impl FakeClock {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new((SystemTime::now(), Instant::now()))))
    }

    /// Lets this much time pass.
    fn pass(&self, time: Duration) {
        let mut clocks = self.0.lock().unwrap();
        clocks.0 += time;
        clocks.1 += time;
    }

    /// Corrects the time of day; no time passes.
    fn correct(&self, time_of_day: SystemTime) {
        self.0.lock().unwrap().0 = time_of_day;
    }
}

impl Clock for FakeClock {
    fn time_of_day(&self) -> SystemTime {
        self.0.lock().unwrap().0
    }

    fn monotonic(&self) -> Instant {
        self.0.lock().unwrap().1
    }
}

/// An issuer that counts and can be made to fail or to wait.
#[derive(Debug)]
struct Scripted {
    authority: Authority,
    clock: Arc<FakeClock>,
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
        let now = self.clock.time_of_day();
        Ok(self.authority.issue_at(identity, now, TTL)?)
    }
}

fn store() -> (Arc<Scripted>, CertificateStore) {
    let clock = FakeClock::new();
    let issuer = Arc::new(Scripted {
        authority: authority("mesh"),
        clock: Arc::clone(&clock),
        issued: AtomicUsize::new(0),
        failing: AtomicBool::new(false),
        gate: Mutex::new(None),
    });
    let shared: Arc<Scripted> = Arc::clone(&issuer);
    (issuer, CertificateStore::new(shared).with_clock(clock))
}

impl Scripted {
    fn issued(&self) -> usize {
        self.issued.load(Ordering::SeqCst)
    }

    /// Lets time pass until so many hundredths of the lifetime of `tls` are over.
    fn pass_to(&self, tls: &WorkloadTls, hundredths: u32) {
        let info = tls.info();
        let lifetime = info.not_after.duration_since(info.not_before).unwrap();
        let then = info.not_before + lifetime * hundredths / 100;
        let now = self.clock.time_of_day();
        self.clock.pass(then.duration_since(now).unwrap());
    }
}

#[test]
fn issued_once_and_renewed_at_half_lifetime() {
    let (issuer, store) = store();
    let id = identity("td", "web");
    let first = store.get(&id).unwrap();
    assert_eq!((first.generation, &first.identity), (1, &id));
    issuer.pass_to(&first, 49);
    assert!(Arc::ptr_eq(&first, &store.get(&id).unwrap()));
    assert_eq!(issuer.issued(), 1);
    issuer.pass_to(&first, 50);
    let second = store.get(&id).unwrap();
    assert_eq!(second.generation, 2);
    assert_ne!(first.info().serial, second.info().serial);
}

#[test]
fn valid_certificates_are_kept_while_renewal_fails() {
    let (issuer, store) = store();
    let id = identity("td", "web");
    let first = store.get(&id).unwrap();
    issuer.failing.store(true, Ordering::SeqCst);
    issuer.pass_to(&first, 60);
    for _ in 0..5 {
        assert!(Arc::ptr_eq(&first, &store.get(&id).unwrap()));
    }
    assert_eq!(issuer.issued(), 2, "one attempt, then a pause");
    let error = store.list()[0].error.clone().unwrap();
    assert_eq!(&*error, "the CA is on holiday");

    issuer.pass_to(&first, 101);
    let error = store.get(&id).unwrap_err().to_string();
    let expected = format!("no certificate for {id}: the CA is on holiday");
    assert_eq!(error, expected);

    issuer.failing.store(false, Ordering::SeqCst);
    assert!(store.get(&id).is_err(), "still pausing");
    issuer.clock.pass(Duration::from_secs(3));
    let second = store.get(&id).unwrap();
    assert_eq!(second.generation, 2);
    assert_eq!(store.list()[0].error, None);
}

#[test]
fn pauses_grow_to_a_limit() {
    let (issuer, store) = store();
    issuer.failing.store(true, Ordering::SeqCst);
    let id = identity("td", "web");
    let mut attempts = Vec::new();
    for second in 0..1000 {
        let before = issuer.issued();
        store.get(&id).unwrap_err();
        if issuer.issued() > before {
            attempts.push(second);
        }
        issuer.clock.pass(Duration::from_secs(1));
    }
    let pauses: Vec<i32> = attempts.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 150, 150, 150, 150]);
}

const HOURS: Duration = Duration::from_secs(3 * 3600);

/// A node that boots with its clock hours ahead, or behind, and is then corrected: what it issued
/// before is not valid by the right time, and must not be shown to anyone.
#[test]
fn a_corrected_clock_makes_certificates_new() {
    for ahead in [true, false] {
        let (issuer, store) = store();
        let right = issuer.clock.time_of_day();
        let wrong = if ahead { right + HOURS } else { right - HOURS };
        issuer.clock.correct(wrong);
        let id = identity("td", "web");
        let first = store.get(&id).unwrap();
        assert_eq!(first.info().validity(wrong), Validity::Valid);
        issuer.clock.correct(right);
        let second = store.get(&id).unwrap();
        assert_eq!(second.info().validity(right), Validity::Valid, "{ahead}");
        assert_eq!((second.generation, issuer.issued()), (2, 2));
        // And no more than that.
        assert!(Arc::ptr_eq(&second, &store.get(&id).unwrap()));
    }
}

/// Where nothing can be issued, one that is not valid yet is not a way out, and why is told.
#[test]
fn what_is_not_valid_yet_is_not_used() {
    let (issuer, store) = store();
    let right = issuer.clock.time_of_day();
    issuer.clock.correct(right + HOURS);
    let id = identity("td", "web");
    store.get(&id).unwrap();
    issuer.clock.correct(right);
    issuer.failing.store(true, Ordering::SeqCst);
    assert!(store.get(&id).is_err());
    // It is as good as any other once its time has come.
    issuer.clock.pass(HOURS);
    assert_eq!(store.get(&id).unwrap().generation, 1);
    // One that comes from a CA whose clock is ahead is refused by its words.
    let info = store.get(&id).unwrap().info().clone();
    let early = info.validity(info.not_before - Duration::from_secs(90));
    assert_eq!(early, Validity::NotYet(Duration::from_secs(90)));
    assert!(early.to_string().starts_with("not valid yet, for 90 s"));
    assert_eq!(info.validity(info.not_after), Validity::Over);
}

/// A CA whose clock is ahead of this node's.
#[derive(Debug)]
struct Ahead(Authority);

impl Issuer for Ahead {
    fn issue(&self, identity: &Identity) -> Result<WorkloadCertificate, IssueError> {
        let then = SystemTime::now() + HOURS;
        Ok(self.0.issue_at(identity, then, TTL)?)
    }
}

#[test]
fn a_certificate_of_the_future_is_refused_when_it_comes() {
    let store = CertificateStore::new(Arc::new(Ahead(authority("mesh"))));
    let error = store.get(&identity("td", "web")).unwrap_err().to_string();
    assert!(error.contains("issued is not valid yet, for 10"), "{error}");
}

/// Pauses last as long as they last, whatever is done to the time of day meanwhile.
#[test]
fn a_corrected_clock_changes_no_pause() {
    for correction in [true, false] {
        let (issuer, store) = store();
        issuer.failing.store(true, Ordering::SeqCst);
        let id = identity("td", "web");
        let right = issuer.clock.time_of_day();
        if correction {
            issuer.clock.correct(right + HOURS);
        }
        for pause in [1, 2, 4] {
            store.get(&id).unwrap_err();
            issuer.clock.pass(Duration::from_secs(pause));
        }
        store.get(&id).unwrap_err();
        assert_eq!(issuer.issued(), 4);
        issuer.failing.store(false, Ordering::SeqCst);
        // Back by hours, or ahead.
        issuer
            .clock
            .correct(if correction { right } else { right + HOURS });
        assert!(store.get(&id).is_err(), "the pause of 8 s has not passed");
        issuer.clock.pass(Duration::from_secs(8));
        assert_eq!(store.get(&id).unwrap().generation, 1);
    }
}

#[test]
fn others_do_not_wait_for_a_renewal() {
    let (issuer, store) = store();
    let id = identity("td", "web");
    let first = store.get(&id).unwrap();
    issuer.pass_to(&first, 70);
    let (open, gate) = mpsc::channel();
    *issuer.gate.lock().unwrap() = Some(gate);
    thread::scope(|scope| {
        let renewal = scope.spawn(|| store.get(&id).unwrap());
        while issuer.issued.load(Ordering::SeqCst) < 2 {
            thread::yield_now();
        }
        // The renewal is stuck at its gate: this returns all the same.
        assert!(Arc::ptr_eq(&first, &store.get(&id).unwrap()));
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
