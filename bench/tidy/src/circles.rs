//! No crate has files that import each other in a circle.
//!
//! A module and what is below it may: they are one thing in several files. Circles that there are
//! today stand in `import-circles.txt`, each with its files and why; the list only ever gets
//! shorter.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::imports::Imports;
use crate::rules::{Finding, Source};

/// The list, from the top of the tree.
pub const CIRCLES: &str = "bench/tidy/import-circles.txt";

/// A circle that is allowed.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Allowed {
    line: usize,
    crate_name: String,
    files: BTreeSet<String>,
}

/// Circles beyond those that `list` allows, and lines of it that are no longer needed as they are.
pub fn check_circles(
    list: &str,
    sources: &[Source],
    crates: &HashMap<String, String>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut allowed = Vec::new();
    for (index, line) in list.lines().enumerate() {
        match parse(index + 1, line) {
            Ok(entry) => allowed.extend(entry),
            Err(message) => findings.push(finding(CIRCLES, index + 1, message)),
        }
    }
    let mut needed = BTreeMap::new();
    for (name, directory) in crates {
        let place = format!("{directory}src/");
        for circle in circles(&Imports::read(&place, sources).arrows()) {
            let entry = allowed.iter().find(|entry| {
                entry.crate_name == *name && circle.iter().all(|file| entry.files.contains(*file))
            });
            match entry {
                Some(entry) => {
                    let files = needed.entry(entry.line).or_insert_with(BTreeSet::new);
                    files.extend(circle.into_iter().map(str::to_owned));
                }
                None => {
                    let files = circle.join(", ");
                    let message = format!("files import each other in a circle: {files}");
                    findings.push(finding(&place, 0, message));
                }
            }
        }
    }
    for entry in allowed {
        let left = needed.remove(&entry.line).unwrap_or_default();
        if left.is_empty() {
            let message = "this circle is gone: remove its line".to_owned();
            findings.push(finding(CIRCLES, entry.line, message));
        } else if left != entry.files {
            let gone: Vec<_> = entry.files.difference(&left).map(String::as_str).collect();
            let message = format!("no longer in the circle, remove: {}", gone.join(", "));
            findings.push(finding(CIRCLES, entry.line, message));
        }
    }
    findings
}

fn finding(path: &str, line: usize, message: String) -> Finding {
    Finding {
        path: path.to_owned(),
        line,
        message,
    }
}

/// `crate: file file ... # why`; None for an empty line or a comment.
fn parse(number: usize, line: &str) -> Result<Option<Allowed>, String> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let form = || "must be `crate: file file ... # why it is there still`".to_owned();
    let (entry, why) = line.split_once('#').ok_or_else(form)?;
    let (name, files) = entry.split_once(':').ok_or_else(form)?;
    let files: BTreeSet<_> = files.split_whitespace().map(str::to_owned).collect();
    if why.trim().is_empty() || files.len() < 2 {
        return Err(form());
    }
    Ok(Some(Allowed {
        line: number,
        crate_name: name.trim().to_owned(),
        files,
    }))
}

/// Groups of two or more files each of which reaches all others of its group.
fn circles<'a>(arrows: &BTreeMap<&'a str, BTreeSet<&'a str>>) -> Vec<Vec<&'a str>> {
    let reach: BTreeMap<&str, BTreeSet<&str>> = arrows
        .keys()
        .map(|from| (*from, reachable(arrows, from)))
        .collect();
    let mut circles = Vec::new();
    let mut done = BTreeSet::new();
    for (from, reached) in &reach {
        if !reached.contains(from) || done.contains(from) {
            continue;
        }
        let back = |to: &&&'a str| {
            reach
                .get(**to)
                .is_some_and(|reached| reached.contains(from))
        };
        let circle: Vec<&'a str> = reached.iter().filter(back).copied().collect();
        done.extend(circle.iter().copied());
        circles.push(circle);
    }
    circles
}

