//! The table: states of operations from their start to the kernel's last completion for them.

use std::collections::VecDeque;
use std::task::{Context, Poll, Waker};

use super::message::SendList;
use super::operation::{Completion, FollowUp, OpId, Operation};
use super::phase::Phase;
use crate::buf::Pool;

#[derive(Debug)]
enum State {
    Vacant,
    /// Has one result.
    Once {
        operation: Operation,
        result: Option<i32>,
        phase: Phase,
    },
    /// Multishot: completions queue up until the owner takes them.
    Many {
        operation: Operation,
        queue: VecDeque<Completion>,
        ended: bool,
        stopping: bool,
    },
    /// The owner is gone.
    Orphan {
        operation: Operation,
        silent: bool,
    },
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    state: State,
    waker: Option<Waker>,
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

    /// A new operation; `silent` ones end by [`OpTable::retire`] unless they fail.
    pub(crate) fn insert(&mut self, operation: Operation, silent: bool) -> OpId {
        self.in_flight += 1;
        let state = match operation {
            Operation::Accept(_) | Operation::Receive(_) => State::Many {
                operation,
                queue: VecDeque::new(),
                ended: false,
                stopping: false,
            },
            operation => State::Once {
                phase: Phase::of(&operation, silent),
                operation,
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
    pub(crate) fn operation_mut(&mut self, id: OpId) -> &mut Operation {
        self.pending_mut(id)
            .expect("an operation owns its resources until it ends")
    }

    /// As [`OpTable::operation_mut`]; none if the operation has ended.
    pub(crate) fn pending_mut(&mut self, id: OpId) -> Option<&mut Operation> {
        match &mut self.get(id)?.state {
            State::Once {
                operation,
                result: None,
                ..
            }
            | State::Many {
                operation,
                ended: false,
                ..
            }
            | State::Orphan { operation, .. } => Some(operation),
            _ => None,
        }
    }

    /// Whether an operation ends by [`OpTable::retire`].
    pub(crate) fn is_silent(&self, id: OpId) -> bool {
        let slot = self.slots.get(id.slot());
        slot.filter(|slot| slot.generation == id.generation())
            .is_some_and(|slot| {
                matches!(
                    slot.state,
                    State::Once {
                        phase: Phase::Silent,
                        ..
                    } | State::Orphan { silent: true, .. }
                )
            })
    }

    /// A silent send has succeeded: all it owned is free at once, and its name is no more. Returns
    /// its list, to be used again.
    ///
    /// # Safety
    /// The kernel has sent all of the list and is done with it: message, vectors and buffers. No
    /// completion says so, so the caller must know from what it did.
    pub(crate) unsafe fn retire(&mut self, id: OpId) -> Option<Box<SendList>> {
        let pending = self.is_silent(id) && self.pending_mut(id).is_some();
        if !pending {
            return None;
        }
        self.in_flight -= 1;
        if let Some(waker) = self.slots[id.slot()].waker.take() {
            waker.wake();
        }
        match self.vacate(id) {
            State::Once {
                operation: Operation::Send(_, list),
                ..
            }
            | State::Orphan {
                operation: Operation::Send(_, list),
                ..
            } => Some(list),
            _ => None,
        }
    }

    /// Whether an operation still has a name: false for a silent one that has succeeded.
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
        slot.generation = OpId::next_generation(slot.generation);
        slot.waker = None;
        self.free.push(id.slot() as u32);
        std::mem::replace(&mut slot.state, State::Vacant)
    }

    /// Enters a completion; wakes the owner.
    ///
    /// # Safety
    /// The kernel has given this completion, for this operation, and it is entered once: owners
    /// rely on `result` for how many bytes of a buffer are initialised, take a received block by
    /// its number, and own the descriptor of an accepted connection. Without `more` the kernel is
    /// done with everything that the operation owns.
    pub(crate) unsafe fn complete(
        &mut self,
        id: OpId,
        result: i32,
        buffer: Option<u16>,
        more: bool,
        pool: &Pool,
    ) -> FollowUp {
        if !more {
            self.in_flight -= 1;
        }
        let Some(slot) = self.get(id) else {
            return FollowUp::Nothing;
        };
        let mut follow_up = FollowUp::Nothing;
        match &mut slot.state {
            State::Once {
                operation,
                result: done,
                phase,
            } => match phase.advance(operation, result, more) {
                Ok(follow_up) => {
                    self.in_flight += usize::from(!more);
                    return follow_up;
                }
                Err(result) => {
                    operation.note(result);
                    *done = Some(result);
                }
            },
            State::Many {
                operation,
                queue,
                ended,
                stopping,
            } => {
                operation.note(result);
                queue.push_back(Completion {
                    result,
                    buffer,
                    // SAFETY: the caller's promise; this is the only place that takes it.
                    accepted: unsafe { operation.accepted(result) },
                });
                *ended = !more;
                if queue.len() >= QUEUE_MAX && more && !*stopping {
                    *stopping = true;
                    follow_up = FollowUp::Stop;
                }
            }
            State::Orphan { operation, .. } => {
                operation.note(result);
                if let Some(bid) = buffer {
                    pool.discard_ring(bid);
                }
                // SAFETY: the caller's promise; nobody is there to take it.
                drop(unsafe { operation.accepted(result) });
                if !more {
                    drop(self.vacate(id));
                }
                return FollowUp::Nothing;
            }
            State::Vacant => return FollowUp::Nothing,
        }
        if let Some(waker) = slot.waker.take() {
            waker.wake();
        }
        follow_up
    }

    /// The result of a single operation, with what it owned.
    pub(crate) fn poll_once(&mut self, id: OpId, cx: &Context<'_>) -> Poll<(i32, Operation)> {
        let slot = self
            .get(id)
            .expect("the owner of an operation polls it until it ends");
        if let State::Once {
            result: Some(_), ..
        } = slot.state
        {
            let State::Once {
                operation,
                result: Some(result),
                ..
            } = self.vacate(id)
            else {
                unreachable!("checked above")
            };
            return Poll::Ready((result, operation));
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
    pub(crate) fn abandon(&mut self, id: OpId, pool: &Pool) -> bool {
        let Some(slot) = self.get(id) else {
            return false;
        };
        slot.waker = None;
        match std::mem::replace(&mut slot.state, State::Vacant) {
            State::Once {
                operation,
                result: None,
                phase,
            } => {
                let silent = phase == Phase::Silent;
                slot.state = State::Orphan { operation, silent };
                true
            }
            State::Many {
                queue,
                ended,
                operation,
                ..
            } => {
                // Connections that were accepted are closed with their completions.
                for completion in queue {
                    if let Some(bid) = completion.buffer {
                        pool.discard_ring(bid);
                    }
                }
                if ended {
                    drop(self.vacate(id));
                    return false;
                }
                let silent = false;
                slot.state = State::Orphan { operation, silent };
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
