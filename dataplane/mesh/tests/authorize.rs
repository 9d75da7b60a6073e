//! Authorization: tables for every field and rule, and a naive evaluator to compare with.
#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

mod support;

use std::net::{IpAddr, SocketAddr};

use mesh::policy::{Action, Match, PolicyScope, ServiceAccountMatch, StringMatch};
use mesh::{ConnectionFacts, DenyReason, Identity, Policy, Snapshot, Verdict, WorkloadConfig};
use proptest::prelude::*;
use support::{addr, id, parse, snapshot};

const WORKLOADS: &str = r#"
workloads:
- {uid: w, name: w, namespace: app, workloadIps: ["10.0.0.1"], authorizationPolicies: [SELECTED]}
- {uid: other, name: other, namespace: other, workloadIps: ["10.0.0.2"]}
policies:"#;

/// Two workloads, the first with this list of policies, and a list of policies.
fn mesh_yaml(selected: &str, policies: &str) -> String {
    let policies = if policies.is_empty() { " []" } else { policies };
    format!("{}\n{policies}", WORKLOADS.replace("SELECTED", selected))
}

/// Whether a connection is allowed to workload `w` under these policies.
fn verdict(
    policies: &str,
    selected: &str,
    identity: Option<&str>,
    src: &str,
    dst: &str,
) -> Verdict {
    let mesh = snapshot(&mesh_yaml(selected, policies));
    let identity = identity.map(id);
    let facts = ConnectionFacts {
        identity: identity.as_ref(),
        src: src.parse().unwrap(),
        dst: addr(dst),
    };
    mesh.authorize(mesh.workload_by_uid("w").unwrap(), &facts)
}

/// Whether one match, alone in an ALLOW policy, allows.
fn matches(one: &str, identity: Option<&str>, src: &str, dst: &str) -> bool {
    let policy = format!("- {{name: p, namespace: app, scope: Namespace, rules: [[[{one}]]]}}");
    verdict(&policy, "", identity, src, dst) == Verdict::Allow
}

const CLIENT: &str = "spiffe://td/ns/front/sa/web";

/// Field without its first letter, values, whether they match with and without an identity.
const FIELDS: &[(&str, &str, bool, bool)] = &[
    ("amespaces", "[{Exact: front}]", true, false),
    ("amespaces", "[{Exact: fron}]", false, false),
    ("amespaces", "[{Prefix: fr}]", true, false),
    ("amespaces", "[{Prefix: ont}]", false, false),
    ("amespaces", "[{Suffix: ont}]", true, false),
    ("amespaces", "[{Suffix: fr}]", false, false),
    ("amespaces", "[{Presence: []}]", true, false),
    ("amespaces", "[{Exact: x}, {Exact: front}]", true, false),
    ("rincipals", "[{Exact: td/ns/front/sa/web}]", true, false),
    (
        "rincipals",
        "[{Exact: 'spiffe://td/ns/front/sa/web'}]",
        false,
        false,
    ),
    ("rincipals", "[{Prefix: td/ns/front/}]", true, false),
    ("rincipals", "[{Suffix: /sa/web}]", true, false),
    ("rincipals", "[{Presence: []}]", true, false),
    ("rincipals", "[{Prefix: ''}]", true, false),
    (
        "erviceAccounts",
        "[{namespace: front, serviceAccount: web}]",
        true,
        false,
    ),
    (
        "erviceAccounts",
        "[{namespace: front, serviceAccount: we}]",
        false,
        false,
    ),
    (
        "erviceAccounts",
        "[{namespace: back, serviceAccount: web}]",
        false,
        false,
    ),
    ("ourceIps", "[10.1.0.0/16]", true, true),
    ("ourceIps", "[10.2.0.0/16, 10.1.2.3]", true, true),
    ("ourceIps", "[10.2.0.0/16]", false, false),
    ("ourceIps", "['::/0']", false, false),
    ("estinationIps", "[10.0.0.0/24]", true, true),
    ("estinationIps", "[10.1.0.0/16]", false, false),
    ("estinationPorts", "[80, 8080]", true, true),
    ("estinationPorts", "[15008]", false, false),
];

