//! Applying and removing our chains, each in one iptables-restore call.
//!
//! Our rules are in chains of our own, called from the head of the built-in ones, so that other
//! rules are left alone and ours can be told apart.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::command;
use crate::error::Result;

/// Prefix of our chains, and of nobody else's.
pub(crate) const CHAIN_PREFIX: &str = "ztunnel-";

/// Which of the two kinds of iptables is used. They do not see each other's rules.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Iptables {
    /// What `iptables-restore` is on this system.
    #[default]
    Auto,
    /// nftables in the kernel.
    Nft,
    /// The original one.
    Legacy,
}

/// One table's part of a restore file: our chains, the built-in chains they are called from, rules.
pub(crate) struct Table {
    pub(crate) name: &'static str,
    pub(crate) hooks: Vec<&'static str>,
    pub(crate) rules: Vec<String>,
}

/// Which of the two IP versions' rules.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Family {
    #[default]
    V4,
    V6,
}

pub(crate) const TABLES: [&str; 3] = ["mangle", "nat", "filter"];

/// Replaces what our chains hold, all tables in one call; rules of others stay.
pub(crate) fn apply(family: Family, kind: Iptables, tables: &[Table]) -> Result<()> {
    let mut script = String::new();
    for table in tables {
        script += &apply_script(table, &save(family, kind, table.name, &[])?);
    }
    restore(family, kind, &script)
}

/// Removes our chains and the calls of them; that there are none is fine.
pub(crate) fn remove(family: Family, kind: Iptables) -> Result<()> {
    let mut script = String::new();
    for table in TABLES {
        script += &remove_script(table, &save(family, kind, table, &[])?);
    }
    if script.is_empty() {
        Ok(())
    } else {
        restore(family, kind, &script)
    }
}

/// Our chains, the calls of them and their rules, as they are.
pub(crate) fn lines(family: Family, kind: Iptables) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for table in TABLES {
        let saved = save(family, kind, table, &[])?;
        let own = saved.lines().filter(|line| line.contains(CHAIN_PREFIX));
        // A chain's counters are not part of it.
        let own = own.map(|line| line.split(" [").next().unwrap_or(line).trim());
        all.extend(own.map(|line| format!("{table} {line}")));
    }
    Ok(all)
}

/// Packets by rule of ours that have seen any.
pub(crate) fn counters(family: Family, kind: Iptables) -> Result<BTreeMap<String, u64>> {
    let mut all = BTreeMap::new();
    for table in TABLES {
        let saved = save(family, kind, table, &["-c"])?;
        for line in saved.lines() {
            if let Some((rule, packets)) = counted(line).filter(|&(_, packets)| packets > 0) {
                all.insert(format!("{table} {rule}"), packets);
            }
        }
    }
    Ok(all)
}

/// `[packets:bytes] -A chain rule`, of our chains.
fn counted(line: &str) -> Option<(&str, u64)> {
    let (counts, rule) = line.strip_prefix('[')?.split_once("] ")?;
    let is_own = rule.starts_with(&format!("-A {CHAIN_PREFIX}"));
    let packets = counts.split_once(':')?.0.parse().ok()?;
    is_own.then_some((rule, packets))
}

fn program(family: Family, kind: Iptables, verb: &str) -> String {
    let name = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    match kind {
        Iptables::Auto => format!("{name}-{verb}"),
        Iptables::Nft => format!("{name}-nft-{verb}"),
        Iptables::Legacy => format!("{name}-legacy-{verb}"),
    }
}

fn save(family: Family, kind: Iptables, table: &str, options: &[&str]) -> Result<String> {
    let mut words = vec!["-t", table];
    words.extend(options);
    command::run(&program(family, kind, "save"), &words)
}

fn restore(family: Family, kind: Iptables, script: &str) -> Result<()> {
    let program = program(family, kind, "restore");
    command::run_with_input(&program, &["--wait=10", "--noflush"], script).map(drop)
}

fn jump(hook: &str) -> String {
    format!("{hook} -j {CHAIN_PREFIX}{hook}")
}

fn apply_script(table: &Table, saved: &str) -> String {
    let mut script = format!("*{}\n", table.name);
    for hook in &table.hooks {
        // Makes the chain, or empties it.
        script += &format!(":{CHAIN_PREFIX}{hook} - [0:0]\n");
    }
    for hook in &table.hooks {
        let called = format!("-A {}", jump(hook));
        if !saved.lines().any(|line| line.trim() == called) {
            script += &format!("-I {}\n", jump(hook));
        }
    }
    for rule in &table.rules {
        script += rule;
        script.push('\n');
    }
    script + "COMMIT\n"
}

fn remove_script(table: &str, saved: &str) -> String {
    let chains: Vec<&str> = saved
        .lines()
        .filter_map(|line| line.strip_prefix(':')?.split_whitespace().next())
        .filter(|chain| chain.starts_with(CHAIN_PREFIX))
        .collect();
    if chains.is_empty() {
        return String::new();
    }
    let mut script = format!("*{table}\n");
    for chain in &chains {
        let hook = &chain[CHAIN_PREFIX.len()..];
        let called = format!("-A {}", jump(hook));
        for _ in saved.lines().filter(|line| line.trim() == called) {
            script += &format!("-D {}\n", jump(hook));
        }
    }
    for verb in ["-F", "-X"] {
        for chain in &chains {
            script += &format!("{verb} {chain}\n");
        }
    }
    script + "COMMIT\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "\
# Generated by iptables-save\n*mangle\n:PREROUTING ACCEPT [0:0]\n:ztunnel-PREROUTING - [0:0]\n\
-A PREROUTING -j ztunnel-PREROUTING\n-A PREROUTING -j KUBE-X\n-A PREROUTING -j ztunnel-PREROUTING\n\
-A ztunnel-PREROUTING -i x -j RETURN\nCOMMIT\n";

    #[test]
    fn calls_are_added_once() {
        let table = Table {
            name: "mangle",
            hooks: vec!["PREROUTING"],
            rules: vec!["-A ztunnel-PREROUTING -j RETURN".to_owned()],
        };
        let fresh = apply_script(&table, "");
        assert!(
            fresh.contains("\n-I PREROUTING -j ztunnel-PREROUTING\n"),
            "{fresh}"
        );
        let again = apply_script(&table, SAVED);
        assert!(!again.contains("-I "), "{again}");
        assert!(again.contains(":ztunnel-PREROUTING - [0:0]\n"), "{again}");
    }

    #[test]
    fn counters_are_of_our_rules() {
        let line = "[12:720] -A ztunnel-PREROUTING -i x -j RETURN";
        assert_eq!(
            counted(line),
            Some(("-A ztunnel-PREROUTING -i x -j RETURN", 12))
        );
        assert_eq!(counted("[1:2] -A PREROUTING -j ztunnel-PREROUTING"), None);
        assert_eq!(counted(":ztunnel-PREROUTING - [0:0]"), None);
    }

    #[test]
    fn removal_takes_all_calls_and_no_other_rule() {
        let script = remove_script("mangle", SAVED);
        assert_eq!(
            script,
            "*mangle\n-D PREROUTING -j ztunnel-PREROUTING\n-D PREROUTING -j ztunnel-PREROUTING\n\
             -F ztunnel-PREROUTING\n-X ztunnel-PREROUTING\nCOMMIT\n"
        );
        assert_eq!(
            remove_script("nat", ":PREROUTING ACCEPT [0:0]\n-A PREROUTING -j KUBE-X\n"),
            ""
        );
    }
}
