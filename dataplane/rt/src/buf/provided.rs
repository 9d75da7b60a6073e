//! Small blocks in a ring that the kernel takes them from (`IORING_REGISTER_PBUF_RING`).
//!
//! The ring goes round all blocks that are in circulation, so that each costs memory and cache
//! however little is going on. There are few at first; more join while most are in use, and they
//! leave again, their memory with them, when a period passes in which few were. A block leaves when
//! it comes back from its user: what the kernel may be filling is never touched.

use std::alloc::dealloc;
use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;

use super::geometry::{
    PAGE, PoolConfig, allocate_zeroed, discard_pages, entries_layout, map, ring_layout, unmap,
};

/// Blocks in circulation at first, and at least.
const FIRST_BLOCKS: u16 = 32;

pub(super) struct Provided {
    config: PoolConfig,
    memory: NonNull<u8>,
    refs: Box<[Cell<u32>]>,
    entries: NonNull<BufRingEntry>,
    tail: Cell<u16>,
    /// Next entry to use; only where no kernel takes entries from the ring.
    head: Cell<u16>,
    /// Blocks that have ever been in the ring; the others' pages are untouched.
    touched: Cell<u16>,
    /// Blocks in the ring, with the kernel or with users.
    circulating: Cell<u16>,
    /// Blocks that are to circulate; those beyond leave when they come back.
    wanted: Cell<u16>,
    /// Blocks that have left, without memory.
    withdrawn: RefCell<Vec<u16>>,
    lent: Cell<u32>,
    /// Most that were lent at a time since the last [`Provided::trim`].
    peak: Cell<u32>,
}

impl Provided {
    /// Reserves the memory (its pages are touched only when used).
    pub(super) fn new(config: PoolConfig) -> Self {
        assert!(config.ring_entries.is_power_of_two() && config.ring_entries <= 32_768);
        assert!(config.ring_block > config.head + config.tail);
        let ring = Self {
            config,
            memory: map(ring_layout(&config)),
            refs: (0..config.ring_entries).map(|_| Cell::new(0)).collect(),
            entries: allocate_zeroed(entries_layout(&config)).cast(),
            tail: Cell::new(0),
            head: Cell::new(0),
            touched: Cell::new(0),
            circulating: Cell::new(0),
            wanted: Cell::new(0),
            withdrawn: RefCell::default(),
            lent: Cell::new(0),
            peak: Cell::new(0),
        };
        ring.add(FIRST_BLOCKS);
        ring
    }

    /// Address of the entries.
    pub(super) fn address(&self) -> u64 {
        self.entries.as_ptr() as u64
    }

    /// Blocks in use by received, not yet dropped data.
    pub(super) fn lent(&self) -> u32 {
        self.lent.get()
    }

    /// Takes over a block that was filled with `len` bytes. Returns where they are.
    ///
    /// # Panics
    /// If the block has an owner, or more bytes than it holds are said to be in it: the caller has
    /// mixed up its completions, and two owners of one block would be undefined behaviour.
    pub(super) fn take(&self, bid: u16, len: u32) -> NonNull<u8> {
        assert!(len <= self.config.ring_payload() && bid < self.config.ring_entries);
        self.assert_unowned(bid);
        self.refs[usize::from(bid)].set(1);
        let lent = self.lent.get() + 1;
        self.lent.set(lent);
        self.peak.set(self.peak.get().max(lent));
        if lent > u32::from(self.circulating.get()) / 4 * 3 {
            self.grow();
        }
        self.payload(bid)
    }

    /// A block has one owner: the ring, or those who are counted.
    fn assert_unowned(&self, bid: u16) {
        let owners = self.refs[usize::from(bid)].get();
        assert_eq!(owners, 0, "ring block {bid} has an owner");
    }

