//! The rules.

use std::fmt;

use crate::functions::functions;
use crate::mask::mask;
use crate::ratchet::Ratchet;

/// Columns of a line.
pub const COLUMNS_MAX: usize = 100;
/// Lines of a function that is not a test.
pub const FUNCTION_LINES_MAX: usize = 70;
/// Lines of a file, tests not counted.
pub const FILE_LINES_MAX: usize = 600;
/// Crates that may have `unsafe`, as path prefixes.
pub const UNSAFE_CRATES: [&str; 2] = ["dataplane/rt/", "bpf/redirect/"];

/// Words that stand for work left undone. Put together here so that this file is clean itself.
const LEFT_UNDONE: [&str; 3] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("X", "XX"),
];

/// A source file.
#[derive(Clone, Debug)]
pub struct Source {
    /// Path from the top of the tree.
    pub path: String,
    /// What is in it.
    pub text: String,
}

/// A broken rule.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Finding {
    /// The file.
    pub path: String,
    /// The line, from 1; 0 for the file as a whole.
    pub line: usize,
    /// What is wrong, and what to do.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.message)
    }
}

/// All findings, sorted.
pub fn check(sources: &[Source], mut ratchet: Ratchet) -> Vec<Finding> {
    let mut findings = Vec::new();
    for source in sources {
        let mut add = |line, message: String| {
            findings.push(Finding {
                path: source.path.clone(),
                line,
                message,
            });
        };
        let code = mask(&source.text);
        let tests_from = first_test_line(source, &code);
        check_text(source, &code, tests_from, &mut add);
        check_code(source, &code, tests_from, &mut add);
        check_size(source, &code, tests_from, &mut ratchet, &mut add);
    }
    findings.extend(ratchet.left().map(|(path, function)| Finding {
        path: path.to_owned(),
        line: 0,
        message: format!(
            "long-functions.txt lists `{function}`, which is short or gone: remove its line"
        ),
    }));
    findings.sort();
    findings
}

/// The line on which a file's tests begin, from 0; that after the last if there are none.
pub(crate) fn first_test_line(source: &Source, code: &str) -> usize {
    if is_test_file(&source.path) {
        return 0;
    }
    let lines: Vec<_> = code.lines().map(str::trim).collect();
    let module = |line: &str| line.contains("mod ") && line.ends_with('{');
    let start = (0..lines.len()).find(|&i| {
        let attributes = lines[i + 1..]
            .iter()
            .take_while(|line| line.starts_with("#["));
        let after = i + 1 + attributes.count();
        lines[i] == "#[cfg(test)]" && lines.get(after).is_some_and(|line| module(line))
    });
    start.unwrap_or(lines.len())
}

/// Whether a whole file is tests or benchmarks, by its place or name.
pub(crate) fn is_test_file(path: &str) -> bool {
    let (directories, name) = path.rsplit_once('/').unwrap_or(("", path));
    let stem = name.split('.').next().unwrap_or_default();
    directories
        .split('/')
        .any(|d| matches!(d, "tests" | "benches"))
        || matches!(stem, "tests" | "test" | "testing")
        || stem.ends_with("_tests")
}

fn check_text(source: &Source, code: &str, tests_from: usize, add: &mut impl FnMut(usize, String)) {
    for (index, (line, code)) in source.text.lines().zip(code.lines()).enumerate() {
        let columns = line.chars().count();
        // Test data stays as it is: a table's rows, the lines of a configuration file.
        let is_comment = line.trim_start().starts_with("//");
        let is_data = index >= tests_from && code != line && !is_comment;
        if columns > COLUMNS_MAX && !is_data {
            add(
                index + 1,
                format!("{columns} columns: at most {COLUMNS_MAX}"),
            );
        }
        for undone in LEFT_UNDONE {
            if has_word(line, undone) {
                add(
                    index + 1,
                    format!("{undone}: do it, or file it and say why not here"),
                );
            }
        }
    }
}

fn check_code(source: &Source, code: &str, tests_from: usize, add: &mut impl FnMut(usize, String)) {
    if !source.path.ends_with(".rs") {
        return;
    }
    let may_be_unsafe = UNSAFE_CRATES
        .iter()
        .any(|prefix| source.path.starts_with(prefix));
    for (index, line) in code.lines().enumerate() {
        if index < tests_from && line.contains(".unwrap()") {
            add(
                index + 1,
                "unwrap() outside tests: handle it, or state the invariant".to_owned(),
            );
        }
        if !may_be_unsafe && has_word(line, "unsafe") {
            add(
                index + 1,
                "unsafe: belongs into dataplane/rt or bpf/redirect".to_owned(),
            );
        }
    }
    let name = source.path.rsplit('/').next().unwrap_or_default();
    let is_root = source.path.contains("/src/bin/")
        || source.path.ends_with("/src/lib.rs")
        || source.path.ends_with("/src/main.rs");
    if is_root && !may_be_unsafe && !code.contains("#![forbid(unsafe_code)]") {
        add(
            0,
            format!("#![forbid(unsafe_code)] is missing at the top of {name}"),
        );
    }
}

