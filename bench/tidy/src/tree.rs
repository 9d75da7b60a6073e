//! Finding the sources.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::Path;

use crate::map::needs;
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

/// The directory of each crate of the workspace by its name, with a slash at the end.
///
/// # Errors
/// A file or directory cannot be read.
pub fn crates(root: &Path) -> io::Result<HashMap<String, String>> {
    let manifest = fs::read_to_string(root.join("Cargo.toml"))?;
    let members = manifest.lines().map(str::trim).filter_map(|line| {
        let member = line.strip_prefix('"')?.strip_suffix("\",")?;
        root.join(member)
            .join("Cargo.toml")
            .exists()
            .then_some(member)
    });
    members
        .map(|member| {
            let manifest = fs::read_to_string(root.join(member).join("Cargo.toml"))?;
            let name = manifest
                .lines()
                .find_map(|line| line.strip_prefix("name = \""));
            let name = name.and_then(|rest| rest.split('"').next());
            Ok((name.unwrap_or(member).to_owned(), format!("{member}/")))
        })
        .collect()
}

/// Which others of `crates`, as [`crates`] tells them, each is built from; those that need none are
/// left out.
///
/// # Errors
/// A manifest cannot be read.
pub fn dependencies(
    root: &Path,
    crates: &HashMap<String, String>,
) -> io::Result<BTreeMap<String, BTreeSet<String>>> {
    let mut all = BTreeMap::new();
    for (name, directory) in crates {
        let manifest = fs::read_to_string(root.join(directory).join("Cargo.toml"))?;
        let needed = needs(&manifest, crates);
        if !needed.is_empty() {
            all.insert(name.clone(), needed);
        }
    }
    Ok(all)
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