    /// The next free block, and where to receive into it.
    pub(super) fn next(&self) -> Option<(u16, NonNull<u8>)> {
        let head = self.head.get();
        if head == self.tail.get() {
            return None;
        }
        let slot = usize::from(head & (self.config.ring_entries - 1));
        // SAFETY: slot < ring_entries; the entry was written by `provide` on this thread.
        let bid = unsafe { &*self.entries.as_ptr().add(slot) }.bid();
        Some((bid, self.payload(bid)))
    }

    /// Takes the block of [`Provided::next`] out of the ring.
    pub(super) fn advance(&self) {
        self.head.set(self.head.get().wrapping_add(1));
    }

    /// Lets as many more blocks circulate as do already, up to the ring's size.
    pub(super) fn grow(&self) {
        self.add(self.circulating.get());
    }

    fn add(&self, more: u16) {
        let circulating = self.circulating.get();
        let end = circulating
            .saturating_add(more)
            .min(self.config.ring_entries);
        self.circulating.set(end);
        self.wanted.set(end);
        for _ in circulating..end {
            let back = self.withdrawn.borrow_mut().pop();
            let bid = back.unwrap_or_else(|| self.touched.replace(self.touched.get() + 1));
            self.provide(bid);
        }
    }

    /// One more owner of a block.
    pub(super) fn retain(&self, bid: u16) {
        let refs = &self.refs[usize::from(bid)];
        refs.set(refs.get() + 1);
    }

    /// One owner less; the last one's block goes back.
    pub(super) fn release(&self, bid: u16) {
        let refs = &self.refs[usize::from(bid)];
        refs.set(refs.get() - 1);
        if refs.get() == 0 {
            self.lent.set(self.lent.get() - 1);
            self.give_back(bid);
        }
    }

    /// A block that was taken from the ring and is nobody's now.
    ///
    /// # Panics
    /// If it has an owner: the kernel would be the second one.
    pub(super) fn give_back(&self, bid: u16) {
        if bid >= self.config.ring_entries {
            return;
        }
        self.assert_unowned(bid);
        if self.circulating.get() <= self.wanted.get() {
            return self.provide(bid);
        }
        self.circulating.set(self.circulating.get() - 1);
        let block = self.config.ring_block as usize;
        if block.is_multiple_of(PAGE) {
            // SAFETY: the block's pages are its own, and nobody uses it or is told of it.
            unsafe { discard_pages(self.block(bid), block) };
        }
        self.withdrawn.borrow_mut().push(bid);
    }

    /// Whether [`Provided::trim`] may have something to do.
    pub(super) fn has_spare(&self) -> bool {
        self.wanted.get() > FIRST_BLOCKS
    }

    /// A period has passed: half of the blocks are to leave if a quarter was enough.
    pub(super) fn trim(&self) {
        let peak = self.peak.replace(self.lent.get());
        let wanted = self.wanted.get();
        if wanted > FIRST_BLOCKS && peak <= u32::from(wanted) / 4 {
            self.wanted.set((wanted / 2).max(FIRST_BLOCKS));
        }
    }

    fn block(&self, bid: u16) -> NonNull<u8> {
        let offset = usize::from(bid) * self.config.ring_block as usize;
        // SAFETY: the memory spans ring_entries * ring_block bytes and bid < ring_entries.
        unsafe { self.memory.add(offset) }
    }

    fn payload(&self, bid: u16) -> NonNull<u8> {
        // SAFETY: head is less than the block's size, so the pointer stays inside the block.
        unsafe { self.block(bid).add(self.config.head as usize) }
    }

    /// Puts a block at the tail of the ring.
    fn provide(&self, bid: u16) {
        let tail = self.tail.get();
        let slot = usize::from(tail & (self.config.ring_entries - 1));
        // SAFETY: slot < ring_entries, so the entry lies inside the allocation; between head and
        // tail only user space writes entries, and this thread is the only user-space writer.
        let entry = unsafe { &mut *self.entries.as_ptr().add(slot) };
        entry.set_addr(self.payload(bid).as_ptr() as u64);
        entry.set_len(self.config.ring_payload());
        entry.set_bid(bid);
        let tail = tail.wrapping_add(1);
        self.tail.set(tail);
        // SAFETY: the tail field lies inside the ring's first entry, is aligned to two bytes and is
        // shared with the kernel, hence the atomic store with release ordering.
        let shared = unsafe {
            let tail_ptr = BufRingEntry::tail(self.entries.as_ptr());
            AtomicU16::from_ptr(tail_ptr.cast_mut())
        };
        shared.store(tail, Ordering::Release);
    }

