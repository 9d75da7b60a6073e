//! Load generator for TCP: clients that measure and servers that answer.
//!
//! * [`rr`]: request/response over kept connections, closed loop or open loop at a set rate.
//! * [`stream`]: bulk bytes in one or both directions.
//! * [`connect`]: a new connection for every request.
//! * [`idle`]: connections that are opened and held.
//! * [`serve`]: the other end: echo, sink or source.
//!
//! # How it measures
//!
//! One thread per core, each with its own epoll instance, its own connections and its own
//! [HDR histograms](stats::Latency); nothing is shared while measuring but a stop flag and the
//! counters of the progress line. Buffers are built before the clock starts and the measured
//! loop does not allocate. Every client run has the phases *connect*, *warm-up* (excluded),
//! *measure*, *grace* (requests still under way may finish, none is started).
//!
//! In a **closed** loop a connection sends its next request when the last response is complete,
//! so a slow server is asked less often: good for the highest throughput, flattering for tails.
//! In an **open** loop ([`pacing`]) requests have intended send times and latency counts from
//! those. Every result says which loop it came from.
//!
//! What never finished counts as well: a request that was given up, or was due and never sent,
//! enters the latencies with its age, which its latency would have exceeded; the metric
//! `unfinished` says how many samples are such. Otherwise a stall that lasts to the end of a run
//! would be in no figure at all.
//!
//! # Limits and failure
//!
//! A run is bounded in time by connect timeout + warm-up + duration + grace. A connection that
//! breaks is counted by [kind](outcome::Kind) and, in `rr`, dialled again after 100 ms. Nothing
//! panics on what the peer sends.
#![forbid(unsafe_code)]

pub mod calibration;
pub mod connect;
pub mod error;
pub mod idle;
pub mod outcome;
pub mod pacing;
pub mod payload;
pub mod report;
pub mod rr;
pub mod search;
pub mod serve;
pub mod size;
pub mod stats;
pub mod stream;
pub mod target;
pub mod worker;

mod net;
mod timer;

pub use error::Error;
