//! Bringing the node to the pods that the configuration lists: those that run are captured, the
//! others cut off, and nobody waits for anybody else.

use std::collections::{BTreeSet, HashMap};

use redirect::{Pod, Redirection, Uncaptured, Why};

use crate::config::Config;
use crate::error::Result;
use crate::selection::Selection;

/// Applies the list; with `all`, pods that are captured already are brought up to date, too.
/// Returns whether a pod failed that could be captured at another time.
///
/// What is not captured is noted for `status` and logged when it changes.
///
/// # Errors
/// The first thing that concerns more than one pod; everything else is done all the same.
pub(crate) fn apply(redirection: &mut dyn Redirection, config: &Config, all: bool) -> Result<bool> {
    let mut selection = Selection::of(&config.settings(), &config.pods);
    let mut problems = Vec::new();
    // Before anything is taken away from these pods, so that there is no moment in between.
    let to_cut = selection.interfaces_to_cut();
    let to_cut: Vec<String> = to_cut.into_iter().map(str::to_owned).collect();
    let names: Vec<&str> = to_cut.iter().map(String::as_str).collect();
    match redirection.cut_off(&names) {
        Ok(failures) => {
            for (interface, error) in failures {
                not_cut_off(&mut selection.refused, &interface, &error.to_string());
            }
        }
        Err(error) => problems.push(error),
    }
    let gone = gone(redirection, &selection.pods);
    let gone: Vec<&str> = gone.iter().map(String::as_str).collect();
    problems.extend(redirection.remove_pods(&gone).err());
    let wanted = wanted(redirection, &selection.pods, all);
    match redirection.try_pods(&wanted) {
        Ok(failures) => selection
            .refused
            .extend(failures.into_iter().map(|failure| {
                let pod = wanted.iter().find(|pod| pod.uid == failure.uid);
                Uncaptured {
                    uid: failure.uid,
                    host_interface: pod.map(|pod| pod.host_interface.clone()),
                    why: Why::Failed,
                    reason: failure.error.to_string(),
                    cut_off: failure.cut_off,
                }
            })),
        Err(error) => problems.push(error),
    }
    let failed = cut_off_failed(redirection, &mut selection, &mut problems);
    let_others_go(redirection, &selection, &mut problems);
    for refused in &mut selection.refused {
        let interfaces = redirection.interfaces_cut_off();
        let own = refused.host_interface.as_ref();
        refused.cut_off = own.is_some_and(|interface| interfaces.contains(interface));
    }
    selection.refused.sort();
    tell(redirection.uncaptured(), &selection.refused);
    problems.extend(redirection.note_uncaptured(selection.refused).err());
    match problems.into_iter().next() {
        Some(error) => Err(error.into()),
        None => Ok(failed),
    }
}

/// UIDs of captured pods that are not to be.
fn gone(redirection: &dyn Redirection, pods: &[Pod]) -> Vec<String> {
    let wanted: BTreeSet<_> = pods.iter().map(|pod| pod.uid.as_str()).collect();
    let enrolled = redirection.enrolled().into_iter();
    enrolled
        .map(|pod| pod.uid)
        .filter(|uid| !wanted.contains(uid.as_str()))
        .collect()
}

fn wanted(redirection: &dyn Redirection, pods: &[Pod], all: bool) -> Vec<Pod> {
    let enrolled = redirection.enrolled();
    let known: HashMap<_, _> = enrolled.iter().map(|pod| (&pod.uid, pod)).collect();
    let is_new = |pod: &&Pod| known.get(&pod.uid).is_none_or(|known| *known != *pod);
    pods.iter()
        .filter(|pod| all || is_new(pod))
        .cloned()
        .collect()
}

/// Pods that a back end refuses before it does anything are not cut off by it.
fn cut_off_failed(
    redirection: &mut dyn Redirection,
    selection: &mut Selection,
    problems: &mut Vec<redirect::Error>,
) -> bool {
    let enrolled = redirection.enrolled();
    let is_captured = |uid: &str| enrolled.iter().any(|pod| pod.uid == uid);
    let failed = selection.refused.iter();
    let failed = failed.filter(|refused| refused.why == Why::Failed);
    let open: Vec<String> = failed
        .clone()
        .filter(|refused| !refused.cut_off && !is_captured(&refused.uid))
        .filter_map(|refused| refused.host_interface.clone())
        .filter(|name| redirect::interface_index(name).is_ok())
        .collect();
    let any = failed.count() > 0;
    let names: Vec<&str> = open.iter().map(String::as_str).collect();
    match redirection.cut_off(&names) {
        Ok(failures) => {
            for (interface, error) in failures {
                not_cut_off(&mut selection.refused, &interface, &error.to_string());
            }
        }
        Err(error) => problems.push(error),
    }
    any
}

/// Ends the cutting off of interfaces whose pods are no longer listed.
fn let_others_go(
    redirection: &mut dyn Redirection,
    selection: &Selection,
    problems: &mut Vec<redirect::Error>,
) {
    let refused = selection.refused.iter();
    let wanted: BTreeSet<_> = refused
        .filter_map(|refused| refused.host_interface.as_deref())
        .collect();
    let cut_off = redirection.interfaces_cut_off();
    let others: Vec<&str> = cut_off
        .iter()
        .map(String::as_str)
        .filter(|name| !wanted.contains(name) || redirect::interface_index(name).is_err())
        .collect();
    if !others.is_empty() {
        problems.extend(redirection.let_go(&others).err());
    }
}

fn not_cut_off(refused: &mut [Uncaptured], interface: &str, error: &str) {
    for pod in refused {
        if pod.host_interface.as_deref() == Some(interface) {
            pod.reason = format!("{}; {error}", pod.reason);
        }
    }
}

/// Most lines about pods that are not captured, each time something changes.
const LINES_MAX: usize = 50;

/// Logs what is new.
fn tell(before: &[Uncaptured], now: &[Uncaptured]) {
    let new: Vec<_> = now.iter().filter(|pod| !before.contains(pod)).collect();
    for pod in new.iter().take(LINES_MAX) {
        let interface = pod.host_interface.as_deref().unwrap_or("none");
        let (uid, reason, cut_off) = (&pod.uid, &pod.reason, pod.cut_off);
        match pod.why {
            Why::Ended | Why::Absent => {
                tracing::info!(uid, interface, cut_off, "pod not captured: {reason}");
            }
            Why::Invalid | Why::Conflict | Why::Failed => {
                tracing::error!(uid, interface, cut_off, "pod not captured: {reason}");
            }
        }
    }
    if new.len() > LINES_MAX {
        let others = new.len() - LINES_MAX;
        tracing::error!(others, "more pods are not captured: see node-agent status");
    }
    let left = before
        .iter()
        .filter(|pod| now.iter().all(|other| other.uid != pod.uid));
    for pod in left {
        tracing::info!(uid = pod.uid, "pod captured, or no longer listed");
    }
}
