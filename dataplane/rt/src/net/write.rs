//! Sending: buffers queue up and go out in one vectored send.

use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use super::socket::{Socket, reset_on_close};
use crate::buf::Buf;
use crate::exec::Inner;
use crate::op::{Keep, OpId};

/// Vectors of one send; the kernel takes at most 1024 (`UIO_MAXIOV`).
const VECTORS_MAX: usize = 512;

/// Most bytes that [`WriteHalf::hand_over`] does not wait for.
const HAND_OVER_BYTES: usize = 16 * 1024;

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

    /// Bytes left to send.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Address and length of what is left, if it is in one piece.
    pub(crate) fn only_vector(&self) -> Option<(*const u8, u32)> {
        let [vector] = &self.vectors[self.first..] else {
            return None;
        };
        let base = vector.iov_base.cast::<u8>().cast_const();
        Some((base, vector.iov_len as u32))
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
    pub(crate) fn sent(&mut self, mut n: usize) -> bool {
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

    /// The kernel's description of what is left.
    pub(crate) fn message(&mut self) -> *const libc::msghdr {
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
            ready!(self.poll_in_flight(cx))?;
            let Some(list) = self.next_list() else {
                return Poll::Ready(Ok(()));
            };
            self.submit(list, false);
        }
    }

    /// As [`WriteHalf::flush`], but done as soon as the kernel is told to send: waits only for what
    /// was handed over before. A relay that receives next saves a wake-up and a system call per
    /// message. More than 16 KiB are flushed. What the socket does not take at once follows by
    /// itself. Flush before [`WriteHalf::shutdown`].
    ///
    /// # Errors
    /// As [`WriteHalf::flush`]; an error of this send comes with the next call.
    pub async fn hand_over(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll_hand_over(cx)).await
    }

    /// Poll form of [`WriteHalf::hand_over`].
    ///
    /// # Errors
    /// As [`WriteHalf::hand_over`].
    pub fn poll_hand_over(&mut self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        if self.queue.bytes + self.overflow_bytes > HAND_OVER_BYTES {
            return self.poll_flush(cx);
        }
        ready!(self.poll_in_flight(cx))?;
        if let Some(list) = self.next_list() {
            self.submit(list, self.queue.bytes == 0);
        }
        Poll::Ready(Ok(()))
    }

    /// Waits for the send under way.
    fn poll_in_flight(&mut self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        while let Some(op) = self.in_flight {
            let done = self.inner.driver.borrow_mut().poll_once(op, cx);
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
                self.submit(list, false);
            }
        }
        Poll::Ready(Ok(()))
    }

    /// What to send next, taken out of the queue.
    fn next_list(&mut self) -> Option<Box<SendList>> {
        if self.queue.bytes == 0 {
            return None;
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
        Some(list)
    }

    fn submit(&mut self, list: Box<SendList>, relaxed: bool) {
        self.in_flight_bytes = list.bytes;
        let keep = Keep::Send(Rc::clone(&self.socket), list);
        let mut driver = self.inner.driver.borrow_mut();
        self.in_flight = Some(if relaxed {
            driver.start_relaxed(keep)
        } else {
            driver.start(keep)
        });
    }

    /// Sends FIN. Call after a flush.
    ///
    /// # Errors
    /// `ENOTCONN` when the connection is gone.
    pub fn shutdown(&self) -> io::Result<()> {
        shutdown(&self.socket, Shutdown::Write)
    }

    pub(crate) fn socket(&self) -> &Rc<Socket> {
        &self.socket
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
