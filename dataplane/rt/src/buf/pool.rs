//! A worker's pool: the classes of blocks, and buffers over them.

use std::alloc::dealloc;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::ptr::NonNull;
use std::rc::Rc;

use super::Buf;
use super::blocks::Blocks;
use super::geometry::{Class, PoolConfig, allocate, block_layout, map, unmap};
use super::provided::Provided;

/// A worker's buffer memory. Cheap to clone (a counted pointer).
#[derive(Clone)]
pub struct Pool(pub(super) Rc<PoolInner>);

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("config", &self.0.config)
            .finish_non_exhaustive()
    }
}

pub(super) struct PoolInner {
    config: PoolConfig,
    ring: Provided,
    record: RefCell<Blocks>,
    large: RefCell<Blocks>,
    huge: RefCell<Blocks>,
    /// Set when operations could not be awaited at shutdown: the kernel may still write, so the
    /// memory must never be freed.
    leak: Cell<bool>,
}

impl Pool {
    pub(crate) fn new(config: PoolConfig) -> Self {
        Self(Rc::new(PoolInner {
            config,
            ring: Provided::new(config),
            record: RefCell::default(),
            large: RefCell::default(),
            huge: RefCell::default(),
            leak: Cell::new(false),
        }))
    }

    /// Sizes this pool was built with.
    #[must_use]
    pub fn config(&self) -> &PoolConfig {
        &self.0.config
    }

    /// Ring blocks that are in use by received, not yet dropped data.
    #[must_use]
    pub fn ring_blocks_in_use(&self) -> u32 {
        self.0.ring.lent()
    }

    /// Record, large and huge blocks that are in use by buffers.
    #[must_use]
    pub fn other_blocks_in_use(&self) -> usize {
        self.count(Blocks::in_use)
    }

    /// Bytes of all blocks that are in use by buffers.
    #[must_use]
    pub fn bytes_in_use(&self) -> usize {
        let size = |class| self.0.config.block_size(class) as usize;
        let ring = self.0.ring.lent() as usize * size(Class::Ring);
        let in_use = |class| self.0.blocks(class).borrow().in_use() * size(class);
        ring + Class::ON_DEMAND.into_iter().map(in_use).sum::<usize>()
    }

    /// Record, large and huge blocks that are kept for reuse.
    #[must_use]
    pub fn spare_blocks(&self) -> usize {
        self.count(Blocks::spare)
    }

    fn count(&self, of: impl Fn(&Blocks) -> usize) -> usize {
        let counted = |class| of(&self.0.blocks(class).borrow());
        Class::ON_DEMAND.into_iter().map(counted).sum()
    }

    /// Address of the ring entries for `IORING_REGISTER_PBUF_RING`.
    pub(crate) fn ring_address(&self) -> u64 {
        self.0.ring.address()
    }

    /// Marks the memory as never to be freed.
    pub(crate) fn leak(&self) {
        self.0.leak.set(true);
    }

    /// Whether [`Pool::trim`] may have something to give back.
    pub(crate) fn has_spare(&self) -> bool {
        self.spare_blocks() > 0 || self.0.ring.has_spare()
    }

    /// Gives memory back that was not needed since the last call.
    pub(crate) fn trim(&self) {
        self.0.ring.trim();
        for class in Class::ON_DEMAND {
            // SAFETY: a block that is handed out has no owner and is in no list any more.
            let free = |ptr| unsafe { self.0.free(class, ptr) };
            self.0.blocks(class).borrow_mut().trim(free);
        }
    }

    /// Takes over the ring block the kernel filled with `len` bytes.
    pub(crate) fn take_ring(&self, bid: u16, len: u32) -> Buf {
        let config = &self.0.config;
        Buf {
            ptr: self.0.ring.take(bid, len),
            len,
            head: config.head,
            tail: config.ring_block - config.head - len,
            class: Class::Ring,
            block: u32::from(bid),
            pool: self.clone(),
        }
    }

    /// The next free ring block, and where to receive how many bytes. For a back end that fills
    /// blocks itself.
    pub(crate) fn provided(&self) -> Option<(u16, NonNull<u8>, u32)> {
        let (bid, ptr) = self.0.ring.next()?;
        Some((bid, ptr, self.0.config.ring_payload()))
    }

    /// Takes the block of [`Pool::provided`] out of the ring.
    pub(crate) fn take_provided(&self) {
        self.0.ring.advance();
    }

    /// Puts as many fresh blocks into the ring as there are already, up to its size.
    pub(crate) fn grow(&self) {
        self.0.ring.grow();
    }

    /// Gives a ring block back unread (its operation's owner is gone).
    pub(crate) fn discard_ring(&self, bid: u16) {
        self.0.ring.give_back(bid);
    }

    /// An empty buffer for one record: [`PoolConfig::head`] bytes of head room, then
    /// `payload + tail` bytes of room behind.
    #[must_use]
    pub fn record(&self) -> Buf {
        self.block(Class::Record, self.0.config.head)
    }

    /// An empty buffer over a whole large block (no head room).
    #[must_use]
    pub fn large(&self) -> Buf {
        self.block(Class::Large, 0)
    }

    /// An empty buffer over a whole huge block (no head room), unless too many are in use.
    #[must_use]
    pub fn huge(&self) -> Option<Buf> {
        let in_use = self.0.huge.borrow().in_use();
        (in_use < self.0.config.huge_blocks).then(|| self.block(Class::Huge, 0))
    }

