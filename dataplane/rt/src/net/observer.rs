//! A look at a connection from beside its halves: whether it has failed, and whether what was sent
//! gets there.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::stream::TcpStream;
use crate::executor::{Inner, current};
use crate::op::{OpId, Operation, Readiness, Socket};
use crate::sys::{bytes_acknowledged, bytes_unacknowledged};
use crate::time::{Sleep, sleep};

/// Times in which nobody receives are short as a rule. The kernel is asked to tell of a failure
/// only after this one, so that a message that waits a moment for room costs no operation.
const GRACE: Duration = Duration::from_millis(200);

/// Sees what happens to a connection. It keeps the descriptor open: drop it with the halves.
#[derive(Debug)]
pub struct Observer {
    socket: Rc<Socket>,
    vigil: Option<Box<Vigil>>,
}

/// A wait for the failure of a connection. Once begun it goes on: a flow that waits for room again
/// and again has one operation for all of these times.
#[derive(Debug)]
struct Vigil {
    inner: Rc<Inner>,
    wait: Wait,
}

#[derive(Debug)]
enum Wait {
    Later(Sleep),
    Armed(OpId),
}

/// How far a connection has come with what was handed to its socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// Bytes the peer has acknowledged (`tcpi_bytes_acked`).
    pub acknowledged: u64,
    /// Bytes it has not, FIN included (`SIOCOUTQ`).
    pub left: usize,
}

impl TcpStream {
    /// Looks at this connection from outside.
    #[must_use]
    pub fn observer(&self) -> Observer {
        Observer {
            socket: Rc::clone(self.socket()),
            vigil: None,
        }
    }
}

impl Observer {
    /// The error that has ended the connection, if one has and any operation was told: a reset, or
    /// a peer that does not answer. The end of what the peer sends is none.
    #[must_use]
    pub fn failure(&self) -> Option<io::Error> {
        let code = self.socket.failure();
        code.map(io::Error::from_raw_os_error)
    }

    /// Ready once the connection has failed. For the times in which nothing is received from it:
    /// because what was received waits for somebody else, or because the peer has ended its
    /// stream. Later calls cost next to nothing.
    ///
    /// # Panics
    /// Outside [`crate::Runtime::run`].
    pub fn poll_failure(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.socket.failure().is_none() {
            self.socket.wake_on_failure(cx.waker());
            self.keep_vigil(cx);
        }
        match self.socket.failure() {
            Some(_) => Poll::Ready(()),
            None => Poll::Pending,
        }
    }

    fn keep_vigil(&mut self, cx: &mut Context<'_>) {
        let begin = || {
            Box::new(Vigil {
                inner: current(),
                wait: Wait::Later(sleep(GRACE)),
            })
        };
        let vigil = self.vigil.get_or_insert_with(begin);
        if let Wait::Later(sleep) = &mut vigil.wait
            && Pin::new(sleep).poll(cx).is_ready()
        {
            let operation = Operation::Ready(Rc::clone(&self.socket), Readiness::Failure);
            let op = vigil.inner.driver.borrow_mut().start(operation);
            vigil.wait = Wait::Armed(op);
        }
    }

    /// How far what was sent has come; none once the connection is gone.
    #[must_use]
    pub fn sent(&self) -> Option<Sent> {
        Some(Sent {
            acknowledged: bytes_acknowledged(&*self.socket)?,
            left: bytes_unacknowledged(&*self.socket)?,
        })
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        if let Some(vigil) = self.vigil.take()
            && let Wait::Armed(op) = vigil.wait
        {
            vigil.inner.driver.borrow_mut().abandon(op);
        }
    }
}
