//! Whether a file can be believed: nobody but root, or who runs this, can change it or put another
//! in its place.
//!
//! The journal says what is run as root to take changes back. Whoever could write it, or any
//! directory on the way to it, would be root.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::error::{Error, Result};

/// Bits of a mode: writable by the group or by others; only owners may remove what is theirs.
const OTHERS_WRITE: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// Refuses a path that others than root and the caller's user can change, at any of its components,
/// those that symbolic links lead to included. What does not exist is fine, as far as it goes.
///
/// # Errors
/// [`Error::Untrusted`] names the component and what is wrong with it; [`Error::File`] if it
/// cannot be looked at.
pub fn check_trusted(path: &Path) -> Result<()> {
    check_components(path, path)?;
    for existing in path.ancestors() {
        match fs::canonicalize(existing) {
            Ok(resolved) => {
                let place = if existing == path { &*resolved } else { path };
                return check_components(&resolved, place);
            }
            // Not made yet: what is above it is the way to it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::file("look at", existing, error)),
        }
    }
    Ok(())
}

/// `place` is what counts itself; what else there is is the way to it.
fn check_components(path: &Path, place: &Path) -> Result<()> {
    let mut components: Vec<&Path> = path.ancestors().collect();
    components.reverse();
    for component in components {
        let metadata = match fs::symlink_metadata(component) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::file("look at", component, error)),
        };
        if let Some(reason) = problem(&metadata, component == place) {
            return Err(Error::Untrusted {
                path: component.to_owned(),
                reason,
            });
        }
    }
    Ok(())
}

/// What is wrong with a component, which is the place itself or on the way to it.
fn problem(metadata: &Metadata, is_place: bool) -> Option<String> {
    let own = nix::unistd::geteuid().as_raw();
    let (owner, mode) = (metadata.uid(), metadata.mode());
    if owner != 0 && owner != own {
        return Some(format!("belongs to user {owner}, not to root"));
    }
    // A link's own mode says nothing; in a sticky directory nobody replaces what is root's.
    let is_safe = metadata.file_type().is_symlink() || (mode & STICKY != 0 && !is_place);
    if mode & OTHERS_WRITE != 0 && !is_safe {
        let mode = mode & 0o7777;
        return Some(format!(
            "others than its owner can write it (mode {mode:04o})"
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_others_can_write_is_refused_at_every_component() {
        let dir = tempfile::tempdir().unwrap();
        let parent = dir.path().join("parent");
        let state = parent.join("state");
        let file = state.join("redirection.json");
        fs::create_dir_all(&state).unwrap();
        fs::write(&file, "").unwrap();
        for path in [&parent, &state] {
            set_mode(path, 0o755);
        }
        set_mode(&file, 0o600);
        check_trusted(&file).unwrap();
        check_trusted(&state.join("not/yet/there")).unwrap();
        for (path, sound) in [(&parent, 0o755), (&state, 0o700), (&file, 0o644)] {
            for mode in [0o777, 0o770, 0o722, 0o702] {
                set_mode(path, mode);
                let error = check_trusted(&file).unwrap_err().to_string();
                let named = format!("{}: others", path.display());
                assert!(error.contains(&named), "{mode:o}: {error}");
                assert!(error.contains(&format!("{mode:04o}")), "{error}");
            }
            set_mode(path, sound);
        }
        // As /tmp is: a way, and no place to be.
        set_mode(&parent, 0o1777);
        check_trusted(&file).unwrap();
        check_trusted(&parent).unwrap_err();
    }

    #[test]
    fn a_link_is_as_good_as_what_it_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        fs::create_dir(&target).unwrap();
        set_mode(&target, 0o700);
        symlink(&target, &link).unwrap();
        check_trusted(&link.join("x")).unwrap();
        check_trusted(&link).unwrap();
        set_mode(&target, 0o777);
        check_trusted(&link.join("x")).unwrap_err();
        check_trusted(&link).unwrap_err();
    }

    #[test]
    fn anothers_directory_is_refused() {
        if !nix::unistd::geteuid().is_root() {
            return; // nothing can be given away
        }
        let dir = tempfile::tempdir().unwrap();
        let (state, link) = (dir.path().join("state"), dir.path().join("link"));
        fs::create_dir(&state).unwrap();
        chown(&state, Some(65534), None).unwrap();
        let error = check_trusted(&state).unwrap_err().to_string();
        assert!(error.contains("user 65534"), "{error}");
        symlink("/", &link).unwrap();
        std::os::unix::fs::lchown(&link, Some(65534), None).unwrap();
        check_trusted(&link).unwrap_err();
    }
}
