//! The phases of an operation with one result. A send that the socket does not take whole waits
//! for room and goes on, until all is sent or it fails.
//!
//! The wait is our own. That of the kernel's `IORING_OP_SEND` includes `POLLRDHUP`: after the
//! peer's FIN it is over at once, and after 127 more attempts the kernel lets a thread of its own
//! wait, or fails with `EAGAIN` if the socket has `O_NONBLOCK`. So does `IORING_OP_POLL_ADD`
//! (Linux 6.18, `IO_POLL_UNMASK`); its multishot form tells of the FIN once and then of changes
//! only.

use super::operation::{FollowUp, Operation, Readiness};

/// What the kernel does for a single operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Sends, and says nothing when that succeeds.
    Silent,
    /// Does the operation itself.
    Doing,
    /// Waits until the socket takes more.
    Waiting,
    /// Is told to stop waiting: the socket takes more.
    Waited,
}

impl Phase {
    pub(super) fn of(operation: &Operation, silent: bool) -> Self {
        match operation {
            _ if silent => Self::Silent,
            Operation::Ready(_, Readiness::Write | Readiness::Failure) => Self::Waiting,
            _ => Self::Doing,
        }
    }

    /// What comes after a completion, or the operation's result.
    pub(super) fn advance(
        &mut self,
        operation: &mut Operation,
        result: i32,
        more: bool,
    ) -> Result<FollowUp, i32> {
        match self {
            Self::Silent | Self::Doing if goes_on(operation, result) => {
                *self = Self::Waiting;
                Ok(FollowUp::Wait)
            }
            Self::Silent | Self::Doing => {
                *self = Self::Doing;
                Err(result)
            }
            Self::Waiting if result < 0 => Err(result),
            Self::Waiting if !is_answered(operation, result) => Ok(match more {
                true => FollowUp::Nothing,
                false => FollowUp::WaitForChange,
            }),
            Self::Waiting | Self::Waited if more => {
                let first = std::mem::replace(self, Self::Waited) == Self::Waiting;
                Ok(if first {
                    FollowUp::Stop
                } else {
                    FollowUp::Nothing
                })
            }
            Self::Waiting | Self::Waited if matches!(operation, Operation::Send(..)) => {
                *self = Self::Doing;
                Ok(FollowUp::Again)
            }
            Self::Waiting | Self::Waited => Err(i32::from(libc::POLLOUT)),
        }
    }
}

/// Whether the result of a wait is what was waited for.
fn is_answered(operation: &Operation, result: i32) -> bool {
    let Operation::Ready(socket, Readiness::Failure) = operation else {
        return has_room(result);
    };
    if result & i32::from(libc::POLLERR | libc::POLLHUP) != 0 {
        socket.fetch_error();
    }
    socket.failure().is_some() // not if both sides have ended in order
}

/// Whether the result of a wait tells of room, or of an error that ends all waiting. The end of
/// what the peer sends is neither, but io_uring always tells of it as well.
fn has_room(result: i32) -> bool {
    let told = libc::POLLOUT | libc::POLLERR | libc::POLLHUP | libc::POLLNVAL;
    result & i32::from(told) != 0
}

/// Whether a send with this result has only begun. What was sent is noted.
fn goes_on(operation: &mut Operation, result: i32) -> bool {
    let Operation::Send(_, list) = operation else {
        return false;
    };
    let sent = usize::try_from(result).unwrap_or(0);
    let short = sent > 0 && sent < list.bytes();
    if short {
        list.sent(sent);
    }
    short || result == -libc::EAGAIN
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::buf::{Pool, PoolConfig};
    use crate::op::{SendList, Socket};

    const OUT: i32 = libc::POLLOUT as i32;
    const FIN: i32 = libc::POLLRDHUP as i32;
    const GONE: i32 = libc::POLLHUP as i32;
    const FULL: i32 = -libc::EAGAIN;

    /// Completions of an operation (result, whether more follow), and what comes after each.
    type Steps = &'static [(i32, bool, Result<FollowUp, i32>)];

    fn check(operation: &mut Operation, silent: bool, steps: Steps) {
        let mut phase = Phase::of(operation, silent);
        for (at, &(result, more, ref after)) in steps.iter().enumerate() {
            assert_eq!(&phase.advance(operation, result, more), after, "step {at}");
        }
    }

    #[test]
    fn a_send_goes_on_when_there_is_room_and_only_then() {
        let (one, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let socket = Rc::new(Socket::new(one.into()));
        let send = |bytes: &[u8]| {
            let pool = Pool::new(PoolConfig::default());
            let mut list = Box::<SendList>::default();
            pool.copy_from(bytes, |buf| list.push(buf));
            Operation::Send(Rc::clone(&socket), list)
        };
        let whole: Steps = &[(4, false, Err(4))];
        let bit_by_bit: Steps = &[
            (3, false, Ok(FollowUp::Wait)),
            (OUT, false, Ok(FollowUp::Again)),
            (FULL, false, Ok(FollowUp::Wait)),
            (OUT | FIN, false, Ok(FollowUp::Again)),
            (1, false, Err(1)),
        ];
        let after_fin: Steps = &[
            (FULL, false, Ok(FollowUp::Wait)),
            (FIN, false, Ok(FollowUp::WaitForChange)),
            (FIN, true, Ok(FollowUp::Nothing)),
            (OUT | FIN, true, Ok(FollowUp::Stop)),
            (OUT | FIN, true, Ok(FollowUp::Nothing)),
            (-libc::ECANCELED, false, Ok(FollowUp::Again)),
            (4, false, Err(4)),
        ];
        let broken: Steps = &[
            (FULL, false, Ok(FollowUp::Wait)),
            (GONE, false, Ok(FollowUp::Again)),
            (-libc::EPIPE, false, Err(-libc::EPIPE)),
        ];
        for silent in [false, true] {
            for steps in [whole, bit_by_bit, after_fin, broken] {
                check(&mut send(b"four"), silent, steps);
            }
        }
        let mut ready = Operation::Ready(Rc::clone(&socket), Readiness::Write);
        check(&mut ready, false, &[(OUT, false, Err(OUT))]);
        let mut ready = Operation::Ready(socket, Readiness::Write);
        check(
            &mut ready,
            false,
            &[
                (FIN, false, Ok(FollowUp::WaitForChange)),
                (OUT | FIN, true, Ok(FollowUp::Stop)),
                (-libc::ECANCELED, false, Err(OUT)),
            ],
        );
    }
}
