//! Many connections at once that need more tunnels than there are.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hbone::{ConnectRequest, Event};

use super::end_to_end::key;
use super::pooling::{Far, against, connect};
use super::{listen, request};
use crate::context::Context;
use crate::tunnel::TunnelStream;

/// Answers whatever is asked, and notes the order in which it was asked.
fn answer_all(far: &mut Far, mut each: impl FnMut(&str)) {
    while let Some(event) = far.event() {
        if let Event::Request { id, head } = event {
            each(&head.authority);
            far.codec.respond(id, 200, None, false).unwrap();
            far.flush();
        }
    }
}

/// `count` connections at once, each with its number as the port it asks for. Returns their
/// streams and how often their tasks were run.
async fn all_at_once(
    context: &Rc<Context>,
    addr: SocketAddr,
    count: usize,
) -> (Vec<TunnelStream>, usize) {
    let streams: Rc<RefCell<Vec<TunnelStream>>> = Rc::default();
    let (polls, over) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    for number in 0..count {
        let (context, streams) = (Rc::clone(context), Rc::clone(&streams));
        let (polls, over) = (Rc::clone(&polls), Rc::clone(&over));
        rt::spawn(async move {
            let (authority, key) = (format!("10.0.0.1:{}", number + 1), key(addr));
            let request = ConnectRequest {
                authority: &authority,
                ..request()
            };
            let mut connecting = pin!(context.pool.connect(&context, &key, &request));
            let connected = poll_fn(|cx| {
                polls.set(polls.get() + 1);
                connecting.as_mut().poll(cx)
            });
            if let Ok(stream) = connected.await {
                streams.borrow_mut().push(stream);
            }
            over.set(over.get() + 1);
        });
    }
    while over.get() < count {
        rt::time::sleep(Duration::from_millis(1)).await;
    }
    (streams.take(), polls.get())
}

/// Each is woken for its own sake: when there is room for it, and when it is answered. What a
/// crowd costs grows as the crowd does and no faster.
#[test]
fn a_crowd_is_served_in_order_and_nobody_is_woken_for_another() {
    const CROWD: usize = 2_000;
    let asked: Arc<Mutex<HashMap<usize, Vec<u16>>>> = Arc::default();
    let far = {
        let asked = Arc::clone(&asked);
        move |number, mut far: Far| {
            answer_all(&mut far, |authority| {
                let port = authority.rsplit(':').next().unwrap().parse().unwrap();
                asked.lock().unwrap().entry(number).or_default().push(port);
            });
        }
    };
    against(
        |_| {},
        far,
        async |context, addr| {
            let (streams, polls) = all_at_once(&context, addr, CROWD).await;
            assert_eq!(streams.len(), CROWD);
            assert!(
                polls <= CROWD * 5,
                "{polls} polls of {CROWD} tasks: they are woken for each other"
            );
            let tunnels = context.pool.tunnels().len();
            assert!(
                (CROWD / 100..CROWD / 100 + 8).contains(&tunnels),
                "{tunnels} tunnels for {CROWD} streams"
            );
        },
    );
    for (tunnel, order) in asked.lock().unwrap().iter() {
        assert!(order.is_sorted(), "tunnel {tunnel}: {order:?}");
    }
}

/// The sibling: the destination takes few streams, and places come back one by one.
#[test]
fn those_who_wait_get_the_places_of_those_who_end() {
    let far = |_, mut far: Far| answer_all(&mut far, |_| {});
    let two = |config: &mut crate::config::ProxyConfig| config.client.max_concurrent_streams = 2;
    against(two, far, async |context, addr| {
        let (mut streams, _) = all_at_once(&context, addr, 12).await;
        assert_eq!(streams.len(), 12);
        let tunnels = context.pool.tunnels().len();
        assert!((6..=14).contains(&tunnels), "{tunnels}");
        while let Some(stream) = streams.pop() {
            drop(stream);
            drop(connect(&context, &key(addr)).await.unwrap());
        }
        assert_eq!(
            context.pool.tunnels().len(),
            tunnels,
            "none was opened since"
        );
    });
}

/// A destination that cannot be had costs one attempt, and all who wait learn of it together.
#[test]
fn a_crowd_that_cannot_be_served_fails_with_one_attempt() {
    super::run(async {
        let (listener, addr) = listen();
        drop(listener);
        let context = super::context("workloads: []", |_| {});
        let (streams, polls) = all_at_once(&context, addr, 500).await;
        assert!(streams.is_empty());
        assert!(polls <= 500 * 2, "{polls} polls");
        assert!(context.pool.tunnels().is_empty());
    });
}

/// Who gives up while it waits takes nothing along.
#[test]
fn a_waiter_that_leaves_gives_its_place_to_the_next() {
    let far = |_, mut far: Far| answer_all(&mut far, |_| {});
    against(
        |_| {},
        far,
        async |context, addr| {
            for _ in 0..20 {
                let key = key(addr);
                let request = request();
                let gone = rt::time::timeout(
                    Duration::from_micros(200),
                    context.pool.connect(&context, &key, &request),
                );
                drop(gone.await);
                drop(connect(&context, &key).await.unwrap());
            }
            assert_eq!(context.pool.tunnels().len(), 1);
            let tunnel = Rc::clone(&context.pool.tunnels()[0]);
            while tunnel.room() < 100 {
                rt::time::sleep(Duration::from_millis(1)).await;
            }
        },
    );
}
