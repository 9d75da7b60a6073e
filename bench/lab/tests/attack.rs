//! Hostile peers and pods get nothing that they must not: the quick set of `lab attack all`. The
//! full one is part of `make soak`.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::collections::BTreeSet;

use lab::Redirect;
use lab::attack::{self, AttackOptions, KNOWN_TO_SUCCEED, Verdict};
use support::{can_run, turn};

/// The list of attacks that are known to succeed is exact: neither more nor fewer do.
#[test]
fn attacks_are_held_off() {
    if !can_run("attacks_are_held_off") {
        return;
    }
    let _turn = turn();
    let rows = attack::run(&AttackOptions {
        what: "all".to_owned(),
        name: None,
        redirect: Redirect::Ebpf,
        ztunnel: None,
        quick: true,
        json: None,
    })
    .unwrap();
    println!("{}", attack::report(&rows));
    assert!(rows.len() > 150, "only {} attacks", rows.len());
    let skipped: Vec<_> = rows
        .iter()
        .filter(|row| row.verdict == Verdict::Skipped)
        .map(|row| row.name.as_str())
        .collect();
    assert!(skipped.is_empty(), "not tried: {skipped:?}");
    let broke: BTreeSet<_> = rows
        .iter()
        .filter(|row| row.verdict == Verdict::Broke)
        .map(|row| row.name.as_str())
        .collect();
    let known: BTreeSet<_> = KNOWN_TO_SUCCEED.iter().map(|(name, _)| *name).collect();
    let news: Vec<_> = rows
        .iter()
        .filter(|row| row.verdict == Verdict::Broke && !known.contains(row.name.as_str()))
        .map(|row| format!("{}: {}", row.name, row.happened))
        .collect();
    assert!(
        news.is_empty(),
        "got what they must not:\n{}",
        news.join("\n")
    );
    let held: Vec<_> = known.difference(&broke).collect();
    assert!(
        held.is_empty(),
        "held off by now, so off the list: {held:?}"
    );
}
