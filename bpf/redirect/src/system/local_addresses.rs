//! The local addresses of a network namespace, and when they change.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// Where kube-proxy (IPVS) and kube-router put the addresses of all services, so that the kernel
/// takes packets for them. They are not the node's: a pod that dials one wants the service.
const SERVICE_INTERFACES: [&str; 2] = ["kube-ipvs0", "kube-dummy-if"];

/// `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR` of rtnetlink(7).
const ADDRESS_GROUPS: u32 = 0x10 | 0x100;
/// Any message will do, so that one that does not fit is fine, too.
const BUFFER_BYTES: usize = 4096;

/// Addresses of all interfaces of the calling thread's namespace, without loopback and link-local
/// ones (the programs know these by themselves) and those of services.
pub(crate) fn all() -> io::Result<HashSet<IpAddr>> {
    let entries = nix::ifaddrs::getifaddrs()?;
    let told = entries
        .filter(|entry| !SERVICE_INTERFACES.contains(&entry.interface_name.as_str()))
        .filter_map(|entry| {
            let address = entry.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
        })
        .filter(is_told);
    Ok(told.collect())
}

fn is_told(address: &IpAddr) -> bool {
    let link_local = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    !(link_local || address.is_loopback() || address.is_unspecified())
}

/// Tells when addresses of a network namespace come or go.
#[derive(Debug)]
pub struct AddressWatch(OwnedFd);

impl AddressWatch {
    /// For the calling thread's namespace, from now on.
    ///
    /// # Errors
    /// If there is no netlink socket to be had.
    pub fn new() -> io::Result<Self> {
        let netlink = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, ADDRESS_GROUPS))?;
        Ok(Self(netlink))
    }

    /// Blocks until one or more have come or gone since the last call.
    ///
    /// # Errors
    /// If the socket fails. That the kernel had more to tell than fits counts as a change.
    pub fn wait(&self) -> io::Result<()> {
        let mut buffer = [0; BUFFER_BYTES];
        let mut next = |flags| match recv(self.0.as_raw_fd(), &mut buffer, flags) {
            Ok(_) | Err(Errno::ENOBUFS) => Ok(true),
            Err(Errno::EINTR) => Ok(true),
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(io::Error::from(errno)),
        };
        next(MsgFlags::empty())?;
        // Bounded: whoever changes addresses without end is answered each few of them.
        for _ in 0..BUFFER_BYTES {
            if !next(MsgFlags::MSG_DONTWAIT)? {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_and_link_local_addresses_are_left_out() {
        let told = |text: &str| is_told(&text.parse().unwrap());
        assert!(!told("127.0.0.1") && !told("::1") && !told("fe80::1"));
        assert!(told("10.244.1.1") && told("fd00::1") && told("169.254.20.10"));
        assert!(all().unwrap().iter().all(is_told));
    }
}
