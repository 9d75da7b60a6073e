//! This tree keeps the house rules.
#![forbid(unsafe_code)]

use std::path::Path;

use tidy::{
    MAP, Ratchet, SECURITY, check, check_circles, check_map, check_security, crates, dependencies,
    sources,
};

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
    let circles = include_str!("../import-circles.txt");
    findings.extend(check_circles(circles, &sources, &crates));
    let map = std::fs::read_to_string(root.join(MAP)).unwrap();
    let dependencies = dependencies(&root, &crates).unwrap();
    assert!(dependencies.contains_key("ztunnel"), "{dependencies:?}");
    let exists = |folder: &str| root.join(folder).is_dir();
    findings.extend(check_map(&map, &crates, &dependencies, exists));
    let list: Vec<_> = findings.iter().map(ToString::to_string).collect();
    assert!(
        findings.is_empty(),
        "{} findings:\n{}",
        list.len(),
        list.join("\n")
    );
}
