//! The operation table: everything the kernel may still touch is owned here.
//!
//! A submitted operation is named by its slot and the slot's generation, packed into the
//! completion's `user_data`. A future holds only an [`OpId`]; if it is dropped early the operation
//! becomes an orphan that keeps its resources until the kernel's last completion for it.

mod message;
mod operation;
mod phase;
mod sockaddr;
mod socket;
mod table;
#[cfg(test)]
mod tests;

pub(crate) use message::{MessageHeader, SendList};
pub(crate) use operation::{Completion, FollowUp, OpId, Operation, Readiness};
pub(crate) use sockaddr::RawAddr;
pub(crate) use socket::{Registration, Socket};
pub(crate) use table::OpTable;
