//! Moving bulk between two sockets without copying it through user space: splice(2) by way of a
//! pipe, nonblocking, with readiness from the worker's back end.
//!
//! A [`Splice`] owns the pipe and can be used for one direction after the other. It moves bytes
//! only while a flow is bulk: [`Splice::relay`] returns when the flow ends or falls quiet, and the
//! caller goes on with ordinary receives.
//!
//! Not for sockets in a sockmap: splice(2) does not see what sockmap has queued. They must have
//! left it for good.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use rustix::net::{RecvFlags, recv};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with};

use super::read::ReadHalf;
use super::write::WriteHalf;
use crate::descriptors::Counted;
use crate::executor::Inner;
use crate::op::{OpId, Operation, Readiness, Socket};
use crate::sys::{reset_on_close, set_nonblocking};

/// Capacity asked for; the pipe keeps its own (64 KiB) where the user has too many pages in pipes.
const PIPE_BYTES: usize = 1 << 20;
/// Most bytes of one splice(2) from a socket. A pipe holds 256 pieces, however large they are: more
/// than its capacity fits where the network brings large ones.
const SPLICE_BYTES: usize = 4 << 20;
/// Bytes moved before other tasks have their turn.
const BYTES_PER_TURN: usize = 4 << 20;
/// Batches in a row below [`SMALL_BATCH`] bytes after which a flow counts as small again.
const SMALL_BATCHES: u8 = 16;
const SMALL_BATCH: usize = 4 * 1024;

/// Why [`Splice::relay`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spliced {
    /// The sender has ended its stream, and everything has been passed on.
    End,
    /// The flow is small now, or has come to urgent data, which splice(2) does not pass; everything
    /// before has been passed on.
    Small,
}

/// A pipe to splice through.
#[derive(Debug)]
pub struct Splice {
    reader: OwnedFd,
    writer: OwnedFd,
    inside: usize,
    _counted: Counted,
}

impl Splice {
    /// Makes the pipe: two descriptors.
    ///
    /// # Errors
    /// Those of `pipe2(2)`, such as `EMFILE`: go on copying then.
    pub fn new() -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let _ = fcntl_setpipe_size(&writer, PIPE_BYTES); // failure leaves the size
        Ok(Self {
            reader,
            writer,
            inside: 0,
            _counted: Counted::new(2),
        })
    }

    /// Whether `from` can be spliced: it is bulk, and nothing it has received is waiting.
    #[must_use]
    pub fn is_possible(from: &ReadHalf) -> bool {
        from.is_bulk() && from.is_quiet()
    }

    /// Moves bytes from one socket to the other until the flow ends or is small; tells `moved` how
    /// many the receiver's socket has taken, as it goes. `to` is flushed first. Does not end `to`.
    ///
    /// Not cancel safe: if this is dropped while bytes are in the pipe, they are lost. The
    /// connection `to` belongs to is then reset when it closes, so that it does not look whole.
    ///
    /// # Errors
    /// Those of `recv(2)` and `send(2)`.
    ///
    /// # Panics
    /// If [`Splice::is_possible`] says no.
    pub async fn relay(
        &mut self,
        from: &mut ReadHalf,
        to: &mut WriteHalf,
        mut moved: impl FnMut(usize),
    ) -> io::Result<Spliced> {
        assert!(from.is_quiet(), "received data would be overtaken");
        to.flush().await?;
        if self.inside > 0 {
            *self = Self::new()?; // what an earlier flow left behind is nobody else's
        }
        let (source, target) = (Rc::clone(from.socket()), Rc::clone(to.socket()));
        set_nonblocking(&*source);
        set_nonblocking(&*target);
        let mut transfer = Transfer {
            pipe: self,
            inner: Rc::clone(from.inner()),
            source,
            target,
            waiting: None,
            small: 0,
            promised: false,
        };
        let result = poll_fn(|cx| transfer.poll(cx, &mut moved)).await;
        if !matches!(result, Ok(Spliced::End)) {
            from.leave_bulk();
        }
        result
    }
}

