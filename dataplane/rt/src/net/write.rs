//! Sending: buffers queue up and go out in one vectored send.

use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use io_uring::opcode;
use io_uring::types::Fd;

use super::socket::{Socket, reset_on_close};
use crate::buf::Buf;
use crate::exec::Inner;
use crate::op::{Keep, OpId};

/// Vectors of one send; the kernel takes at most 1024 (`UIO_MAXIOV`).
const VECTORS_MAX: usize = 512;

/// Buffers of one send with their vectors. Boxed: the kernel reads it while the send is under way.
#[derive(Debug, Default)]
pub(crate) struct SendList {
    message: Option<libc::msghdr>,
    vectors: Vec<libc::iovec>,
    /// First vector that is not sent completely.
    first: usize,
    bufs: Vec<Buf>,
    bytes: usize,
}

impl SendList {
    fn is_full(&self) -> bool {
        self.vectors.len() >= VECTORS_MAX
    }

    /// Appends a buffer; one that follows the last in memory extends its vector.
    fn push(&mut self, buf: Buf) {
        let base = buf.as_ptr().cast_mut();
        self.bytes += buf.len();
        match self.vectors.last_mut() {
            Some(last) if last.iov_base.addr() + last.iov_len == base.addr() => {
                last.iov_len += buf.len();
            }
            _ => self.vectors.push(libc::iovec {
                iov_base: base.cast(),
                iov_len: buf.len(),
            }),
        }
        self.bufs.push(buf);
    }

    /// Marks `n` bytes as sent. Returns whether all are.
    fn sent(&mut self, mut n: usize) -> bool {
        self.bytes -= n;
        while let Some(vector) = self.vectors.get_mut(self.first) {
            if n < vector.iov_len {
                // SAFETY: n is less than the vector's length, so the pointer stays inside it.
                vector.iov_base = unsafe { vector.iov_base.cast::<u8>().add(n) }.cast();
                vector.iov_len -= n;
                return false;
            }
            n -= vector.iov_len;
            self.first += 1;
        }
        self.clear();
        true
    }

    fn clear(&mut self) {
        self.vectors.clear();
        self.bufs.clear();
        self.first = 0;
        self.bytes = 0;
    }

    fn message(&mut self) -> *const libc::msghdr {
        // SAFETY: msghdr is plain old data; all zeroes means no name, vectors and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        let left = &mut self.vectors[self.first..];
        message.msg_iov = left.as_mut_ptr();
        message.msg_iovlen = left.len();
        self.message.insert(message)
    }
}

/// The sending half of a connection. What is queued goes out in order by [`WriteHalf::flush`].
#[derive(Debug)]
pub struct WriteHalf {
    socket: Rc<Socket>,
    inner: Rc<Inner>,
    queue: Box<SendList>,
    /// Behind `queue` when that has as many vectors as one send takes.
    overflow: std::collections::VecDeque<Buf>,
    overflow_bytes: usize,
    spare: Option<Box<SendList>>,
    in_flight: Option<OpId>,
    in_flight_bytes: usize,
}

impl WriteHalf {
    pub(crate) fn new(socket: Rc<Socket>, inner: Rc<Inner>) -> Self {
        Self {
            socket,
            inner,
            queue: Box::default(),
            overflow: std::collections::VecDeque::new(),
            overflow_bytes: 0,
            spare: None,
            in_flight: None,
            in_flight_bytes: 0,
        }
    }

    /// Bytes queued or on their way into the socket. The caller bounds them: this queue does not.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.queue.bytes + self.overflow_bytes + self.in_flight_bytes
    }

    /// Queues a buffer; empty ones are dropped.
    pub fn push(&mut self, buf: Buf) {
        if buf.is_empty() {
            return;
        }
        if self.queue.is_full() || !self.overflow.is_empty() {
            self.overflow_bytes += buf.len();
            self.overflow.push_back(buf);
        } else {
            self.queue.push(buf);
        }
    }

    /// Queues a copy of `bytes`, for small control data.
    pub fn push_copy(&mut self, bytes: &[u8]) {
        let pool = self.inner.pool.clone();
        pool.copy_from(bytes, |buf| self.push(buf));
    }

    /// Sends everything that is queued. Cancel safe: a send under way stays under way and the next
    /// flush awaits it.
    ///
    /// # Errors
    /// Those of `send(2)`, such as `EPIPE` or `ECONNRESET`. What was queued is lost then.
    pub async fn flush(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Poll form of [`WriteHalf::flush`].
    ///
    /// # Errors
    /// As [`WriteHalf::flush`].
    pub fn poll_flush(&mut self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if let Some(op) = self.in_flight {
                let done = self.inner.driver.borrow_mut().ops.poll_once(op, cx);
                let (result, keep) = ready!(done);
                self.in_flight = None;
                let Keep::Send(_, mut list) = keep else {
                    unreachable!("a send keeps its list")
                };
                if result < 0 {
                    self.in_flight_bytes = 0;
                    return Poll::Ready(Err(io::Error::from_raw_os_error(-result)));
                }
                if list.sent(result as usize) {
                    self.in_flight_bytes = 0;
                    self.spare = Some(list);
                } else {
                    self.submit(list);
                }
                continue;
            }
            if self.queue.bytes == 0 {
                return Poll::Ready(Ok(()));
            }
            let next = self.spare.take().unwrap_or_default();
            let list = std::mem::replace(&mut self.queue, next);
            while !self.queue.is_full() {
                let Some(buf) = self.overflow.pop_front() else {
                    break;
                };
                self.overflow_bytes -= buf.len();
                self.queue.push(buf);
            }
            self.submit(list);
        }
    }

    fn submit(&mut self, list: Box<SendList>) {
        self.in_flight_bytes = list.bytes;
        let keep = Keep::Send(Rc::clone(&self.socket), list);
        let op = self.inner.driver.borrow_mut().submit_once(keep, |keep| {
            let Keep::Send(socket, list) = keep else {
                unreachable!("just built")
            };
            let fd = Fd(socket.raw());
            // WAITALL: the kernel retries short sends itself and completes once.
            let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
            if let [vector] = &list.vectors[list.first..] {
                let base = vector.iov_base.cast::<u8>().cast_const();
                return opcode::Send::new(fd, base, vector.iov_len as u32)
                    .flags(flags)
                    .build();
            }
            opcode::SendMsg::new(fd, list.message())
                .flags(flags as u32)
                .build()
        });
        self.in_flight = Some(op);
    }

    /// Sends FIN. Call after a flush.
    ///
    /// # Errors
    /// `ENOTCONN` when the connection is gone.
    pub fn shutdown(&self) -> io::Result<()> {
        shutdown(&self.socket, Shutdown::Write)
    }

    /// Makes the final close of the connection send RST.
    ///
    /// # Errors
    /// That of `setsockopt(2)`.
    pub fn reset_on_close(&self) -> io::Result<()> {
        reset_on_close(&self.socket)
    }

    /// The worker's buffer memory.
    #[must_use]
    pub fn pool(&self) -> &crate::buf::Pool {
        &self.inner.pool
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        if let Some(op) = self.in_flight.take() {
            self.inner.driver.borrow_mut().abandon(op);
        }
    }
}

fn shutdown(socket: &Socket, how: Shutdown) -> io::Result<()> {
    let how = match how {
        Shutdown::Read => libc::SHUT_RD,
        Shutdown::Write => libc::SHUT_WR,
        Shutdown::Both => libc::SHUT_RDWR,
    };
    // SAFETY: shutdown(2) has no memory-safety preconditions.
    let rc = unsafe { libc::shutdown(socket.raw(), how) };
    if rc != 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
