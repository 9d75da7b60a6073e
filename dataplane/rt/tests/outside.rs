//! Outside `Runtime::run` there is no current runtime, whatever has run before.
#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]

use std::net::{Ipv4Addr, TcpListener};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use rt::net::Listener;
use rt::{Backend, Runtime};

mod both;

use both::{both_back_ends, with};

/// Everything that is documented to panic outside.
fn nothing_is_current(when: &str) {
    let panics = |what: &str, job: fn()| {
        assert!(catch_unwind(job).is_err(), "{what}, {when}");
    };
    panics("spawn", || rt::spawn(async {}));
    panics("sleep", || drop(rt::time::sleep(Duration::ZERO)));
    panics("listener", || {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        drop(Listener::from_std(listener));
    });
}

fn run_leaves_nothing_current(backend: Backend) {
    let mut runtime = Runtime::new(with(backend)).unwrap();
    nothing_is_current("before the first run");
    for round in 1..=3 {
        let answer = runtime.run(async {
            let signal = std::rc::Rc::new(rt::sync::Signal::default());
            rt::spawn({
                let signal = std::rc::Rc::clone(&signal);
                async move { signal.set() }
            });
            signal.wait().await;
            rt::time::sleep(Duration::from_millis(1)).await;
            round
        });
        assert_eq!(answer.unwrap(), round, "it runs again");
        nothing_is_current("after a run");
    }
    let broken = catch_unwind(AssertUnwindSafe(|| {
        runtime.run(async { panic!("a task's own fault") })
    }));
    assert!(broken.is_err());
    nothing_is_current("after a run that was broken off");
    drop(runtime);
    nothing_is_current("after its end");
}

both_back_ends! {
    run_leaves_nothing_current,
}
