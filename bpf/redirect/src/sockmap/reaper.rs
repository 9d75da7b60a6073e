//! Takes sockets out of the maps once they use TCP: until then each of their calls pays for the
//! detour through the programs.
//!
//! Taking a socket out throws away what was redirected to it and is unread. So it is first no
//! target any more, and leaves for good when, later than that, it was seen with an empty queue; at
//! once if nothing was ever redirected to either end: what one sends shows how it is with the
//! other. Without the reaper nothing is lost but speed.

use std::collections::HashMap;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use aya::maps::{MapData, RingBuf, SockHash};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};

use super::Senders;
use super::layout::{self, END_BYTES, Event, Key};
use crate::error::{Error, Result};

/// How long a redirect that had been decided on may still be on its way.
const IN_FLIGHT_NS: u64 = 50_000_000;
/// How soon the thread notices that it is to end.
const PATIENCE_MS: u16 = 200;
/// Sockets that were no targets at a known time; those forgotten wait a turn longer.
const REMEMBERED_MAX: usize = 65_536;

/// The thread. Ends when dropped.
#[derive(Debug)]
pub(super) struct Reaper {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reaper {
    /// Starts with the maps pinned in `pins`.
    pub(super) fn start(pins: &Path) -> Result<Self> {
        let mut work = Work {
            events: super::open(pins, layout::EVENTS)?,
            targets: super::open(pins, layout::TARGETS)?,
            senders: super::open_senders(pins)?,
            ends: super::open(pins, layout::ENDS)?,
            no_targets_since: HashMap::new(),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("sockmap".to_owned())
            .spawn(move || {
                while !told.load(Ordering::Relaxed) {
                    work.turn();
                }
            })
            .map_err(|e| Error::file("start thread", "sockmap", e))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic in it was reported by its hook
        }
    }
}

struct Work {
    events: RingBuf<MapData>,
    targets: SockHash<MapData, Key>,
    senders: Senders,
    ends: aya::maps::HashMap<MapData, Key, [u8; END_BYTES]>,
    no_targets_since: HashMap<Key, NoTarget>,
}

/// A socket that is no target any more.
struct NoTarget {
    cookie: u64,
    /// CLOCK_MONOTONIC, nanoseconds.
    since: u64,
}

impl Work {
    fn turn(&mut self) {
        let mut waiting = [PollFd::new(self.events.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut waiting, PollTimeout::from(PATIENCE_MS)); // a signal: look anyway
        while let Some(event) = self.next() {
            match event {
                Event::Demoted { own, peer } => {
                    let started = own.1 || peer.1;
                    for (key, _) in [own, peer] {
                        self.demoted(&key, started);
                    }
                }
                Event::Drained { own, when_ns } => self.drained(&own, when_ns),
            }
        }
    }

    fn next(&mut self) -> Option<Event> {
        loop {
            let item = self.events.next()?;
            if let Some(event) = Event::decode(&item) {
                return Some(event);
            }
        }
    }

    fn demoted(&mut self, key: &Key, started: bool) {
        let Some(cookie) = self.closed(key) else {
            return;
        };
        let _ = self.targets.remove(key); // taken out already
        if started {
            self.remember(key, cookie);
        } else {
            let _ = self.senders.remove(key);
        }
    }

    /// Cookie of the socket of this key if it is one that nothing new is redirected to. Otherwise
    /// it is gone, and maybe another has its addresses already.
    fn closed(&self, key: &Key) -> Option<u64> {
        let end = self.ends.get(key, 0).ok()?;
        layout::end_is_closed(&end).then(|| layout::end_cookie(&end))
    }

    fn drained(&mut self, key: &Key, when_ns: u64) {
        let cookie = self.closed(key);
        match self.no_targets_since.get(key) {
            Some(known) if cookie == Some(known.cookie) => {
                if when_ns > known.since + IN_FLIGHT_NS {
                    self.no_targets_since.remove(key);
                    let _ = self.senders.remove(key); // closed this very moment
                }
            }
            // Its first event was lost, or was an earlier process's.
            _ => self.demoted(key, true),
        }
    }

    fn remember(&mut self, key: &Key, cookie: u64) {
        if self.no_targets_since.len() >= REMEMBERED_MAX {
            self.no_targets_since.clear();
        }
        let since = now_ns();
        self.no_targets_since
            .insert(*key, NoTarget { cookie, since });
    }
}

fn now_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(u64::MAX, |now| {
        let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
        seconds * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or(0)
    })
}