fn check_size(
    source: &Source,
    code: &str,
    tests_from: usize,
    ratchet: &mut Ratchet,
    add: &mut impl FnMut(usize, String),
) {
    if tests_from > FILE_LINES_MAX {
        add(
            0,
            format!("{tests_from} lines without tests: split it, at most {FILE_LINES_MAX}"),
        );
    }
    for function in functions(code, !source.path.ends_with(".rs")) {
        let (name, lines) = (&function.name, function.lines);
        if lines <= FUNCTION_LINES_MAX || function.line > tests_from {
            continue;
        }
        let allowed = ratchet
            .take(&source.path, name)
            .unwrap_or(FUNCTION_LINES_MAX);
        if lines > allowed {
            add(
                function.line,
                format!("`{name}` has {lines} lines: split it, at most {allowed}"),
            );
        }
    }
}

fn has_word(line: &str, word: &str) -> bool {
    let joins = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(joins) && !line[at + word.len()..].starts_with(joins))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The messages about one file, each cut at its first colon.
    fn about(path: &str, text: &str, ratchet: &str) -> Vec<(usize, String)> {
        let source = Source {
            path: path.to_owned(),
            text: text.to_owned(),
        };
        let found = check(&[source], Ratchet::parse(ratchet).unwrap());
        let cut = |f: Finding| (f.line, f.message.split(':').next().unwrap().to_owned());
        found.into_iter().map(cut).collect()
    }

    fn long(lines: usize) -> String {
        format!("fn f() {{\n{}}}\n", "    x();\n".repeat(lines - 2))
    }

    #[test]
    fn lines_and_words() {
        assert_eq!(about("a/x.rs", &"é".repeat(100), ""), []);
        assert_eq!(
            about("a/x.c", &"é".repeat(101), ""),
            [(1, "101 columns".to_owned())]
        );
        let text = format!("a\n// {} b\n{}S\n", LEFT_UNDONE[0], LEFT_UNDONE[1]);
        assert_eq!(about("a/x.h", &text, ""), [(2, LEFT_UNDONE[0].to_owned())]);
    }

    #[test]
    fn functions_and_their_ratchet() {
        let listed = |lines| format!("# comment\na/x.rs f {lines}\n");
        assert_eq!(about("a/x.rs", &long(70), ""), []);
        assert_eq!(about("a/x.rs", &long(71), "").len(), 1);
        assert_eq!(
            about("a/tests/x.rs", &long(71), ""),
            [],
            "tables of cases may be long"
        );
        assert_eq!(about("a/x.rs", &long(80), &listed(80)), []);
        assert_eq!(about("a/x.rs", &long(81), &listed(80)).len(), 1, "it grew");
        assert_eq!(about("a/x.rs", &long(75), &listed(80)), [], "it may shrink");
        assert_eq!(
            about("a/x.rs", &long(70), &listed(80)).len(),
            1,
            "the line must go"
        );
        assert!(Ratchet::parse("a b\n").is_err() && Ratchet::parse("a b c\n").is_err());
    }

    #[test]
    fn file_length_without_tests() {
        let code = "x();\n".repeat(FILE_LINES_MAX);
        let tests = "#[cfg(test)]\n#[rustfmt::skip]\nmod tests {\n    x.unwrap();\n}\n";
        assert_eq!(about("a/x.rs", &format!("{code}{tests}"), ""), []);
        assert_eq!(
            about("a/x.rs", &format!("{code}y();\n{tests}"), "").len(),
            1
        );
        assert_eq!(about("a/tests/x.rs", &format!("{code}y();\n"), ""), []);
        assert_eq!(about("a/x/tests.rs", &format!("{code}y();\n"), ""), []);
    }

    #[test]
    fn unwrap_and_unsafe() {
        let text = "fn f() {\n    a.unwrap(); // b.unwrap()\n    let x = \"c.unwrap()\";\n}\n";
        let message = "unwrap() outside tests".to_owned();
        assert_eq!(about("a/x.rs", text, ""), [(2, message)]);
        assert_eq!(about("a/x_tests.rs", text, ""), []);
        let text = "// unsafe\nfn f() { unsafe { g() } }\n";
        assert_eq!(
            about("dataplane/tls/src/x.rs", text, ""),
            [(2, "unsafe".to_owned())]
        );
        assert_eq!(about("dataplane/rt/src/x.rs", text, ""), []);
    }

    #[test]
    fn crates_forbid_unsafe() {
        let plain = "//! Text.\n";
        let forbids = "//! Text.\n#![forbid(unsafe_code)]\n";
        for root in ["a/src/lib.rs", "a/src/main.rs", "a/src/bin/b.rs"] {
            assert_eq!(about(root, plain, "").len(), 1, "{root}");
            assert_eq!(about(root, forbids, ""), [], "{root}");
            assert_eq!(
                about(root, "// #![forbid(unsafe_code)]\n", "").len(),
                1,
                "{root}"
            );
        }
        assert_eq!(about("dataplane/rt/src/lib.rs", plain, ""), []);
        assert_eq!(about("a/src/other.rs", plain, ""), []);
    }
}
