use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};

use proptest::prelude::*;
use redirect::{BackEnd, Iptables, Node, TunnelSettings, Variant, Ztunnel};
use time::OffsetDateTime;

use super::*;
use crate::desired::{Entry, Listed, Phase, Unreadable};

pub(crate) fn settings() -> Settings {
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

pub(crate) fn listed(uid: &str, last: u8, interface: &str, started: Option<i64>) -> Listed {
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

pub(crate) fn desired(listed: impl IntoIterator<Item = Listed>) -> Desired {
    let entries = listed.into_iter().map(|pod| Entry::Pod(Box::new(pod)));
    Desired {
        pods: entries.collect(),
    }
}

fn unreadable(uid: &str, interface: Option<&str>) -> Entry {
    Entry::Unreadable(Unreadable {
        uid: uid.into(),
        host_interface: interface.map(str::to_owned),
        reason: "wrong".into(),
    })
}

/// In these tests what begins with "no" is not there.
pub(crate) fn is_there(name: &str) -> bool {
    !name.starts_with("no")
}

fn observed(desired: &Desired) -> Observed {
    let mut observed = Observed::default();
    for entry in &desired.pods {
        let interface = entry.host_interface().unwrap_or_default();
        if !is_there(interface) {
            let reason = format!("{interface} not found");
            observed.interfaces.insert(interface.to_owned(), reason);
        }
        if let Entry::Pod(listed) = entry
            && listed.pod.netns.starts_with("/no")
        {
            let reason = "no namespace".to_owned();
            observed.namespaces.insert(listed.pod.netns.clone(), reason);
        }
    }
    observed
}

/// Where these pods are captured already.
fn plan_from(enrolled: &[Pod], desired: &Desired, refresh: bool) -> Plan {
    Plan::new(&settings(), desired, enrolled, &observed(desired), refresh)
}

fn uids(pods: &[Pod]) -> Vec<&str> {
    pods.iter().map(|pod| pod.uid.as_str()).collect()
}

fn refused(plan: &Plan) -> Vec<(&str, Why)> {
    let refused = plan.refused.iter();
    refused.map(|pod| (pod.uid.as_str(), pod.why)).collect()
}

#[test]
fn of_two_pods_with_one_address_the_running_and_newer_one_has_it() {
    let case = |first: Listed, second: Listed, winner: &str, why: Why| {
        let loser = if winner == "a" { "b" } else { "a" };
        let plan = plan_from(&[], &desired([first, second]), false);
        assert_eq!(uids(&plan.capture), [winner]);
        assert_eq!(refused(&plan), [(loser, why)]);
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
    let plan = plan_from(
        &[],
        &desired([
            listed("a", 11, "va1", Some(1)),
            listed("a", 12, "va2", Some(2)),
            listed("b", 13, "va2", Some(1)),
            listed("c", 14, "va4", None),
        ]),
        false,
    );
    assert_eq!(uids(&plan.capture), ["a", "c"]);
    assert_eq!(refused(&plan), [("a", Why::Conflict), ("b", Why::Conflict)]);
    assert_eq!(plan.cut_off, ["va1"], "va2 is captured");
}

#[test]
fn a_pod_that_lost_takes_nothing_from_others() {
    // `b` loses its address to `a`, so that its interface is free for `c`.
    let pods = desired([
        listed("a", 11, "va1", Some(3)),
        listed("b", 11, "va2", Some(2)),
        listed("c", 12, "va2", Some(1)),
    ]);
    assert_eq!(uids(&plan_from(&[], &pods, false).capture), ["a", "c"]);
}

#[test]
fn what_cannot_be_read_is_refused_and_no_more() {
    let mut pods = desired([listed("a", 11, "va1", None)]);
    pods.pods.insert(0, unreadable("entry 1", Some("va9")));
    pods.pods.push(unreadable("entry 3", None));
    let plan = plan_from(&[], &pods, false);
    assert_eq!(uids(&plan.capture), ["a"]);
    let expected = [("entry 1", Why::Invalid), ("entry 3", Why::Invalid)];
    assert_eq!(refused(&plan), expected);
    assert_eq!(plan.cut_off, ["va9"]);
}

#[test]
fn only_whom_a_change_concerns_is_touched() {
    let (a, b) = (listed("a", 11, "va1", None), listed("b", 12, "va2", None));
    let enrolled = [a.pod.clone(), b.pod.clone()];
    let mut moved = b.clone();
    moved.pod.host_interface = "va3".into();
    // (the list, whom it ends, whom it captures, whom a refresh captures)
    let cases = [
        (vec![a.clone(), b.clone()], vec![], vec![], vec!["a", "b"]),
        (vec![a.clone()], vec!["b"], vec![], vec!["a"]),
        // In place: its capture does not end before it begins anew.
        (vec![a.clone(), moved], vec![], vec!["b"], vec!["a", "b"]),
        (
            vec![a, b, listed("c", 13, "va4", None)],
            vec![],
            vec!["c"],
            vec!["a", "b", "c"],
        ),
        (vec![], vec!["a", "b"], vec![], vec![]),
    ];
    for (list, removed, captured, refreshed) in cases {
        let list = desired(list);
        let plan = plan_from(&enrolled, &list, false);
        assert_eq!(plan.remove, removed, "{list:?}");
        assert_eq!(uids(&plan.capture), captured, "{list:?}");
        assert_eq!(plan.cut_off, [""; 0], "{list:?}");
        assert_eq!(uids(&plan_from(&enrolled, &list, true).capture), refreshed);
    }
}

fn uncaptured(uid: &str, interface: &str, why: Why, cut_off: bool) -> Uncaptured {
    Uncaptured {
        uid: uid.into(),
        host_interface: Some(interface.into()),
        why,
        reason: String::new(),
        cut_off,
    }
}

#[test]
fn who_failed_and_is_open_is_cut_off_and_tried_again() {
    let captured = [listed("old", 11, "va3", None).pod];
    let refused = [
        uncaptured("open", "va1", Why::Failed, false),
        uncaptured("cut", "va2", Why::Failed, true),
        // What failed was bringing it up to date.
        uncaptured("old", "va3", Why::Failed, false),
        uncaptured("gone", "no", Why::Failed, false),
        uncaptured("ended", "va4", Why::Ended, true),
    ];
    let cut_off = ["va2", "va4"].map(str::to_owned);
    let rest = Rest::after(&refused, &captured, &cut_off, is_there);
    let expected = Rest {
        cut_off: vec!["va1".into()],
        let_go: vec![],
        try_again: true,
    };
    assert_eq!(rest, expected);
    let rest = Rest::after(&refused[4..], &captured, &cut_off, is_there);
    assert_eq!(rest.let_go, ["va2"], "its pod is refused no more");
    assert!(!rest.try_again, "nothing failed");
}

#[test]
fn what_is_gone_is_not_kept_cut_off() {
    let refused = [uncaptured("a", "no", Why::Absent, true)];
    let rest = Rest::after(&refused, &[], &["no".to_owned()], is_there);
    assert_eq!(rest.let_go, ["no"]);
}

/// Few names and addresses, so that lists are full of conflicts.
pub(crate) fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let phase = prop_oneof![
        4 => Just(None),
        1 => Just(Some(Phase::Succeeded)),
        1 => Just(Some(Phase::Pending)),
    ];
    let uid = (0..6_u8).prop_map(|n| format!("uid{n}"));
    let interface = (0..6_u8).prop_map(|n| match n {
        0 => "no".to_owned(),
        n => format!("va{n}"),
    });
    let addresses = prop::collection::hash_set(10..16_u8, 0..3);
    let started = prop::option::of(0..3_i64);
    let netns = prop_oneof![6 => Just("/n"), 1 => Just("/no")];
    let pod = (uid, interface, addresses, started, phase, netns);
    let entry = pod.prop_flat_map(|(uid, interface, addresses, started, phase, netns)| {
        let mut listed = listed(&uid, 0, &interface, started);
        let addresses = addresses.into_iter();
        let addresses = addresses.map(|last| IpAddr::from([10, 244, 1, last]));
        listed.pod.addresses = addresses.collect();
        listed.pod.netns = netns.into();
        listed.phase = phase;
        let bad = unreadable(&uid, Some(&interface));
        prop_oneof![
            7 => Just(Entry::Pod(Box::new(listed))),
            1 => Just(bad),
            1 => Just(unreadable("entry", None)),
        ]
    });
    prop::collection::vec(entry, 0..10)
}

/// The entries with which something is wrong by themselves.
fn is_bad(entry: &Entry) -> bool {
    match entry {
        Entry::Pod(listed) => {
            listed.phase.is_some_and(Phase::is_over)
                || !is_there(&listed.pod.host_interface)
                || listed.pod.netns.starts_with("/no")
                || settings().validate_pod(&listed.pod).is_err()
        }
        Entry::Unreadable(_) => true,
    }
}

proptest! {
    #[test]
    fn a_bad_entry_costs_itself(pods in entries()) {
        let all = plan_from(&[], &Desired { pods: pods.clone() }, true);
        let sound: Vec<_> = pods.iter().filter(|entry| !is_bad(entry)).cloned().collect();
        let without = plan_from(&[], &Desired { pods: sound.clone() }, true);
        prop_assert_eq!(&all.capture, &without.capture);
        prop_assert_eq!(all.refused.len() + all.capture.len(), pods.len(), "each has an answer");
        prop_assert_eq!(without.refused.len() + without.capture.len(), sound.len());
    }

    #[test]
    fn captured_pods_share_nothing_and_no_loser_was_newer(pods in entries()) {
        let plan = plan_from(&[], &Desired { pods: pods.clone() }, true);
        let mut addresses = HashSet::new();
        let mut interfaces = HashSet::new();
        let mut uids = HashSet::new();
        for pod in &plan.capture {
            prop_assert!(uids.insert(&pod.uid) && interfaces.insert(&pod.host_interface));
            prop_assert!(pod.addresses.iter().all(|address| addresses.insert(address)));
        }
        // Every sound pod that is not captured shares something with one that is and is newer.
        let sound: Vec<_> = (0..).zip(&pods).filter_map(|(position, entry)| match entry {
            Entry::Pod(listed) if !is_bad(entry) => Some((listed.started, position, &listed.pod)),
            _ => None,
        }).collect();
        for &(started, position, pod) in &sound {
            let is_it = |captured: &&Pod| std::ptr::eq(*captured, pod) || **captured == *pod;
            if plan.capture.iter().any(|captured| is_it(&captured)) {
                continue;
            }
            let beaten = sound.iter().any(|&(other_started, other_position, other)| {
                let newer = (other_started, other_position) > (started, position);
                let shares = other.uid == pod.uid
                    || other.host_interface == pod.host_interface
                    || other.addresses.iter().any(|address| pod.addresses.contains(address));
                newer && shares && plan.capture.contains(other)
            });
            prop_assert!(beaten, "{:?}", pod);
        }
        // Whoever is refused and has an interface of his own is cut off, nobody else is.
        for name in &plan.cut_off {
            prop_assert!(is_there(name) && !interfaces.contains(name));
        }
        for refused in &plan.refused {
            if let Some(name) = &refused.host_interface {
                let open = is_there(name) && !interfaces.contains(name);
                prop_assert_eq!(plan.cut_off.contains(name), open);
            }
        }
    }
}
