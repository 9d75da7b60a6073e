//! `ARCHITECTURE.md` names every crate and every arrow between crates, and no others.
//!
//! Its blocks of code are read: lines that end in a slash are folders, two blanks deeper than the
//! one that they are in; `a -> b, c` says what a crate is built from. What its tests alone need is
//! not counted.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::rules::Finding;

/// The document, from the top of the tree.
pub const MAP: &str = "ARCHITECTURE.md";

/// What is wrong with the document, given the directory of each crate by its name and which others
/// of the workspace each is built from. `exists` is of a directory.
pub fn check_map(
    document: &str,
    crates: &HashMap<String, String>,
    dependencies: &BTreeMap<String, BTreeSet<String>>,
    exists: impl Fn(&str) -> bool,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |line: usize, message: String| {
        findings.push(Finding {
            path: MAP.to_owned(),
            line,
            message,
        });
    };
    let (mut folders, mut drawn) = (BTreeSet::new(), BTreeMap::new());
    let mut parent = "";
    for (number, line) in block_lines(document) {
        let word = line.split_whitespace().next().unwrap_or_default();
        let arrow = line.split_once(" -> ").filter(|(from, _)| *from == word);
        if let Some((from, to)) = arrow {
            let to: BTreeSet<_> = to.split(", ").map(|name| name.trim().to_owned()).collect();
            if drawn.insert(from.to_owned(), (number, to)).is_some() {
                add(number, format!("`{from}` has two lines: make them one"));
            }
        } else if word.ends_with('/') && line.starts_with(word) {
            parent = word;
            folders.insert((number, word.to_owned()));
        } else if word.ends_with('/') && line.strip_prefix("  ") == Some(line.trim_start()) {
            folders.insert((number, format!("{parent}{word}")));
        }
    }
    for (number, folder) in &folders {
        if !exists(folder) {
            add(*number, format!("`{folder}` does not exist"));
        }
    }
    let named: BTreeSet<&str> = folders.iter().map(|(_, folder)| folder.as_str()).collect();
    let mut missing: Vec<_> = crates
        .iter()
        .filter(|(_, directory)| !named.contains(directory.as_str()))
        .collect();
    missing.sort();
    for (name, directory) in missing {
        add(
            0,
            format!("crate `{name}` is not in the tree: add `{directory}` and what it is for"),
        );
    }
    for (name, wanted) in dependencies {
        let (number, told) = drawn.remove(name).unwrap_or_default();
        for to in wanted.difference(&told) {
            add(number, format!("`{name} -> {to}` is not drawn"));
        }
        for to in told.difference(wanted) {
            add(
                number,
                format!("`{name} -> {to}` is drawn, and Cargo.toml does not have it"),
            );
        }
    }
    for (from, (number, _)) in drawn {
        add(
            number,
            format!("`{from}` is no crate that needs others of the workspace"),
        );
    }
    findings
}

/// Lines of the document's blocks of code, with their numbers from 1.
fn block_lines(document: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut is_inside = false;
    document.lines().zip(1..).filter_map(move |(line, number)| {
        let is_fence = line.starts_with("```");
        is_inside ^= is_fence;
        (is_inside && !is_fence).then_some((number, line))
    })
}

/// What a manifest takes from the workspace, tests' needs left out.
pub(crate) fn needs(manifest: &str, crates: &HashMap<String, String>) -> BTreeSet<String> {
    let mut counts = false;
    let mut needs = BTreeSet::new();
    for line in manifest.lines() {
        if let Some(section) = line.strip_prefix('[') {
            let section = section.trim_end_matches(']');
            counts = section.ends_with("dependencies") && !section.ends_with("dev-dependencies");
        } else if counts {
            let end = line.find(['.', ' ', '=']).unwrap_or(line.len());
            let name = &line[..end];
            needs.extend(crates.contains_key(name).then(|| name.to_owned()));
        }
    }
    needs
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOUND: &str = "text\n```\nplane/\n  one/  the first: a -> b is not an arrow here\n  \
        two/  another\n        words of it/\ntool/    a crate\nresults/ no crate\n```\n\n\
        ```\none -> two, tool\ntwo -> tool\n```\nnot -> read\n";

    fn found(document: &str) -> Vec<String> {
        let crates = [
            ("one", "plane/one/"),
            ("two", "plane/two/"),
            ("tool", "tool/"),
        ];
        let crates = crates.map(|(name, directory)| (name.to_owned(), directory.to_owned()));
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let dependencies = BTreeMap::from([
            ("one".to_owned(), names(&["two", "tool"])),
            ("two".to_owned(), names(&["tool"])),
        ]);
        let exists = |folder: &str| !folder.contains("gone");
        let findings = check_map(document, &HashMap::from(crates), &dependencies, exists);
        findings
            .into_iter()
            .map(|finding| finding.message)
            .collect()
    }

    #[test]
    fn crates_and_arrows_are_those_of_the_manifests() {
        assert_eq!(found(SOUND), [""; 0]);
        for (from, to, expected) in [
            ("  two/  another\n", "", "crate `two` is not in the tree"),
            (
                "tool/    a",
                "      tool/    a",
                "crate `tool` is not in the tree",
            ),
            ("results/", "gone/", "`gone/` does not exist"),
            (
                "  two/",
                "  gone/ x\n  two/",
                "`plane/gone/` does not exist",
            ),
            (
                "one -> two, tool",
                "one -> two",
                "`one -> tool` is not drawn",
            ),
            ("two -> tool\n", "", "`two -> tool` is not drawn"),
            (
                "two -> tool",
                "two -> tool, one",
                "`two -> one` is drawn, and",
            ),
            (
                "two -> tool",
                "two -> tool\ntool -> one",
                "`tool` is no crate that needs",
            ),
            (
                "two -> tool",
                "two -> tool\ntwo -> one",
                "`two` has two lines",
            ),
        ] {
            assert!(SOUND.contains(from), "{from}");
            let messages = found(&SOUND.replace(from, to));
            assert!(
                messages.iter().any(|m| m.starts_with(expected)),
                "{to:?}: {messages:?}"
            );
        }
    }

    #[test]
    fn what_tests_alone_need_is_no_arrow() {
        let crates = ["a", "b", "c", "d"].map(|name| (name.to_owned(), format!("{name}/")));
        let crates = HashMap::from(crates);
        let manifest = "[package]\nname = \"x\"\nd = 1\n[dependencies]\na.workspace = true\nserde = \
            \"1\"\nb = { path = \"../b\" }\n[dev-dependencies]\nc.workspace = true\n\
            [target.'cfg(unix)'.dependencies]\nd = \"1\"\n";
        let needed: Vec<_> = needs(manifest, &crates).into_iter().collect();
        assert_eq!(needed, ["a", "b", "d"]);
    }
}
