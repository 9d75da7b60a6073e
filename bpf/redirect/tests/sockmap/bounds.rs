//! What is left to TCP: connections of MPTCP, and all when memory is short.

use std::io::{self, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use nix::poll::PollFlags;
use socket2::{Domain, Protocol, Socket, Type};

use crate::support::{Net, Peer, ZTUNNEL, ZTUNNEL6, can_run, exchange, wait};

const IPPROTO_MPTCP: i32 = 262;

fn mptcp(address: SocketAddr) -> io::Result<Socket> {
    let protocol = Protocol::from(IPPROTO_MPTCP);
    Socket::new(Domain::for_address(address), Type::STREAM, Some(protocol))
}

fn mptcp_connect(to: SocketAddr) -> Peer {
    let socket = mptcp(to).unwrap();
    socket.set_nonblocking(true).unwrap();
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
            wait(&socket, PollFlags::POLLOUT);
        }
        other => other.unwrap(),
    }
    let stream = TcpStream::from(socket);
    assert!(stream.take_error().unwrap().is_none());
    Peer(stream)
}

/// ztunnel's listeners speak TCP, so that MPTCP falls back to it; a server of its own may not.
#[test]
fn mptcp_is_left_alone() {
    if !can_run("mptcp_is_left_alone") {
        return;
    }
    if let Err(error) = mptcp((ZTUNNEL, 0).into()) {
        let _ = writeln!(
            io::stderr(),
            "skipped: mptcp_is_left_alone: no MPTCP here: {error}"
        );
        return;
    }
    let net = Net::up();
    for address in [IpAddr::V4(ZTUNNEL), IpAddr::V6(ZTUNNEL6)] {
        let plain = net.listener(address);
        let speaks = net.on("zt", || {
            let socket = mptcp((address, 0).into()).unwrap();
            socket.bind(&SocketAddr::from((address, 0)).into()).unwrap();
            socket.listen(8).unwrap();
            TcpListener::from(socket)
        });
        for listener in [plain, speaks] {
            let to = listener.local_addr().unwrap();
            let mut app = net.on("pod", || mptcp_connect(to));
            let accepted = listener.accept().unwrap().0;
            accepted.set_nonblocking(true).unwrap();
            let mut zt = Peer(accepted);
            for size in [1, 1000, 60_000] {
                exchange(&mut app, &mut zt, &vec![3; size]);
                exchange(&mut zt, &mut app, &vec![4; size]);
            }
            // Half-close, then the rest.
            app.0.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(zt.read(&mut [0; 8]).unwrap(), 0);
            exchange(&mut zt, &mut app, b"the rest");
        }
    }
    let counters = net.status().counters;
    for name in ["to_ztunnel_messages", "to_pod_messages"] {
        assert_eq!(counters[name], 0, "{counters:?}");
    }
    // It still is for others.
    let (mut app, mut zt) = net.pair();
    exchange(&mut app, &mut zt, b"question");
    assert_eq!(net.counter("to_ztunnel_messages"), 1);
}

/// Pages that TCP has, on the whole machine.
fn tcp_pages() -> u64 {
    let text = std::fs::read_to_string("/proc/net/sockstat").unwrap();
    let line = text.lines().find(|line| line.starts_with("TCP:")).unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Connections within ztunnel's namespace that nobody reads from, until TCP has `pages`.
fn hoard(net: &Net, pages: u64) -> Vec<TcpStream> {
    let listener = net.listener(IpAddr::V4(ZTUNNEL));
    let to = listener.local_addr().unwrap();
    let mut all = Vec::new();
    for _ in 0..512 {
        if tcp_pages() > pages {
            return all;
        }
        let mut sender = net.on("zt", || TcpStream::connect(to).unwrap());
        sender.set_nonblocking(true).unwrap();
        while sender.write(&[0; 65_536]).is_ok() {}
        all.push(sender);
        all.push(listener.accept().unwrap().0);
    }
    panic!("{} pages only", tcp_pages());
}

/// A bound on the memory of all TCP sockets: beyond it connections go on by TCP, and what was
/// redirected is read before what comes after it.
#[test]
fn at_the_bound_of_memory_connections_go_on_by_tcp() {
    if !can_run("at_the_bound_of_memory_connections_go_on_by_tcp") {
        return;
    }
    let mut net = Net::alone();
    // A gigabyte more than is used now, by whomever: not reached.
    let far = (tcp_pages() + (1 << 18)) * 4096;
    net.memory_max = Some(far);
    let mut net = net.install();
    let (mut app, mut zt) = net.pair();
    exchange(&mut app, &mut zt, &[1; 30_000]);
    assert_eq!(net.counter("demoted_pressure"), 0);
    assert_eq!(net.counter("bypassed_bytes"), 0);
    // More than the kernel keeps in reserve without counting it.
    let hoard = hoard(&net, 4096);
    drop(net.sockmap.take());
    net.memory_max = Some(4 << 20);
    let net = net.install();
    assert_eq!(net.status().memory_max, Some(4 << 20));
    // What is small does not look; what is not finds the bound reached.
    app.write_all(b"unread ").unwrap();
    let redirected = net.counter("to_ztunnel_bytes");
    app.write_all(&[2; 30_000]).unwrap();
    app.write_all(b" and the end").unwrap();
    assert_eq!(net.counter("demoted_pressure"), 1);
    assert_eq!(net.counter("to_ztunnel_bytes"), redirected);
    zt.expect(b"unread ");
    zt.expect(&[2; 30_000]);
    zt.expect(b" and the end");
    exchange(&mut zt, &mut app, &[3; 30_000]);
    drop(hoard);
}
