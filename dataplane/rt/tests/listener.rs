//! Accepting: bursts, and what happens to connections nobody accepts.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

use rt::mailbox::Receiver;
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

/// Closing loses nobody: the kernel has told these clients that they are connected.
fn closing_hands_out_what_was_accepted_and_what_waits(backend: Backend) {
    let mut runtime = Runtime::new(with(backend)).unwrap();
    let served = runtime.run(async move {
        let mut served = Vec::new();
        for taken in 0..5 {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let addr = listener.local_addr().unwrap();
            let mut listener = Listener::from_std(listener);
            let connect = |_| TcpStream::connect(addr).unwrap();
            let mut clients: Vec<TcpStream> = (0..40).map(connect).collect();
            let mut accepted = Vec::new();
            for _ in 0..taken {
                accepted.push(listener.accept().await.unwrap());
            }
            clients.extend((0..40).map(connect));
            accepted.extend(listener.close().await);
            served.push((clients.len(), accepted.len()));
            let refused = TcpStream::connect(addr).unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        }
        served
    });
    for (clients, accepted) in served.unwrap() {
        assert_eq!(clients, accepted);
    }
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

/// A listener that shares `port` (0: any) and is preferred for connections from `cpu`, as a
/// worker's is.
fn steered(port: u16, cpu: u32) -> TcpListener {
    // SAFETY: socket(2) has no memory-safety preconditions.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0);
    // SAFETY: the descriptor was just created and nobody else owns it.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    for (name, value) in [(libc::SO_REUSEPORT, 1), (libc::SO_INCOMING_CPU, cpu)] {
        let (value, len) = ((&raw const value).cast(), size_of::<u32>() as u32);
        // SAFETY: the value lives across the call and its own size is passed.
        let rc = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, name, value, len) };
        assert_eq!(rc, 0, "option {name}");
    }
    // SAFETY: sockaddr_in is plain old data; all zeroes is a valid address.
    let mut addr: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    addr.sin_family = libc::AF_INET as libc::sa_family_t;
    addr.sin_port = port.to_be();
    addr.sin_addr.s_addr = u32::from(Ipv4Addr::LOCALHOST).to_be();
    let len = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    // SAFETY: the address lives across the calls and its own size is passed.
    let bound = unsafe { libc::bind(fd, (&raw const addr).cast(), len) == 0 };
    // SAFETY: listen(2) has no memory-safety preconditions.
    let listening = bound && unsafe { libc::listen(fd, 128) } == 0;
    assert!(listening, "{}", std::io::Error::last_os_error());
    owned.into()
}

/// Answers each connection, until told to stop.
fn worker(backend: Backend, listener: TcpListener, mut stop: Receiver<()>) {
    let mut runtime = Runtime::new(with(backend)).unwrap();
    let serving = async {
        rt::spawn(async move {
            let mut listener = Listener::from_std(listener);
            loop {
                let (_read, mut write) = listener.accept().await.unwrap().split();
                write.push_copy(b"served");
                write.flush().await.unwrap();
            }
        });
        stop.recv().await;
    };
    runtime.run(serving).unwrap();
}

/// Connections from every CPU are served, also where no worker runs on theirs.
fn fewer_workers_than_cpus_serve_all(backend: Backend) {
    let cpus = rt::available_cpus().unwrap();
    // One worker; then two, of which one is for a CPU that no connection comes from.
    for preferred in [&[cpus[0]][..], &[cpus[0], 1_000]] {
        let first = steered(0, preferred[0]);
        let addr = first.local_addr().unwrap();
        let others = preferred[1..].iter();
        let listeners = std::iter::once(first).chain(others.map(|&cpu| steered(addr.port(), cpu)));
        let workers: Vec<_> = listeners
            .map(|listener| {
                let (sender, stop) = rt::mailbox::channel(1);
                (
                    sender,
                    thread::spawn(move || worker(backend, listener, stop)),
                )
            })
            .collect();
        for &cpu in cpus.iter().take(4) {
            let client = thread::spawn(move || {
                rt::pin_current_thread(cpu).unwrap();
                for _ in 0..10 {
                    let mut stream = TcpStream::connect(addr).unwrap();
                    let patience = Some(Duration::from_secs(20));
                    stream.set_read_timeout(patience).unwrap();
                    let mut answer = String::new();
                    stream.read_to_string(&mut answer).unwrap();
                    assert_eq!(answer, "served", "from CPU {cpu}");
                }
            });
            client.join().unwrap();
        }
        for (sender, worker) in workers {
            sender.send(()).unwrap();
            worker.join().unwrap();
        }
    }
}

both_back_ends! {
    fewer_workers_than_cpus_serve_all,
    accepted_connections_inherit_options,
    a_burst_is_accepted_without_an_error,
    closing_hands_out_what_was_accepted_and_what_waits,
    connections_nobody_took_are_closed_with_the_listener,
}
