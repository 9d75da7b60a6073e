//! What of ours is there, for people and for comparing.

use super::rules::{IN, OUT, PEER_IN, PEER_OUT, POD_SET};
use crate::error::Result;
use crate::system::command;
use crate::system::iptables::{self, Family, Iptables};

/// Our rules, routes, set entries and links in one namespace.
pub(super) fn of(place: &str, iptables: Iptables) -> Result<Vec<String>> {
    let mut all = Vec::new();
    let rules = command::ip("rule show")?;
    let own = |line: &&str| {
        let pref = line.split(':').next().unwrap_or_default();
        [
            "98", "99", "100", "101", "102", "103", "104", "20000", "20003",
        ]
        .contains(&pref)
    };
    all.extend(
        rules
            .lines()
            .filter(own)
            .map(|line| format!("ip rule {line}")),
    );
    for table in [100, 101, 102] {
        // A table that does not exist is an error.
        let routes = command::ip(&format!("route show table {table}")).unwrap_or_default();
        all.extend(
            routes
                .lines()
                .map(|line| format!("ip route table {table} {line}")),
        );
    }
    let set = command::run("ipset", &["save", POD_SET]).unwrap_or_default();
    // The line that makes the set has its hash's seed.
    all.extend(set.lines().filter_map(|line| {
        let line = line
            .strip_prefix("add ")
            .map(|entry| format!("ipset add {entry}"));
        line.or_else(|| Some(format!("ipset create {POD_SET}")))
    }));
    for name in [IN, OUT, PEER_IN, PEER_OUT] {
        let shown = command::ip(&format!("-br link show dev {name}"));
        all.extend(shown.is_ok().then(|| format!("link {name}")));
    }
    let chains = iptables::lines(Family::V4, iptables)?;
    all.extend(chains.into_iter().map(|line| format!("iptables {line}")));
    // A machine without IPv6 may lack the tool, too.
    let chains = iptables::lines(Family::V6, iptables).unwrap_or_default();
    all.extend(chains.into_iter().map(|line| format!("ip6tables {line}")));
    let one_blank = |line: String| line.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok(all
        .into_iter()
        .map(|line| format!("{place} {}", one_blank(line)))
        .collect())
}
