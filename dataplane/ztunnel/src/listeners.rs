//! Listening sockets: one set per worker for the data path, one each for the endpoints.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::thread;
use std::time::{Duration, Instant};

use mesh::ports;
use nix::sys::socket::{setsockopt, sockopt};
use proxy::Listeners;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::config::Transparent;
use crate::handover;

/// Connections the kernel holds for us before they are accepted.
const BACKLOG: i32 = 4096;

/// Why a socket cannot be had. `Display` is one line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    #[error("cannot listen on {addr} ({purpose}): {error}{hint}", hint = hint(.error))]
    Bind {
        addr: SocketAddr,
        purpose: &'static str,
        error: io::Error,
    },
    #[error(
        "cannot make the {purpose} listener transparent (IP_TRANSPARENT): {error}: captured \
         connections have foreign addresses; add CAP_NET_ADMIN or CAP_NET_RAW"
    )]
    Transparent {
        purpose: &'static str,
        error: io::Error,
    },
}

impl ListenError {
    fn is_in_use(&self) -> bool {
        matches!(self, Self::Bind { error, .. } if error.kind() == io::ErrorKind::AddrInUse)
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            ": another process has the port; a ztunnel takes a port over from another one of the \
             same user in the same network namespace, and from nothing else"
        }
        io::ErrorKind::PermissionDenied => ": the process lacks the capability for it",
        _ => "",
    }
}

/// The process's own endpoints.
#[derive(Debug)]
pub(crate) struct Endpoints {
    pub(crate) admin: Endpoint,
    pub(crate) metrics: Endpoint,
    pub(crate) readiness: Endpoint,
}

/// One of them.
#[derive(Debug)]
pub(crate) struct Endpoint {
    purpose: &'static str,
    addr: SocketAddr,
    /// None while another ztunnel has the port.
    listener: Option<TcpListener>,
}

impl Endpoint {
    /// `successor`: the port may be another ztunnel's for now. Else it must be free, or become so
    /// in a moment.
    fn new(addr: SocketAddr, purpose: &'static str, successor: bool) -> Result<Self, ListenError> {
        let deadline = Instant::now() + PORT_PATIENCE;
        let listener = loop {
            match plain(addr, purpose) {
                Ok(listener) => break Some(listener),
                Err(error) if !error.is_in_use() => return Err(error),
                Err(_) if successor => break None,
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => thread::sleep(handover::INTERVAL),
            }
        };
        Ok(Self {
            purpose,
            addr,
            listener,
        })
    }

    /// The listening socket, once the port is ours.
    pub(crate) async fn listener(self) -> Result<TcpListener, ListenError> {
        if let Some(listener) = self.listener {
            return Ok(listener);
        }
        let Self { purpose, addr, .. } = self;
        tracing::info!("another ztunnel has {addr} ({purpose}): waiting until it lets go");
        loop {
            match plain(addr, purpose) {
                Ok(listener) => {
                    tracing::info!("{addr} ({purpose}) is taken over");
                    return Ok(listener);
                }
                Err(error) if !error.is_in_use() => return Err(error),
                Err(_) => tokio::time::sleep(handover::INTERVAL).await,
            }
        }
    }
}

/// How long a port that should be free is waited for: a ztunnel may have been killed a moment ago,
/// or drain and notice that there is a successor.
const PORT_PATIENCE: Duration = Duration::from_secs(3);

/// Binds the endpoints; each port must be free, or that of the ztunnel that this one succeeds.
pub(crate) fn endpoints(ipv6: bool, successor: bool) -> Result<Endpoints, ListenError> {
    let any = wildcard(ipv6);
    let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let endpoint = |ip, port, purpose| Endpoint::new(SocketAddr::new(ip, port), purpose, successor);
    Ok(Endpoints {
        admin: endpoint(local, ports::ADMIN, "admin")?,
        metrics: endpoint(any, ports::METRICS, "metrics")?,
        readiness: endpoint(any, ports::READINESS, "readiness")?,
    })
}

/// Binds the data path's listeners: one set for each worker, sharing the ports with each other and
/// with another ztunnel of the same user. They do not listen before [`listen`].
pub(crate) fn data_path(
    workers: usize,
    cpus: &[u32],
    transparent: Transparent,
    ipv6: bool,
) -> Result<Vec<Listeners>, ListenError> {
    let ip = wildcard(ipv6);
    (0..workers)
        .map(|worker| {
            let cpu = cpus.get(worker).copied();
            let shared =
                |port, purpose| shared(SocketAddr::new(ip, port), purpose, transparent, cpu);
            Ok(Listeners {
                outbound: shared(ports::OUTBOUND, "outbound")?,
                inbound_plain: shared(ports::INBOUND_PLAIN, "inbound plaintext")?,
                inbound_hbone: shared(ports::INBOUND_HBONE, "HBONE")?,
            })
        })
        .collect()
}

/// From now on connections come to these listeners.
pub(crate) fn listen(sockets: &[Listeners]) -> Result<(), ListenError> {
    for set in sockets {
        for (listener, purpose) in [
            (&set.outbound, "outbound"),
            (&set.inbound_plain, "inbound plaintext"),
            (&set.inbound_hbone, "HBONE"),
        ] {
            let listening = SockRef::from(listener).listen(BACKLOG);
            let addr = || listener.local_addr();
            listening.map_err(|error| ListenError::Bind {
                addr: addr().unwrap_or_else(|_| SocketAddr::from(([0; 4], 0))),
                purpose,
                error,
            })?;
        }
    }
    Ok(())
}

fn wildcard(ipv6: bool) -> IpAddr {
    let has_ipv6 = ipv6 && Socket::new(Domain::IPV6, Type::STREAM, None).is_ok();
    if has_ipv6 {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    }
}

fn socket(addr: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    // Before it listens: the runtime sets it, too, but later than the first connections come.
    socket.set_out_of_band_inline(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    Ok(socket)
}

fn plain(addr: SocketAddr, purpose: &'static str) -> Result<TcpListener, ListenError> {
    let bind = || {
        let socket = socket(addr)?;
        socket.bind(&addr.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    bind().map_err(|error| ListenError::Bind {
        addr,
        purpose,
        error,
    })
}

fn shared(
    addr: SocketAddr,
    purpose: &'static str,
    transparent: Transparent,
    cpu: Option<u32>,
) -> Result<TcpListener, ListenError> {
    let failed = |error| ListenError::Bind {
        addr,
        purpose,
        error,
    };
    let socket = socket(addr).map_err(failed)?;
    socket.set_reuse_port(true).map_err(failed)?;
    if transparent != Transparent::No {
        // Also on an IPv6 socket: it takes IPv4 connections as well.
        let set = setsockopt(&socket, sockopt::IpTransparent, &true);
        if let (Err(error), Transparent::Required) = (set, transparent) {
            return Err(ListenError::Transparent {
                purpose,
                error: error.into(),
            });
        }
    }
    if let Some(cpu) = cpu {
        // Where nothing else steers, the kernel prefers the listener of the CPU the SYN came on.
        // Old kernels ignore it within a SO_REUSEPORT group: a hint, not a need.
        let _ = socket.set_cpu_affinity(cpu as usize);
    }
    socket.bind(&addr.into()).map_err(failed)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_occupied_port_is_one_clear_line() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let error = plain(taken.local_addr().unwrap(), "metrics")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("metrics") && error.contains("another process"),
            "{error}"
        );
        assert!(!error.contains('\n'));
    }
}