/// One call of [`Splice::relay`].
struct Transfer<'a> {
    pipe: &'a mut Splice,
    inner: Rc<Inner>,
    source: Rc<Socket>,
    target: Rc<Socket>,
    waiting: Option<OpId>,
    small: u8,
    /// The source has said that there is something, and nothing has been found yet.
    promised: bool,
}

impl Transfer<'_> {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        moved: &mut impl FnMut(usize),
    ) -> Poll<io::Result<Spliced>> {
        let mut budget = BYTES_PER_TURN;
        let mut ended = false;
        loop {
            if let Some(op) = self.waiting {
                let (result, _) = ready!(self.inner.driver.borrow_mut().poll_once(op, cx));
                self.waiting = None;
                self.promised = self.pipe.inside == 0;
                if result < 0 {
                    return Poll::Ready(Err(io::Error::from_raw_os_error(-result)));
                }
            }
            while self.pipe.inside > 0 {
                match splice(&self.pipe.reader, &*self.target, self.pipe.inside) {
                    Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Ok(n) => {
                        self.pipe.inside -= n;
                        budget = budget.saturating_sub(n);
                        self.inner.driver.borrow_mut().spliced(n);
                        moved(n);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Poll::Ready(Err(noted(&self.target, error))),
                }
            }
            if self.pipe.inside > 0 {
                self.wait(Readiness::Write);
                continue;
            }
            if ended {
                return Poll::Ready(Ok(Spliced::End));
            }
            if self.small >= SMALL_BATCHES {
                return Poll::Ready(Ok(Spliced::Small));
            }
            if budget == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            match splice(&*self.source, &self.pipe.writer, SPLICE_BYTES) {
                Ok(0) => match has_ended(&self.source) {
                    Ok(true) => ended = true,
                    Ok(false) => return Poll::Ready(Ok(Spliced::Small)),
                    Err(error) => return Poll::Ready(Err(error)),
                },
                Ok(n) => {
                    self.promised = false;
                    self.pipe.inside = n;
                    self.small = if n < SMALL_BATCH { self.small + 1 } else { 0 };
                }
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                    return Poll::Ready(Err(noted(&self.source, error)));
                }
                // Ready and nothing to take: splice(2) stops at urgent data and stays there.
                Err(_) if self.promised => return Poll::Ready(Ok(Spliced::Small)),
                Err(_) => self.wait(Readiness::Read),
            }
        }
    }

    fn wait(&mut self, readiness: Readiness) {
        let socket = match readiness {
            Readiness::Read | Readiness::Failure => &self.source,
            Readiness::Write => &self.target,
        };
        let operation = Operation::Ready(Rc::clone(socket), readiness);
        self.waiting = Some(self.inner.driver.borrow_mut().start(operation));
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        if let Some(op) = self.waiting.take() {
            self.inner.driver.borrow_mut().abandon(op);
        }
        if self.pipe.inside > 0 {
            let _ = reset_on_close(&*self.target); // it may be gone already
        }
    }
}

/// The error, which the kernel tells once, noted for the connection's other half.
fn noted(socket: &Socket, error: io::Error) -> io::Error {
    socket.note(-error.raw_os_error().unwrap_or(0));
    error
}

/// Whether a source of which splice(2) says that nothing more comes has ended its stream. It says
/// so too where urgent data and then FIN are next, and after an error that something else was told.
fn has_ended(source: &Socket) -> io::Result<bool> {
    let mut byte = [0_u8];
    let (_, n) = recv(source, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT)
        .map_err(|error| noted(source, error.into()))?;
    match source.failure() {
        Some(code) if n == 0 => Err(io::Error::from_raw_os_error(code)),
        _ => Ok(n == 0),
    }
}

fn splice(from: impl AsFd, to: impl AsFd, len: usize) -> io::Result<usize> {
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    Ok(rustix::pipe::splice(from, None, to, None, len, flags)?)
}
