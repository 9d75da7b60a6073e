//! The operation table: everything the kernel may still touch is owned here.
//!
//! A submitted operation is named by its slot and the slot's generation, packed into the
//! completion's `user_data`. A future holds only an [`OpId`]; if it is dropped early the operation
//! becomes an orphan that keeps its resources until the kernel's last completion for it.

use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use crate::buf::{Buf, Pool};
use crate::net::sockaddr::RawAddr;
use crate::net::socket::Socket;
use crate::net::{MessageHeader, SendList};

/// Name of an operation: slot and generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OpId(u64);

impl OpId {
    fn new(slot: usize, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | slot as u64)
    }

    pub(crate) fn from_user_data(user_data: u64) -> Self {
        Self(user_data)
    }

    pub(crate) fn user_data(self) -> u64 {
        self.0
    }

    fn slot(self) -> usize {
        (self.0 & 0xffff_ffff) as usize
    }

    fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// What an operation owns while the kernel works on it.
#[derive(Debug)]
pub(crate) enum Keep {
    /// Only the socket, so that its number is not reused meanwhile.
    Socket { _socket: Rc<Socket> },
    /// A send list: buffers, vectors and message header.
    Send(Rc<Socket>, Box<SendList>),
    /// A buffer the kernel appends to.
    Recv(Rc<Socket>, Buf),
    /// Buffers the kernel scatters into.
    RecvMsg(Rc<Socket>, Box<MessageHeader>),
    /// The address of a connect.
    Connect(Rc<Socket>, Box<RawAddr>),
}

/// One completion of a multishot operation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Completion {
    pub(crate) result: i32,
    pub(crate) buffer: Option<u16>,
}

#[derive(Debug)]
enum State {
    Vacant,
    /// Waits for its only completion.
    Once {
        keep: Keep,
        result: Option<i32>,
    },
    /// Multishot: completions queue up until the owner takes them.
    Many {
        queue: VecDeque<Completion>,
        ended: bool,
        stopping: bool,
        _keep: Keep,
    },
    /// The owner is gone.
    Orphan {
        accepts: bool,
        _keep: Keep,
    },
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    state: State,
    waker: Option<Waker>,
    /// A multishot accept's results are descriptors, which an orphan must close.
    accepts: bool,
}

/// What the driver must do after a completion was entered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum After {
    Nothing,
    /// The queue of a multishot receive grew past its bound: stop it until its owner catches up.
    Stop,
    /// A completion nobody owns carried a descriptor: close it.
    Close(i32),
}

/// Completions a multishot operation may queue before it is stopped.
const QUEUE_MAX: usize = 32;

#[derive(Debug, Default)]
pub(crate) struct OpTable {
    slots: Vec<Slot>,
    free: Vec<u32>,
    in_flight: usize,
}

