//! Sockets of the data path: transparent listeners, and connections from foreign addresses.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use mesh::ports;
use nix::sys::socket::{setsockopt, sockopt};
use redirect::{ListenerMap, Role};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};

use crate::error::Error;

const BACKLOG: i32 = 4096;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Idle time before the first probe, and between probes.
const KEEPALIVE: Duration = Duration::from_secs(180);

/// The data path's listeners. Several sets may share the ports.
#[derive(Debug)]
pub struct Listeners {
    /// Captured from local pods (15001).
    pub outbound: TcpListener,
    /// To local pods from outside the mesh (15006).
    pub plaintext: TcpListener,
    /// Tunnels to local pods (15008).
    pub hbone: TcpListener,
}

impl Listeners {
    /// A set on the standard ports, for connections to foreign addresses as well.
    ///
    /// # Errors
    /// A port is taken, or the capability for `IP_TRANSPARENT` is missing.
    pub fn bind(ipv6: bool) -> io::Result<Self> {
        Ok(Self {
            outbound: listen(ports::OUTBOUND, ipv6)?,
            plaintext: listen(ports::INBOUND_PLAIN, ipv6)?,
            hbone: listen(ports::INBOUND_HBONE, ipv6)?,
        })
    }
}

fn listen(port: u16, ipv6: bool) -> io::Result<TcpListener> {
    let any = if ipv6 && Socket::new(Domain::IPV6, Type::STREAM, None).is_ok() {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    };
    let addr = SocketAddr::new(any, port);
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    setsockopt(&socket, sockopt::IpTransparent, &true)?;
    let taken = |error: io::Error| io::Error::new(error.kind(), format!("port {port}: {error}"));
    socket.bind(&addr.into()).map_err(taken)?;
    socket.listen(BACKLOG).map_err(taken)?;
    Ok(socket.into())
}

/// Tells the eBPF redirection which of `sets` takes the connections that arrive on each CPU.
///
/// # Errors
/// The map does not exist (yet), or the kernel refuses a socket.
pub fn register(map: &Path, sets: &[Listeners]) -> Result<(), redirect::Error> {
    let mut map = ListenerMap::open(map)?;
    for (cpu, set) in (0..configured_cpus()).zip(sets.iter().cycle()) {
        map.set(Role::Outbound, cpu, set.outbound.as_fd())?;
        map.set(Role::InboundPlain, cpu, set.plaintext.as_fd())?;
        map.set(Role::InboundHbone, cpu, set.hbone.as_fd())?;
    }
    Ok(())
}

/// CPUs the machine has, whether or not we may use them: packets arrive on all.
fn configured_cpus() -> u32 {
    use nix::unistd::{SysconfVar, sysconf};
    let count = sysconf(SysconfVar::_NPROCESSORS_CONF).ok().flatten();
    count.and_then(|count| count.try_into().ok()).unwrap_or(1)
}

/// `TCP_NODELAY` and keepalive, as upstream sets them.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE)
        .with_retries(9);
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

/// Connects to `addr`, from the address `source` if one is given and it is not `addr`'s own.
pub(crate) async fn connect(addr: SocketAddr, source: Option<IpAddr>) -> Result<TcpStream, Error> {
    let attempt = async {
        let socket = if addr.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        if let Some(source) = source.filter(|source| *source != addr.ip()) {
            match source {
                IpAddr::V4(_) => setsockopt(&socket, sockopt::IpTransparent, &true)?,
                IpAddr::V6(_) => SockRef::from(&socket).set_ip_transparent_v6(true)?,
            }
            // The port is chosen per destination when connecting; else 28,000 would be the limit.
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
            socket.bind(SocketAddr::new(source, 0))?;
        }
        let stream = socket.connect(addr).await?;
        prepare(&stream)?;
        Ok(stream)
    };
    match tokio::time::timeout(CONNECT_TIMEOUT, attempt).await {
        Ok(result) => result.map_err(|error| Error::Connect { addr, error }),
        Err(_) => Err(Error::Timeout {
            what: "connecting",
            addr,
        }),
    }
}

/// Makes the client see a reset when `stream` is dropped.
pub(crate) fn reset_on_close(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO)); // it may be gone already
}
