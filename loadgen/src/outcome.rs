//! What became of requests and connections: counted by kind, without allocation.

use std::collections::BTreeMap;
use std::io;

/// Why a request or a connection did not succeed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(usize)]
pub enum Kind {
    /// Nobody listens at the address.
    ConnectRefused,
    /// No answer to the connection attempt within the connect timeout.
    ConnectTimeout,
    /// Reset while connecting.
    ConnectReset,
    /// No route to the address.
    ConnectUnreachable,
    /// All local ports towards the address are taken (`TIME_WAIT` counts).
    NoLocalPort,
    /// Any other failure to connect, file descriptors running out included.
    ConnectOther,
    /// The peer reset an established connection.
    Reset,
    /// The peer closed before the response was complete.
    ClosedEarly,
    /// Writing to a connection the peer has closed.
    BrokenPipe,
    /// The response was not complete within the request timeout.
    Timeout,
    /// More bytes came back than were asked for.
    ExcessBytes,
    /// The bytes that came back differ from those expected (`--verify`).
    ContentMismatch,
    /// Still under way when the grace period after the run ended.
    Unfinished,
    /// Any other error on an established connection.
    OtherIo,
}

const KINDS: [(Kind, &str); 14] = [
    (Kind::ConnectRefused, "connect_refused"),
    (Kind::ConnectTimeout, "connect_timeout"),
    (Kind::ConnectReset, "connect_reset"),
    (Kind::ConnectUnreachable, "connect_unreachable"),
    (Kind::NoLocalPort, "no_local_port"),
    (Kind::ConnectOther, "connect_other"),
    (Kind::Reset, "reset"),
    (Kind::ClosedEarly, "closed_early"),
    (Kind::BrokenPipe, "broken_pipe"),
    (Kind::Timeout, "timeout"),
    (Kind::ExcessBytes, "excess_bytes"),
    (Kind::ContentMismatch, "content_mismatch"),
    (Kind::Unfinished, "unfinished"),
    (Kind::OtherIo, "other_io"),
];

impl Kind {
    /// The kind of an error met while connecting.
    #[must_use]
    pub fn of_connect(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::ConnectRefused,
            io::ErrorKind::TimedOut => Self::ConnectTimeout,
            io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted => Self::ConnectReset,
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                Self::ConnectUnreachable
            }
            io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse => Self::NoLocalPort,
            _ => Self::ConnectOther,
        }
    }

    /// The kind of an error met on an established connection.
    #[must_use]
    pub fn of_io(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted => Self::Reset,
            io::ErrorKind::BrokenPipe => Self::BrokenPipe,
            io::ErrorKind::TimedOut => Self::Timeout,
            _ => Self::OtherIo,
        }
    }
}

/// Failures counted by [`Kind`].
#[derive(Clone, Debug, Default)]
pub struct Failures {
    counts: [u64; KINDS.len()],
}

impl Failures {
    /// Counts one failure.
    pub fn add(&mut self, kind: Kind) {
        self.counts[kind as usize] += 1;
    }

    /// How many failures of one kind there were.
    #[must_use]
    pub fn count(&self, kind: Kind) -> u64 {
        self.counts[kind as usize]
    }

    /// All failures together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Adds another worker's counts.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(other.counts) {
            *mine += theirs;
        }
    }

    /// The kinds that occurred, by the names used in the JSON output.
    #[must_use]
    pub fn by_kind(&self) -> BTreeMap<&'static str, u64> {
        KINDS
            .iter()
            .filter_map(|&(kind, name)| match self.count(kind) {
                0 => None,
                n => Some((name, n)),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_kinds() {
        for (position, (kind, _)) in KINDS.iter().enumerate() {
            assert_eq!(*kind as usize, position);
        }
    }

    #[test]
    fn only_kinds_that_occurred_are_listed() {
        let mut failures = Failures::default();
        failures.add(Kind::Reset);
        let mut other = Failures::default();
        other.add(Kind::Reset);
        other.add(Kind::Timeout);
        failures.merge(&other);
        assert_eq!(
            failures.by_kind(),
            BTreeMap::from([("reset", 2), ("timeout", 1)])
        );
        assert_eq!(failures.total(), 3);
    }
}