    /// Frees the memory.
    ///
    /// # Safety
    /// The kernel must be done with it, and nothing may be called any more.
    pub(super) unsafe fn free(&self) {
        // SAFETY: mapped with this layout in `new`; nobody uses it any more.
        unsafe { unmap(self.memory, ring_layout(&self.config)) };
        // SAFETY: allocated with this layout in `new`; nobody uses it any more.
        unsafe { dealloc(self.entries.as_ptr().cast(), entries_layout(&self.config)) };
    }
}

#[cfg(test)]
mod tests {
    use std::panic::AssertUnwindSafe;

    use super::*;

    #[test]
    fn blocks_join_while_most_are_in_use_and_leave_when_few_are() {
        let ring = Provided::new(PoolConfig::default());
        let take = |n: usize| -> Vec<u16> {
            (0..n)
                .map(|_| {
                    let (bid, _) = ring.next().unwrap();
                    ring.advance();
                    ring.take(bid, 1);
                    bid
                })
                .collect()
        };
        assert_eq!(ring.circulating.get(), FIRST_BLOCKS);
        assert!(!ring.has_spare());
        let burst = take(500);
        assert_eq!(ring.circulating.get(), 1024);
        ring.trim();
        burst.iter().for_each(|&bid| ring.release(bid));
        assert_eq!(ring.circulating.get(), 1024, "the burst was in this period");
        while ring.has_spare() {
            ring.trim();
        }
        // A trickle: every block that comes back leaves, down to the first ones.
        for _ in 0..2_000 {
            let one = take(1);
            ring.release(one[0]);
        }
        assert_eq!(ring.circulating.get(), FIRST_BLOCKS);
        assert_eq!(ring.withdrawn.borrow().len(), 1024 - 32);
        assert_eq!(ring.lent(), 0);
        let mut again = take(1_000);
        assert_eq!(ring.circulating.get(), 1024);
        again.sort_unstable();
        again.dedup();
        assert_eq!(again.len(), 1_000, "no block is lent twice");
        // SAFETY: no kernel has been told of this ring, and it is not used any more.
        unsafe { ring.free() };
    }

    /// Whatever is done with a block that has an owner, nobody gets it a second time. A check in
    /// every build: this is what a `Buf` rests on.
    #[test]
    fn a_block_has_one_owner() {
        type Way = fn(&Provided, u16);
        let ways: [(&str, Way); 2] = [
            ("taken", |ring, bid| _ = ring.take(bid, 1)),
            ("given to the kernel", |ring, bid| ring.give_back(bid)),
        ];
        for (way, do_it) in ways {
            let ring = Provided::new(PoolConfig::default());
            let (bid, _) = ring.next().unwrap();
            ring.advance();
            ring.take(bid, 10);
            let twice = AssertUnwindSafe(|| do_it(&ring, bid));
            let refused = std::panic::catch_unwind(twice).unwrap_err();
            let text = refused.downcast_ref::<String>().unwrap();
            assert!(text.contains("has an owner"), "{way}: {text}");
            ring.retain(bid);
            ring.release(bid);
            assert!(
                std::panic::catch_unwind(AssertUnwindSafe(|| do_it(&ring, bid))).is_err(),
                "{way}: it still has one"
            );
            ring.release(bid);
            assert_eq!(ring.lent(), 0);
            // SAFETY: no kernel has been told of this ring, and it is not used any more.
            unsafe { ring.free() };
        }
    }
}
