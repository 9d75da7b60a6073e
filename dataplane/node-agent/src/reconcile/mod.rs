//! From desired state and what the node is to what has to be done. Pure: nothing here looks at the
//! node or changes it.
//!
//! Bringing pods to what is desired takes two steps. [`Plan::new`] says what is to be done, in
//! this order: cut off who is not captured, end the capture of who is not to be, capture. What of
//! that fails is known only then, and [`Rest::after`] says what follows from it. Whom a change
//! does not concern it does not touch, so that his connections, also those older than his capture,
//! stay as they are.

pub(crate) mod drift;
pub(crate) mod retry;
mod selection;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

use redirect::{Pod, Settings, Uncaptured, Why};

use crate::desired::Desired;

/// The node as it is now, as far as it concerns pods.
#[derive(Clone, Debug, Default)]
pub(crate) struct Observed {
    /// Of each network namespace that a pod names and that cannot be entered, why.
    pub(crate) namespaces: HashMap<PathBuf, String>,
    /// Of each interface that a pod names and that is not there, what is said of it.
    pub(crate) interfaces: HashMap<String, String>,
}

/// What to do first.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Interfaces to cut off, before anything is taken away from their pods, so that there is no
    /// moment in between.
    pub(crate) cut_off: Vec<String>,
    /// UIDs of captured pods that are not to be.
    pub(crate) remove: Vec<String>,
    /// Pods to capture, or to bring up to date; no two share a uid, an interface or an address.
    pub(crate) capture: Vec<Pod>,
    /// Who is not captured, and why.
    pub(crate) refused: Vec<Uncaptured>,
}

impl Plan {
    /// What brings the node, where `enrolled` are captured, to what is desired; with `refresh`,
    /// pods that are captured as they should be are brought up to date, too.
    pub(crate) fn new(
        settings: &Settings,
        desired: &Desired,
        enrolled: &[Pod],
        observed: &Observed,
        refresh: bool,
    ) -> Self {
        let selection = selection::select(settings, &desired.pods, observed);
        let wanted: BTreeSet<_> = selection.pods.iter().map(|pod| pod.uid.as_str()).collect();
        let remove = enrolled.iter().map(|pod| &pod.uid);
        let remove = remove.filter(|uid| !wanted.contains(uid.as_str()));
        let remove = remove.cloned().collect();
        let known: HashMap<_, _> = enrolled.iter().map(|pod| (&pod.uid, pod)).collect();
        let is_new = |pod: &Pod| known.get(&pod.uid).is_none_or(|known| *known != pod);
        let cut_off = interfaces_to_cut(&selection, observed);
        let mut capture = selection.pods;
        capture.retain(|pod| refresh || is_new(pod));
        Self {
            cut_off,
            remove,
            capture,
            refused: selection.refused,
        }
    }
}

/// Interfaces of refused pods that are there and that no captured pod has.
fn interfaces_to_cut(selection: &selection::Selection, observed: &Observed) -> Vec<String> {
    let of_pods: BTreeSet<_> = selection
        .pods
        .iter()
        .map(|pod| &pod.host_interface)
        .collect();
    let refused = selection.refused.iter();
    let names: BTreeSet<_> = refused
        .filter_map(|refused| refused.host_interface.as_ref())
        .filter(|name| !of_pods.contains(name) && !observed.interfaces.contains_key(*name))
        .collect();
    names.into_iter().cloned().collect()
}

/// What to do when pods have been captured, as far as that went.
#[derive(Debug, Default, Eq, PartialEq)]
pub(crate) struct Rest {
    /// Interfaces of pods that failed and are neither captured nor cut off: a back end that
    /// refuses a pod before it does anything does not cut it off.
    pub(crate) cut_off: Vec<String>,
    /// Interfaces that are cut off and whose pods are no longer refused, or that are gone.
    pub(crate) let_go: Vec<String>,
    /// Whether a pod failed that could be captured at another time.
    pub(crate) try_again: bool,
}

impl Rest {
    /// `refused` are all that are not captured, `enrolled` those that are; `is_there` says
    /// whether an interface is.
    pub(crate) fn after(
        refused: &[Uncaptured],
        enrolled: &[Pod],
        cut_off: &[String],
        is_there: impl Fn(&str) -> bool,
    ) -> Self {
        let captured: BTreeSet<_> = enrolled.iter().map(|pod| pod.uid.as_str()).collect();
        let failed = refused.iter().filter(|refused| refused.why == Why::Failed);
        let open = failed.clone();
        let open = open.filter(|pod| !pod.cut_off && !captured.contains(pod.uid.as_str()));
        let open = open.filter_map(|pod| pod.host_interface.clone());
        let wanted: BTreeSet<_> = refused
            .iter()
            .filter_map(|refused| refused.host_interface.as_deref())
            .collect();
        let others = cut_off.iter();
        let others = others.filter(|name| !wanted.contains(name.as_str()) || !is_there(name));
        Self {
            cut_off: open.filter(|name| is_there(name)).collect(),
            let_go: others.cloned().collect(),
            try_again: failed.count() > 0,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
