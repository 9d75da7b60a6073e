//! The descriptor that operations work on. An operation owns it as long as the kernel may use its
//! number.

use std::cell::{Cell, OnceCell, RefCell};
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::task::Waker;

use crate::descriptors::Counted;
use crate::sys::take_error;

/// An owned descriptor; closed when the last half and the last operation let go of it.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    /// The first error that the kernel has told; 0: none. The kernel tells an error once, to
    /// whatever asks first, and from then on it looks like an end.
    failed: Cell<i32>,
    /// Its registration with epoll, where that is the back end.
    registration: OnceCell<Registration>,
    /// Woken by the first error.
    waiter: Waiter,
    _counted: Counted,
}

/// At most one waker.
#[derive(Default)]
struct Waiter(Cell<Option<Waker>>);

impl fmt::Debug for Waiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waiter")
    }
}

impl Socket {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            failed: Cell::new(0),
            registration: OnceCell::new(),
            waiter: Waiter::default(),
            _counted: Counted::new(1),
        }
    }

    /// The error that has ended this connection, if one has.
    pub(crate) fn failure(&self) -> Option<i32> {
        Some(self.failed.get()).filter(|code| *code != 0)
    }

    /// Notes an error that the kernel has told of this connection.
    pub(crate) fn fail(&self, code: i32) {
        if self.failed.get() == 0 {
            self.failed.set(code);
        }
        if let Some(waker) = self.waiter.0.take() {
            waker.wake();
        }
    }

    /// Notes the error in an operation's result, if it is one of the connection.
    pub(crate) fn note(&self, result: i32) {
        match -result {
            ..=0 | libc::ECANCELED | libc::EAGAIN | libc::EINTR | libc::ENOBUFS => {}
            code => self.fail(code),
        }
    }

    /// Asks the kernel for an error that nothing has been told yet.
    pub(crate) fn fetch_error(&self) {
        if let Ok(code) = take_error(self) {
            self.note(-code);
        }
    }

    /// Wakes `waker` when the connection fails.
    pub(crate) fn wake_on_failure(&self, waker: &Waker) {
        self.waiter.0.set(Some(waker.clone()));
    }

    pub(crate) fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub(crate) fn registration(&self) -> Option<&Registration> {
        self.registration.get()
    }

    /// Remembers the registration; there is only one.
    pub(crate) fn register(&self, registration: Registration) {
        let fresh = self.registration.set(registration).is_ok();
        debug_assert!(fresh, "a socket is registered once");
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A socket's place in epoll's table of registered sockets; frees it when dropped.
pub(crate) struct Registration {
    index: u32,
    freed: Rc<RefCell<Vec<u32>>>,
}

impl Registration {
    /// `freed` gets the index back.
    pub(crate) fn new(index: u32, freed: Rc<RefCell<Vec<u32>>>) -> Self {
        Self { index, freed }
    }

    pub(crate) fn index(&self) -> u32 {
        self.index
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("index", &self.index)
            .finish()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.freed.borrow_mut().push(self.index);
    }
}