#[test]
fn every_field_and_its_negation() {
    let src = "10.1.2.3";
    let dst = "10.0.0.1:8080";
    for &(field, values, with_identity, without_identity) in FIELDS {
        let first = match field {
            "amespaces" => "n",
            "rincipals" => "p",
            "erviceAccounts" | "ourceIps" => "s",
            _ => "d",
        };
        let positive = format!("{{{first}{field}: {values}}}");
        let negative = format!("{{not{}{field}: {values}}}", first.to_uppercase());
        assert_eq!(
            matches(&positive, Some(CLIENT), src, dst),
            with_identity,
            "{positive}"
        );
        assert_eq!(
            matches(&positive, None, src, dst),
            without_identity,
            "{positive}, plain"
        );
        assert_eq!(
            matches(&negative, Some(CLIENT), src, dst),
            !with_identity,
            "{negative}"
        );
        assert_eq!(
            matches(&negative, None, src, dst),
            !without_identity,
            "{negative}, plain"
        );
    }
}

#[test]
fn mapped_addresses_are_compared_as_ipv4() {
    let (src, dst) = ("::ffff:10.1.2.3", "[::ffff:10.0.0.1]:80");
    assert!(matches(
        "{sourceIps: [10.1.0.0/16], destinationIps: [10.0.0.1]}",
        None,
        src,
        dst
    ));
}

#[test]
fn fields_are_combined_and_their_negations_too() {
    let ask = |one: &str| matches(one, Some(CLIENT), "10.1.2.3", "10.0.0.1:8080");
    assert!(ask(
        "{namespaces: [{Exact: front}], destinationPorts: [8080]}"
    ));
    assert!(!ask(
        "{namespaces: [{Exact: front}], destinationPorts: [80]}"
    ));
    assert!(ask(
        "{namespaces: [{Prefix: f}], notNamespaces: [{Exact: fort}]}"
    ));
    assert!(!ask(
        "{namespaces: [{Prefix: f}], notNamespaces: [{Exact: front}]}"
    ));
    assert!(!ask(
        "{sourceIps: [10.0.0.0/8], notSourceIps: [10.1.0.0/16]}"
    ));
}

#[test]
fn what_is_empty() {
    for (rules, allowed, why) in [
        ("[]", false, "no rules never match"),
        ("[[]]", true, "a rule of no clauses holds"),
        ("[[[]]]", true, "a clause of no matches holds"),
        ("[[[{}]]]", false, "a match of no fields is skipped"),
        (
            "[[[{}, {destinationPorts: [80]}]]]",
            true,
            "and does not hide its neighbours",
        ),
        (
            "[[[], [{destinationPorts: [81]}]]]",
            false,
            "clauses are all needed",
        ),
        (
            "[[[{destinationPorts: [81]}]], [[{destinationPorts: [80]}]]]",
            true,
            "one rule suffices",
        ),
        (
            "[[[{destinationPorts: [80]}, {destinationPorts: [81]}]]]",
            true,
            "one match suffices",
        ),
        (
            "[[[{destinationPorts: [80]}], [{destinationPorts: [81]}]]]",
            false,
            "every clause",
        ),
        (
            "[[[{destinationPorts: [80]}], [{sourceIps: [10.0.0.9]}]]]",
            true,
            "every clause holds",
        ),
    ] {
        let policy = format!("- {{name: p, namespace: app, scope: Namespace, rules: {rules}}}");
        let verdict = verdict(&policy, "", None, "10.0.0.9", "10.0.0.1:80");
        assert_eq!(verdict == Verdict::Allow, allowed, "{why}");
    }
}

