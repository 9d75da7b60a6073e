//! The operation table: everything the kernel may still touch is owned here.
//!
//! A submitted operation is named by its slot and the slot's generation, packed into the
//! completion's `user_data`. A future holds only an [`OpId`]; if it is dropped early the operation
//! becomes an orphan that keeps its resources until the kernel's last completion for it.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use crate::buf::{Buf, Pool};

mod message;
mod phase;
mod sockaddr;
mod socket;

pub(crate) use message::{MessageHeader, SendList};
use phase::Phase;
pub(crate) use sockaddr::RawAddr;
pub(crate) use socket::{Registration, Socket};

/// Name of an operation: slot and generation, which is never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OpId(NonZeroU64);

impl OpId {
    fn new(slot: usize, generation: u32) -> Self {
        Self::from_user_data(u64::from(generation) << 32 | slot as u64)
    }

    pub(crate) fn from_user_data(user_data: u64) -> Self {
        Self(NonZeroU64::new(user_data).unwrap_or(NonZeroU64::MAX)) // nobody's
    }

    pub(crate) fn user_data(self) -> u64 {
        self.0.get()
    }

    fn slot(self) -> usize {
        (self.user_data() & 0xffff_ffff) as usize
    }

    fn generation(self) -> u32 {
        (self.user_data() >> 32) as u32
    }
}

/// Which readiness to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readiness {
    Read,
    Write,
    /// The connection has failed; the end of what the peer sends is none. What is found is noted in
    /// the socket.
    Failure,
}

/// What to do, and what the operation owns while the kernel works on it. The socket is always
/// among it, so that its number is not reused meanwhile.
#[derive(Debug)]
pub(crate) enum Keep {
    /// Accept connections, again and again.
    Accept(Rc<Socket>),
    /// Receive into ring blocks, again and again.
    Receive(Rc<Socket>),
    /// Send a list: buffers, vectors and message header.
    Send(Rc<Socket>, Box<SendList>),
    /// Receive into a buffer, behind what it holds.
    Recv(Rc<Socket>, Buf),
    /// Receive scattered into buffers.
    RecvMsg(Rc<Socket>, Box<MessageHeader>),
    /// Connect to an address.
    Connect(Rc<Socket>, Box<RawAddr>),
    /// Wait until the socket is ready.
    Ready(Rc<Socket>, Readiness),
}

impl Keep {
    pub(crate) fn socket(&self) -> &Rc<Socket> {
        match self {
            Self::Accept(socket)
            | Self::Receive(socket)
            | Self::Send(socket, _)
            | Self::Recv(socket, _)
            | Self::RecvMsg(socket, _)
            | Self::Connect(socket, _)
            | Self::Ready(socket, _) => socket,
        }
    }

    /// Tells the socket of an error, whoever started the operation and whether or not that is
    /// still there: the kernel tells it once.
    fn note(&self, result: i32) {
        if let Self::Receive(socket)
        | Self::Recv(socket, _)
        | Self::RecvMsg(socket, _)
        | Self::Send(socket, _) = self
        {
            socket.note(result);
        }
    }
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
    /// Has one result.
    Once {
        keep: Keep,
        result: Option<i32>,
        phase: Phase,
    },
    /// Multishot: completions queue up until the owner takes them.
    Many {
        keep: Keep,
        queue: VecDeque<Completion>,
        ended: bool,
        stopping: bool,
    },
    /// The owner is gone.
    Orphan {
        keep: Keep,
        relaxed: bool,
    },
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    state: State,
    waker: Option<Waker>,
}

