//! Payload of one stream that has arrived and that its owner has not taken, in as little memory as
//! is worth while.
//!
//! What arrives is queued as a slice of the block it arrived in, without a copy, for most of it is
//! taken in the same turn of the worker. A slice keeps its whole block, so it is copied where that
//! would be waste: small pieces of large blocks, small pieces behind others (the receiver is
//! slow), pieces that would pin four times what is queued, every piece where memory is tight.

use std::collections::VecDeque;

use rt::buf::{Buf, Pool};

/// Pieces up to this size are packed together.
const PACK_MAX: usize = 2048;
/// A piece that is less than this part of its block is copied out of it.
const SLICE_PART: usize = 32;
/// What is queued may pin so many times as much.
const PINNED_MAX: usize = 4;

/// Where pieces are copied to.
#[derive(Debug)]
pub(super) struct Packing {
    pool: Pool,
    /// Blocks of the receive ring have this size; they are many, and bounded.
    ring_block: usize,
    ring_blocks: u32,
    /// A block that small pieces of all streams of the tunnel are copied into.
    shared: Option<Buf>,
}

impl Packing {
    pub(super) fn new(pool: Pool) -> Self {
        let config = *pool.config();
        Self {
            pool,
            ring_block: config.ring_block as usize,
            ring_blocks: u32::from(config.ring_entries),
            shared: None,
        }
    }

    /// Whether `piece` alone would keep too much from others.
    fn is_waste(&self, piece: &Buf) -> bool {
        let block = piece.block_bytes();
        if block == self.ring_block {
            return self.pool.ring_blocks_in_use() > self.ring_blocks / 2;
        }
        piece.len() < block / SLICE_PART
    }

    /// A copy of `piece`, which is not empty.
    fn copy(&mut self, piece: &[u8], out: &mut VecDeque<Buf>) -> usize {
        if piece.len() > PACK_MAX {
            return pack(out, piece, &self.pool);
        }
        let mut room = match self.shared.take() {
            Some(room) if room.tail_room() >= piece.len() => room,
            _ => self.pool.record(),
        };
        room.extend_from_slice(piece);
        let copy = room.split_to(piece.len());
        let charge = copy.block_bytes();
        out.push_back(copy);
        self.shared = (room.tail_room() > 0).then_some(room);
        charge
    }
}

/// Appends `piece` to `queue`, of a stream that holds `held` bytes in blocks of `pinned` bytes,
/// this piece not included. Returns the bytes of the blocks that are pinned in addition.
pub(super) fn push(
    queue: &mut VecDeque<Buf>,
    piece: Buf,
    (held, pinned): (usize, usize),
    tight: bool,
    packing: &mut Packing,
) -> usize {
    let block = piece.block_bytes();
    let Some(last) = queue.back() else {
        if tight || packing.is_waste(&piece) {
            return packing.copy(&piece, queue);
        }
        queue.push_back(piece);
        return block;
    };
    if !tight && piece.len() > PACK_MAX {
        if last.shares_block(&piece) {
            queue.push_back(piece);
            return 0;
        }
        if pinned + block <= PINNED_MAX * (held + piece.len()) {
            queue.push_back(piece);
            return block;
        }
    }
    pack(queue, &piece, &packing.pool)
}

