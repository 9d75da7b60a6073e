//! A thread-per-core runtime on io_uring for programs that relay bytes between TCP sockets.
//!
//! One [`Runtime`] owns one ring and runs local (`!Send`) tasks on the thread that created it.
//! What sets it apart from general runtimes, and why it exists:
//!
//! * **Receive into shared memory the sender can use.** Multishot receives take buffers from a ring
//!   the kernel fills ([`buf`]); every buffer has head and tail room, so that record and frame
//!   headers are written around the payload where it lies. An idle connection holds no buffer.
//! * **Adaptive receive.** Small messages come through the multishot path; a flow that turns out to
//!   be bulk moves to large single receives and back ([`net::ReadHalf`]).
//! * **No allocation per operation.** Operations live in a slab, wakers are plain numbers, send
//!   lists are reused.
//! * **Cancellation is memory safe.** What the kernel may still touch is owned by the operation
//!   table, never by the future; a dropped future leaves the operation to finish there.
//!
//! * **Two back ends.** io_uring, and epoll with nonblocking calls for where it is refused: same
//!   API, same tests ([`Backend`]).
//!
//! Limits: io_uring needs Linux >= 6.1 (`SINGLE_ISSUER`, `DEFER_TASKRUN`; Debian 12's kernel).
//! [`probe::check`] says why it is refused where it is. Queues are bounded: see [`RuntimeConfig`].

mod affinity;
pub mod buf;
mod counters;
pub mod descriptors;
mod driver;
mod executor;
mod keepalive;
mod limit;
pub mod mailbox;
pub mod memory;
#[deny(clippy::disallowed_types)]
pub mod net;
mod op;
pub mod probe;
pub mod sync;
mod sys;
mod tasks;
pub mod time;
mod timer;

pub use affinity::{available_cpus, pin_current_thread};
pub use counters::{Counters, CpuTime, SharedCounters};
pub use driver::Backend;
pub use executor::{
    Runtime, RuntimeConfig, RuntimeError, next_turn, spawn, spawn_giving_way, yield_now,
};
pub use limit::cpu_limit;
