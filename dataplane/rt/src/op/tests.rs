//! The table against what the owner and the kernel of each operation know of it.

use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use proptest::prelude::*;

use super::*;
use crate::buf::{Pool, PoolConfig};

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
        let operation = if many {
            Operation::Receive(socket)
        } else {
            Operation::Recv(socket, self.pool.record())
        };
        let id = self.table.insert(operation, false);
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
        // SAFETY: no kernel is there that could use anything; no descriptor and no byte is taken.
        let follow_up = unsafe {
            self.table
                .complete(known.id, result, buffer, more, &self.pool)
        };
        assert!(
            matches!(follow_up, FollowUp::Nothing | FollowUp::Stop),
            "{follow_up:?}"
        );
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
            let cancel = self.table.abandon(id, &self.pool);
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

/// Whatever the slot and however often it was used: numbers with the top bit are the back ends'
/// own.
#[test]
fn names_of_operations_leave_room_for_numbers_of_others() {
    let newest = u32::MAX >> 1;
    assert_eq!(OpId::next_generation(newest), 1, "0 is no generation");
    for generation in [1, 2, newest - 1, newest] {
        for slot in [0, u32::MAX as usize] {
            let id = OpId::new(slot, generation);
            assert_eq!(id.user_data() >> 63, 0);
            assert_eq!(OpId::from_user_data(id.user_data()), id);
            assert_eq!((id.slot(), id.generation()), (slot, generation));
        }
    }
}
