//! Which of the listed pods are captured, and why the others are not.
//!
//! A pod is running if its phase does not say otherwise, its network namespace can be entered and
//! its interface is there. Of several with one uid, interface or address the one that started last
//! is captured (a time beats none; of equals, the later in the file).

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;

use redirect::{Pod, Settings, Uncaptured, Why};

use crate::listed::{Entry, Listed};

/// What to do about the listed pods.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    /// To be captured; no two of them share a uid, an interface or an address.
    pub(crate) pods: Vec<Pod>,
    /// The others. None of them is cut off yet.
    pub(crate) refused: Vec<Uncaptured>,
}

impl Selection {
    /// Looks at the node as it is now.
    pub(crate) fn of(settings: &Settings, entries: &[Entry]) -> Self {
        let listed = entries.iter().filter_map(|entry| match entry {
            Entry::Pod(listed) => Some(&*listed.pod.netns),
            Entry::Unreadable(_) => None,
        });
        let listed: Vec<&Path> = listed.collect();
        let namespaces = redirect::check_namespaces(&listed);
        let problems = namespaces
            .into_iter()
            .map(|result| result.err().map(|error| error.to_string()));
        select(settings, entries, problems.collect(), |name| {
            redirect::interface_index(name).map_or_else(|error| Some(error.to_string()), |_| None)
        })
    }

