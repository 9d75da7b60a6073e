use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Instant, SystemTime};

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose};
use tls::Authority;
use tokio::sync::oneshot;

use super::*;
use crate::issuer::Issuing;

const TTL: Duration = Duration::from_secs(1000);
const SECOND: Duration = Duration::from_secs(1);

fn identity(account: &str) -> Identity {
    Identity::new("td", "default", account).unwrap()
}

pub(crate) fn authority() -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap().pem();
    Authority::from_pem(certificate.as_bytes(), key.serialize_pem().as_bytes()).unwrap()
}

/// Tokio's virtual time, and a time of day that can be corrected.
#[derive(Debug)]
struct VirtualClock {
    started: (tokio::time::Instant, SystemTime),
    /// Seconds.
    correction: Mutex<i64>,
}

impl Clock for VirtualClock {
    fn time_of_day(&self) -> SystemTime {
        let now = self.started.1 + self.started.0.elapsed();
        let correction = *self.correction.lock().unwrap();
        let by = SECOND * correction.unsigned_abs() as u32;
        if correction < 0 { now - by } else { now + by }
    }

    fn monotonic(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }
}

type Answer = Result<(), &'static str>;

/// A CA that answers when it is told to, or at once.
#[derive(Debug)]
struct Scripted {
    authority: Authority,
    clock: Arc<VirtualClock>,
    /// Who asked, in order.
    asked: Mutex<Vec<String>>,
    held: Mutex<HashMap<String, oneshot::Sender<Answer>>>,
    hold: Mutex<bool>,
    failing: Mutex<Option<&'static str>>,
    /// By how far its clock is ahead of this machine's.
    ahead: Mutex<Duration>,
    /// Whom it gives a certificate, if not who was asked for.
    other: Mutex<Option<Identity>>,
}

impl Issuer for Scripted {
    fn issue<'a>(&'a self, identity: &'a Identity) -> Issuing<'a> {
        let account = identity.service_account().to_owned();
        self.asked.lock().unwrap().push(account.clone());
        let held = self.hold.lock().unwrap().then(|| {
            let (answer, held) = oneshot::channel();
            self.held.lock().unwrap().insert(account, answer);
            held
        });
        Box::pin(async move {
            if let Some(held) = held {
                held.await.unwrap()?;
            }
            if let Some(reason) = *self.failing.lock().unwrap() {
                return Err(reason.into());
            }
            let now = self.clock.time_of_day() + *self.ahead.lock().unwrap();
            let other = self.other.lock().unwrap().clone();
            let identity = other.as_ref().unwrap_or(identity);
            Ok(self.authority.issue_at(identity, now, TTL)?)
        })
    }
}

impl Scripted {
    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    fn answer(&self, account: &str, answer: Answer) {
        let held = self.held.lock().unwrap().remove(account);
        held.expect("it was asked for").send(answer).unwrap();
    }
}

struct Fixture {
    ca: Arc<Scripted>,
    clock: Arc<VirtualClock>,
    handle: Handle,
}

/// A manager that runs, in virtual time.
fn start() -> Fixture {
    let clock = Arc::new(VirtualClock {
        started: (tokio::time::Instant::now(), SystemTime::now()),
        correction: Mutex::new(0),
    });
    let ca = Arc::new(Scripted {
        authority: authority(),
        clock: Arc::clone(&clock),
        asked: Mutex::default(),
        held: Mutex::default(),
        hold: Mutex::default(),
        failing: Mutex::default(),
        ahead: Mutex::default(),
        other: Mutex::default(),
    });
    let issuer: Arc<Scripted> = Arc::clone(&ca);
    let manager = Manager::with_clock(issuer, Arc::<VirtualClock>::clone(&clock));
    let handle = manager.handle();
    tokio::spawn(manager.run());
    Fixture { ca, clock, handle }
}

impl Fixture {
    async fn get(&self, account: &str) -> Result<Arc<WorkloadTls>, NoCertificate> {
        self.handle.certificate(&identity(account)).await
    }

    /// Somebody who waits.
    fn wait(
        &self,
        account: &str,
    ) -> tokio::task::JoinHandle<Result<Arc<WorkloadTls>, NoCertificate>> {
        let (handle, identity) = (self.handle.clone(), identity(account));
        tokio::spawn(async move { handle.certificate(&identity).await })
    }

    fn want(&self, accounts: &[&str]) {
        let wanted = accounts.iter().map(|account| (identity(account), true));
        self.handle.want(wanted.collect());
    }

    fn hold(&self, hold: bool) {
        *self.ca.hold.lock().unwrap() = hold;
    }

    fn fail(&self, reason: Option<&'static str>) {
        *self.ca.failing.lock().unwrap() = reason;
    }

    fn correct(&self, by: i64) {
        *self.clock.correction.lock().unwrap() += by;
    }

