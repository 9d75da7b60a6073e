//! What an attack is, and the list of all of them.

use std::fmt;
use std::io;

use super::arena::Arena;
use super::families;

/// One attack: what is done, what it must not get, what bounds it.
pub(super) struct Attack {
    /// Unique; lower case words joined by `-`.
    pub(super) name: String,
    /// Attacks of a kind.
    pub(super) family: &'static str,
    /// What the attacker must not get.
    pub(super) must_not: String,
    /// What it may cost at most.
    pub(super) bounds: Bounds,
    /// Takes long: not part of the quick set.
    pub(super) long: bool,
    /// Measured by itself; others run side by side and share their figures.
    pub(super) alone: bool,
    pub(super) run: Run,
}

/// Does it.
pub(super) type Run = Box<dyn Fn(&Arena) -> Finding + Send + Sync>;

/// What happened, in a few words, or what went wrong.
pub(super) type Finding = Result<String, Failure>;

/// Why an attack counts as not held off.
#[derive(Debug)]
pub(super) enum Failure {
    /// It got what it must not get.
    Got(String),
    /// It took longer than it may. A machine may be slow for a moment, so it is tried again.
    Took(String),
    /// It cannot be tried here.
    Skipped(String),
    /// The driver could not do its part.
    Driver(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Driver(error.to_string())
    }
}

impl From<crate::error::Error> for Failure {
    fn from(error: crate::error::Error) -> Self {
        Self::Driver(error.to_string())
    }
}

/// The attacker got this.
pub(super) fn got<T>(what: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Got(what.into()))
}

/// The attack had this of others' time.
pub(super) fn took<T>(what: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Took(what.into()))
}

/// What an attack may cost. Bytes and counts are absolute, times are compared with what else was
/// measured in the same run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Descriptors that both ztunnels may have more while it lasts.
    pub(super) descriptors: u64,
    /// Bytes of memory that both may have grown by, at most, while it lasts.
    pub(super) memory: u64,
    /// Bytes of log.
    pub(super) log: u64,
    /// How many times longer nine in ten honest requests may take than before, or than between two
    /// pods outside the mesh at the same time, whichever is more.
    pub(super) slower: Option<u64>,
    /// Honest connections may fail: new ones, where the attack is one on getting in at all and the
    /// attack itself looks at those that must.
    pub(super) honest_may_fail: bool,
}

impl Bounds {
    /// Of what is refused at once.
    pub(super) const SMALL: Self = Self {
        descriptors: 256,
        memory: 64 << 20,
        log: 256 << 10,
        slower: Some(50),
        honest_may_fail: false,
    };
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "+{} descriptors, +{} MiB, {} KiB of log",
            self.descriptors,
            self.memory >> 20,
            self.log >> 10
        )?;
        if !self.honest_may_fail {
            f.write_str(", no honest failure")?;
        }
        match self.slower {
            Some(times) => write!(f, ", honest p90 x{times}"),
            None => Ok(()),
        }
    }
}

/// All attacks, in the order in which they are run.
pub(super) fn all() -> Vec<Attack> {
    families::all()
}

/// What all attacks that run side by side cost together.
pub(super) fn side_by_side() -> Attack {
    Attack {
        name: SIDE_BY_SIDE.to_owned(),
        family: "all",
        must_not: "descriptors, memory or log, or time of the honest".to_owned(),
        bounds: Bounds {
            descriptors: 1024,
            memory: 256 << 20,
            log: 1 << 20,
            ..Bounds::SMALL
        },
        long: false,
        alone: false,
        run: Box::new(|_| Ok(String::new())),
    }
}

/// Name of the line with those costs.
const SIDE_BY_SIDE: &str = "side-by-side";

/// Attacks that succeed today, each with what is missing. The test of the quick set compares this
/// list with what it finds, both ways.
pub const KNOWN_TO_SUCCEED: &[(&str, &str)] = &[];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_unique_and_can_be_typed() {
        let all = all();
        let names: HashSet<_> = all.iter().map(|attack| attack.name.as_str()).collect();
        assert_eq!(names.len(), all.len());
        assert!(all.len() > 80, "only {} attacks", all.len());
        for attack in &all {
            let fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(attack.name.chars().all(fine), "{}", attack.name);
            assert!(!["all", "list"].contains(&attack.name.as_str()));
            assert!(!attack.must_not.is_empty());
        }
        for (name, _) in KNOWN_TO_SUCCEED {
            assert!(names.contains(name), "{name} is no attack");
        }
        let document = include_str!("../../../../docs/security.md");
        for name in document.split("`attack: ").skip(1) {
            let name = name.split('`').next().unwrap();
            assert!(
                names.contains(name),
                "docs/security.md: {name} is no attack"
            );
        }
    }
}