#[test]
fn order_of_actions() {
    let deny_9 = "- {name: deny, namespace: app, scope: Namespace, action: Deny, rules: \
        [[[{destinationPorts: [9]}]]]}\n";
    let allow_8 = "- {name: allow, namespace: app, scope: Namespace, rules: \
        [[[{destinationPorts: [8, 9]}]]]}\n";
    let ask = |policies: &str, dst: &str| match verdict(policies, "", None, "10.0.0.9", dst) {
        Verdict::Allow => "allow".to_owned(),
        Verdict::Deny(reason) => reason.to_string(),
    };
    let both = format!("{allow_8}{deny_9}");
    assert_eq!(ask("", "10.0.0.1:7"), "allow");
    assert_eq!(ask(deny_9, "10.0.0.1:7"), "allow");
    assert_eq!(ask(deny_9, "10.0.0.1:9"), "explicitly denied by: app/deny");
    assert_eq!(ask(allow_8, "10.0.0.1:8"), "allow");
    assert_eq!(
        ask(allow_8, "10.0.0.1:7"),
        "allow policies exist, but none allowed"
    );
    assert_eq!(ask(&both, "10.0.0.1:8"), "allow");
    assert_eq!(ask(&both, "10.0.0.1:9"), "explicitly denied by: app/deny");
    assert_eq!(
        ask(&both, "10.0.0.1:7"),
        "allow policies exist, but none allowed"
    );
    // A policy that allows nothing still makes everything else need permission.
    let nothing = "- {name: nothing, namespace: app, scope: Namespace}";
    assert_eq!(
        ask(nothing, "10.0.0.1:8"),
        "allow policies exist, but none allowed"
    );
}

#[test]
fn scopes() {
    let deny = |scope: &str, namespace: &str, selected: &str| {
        let policy = format!(
            "- {{name: p, namespace: '{namespace}', scope: {scope}, action: Deny, rules: [[]]}}"
        );
        verdict(&policy, selected, None, "10.0.0.9", "10.0.0.1:80") != Verdict::Allow
    };
    assert!(deny("Global", "", ""));
    assert!(deny("Global", "istio-system", ""));
    assert!(deny("Namespace", "app", ""));
    assert!(!deny("Namespace", "other", ""));
    assert!(!deny("WorkloadSelector", "app", ""));
    assert!(deny("WorkloadSelector", "app", "app/p"));
    assert!(deny("WorkloadSelector", "istio-system", "istio-system/p"));
}

#[test]
fn a_policy_that_is_named_but_missing_is_left_out() {
    let mesh = snapshot(&mesh_yaml("istio-system/gone", ""));
    let workload = mesh.workload_by_uid("w").unwrap();
    let facts = ConnectionFacts {
        identity: None,
        src: [10, 0, 0, 9].into(),
        dst: addr("10.0.0.1:80"),
    };
    assert_eq!(mesh.authorize(workload, &facts), Verdict::Allow);
    assert!(!mesh.has_policies(workload));
    assert_eq!(mesh.warnings().len(), 1);
    assert!(
        mesh.warnings()[0].contains("istio-system/gone"),
        "{:?}",
        mesh.warnings()
    );
}

/// The policy that strict mutual TLS arrives as.
#[test]
fn strict_mutual_tls() {
    let strict = "- {name: istio_converted_static_strict, namespace: istio-system, scope: \
        WorkloadSelector, action: Deny, rules: [[[{notPrincipals: [{Presence: []}]}]]]}";
    let selected = "istio-system/istio_converted_static_strict";
    let ask = |identity| verdict(strict, selected, identity, "10.0.0.9", "10.0.0.1:80");
    assert_eq!(ask(Some(CLIENT)), Verdict::Allow);
    let Verdict::Deny(reason) = ask(None) else {
        panic!("plain text was allowed")
    };
    let text = "explicitly denied by: istio-system/istio_converted_static_strict";
    assert_eq!(reason.to_string(), text);
}

