//! One bound on the memory that received payload takes in all tunnels of the process.
//!
//! Windows bound payload; blocks are what costs memory, and a byte of payload may pin a block of
//! 256 KiB. So every stream is charged with the blocks that its payload pins until its receiver has
//! taken it, and workers add their charges up. Blocks that several streams share are charged to
//! each of them, hence a worker counts what its pool has lent where that is less.
//!
//! From a quarter of the bound on, payload that is queued is copied out of the blocks it arrived
//! in. At the bound, streams are given up until it is no longer reached: those first whose receiver
//! has taken nothing since half of the bound was used, and of those the ones that pin most. Each
//! worker does so while it holds more than its share; one that receives nothing meanwhile does it
//! at its next look at the keepalive, in ten seconds at most. Nothing else ends a stream for want
//! of memory, and none of them stops another one before.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use rt::buf::Pool;

use crate::tunnel::{HeldStream, Tunnel};

/// Charges that a worker keeps to itself before it tells the others.
const TELL_BYTES: usize = 256 * 1024;
/// With this part of the bound in use, nothing pins more than it needs.
const TIGHT_PART: usize = 4;
/// With this part in use, it is noted which receivers still take something.
const WATCH_PART: usize = 2;
/// Part of the bound that is freed at a time.
const RELIEF_PART: usize = 16;

/// The bound and what is used of it, for all workers.
#[derive(Debug)]
pub struct TunnelMemory {
    limit: usize,
    held: AtomicUsize,
    workers: AtomicUsize,
    given_up: AtomicU64,
}

impl TunnelMemory {
    /// At most `limit_bytes` are to be pinned by payload that has arrived in tunnels.
    pub fn new(limit_bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            limit: limit_bytes,
            held: AtomicUsize::new(0),
            workers: AtomicUsize::new(0),
            given_up: AtomicU64::new(0),
        })
    }

    /// The bound, in bytes.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes pinned now.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Streams given up at the bound so far.
    pub fn streams_given_up(&self) -> u64 {
        self.given_up.load(Ordering::Relaxed)
    }

    fn uses_part(&self, part: usize) -> bool {
        self.held() >= self.limit / part
    }
}

/// A worker's part of it.
#[derive(Debug)]
pub(crate) struct WorkerMemory {
    shared: Arc<TunnelMemory>,
    /// Charges of this worker's streams.
    charged: Cell<usize>,
    /// `charged` when the others were told.
    charged_then: Cell<usize>,
    /// What they were told.
    told: Cell<usize>,
    /// It is being noted which receivers take something.
    watching: Cell<bool>,
    tunnels: RefCell<Vec<Weak<Tunnel>>>,
}

impl WorkerMemory {
    pub(crate) fn new(shared: &Arc<TunnelMemory>) -> Rc<Self> {
        shared.workers.fetch_add(1, Ordering::Relaxed);
        Rc::new(Self {
            shared: Arc::clone(shared),
            charged: Cell::new(0),
            charged_then: Cell::new(0),
            told: Cell::new(0),
            watching: Cell::new(false),
            tunnels: RefCell::default(),
        })
    }

    /// `tunnel` is one of those whose streams may be given up.
    pub(crate) fn add(&self, tunnel: &Rc<Tunnel>) {
        let mut tunnels = self.tunnels.borrow_mut();
        if tunnels.len() == tunnels.capacity() {
            tunnels.retain(|tunnel| tunnel.strong_count() > 0);
        }
        tunnels.push(Rc::downgrade(tunnel));
    }

    #[cfg(test)]
    pub(crate) fn charged(&self) -> usize {
        self.charged.get()
    }

    /// Whether payload that is queued is copied out of larger blocks.
    #[inline]
    pub(crate) fn is_tight(&self) -> bool {
        self.shared.uses_part(TIGHT_PART)
    }

    /// Blocks of `bytes` are pinned.
    #[inline]
    pub(crate) fn charge(&self, bytes: usize, pool: &Pool) {
        let charged = self.charged.get() + bytes;
        self.charged.set(charged);
        if charged.abs_diff(self.charged_then.get()) >= TELL_BYTES {
            self.tell(pool);
        }
    }

    /// They are not pinned any more.
    #[inline]
    pub(crate) fn discharge(&self, bytes: usize, pool: &Pool) {
        let charged = self.charged.get() - bytes;
        self.charged.set(charged);
        if charged.abs_diff(self.charged_then.get()) >= TELL_BYTES {
            self.tell(pool);
        }
    }

    /// Tells the other workers.
    fn tell(&self, pool: &Pool) {
        let charged = self.charged.get();
        self.charged_then.set(charged);
        let holds = charged.min(pool.bytes_in_use());
        let before = self.told.replace(holds);
        let held = &self.shared.held;
        if holds >= before {
            held.fetch_add(holds - before, Ordering::Relaxed);
        } else {
            held.fetch_sub(before - holds, Ordering::Relaxed);
        }
        if self.watching.get() {
            self.watching.set(self.shared.uses_part(TIGHT_PART));
        } else if self.shared.uses_part(WATCH_PART) {
            self.watching.set(true);
            let streams = self.streams();
            streams.iter().for_each(|stream| stream.begin_watch());
        }
    }

    fn streams(&self) -> Vec<HeldStream> {
        let tunnels = self.tunnels.borrow();
        let mut streams = Vec::new();
        for tunnel in tunnels.iter().filter_map(Weak::upgrade) {
            tunnel.held_streams(&mut streams);
        }
        streams
    }

    /// Whether the bound is reached.
    #[inline]
    pub(crate) fn is_used_up(&self) -> bool {
        self.shared.uses_part(1)
    }

    /// Gives streams of this worker up if the bound is reached and it holds more than its share.
    pub(crate) fn make_room(&self, pool: &Pool) {
        self.tell(pool);
        let limit = self.shared.limit;
        let share = limit / self.shared.workers.load(Ordering::Relaxed).max(1);
        if !self.is_used_up() || self.told.get() < share {
            return;
        }
        let mut streams = self.streams();
        streams.sort_by_key(|stream| (stream.moves(), Reverse(stream.charge())));
        let mut relief = limit / RELIEF_PART;
        for stream in streams {
            if relief == 0 {
                break;
            }
            relief = relief.saturating_sub(stream.charge());
            self.shared.given_up.fetch_add(1, Ordering::Relaxed);
            stream.give_up(limit);
        }
        self.tell(pool);
    }
}

impl Drop for WorkerMemory {
    fn drop(&mut self) {
        let told = self.told.get();
        self.shared.held.fetch_sub(told, Ordering::Relaxed);
        self.shared.workers.fetch_sub(1, Ordering::Relaxed);
    }
}
