//! `docs/security.md` names a test for each of its lines, and each test that it names exists.
//!
//! A name stands in backticks: `crate: test`, `crate: module::test` where a crate has several of
//! one name, or `attack: name` for one of `lab attack`, whose names are the strings in its sources
//! (a format string `"{name}-suffix"` puts one together).

use std::collections::HashMap;

use crate::mask::mask;
use crate::rules::{Finding, Source};

/// The document, from the top of the tree.
pub const SECURITY: &str = "docs/security.md";

/// Where the attacks are.
const ATTACKS: &str = "bench/lab/src/attack/";

/// What is wrong with the document, given all sources and the directory of each crate by its name.
pub fn check_security(
    document: &str,
    sources: &[Source],
    crates: &HashMap<String, String>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in document.lines().enumerate() {
        let mut add = |message: String| {
            findings.push(Finding {
                path: SECURITY.to_owned(),
                line: index + 1,
                message,
            });
        };
        let names = names(line);
        let ruled = document.lines().nth(index + 1).is_some_and(is_rule);
        if line.starts_with('|') && !is_rule(line) && !ruled && names.is_empty() {
            add("names no test: `crate: test` or `attack: name`".to_owned());
        }
        for (owner, name) in names {
            let exists = match owner {
                "attack" => is_attack(name, sources),
                owner => crates
                    .get(owner)
                    .is_some_and(|dir| is_test(name, dir, sources)),
            };
            if !exists {
                add(format!(
                    "`{owner}: {name}` does not exist: name the test that shows it"
                ));
            }
        }
    }
    findings
}

/// The line below a table's head.
fn is_rule(line: &str) -> bool {
    line.starts_with('|') && line.chars().all(|c| matches!(c, '|' | '-' | ' ' | ':'))
}

/// What stands in backticks and is a name of a test: whose, and which.
fn names(line: &str) -> Vec<(&str, &str)> {
    let quoted = line.split('`').skip(1).step_by(2);
    let fits = |text: &str| {
        let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | ':');
        !text.is_empty() && text.chars().all(fine)
    };
    quoted
        .filter_map(|text| text.split_once(": "))
        .filter(|(owner, name)| fits(owner) && fits(name))
        .collect()
}

/// Whether a `#[test]` function below `directory` has this name, in a file of the module's name if
/// one is given.
fn is_test(name: &str, directory: &str, sources: &[Source]) -> bool {
    let (module, name) = match name.rsplit_once("::") {
        Some((module, name)) => (Some(module), name),
        None => (None, name),
    };
    sources.iter().any(|source| {
        let path = source.path.strip_suffix(".rs").unwrap_or(&source.path);
        let here = source.path.starts_with(directory)
            && module.is_none_or(|module| path.split('/').any(|part| part == module));
        here && source.text.contains(name) && has_test(&mask(&source.text), name)
    })
}

fn has_test(code: &str, name: &str) -> bool {
    let lines: Vec<&str> = code.lines().map(str::trim).collect();
    let function = format!("fn {name}(");
    (0..lines.len()).any(|at| {
        lines[at] == "#[test]"
            && lines[at + 1..]
                .iter()
                .find(|line| !line.starts_with("#[") && !line.is_empty())
                .is_some_and(|line| line.contains(&function))
    })
}

/// Whether the attacks' sources hold this name, whole or put together.
fn is_attack(name: &str, sources: &[Source]) -> bool {
    let holds = |text: &str| {
        let attacks = sources
            .iter()
            .filter(|source| source.path.starts_with(ATTACKS));
        attacks.into_iter().any(|source| source.text.contains(text))
    };
    let put_together = name.match_indices('-').any(|(at, _)| {
        holds(&format!("\"{}\"", &name[..at])) && holds(&format!("\"{{name}}{}\"", &name[at..]))
    });
    put_together || holds(&format!("\"{name}\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCES: [(&str, &str); 3] = [
        (
            "a/x/src/one.rs",
            "#[test]\n#[ignore]\nfn real() {}\nfn helper() {}\n",
        ),
        ("a/x/src/two.rs", "// #[test]\n// fn gone() {}\n"),
        (
            "bench/lab/src/attack/y.rs",
            "[\"flood\"] format!(\"{name}-unread\")\n",
        ),
    ];

    fn about(line: &str) -> usize {
        let source = |(path, text): (&str, &str)| Source {
            path: path.to_owned(),
            text: text.to_owned(),
        };
        let sources = SOURCES.map(source);
        let crates = HashMap::from([("x".to_owned(), "a/x/".to_owned())]);
        let document = format!("| what | test |\n| --- | --- |\n{line}\n");
        check_security(&document, &sources, &crates).len()
    }

    #[test]
    fn each_line_names_tests_and_each_of_them_exists() {
        for fine in [
            "| a | `x: real` |",
            "| a | `x: one::real`, `attack: flood` |",
            "| a | `attack: flood-unread` |",
            "Text with `code: of another kind` and none.",
        ] {
            assert_eq!(about(fine), 0, "{fine}");
        }
        for wrong in [
            "| a | b |",
            "| a | `x: helper` |",
            "| a | `x: gone` |",
            "| a | `x: two::real` |",
            "| a | `y: real` |",
            "| a | `attack: floo` |",
            "| a | `attack: flood-unrea` |",
        ] {
            assert_eq!(about(wrong), 1, "{wrong}");
        }
    }
}