/// Copies `piece` behind what is queued, into blocks of the queue's own. Returns the bytes of new
/// ones.
fn pack(queue: &mut VecDeque<Buf>, mut piece: &[u8], pool: &Pool) -> usize {
    let mut charge = 0;
    while !piece.is_empty() {
        match queue.back_mut() {
            // A slice has no tail room; only blocks of the queue's own have.
            Some(last) if last.tail_room() > 0 => {
                let n = piece.len().min(last.tail_room());
                last.extend_from_slice(&piece[..n]);
                piece = &piece[n..];
            }
            _ => {
                let block = pool.record();
                charge += block.block_bytes();
                queue.push_back(block);
            }
        }
    }
    charge
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{Random, run};

    /// What a queue of pieces of `size`, each in a block of its own of 256 KiB or one of them every
    /// `every` in a common one, pins for its bytes.
    fn pinned(size: usize, every: usize, tight: bool) -> (usize, usize, usize) {
        run(async move {
            let (listener, addr) = crate::tests::listen();
            let stream = rt::net::connect(addr, &rt::net::ConnectOptions::default()).await;
            let pool = stream.unwrap().split().1.pool().clone();
            drop(listener);
            let mut packing = Packing::new(pool.clone());
            let mut queue = VecDeque::new();
            let (mut held, mut charged) = (0, 0);
            for _ in 0..100 {
                let mut block = pool.large();
                for n in 0..every {
                    block.extend_from_slice(&vec![n as u8; size]);
                    let piece = block.split_to(size);
                    // Of several pieces of a block, the others go to other streams.
                    if n == 0 {
                        charged += push(&mut queue, piece, (held, charged), tight, &mut packing);
                        held += size;
                    }
                }
            }
            (held, charged, pool.bytes_in_use())
        })
    }

    #[test]
    fn what_is_queued_pins_a_bounded_multiple_of_itself() {
        let block = 262_496;
        for size in [1, 100, 2_048, 2_049, 8_000, 9_000, 16_000] {
            for every in [1, 4, 16] {
                let (held, charged, pinned) = pinned(size, every, false);
                let most = 4 * held + block;
                assert!(pinned <= most, "{size} bytes: {pinned} for {held}");
                // The packing block is nobody's.
                assert!(
                    pinned <= charged + 17_000,
                    "{size} bytes: {pinned} of {charged}"
                );
                let (held, charged, pinned) = self::pinned(size, every, true);
                let most = held + held / 8 + 50_000;
                assert!(
                    pinned <= most && charged <= most,
                    "tight: {pinned} for {held}"
                );
            }
        }
    }

    #[test]
    fn bulk_of_one_stream_is_not_copied() {
        run(async {
            let (listener, addr) = crate::tests::listen();
            let stream = rt::net::connect(addr, &rt::net::ConnectOptions::default()).await;
            let pool = stream.unwrap().split().1.pool().clone();
            drop(listener);
            let mut packing = Packing::new(pool.clone());
            let (mut queue, mut held, mut charged) = (VecDeque::new(), 0, 0);
            for _ in 0..16 {
                let mut block = pool.large();
                for _ in 0..16 {
                    block.extend_from_slice(&[7; 16_000]);
                    let piece = block.split_to(16_000);
                    charged += push(&mut queue, piece, (held, charged), false, &mut packing);
                    held += 16_000;
                }
            }
            assert_eq!((queue.len(), pool.bytes_in_use()), (256, charged));
            assert_eq!(charged, 16 * 262_496);
        });
    }

    /// Whatever comes, the bytes are those that came, in order.
    #[test]
    fn bytes_are_exact_however_they_are_stored() {
        run(async {
            let (listener, addr) = crate::tests::listen();
            let stream = rt::net::connect(addr, &rt::net::ConnectOptions::default()).await;
            let pool = stream.unwrap().split().1.pool().clone();
            drop(listener);
            let mut packing = Packing::new(pool.clone());
            let mut random = Random(7);
            let mut queues: [VecDeque<Buf>; 3] = Default::default();
            let mut expected = vec![Vec::new(); 3];
            let (mut held, mut charged) = ([0; 3], [0; 3]);
            for _ in 0..2_000 {
                let mut block = if random.below(2) == 0 {
                    pool.large()
                } else {
                    pool.record()
                };
                for _ in 0..random.below(6) {
                    let scale = random.below(3);
                    let n = 1 + random.below(2_700 << scale) as usize;
                    let n = n.min(block.tail_room());
                    if n == 0 {
                        break;
                    }
                    let bytes: Vec<u8> = (0..n).map(|_| random.below(256) as u8).collect();
                    block.extend_from_slice(&bytes);
                    let (at, tight) = (random.below(3) as usize, random.below(9) == 0);
                    let (piece, have) = (block.split_to(n), (held[at], charged[at]));
                    charged[at] += push(&mut queues[at], piece, have, tight, &mut packing);
                    held[at] += n;
                    expected[at].extend(bytes);
                }
                let at = random.below(40) as usize;
                if at < 3 {
                    let got: Vec<u8> = queues[at].drain(..).flat_map(|buf| buf.to_vec()).collect();
                    assert!(got == expected[at]);
                    expected[at].clear();
                    (held[at], charged[at]) = (0, 0);
                }
            }
            drop((queues, packing));
            assert_eq!(pool.bytes_in_use(), 0);
        });
    }
}