    fn block(&self, class: Class, head: u32) -> Buf {
        let size = self.0.config.block_size(class);
        let allocate = || self.0.allocate(class);
        let (block, base) = self.0.blocks(class).borrow_mut().acquire(allocate);
        // SAFETY: head is less than the block's size, so the pointer stays inside the block.
        let ptr = unsafe { base.add(head as usize) };
        Buf {
            ptr,
            len: 0,
            head,
            tail: size - head,
            class,
            block,
            pool: self.clone(),
        }
    }

    /// Copies `bytes` into pool memory, splitting at record size.
    pub fn copy_from(&self, mut bytes: &[u8], mut each: impl FnMut(Buf)) {
        while !bytes.is_empty() {
            let mut buf = self.record();
            let n = bytes.len().min(buf.tail_room());
            buf.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            each(buf);
        }
    }
}

impl PoolInner {
    fn blocks(&self, class: Class) -> &RefCell<Blocks> {
        match class {
            Class::Large => &self.large,
            Class::Huge => &self.huge,
            Class::Record | Class::Ring => &self.record,
        }
    }

    /// Memory for a block. Large and huge ones are mapped: the allocator would keep what is freed.
    fn allocate(&self, class: Class) -> NonNull<u8> {
        let layout = block_layout(self.config.block_size(class));
        match class {
            Class::Large | Class::Huge => map(layout),
            Class::Record | Class::Ring => allocate(layout),
        }
    }

    /// # Safety
    /// `ptr` is of [`PoolInner::allocate`] with this class, and nobody uses it any more.
    unsafe fn free(&self, class: Class, ptr: NonNull<u8>) {
        let layout = block_layout(self.config.block_size(class));
        match class {
            // SAFETY: mapped with this layout; the caller says that nobody uses it.
            Class::Large | Class::Huge => unsafe { unmap(ptr, layout) },
            // SAFETY: allocated with this layout; the caller says that nobody uses it.
            Class::Record | Class::Ring => unsafe { dealloc(ptr.as_ptr(), layout) },
        }
    }

    pub(super) fn retain(&self, class: Class, id: u32) {
        match class {
            Class::Ring => self.ring.retain(id as u16),
            class => self.blocks(class).borrow_mut().retain(id),
        }
    }

    pub(super) fn release(&self, class: Class, id: u32) {
        if class == Class::Ring {
            return self.ring.release(id as u16);
        }
        let keep_free = self.config.keep_free;
        let freed = self.blocks(class).borrow_mut().release(id, keep_free);
        if let Some(ptr) = freed {
            // SAFETY: the block's last owner is gone, and it is in no list any more.
            unsafe { self.free(class, ptr) };
        }
    }
}

impl Drop for PoolInner {
    fn drop(&mut self) {
        if self.leak.get() {
            return;
        }
        for class in Class::ON_DEMAND {
            for ptr in self.blocks(class).borrow_mut().drain() {
                // SAFETY: no Buf is left, or it would hold the pool.
                unsafe { self.free(class, ptr) };
            }
        }
        // SAFETY: no Buf is left, and the ring that used the blocks is closed.
        unsafe { self.ring.free() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_blocks_are_bounded_and_reused() {
        let pool = Pool::new(PoolConfig {
            keep_free: 2,
            ..PoolConfig::default()
        });
        let held: Vec<Buf> = (0..8).map(|_| pool.record()).collect();
        assert_eq!((pool.other_blocks_in_use(), pool.spare_blocks()), (8, 0));
        drop(held);
        assert_eq!((pool.other_blocks_in_use(), pool.spare_blocks()), (0, 2));
        let again: Vec<Buf> = (0..8).map(|_| pool.record()).collect();
        assert_eq!(pool.other_blocks_in_use(), 8);
        drop(again);
    }

    #[test]
    fn blocks_that_were_not_needed_are_given_back() {
        let pool = Pool::new(PoolConfig::default());
        assert!(!pool.has_spare());
        let held: Vec<Buf> = (0..10).map(|_| pool.large()).collect();
        drop(held);
        pool.trim();
        assert_eq!(pool.spare_blocks(), 10, "they were needed in this period");
        let three: Vec<Buf> = (0..3).map(|_| pool.large()).collect();
        drop(three);
        pool.trim();
        assert_eq!(pool.spare_blocks(), 3);
        pool.trim();
        assert!(!pool.has_spare());
        let mut again = pool.large();
        again.extend_from_slice(b"works");
        assert_eq!(&again[..], b"works");
    }

    #[test]
    fn huge_blocks_are_few() {
        let pool = Pool::new(PoolConfig::default());
        let most = pool.config().huge_blocks;
        let mut held: Vec<Buf> = std::iter::from_fn(|| pool.huge()).take(100).collect();
        assert_eq!(held.len(), most);
        assert!(held[0].tail_room() > pool.large().tail_room());
        held.pop();
        assert!(pool.huge().is_some(), "one has come back");
    }

    #[test]
    fn copies_are_cut_at_record_size() {
        let pool = Pool::new(PoolConfig::default());
        let bytes: Vec<u8> = (0..40_000).map(|i| i as u8).collect();
        let mut joined = Vec::new();
        pool.copy_from(&bytes, |buf| joined.extend_from_slice(&buf));
        assert_eq!(joined, bytes);
    }
}
