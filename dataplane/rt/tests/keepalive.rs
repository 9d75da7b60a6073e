//! Keepalive of connections that are made here: those that last have it.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use rt::net::{ConnectOptions, Keepalive, connect};
use rt::{Backend, Runtime};

mod both;
use both::{both_back_ends, with};

fn option(socket: impl AsFd, level: i32, name: i32) -> i32 {
    let mut value = 0_i32;
    let mut len = size_of::<i32>() as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the value and its length are valid for writes.
    let rc = unsafe { libc::getsockopt(fd, level, name, (&raw mut value).cast(), &raw mut len) };
    assert_eq!(rc, 0);
    value
}

/// Waits until `socket` has keepalive, for so many tenths of a second at most.
async fn has_keepalive(socket: &impl AsFd, tenths: usize) -> bool {
    for _ in 0..tenths {
        if option(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE) == 1 {
            return true;
        }
        rt::time::sleep(Duration::from_millis(100)).await;
    }
    false
}

/// It comes while the worker does nothing else, with all that was asked for. One that is gone by
/// then is in nobody's way, and what was not asked for does not come.
fn connections_that_last_have_keepalive(backend: Backend) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let keepalive = Keepalive {
        time: Duration::from_secs(7),
        interval: Duration::from_secs(3),
        retries: 2,
    };
    let with_it = ConnectOptions {
        keepalive: Some(keepalive),
        ..ConnectOptions::default()
    };
    let mut runtime = Runtime::new(with(backend)).unwrap();
    runtime
        .run(async move {
            for _ in 0..2 {
                let (lasts, _) = connect(addr, &with_it).await.unwrap().split();
                drop(connect(addr, &with_it).await.unwrap());
                let (without, _) = connect(addr, &ConnectOptions::default())
                    .await
                    .unwrap()
                    .split();
                assert!(has_keepalive(&lasts, 600).await);
                let tcp = |name| option(&lasts, libc::IPPROTO_TCP, name);
                assert_eq!(tcp(libc::TCP_KEEPIDLE), 7);
                assert_eq!(tcp(libc::TCP_KEEPINTVL), 3);
                assert_eq!(tcp(libc::TCP_KEEPCNT), 2);
                assert!(!has_keepalive(&without, 1).await);
            }
        })
        .unwrap();
}

both_back_ends! { connections_that_last_have_keepalive }
