//! Pool memory for received and sent bytes.
//!
//! A [`Buf`] is the exclusive owner of a range of a pool block, with room before and after it where
//! the block has some. Splitting a `Buf` gives two owners of disjoint ranges; the block returns to
//! its pool when the last of them is dropped. So decrypted payload slices of one received block can
//! wait in different queues without a copy, and headers are written into the head room.
//!
//! Three classes of block, all per worker (no locks, no atomics):
//! * *ring*: small blocks handed to the kernel in a provided-buffer ring (multishot receive);
//! * *record*: one TLS record with its headers, for coalesced sends and starved receives;
//! * *large*: [`PoolConfig::segments`] records back to back, for bulk flows.
//!
//! Blocks are allocated on first use and kept for reuse up to a bound; ring memory is reserved at
//! start, and more of it comes into use the more blocks are in use at a time.

mod geometry;

use std::alloc::dealloc;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;

pub use geometry::PoolConfig;
use geometry::{Class, allocate, allocate_zeroed, block_layout, entries_layout, map, ring_layout};

/// Group id of the provided-buffer ring.
pub(crate) const RING_GROUP: u16 = 0;
/// Ring blocks at first. The ring goes round all its blocks, so that each costs memory and cache
/// however little is going on; more are added when most are in use.
const FIRST_BLOCKS: u16 = 32;

#[derive(Debug, Clone, Copy)]
struct Block {
    ptr: NonNull<u8>,
    refs: u32,
}

#[derive(Debug, Default)]
struct Blocks {
    all: Vec<Option<Block>>,
    free: Vec<u32>,
    vacant: Vec<u32>,
}

/// A worker's buffer memory. Cheap to clone (a counted pointer).
#[derive(Clone)]
pub struct Pool(Rc<PoolInner>);

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("config", &self.0.config)
            .finish_non_exhaustive()
    }
}

struct PoolInner {
    config: PoolConfig,
    ring_memory: NonNull<u8>,
    ring_refs: Box<[Cell<u32>]>,
    ring_entries: NonNull<BufRingEntry>,
    ring_tail: Cell<u16>,
    /// Next entry to use; only where no kernel takes entries from the ring.
    ring_head: Cell<u16>,
    /// Blocks that have ever been in the ring; the others' pages are untouched.
    ring_provided: Cell<u16>,
    ring_lent: Cell<u32>,
    record: RefCell<Blocks>,
    large: RefCell<Blocks>,
    /// Set when operations could not be awaited at shutdown: the kernel may still write, so the
    /// memory must never be freed.
    leak: Cell<bool>,
}

impl Pool {
    /// Reserves the ring memory (its pages are touched only when used).
    pub(crate) fn new(config: PoolConfig) -> Self {
        assert!(config.ring_entries.is_power_of_two() && config.ring_entries <= 32_768);
        assert!(config.ring_block > config.head + config.tail);
        let ring_memory = map(ring_layout(&config));
        let entries = allocate_zeroed(entries_layout(&config)).cast::<BufRingEntry>();
        let pool = Self(Rc::new(PoolInner {
            config,
            ring_memory,
            ring_refs: (0..config.ring_entries).map(|_| Cell::new(0)).collect(),
            ring_entries: entries,
            ring_tail: Cell::new(0),
            ring_head: Cell::new(0),
            ring_provided: Cell::new(0),
            ring_lent: Cell::new(0),
            record: RefCell::default(),
            large: RefCell::default(),
            leak: Cell::new(false),
        }));
        pool.0.grow(FIRST_BLOCKS);
        pool
    }

    /// Sizes this pool was built with.
    #[must_use]
    pub fn config(&self) -> &PoolConfig {
        &self.0.config
    }

    /// Ring blocks that are in use by received, not yet dropped data.
    #[must_use]
    pub fn ring_blocks_in_use(&self) -> u32 {
        self.0.ring_lent.get()
    }

