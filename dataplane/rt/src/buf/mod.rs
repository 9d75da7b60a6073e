//! Pool memory for received and sent bytes.
//!
//! A [`Buf`] is the exclusive owner of a range of a pool block, with room before and after it where
//! the block has some. Splitting a `Buf` gives two owners of disjoint ranges; the block returns to
//! its pool when the last of them is dropped. So decrypted payload slices of one received block can
//! wait in different queues without a copy, and headers are written into the head room.
//!
//! Four classes of block, all per worker (no locks, no atomics):
//! * *ring*: small blocks handed to the kernel in a provided-buffer ring (multishot receive);
//! * *record*: one TLS record with its headers, for coalesced sends and starved receives;
//! * *large*: [`PoolConfig::segments`] records back to back, for bulk flows;
//! * *huge*: for a few bulk flows that fill large ones.
//!
//! Blocks are allocated on first use and kept for reuse up to a bound; ring memory is reserved at
//! start, and more of it comes into use the more blocks are in use at a time. What a worker has not
//! needed for a second it gives back to the system.

mod blocks;
mod geometry;
mod pool;
mod provided;

use std::fmt;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use geometry::Class;
pub use geometry::PoolConfig;
pub use pool::Pool;

/// Group id of the provided-buffer ring.
pub(crate) const RING_GROUP: u16 = 0;

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

    /// Bytes of the block that this buffer keeps from its pool, however few of them are its own.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.pool.config().block_size(self.class) as usize
    }

    /// Whether both are parts of one block.
    #[must_use]
    pub fn shares_block(&self, other: &Self) -> bool {
        let same_pool = std::rc::Rc::ptr_eq(&self.pool.0, &other.pool.0);
        same_pool && self.class == other.class && self.block == other.block
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

    /// The tail room, to receive into.
    pub(crate) fn spare_mut(&mut self) -> &mut [MaybeUninit<u8>] {
        // SAFETY: `tail` bytes behind the range belong to this buffer's part of the block, which
        // outlives it; `&mut self` makes the access exclusive; they need not be initialised.
        unsafe {
            let end = self.ptr.add(self.len as usize);
            std::slice::from_raw_parts_mut(end.as_ptr().cast(), self.tail as usize)
        }
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
    fn buffers_know_what_they_pin() {
        let config = PoolConfig::default();
        let pool = Pool::new(config);
        let mut buf = pool.large();
        buf.extend_from_slice(&[7; 1000]);
        let front = buf.split_to(1);
        assert!(front.shares_block(&buf));
        assert_eq!(front.block_bytes(), config.large_bytes());
        let other = pool.large();
        assert!(!front.shares_block(&other));
        let record = pool.record();
        assert_eq!(record.block_bytes(), config.segment() as usize);
        assert_eq!(
            pool.bytes_in_use(),
            2 * config.large_bytes() + record.block_bytes()
        );
        drop((front, buf, record));
        assert_eq!(pool.bytes_in_use(), config.large_bytes());
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
}