#[test]
fn dry_run_changes_nothing_and_is_reported() {
    let mesh = snapshot(&mesh_yaml(
        "",
        "- {name: a, namespace: app, scope: Namespace, dryRun: true, rules: \
            [[[{destinationPorts: [80]}]]]}\n\
               - {name: d, namespace: app, scope: Namespace, dryRun: true, action: Deny, \
                 rules: [[]]}\n\
               - {name: real, namespace: app, scope: Namespace, action: Deny, \
                 rules: [[[{destinationPorts: [9]}]]]}\n",
    ));
    let workload = mesh.workload_by_uid("w").unwrap();
    let ask = |dst| {
        let facts = ConnectionFacts {
            identity: None,
            src: [10, 0, 0, 9].into(),
            dst: addr(dst),
        };
        let decision = mesh.evaluate(workload, &facts);
        assert_eq!(decision.verdict, mesh.authorize(workload, &facts));
        let notes: Vec<String> = decision.dry_run.iter().map(ToString::to_string).collect();
        (decision.verdict == Verdict::Allow, notes)
    };
    let deny = "dry run: app/d would deny";
    assert_eq!(
        ask("10.0.0.1:80"),
        (true, vec![deny.into(), "dry run: app/a would allow".into()])
    );
    let unmatched = "dry run: app/a would not match";
    assert_eq!(
        ask("10.0.0.1:81"),
        (true, vec![deny.into(), unmatched.into()])
    );
    assert_eq!(ask("10.0.0.1:9"), (false, vec![deny.into()]));
    let none = snapshot(&mesh_yaml("", ""));
    let facts = ConnectionFacts {
        identity: None,
        src: [10, 0, 0, 9].into(),
        dst: addr("10.0.0.1:80"),
    };
    let decision = none.evaluate(none.workload_by_uid("w").unwrap(), &facts);
    assert_eq!(decision.dry_run.capacity(), 0);
}

#[test]
fn the_newest_snapshot_decides() {
    let before = snapshot(&mesh_yaml("", ""));
    let workload = before.workload_by_uid("w").unwrap();
    let facts = ConnectionFacts {
        identity: None,
        src: [10, 0, 0, 9].into(),
        dst: addr("10.0.0.1:80"),
    };
    assert_eq!(before.authorize(workload, &facts), Verdict::Allow);
    // A change of the workload's own policy list is seen, too.
    let mut after = parse(&mesh_yaml(
        "app/p",
        "- {name: p, namespace: app, scope: WorkloadSelector, action: Deny, rules: [[]]}",
    ));
    after.workloads.reverse();
    let after = after.build().unwrap();
    assert!(matches!(
        after.authorize(workload, &facts),
        Verdict::Deny(DenyReason::Policy(_))
    ));
    let gone = Snapshot::empty();
    let verdict = gone.authorize(workload, &facts);
    assert_eq!(verdict, Verdict::Deny(DenyReason::UnknownWorkload));
    assert_eq!(gone.evaluate(workload, &facts).verdict, verdict);
}

// A second opinion: the rules of the specification, written down as directly as possible.

#[derive(Debug)]
struct Facts {
    identity: Option<Identity>,
    src: IpAddr,
    dst: SocketAddr,
}

fn naive_string(m: &StringMatch, text: Option<&str>) -> bool {
    let Some(text) = text else { return false };
    match m {
        StringMatch::Exact(x) => text == &**x,
        StringMatch::Prefix(x) => text.len() >= x.len() && text[..x.len()] == **x,
        StringMatch::Suffix(x) => text.len() >= x.len() && text[text.len() - x.len()..] == **x,
        StringMatch::Presence() => !text.is_empty(),
    }
}

fn naive_in(cidr: &mesh::address::Cidr, ip: IpAddr) -> bool {
    let bits = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => (32_u8, u128::from(v4.to_bits()) << 96),
        IpAddr::V6(v6) => (128, v6.to_bits()),
    };
    let ((width, net), (ip_width, ip)) = (bits(cidr.0.network()), bits(ip));
    let prefix = u32::from(cidr.0.prefix_len());
    width == ip_width && (prefix == 0 || (net ^ ip) >> (128 - prefix) == 0)
}