    /// Record and large blocks that are in use by buffers.
    #[must_use]
    pub fn other_blocks_in_use(&self) -> usize {
        let used = |blocks: &RefCell<Blocks>| {
            let blocks = blocks.borrow();
            blocks.all.len() - blocks.vacant.len() - blocks.free.len()
        };
        used(&self.0.record) + used(&self.0.large)
    }

    /// Address of the ring entries for `IORING_REGISTER_PBUF_RING`.
    pub(crate) fn ring_address(&self) -> u64 {
        self.0.ring_entries.as_ptr() as u64
    }

    /// Marks the memory as never to be freed.
    pub(crate) fn leak(&self) {
        self.0.leak.set(true);
    }

    /// Takes over the ring block the kernel filled with `len` bytes.
    pub(crate) fn take_ring(&self, bid: u16, len: u32) -> Buf {
        let config = &self.0.config;
        assert!(len <= config.ring_payload() && bid < config.ring_entries);
        debug_assert_eq!(self.0.ring_refs[usize::from(bid)].get(), 0);
        self.0.ring_refs[usize::from(bid)].set(1);
        let lent = self.0.ring_lent.get() + 1;
        self.0.ring_lent.set(lent);
        if lent > u32::from(self.0.ring_provided.get()) / 4 * 3 {
            self.grow();
        }
        // SAFETY: the block starts inside ring_memory (bid < ring_entries) and head < ring_block.
        let ptr = unsafe { self.0.ring_block_ptr(bid).add(config.head as usize) };
        Buf {
            ptr,
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
        let inner = &*self.0;
        let head = inner.ring_head.get();
        if head == inner.ring_tail.get() {
            return None;
        }
        let slot = usize::from(head & (inner.config.ring_entries - 1));
        // SAFETY: slot < ring_entries; the entry was written by `provide` on this thread.
        let bid = unsafe { &*inner.ring_entries.as_ptr().add(slot) }.bid();
        // SAFETY: head is less than the block's size, so the pointer stays inside the block.
        let ptr = unsafe { inner.ring_block_ptr(bid).add(inner.config.head as usize) };
        Some((bid, ptr, inner.config.ring_payload()))
    }

    /// Takes the block of [`Pool::provided`] out of the ring.
    pub(crate) fn take_provided(&self) {
        self.0.ring_head.set(self.0.ring_head.get().wrapping_add(1));
    }

    /// Puts as many fresh blocks into the ring as there are already, up to its size.
    pub(crate) fn grow(&self) {
        self.0.grow(self.0.ring_provided.get());
    }

    /// Gives a ring block back unread (its operation's owner is gone).
    pub(crate) fn discard_ring(&self, bid: u16) {
        if bid < self.0.config.ring_entries {
            self.0.provide(bid);
        }
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

    fn block(&self, class: Class, head: u32) -> Buf {
        let size = self.0.config.block_size(class);
        let (block, base) = self.0.acquire(class, size);
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
    fn ring_block_ptr(&self, bid: u16) -> NonNull<u8> {
        let offset = usize::from(bid) * self.config.ring_block as usize;
        // SAFETY: ring_memory spans ring_entries * ring_block bytes and bid < ring_entries.
        unsafe { self.ring_memory.add(offset) }
    }

    /// Puts up to `more` blocks into the ring that have never been there.
    fn grow(&self, more: u16) {
        let provided = self.ring_provided.get();
        let end = provided.saturating_add(more).min(self.config.ring_entries);
        self.ring_provided.set(end);
        for bid in provided..end {
            self.provide(bid);
        }
    }

    /// Puts block `bid` at the tail of the provided-buffer ring.
    fn provide(&self, bid: u16) {
        let config = &self.config;
        let tail = self.ring_tail.get();
        let slot = usize::from(tail & (config.ring_entries - 1));
        let address = self.ring_block_ptr(bid).as_ptr() as u64 + u64::from(config.head);
        // SAFETY: slot < ring_entries, so the entry lies inside the allocation; between head and
        // tail only user space writes entries, and this thread is the only user-space writer.
        let entry = unsafe { &mut *self.ring_entries.as_ptr().add(slot) };
        entry.set_addr(address);
        entry.set_len(config.ring_payload());
        entry.set_bid(bid);
        let tail = tail.wrapping_add(1);
        self.ring_tail.set(tail);
        // SAFETY: the tail field lies inside the ring's first entry, is aligned to two bytes and is
        // shared with the kernel, hence the atomic store with release ordering.
        let shared = unsafe {
            let tail_ptr = BufRingEntry::tail(self.ring_entries.as_ptr());
            AtomicU16::from_ptr(tail_ptr.cast_mut())
        };
        shared.store(tail, Ordering::Release);
    }

    fn blocks(&self, class: Class) -> &RefCell<Blocks> {
        match class {
            Class::Large => &self.large,
            Class::Record | Class::Ring => &self.record,
        }
    }

    fn acquire(&self, class: Class, size: u32) -> (u32, NonNull<u8>) {
        let mut blocks = self.blocks(class).borrow_mut();
        if let Some(id) = blocks.free.pop() {
            let block = blocks.all[id as usize]
                .as_mut()
                .expect("a free block is present");
            block.refs = 1;
            return (id, block.ptr);
        }
        let ptr = allocate(block_layout(size));
        let block = Some(Block { ptr, refs: 1 });
        if let Some(id) = blocks.vacant.pop() {
            blocks.all[id as usize] = block;
            return (id, ptr);
        }
        blocks.all.push(block);
        ((blocks.all.len() - 1) as u32, ptr)
    }

    fn retain(&self, class: Class, id: u32) {
        if class == Class::Ring {
            let refs = &self.ring_refs[id as usize];
            refs.set(refs.get() + 1);
            return;
        }
        let mut blocks = self.blocks(class).borrow_mut();
        blocks.all[id as usize]
            .as_mut()
            .expect("a referenced block is present")
            .refs += 1;
    }

    fn release(&self, class: Class, id: u32) {
        if class == Class::Ring {
            let refs = &self.ring_refs[id as usize];
            refs.set(refs.get() - 1);
            if refs.get() == 0 {
                self.ring_lent.set(self.ring_lent.get() - 1);
                self.provide(id as u16);
            }
            return;
        }
        let mut blocks = self.blocks(class).borrow_mut();
        let block = blocks.all[id as usize]
            .as_mut()
            .expect("a referenced block is present");
        block.refs -= 1;
        if block.refs > 0 {
            return;
        }
        if blocks.free.len() < self.config.keep_free {
            blocks.free.push(id);
        } else if let Some(block) = blocks.all[id as usize].take() {
            blocks.vacant.push(id);
            // SAFETY: the block was allocated with this layout and its last reference is gone.
            unsafe {
                dealloc(
                    block.ptr.as_ptr(),
                    block_layout(self.config.block_size(class)),
                );
            };
        }
    }
}

impl Drop for PoolInner {
    fn drop(&mut self) {
        if self.leak.get() {
            return;
        }
        for (class, blocks) in [(Class::Record, &self.record), (Class::Large, &self.large)] {
            for block in blocks.borrow_mut().all.drain(..).flatten() {
                // SAFETY: allocated with this layout; no Buf is left, or it would hold the pool.
                unsafe {
                    dealloc(
                        block.ptr.as_ptr(),
                        block_layout(self.config.block_size(class)),
                    );
                };
            }
        }
        // SAFETY: mapped with this size in `new`; the ring that used it is closed.
        unsafe {
            let size = ring_layout(&self.config).size();
            libc::munmap(self.ring_memory.as_ptr().cast(), size);
        };
        // SAFETY: allocated with this layout in `new`; the ring that used it is closed.
        unsafe {
            dealloc(
                self.ring_entries.as_ptr().cast(),
                entries_layout(&self.config),
            );
        };
    }
}

/// Exclusive owner of a range of bytes in a pool block. Dereferences to the bytes.
pub struct Buf {
    ptr: NonNull<u8>,
    len: u32,
    head: u32,
    tail: u32,
    class: Class,
    block: u32,
    pool: Pool,
}

impl Buf {
    /// Bytes that [`Buf::grow_head`] can still claim.
    #[must_use]
    pub fn head_room(&self) -> usize {
        self.head as usize
    }

    /// Bytes that can still be appended.
    #[must_use]
    pub fn tail_room(&self) -> usize {
        self.tail as usize
    }

    /// Extends the buffer by `n` bytes in front; their content is unspecified but initialised.
    ///
    /// # Panics
    /// If `n` exceeds [`Buf::head_room`].
    pub fn grow_head(&mut self, n: usize) {
        assert!(n <= self.head_room(), "head room {} < {n}", self.head);
        // SAFETY: `head` bytes before `ptr` belong to this buffer's part of the block. They are
        // zeroed first because the block may never have been written.
        unsafe {
            self.ptr = self.ptr.sub(n);
            self.ptr.write_bytes(0, n);
        }
        self.head -= n as u32;
        self.len += n as u32;
    }

    /// Extends the buffer by `n` zero bytes behind.
    ///
    /// # Panics
    /// If `n` exceeds [`Buf::tail_room`].
    pub fn grow_tail(&mut self, n: usize) {
        assert!(n <= self.tail_room(), "tail room {} < {n}", self.tail);
        // SAFETY: `tail` bytes behind the range belong to this buffer's part of the block.
        unsafe { self.ptr.add(self.len as usize).write_bytes(0, n) };
        self.tail -= n as u32;
        self.len += n as u32;
    }

    /// Appends a copy of `bytes`.
    ///
    /// # Panics
    /// If they exceed [`Buf::tail_room`].
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        assert!(
            bytes.len() <= self.tail_room(),
            "tail room {} < {}",
            self.tail,
            bytes.len()
        );
        // SAFETY: the destination lies in this buffer's tail room, which nobody else references,
        // so source and destination cannot overlap.
        unsafe {
            let end = self.ptr.add(self.len as usize);
            end.as_ptr()
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
        self.tail -= bytes.len() as u32;
        self.len += bytes.len() as u32;
    }

    /// Splits off and returns the first `n` bytes, with the head room; the rest stays here.
    ///
    /// # Panics
    /// If `n` exceeds the length.
    #[must_use]
    pub fn split_to(&mut self, n: usize) -> Self {
        assert!(n <= self.len(), "length {} < {n}", self.len);
        self.pool.0.retain(self.class, self.block);
        let front = Self {
            ptr: self.ptr,
            len: n as u32,
            head: self.head,
            tail: 0,
            class: self.class,
            block: self.block,
            pool: self.pool.clone(),
        };
        self.advance(n);
        self.head = 0;
        front
    }

    /// Drops the first `n` bytes. They become head room.
    ///
    /// # Panics
    /// If `n` exceeds the length.
    pub fn advance(&mut self, n: usize) {
        assert!(n <= self.len(), "length {} < {n}", self.len);
        // SAFETY: n <= len, so the pointer stays inside the range (or one past its end).
        self.ptr = unsafe { self.ptr.add(n) };
        self.head += n as u32;
        self.len -= n as u32;
    }

    /// Keeps the first `n` bytes; the others become tail room. No effect if `n >= len`.
    pub fn truncate(&mut self, n: usize) {
        if n < self.len() {
            self.tail += self.len - n as u32;
            self.len = n as u32;
        }
    }

    /// Address and length of the tail room, for the kernel to receive into.
    pub(crate) fn tail_ptr(&mut self) -> (*mut u8, u32) {
        // SAFETY: one past the range is still inside (or at the end of) the block.
        (
            unsafe { self.ptr.add(self.len as usize) }.as_ptr(),
            self.tail,
        )
    }

    /// Accepts `n` bytes the kernel wrote at the start of the tail room.
    ///
    /// # Safety
    /// The first `n` bytes of the tail room must have been initialised.
    pub(crate) unsafe fn assume_tail(&mut self, n: u32) {
        assert!(n <= self.tail);
        self.tail -= n;
        self.len += n;
    }

    /// Cuts an empty large buffer into one empty buffer per segment, each with its head room.
    pub(crate) fn into_segments(mut self, mut each: impl FnMut(Self)) {
        let config = *self.pool.config();
        let segment = config.segment();
        self.truncate(0);
        let mut left = self.tail / segment;
        while left > 0 {
            self.pool.0.retain(self.class, self.block);
            // SAFETY: `tail` covers this whole segment, so head stays inside the block.
            let ptr = unsafe { self.ptr.add(config.head as usize) };
            each(Self {
                ptr,
                len: 0,
                head: config.head,
                tail: segment - config.head,
                class: self.class,
                block: self.block,
                pool: self.pool.clone(),
            });
            // SAFETY: as above; the next segment starts inside or at the end of the block.
            self.ptr = unsafe { self.ptr.add(segment as usize) };
            self.tail -= segment;
            left -= 1;
        }
    }
}

impl Deref for Buf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: ptr..ptr+len is inside the block, initialised, and owned by this Buf alone.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len as usize) }
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len as usize) }
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        self.pool.0.release(self.class, self.block);
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buf")
            .field("len", &self.len)
            .field("head", &self.head)
            .field("tail", &self.tail)
            .field("class", &self.class)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_are_disjoint_and_return_the_block_once() {
        let pool = Pool::new(PoolConfig {
            ring_entries: 2,
            ..PoolConfig::default()
        });
        let mut buf = pool.take_ring(1, 10);
        buf.copy_from_slice(b"0123456789");
        assert_eq!(pool.ring_blocks_in_use(), 1);
        let mut front = buf.split_to(4);
        assert_eq!(
            (front.head_room(), front.tail_room(), buf.head_room()),
            (14, 0, 0)
        );
        front.grow_head(14);
        front[..14].fill(b'h');
        assert_eq!(&buf[..], b"456789");
        buf.advance(2);
        assert_eq!(&buf[..], b"6789");
        buf.grow_head(2);
        drop(front);
        assert_eq!(pool.ring_blocks_in_use(), 1);
        drop(buf);
        assert_eq!(pool.ring_blocks_in_use(), 0);
    }

    #[test]
    fn segments_are_contiguous_when_full() {
        let config = PoolConfig::default();
        let pool = Pool::new(config);
        let mut segments = Vec::new();
        pool.large().into_segments(|buf| segments.push(buf));
        assert_eq!(segments.len(), 16);
        let mut ends = Vec::new();
        for buf in &mut segments {
            buf.grow_tail(config.payload as usize);
            buf.grow_head(14);
            buf.grow_tail(17);
            ends.push((buf.as_ptr() as usize, buf.as_ptr() as usize + buf.len()));
            assert_eq!(buf.tail_room(), 0);
        }
        assert!(ends.windows(2).all(|pair| pair[0].1 == pair[1].0));
    }

    #[test]
    fn free_blocks_are_bounded_and_reused() {
        let pool = Pool::new(PoolConfig {
            keep_free: 2,
            ..PoolConfig::default()
        });
        let held: Vec<Buf> = (0..8).map(|_| pool.record()).collect();
        drop(held);
        assert_eq!(pool.0.record.borrow().free.len(), 2);
        assert_eq!(pool.0.record.borrow().vacant.len(), 6);
        let again: Vec<Buf> = (0..8).map(|_| pool.record()).collect();
        assert_eq!(pool.0.record.borrow().all.len(), 8);
        drop(again);
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
