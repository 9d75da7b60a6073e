//! What this kernel's sockmap can be trusted with, tried out on a connection of our own.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use aya::maps::SockHash;
use aya::programs::SkMsg;
use aya::{Ebpf as Object, EbpfLoader};

use super::{layout, sys};
use crate::error::{Error, Result};
use crate::system::program_load::load_program;

const MESSAGE: [u8; 1000] = [0x5a; 1000];

/// What works.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Abilities {
    /// Unread redirected data is charged to the receiver, so that it can be bounded.
    pub(super) accounts: bool,
    /// FIONREAD tells of all unread data, however it came. Applications rely on that: nginx, once
    /// a receive has filled its buffer and FIONREAD is 0, waits for an event that never comes.
    pub(super) tells_unread: bool,
}

/// Tries the kernel out.
pub(super) fn run() -> Result<Abilities> {
    let mut object = EbpfLoader::new()
        .load(layout::PROBE_OBJECT)
        .map_err(|e| Error::bpf("load object", "sockmap_probe.bpf.o", &e))?;
    try_out(&mut object)
}

fn try_out(object: &mut Object) -> Result<Abilities> {
    let socket_failed = |source| Error::file("probe sockets in", "loopback", source);
    let (mut sender, mut receiver) = pair().map_err(socket_failed)?;
    let failed = |e: &(dyn std::error::Error + 'static)| Error::bpf("probe", "sockmap", e);
    let mut take = |name: &'static str| {
        let map = object.take_map(name).ok_or_else(|| super::absent(name))?;
        SockHash::<_, u32>::try_from(map).map_err(|e| failed(&e))
    };
    let (mut senders, mut targets) = (take(layout::PROBE_SENDER)?, take(layout::PROBE_TARGET)?);
    let program: &mut SkMsg = object
        .program_mut(layout::PROBE_SEND)
        .ok_or_else(|| super::absent(layout::PROBE_SEND))?
        .try_into()
        .map_err(|e| failed(&e))?;
    load_program(layout::PROBE_SEND, || program.load())?;
    program.attach(senders.fd()).map_err(|e| failed(&e))?;
    senders
        .insert(0, sender.as_raw_fd(), 0)
        .map_err(|e| failed(&e))?;
    targets
        .insert(0, receiver.as_raw_fd(), 0)
        .map_err(|e| failed(&e))?;
    let idle = sys::receive_memory(receiver.as_fd()).map_err(socket_failed)?;
    sender.write_all(&MESSAGE).map_err(socket_failed)?;
    let charged = sys::receive_memory(receiver.as_fd()).map_err(socket_failed)? - idle;
    let told = sys::unread(receiver.as_fd()).map_err(socket_failed)?;
    let mut received = [0; MESSAGE.len()];
    receiver.read_exact(&mut received).map_err(socket_failed)?;
    let left = sys::receive_memory(receiver.as_fd()).map_err(socket_failed)?;
    // Its own messages go by TCP, to a socket that is in a map.
    receiver.write_all(&MESSAGE).map_err(socket_failed)?;
    sender.peek(&mut [0]).map_err(socket_failed)?;
    let told_by_tcp = sys::unread(sender.as_fd()).map_err(socket_failed)?;
    Ok(Abilities {
        accounts: charged as usize >= MESSAGE.len() && left == idle && received == MESSAGE,
        tells_unread: [told, told_by_tcp] == [MESSAGE.len(); 2],
    })
}

fn pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let sender = TcpStream::connect(listener.local_addr()?)?;
    let (receiver, _) = listener.accept()?;
    for socket in [&sender, &receiver] {
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    }
    Ok((sender, receiver))
}
