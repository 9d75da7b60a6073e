//! What an operation is: its name, what it owns, and what its completions mean to the driver.

use std::num::NonZeroU64;
use std::os::fd::{FromRawFd, OwnedFd};
use std::rc::Rc;

use super::message::{MessageHeader, SendList};
use super::sockaddr::RawAddr;
use super::socket::Socket;
use crate::buf::Buf;

/// Highest generation of a slot, after which they begin again. Its top bit is clear, and with it
/// that of every name: the numbers above are free for what is no operation of the table (the ring
/// back end's read of its eventfd, its cancellations), and for nobody's name.
const GENERATION_MAX: u32 = u32::MAX >> 1;

/// Name of an operation: slot and generation, which is never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OpId(NonZeroU64);

impl OpId {
    pub(super) fn new(slot: usize, generation: u32) -> Self {
        Self::from_user_data(u64::from(generation) << 32 | slot as u64)
    }

    pub(crate) fn from_user_data(user_data: u64) -> Self {
        Self(NonZeroU64::new(user_data).unwrap_or(NonZeroU64::MAX)) // nobody's
    }

    pub(crate) fn user_data(self) -> u64 {
        self.0.get()
    }

    pub(super) fn slot(self) -> usize {
        (self.user_data() & 0xffff_ffff) as usize
    }

    /// The generation of a slot after `generation`.
    pub(super) fn next_generation(generation: u32) -> u32 {
        match generation {
            GENERATION_MAX => 1,
            generation => generation + 1,
        }
    }

    pub(super) fn generation(self) -> u32 {
        (self.user_data() >> 32) as u32
    }
}

/// Which readiness to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readiness {
    Read,
    Write,
    /// The connection has failed; the end of what the peer sends is none. What is found is noted in
    /// the socket.
    Failure,
}

/// What to do, and what the operation owns while the kernel works on it. The socket is always
/// among it, so that its number is not reused meanwhile.
#[derive(Debug)]
pub(crate) enum Operation {
    /// Accept connections, again and again.
    Accept(Rc<Socket>),
    /// Receive into ring blocks, again and again.
    Receive(Rc<Socket>),
    /// Send a list: buffers, vectors and message header.
    Send(Rc<Socket>, Box<SendList>),
    /// Receive into a buffer, behind what it holds.
    Recv(Rc<Socket>, Buf),
    /// Receive scattered into buffers.
    RecvMsg(Rc<Socket>, Box<MessageHeader>),
    /// Connect to an address.
    Connect(Rc<Socket>, Box<RawAddr>),
    /// Wait until the socket is ready.
    Ready(Rc<Socket>, Readiness),
}

impl Operation {
    pub(crate) fn socket(&self) -> &Rc<Socket> {
        match self {
            Self::Accept(socket)
            | Self::Receive(socket)
            | Self::Send(socket, _)
            | Self::Recv(socket, _)
            | Self::RecvMsg(socket, _)
            | Self::Connect(socket, _)
            | Self::Ready(socket, _) => socket,
        }
    }

    /// The descriptor in a result, if this accepts and has.
    ///
    /// # Safety
    /// `result` is the kernel's for this operation, and nobody else takes the descriptor.
    pub(super) unsafe fn accepted(&self, result: i32) -> Option<OwnedFd> {
        let accepted = matches!(self, Self::Accept(_)) && result >= 0;
        // SAFETY: the kernel has just opened this descriptor for this accept, and the caller says
        // that it is nobody else's.
        accepted.then(|| unsafe { OwnedFd::from_raw_fd(result) })
    }

    /// Tells the socket of an error, whoever started the operation and whether or not that is
    /// still there: the kernel tells it once.
    pub(super) fn note(&self, result: i32) {
        if let Self::Receive(socket)
        | Self::Recv(socket, _)
        | Self::RecvMsg(socket, _)
        | Self::Send(socket, _) = self
        {
            socket.note(result);
        }
    }
}

/// One completion of a multishot operation.
#[derive(Debug)]
pub(crate) struct Completion {
    pub(crate) result: i32,
    pub(crate) buffer: Option<u16>,
    /// The connection that was accepted; closed with the completion if nobody takes it.
    pub(crate) accepted: Option<OwnedFd>,
}

/// What the driver must do after a completion was entered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FollowUp {
    Nothing,
    /// Cancel it: the queue of a multishot receive grew past its bound, which its owner has to
    /// catch up with first, or a wait for room was answered.
    Stop,
    /// The socket is full: wait until it takes more.
    Wait,
    /// It still is, and something else would end such a wait at once: wait for a change.
    WaitForChange,
    /// The socket takes more: submit the rest.
    Again,
}
