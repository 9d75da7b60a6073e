//! Carrying out what [`crate::reconcile`] says about pods: each is tried, nobody waits for anybody
//! else, and what is not captured is noted and told.

use redirect::{Failure, Redirection, Uncaptured, Why};

use crate::error::Result;
use crate::node::Node;
use crate::reconcile::{Plan, Rest};
use crate::source::Wanted;

/// Brings pods to what is wanted; with `refresh`, those that are captured already are brought up
/// to date, too. Returns whether a pod failed that could be captured at another time.
///
/// # Errors
/// The first thing that concerns more than one pod; everything else is done all the same.
pub(crate) fn apply(
    redirection: &mut dyn Redirection,
    node: &impl Node,
    wanted: &Wanted,
    refresh: bool,
) -> Result<bool> {
    let Wanted { config, desired } = wanted;
    let observed = node.observe(desired);
    let enrolled = redirection.enrolled();
    let plan = Plan::new(&config.settings(), desired, &enrolled, &observed, refresh);
    let mut refused = plan.refused;
    let mut problems = Vec::new();
    problems.extend(cut_off(redirection, &plan.cut_off, &mut refused));
    problems.extend(redirection.remove_pods(&names(&plan.remove)).err());
    match redirection.try_pods(&plan.capture) {
        Ok(failures) => refused.extend(failures.into_iter().map(|failure| {
            let mut pods = plan.capture.iter();
            let pod = pods.find(|pod| pod.uid == failure.uid);
            failed(failure, pod.map(|pod| pod.host_interface.clone()))
        })),
        Err(error) => problems.push(error),
    }
    let rest = Rest::after(
        &refused,
        &redirection.enrolled(),
        &redirection.interfaces_cut_off(),
        |name| node.has_interface(name),
    );
    problems.extend(cut_off(redirection, &rest.cut_off, &mut refused));
    if !rest.let_go.is_empty() {
        problems.extend(redirection.let_go(&names(&rest.let_go)).err());
    }
    let interfaces = redirection.interfaces_cut_off();
    for refused in &mut refused {
        let own = refused.host_interface.as_ref();
        refused.cut_off = own.is_some_and(|interface| interfaces.contains(interface));
    }
    refused.sort();
    log(redirection.uncaptured(), &refused);
    problems.extend(redirection.note_uncaptured(refused).err());
    match problems.into_iter().next() {
        Some(error) => Err(error.into()),
        None => Ok(rest.try_again),
    }
}

fn names(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

fn failed(failure: Failure, host_interface: Option<String>) -> Uncaptured {
    Uncaptured {
        uid: failure.uid,
        host_interface,
        why: Why::Failed,
        reason: failure.error.to_string(),
        cut_off: failure.cut_off,
    }
}

/// What keeps an interface from being cut off is added to the reasons of its pods.
fn cut_off(
    redirection: &mut dyn Redirection,
    interfaces: &[String],
    refused: &mut [Uncaptured],
) -> Option<redirect::Error> {
    let failures = match redirection.cut_off(&names(interfaces)) {
        Ok(failures) => failures,
        Err(error) => return Some(error),
    };
    for (interface, error) in failures {
        for pod in &mut *refused {
            if pod.host_interface.as_ref() == Some(&interface) {
                pod.reason = format!("{}; {error}", pod.reason);
            }
        }
    }
    None
}

/// Most lines about pods that are not captured, each time something changes.
const LINES_MAX: usize = 50;

/// Logs what is new.
fn log(before: &[Uncaptured], now: &[Uncaptured]) {
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
