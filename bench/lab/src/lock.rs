//! One lab command at a time per lab name.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::error::{Error, Result};

/// Directory of everything the lab keeps on disk.
pub(crate) const ROOT: &str = "/run/zt-lab";

/// Exclusive hold on a lab name, until dropped. The kernel releases it when the process dies.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    file: File,
}

impl Lock {
    /// Waits until no other process works on the lab `name`.
    pub(crate) fn acquire(name: &str) -> Result<Self> {
        let path = Path::new(ROOT).join(format!("{name}.lock"));
        loop {
            fs::create_dir_all(ROOT).map_err(Error::io("creating", ROOT))?;
            let opened = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path);
            let file = match opened {
                Ok(file) => file,
                // The directory went away between the two calls: another lab was just removed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("opening", path)(error)),
            };
            file.lock().map_err(Error::io("locking", &path))?;
            // Whoever held the lock before may have removed the file.
            let held = file.metadata().map_err(Error::io("reading", &path))?.ino();
            if fs::metadata(&path).is_ok_and(|current| current.ino() == held) {
                return Ok(Self { path, file });
            }
        }
    }

    /// Makes a child process hold the lock too, as its standard output: when this process is killed
    /// the next one waits until the child is through with what it was told to do.
    pub(crate) fn held_by_child(&self) -> Result<Stdio> {
        self.file
            .try_clone()
            .map(Stdio::from)
            .map_err(Error::io("duplicating", &self.path))
    }

    /// Releases the lock and removes its file, and the lab directory if this was the last lab.
    pub(crate) fn remove(self) {
        // Both may fail only because another lab is there, which is fine.
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_dir(ROOT);
    }
}