    /// Interfaces of refused pods that no captured pod has.
    pub(crate) fn interfaces_to_cut(&self) -> Vec<&str> {
        let refused = self.refused.iter();
        let mut names: Vec<&str> = refused
            .filter_map(|refused| refused.host_interface.as_deref())
            .filter(|name| self.pods.iter().all(|pod| pod.host_interface != *name))
            .filter(|name| redirect::interface_index(name).is_ok())
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

/// `netns_problems` has one for each listed pod, `interface_problem` is asked for names.
fn select(
    settings: &Settings,
    entries: &[Entry],
    netns_problems: Vec<Option<String>>,
    interface_problem: impl Fn(&str) -> Option<String>,
) -> Selection {
    let mut selection = Selection::default();
    let mut running = Vec::new();
    let mut netns_problems = netns_problems.into_iter();
    for (position, entry) in entries.iter().enumerate() {
        let listed = match entry {
            Entry::Pod(listed) => listed,
            Entry::Unreadable(unreadable) => {
                selection.refused.push(Uncaptured {
                    uid: unreadable.uid.clone(),
                    host_interface: unreadable.host_interface.clone(),
                    why: Why::Invalid,
                    reason: unreadable.reason.clone(),
                    cut_off: false,
                });
                continue;
            }
        };
        let netns_problem = netns_problems.next().flatten();
        match not_running(settings, listed, netns_problem, &interface_problem) {
            Some((why, reason)) => selection.refused.push(refused(&listed.pod, why, reason)),
            None => running.push((position, &**listed)),
        }
    }
    // `None` is less than any time.
    running.sort_by_key(|&(position, listed)| std::cmp::Reverse((listed.started, position)));
    let mut taken = Taken::default();
    for &(position, listed) in &running {
        if let Some(reason) = taken.conflict(&listed.pod) {
            let refused = refused(&listed.pod, Why::Conflict, reason);
            selection.refused.push(refused);
        } else {
            taken.take(position, &listed.pod);
        }
    }
    selection.pods = taken.in_order();
    selection.refused.sort();
    selection
}

fn refused(pod: &Pod, why: Why, reason: String) -> Uncaptured {
    Uncaptured {
        uid: pod.uid.clone(),
        host_interface: Some(pod.host_interface.clone()),
        why,
        reason,
        cut_off: false,
    }
}

fn not_running(
    settings: &Settings,
    listed: &Listed,
    netns_problem: Option<String>,
    interface_problem: impl Fn(&str) -> Option<String>,
) -> Option<(Why, String)> {
    if let Some(phase) = listed.phase.filter(|phase| phase.is_over()) {
        return Some((Why::Ended, format!("pods.phase is {phase:?}")));
    }
    if let Err(error) = settings.validate_pod(&listed.pod) {
        return Some((Why::Invalid, error.to_string()));
    }
    // The interface first: it is what is looked for when a pod is waited for.
    let problem = interface_problem(&listed.pod.host_interface).or(netns_problem);
    problem.map(|reason| (Why::Absent, reason))
}

/// What the pods chosen so far have.
#[derive(Default)]
struct Taken<'a> {
    uids: HashMap<&'a str, &'a Pod>,
    interfaces: HashMap<&'a str, &'a Pod>,
    addresses: HashMap<IpAddr, &'a Pod>,
    chosen: Vec<(usize, &'a Pod)>,
}

impl<'a> Taken<'a> {
    fn conflict(&self, pod: &Pod) -> Option<String> {
        if self.uids.contains_key(pod.uid.as_str()) {
            return Some(format!(
                "pods.uid {:?}: is listed twice, and the other is the newer one",
                pod.uid
            ));
        }
        let newer = |field: &str, value: &str, other: &Pod| {
            Some(format!(
                "{field} {value:?}: belongs to pod {}, which is newer",
                other.uid
            ))
        };
        if let Some(other) = self.interfaces.get(pod.host_interface.as_str()) {
            return newer("pods.host_interface", &pod.host_interface, other);
        }
        pod.addresses.iter().find_map(|address| {
            let other = self.addresses.get(address)?;
            newer("pods.addresses", &address.to_string(), other)
        })
    }

    fn take(&mut self, position: usize, pod: &'a Pod) {
        self.uids.insert(&pod.uid, pod);
        self.interfaces.insert(&pod.host_interface, pod);
        let addresses = pod.addresses.iter();
        self.addresses
            .extend(addresses.map(|address| (*address, pod)));
        self.chosen.push((position, pod));
    }

    fn in_order(mut self) -> Vec<Pod> {
        self.chosen.sort_by_key(|&(position, _)| position);
        let chosen = self.chosen.into_iter();
        chosen.map(|(_, pod)| pod.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use redirect::{BackEnd, Iptables, Node, TunnelSettings, Variant, Ztunnel};
    use time::OffsetDateTime;

    use super::*;
    use crate::listed::{Phase, Unreadable};

    fn settings() -> Settings {
        Settings {
            node: Node {
                netns: None,
                other_addresses: vec![],
                interfaces: vec!["und".into()],
                address: [10, 244, 1, 1].into(),
                pod_cidrs: vec![],
            },
            ztunnel: Ztunnel {
                netns: "/run/netns/z".into(),
                interface: "eth0".into(),
                host_interface: "vz".into(),
                address: [10, 244, 1, 2].into(),
                address_v6: None,
            },
            state_dir: "/tmp/x".into(),
            dns: false,
            back_end: BackEnd::IptablesTunnel(TunnelSettings {
                variant: Variant::default(),
                iptables: Iptables::default(),
            }),
        }
    }

    fn listed(uid: &str, last: u8, interface: &str, started: Option<i64>) -> Listed {
        Listed {
            pod: Pod {
                uid: uid.into(),
                namespace: "default".into(),
                name: "pod".into(),
                service_account: "default".into(),
                addresses: vec![Ipv4Addr::new(10, 244, 1, last).into()],
                netns: "/n".into(),
                host_interface: interface.into(),
            },
            phase: None,
            started: started.map(|s| OffsetDateTime::from_unix_timestamp(s).unwrap()),
        }
    }

    /// UIDs of the chosen, and UID and reason of the refused.
    fn choose(listed: &[Listed]) -> (Vec<String>, Vec<(String, Why)>) {
        let entries: Vec<_> = listed
            .iter()
            .map(|listed| Entry::Pod(Box::new(listed.clone())))
            .collect();
        // In these tests what begins with "no" is not there.
        let problem = |name: &str| name.starts_with("no").then(|| format!("{name} not found"));
        let netns = listed.iter().map(|listed| {
            let path = listed.pod.netns.to_string_lossy().into_owned();
            path.starts_with("/no").then_some(path)
        });
        let selection = select(&settings(), &entries, netns.collect(), problem);
        let refused = selection.refused.iter();
        (
            selection.pods.iter().map(|pod| pod.uid.clone()).collect(),
            refused.map(|pod| (pod.uid.clone(), pod.why)).collect(),
        )
    }

    #[test]
    fn of_two_pods_with_one_address_the_running_and_newer_one_has_it() {
        let case = |first: Listed, second: Listed, winner: &str, why: Why| {
            let loser = if winner == "a" { "b" } else { "a" };
            let (chosen, refused) = choose(&[first, second]);
            assert_eq!(chosen, [winner]);
            assert_eq!(refused, [(loser.to_owned(), why)]);
        };
        let a = |started| listed("a", 11, "va1", started);
        let b = |started| listed("b", 11, "va2", started);
        case(a(Some(1)), b(Some(2)), "b", Why::Conflict);
        case(a(Some(2)), b(Some(1)), "a", Why::Conflict);
        case(a(Some(1)), b(None), "a", Why::Conflict);
        case(a(None), b(None), "b", Why::Conflict);
        case(a(Some(1)), b(Some(1)), "b", Why::Conflict);
        // Newer, but not running.
        for phase in [Phase::Succeeded, Phase::Failed] {
            let mut over = b(Some(2));
            over.phase = Some(phase);
            case(a(Some(1)), over, "a", Why::Ended);
        }
        let mut gone = b(Some(2));
        gone.pod.netns = "/no".into();
        case(a(Some(1)), gone, "a", Why::Absent);
        let mut gone = b(Some(2));
        gone.pod.host_interface = "no".into();
        case(a(Some(1)), gone, "a", Why::Absent);
        let mut wrong = b(Some(2));
        wrong.pod.addresses.push(Ipv4Addr::LOCALHOST.into());
        case(a(Some(1)), wrong, "a", Why::Invalid);
        let mut unnamed = b(Some(2));
        unnamed.pod.service_account.clear();
        case(a(Some(1)), unnamed, "a", Why::Invalid);
    }

    #[test]
    fn a_uid_and_an_interface_have_one_pod_too() {
        let (chosen, refused) = choose(&[
            listed("a", 11, "va1", Some(1)),
            listed("a", 12, "va2", Some(2)),
            listed("b", 13, "va2", Some(1)),
            listed("c", 14, "va4", None),
        ]);
        assert_eq!(chosen, ["a", "c"]);
        let expected = [("a", Why::Conflict), ("b", Why::Conflict)];
        assert_eq!(refused, expected.map(|(uid, why)| (uid.to_owned(), why)));
    }

    #[test]
    fn a_pod_that_lost_takes_nothing_from_others() {
        // `b` loses its address to `a`, so that its interface is free for `c`.
        let (chosen, _) = choose(&[
            listed("a", 11, "va1", Some(3)),
            listed("b", 11, "va2", Some(2)),
            listed("c", 12, "va2", Some(1)),
        ]);
        assert_eq!(chosen, ["a", "c"]);
    }

    #[test]
    fn what_cannot_be_read_is_refused_and_no_more() {
        let entries = [
            Entry::Unreadable(Unreadable {
                uid: "entry 1".into(),
                host_interface: Some("va9".into()),
                reason: "wrong".into(),
            }),
            Entry::Pod(Box::new(listed("a", 11, "va1", None))),
        ];
        let selection = select(&settings(), &entries, vec![None], |_| None);
        assert_eq!(selection.pods.len(), 1);
        assert_eq!(selection.refused[0].why, Why::Invalid);
    }
}
