//! In ztunnel's place, a server that answers what is redirected to it: what redirection alone
//! costs.
//!
//! Its listeners are ztunnel's for what pods send (15001): transparent, one for each CPU, found by
//! TPROXY or, registered, by the eBPF redirection. Behind them is the load generator's own echo
//! server, which in the place of the pod that is dialled is what path `none` is measured with. So
//! paths differ by the redirection and by nothing else. Connections to the node's pods that come
//! from elsewhere are refused.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use loadgen::serve::{Mode, Options, Server};
use mesh::ports;
use nix::sys::socket::{setsockopt, sockopt};
use redirect::{ListenerMap, Role};
use socket2::{Domain, Protocol, Socket, Type};

use crate::steering::configured_cpus;

const BACKLOG: i32 = 4096;
/// Longest wait for the words of a readiness probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// Answers until the process is ended; `map` is the eBPF redirection's, for its listeners.
///
/// # Errors
/// A port that is taken, a missing capability, a map that is not there.
pub fn serve(map: Option<&Path>) -> Result<()> {
    let listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, ports::OUTBOUND));
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let listeners = (0..threads).map(|_| transparent(listen));
    let listeners: Vec<TcpListener> = listeners
        .collect::<io::Result<_>>()
        .with_context(|| format!("listening on {listen} (needs CAP_NET_ADMIN)"))?;
    if let Some(map) = map {
        let mut map = ListenerMap::open(map)?;
        for (cpu, listener) in (0..configured_cpus()).zip(listeners.iter().cycle()) {
            map.set(Role::Outbound, cpu, listener.as_fd())?;
        }
    }
    let options = Options {
        listen,
        mode: Mode::Echo,
        threads: None,
        cpus: Vec::new(),
        print_peers: false,
    };
    let server = Server::over(listeners, &options).context("starting to serve")?;
    let ready = SocketAddr::from((Ipv4Addr::UNSPECIFIED, ports::READINESS));
    let ready = TcpListener::bind(ready).with_context(|| format!("listening on {ready}"))?;
    thread::spawn(move || {
        for probe in ready.incoming().flatten() {
            // Whoever asks and goes away gets no answer.
            let _ = answer(probe);
        }
    });
    server.join().context("serving")?;
    Ok(())
}

fn transparent(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    setsockopt(&socket, sockopt::IpTransparent, &true)?;
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A readiness probe, whatever it asks.
fn answer(mut probe: TcpStream) -> io::Result<()> {
    probe.set_read_timeout(Some(PROBE_TIMEOUT))?;
    probe.set_write_timeout(Some(PROBE_TIMEOUT))?;
    // Read, or closing would reset the connection.
    let _ = probe.read(&mut [0; 1024])?;
    probe.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")
}
