//! Listening sockets: one set per worker for the data path, one each for the endpoints.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use nix::sys::socket::{setsockopt, sockopt};
use proxy::Listeners;
use socket2::{Domain, Protocol, Socket, Type};

use crate::config::Transparent;

/// Connections the kernel holds for us before they are accepted.
const BACKLOG: i32 = 4096;
const OUTBOUND: u16 = 15001;
const INBOUND_PLAIN: u16 = 15006;
const INBOUND_HBONE: u16 = 15008;
const ADMIN: u16 = 15000;
const METRICS: u16 = 15020;
const READINESS: u16 = 15021;

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

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            ": another process has the port; a ztunnel that was killed can hold it for a second"
        }
        io::ErrorKind::PermissionDenied => ": the process lacks the capability for it",
        _ => "",
    }
}

/// Sockets of the process's own endpoints.
#[derive(Debug)]
pub(crate) struct Endpoints {
    pub(crate) admin: TcpListener,
    pub(crate) metrics: TcpListener,
    pub(crate) readiness: TcpListener,
}

/// Binds the endpoints; each port must be free.
pub(crate) fn endpoints(ipv6: bool) -> Result<Endpoints, ListenError> {
    let any = wildcard(ipv6);
    let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
    Ok(Endpoints {
        admin: plain(SocketAddr::new(local, ADMIN), "admin")?,
        metrics: plain(SocketAddr::new(any, METRICS), "metrics")?,
        readiness: plain(SocketAddr::new(any, READINESS), "readiness")?,
    })
}

/// Binds the data path's listeners: one set for each worker, sharing the ports.
pub(crate) fn data_path(
    workers: usize,
    cpus: &[u32],
    transparent: Transparent,
    ipv6: bool,
) -> Result<Vec<Listeners>, ListenError> {
    let ip = wildcard(ipv6);
    // A port somebody else has without SO_REUSEPORT fails below; one with it would silently share
    // connections, so the first socket is bound alone to find out.
    for (port, purpose) in [
        (OUTBOUND, "outbound"),
        (INBOUND_PLAIN, "inbound plaintext"),
        (INBOUND_HBONE, "HBONE"),
    ] {
        drop(plain(SocketAddr::new(ip, port), purpose)?);
    }
    (0..workers)
        .map(|worker| {
            let cpu = cpus.get(worker).copied();
            let shared =
                |port, purpose| shared(SocketAddr::new(ip, port), purpose, transparent, cpu);
            Ok(Listeners {
                outbound: shared(OUTBOUND, "outbound")?,
                inbound_plain: shared(INBOUND_PLAIN, "inbound plaintext")?,
                inbound_hbone: shared(INBOUND_HBONE, "HBONE")?,
            })
        })
        .collect()
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
    socket.listen(BACKLOG).map_err(failed)?;
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
