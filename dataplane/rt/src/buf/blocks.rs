//! Blocks of one size with counted owners, allocated on demand and kept for reuse up to a bound.

use std::ptr::NonNull;

#[derive(Debug, Clone, Copy)]
struct Block {
    ptr: NonNull<u8>,
    refs: u32,
}

#[derive(Debug, Default)]
pub(super) struct Blocks {
    all: Vec<Option<Block>>,
    /// Allocated and unused.
    free: Vec<u32>,
    /// Places without a block.
    vacant: Vec<u32>,
    /// Fewest that were free at a time since the last [`Blocks::trim`].
    fewest_free: usize,
}

impl Blocks {
    /// Blocks that have owners.
    pub(super) fn in_use(&self) -> usize {
        self.all.len() - self.vacant.len() - self.free.len()
    }

    /// Blocks that have none.
    pub(super) fn spare(&self) -> usize {
        self.free.len()
    }

    /// A block with one owner: one that is free, or a new one.
    pub(super) fn acquire(&mut self, allocate: impl FnOnce() -> NonNull<u8>) -> (u32, NonNull<u8>) {
        if let Some(id) = self.free.pop() {
            self.fewest_free = self.fewest_free.min(self.free.len());
            let block = self.block(id);
            block.refs = 1;
            return (id, block.ptr);
        }
        let ptr = allocate();
        let block = Some(Block { ptr, refs: 1 });
        if let Some(id) = self.vacant.pop() {
            self.all[id as usize] = block;
            return (id, ptr);
        }
        self.all.push(block);
        ((self.all.len() - 1) as u32, ptr)
    }

    /// One more owner.
    pub(super) fn retain(&mut self, id: u32) {
        self.block(id).refs += 1;
    }

    /// One owner less. The last one's block is kept while fewer than `keep_free` are; else it is
    /// returned, to be freed.
    pub(super) fn release(&mut self, id: u32, keep_free: usize) -> Option<NonNull<u8>> {
        let block = self.block(id);
        block.refs -= 1;
        if block.refs > 0 {
            return None;
        }
        if self.free.len() < keep_free {
            self.free.push(id);
            return None;
        }
        self.take_out(id)
    }

    /// A period has passed: hands out the blocks that were free all the time, to be freed.
    pub(super) fn trim(&mut self, mut each: impl FnMut(NonNull<u8>)) {
        for _ in 0..self.fewest_free.min(self.free.len()) {
            if let Some(ptr) = self.free.pop().and_then(|id| self.take_out(id)) {
                each(ptr);
            }
        }
        self.fewest_free = self.free.len();
    }

    /// Hands out all blocks, to be freed.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = NonNull<u8>> {
        self.all.drain(..).flatten().map(|block| block.ptr)
    }

    fn block(&mut self, id: u32) -> &mut Block {
        self.all[id as usize]
            .as_mut()
            .expect("a block that is free or has owners is present")
    }

    fn take_out(&mut self, id: u32) -> Option<NonNull<u8>> {
        let block = self.all[id as usize].take()?;
        self.vacant.push(id);
        Some(block.ptr)
    }
}