    fn error(&self) -> Option<Arc<str>> {
        self.handle.list()[0].error.clone()
    }

    fn accounts(&self) -> Vec<String> {
        let list = self.handle.list();
        let account = |status: &CertificateStatus| status.identity.service_account().to_owned();
        list.iter().map(account).collect()
    }
}

/// Lets everything come to rest, without time passing.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

/// Lets time pass, and everything that is due meanwhile happen.
async fn pass(time: Duration) {
    tokio::time::sleep(time).await;
    settle().await;
}

#[tokio::test(start_paused = true)]
async fn issued_once_for_all_who_wait_and_renewed_by_timer_at_half_the_lifetime() {
    let fixture = start();
    let all: Vec<_> = (0..20).map(|_| fixture.wait("web")).collect();
    for waiting in all {
        assert_eq!(waiting.await.unwrap().unwrap().generation, 1);
    }
    let first = fixture.get("web").await.unwrap();
    assert_eq!(fixture.ca.asked(), ["web"]);
    // Nobody asks any more. The certificate's start lies two minutes back.
    let half = (TTL - SECOND * 120) / 2;
    pass(half - SECOND).await;
    assert_eq!(fixture.ca.asked().len(), 1);
    pass(SECOND * 2).await;
    assert_eq!(fixture.ca.asked(), ["web", "web"]);
    let second = fixture.get("web").await.unwrap();
    assert_eq!(second.generation, 2);
    assert_ne!(first.info().serial, second.info().serial);
}

#[tokio::test(start_paused = true)]
async fn valid_certificates_are_kept_while_renewal_fails() {
    let fixture = start();
    let first = fixture.get("web").await.unwrap();
    fixture.fail(Some("the CA is on holiday"));
    pass(TTL - SECOND * 2).await;
    assert!(Arc::ptr_eq(&first, &fixture.get("web").await.unwrap()));
    assert_eq!(fixture.error().as_deref(), Some("the CA is on holiday"));
    pass(SECOND * 2).await;
    let error = fixture.get("web").await.unwrap_err().to_string();
    let id = identity("web");
    let expected = format!("no certificate for {id}: the CA is on holiday");
    assert_eq!(error, expected);
    fixture.fail(None);
    pass(SECOND * 150).await;
    assert_eq!(fixture.get("web").await.unwrap().generation, 2);
    assert_eq!(fixture.error(), None);
}

#[tokio::test(start_paused = true)]
async fn eight_requests_are_under_way_at_most_and_connections_come_first() {
    let fixture = start();
    fixture.hold(true);
    let ahead: Vec<String> = (0..10).map(|number| format!("ahead{number}")).collect();
    fixture.want(&ahead.iter().map(String::as_str).collect::<Vec<_>>());
    settle().await;
    assert_eq!(fixture.ca.asked().len(), 8);
    let waiting = fixture.wait("awaited");
    settle().await;
    assert_eq!(fixture.ca.asked().len(), 8);
    let first = fixture.ca.asked()[0].clone();
    fixture.ca.answer(&first, Ok(()));
    settle().await;
    assert_eq!(fixture.ca.asked()[8..], ["awaited"]);
    fixture.ca.answer("awaited", Ok(()));
    assert_eq!(waiting.await.unwrap().unwrap().generation, 1);
}

/// A CA that never answers is not waited for for ever.
#[tokio::test(start_paused = true)]
async fn a_request_without_an_answer_is_given_up() {
    let fixture = start();
    fixture.hold(true);
    let waiting = fixture.wait("web");
    pass(ANSWER_MAX * 2 + SECOND * 2).await;
    let error = waiting.await.unwrap().unwrap_err();
    assert_eq!(&*error.reason, "the CA has not answered in 10 s");
    fixture.hold(false);
    pass(SECOND * 150).await;
    assert_eq!(fixture.get("web").await.unwrap().generation, 1);
}

/// What a CA says in the first moment of a pod's life is tried again before anyone is told.
#[tokio::test(start_paused = true)]
async fn who_waits_does_not_hear_of_a_first_failure() {
    let fixture = start();
    fixture.fail(Some("the CA has not heard of that pod"));
    let waiting = fixture.wait("web");
    settle().await;
    assert_eq!(fixture.ca.asked(), ["web"]);
    assert!(fixture.error().is_some() && !waiting.is_finished());
    fixture.fail(None);
    let started = tokio::time::Instant::now();
    assert_eq!(waiting.await.unwrap().unwrap().generation, 1);
    assert!(started.elapsed() <= SECOND + Duration::from_millis(10));
}

