//! Multishot accept.

use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::{Poll, ready};

use rustix::net::{SocketFlags, accept_with, sockopt};

use super::stream::TcpStream;
use crate::executor::{Inner, current};
use crate::keepalive::Keepalive;
use crate::op::{OpId, Operation, Socket};
use crate::sys::{keep_urgent_inline, set_nonblocking};

/// A listening socket with one multishot accept under way.
#[derive(Debug)]
pub struct Listener {
    socket: Rc<Socket>,
    inner: Rc<Inner>,
    op: Option<OpId>,
}

impl Listener {
    /// Takes over a listening standard socket (blocking mode). Urgent data of the connections it
    /// accepts stay in their place among the others (`SO_OOBINLINE`, which they inherit).
    ///
    /// # Panics
    /// Outside [`crate::Runtime::run`].
    #[must_use]
    pub fn from_std(listener: std::net::TcpListener) -> Self {
        let socket = Rc::new(Socket::new(OwnedFd::from(listener)));
        keep_urgent_inline(&*socket);
        Self {
            socket,
            inner: current(),
            op: None,
        }
    }

    /// Disables Nagle's algorithm for the connections it accepts, which inherit it (`tcp(7)`).
    ///
    /// # Errors
    /// That of `setsockopt(2)`.
    pub fn set_nodelay(&self) -> io::Result<()> {
        Ok(sockopt::set_tcp_nodelay(&*self.socket, true)?)
    }

    /// Turns keepalive probes on for the connections it accepts, which inherit all of it.
    ///
    /// # Errors
    /// That of `setsockopt(2)`.
    pub fn set_keepalive(&self, keepalive: &Keepalive) -> io::Result<()> {
        keepalive.apply(&*self.socket)
    }

    /// Waits for the next connection. Cancel safe.
    ///
    /// # Errors
    /// Those of `accept(2)`; after `EMFILE`, `ENFILE` or `ENOMEM` wait a little before the next
    /// call.
    pub async fn accept(&mut self) -> io::Result<TcpStream> {
        poll_fn(|cx| {
            loop {
                let mut driver = self.inner.driver.borrow_mut();
                let op = if let Some(op) = self.op {
                    op
                } else {
                    let operation = Operation::Accept(Rc::clone(&self.socket));
                    *self.op.insert(driver.start(operation))
                };
                match ready!(driver.poll_many(op, cx)) {
                    None => self.op = None, // the kernel ended it: arm it again
                    // Stopped because many connections came at once, or one that is gone already.
                    Some(done) if is_passing(-done.result) => {}
                    Some(done) if done.result < 0 => {
                        return Poll::Ready(Err(io::Error::from_raw_os_error(-done.result)));
                    }
                    Some(done) => match done.accepted {
                        Some(fd) => return Poll::Ready(Ok(TcpStream::from_fd(fd))),
                        None => unreachable!("an accept that succeeds has a descriptor"),
                    },
                }
            }
        })
        .await
    }

    /// Stops listening. Returns the connections that the kernel had taken by then and nobody has:
    /// those of the operation under way, and those in the listener's queue. What comes later is
    /// refused, or goes to another listener of the port (`SO_REUSEPORT`).
    pub async fn close(mut self) -> Vec<TcpStream> {
        let mut rest = Vec::new();
        if let Some(op) = self.op {
            self.inner.driver.borrow_mut().cancel(op);
            poll_fn(|cx| {
                let mut driver = self.inner.driver.borrow_mut();
                while let Some(done) = ready!(driver.poll_many(op, cx)) {
                    rest.extend(done.accepted.map(TcpStream::from_fd));
                }
                Poll::Ready(())
            })
            .await;
            self.op = None;
        }
        set_nonblocking(&*self.socket);
        loop {
            match accept_with(&*self.socket, SocketFlags::CLOEXEC) {
                Ok(fd) => rest.push(TcpStream::from_fd(fd)),
                Err(error) if is_passing(error.raw_os_error()) => {}
                Err(_) => return rest,
            }
        }
    }
}

/// Whether an error says nothing about the next connection.
fn is_passing(code: i32) -> bool {
    matches!(code, libc::ECANCELED | libc::ECONNABORTED | libc::EINTR)
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(op) = self.op.take() {
            self.inner.driver.borrow_mut().abandon(op);
        }
    }
}