/// What the driver must do after a completion was entered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum After {
    Nothing,
    /// Cancel it: the queue of a multishot receive grew past its bound, which its owner has to
    /// catch up with first, or a wait for room was answered.
    Stop,
    /// A completion nobody owns carried a descriptor: close it.
    Close(i32),
    /// The socket is full: wait until it takes more.
    Wait,
    /// It still is, and something else would end such a wait at once: wait for a change.
    WaitForChange,
    /// The socket takes more: submit the rest.
    Again,
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

    /// A new operation; `relaxed` ones end by [`OpTable::settle`] unless they fail.
    pub(crate) fn insert(&mut self, keep: Keep, relaxed: bool) -> OpId {
        self.in_flight += 1;
        let state = match keep {
            Keep::Accept(_) | Keep::Receive(_) => State::Many {
                keep,
                queue: VecDeque::new(),
                ended: false,
                stopping: false,
            },
            keep => State::Once {
                phase: Phase::of(&keep, relaxed),
                keep,
                result: None,
            },
        };
        if let Some(index) = self.free.pop() {
            let slot = &mut self.slots[index as usize];
            slot.state = state;
            return OpId::new(index as usize, slot.generation);
        }
        self.slots.push(Slot {
            generation: 1,
            state,
            waker: None,
        });
        OpId::new(self.slots.len() - 1, 1)
    }

    /// What an operation owns, to start it or to carry it on.
    ///
    /// # Panics
    /// If the operation has ended.
    pub(crate) fn keep_mut(&mut self, id: OpId) -> &mut Keep {
        self.keep_if_pending(id)
            .expect("an operation owns its resources until it ends")
    }

    /// As [`OpTable::keep_mut`]; none if the operation has ended.
    pub(crate) fn keep_if_pending(&mut self, id: OpId) -> Option<&mut Keep> {
        match &mut self.get(id)?.state {
            State::Once {
                keep, result: None, ..
            }
            | State::Many {
                keep, ended: false, ..
            }
            | State::Orphan { keep, .. } => Some(keep),
            _ => None,
        }
    }

    /// Whether an operation ends by [`OpTable::settle`].
    pub(crate) fn is_relaxed(&self, id: OpId) -> bool {
        let slot = self.slots.get(id.slot());
        slot.filter(|slot| slot.generation == id.generation())
            .is_some_and(|slot| {
                matches!(
                    slot.state,
                    State::Once {
                        phase: Phase::Relaxed,
                        ..
                    } | State::Orphan { relaxed: true, .. }
                )
            })
    }

    /// A relaxed send has succeeded: all it owned is free at once, and its name is no more. Returns
    /// its list, to be used again.
    pub(crate) fn settle(&mut self, id: OpId) -> Option<Box<SendList>> {
        let pending = self.is_relaxed(id) && self.keep_if_pending(id).is_some();
        if !pending {
            return None;
        }
        self.in_flight -= 1;
        if let Some(waker) = self.slots[id.slot()].waker.take() {
            waker.wake();
        }
        match self.vacate(id) {
            State::Once {
                keep: Keep::Send(_, list),
                ..
            }
            | State::Orphan {
                keep: Keep::Send(_, list),
                ..
            } => Some(list),
            _ => None,
        }
    }

    /// Whether an operation still has a name: false for a relaxed one that has succeeded.
    pub(crate) fn exists(&self, id: OpId) -> bool {
        let slot = self.slots.get(id.slot());
        slot.is_some_and(|slot| slot.generation == id.generation())
    }

    fn get(&mut self, id: OpId) -> Option<&mut Slot> {
        self.slots
            .get_mut(id.slot())
            .filter(|slot| slot.generation == id.generation())
    }

    fn vacate(&mut self, id: OpId) -> State {
        let slot = &mut self.slots[id.slot()];
        slot.generation = (slot.generation.wrapping_add(1) & 0x7fff_ffff).max(1);
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
            State::Once {
                keep,
                result: done,
                phase,
            } => match phase.advance(keep, result, more) {
                Ok(after) => {
                    self.in_flight += usize::from(!more);
                    return after;
                }
                Err(result) => {
                    keep.note(result);
                    *done = Some(result);
                }
            },
            State::Many {
                keep,
                queue,
                ended,
                stopping,
            } => {
                keep.note(result);
                queue.push_back(Completion { result, buffer });
                *ended = !more;
                if queue.len() >= QUEUE_MAX && more && !*stopping {
                    *stopping = true;
                    after = After::Stop;
                }
            }
            State::Orphan { keep, .. } => {
                keep.note(result);
                if let Some(bid) = buffer {
                    pool.discard_ring(bid);
                }
                if matches!(keep, Keep::Accept(_)) && result >= 0 {
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
                ..
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
        match std::mem::replace(&mut slot.state, State::Vacant) {
            State::Once {
                keep,
                result: None,
                phase,
            } => {
                let relaxed = phase == Phase::Relaxed;
                slot.state = State::Orphan { keep, relaxed };
                true
            }
            State::Many {
                queue, ended, keep, ..
            } => {
                let accepts = matches!(keep, Keep::Accept(_));
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
                let relaxed = false;
                slot.state = State::Orphan { keep, relaxed };
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::buf::PoolConfig;

    /// Of one case; Miri takes a second for some.
    const STEPS: usize = if cfg!(miri) { 30 } else { 120 };

    /// What the owner and the kernel of an operation know of it.
    #[derive(Debug, Clone, Copy)]
    struct Known {
        id: OpId,
        many: bool,
        owned: bool,
        pending: bool,
    }

    /// A table, and what must be in it.
    struct Pair {
        table: OpTable,
        pool: Pool,
        socket: Rc<Socket>,
        known: Vec<Known>,
    }

    impl Pair {
        fn new() -> Self {
            let (one, _) = std::os::unix::net::UnixStream::pair().unwrap();
            Self {
                table: OpTable::default(),
                pool: Pool::new(PoolConfig::default()),
                socket: Rc::new(Socket::new(one.into())),
                known: Vec::new(),
            }
        }

        fn insert(&mut self, many: bool) {
            let socket = Rc::clone(&self.socket);
            let keep = if many {
                Keep::Receive(socket)
            } else {
                Keep::Recv(socket, self.pool.record())
            };
            let id = self.table.insert(keep, false);
            self.known.push(Known {
                id,
                many,
                owned: true,
                pending: true,
            });
        }

        /// The kernel has a result.
        fn complete(&mut self, at: usize, more: bool) {
            let known = &mut self.known[at];
            if !known.pending {
                return;
            }
            let more = more && known.many;
            let block = self.pool.provided().filter(|_| more);
            let buffer = block.map(|(bid, ..)| {
                self.pool.take_provided();
                bid
            });
            let result = i32::from(buffer.is_some());
            let after = self
                .table
                .complete(known.id, result, buffer, more, &self.pool);
            assert!(matches!(after, After::Nothing | After::Stop), "{after:?}");
            known.pending = more;
        }

        /// The owner takes what has come.
        fn poll(&mut self, at: usize) {
            let Known {
                id,
                many,
                owned,
                pending,
            } = self.known[at];
            if !owned {
                return;
            }
            let cx = Context::from_waker(Waker::noop());
            let mut ended = false;
            while many && !ended {
                match self.table.poll_many(id, &cx) {
                    Poll::Pending => break,
                    Poll::Ready(None) => ended = true,
                    Poll::Ready(Some(done)) => {
                        let taken = done.buffer.map(|bid| self.pool.take_ring(bid, 1));
                        assert_eq!(taken.is_some(), done.result == 1);
                    }
                }
            }
            ended |= !many && self.table.poll_once(id, &cx).is_ready();
            assert_eq!(ended, !pending, "it ends when the kernel is done");
            self.known[at].owned = !ended;
        }

        fn abandon(&mut self, at: usize) {
            let Known {
                id, owned, pending, ..
            } = self.known[at];
            if owned {
                let cancel = self.table.abandon(id, &self.pool, |_| {});
                assert_eq!(
                    cancel, pending,
                    "what the kernel works on is to be cancelled"
                );
                self.known[at].owned = false;
            }
        }

        /// What the kernel works on, or the owner has not taken, exists; nothing else does.
        fn check(&mut self) {
            self.known.retain(|known| known.owned || known.pending);
            let held = |known: &&Known| !known.many;
            let buffers = self.known.iter().filter(held).count();
            assert_eq!(self.pool.other_blocks_in_use(), buffers);
            assert_eq!(Rc::strong_count(&self.socket), 1 + self.known.len());
            let pending = self.known.iter().filter(|known| known.pending).count();
            assert_eq!(self.table.in_flight(), pending);
            assert_eq!(self.table.pending().len(), pending);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 2 } else { 256 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn what_the_kernel_works_on_outlives_its_owner(
            steps in prop::collection::vec((0..7_u8, any::<usize>()), 1..STEPS)
        ) {
            let mut pair = Pair::new();
            for (step, at) in steps {
                let count = pair.known.len();
                match (step, count) {
                    (0 | 1, _) => pair.insert(step == 1),
                    (_, 0) => {}
                    (2 | 3, _) => pair.complete(at % count, true),
                    (4, _) => pair.complete(at % count, false),
                    (5, _) => pair.poll(at % count),
                    _ => pair.abandon(at % count),
                }
                pair.check();
            }
            for at in 0..pair.known.len() {
                pair.abandon(at);
                pair.complete(at, false);
            }
            pair.check();
            prop_assert_eq!(pair.known.len(), 0);
            prop_assert_eq!(pair.pool.ring_blocks_in_use(), 0);
        }
    }
}