impl OpTable {
    /// Operations the kernel has not finished.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(crate) fn insert_once(&mut self, keep: Keep) -> OpId {
        self.insert(State::Once { keep, result: None }, false)
    }

    pub(crate) fn insert_many(&mut self, keep: Keep, accepts: bool) -> OpId {
        let queue = VecDeque::new();
        self.insert(
            State::Many {
                queue,
                ended: false,
                stopping: false,
                _keep: keep,
            },
            accepts,
        )
    }

    fn insert(&mut self, state: State, accepts: bool) -> OpId {
        self.in_flight += 1;
        if let Some(index) = self.free.pop() {
            let slot = &mut self.slots[index as usize];
            slot.state = state;
            slot.accepts = accepts;
            return OpId::new(index as usize, slot.generation);
        }
        self.slots.push(Slot {
            generation: 1,
            state,
            waker: None,
            accepts,
        });
        OpId::new(self.slots.len() - 1, 1)
    }

    /// Mutable access to what a not yet submitted operation owns, to fill in the entry's pointers.
    pub(crate) fn keep_mut(&mut self, id: OpId) -> &mut Keep {
        match &mut self.slots[id.slot()].state {
            State::Once { keep, .. } => keep,
            _ => unreachable!("only single operations are prepared through their slot"),
        }
    }

    fn get(&mut self, id: OpId) -> Option<&mut Slot> {
        self.slots
            .get_mut(id.slot())
            .filter(|slot| slot.generation == id.generation())
    }

    fn vacate(&mut self, id: OpId) -> State {
        let slot = &mut self.slots[id.slot()];
        slot.generation = slot.generation.wrapping_add(1) & 0x7fff_ffff;
        slot.waker = None;
        self.free.push(id.slot() as u32);
        std::mem::replace(&mut slot.state, State::Vacant)
    }

    /// Enters a completion; wakes the owner.
    pub(crate) fn complete(
        &mut self,
        id: OpId,
        result: i32,
        buffer: Option<u16>,
        more: bool,
        pool: &Pool,
    ) -> After {
        if !more {
            self.in_flight -= 1;
        }
        let Some(slot) = self.get(id) else {
            return After::Nothing;
        };
        let mut after = After::Nothing;
        match &mut slot.state {
            State::Once { result: done, .. } => *done = Some(result),
            State::Many {
                queue,
                ended,
                stopping,
                ..
            } => {
                queue.push_back(Completion { result, buffer });
                *ended = !more;
                if queue.len() >= QUEUE_MAX && more && !*stopping {
                    *stopping = true;
                    after = After::Stop;
                }
            }
            State::Orphan { accepts, .. } => {
                if let Some(bid) = buffer {
                    pool.discard_ring(bid);
                }
                if *accepts && result >= 0 {
                    after = After::Close(result);
                }
                if !more {
                    drop(self.vacate(id));
                }
                return after;
            }
            State::Vacant => return After::Nothing,
        }
        if let Some(waker) = slot.waker.take() {
            waker.wake();
        }
        after
    }

    /// The result of a single operation, with what it owned.
    pub(crate) fn poll_once(&mut self, id: OpId, cx: &Context<'_>) -> Poll<(i32, Keep)> {
        let slot = self
            .get(id)
            .expect("the owner of an operation polls it until it ends");
        if let State::Once {
            result: Some(_), ..
        } = slot.state
        {
            let State::Once {
                keep,
                result: Some(result),
            } = self.vacate(id)
            else {
                unreachable!("checked above")
            };
            return Poll::Ready((result, keep));
        }
        register(&mut slot.waker, cx);
        Poll::Pending
    }

    /// Takes the next queued completion of a multishot operation. `Ready(None)`: it has ended and
    /// its slot is free again.
    pub(crate) fn poll_many(&mut self, id: OpId, cx: &Context<'_>) -> Poll<Option<Completion>> {
        let slot = self
            .get(id)
            .expect("the owner of an operation polls it until it ends");
        let State::Many { queue, ended, .. } = &mut slot.state else {
            unreachable!("polled as multishot")
        };
        if let Some(completion) = queue.pop_front() {
            return Poll::Ready(Some(completion));
        }
        if *ended {
            drop(self.vacate(id));
            return Poll::Ready(None);
        }
        register(&mut slot.waker, cx);
        Poll::Pending
    }

    /// The owner goes away. Returns whether the kernel must still be told to cancel.
    pub(crate) fn abandon(&mut self, id: OpId, pool: &Pool, mut close: impl FnMut(i32)) -> bool {
        let Some(slot) = self.get(id) else {
            return false;
        };
        slot.waker = None;
        let accepts = slot.accepts;
        match std::mem::replace(&mut slot.state, State::Vacant) {
            State::Once { keep, result: None } => {
                slot.state = State::Orphan {
                    accepts,
                    _keep: keep,
                };
                true
            }
            State::Many {
                queue,
                ended,
                _keep,
                ..
            } => {
                for completion in queue {
                    if let Some(bid) = completion.buffer {
                        pool.discard_ring(bid);
                    } else if accepts && completion.result >= 0 {
                        close(completion.result);
                    }
                }
                if ended {
                    drop(self.vacate(id));
                    return false;
                }
                slot.state = State::Orphan { accepts, _keep };
                true
            }
            State::Once { .. } => {
                drop(self.vacate(id));
                false
            }
            other => {
                slot.state = other;
                false
            }
        }
    }

    /// Ids of all operations the kernel still works on.
    pub(crate) fn pending(&self) -> Vec<OpId> {
        let live = |slot: &Slot| match &slot.state {
            State::Vacant
            | State::Once {
                result: Some(_), ..
            } => false,
            State::Many { ended, .. } => !ended,
            State::Once { .. } | State::Orphan { .. } => true,
        };
        let id = |(index, slot): (usize, &Slot)| OpId::new(index, slot.generation);
        self.slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| live(slot))
            .map(id)
            .collect()
    }
}

fn register(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(waker) if waker.will_wake(cx.waker()) => {}
        _ => *slot = Some(cx.waker().clone()),
    }
}
