use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use rt::{Runtime, RuntimeConfig};

use super::*;
use crate::issuer::{Issuer, Issuing};
use crate::manager::tests::authority;
use crate::{Handle, Manager};

/// A test that takes longer than this hangs.
const HANG: Duration = Duration::from_secs(30);

fn identity(number: usize) -> Identity {
    Identity::new("td", "default", &format!("w{number}")).unwrap()
}

/// Issues in this process, and notes on which threads.
#[derive(Debug)]
struct Noting {
    local: crate::LocalIssuer,
    threads: Mutex<Vec<(Identity, thread::ThreadId)>>,
    failing: bool,
}

impl Issuer for Noting {
    fn issue<'a>(&'a self, identity: &'a Identity) -> Issuing<'a> {
        let note = (identity.clone(), thread::current().id());
        self.threads.lock().unwrap().push(note);
        match self.failing {
            true => Box::pin(async { Err("the CA is on holiday".into()) }),
            false => self.local.issue(identity),
        }
    }
}

/// A manager on a thread of its own, and feeds for workers.
fn start<const N: usize>(failing: bool) -> (Arc<Noting>, Handle, [CertificateFeed; N]) {
    let issuer = Arc::new(Noting {
        local: crate::LocalIssuer::new(authority(), Duration::from_secs(3600)),
        threads: Mutex::default(),
        failing,
    });
    let mut manager = Manager::new(Arc::<Noting>::clone(&issuer));
    let (handle, feeds) = (manager.handle(), std::array::from_fn(|_| manager.feed()));
    thread::spawn(move || {
        let mut control = tokio::runtime::Builder::new_current_thread();
        control
            .enable_all()
            .build()
            .unwrap()
            .block_on(manager.run());
    });
    (issuer, handle, feeds)
}

/// Runs `main` as a worker with `feed`.
fn work<T, F: Future<Output = T>>(
    feed: CertificateFeed,
    main: impl FnOnce(Rc<Certificates>) -> F,
) -> T {
    let mut runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let main = async {
        let (certificates, follow) = feed.open();
        rt::spawn(follow);
        main(certificates).await
    };
    let result = runtime.run(async { rt::time::timeout(HANG, main).await });
    result.unwrap().expect("the test hangs")
}

async fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        rt::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Two workers, many connections, few identities: each is issued once, and on no worker.
#[test]
fn workers_wait_for_one_answer_and_sign_nothing() {
    let (issuer, _handle, feeds) = start::<2>(false);
    let workers = feeds.map(|feed| {
        thread::spawn(move || {
            work(feed, |certificates| async move {
                let done = Rc::new(Cell::new(0));
                for number in 0..60 {
                    let (certificates, done) = (Rc::clone(&certificates), Rc::clone(&done));
                    rt::spawn(async move {
                        let identity = identity(number % 20);
                        let tls = certificates.get(&identity).await.unwrap();
                        assert_eq!((&tls.identity, tls.generation), (&identity, 1));
                        done.set(done.get() + 1);
                    });
                }
                until(|| done.get() == 60).await;
                assert_eq!(certificates.waiting(), 0);
                assert!(certificates.waiting.borrow().is_empty());
            });
            thread::current().id()
        })
    });
    let workers = workers.map(|worker| worker.join().unwrap());
    let threads = issuer.threads.lock().unwrap();
    assert_eq!(threads.len(), 20);
    for (identity, thread) in &*threads {
        assert!(
            !workers.contains(thread),
            "{identity} was signed on a worker"
        );
    }
}

/// What was fetched ahead is there without a wait, and without a request.
#[test]
fn what_was_fetched_ahead_is_found_by_a_look() {
    let (issuer, handle, [feed]) = start(false);
    handle.want((0..5).map(|number| (identity(number), true)).collect());
    work(feed, |certificates| async move {
        until(|| (0..5).all(|number| certificates.ready(&identity(number)).is_some())).await;
        assert!(certificates.ready(&identity(5)).is_none());
    });
    assert_eq!(issuer.threads.lock().unwrap().len(), 5);
}

#[test]
fn who_waits_in_vain_is_told_why_and_others_are_told_at_once() {
    let (_, _handle, [feed]) = start(true);
    work(feed, |certificates| async move {
        let identity = identity(0);
        let first = certificates.get(&identity).await.unwrap_err();
        assert_eq!(&*first.reason, "the CA is on holiday");
        let mut again = std::pin::pin!(certificates.get(&identity));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(again.as_mut().poll(&mut cx).is_ready());
    });
}

/// A connection that leaves, and too many of them.
#[test]
fn waits_are_bounded_and_leave_nothing_behind() {
    let mut manager = Manager::new(Arc::new(crate::LocalIssuer::new(authority(), HANG)));
    let feed = manager.feed(); // and nobody runs it
    work(feed, |certificates| async move {
        let mut cx = Context::from_waker(Waker::noop());
        let identities = [identity(0), identity(1)];
        let waits = (0..WAITING_MAX).map(|number| {
            let mut wait = Box::pin(certificates.get(&identities[number % 2]));
            assert!(wait.as_mut().poll(&mut cx).is_pending());
            wait
        });
        let waits: Vec<_> = waits.collect();
        assert_eq!(certificates.waiting(), WAITING_MAX);
        let refused = certificates.get(&identity(2)).await.unwrap_err();
        assert!(refused.reason.contains("too many connections"), "{refused}");
        drop(waits);
        assert_eq!(certificates.waiting(), 0);
        assert!(certificates.waiting.borrow().is_empty());
    });
}
