//! Follows a configuration file.
//!
//! Polling notices every way files are replaced (rewritten in place, renamed over, symbolic
//! link switched as Kubernetes does for config maps) on every file system. A change is read
//! once the file has been still for one interval, so that one being written is not read half.
//! A file that is wrong, or gone, is reported once in one line; the last good configuration
//! stays in use.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::local::{LoadError, LocalConfig};
use crate::publisher::SnapshotPublisher;

/// Time between two looks at the file.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// Most doubts about one configuration that are logged.
const WARNINGS_MAX: usize = 20;

/// Follows one file for one [`SnapshotPublisher`].
#[derive(Debug)]
pub struct Watcher {
    path: PathBuf,
    publisher: SnapshotPublisher,
    interval: Duration,
    /// The file as last read, or found missing.
    read: Option<Stamp>,
    /// The file at the last look.
    seen: Option<Stamp>,
}

/// What tells one state of a file from another.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Stamp {
    device: u64,
    inode: u64,
    len: u64,
    modified_ns: i128,
    changed_ns: i128,
}

/// Loads a local configuration and publishes it. For a file, also returns what follows its
/// changes: spawn [`Watcher::run`].
///
/// # Errors
/// The configuration cannot be used; see [`LoadError`].
pub fn open(config: &LocalConfig) -> Result<(SnapshotPublisher, Option<Watcher>), LoadError> {
    // Stamped before it is read: a change in between is noticed later.
    let stamp = match config {
        LocalConfig::File(path) => stamp(path).ok(),
        LocalConfig::Inline(_) => None,
    };
    let publisher = SnapshotPublisher::new(config.load()?);
    log_loaded(&publisher);
    let watcher = match config {
        LocalConfig::File(path) => Some(Watcher {
            path: path.clone(),
            publisher: publisher.clone(),
            interval: INTERVAL,
            read: stamp,
            seen: stamp,
        }),
        LocalConfig::Inline(_) => None,
    };
    Ok((publisher, watcher))
}

impl Watcher {
    /// Looks this often instead of every [`INTERVAL`].
    #[must_use]
    pub fn with_interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// Follows the file for ever. Reading and parsing happen on tokio's blocking threads.
    pub async fn run(mut self) {
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.publisher.reclaim();
            if self.changed() {
                let config = LocalConfig::File(self.path.clone());
                let loaded = tokio::task::spawn_blocking(move || config.load()).await;
                self.take(loaded.unwrap_or_else(|error| {
                    let path = self.path.display().to_string();
                    Err(LoadError::Read {
                        path,
                        source: io::Error::other(error),
                    })
                }));
            }
        }
    }

    /// Whether the file differs from what was read last, and has been still since the last
    /// look.
    fn changed(&mut self) -> bool {
        let now = stamp(&self.path).ok();
        let still = now == self.seen;
        self.seen = now;
        if !still || now == self.read {
            return false;
        }
        self.read = now;
        true
    }

    fn take(&self, loaded: Result<mesh::Snapshot, LoadError>) {
        match loaded {
            Ok(snapshot) => {
                self.publisher.publish(snapshot);
                log_loaded(&self.publisher);
            }
            Err(error) => {
                tracing::warn!("{error}; the last good configuration stays in use");
                self.publisher.refuse(&error);
            }
        }
    }
}

fn log_loaded(publisher: &SnapshotPublisher) {
    let snapshot = publisher.snapshot();
    tracing::info!(
        generation = publisher.status().generation,
        workloads = snapshot.workloads().len(),
        services = snapshot.services().len(),
        policies = snapshot.policies().len(),
        "mesh configuration loaded"
    );
    for warning in snapshot.warnings().iter().take(WARNINGS_MAX) {
        tracing::warn!("mesh configuration: {warning}");
    }
    if let Some(more) = snapshot
        .warnings()
        .len()
        .checked_sub(WARNINGS_MAX)
        .filter(|n| *n > 0)
    {
        tracing::warn!("mesh configuration: {more} further warnings");
    }
}

fn stamp(path: &Path) -> io::Result<Stamp> {
    let metadata = fs::metadata(path)?;
    let ns = |seconds: i64, nanoseconds: i64| {
        i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds)
    };
    Ok(Stamp {
        device: metadata.dev(),
        inode: metadata.ino(),
        len: metadata.len(),
        modified_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
        changed_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
    })
}
