//! TCP sockets of a worker.
//!
//! A connection is a [`ReadHalf`] and a [`WriteHalf`] over one descriptor; each has at most one
//! operation under way. Dropping a half cancels its operation; the descriptor closes when the last
//! half and the last operation are gone.

mod connect;
mod error;
mod listener;
mod observer;
mod read;
pub(crate) mod sockaddr;
pub(crate) mod socket;
mod splice;
mod write;

pub use connect::{ConnectOptions, connect, connect_prepared};
pub use listener::Listener;
pub use observer::{Observer, Sent};
pub(crate) use read::MessageHeader;
pub use read::{Placement, ReadHalf};
pub use socket::{Keepalive, TcpStream};
pub use splice::{Splice, Spliced};
pub(crate) use write::SendList;
pub use write::WriteHalf;
