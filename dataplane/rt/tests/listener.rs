//! Accepting: bursts, and what happens to connections nobody accepts.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use rt::net::{Keepalive, Listener};
use rt::{Backend, Runtime};

mod both;
use both::{both_back_ends, with};

/// Far more connections at once than one operation may queue: each is accepted, none is an error.
fn a_burst_is_accepted_without_an_error(backend: Backend) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let mut runtime = Runtime::new(with(backend)).unwrap();
    let bursts = async move {
        let mut listener = Listener::from_std(listener);
        for _ in 0..3 {
            let connect = |_| TcpStream::connect(addr).unwrap();
            let clients: Vec<TcpStream> = (0..120).map(connect).collect();
            for _ in &clients {
                drop(listener.accept().await?);
            }
        }
        Ok::<_, std::io::Error>(())
    };
    let limit = Duration::from_secs(10);
    let result = runtime.run(async { rt::time::timeout(limit, bursts).await });
    result.unwrap().unwrap().unwrap();
}

/// A listener that goes away closes what the kernel had accepted for it and nobody took.
fn connections_nobody_took_are_closed_with_the_listener(backend: Backend) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let clients: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(addr).unwrap()).collect();
    let mut runtime = Runtime::new(with(backend)).unwrap();
    runtime
        .run(async move {
            let mut listener = Listener::from_std(listener);
            drop(listener.accept().await.unwrap());
            drop(listener);
            rt::time::sleep(Duration::from_millis(20)).await;
        })
        .unwrap();
    for mut client in clients {
        client
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        // The end of the stream or a reset, but not silence.
        match client.read(&mut [0; 1]) {
            Ok(n) => assert_eq!(n, 0),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
}

/// Options are set once, on the listener.
fn accepted_connections_inherit_options(backend: Backend) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let same = listener.try_clone().unwrap();
    let mut runtime = Runtime::new(with(backend)).unwrap();
    runtime
        .run(async move {
            let listener = Listener::from_std(listener);
            listener.set_nodelay().unwrap();
            let keepalive = Keepalive {
                time: Duration::from_secs(7),
                interval: Duration::from_secs(3),
                retries: 2,
            };
            listener.set_keepalive(&keepalive).unwrap();
        })
        .unwrap();
    let _client = TcpStream::connect(addr).unwrap();
    let (accepted, _) = same.accept().unwrap();
    let option = |name| {
        let mut value = 0_i32;
        let mut len = 4;
        // SAFETY: the value and its length are valid for writes.
        let rc = unsafe {
            let value = (&raw mut value).cast();
            libc::getsockopt(
                accepted.as_raw_fd(),
                libc::IPPROTO_TCP,
                name,
                value,
                &raw mut len,
            )
        };
        assert_eq!(rc, 0);
        value
    };
    assert!(accepted.nodelay().unwrap());
    assert_eq!(option(libc::TCP_KEEPIDLE), 7);
    assert_eq!(option(libc::TCP_KEEPINTVL), 3);
    assert_eq!(option(libc::TCP_KEEPCNT), 2);
}

both_back_ends! {
    accepted_connections_inherit_options,
    a_burst_is_accepted_without_an_error,
    connections_nobody_took_are_closed_with_the_listener,
}
