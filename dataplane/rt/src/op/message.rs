//! Messages that the kernel reads or fills where they lie: `msghdr`, vectors and buffers in one box
//! each.

use std::collections::VecDeque;

use crate::buf::Buf;

/// Vectors of one send; the kernel takes at most 1024 (`UIO_MAXIOV`).
const VECTORS_MAX: usize = 512;

/// Buffers of one send with their vectors. Boxed: the kernel reads it while the send is under way.
#[derive(Debug, Default)]
pub(crate) struct SendList {
    message: Option<libc::msghdr>,
    vectors: Vec<libc::iovec>,
    /// First vector that is not sent completely.
    first: usize,
    bufs: Vec<Buf>,
    bytes: usize,
    /// Behind the vectors when there are as many as one send takes; not part of this send.
    overflow: VecDeque<Buf>,
    overflow_bytes: usize,
}

impl SendList {
    fn is_full(&self) -> bool {
        self.vectors.len() >= VECTORS_MAX
    }

    /// Appends a buffer to this send, or behind it where it has as many vectors as it may.
    pub(crate) fn queue(&mut self, buf: Buf) {
        if self.is_full() || self.has_overflow() {
            self.overflow_bytes += buf.len();
            self.overflow.push_back(buf);
        } else {
            self.push(buf);
        }
    }

    /// Bytes of this send and behind it.
    pub(crate) fn queued_bytes(&self) -> usize {
        self.bytes + self.overflow_bytes
    }

    /// Whether there is something behind this send.
    pub(crate) fn has_overflow(&self) -> bool {
        !self.overflow.is_empty()
    }

    /// Moves what is behind this send to `next`, which is empty.
    pub(crate) fn move_overflow(&mut self, next: &mut Self) {
        std::mem::swap(&mut next.overflow, &mut self.overflow);
        while !next.is_full() {
            let Some(buf) = next.overflow.pop_front() else {
                break;
            };
            self.overflow_bytes -= buf.len();
            next.push(buf);
        }
        next.overflow_bytes = std::mem::take(&mut self.overflow_bytes);
    }

    /// Bytes left to send.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Address and length of what is left, if it is in one piece.
    pub(crate) fn only_vector(&self) -> Option<(*const u8, u32)> {
        let [vector] = &self.vectors[self.first..] else {
            return None;
        };
        let base = vector.iov_base.cast::<u8>().cast_const();
        Some((base, vector.iov_len as u32))
    }

    /// Appends a buffer; one that follows the last in memory extends its vector.
    pub(crate) fn push(&mut self, buf: Buf) {
        let base = buf.as_ptr().cast_mut();
        self.bytes += buf.len();
        match self.vectors.last_mut() {
            Some(last) if last.iov_base.addr() + last.iov_len == base.addr() => {
                last.iov_len += buf.len();
            }
            _ => self.vectors.push(libc::iovec {
                iov_base: base.cast(),
                iov_len: buf.len(),
            }),
        }
        self.bufs.push(buf);
    }

    /// Marks `n` bytes as sent. Returns whether all are.
    pub(crate) fn sent(&mut self, mut n: usize) -> bool {
        self.bytes -= n;
        while let Some(vector) = self.vectors.get_mut(self.first) {
            if n < vector.iov_len {
                // SAFETY: n is less than the vector's length, so the pointer stays inside it.
                vector.iov_base = unsafe { vector.iov_base.cast::<u8>().add(n) }.cast();
                vector.iov_len -= n;
                return false;
            }
            n -= vector.iov_len;
            self.first += 1;
        }
        self.clear();
        true
    }

    pub(crate) fn clear(&mut self) {
        self.vectors.clear();
        self.bufs.clear();
        self.first = 0;
        self.bytes = 0;
        self.overflow.clear();
        self.overflow_bytes = 0;
    }

    /// The kernel's description of what is left.
    pub(crate) fn message(&mut self) -> *const libc::msghdr {
        // SAFETY: msghdr is plain old data; all zeroes means no name, vectors and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        let left = &mut self.vectors[self.first..];
        message.msg_iov = left.as_mut_ptr();
        message.msg_iovlen = left.len();
        self.message.insert(message)
    }
}

/// Message header, vectors and segments of a scattered receive. Boxed: the kernel reads it.
#[derive(Debug, Default)]
pub(crate) struct MessageHeader {
    message: Option<libc::msghdr>,
    vectors: Vec<libc::iovec>,
    segments: Vec<Buf>,
}

impl MessageHeader {
    /// Lays out an empty large block for a receive of at most `payload` bytes a segment.
    pub(crate) fn prepare(&mut self, block: Buf, payload: u32) {
        self.segments.clear();
        self.vectors.clear();
        block.into_segments(|buf| self.segments.push(buf));
        for buf in &mut self.segments {
            let room = buf.spare_mut();
            self.vectors.push(libc::iovec {
                iov_base: room.as_mut_ptr().cast(),
                iov_len: payload as usize,
            });
        }
    }

    pub(crate) fn message(&mut self) -> *mut libc::msghdr {
        // SAFETY: msghdr is plain old data; all zeroes means no name, vectors and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.vectors.as_mut_ptr();
        message.msg_iovlen = self.vectors.len();
        self.message.insert(message)
    }

    /// Hands out the segments that hold data, and drops the others.
    pub(crate) fn take_segments(&mut self, mut received: usize, out: &mut VecDeque<Buf>) {
        for (mut buf, vector) in self.segments.drain(..).zip(&self.vectors) {
            let n = received.min(vector.iov_len);
            if n == 0 {
                break;
            }
            // SAFETY: the kernel filled the vectors in order, this one with `n` bytes.
            unsafe { buf.assume_tail(n as u32) };
            received -= n;
            out.push_back(buf);
        }
    }
}
