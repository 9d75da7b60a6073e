//! The pool against a peer that refuses, goes away, falls silent or dies.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use hbone::{Config, Connection, ErrorCode, Event, Role, StreamId};
use identity::WorkloadTls;
use telemetry::Fault;

use super::end_to_end::key;
use super::peer::{Peer, Received};
use super::{context, identity, listen, request, run};
use crate::config::ProxyConfig;
use crate::context::Context;
use crate::error::ProxyError;
use crate::pool::Key;
use crate::tunnel::{Tunnel, TunnelStream};

/// A server's end of a tunnel whose HTTP/2 the test plays.
pub(super) struct Far {
    pub(super) peer: Peer,
    pub(super) codec: Connection,
    events: std::collections::VecDeque<Event>,
}

impl Far {
    fn accept(stream: TcpStream, tls: &WorkloadTls) -> Self {
        Self {
            peer: Peer::accept(stream, tls),
            codec: Connection::new(Role::Server, &Config::server()),
            events: Default::default(),
        }
    }

    pub(super) fn flush(&mut self) {
        let plaintext = self.codec.output().to_vec();
        self.codec.consume_output(plaintext.len());
        let _ = self.peer.send(&plaintext); // the other end may have closed
    }

    /// The next event, answering PINGs and SETTINGS; none at the end.
    pub(super) fn event(&mut self) -> Option<Event> {
        loop {
            self.flush();
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            match self.peer.receive()? {
                Received::Data(data) => self.codec.receive(&data, &mut self.events).unwrap(),
                Received::Control => {}
                Received::Closed => return None,
                Received::Failed(error) => panic!("{error}"),
            }
        }
    }

    pub(super) fn request(&mut self) -> StreamId {
        loop {
            if let Event::Request { id, .. } = self.event().expect("a request") {
                return id;
            }
        }
    }

    pub(super) fn accept_request(&mut self) -> StreamId {
        let id = self.request();
        self.codec.respond(id, 200, None, false).unwrap();
        self.flush();
        id
    }

    pub(super) fn until_closed(&mut self) {
        while self.event().is_some() {}
    }
}

/// Runs `near` against peers played by `far`, which gets each accepted connection's number.
pub(super) fn against<T>(
    change: impl FnOnce(&mut ProxyConfig),
    far: impl Fn(usize, Far) + Send + Sync + 'static,
    near: impl AsyncFnOnce(Rc<Context>, SocketAddr) -> T,
) -> T {
    let context = context("workloads: []", change);
    let tls = context.certificates.ready(&identity("server")).unwrap();
    let (listener, addr) = listen();
    let far = Arc::new(far);
    thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let (far, tls) = (Arc::clone(&far), Arc::clone(&tls));
            thread::spawn(move || far(number, Far::accept(stream.unwrap(), &tls)));
        }
    });
    run(near(context, addr))
}

pub(super) async fn connect(context: &Rc<Context>, key: &Key) -> Result<TunnelStream, ProxyError> {
    context.pool.connect(context, key, &request()).await
}

/// REFUSED_STREAM says that nothing was processed: once more, on another tunnel.
#[test]
fn a_refused_request_is_sent_once_more() {
    let far = |number, mut far: Far| {
        let id = far.request();
        match number {
            0 => {
                far.codec.reset(id, ErrorCode::REFUSED_STREAM);
                far.flush();
            }
            _ => {
                far.codec.respond(id, 200, None, false).unwrap();
                far.flush();
            }
        }
        far.until_closed();
    };
    against(
        |_| {},
        far,
        async |context, addr| {
            let stream = connect(&context, &key(addr)).await.unwrap();
            assert_eq!(context.telemetry.events(telemetry::Event::Retry), 1);
            let open = |tunnel: &Rc<Tunnel>| tunnel.can_open();
            let usable = context.pool.tunnels().into_iter().filter(open).count();
            assert_eq!(usable, 1, "the one that refused is not used again");
            drop(stream);
        },
    );
}

/// GOAWAY with a lower last stream says the same of the streams above it, and only of those.
#[test]
fn a_request_behind_goaway_is_sent_once_more() {
    let far = |number, mut far: Far| {
        if number == 0 {
            far.accept_request();
            far.request();
            let mut go_away = vec![0, 0, 8, 7, 0, 0, 0, 0, 0];
            go_away.extend([0, 0, 0, 1, 0, 0, 0, 0]);
            far.flush();
            far.peer.send(&go_away).unwrap();
        } else {
            far.accept_request();
        }
        far.until_closed();
    };
    against(
        |_| {},
        far,
        async |context, addr| {
            let kept = connect(&context, &key(addr)).await.unwrap();
            let moved = connect(&context, &key(addr)).await.unwrap();
            assert_eq!(context.telemetry.events(telemetry::Event::Retry), 1);
            assert!(!Rc::ptr_eq(kept.tunnel(), moved.tunnel()));
            assert!(kept.tunnel().error().is_none(), "its stream goes on");
        },
    );
}

