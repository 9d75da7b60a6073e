//! Sizes of a pool and its blocks, and where their memory is from.

use std::alloc::{Layout, alloc, alloc_zeroed, handle_alloc_error};
use std::ptr::NonNull;

use io_uring::types::BufRingEntry;

const BLOCK_ALIGN: usize = 64;
pub(super) const PAGE: usize = 4096;

/// Sizes of a worker's pool. All sizes are bytes.
#[derive(Debug, Clone, Copy)]
pub struct PoolConfig {
    /// Blocks in the provided-buffer ring; a power of two, at most 32,768.
    pub ring_entries: u16,
    /// Size of one ring block, head and tail room included.
    pub ring_block: u32,
    /// Room in front of received bytes.
    pub head: u32,
    /// Payload of one segment of a segmented receive.
    pub payload: u32,
    /// Room behind received bytes.
    pub tail: u32,
    /// Segments of a large block.
    pub segments: u32,
    /// Segments of a huge block.
    pub huge_segments: u32,
    /// Huge blocks in use at a time, at most: each makes a turn of the worker longer.
    pub huge_blocks: usize,
    /// Record and large blocks kept for reuse, each; more are freed at once, and these when they
    /// have not been needed for a second.
    pub keep_free: usize,
}

impl Default for PoolConfig {
    /// Geometry of TLS 1.3 records that carry one HTTP/2 DATA frame: 5 + 9 bytes in front, type and
    /// tag behind, 16,384 bytes of plaintext (RFC 8446 section 5.1).
    fn default() -> Self {
        Self {
            ring_entries: 1024,
            ring_block: 4096,
            head: 14,
            payload: 16_375,
            tail: 17,
            segments: 16,
            huge_segments: 64,
            huge_blocks: 8,
            keep_free: 64,
        }
    }
}

impl PoolConfig {
    /// Bytes of one segment with its head and tail room.
    #[must_use]
    pub fn segment(&self) -> u32 {
        self.head + self.payload + self.tail
    }

    /// Payload bytes of one ring block.
    #[must_use]
    pub fn ring_payload(&self) -> u32 {
        self.ring_block - self.head - self.tail
    }

    /// Bytes of a large block.
    pub(crate) fn large_bytes(&self) -> usize {
        self.block_size(Class::Large) as usize
    }

    pub(super) fn block_size(&self, class: Class) -> u32 {
        match class {
            Class::Ring => self.ring_block,
            Class::Record => self.segment(),
            Class::Large => self.segment() * self.segments,
            Class::Huge => self.segment() * self.huge_segments,
        }
    }
}

/// Which pool a block belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Ring,
    Record,
    Large,
    Huge,
}

impl Class {
    /// Those that are allocated on demand.
    pub(super) const ON_DEMAND: [Self; 3] = [Self::Record, Self::Large, Self::Huge];
}

pub(super) fn block_layout(size: u32) -> Layout {
    Layout::from_size_align(size as usize, BLOCK_ALIGN).expect("block sizes are small")
}

/// Of the memory of all ring blocks.
pub(super) fn ring_layout(config: &PoolConfig) -> Layout {
    let size = usize::from(config.ring_entries) * config.ring_block as usize;
    Layout::from_size_align(size, PAGE).expect("ring sizes are small")
}

/// Of the ring itself.
pub(super) fn entries_layout(config: &PoolConfig) -> Layout {
    let size = usize::from(config.ring_entries) * size_of::<BufRingEntry>();
    Layout::from_size_align(size, PAGE).expect("ring sizes are small")
}

/// A block; its content is whatever it is.
pub(super) fn allocate(layout: Layout) -> NonNull<u8> {
    // SAFETY: every layout made in this module has a non-zero size.
    NonNull::new(unsafe { alloc(layout) }).unwrap_or_else(|| handle_alloc_error(layout))
}

/// Memory whose pages exist once they are touched, whatever the allocator does.
pub(super) fn map(layout: Layout) -> NonNull<u8> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: an anonymous mapping at an address the kernel chooses touches no other memory.
    let ptr = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            layout.size(),
            protection,
            flags,
            -1,
            0,
        )
    };
    if ptr == libc::MAP_FAILED {
        handle_alloc_error(layout);
    }
    NonNull::new(ptr.cast()).unwrap_or_else(|| handle_alloc_error(layout))
}

/// # Safety
/// `ptr` is of [`map`] with this layout, and nobody uses it any more.
pub(super) unsafe fn unmap(ptr: NonNull<u8>, layout: Layout) {
    // SAFETY: the caller's promise. It cannot fail for a mapping of that size.
    unsafe { libc::munmap(ptr.as_ptr().cast(), layout.size()) };
}

/// Gives pages back to the system; they read as zeroes when they are next used.
///
/// # Safety
/// The `len` bytes at `ptr` are whole pages of [`map`] whose content nobody needs.
pub(super) unsafe fn discard_pages(ptr: NonNull<u8>, len: usize) {
    if cfg!(miri) {
        return; // it has no madvise(2)
    }
    // SAFETY: the caller's promise. Where it fails the pages just stay.
    unsafe { libc::madvise(ptr.as_ptr().cast(), len, libc::MADV_DONTNEED) };
}

pub(super) fn allocate_zeroed(layout: Layout) -> NonNull<u8> {
    // SAFETY: every layout made in this module has a non-zero size.
    NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout))
}
