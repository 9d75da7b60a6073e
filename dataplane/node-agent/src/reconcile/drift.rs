//! What others have removed: what the node's inventory had after the last change and has no more.

use std::collections::{BTreeMap, BTreeSet};

/// Lines of an inventory, see [`redirect::Redirection::inventory`].
pub(crate) type Inventory = BTreeSet<String>;

/// Repairs after which something that does not come back is given up: it is not ours any more, or
/// there is nothing left that could have it.
const REPAIRS_MAX: u32 = 2;

/// What there should be.
#[derive(Debug, Default)]
pub(crate) struct Drift {
    expected: Inventory,
    /// How often something that is missing has been repaired in vain.
    repairs: BTreeMap<String, u32>,
}

impl Drift {
    /// What there should be, if nothing has changed.
    pub(crate) fn expected(&self) -> Inventory {
        self.expected.clone()
    }

    /// What is missing from `now`.
    pub(crate) fn missing(&mut self, now: &Inventory) -> Inventory {
        let missing: Inventory = self.expected.difference(now).cloned().collect();
        self.repairs.retain(|line, _| missing.contains(line));
        missing
    }

    /// What is missing is about to be repaired.
    pub(crate) fn repairs(&mut self, missing: &Inventory) {
        for line in missing {
            *self.repairs.entry(line.clone()).or_default() += 1;
        }
    }

    /// Something has been applied, and `now` is there. So should be what is `kept`: what others
    /// removed before, or meanwhile, is missing from this inventory, too.
    pub(crate) fn applied(&mut self, now: Inventory, kept: Inventory) {
        self.expected = now;
        let repairs = |line: &String| self.repairs.get(line).copied().unwrap_or(0);
        let kept = kept.into_iter();
        self.expected
            .extend(kept.filter(|line| repairs(line) < REPAIRS_MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> Inventory {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// A repair after which `after` is there.
    fn repair(drift: &mut Drift, missing: &Inventory, after: &[&str]) {
        drift.repairs(missing);
        drift.applied(set(after), drift.expected());
    }

    #[test]
    fn what_is_removed_is_missed_until_it_is_back() {
        let mut drift = Drift::default();
        drift.applied(set(&["a", "b"]), set(&[]));
        assert_eq!(drift.missing(&set(&["a", "b", "other"])), set(&[]));
        assert_eq!(drift.missing(&set(&["a"])), set(&["b"]));
        // Removed again while it is repaired: the new inventory does not have it.
        repair(&mut drift, &set(&["b"]), &["a"]);
        assert_eq!(drift.missing(&set(&["a"])), set(&["b"]));
        repair(&mut drift, &set(&["b"]), &["a", "b"]);
        assert_eq!(drift.missing(&set(&["a", "b"])), set(&[]));
        assert_eq!(drift.missing(&set(&["b"])), set(&["a"]), "later, too");
    }

    #[test]
    fn what_two_repairs_do_not_bring_back_is_given_up() {
        let mut drift = Drift::default();
        drift.applied(set(&["a", "b"]), set(&[]));
        for _ in 0..2 {
            let missing = drift.missing(&set(&["a"]));
            assert_eq!(missing, set(&["b"]));
            repair(&mut drift, &missing, &["a"]);
        }
        assert_eq!(drift.missing(&set(&["a"])), set(&[]));
    }

    #[test]
    fn a_change_does_not_forget_what_was_missing_before_it() {
        let mut drift = Drift::default();
        drift.applied(set(&["a", "b", "old"]), set(&[]));
        let missing = drift.missing(&set(&["a", "old"]));
        drift.applied(set(&["a", "new"]), missing);
        assert_eq!(drift.missing(&set(&["a", "new"])), set(&["b"]), "not `old`");
    }
}