/// What is reached by one arrow or more.
fn reachable<'a>(arrows: &BTreeMap<&'a str, BTreeSet<&'a str>>, from: &str) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::new();
    let mut next: Vec<&str> = vec![from];
    while let Some(at) = next.pop() {
        for to in arrows.get(at).into_iter().flatten() {
            if reached.insert(*to) {
                next.push(to);
            }
        }
    }
    reached
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(list: &str, files: &[(&str, &str)]) -> Vec<String> {
        let sources: Vec<_> = files
            .iter()
            .map(|(file, text)| Source {
                path: format!("c/src/{file}"),
                text: (*text).to_owned(),
            })
            .collect();
        let crates = HashMap::from([("c".to_owned(), "c/".to_owned())]);
        let findings = check_circles(list, &sources, &crates);
        findings
            .into_iter()
            .map(|finding| finding.message)
            .collect()
    }

    const A_B: &str = "files import each other in a circle: a.rs, b.rs";

    #[test]
    fn a_circle_is_found_however_it_is_written() {
        let ways = [
            "use crate::b::B;",
            "use super::b::B;",
            "use crate::{x::X, b::{self, B as Other}};",
            "use crate::b;",
            "use crate::b::*;",
            "pub(crate) use crate::b::B;",
            "fn f() -> crate::b::B { }",
            "fn f() { super::b::go() }",
            // As passed on by the top.
            "use crate::B;",
            "use super::B;",
            "fn f() -> crate::B { }",
        ];
        let top = "mod a; mod b; mod x; pub use b::B;";
        for way in ways {
            let files = [
                ("lib.rs", top),
                ("a.rs", way),
                ("b.rs", "use crate::a::A;"),
                ("x.rs", ""),
            ];
            assert_eq!(found("", &files), [A_B], "{way}");
        }
    }

    #[test]
    fn a_circle_goes_through_several_files_and_folders() {
        let files = [
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a/mod.rs", "mod inner;"),
            ("a/inner.rs", "use crate::b::B;"),
            ("b.rs", "use crate::c; fn f() { c::go() }"),
            ("c.rs", "use crate::a::inner::I;"),
        ];
        let all = "files import each other in a circle: a/inner.rs, b.rs, c.rs";
        assert_eq!(found("", &files), [all]);
    }

    #[test]
    fn a_module_in_one_file_reached_through_another_counts() {
        let files = [
            ("lib.rs", "mod a; mod s;"),
            ("a.rs", "use crate::s; fn f() { s::low::go() }"),
            ("s/mod.rs", "pub(crate) mod low;"),
            ("s/low.rs", "use crate::a::A;"),
        ];
        let both = "files import each other in a circle: a.rs, s/low.rs";
        assert_eq!(found("", &files), [both]);
    }

    #[test]
    fn what_is_no_circle_is_none() {
        let cases: [&[(&str, &str)]; 6] = [
            // One way, by either writing.
            &[
                ("lib.rs", "mod a; mod b;"),
                ("a.rs", "use crate::b::B;"),
                ("b.rs", ""),
            ],
            // A module and what is below it.
            &[
                ("lib.rs", "mod a;"),
                ("a/mod.rs", "mod b; use b::B;"),
                ("a/b.rs", "use super::A; use crate::a::Other;"),
            ],
            // Tests.
            &[
                ("lib.rs", "mod a; mod b;"),
                ("a.rs", "use crate::b::B;"),
                (
                    "b.rs",
                    "#[cfg(test)]\nmod tests {\n    use crate::a::A;\n}\n",
                ),
            ],
            &[
                ("lib.rs", "#[cfg(test)] mod support; mod b;"),
                ("support.rs", "use crate::b::B;"),
                ("b.rs", "use crate::support::S;"),
            ],
            // Comments, strings, other crates and names alike.
            &[
                ("lib.rs", "mod a; mod b;"),
                ("a.rs", "use crate::b::B;"),
                (
                    "b.rs",
                    "// use crate::a::A;\nfn f() { g(\"crate::a::A\"); } use a::A;",
                ),
            ],
            &[
                ("lib.rs", "mod a; mod b;"),
                (
                    "a.rs",
                    "use crate::b::B; fn f<'a>() -> impl X + use<'a> { }",
                ),
                ("b.rs", "fn g(a: u8) { a::b() }"),
            ],
        ];
        for files in cases {
            assert_eq!(found("", files), [""; 0], "{files:?}");
        }
    }

    #[test]
    fn the_list_only_gets_shorter() {
        let files = [
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use crate::b::B;"),
            ("b.rs", "use crate::a::A;"),
            ("c.rs", ""),
        ];
        assert_eq!(found("# comment\n\nc: a.rs b.rs # why", &files), [""; 0]);
        let shrunk = found("c: a.rs b.rs c.rs # why", &files);
        assert_eq!(shrunk, ["no longer in the circle, remove: c.rs"]);
        let gone = found("c: a.rs b.rs # why\nc: b.rs c.rs # why", &files);
        assert_eq!(gone, ["this circle is gone: remove its line"]);
        for malformed in [
            "c: a.rs b.rs",
            "c: a.rs # why",
            "a.rs b.rs # why",
            "c: a.rs b.rs #",
        ] {
            let all = found(malformed, &files);
            assert!(
                all.iter().any(|m| m.starts_with("must be")),
                "{malformed}: {all:?}"
            );
        }
        let grown = found("c: a.rs c.rs # why", &files);
        assert!(grown.contains(&A_B.to_owned()), "{grown:?}");
    }
}