/// Not twice, and not when the server may have seen the connection.
#[test]
fn other_failures_are_final() {
    let refuses = |_, mut far: Far| {
        loop {
            let id = far.request();
            far.codec.reset(id, ErrorCode::REFUSED_STREAM);
            far.flush();
        }
    };
    against(
        |_| {},
        refuses,
        async |context, addr| {
            assert!(connect(&context, &key(addr)).await.is_err());
            assert_eq!(context.telemetry.events(telemetry::Event::Retry), 1);
        },
    );
    let dies = |_, mut far: Far| {
        far.request();
    };
    against(
        |_| {},
        dies,
        async |context, addr| {
            assert!(connect(&context, &key(addr)).await.is_err());
            assert_eq!(context.telemetry.events(telemetry::Event::Retry), 0);
            let ends =
                [Fault::Truncated, Fault::Io].map(|fault| context.telemetry.hbone_errors(fault));
            assert_eq!(ends.iter().sum::<u64>(), 1);
        },
    );
}

/// A peer that takes one stream at a time gets the second on another tunnel, and is used again
/// when the first has ended.
#[test]
fn a_tunnel_that_refuses_is_left_alone_until_it_has_room() {
    let far = |number, mut far: Far| {
        let first = far.accept_request();
        if number == 0 {
            let second = far.request();
            far.codec.reset(second, ErrorCode::REFUSED_STREAM);
            while !matches!(far.event(), Some(Event::Reset { id, .. }) if id == first) {}
        }
        far.accept_request();
        far.until_closed();
    };
    against(
        |_| {},
        far,
        async |context, addr| {
            let first = connect(&context, &key(addr)).await.unwrap();
            let tunnel = Rc::clone(first.tunnel());
            let second = connect(&context, &key(addr)).await.unwrap();
            assert!(!Rc::ptr_eq(&tunnel, second.tunnel()) && !tunnel.can_open());
            drop(first);
            let third = connect(&context, &key(addr)).await.unwrap();
            assert!(Rc::ptr_eq(&tunnel, third.tunnel()));
        },
    );
}

/// Every part of the key keeps tunnels apart; what is equal shares one.
#[test]
fn tunnels_are_shared_by_equal_keys_only() {
    let far = |_, mut far: Far| loop {
        far.accept_request();
    };
    against(
        |_| {},
        far,
        async |context, addr| {
            let same = key(addr);
            let source = Some(IpAddr::V4(Ipv4Addr::LOCALHOST));
            let names: Arc<[Arc<str>]> = [Arc::from("spiffe://other/ns/a/sa/b")].into();
            let others = [
                Key {
                    identity: identity("stranger"),
                    ..same.clone()
                },
                Key {
                    expected: [identity("other"), identity("server")].into(),
                    ..same.clone()
                },
                Key {
                    names,
                    ..same.clone()
                },
                Key {
                    source,
                    ..same.clone()
                },
            ];
            let first = connect(&context, &same).await.unwrap();
            let again = connect(&context, &same.clone()).await.unwrap();
            assert!(Rc::ptr_eq(first.tunnel(), again.tunnel()));
            let mut streams = vec![first, again];
            for other in &others {
                let stream = connect(&context, other).await.unwrap();
                assert!(
                    streams
                        .iter()
                        .all(|s| !Rc::ptr_eq(s.tunnel(), stream.tunnel()))
                );
                streams.push(stream);
            }
            assert_eq!(context.pool.tunnels().len(), 1 + others.len());
        },
    );
}

/// A tunnel that nobody has used for a while is closed; one that is in use is not.
#[test]
fn idle_tunnels_are_closed() {
    let far = |_, mut far: Far| {
        far.accept_request();
        far.until_closed();
    };
    against(
        |_| {},
        far,
        async |context, addr| {
            let stream = connect(&context, &key(addr)).await.unwrap();
            let tunnel = Rc::clone(stream.tunnel());
            let unused = Duration::from_millis(30);
            rt::time::sleep(unused * 2).await;
            context.pool.close_unused(unused);
            assert_eq!(context.pool.tunnels().len(), 1);
            drop(stream);
            context.pool.close_unused(unused * 1_000);
            assert_eq!(context.pool.tunnels().len(), 1, "used a moment ago");
            rt::time::sleep(unused * 2).await;
            context.pool.close_unused(unused);
            assert_eq!(context.pool.tunnels().len(), 0);
            while !tunnel.has_ended() {
                rt::time::sleep(Duration::from_millis(2)).await;
            }
        },
    );
}

/// A peer that is gone without a word, as after its node lost power: PING notices it, streams end
/// and the next connection gets another tunnel. One that answers lives on, however long it is idle.
#[test]
fn stale_tunnels_are_noticed() {
    let far = |number, mut far: Far| {
        far.accept_request();
        match number {
            0 => thread::sleep(Duration::from_secs(30)), // neither reads nor closes
            _ => far.until_closed(),
        }
    };
    let quick = |config: &mut ProxyConfig| {
        config.ping_interval = Duration::from_millis(40);
        // Who lives answers sooner, on a busy machine, too.
        config.ping_timeout = Duration::from_secs(2);
    };
    against(quick, far, async |context, addr| {
        let stale = connect(&context, &key(addr)).await.unwrap();
        let mut bufs = std::collections::VecDeque::new();
        assert!(stale.recv(&mut bufs).await.is_err());
        assert_eq!(context.telemetry.hbone_errors(Fault::Keepalive), 1);
        let fresh = connect(&context, &key(addr)).await.unwrap();
        rt::time::sleep(Duration::from_secs(3)).await;
        assert!(fresh.tunnel().error().is_none());
        assert_eq!(context.telemetry.hbone_errors(Fault::Keepalive), 1);
    });
}
