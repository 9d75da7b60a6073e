//! Sending: buffers queue up and go out in one vectored send.

use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use rustix::net::{Shutdown, shutdown};

use crate::buf::Buf;
use crate::executor::Inner;
use crate::op::{OpId, Operation, SendList, Socket};
use crate::sys::reset_on_close;

/// Most bytes that [`WriteHalf::hand_over`] does not wait for.
const HAND_OVER_BYTES: usize = 16 * 1024;

/// The sending half of a connection. What is queued goes out in order by [`WriteHalf::flush`].
#[derive(Debug)]
pub struct WriteHalf {
    socket: Rc<Socket>,
    inner: Rc<Inner>,
    /// What to send next; none while there is nothing.
    queue: Option<Box<SendList>>,
    in_flight: Option<InFlight>,
}

/// A send under way.
#[derive(Debug)]
struct InFlight {
    op: OpId,
    bytes: u32,
    silent: bool,
}

impl WriteHalf {
    pub(crate) fn new(socket: Rc<Socket>, inner: Rc<Inner>) -> Self {
        Self {
            socket,
            inner,
            queue: None,
            in_flight: None,
        }
    }

    /// Bytes queued or on their way into the socket. The caller bounds them: this queue does not.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        let in_flight = self
            .in_flight
            .as_ref()
            .map_or(0, |send| send.bytes as usize);
        self.queued_bytes() + in_flight
    }

    fn queued_bytes(&self) -> usize {
        let queue = self.queue.as_ref();
        queue.map_or(0, |list| list.queued_bytes())
    }

    /// Queues a buffer; empty ones are dropped.
    pub fn push(&mut self, buf: Buf) {
        if buf.is_empty() {
            return;
        }
        let list = || self.inner.driver.borrow_mut().list();
        self.queue.get_or_insert_with(list).queue(buf);
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
        if self.queued_bytes() > HAND_OVER_BYTES {
            return self.poll_flush(cx);
        }
        ready!(self.poll_in_flight(cx))?;
        if let Some(list) = self.next_list() {
            let last = self.queue.is_none();
            self.submit(list, last);
        }
        Poll::Ready(Ok(()))
    }

    /// Waits for the send under way.
    fn poll_in_flight(&mut self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        let Some(InFlight { op, silent, .. }) = self.in_flight else {
            return Poll::Ready(Ok(()));
        };
        let mut driver = self.inner.driver.borrow_mut();
        let ended = if silent {
            ready!(driver.poll_silent(op, cx))
        } else {
            Some(ready!(driver.poll_once(op, cx)))
        };
        self.in_flight = None;
        let Some((result, operation)) = ended else {
            return Poll::Ready(Ok(()));
        };
        let Operation::Send(_, mut list) = operation else {
            unreachable!("a send keeps its list")
        };
        // The driver has sent on what fell short, except where the kernel took nothing at all.
        let sent = match usize::try_from(result) {
            Ok(bytes) if list.sent(bytes) => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
        };
        driver.recycle_list(list);
        Poll::Ready(sent)
    }

    /// What to send next, taken out of the queue.
    fn next_list(&mut self) -> Option<Box<SendList>> {
        let mut list = self.queue.take()?;
        if list.has_overflow() {
            let mut next = self.inner.driver.borrow_mut().list();
            list.move_overflow(&mut next);
            self.queue = Some(next);
        }
        Some(list)
    }

    fn submit(&mut self, list: Box<SendList>, silent: bool) {
        let bytes = list.bytes() as u32; // UIO_MAXIOV blocks at most
        let operation = Operation::Send(Rc::clone(&self.socket), list);
        let mut driver = self.inner.driver.borrow_mut();
        let op = if silent {
            driver.start_silent(operation)
        } else {
            driver.start(operation)
        };
        self.in_flight = Some(InFlight { op, bytes, silent });
    }

    /// Sends FIN. Call after a flush.
    ///
    /// # Errors
    /// `ENOTCONN` when the connection is gone.
    pub fn shutdown(&self) -> io::Result<()> {
        shutdown(&*self.socket, Shutdown::Write).map_err(|error| {
            // The reason, if nothing else was told.
            self.socket.fetch_error();
            self.socket.note(-error.raw_os_error());
            error.into()
        })
    }

    pub(crate) fn socket(&self) -> &Rc<Socket> {
        &self.socket
    }

    /// Makes the final close of the connection send RST.
    ///
    /// # Errors
    /// That of `setsockopt(2)`.
    pub fn reset_on_close(&self) -> io::Result<()> {
        reset_on_close(&*self.socket)
    }

    /// The worker's buffer memory.
    #[must_use]
    pub fn pool(&self) -> &crate::buf::Pool {
        &self.inner.pool
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        if let Some(send) = self.in_flight.take() {
            self.inner.driver.borrow_mut().abandon(send.op);
        }
    }
}
