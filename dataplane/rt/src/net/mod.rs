//! TCP sockets of a worker.
//!
//! A connection is a [`ReadHalf`] and a [`WriteHalf`] over one descriptor; each has at most one
//! operation under way. Dropping a half cancels its operation; the descriptor closes when the last
//! half and the last operation are gone.

mod connect;
mod listener;
mod observer;
mod read;
mod splice;
mod stream;
mod write;

pub use connect::{ConnectOptions, connect, connect_prepared};
pub use listener::Listener;
pub use observer::{Observer, Sent};
pub use read::{Placement, ReadHalf};
pub use splice::{Splice, Spliced};
pub use stream::TcpStream;
pub use write::WriteHalf;

pub use crate::keepalive::Keepalive;
