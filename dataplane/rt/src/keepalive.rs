//! TCP keepalive, and the connections that are too young to have it.
//!
//! Turning it on takes four system calls, and the probes are minutes away: a connection that is
//! made here gets it with the next look of its worker, about once a second, if it is still there.
//! Most are not, and the worker's time is theirs. Accepted ones inherit it from their listener.

use std::io;
use std::os::fd::AsFd;
use std::rc::{Rc, Weak};
use std::time::Duration;

use rustix::net::sockopt;

use crate::op::Socket;

/// Connections that wait for it at a time; what comes above that has it at once.
const YOUNG_MAX: usize = 1 << 14;

/// TCP keepalive settings (`tcp(7)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Idle time before the first probe (`TCP_KEEPIDLE`), whole seconds.
    pub time: Duration,
    /// Time between probes (`TCP_KEEPINTVL`), whole seconds.
    pub interval: Duration,
    /// Unanswered probes before the connection is dropped (`TCP_KEEPCNT`).
    pub retries: u32,
}

impl Keepalive {
    pub(crate) fn apply(&self, fd: impl AsFd) -> io::Result<()> {
        let seconds = |duration: Duration| Duration::from_secs(duration.as_secs().clamp(1, 32_767));
        sockopt::set_socket_keepalive(&fd, true)?;
        sockopt::set_tcp_keepidle(&fd, seconds(self.time))?;
        sockopt::set_tcp_keepintvl(&fd, seconds(self.interval))?;
        Ok(sockopt::set_tcp_keepcnt(&fd, self.retries.clamp(1, 127))?)
    }
}

/// Connections of one worker that are to have keepalive if they last.
#[derive(Default)]
pub(crate) struct Young(Vec<(Weak<Socket>, Keepalive)>);

impl Young {
    pub(crate) fn add(&mut self, socket: &Rc<Socket>, keepalive: Keepalive) {
        if self.0.len() < YOUNG_MAX {
            self.0.push((Rc::downgrade(socket), keepalive));
        } else {
            turn_on(socket, &keepalive);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Turns it on for those that are still there.
    pub(crate) fn settle(&mut self) {
        for (socket, keepalive) in std::mem::take(&mut self.0) {
            if let Some(socket) = socket.upgrade() {
                turn_on(&socket, &keepalive);
            }
        }
    }
}

fn turn_on(socket: &Socket, keepalive: &Keepalive) {
    // Every TCP socket has the options, and their values are within what it takes.
    let set = keepalive.apply(socket);
    debug_assert!(set.is_ok(), "{set:?}");
}
