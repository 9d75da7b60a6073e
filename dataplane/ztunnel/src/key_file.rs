//! Who may read or change the file with the CA's private key.
//!
//! Whoever can change it decides whom the mesh believes: refused. Whoever can read it can be
//! anybody in the mesh: told, not refused, since that is how Kubernetes mounts secrets by default
//! (0644, in a container whose only user is ztunnel's).

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Others can change the key.
#[derive(Debug, thiserror::Error)]
#[error(
    "LOCAL_CA_KEY {}: others than its owner can write it (mode {mode:04o}), and so replace the \
     mesh's CA: take that permission away (chmod go-w)", path.display()
)]
pub(crate) struct KeyFileError {
    path: PathBuf,
    mode: u32,
}

/// Looks at the file that `path` leads to. Returns what its owner should know. A file that cannot
/// be looked at is for who reads it to complain of.
pub(crate) fn check(path: &Path) -> Result<Option<String>, KeyFileError> {
    let Ok(metadata) = fs::metadata(path) else {
        return Ok(None);
    };
    let mode = metadata.mode() & 0o7777;
    if mode & 0o022 != 0 {
        let path = path.to_owned();
        return Err(KeyFileError { path, mode });
    }
    let shown = path.display();
    let (owner, own) = (metadata.uid(), nix::unistd::geteuid().as_raw());
    if owner != 0 && owner != own {
        return Ok(Some(format!(
            "LOCAL_CA_KEY {shown} belongs to user {owner}, who can replace the mesh's CA"
        )));
    }
    Ok((mode & 0o044 != 0).then(|| {
        format!(
            "LOCAL_CA_KEY {shown} can be read by others than its owner (mode {mode:04o}): whoever \
             does can be any workload of the mesh (chmod go-r)"
        )
    }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn a_key_that_others_can_change_is_refused_and_one_they_can_read_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("key"), dir.path().join("link"));
        fs::write(&file, "").unwrap();
        symlink(&file, &link).unwrap();
        for path in [&file, &link] {
            let with_mode = |mode: u32| {
                fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
                check(path)
            };
            for mode in [0o600, 0o400, 0o700] {
                assert_eq!(with_mode(mode).unwrap(), None, "{mode:o}");
            }
            for mode in [0o640, 0o604, 0o644, 0o440] {
                let told = with_mode(mode).unwrap().unwrap();
                assert!(told.contains(&format!("{mode:04o}")), "{told}");
            }
            for mode in [0o620, 0o602, 0o666, 0o777] {
                let error = with_mode(mode).unwrap_err().to_string();
                assert!(error.contains(&format!("{mode:04o}")), "{error}");
                assert!(
                    error.contains("LOCAL_CA_KEY") && !error.contains('\n'),
                    "{error}"
                );
            }
        }
        assert_eq!(check(&dir.path().join("none")).unwrap(), None);
    }
}