fn naive_match(m: &Match, f: &Facts) -> bool {
    let ns = f
        .identity
        .as_ref()
        .map(|i| i.uri().split('/').nth(4).unwrap().to_owned());
    let sa = f
        .identity
        .as_ref()
        .map(|i| i.uri().split('/').nth(6).unwrap().to_owned());
    let principal = f
        .identity
        .as_ref()
        .map(|i| i.uri().replace("spiffe://", ""));
    let account = |m: &ServiceAccountMatch| {
        ns.as_deref() == Some(&*m.namespace) && sa.as_deref() == Some(&*m.service_account)
    };
    let mut conditions = Vec::new();
    let mut add = |positive: Vec<bool>, negative: Vec<bool>| {
        if !positive.is_empty() {
            conditions.push(positive.contains(&true));
        }
        if !negative.is_empty() {
            conditions.push(!negative.contains(&true));
        }
    };
    let strings = |list: &[StringMatch], text: &Option<String>| -> Vec<bool> {
        list.iter()
            .map(|m| naive_string(m, text.as_deref()))
            .collect()
    };
    let ips = |list: &[mesh::address::Cidr], ip: IpAddr| -> Vec<bool> {
        list.iter().map(|c| naive_in(c, ip)).collect()
    };
    let ports = |list: &[u16]| -> Vec<bool> { list.iter().map(|p| *p == f.dst.port()).collect() };
    add(strings(&m.namespaces, &ns), strings(&m.not_namespaces, &ns));
    add(
        strings(&m.principals, &principal),
        strings(&m.not_principals, &principal),
    );
    add(
        m.service_accounts.iter().map(account).collect(),
        m.not_service_accounts.iter().map(account).collect(),
    );
    add(ips(&m.source_ips, f.src), ips(&m.not_source_ips, f.src));
    add(
        ips(&m.destination_ips, f.dst.ip()),
        ips(&m.not_destination_ips, f.dst.ip()),
    );
    add(ports(&m.destination_ports), ports(&m.not_destination_ports));
    !conditions.is_empty() && !conditions.contains(&false)
}

fn naive_policy(policy: &Policy, f: &Facts) -> bool {
    for rule in &policy.rules {
        let mut all = true;
        for clause in rule {
            let mut any = clause.is_empty();
            for one in clause {
                any = any || naive_match(one, f);
            }
            all = all && any;
        }
        if all {
            return true;
        }
    }
    false
}

fn naive_allowed(policies: &[Policy], workload: &WorkloadConfig, f: &Facts) -> bool {
    let mut relevant = Vec::new();
    for policy in policies {
        let named = workload
            .authorization_policies
            .iter()
            .any(|key| **key == *policy.key());
        let in_scope = match policy.scope {
            PolicyScope::Global => true,
            PolicyScope::Namespace => policy.namespace == workload.namespace,
            PolicyScope::WorkloadSelector => false,
        };
        if (named || in_scope) && !policy.dry_run {
            relevant.push(policy);
        }
    }
    let of = |action| relevant.iter().filter(move |p| p.action == action);
    if of(Action::Deny).any(|p| naive_policy(p, f)) {
        return false;
    }
    of(Action::Allow).count() == 0 || of(Action::Allow).any(|p| naive_policy(p, f))
}

fn text() -> impl Strategy<Value = String> {
    prop::sample::select(vec![
        "a",
        "b",
        "ab",
        "td/ns/a",
        "/sa/b",
        "td",
        "td/ns/a/sa/b",
    ])
    .prop_map(str::to_owned)
}

fn string_match() -> impl Strategy<Value = StringMatch> {
    prop_oneof![
        text().prop_map(|t| StringMatch::Exact(t.into())),
        text().prop_map(|t| StringMatch::Prefix(t.into())),
        text().prop_map(|t| StringMatch::Suffix(t.into())),
        Just(StringMatch::Presence()),
    ]
}

fn some<S: Strategy>(item: S) -> impl Strategy<Value = Vec<S::Value>>
where
    S::Value: std::fmt::Debug,
{
    prop_oneof![4 => Just(0_usize), 2 => Just(1), 1 => Just(2)].prop_flat_map({
        let item = std::rc::Rc::new(item);
        move |n| prop::collection::vec(item.clone(), n)
    })
}