/// A node that boots with its clock hours ahead, or behind, and is then corrected: what was issued
/// before is not valid by the right time, and is shown to nobody.
#[tokio::test(start_paused = true)]
async fn a_corrected_clock_makes_certificates_new() {
    let hours = 3 * 3600;
    for wrong in [hours, -hours] {
        for idle in [true, false] {
            let fixture = start();
            fixture.correct(wrong);
            let first = fixture.get("web").await.unwrap();
            assert_eq!(first.generation, 1);
            fixture.correct(-wrong);
            if idle {
                pass(SECOND * 30).await; // by itself
                assert_eq!(fixture.ca.asked().len(), 2);
            }
            let second = fixture.get("web").await.unwrap();
            let now = fixture.clock.time_of_day();
            assert_eq!(second.info().validity(now), Validity::Valid);
            pass(SECOND * 60).await;
            let third = fixture.get("web").await.unwrap();
            assert_eq!((second.generation, third.generation), (2, 2), "{wrong}");
        }
    }
}

/// Where nothing can be issued, one that is not valid yet is not a way out.
#[tokio::test(start_paused = true)]
async fn what_is_not_valid_yet_is_not_used() {
    let fixture = start();
    fixture.correct(3 * 3600);
    fixture.get("web").await.unwrap();
    fixture.correct(-3 * 3600);
    fixture.fail(Some("the CA is on holiday"));
    assert!(fixture.get("web").await.is_err());
    // It is as good as any other once its time has come.
    fixture.correct(3 * 3600);
    assert_eq!(fixture.get("web").await.unwrap().generation, 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_not_what_was_asked_for_is_refused_when_it_comes() {
    let fixture = start();
    *fixture.ca.ahead.lock().unwrap() = SECOND * 3600;
    let error = fixture.get("early").await.unwrap_err().to_string();
    assert!(
        error.contains("that was issued is not valid yet, for 34"),
        "{error}"
    );
    *fixture.ca.ahead.lock().unwrap() = Duration::ZERO;
    *fixture.ca.other.lock().unwrap() = Some(identity("mallory"));
    let error = fixture.get("web").await.unwrap_err().to_string();
    let expected = "that was issued is of spiffe://td/ns/default/sa/mallory";
    assert!(error.contains(expected), "{error}");
}

/// Fetched before anyone asks, listed, and dropped with the last pod.
#[tokio::test(start_paused = true)]
async fn identities_are_fetched_ahead_listed_and_forgotten() {
    let fixture = start();
    fixture.want(&["b", "a", "c"]);
    settle().await;
    assert_eq!(fixture.accounts(), ["a", "b", "c"]);
    assert!(
        fixture
            .handle
            .list()
            .iter()
            .all(|status| status.current.is_some())
    );
    let b = fixture.get("b").await.unwrap();
    assert_eq!(fixture.ca.asked().len(), 3);
    fixture.want(&["a", "c"]);
    settle().await;
    assert_eq!(fixture.accounts(), ["a", "c"]);
    assert_eq!(b.generation, 1, "connections that use it go on");
}

/// Each certificate judges peers by the roots it came with: another CA's from the renewal on.
#[tokio::test(start_paused = true)]
async fn roots_come_with_each_certificate() {
    #[derive(Debug)]
    struct Rotating(Mutex<Vec<Authority>>, Arc<VirtualClock>);
    impl Issuer for Rotating {
        fn issue<'a>(&'a self, identity: &'a Identity) -> Issuing<'a> {
            Box::pin(async {
                let authority = self.0.lock().unwrap().pop().unwrap();
                Ok(authority.issue_at(identity, self.1.time_of_day(), TTL)?)
            })
        }
    }
    let clock = start().clock;
    let issuer = Rotating(
        Mutex::new(vec![authority(), authority()]),
        Arc::clone(&clock),
    );
    let manager = Manager::with_clock(Arc::new(issuer), clock);
    let handle = manager.handle();
    tokio::spawn(manager.run());
    let first = handle.certificate(&identity("web")).await.unwrap();
    pass(TTL / 2).await;
    let second = handle.certificate(&identity("web")).await.unwrap();
    assert_eq!((first.generation, second.generation), (1, 2));
    let roots = |tls: &WorkloadTls| tls.certificate().roots().to_vec();
    assert_ne!(roots(&first), roots(&second));
}

#[tokio::test(start_paused = true)]
async fn it_ends_with_those_who_use_it() {
    let manager = Manager::new(Arc::new(crate::LocalIssuer::new(authority(), TTL)));
    let handle = manager.handle();
    let running = tokio::spawn(manager.run());
    handle.certificate(&identity("web")).await.unwrap();
    drop(handle);
    running.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn connections_leave_their_records_to_whom_was_chosen() {
    for records in [RecordPath::Own, RecordPath::Rustls] {
        let issuer = Arc::new(crate::LocalIssuer::new(authority(), TTL));
        let manager = Manager::new(issuer).with_records(records);
        let handle = manager.handle();
        tokio::spawn(manager.run());
        let tls = handle.certificate(&identity("web")).await.unwrap();
        assert_eq!(tls.server.records(), records);
        assert_eq!(tls.client.records(), records);
    }
}
