//! `make check` looks at the crates whose files have changed.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    reason = "a helper that fails is a test that fails"
)]

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// The crates that `scripts/check.sh` would look at if these files had changed.
fn crates(files: &[&str]) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut child = Command::new(root.join("scripts/check.sh"))
        .arg("--list")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let names: String = files.iter().map(|file| format!("{file}\n")).collect();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(names.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn a_changed_file_is_checked_with_its_crate() {
    let cases: [(&[&str], &[&str]); 6] = [
        (&["dataplane/mesh/src/route.rs"], &["mesh"]),
        (
            &[
                "loadgen/src/main.rs",
                "dataplane/rt/Cargo.toml",
                "dataplane/rt/src/lib.rs",
            ],
            &["rt", "loadgen"],
        ),
        (&["bpf/src/redirect.bpf.c"], &["redirect"]),
        (&["bpf/redirect/src/lib.rs"], &["redirect"]),
        (
            &[
                "README.md",
                "docs/metrics.md",
                "Cargo.lock",
                "scripts/test.sh",
            ],
            &[],
        ),
        (&[], &[]),
    ];
    for (files, expected) in cases {
        assert_eq!(crates(files), expected, "{files:?}");
    }
}

#[test]
fn what_concerns_every_crate_has_every_crate_checked() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let root = root.canonicalize().unwrap();
    let mut all: Vec<_> = tidy::crates(&root).unwrap().into_keys().collect();
    all.sort();
    for file in ["Cargo.toml", "clippy.toml"] {
        let mut checked = crates(&[file]);
        checked.sort();
        assert_eq!(checked, all, "{file}");
    }
}
