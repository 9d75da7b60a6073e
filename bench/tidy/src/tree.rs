//! Finding the sources.

use std::fs;
use std::io;
use std::path::Path;

use crate::rules::Source;

/// Directories of the workspace that hold sources.
const ROOTS: [&str; 4] = ["bench", "bpf", "dataplane", "loadgen"];

/// All Rust and C sources below `root`, sorted by path.
///
/// # Errors
/// A file or directory cannot be read.
pub fn sources(root: &Path) -> io::Result<Vec<Source>> {
    let mut found = Vec::new();
    for directory in ROOTS {
        walk(root, &root.join(directory), &mut found)?;
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn walk(root: &Path, directory: &Path, found: &mut Vec<Source>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                walk(root, &path, found)?;
            }
        } else if [".rs", ".c", ".h"]
            .iter()
            .any(|ending| name.ends_with(ending))
        {
            let relative = path.strip_prefix(root).unwrap_or(&path);
            let relative = relative.to_string_lossy().into_owned();
            found.push(Source {
                path: relative,
                text: fs::read_to_string(&path)?,
            });
        }
    }
    Ok(())
}
