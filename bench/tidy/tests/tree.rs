//! This tree keeps the house rules.
#![forbid(unsafe_code)]

use std::path::Path;

use tidy::{Ratchet, SECURITY, check, check_security, crates, sources};

#[test]
fn the_tree_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap();
    let ratchet = Ratchet::parse(include_str!("../long-functions.txt")).unwrap();
    let sources = sources(&root).unwrap();
    assert!(
        sources.len() > 20,
        "only {} sources below {}",
        sources.len(),
        root.display()
    );
    let mut findings = check(&sources, ratchet);
    let document = std::fs::read_to_string(root.join(SECURITY)).unwrap();
    let crates = crates(&root).unwrap();
    assert!(crates.len() > 10, "{crates:?}");
    findings.extend(check_security(&document, &sources, &crates));
    let list: Vec<_> = findings.iter().map(ToString::to_string).collect();
    assert!(
        findings.is_empty(),
        "{} findings:\n{}",
        list.len(),
        list.join("\n")
    );
}
