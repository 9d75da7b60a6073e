//! ztunnel's side of the sockmap: which of its sockets may take it, and which are plain TCP
//! sockets.
//!
//! A mark on a socket says that its owner knows what a socket in a sockmap is like. The programs
//! enter no other socket of ztunnel, so that one that does not ask for the sockmap cannot be
//! harmed by it. They note on the mark where they entered a socket, so that its owner can look
//! whether it still is there. A socket that has left does not come back: splice(2) may be used on
//! it, which neither sees what was redirected nor passes by the programs.

use std::fs;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::maps::{MapData, MapError, SkStorage};

use super::layout::{self, MARK_BYTES};
use super::{DIRECTORY, Senders};
use crate::error::{Error, Result};

/// Maps that were replaced by others while their sockets may live on.
const MAPS_MAX: usize = 16;

/// The sockets of one ztunnel. Shared by its threads.
#[derive(Debug)]
pub struct Sockets {
    pins: PathBuf,
    /// All that sockets have been marked in, the newest last.
    maps: Mutex<Vec<Maps>>,
}

struct Maps {
    /// Device and inode of the marks' pin.
    pin: (u64, u64),
    marks: SkStorage<MapData, [u8; MARK_BYTES]>,
    senders: Senders,
    senders_id: u32,
}

impl std::fmt::Debug for Maps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Maps")
            .field("pin", &self.pin)
            .field("senders_id", &self.senders_id)
            .finish_non_exhaustive()
    }
}

impl Sockets {
    /// For the sockmap of the node agent that pins its listener map at `listener_map`. Opens
    /// nothing yet: see [`Sockets::follow`].
    #[must_use]
    pub fn new(listener_map: &Path) -> Self {
        let directory = listener_map.parent().unwrap_or_else(|| Path::new("/"));
        Self {
            pins: directory.join(DIRECTORY),
            maps: Mutex::default(),
        }
    }

    /// Marks `listeners` if there is a sockmap now and they are not marked for it yet: what they
    /// accept from then on may take it. Returns whether it has; to be called now and then.
    ///
    /// # Errors
    /// If maps cannot be opened or written. Nothing new uses the sockmap then.
    pub fn follow<'a>(&self, listeners: impl IntoIterator<Item = BorrowedFd<'a>>) -> Result<bool> {
        let pin = fs::metadata(self.pins.join(layout::MARKS)).map(|pin| (pin.dev(), pin.ino()));
        // An agent may be about to pin them.
        let (Ok(pin), true) = (pin, self.pins.join(layout::SENDERS).exists()) else {
            return Ok(false);
        };
        let mut all = self.maps();
        if all.last().is_some_and(|maps| maps.pin == pin) {
            return Ok(false);
        }
        if all.len() >= MAPS_MAX {
            return Err(Error::Bpf {
                action: "open map",
                name: layout::MARKS.to_owned(),
                reason: format!("was replaced {MAPS_MAX} times: restart to use sockmap"),
            });
        }
        let mut maps = Maps::open(&self.pins, pin)?;
        for listener in listeners {
            maps.mark(listener)?;
        }
        all.push(maps);
        Ok(true)
    }

    /// Lets `socket`, which is not connected yet, use the sockmap, if there is one.
    ///
    /// # Errors
    /// If it cannot be marked: it uses TCP then.
    pub fn mark(&self, socket: BorrowedFd<'_>) -> Result<()> {
        match self.maps().last_mut() {
            Some(maps) => maps.mark(socket),
            None => Ok(()),
        }
    }

    /// Whether `socket`, which is connected, is a plain TCP socket and stays one.
    #[must_use]
    pub fn is_plain(&self, socket: BorrowedFd<'_>) -> bool {
        self.maps().iter().all(|maps| maps.is_plain(socket))
    }

    fn maps(&self) -> MutexGuard<'_, Vec<Maps>> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Maps {
    fn open(pins: &Path, pin: (u64, u64)) -> Result<Self> {
        let failed = |e: MapError| Error::bpf("use map", layout::SENDERS, &e);
        let senders = super::map_data(pins, layout::SENDERS)?;
        let senders_id = senders.info().map_err(failed)?.id();
        Ok(Self {
            pin,
            marks: super::open(pins, layout::MARKS)?,
            senders: super::senders(senders)?,
            senders_id,
        })
    }

    fn mark(&mut self, socket: BorrowedFd<'_>) -> Result<()> {
        self.marks
            .insert(&socket.as_raw_fd(), [0; MARK_BYTES], 0)
            .map_err(crate::system::pins::write_failed(layout::MARKS))
    }

    /// What cannot be told is not.
    fn is_plain(&self, socket: BorrowedFd<'_>) -> bool {
        let entered = match self.marks.get(&socket.as_raw_fd(), 0) {
            Ok(mark) => layout::entered(&mark),
            Err(error) => return is_missing(&error),
        };
        match entered {
            None => true,
            Some((id, key)) if id == self.senders_id => self
                .senders
                .get(&key, 0)
                .is_err_and(|error| is_missing(&error)),
            Some(_) => false,
        }
    }
}

fn is_missing(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(e) => e.io_error.raw_os_error() == Some(libc::ENOENT),
        _ => false,
    }
}
