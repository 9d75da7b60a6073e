//! The crate's error: one line that says what failed, on what, and what to do about it.

use std::io;
use std::path::PathBuf;

use crate::back_end::Redirect;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why redirection could not be installed, changed, read or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting is out of its range or contradicts another.
    #[error("{field} {value:?}: {reason}")]
    Setting {
        /// Path of the setting in the configuration.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        reason: String,
    },
    /// A command failed.
    #[error("{command}: {outcome}")]
    Command {
        /// The command line.
        command: String,
        /// Exit status and standard error, or why it did not start, on one line.
        outcome: String,
    },
    /// A file, directory or /proc entry could not be used.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A network namespace could not be entered.
    #[error("network namespace {}: {source}: does it exist, and is CAP_SYS_ADMIN there?",
            path.display())]
    Netns {
        /// Path of the namespace.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// No such interface.
    #[error("interface {name} not found in {place}: {source}")]
    Interface {
        /// Its name.
        name: String,
        /// "the node" or the path of a network namespace.
        place: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// An operation on a BPF program, map or link failed.
    #[error("cannot {action} {name}: {reason}")]
    Bpf {
        /// What was attempted.
        action: &'static str,
        /// Program, map or pin.
        name: String,
        /// The kernel's reason on one line.
        reason: String,
    },
    /// The directory for pins is not on a BPF file system.
    #[error("{} is not on a BPF file system: mount one there (mount -t bpf bpf DIR)",
            path.display())]
    NotBpffs {
        /// The directory.
        path: PathBuf,
    },
    /// A pinned map was made by another version of the programs.
    #[error("pinned map {} has {found} where {expected} is needed: made by another version; \
             run node-agent cleanup with that version first", path.display())]
    Layout {
        /// The pin.
        path: PathBuf,
        /// Key size, value size and entries it has.
        found: String,
        /// Those needed.
        expected: String,
    },
    /// The process is not in the network namespace that it is meant for.
    #[error("node.netns {}: this process is in another network namespace: start it in that one \
             (nsenter --net={} ...)", path.display(), path.display())]
    WrongNetns {
        /// The one it is meant for.
        path: PathBuf,
    },
    /// Others than root can change what is done as root.
    #[error("{}: {reason}: what is in there is run as root; give it to root and take the others' \
             write permission away, or choose another state_dir", path.display())]
    Untrusted {
        /// The component of the path.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// What is pinned under one of our names is not ours.
    #[error("{} is not of this redirection: bpffs needs a directory that no other tool uses",
            path.display())]
    Foreign {
        /// The pin.
        path: PathBuf,
    },
    /// The journal cannot be understood.
    #[error("journal {} is damaged ({reason}): remove what is left by hand, then the file",
            path.display())]
    Journal {
        /// The journal's file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// Another back end's redirection is installed.
    #[error("{} belongs to redirection \"{installed}\": run node-agent cleanup before \"{wanted}\"",
            path.display())]
    OtherBackEnd {
        /// The journal's file.
        path: PathBuf,
        /// What is installed.
        installed: Redirect,
        /// What was asked for.
        wanted: Redirect,
    },
    /// The process may not do what redirection needs.
    #[error("{missing} missing: run as root or with these capabilities")]
    Privileges {
        /// Names of the capabilities, comma separated.
        missing: String,
    },
}

impl Error {
    pub(crate) fn bpf(
        action: &'static str,
        name: impl Into<String>,
        error: &(dyn std::error::Error + 'static),
    ) -> Self {
        Self::Bpf {
            action,
            name: name.into(),
            reason: one_line(error),
        }
    }

    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::File {
            action,
            path: path.into(),
            source,
        }
    }
}

/// Longest reason kept: a verifier log has thousands of lines, and its end is what matters. Before
/// it stands what the kernel answered.
const REASON_CHARS_MAX: usize = 400;
const REASON_HEAD_CHARS: usize = 100;

/// An error with its sources on one line, each source once.
fn one_line(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        source = inner.source();
    }
    join_lines(&text)
}

/// Replaces line breaks and keeps both ends of what is too long, more of the last.
pub(crate) fn join_lines(text: &str) -> String {
    let joined: Vec<_> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let joined = joined.join("; ");
    let tail = REASON_CHARS_MAX - REASON_HEAD_CHARS;
    if joined.chars().count() <= REASON_CHARS_MAX {
        return joined;
    }
    let head: String = joined.chars().take(REASON_HEAD_CHARS).collect();
    match joined.char_indices().rev().nth(tail) {
        Some((start, _)) => format!("{head} ... {}", &joined[start..]),
        None => joined,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_one_line_and_keep_their_ends() {
        assert_eq!(join_lines("a\n  b \n\nc\n"), "a; b; c");
        let long = format!("returned EAGAIN{}end", "x".repeat(10_000));
        let short = join_lines(&long);
        assert!(short.len() < 500 && short.starts_with("returned EAGAINx"));
        assert!(short.contains(" ... ") && short.ends_with("end"));
        assert!(join_lines(&"é".repeat(1000)).ends_with('é'));
    }

    #[test]
    fn sources_are_named_once() {
        let inner = io::Error::from_raw_os_error(13);
        let error = Error::file("open", "/x", inner);
        assert_eq!(
            one_line(&error),
            "cannot open /x: Permission denied (os error 13)"
        );
    }
}