fn cidr() -> impl Strategy<Value = mesh::address::Cidr> {
    let texts = vec![
        "10.0.0.0/8",
        "10.0.0.1",
        "10.0.1.0/24",
        "0.0.0.0/0",
        "fd00::/8",
        "fd00::1",
    ];
    prop::sample::select(texts).prop_map(|t| t.parse().unwrap())
}

fn account() -> impl Strategy<Value = ServiceAccountMatch> {
    ("[ab]", "[ab]").prop_map(|(namespace, service_account)| ServiceAccountMatch {
        namespace: namespace.into(),
        service_account: service_account.into(),
    })
}

fn one_match() -> impl Strategy<Value = Match> {
    let port = || some(1_u16..4);
    let strings = (
        some(string_match()),
        some(string_match()),
        some(string_match()),
    );
    let others = (some(string_match()), some(account()), some(account()));
    let ips = (some(cidr()), some(cidr()), some(cidr()), some(cidr()));
    (strings, others, ips, port(), port()).prop_map(|(s, o, i, ports, not_ports)| Match {
        namespaces: s.0,
        not_namespaces: s.1,
        principals: s.2,
        not_principals: o.0,
        service_accounts: o.1,
        not_service_accounts: o.2,
        source_ips: i.0,
        not_source_ips: i.1,
        destination_ips: i.2,
        not_destination_ips: i.3,
        destination_ports: ports,
        not_destination_ports: not_ports,
    })
}

fn policy() -> impl Strategy<Value = Policy> {
    let rules = prop::collection::vec(
        prop::collection::vec(prop::collection::vec(one_match(), 0..3), 0..3),
        0..3,
    );
    let scope = prop::sample::select(vec![
        PolicyScope::Global,
        PolicyScope::Namespace,
        PolicyScope::WorkloadSelector,
    ]);
    let action = prop::sample::select(vec![Action::Allow, Action::Deny]);
    ("[ab]", scope, action, prop::bool::weighted(0.2), rules).prop_map(
        |(namespace, scope, action, dry_run, rules)| Policy {
            name: "replaced".into(),
            namespace: namespace.into(),
            scope,
            action,
            dry_run,
            rules,
        },
    )
}

fn facts() -> impl Strategy<Value = Facts> {
    let ips = || {
        prop::sample::select(vec![
            "10.0.0.1", "10.0.1.1", "11.0.0.1", "fd00::1", "fe00::1",
        ])
        .prop_map(|t| t.parse::<IpAddr>().unwrap())
    };
    (
        prop::option::weighted(0.7, ("td|other", "[ab]", "[ab]")),
        ips(),
        ips(),
        1_u16..4,
    )
        .prop_map(|(identity, src, dst, port)| Facts {
            identity: identity.map(|(td, ns, sa)| Identity::new(&td, &ns, &sa).unwrap()),
            src,
            dst: SocketAddr::new(dst, port),
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn agrees_with_the_naive_evaluator(
        mut policies in prop::collection::vec(policy(), 0..5),
        selected in prop::collection::vec(0_usize..6, 0..3),
        facts in prop::collection::vec(facts(), 1..8),
    ) {
        for (n, policy) in policies.iter_mut().enumerate() {
            policy.name = format!("p{n}").into();
        }
        let key = |n: usize| policies.get(n).map_or_else(|| "a/gone".to_owned(), Policy::key);
        let workload = WorkloadConfig {
            uid: "w".into(),
            name: "w".into(),
            namespace: "a".into(),
            workload_ips: vec![[10, 0, 0, 1].into()],
            authorization_policies: selected.into_iter().map(|n| key(n).into()).collect(),
            ..WorkloadConfig::default()
        };
        let mesh = Snapshot::build(vec![workload.clone()], vec![], policies.clone()).unwrap();
        let destination = mesh.workload_by_uid("w").unwrap();
        for one in facts {
            let facts =
                ConnectionFacts { identity: one.identity.as_ref(), src: one.src, dst: one.dst };
            let allowed = mesh.authorize(destination, &facts) == Verdict::Allow;
            prop_assert_eq!(allowed, naive_allowed(&policies, &workload, &one));
        }
    }
}
