//! Which files of a crate a file imports from.
//!
//! Read are `use` declarations and paths that begin with `crate`, `self`, `super` or a name that a
//! declaration brought in. A name that a module only passes on (`pub use`) counts for the file that
//! it comes from. What tests import does not count.

use std::collections::{BTreeMap, BTreeSet};

use crate::mask::mask;
use crate::rules::{Source, first_test_line, is_test_file};

/// How often a name may be passed on.
const HOPS_MAX: usize = 8;

type Path = Vec<String>;

/// The files of one crate, what each imports, and from where.
pub(crate) struct Imports {
    files: BTreeMap<Path, Module>,
}

struct Module {
    /// Below the crate's `src/`.
    file: String,
    /// What each name that is brought in stands for, from the top of the crate.
    names: BTreeMap<String, Path>,
    /// All that is named, from the top of the crate.
    paths: Vec<Path>,
}

impl Imports {
    /// Of the crate whose sources are in `directory`, which ends with a slash.
    pub(crate) fn read(directory: &str, sources: &[Source]) -> Self {
        let own: Vec<(&str, &Source)> = sources
            .iter()
            .filter_map(|source| Some((source.path.strip_prefix(directory)?, source)))
            .filter(|(file, source)| file.ends_with(".rs") && !is_test_file(&source.path))
            .filter(|(file, _)| !file.starts_with("bin/"))
            .collect();
        let mut files = BTreeMap::new();
        let mut only_tested = Vec::new();
        for (file, source) in own {
            let place = module_path(file);
            let tokens = tokens(&code_without_tests(source));
            only_tested.extend(
                tested_modules(&tokens)
                    .into_iter()
                    .map(|name| joined(&place, name)),
            );
            let module = files.entry(place.clone()).or_insert_with(|| Module {
                file: file.to_owned(),
                names: BTreeMap::new(),
                paths: Vec::new(),
            });
            module.add(&place, &tokens);
        }
        files.retain(|place, _| !only_tested.iter().any(|tested| place.starts_with(tested)));
        Self { files }
    }

    /// From which file to which others, without those between a module and what is below it.
    pub(crate) fn arrows(&self) -> BTreeMap<&str, BTreeSet<&str>> {
        let mut arrows = BTreeMap::new();
        for (place, module) in &self.files {
            let targets = module.paths.iter().map(|path| self.origin(path));
            let others = targets.filter(|target| {
                !target.starts_with(place.as_slice()) && !place.starts_with(target)
            });
            let others = others.filter_map(|target| Some(self.files.get(target)?.file.as_str()));
            arrows.insert(module.file.as_str(), others.collect());
        }
        arrows
    }

    /// The module in which what is named is declared.
    fn origin(&self, path: &[String]) -> &[String] {
        let mut path = path.to_vec();
        for _ in 0..HOPS_MAX {
            let (place, module) = self.module_of(&path);
            let passed_on = path
                .get(place.len())
                .and_then(|name| module?.names.get(name));
            match passed_on {
                Some(target) if !path.starts_with(target) => {
                    let rest = path.split_off(place.len() + 1);
                    path = target.iter().cloned().chain(rest).collect();
                }
                _ => return place,
            }
        }
        self.module_of(&path).0
    }

    /// The innermost module on the way.
    fn module_of(&self, path: &[String]) -> (&[String], Option<&Module>) {
        let mut lengths = (0..=path.len()).rev();
        let found = lengths.find_map(|length| self.files.get_key_value(&path[..length]));
        found.map_or((&[], None), |(place, module)| {
            (place.as_slice(), Some(module))
        })
    }
}

impl Module {
    fn add(&mut self, place: &[String], tokens: &[String]) {
        let mut at = 0;
        let mut expressions = Vec::new();
        while at < tokens.len() {
            let is_use = tokens[at] == "use" && tokens.get(at + 1).is_some_and(|t| t != "<");
            if is_use {
                let mut found = Vec::new();
                at = use_tree(tokens, at + 1, &[], &mut found);
                for (path, name) in found {
                    self.bring_in(place, &path, name);
                }
            } else if is_name(&tokens[at]) && tokens.get(at + 1).is_some_and(|t| t == "::") {
                let mut path = vec![tokens[at].clone()];
                while tokens.get(at + 1).is_some_and(|t| t == "::")
                    && tokens.get(at + 2).is_some_and(|t| is_name(t))
                {
                    at += 2;
                    path.push(tokens[at].clone());
                }
                expressions.push(path);
                at += 1;
            } else {
                at += 1;
            }
        }
        for path in expressions {
            let resolved = match self.names.get(&path[0]) {
                Some(target) => Some(target.iter().chain(&path[1..]).cloned().collect()),
                None => absolute(place, &path),
            };
            self.paths.extend(resolved);
        }
    }

    fn bring_in(&mut self, place: &[String], path: &[String], name: Option<String>) {
        let path = absolute(place, path).or_else(|| {
            // A child of this module, or another crate: what is no file here is let go later.
            let first = path.first().filter(|first| is_name(first))?;
            Some(
                joined(place, first)
                    .into_iter()
                    .chain(path[1..].iter().cloned())
                    .collect(),
            )
        });
        let Some(path) = path else {
            return;
        };
        if let Some(name) = name {
            self.names.insert(name, path.clone());
        }
        self.paths.push(path);
    }
}

/// `a/b.rs` and `a/b/mod.rs` are `a::b`; `lib.rs` and `main.rs` are the top.
fn module_path(file: &str) -> Path {
    let stem = file.trim_end_matches(".rs");
    let mut path: Path = stem.split('/').map(str::to_owned).collect();
    if path
        .last()
        .is_some_and(|last| matches!(last.as_str(), "mod" | "lib" | "main"))
    {
        path.pop();
    }
    path
}

fn joined(place: &[String], name: &str) -> Path {
    place.iter().cloned().chain([name.to_owned()]).collect()
}

/// From the top of the crate, if it begins with `crate`, `self` or `super`.
fn absolute(place: &[String], path: &[String]) -> Option<Path> {
    let (mut from, mut rest) = match path.first()?.as_str() {
        "crate" => (&place[..0], &path[1..]),
        "self" => (place, &path[1..]),
        "super" => (place, path),
        _ => return None,
    };
    while let Some((first, others)) = rest.split_first()
        && first == "super"
    {
        from = &from[..from.len().saturating_sub(1)];
        rest = others;
    }
    Some(from.iter().chain(rest).cloned().collect())
}

/// Reads the tree that begins at `at`; the paths in it and the names they get. Returns where it
/// ends.
fn use_tree(
    tokens: &[String],
    mut at: usize,
    prefix: &[String],
    found: &mut Vec<(Path, Option<String>)>,
) -> usize {
    let mut path = prefix.to_vec();
    while let Some(token) = tokens.get(at) {
        match token.as_str() {
            "{" => {
                at += 1;
                while tokens.get(at).is_some_and(|t| t != "}") {
                    let before = at;
                    at = use_tree(tokens, at, &path, found);
                    if tokens.get(at).is_some_and(|t| t == ",") || at == before {
                        at += 1;
                    }
                }
                return at + 1;
            }
            "*" => {
                found.push((path, None));
                return at + 1;
            }
            "::" => at += 1,
            word if is_name(word) => {
                // `self` at the end of a group is the group itself.
                if word != "self" || path.is_empty() {
                    path.push(word.to_owned());
                }
                at += 1;
            }
            _ => break,
        }
        if tokens.get(at).is_some_and(|t| t == "as") {
            let name = tokens.get(at + 1).cloned();
            found.push((path, name));
            return at + 2;
        }
    }
    let name = path.last().cloned();
    found.push((path, name));
    at
}

/// Modules that are there for tests alone: `#[cfg(test)] mod name;`.
fn tested_modules(tokens: &[String]) -> Vec<&str> {
    let attribute = ["#", "[", "cfg", "(", "test", ")", "]", "mod"];
    tokens
        .windows(attribute.len() + 2)
        .filter(|window| window[..attribute.len()] == attribute && window[9] == ";")
        .map(|window| window[8].as_str())
        .collect()
}

fn code_without_tests(source: &Source) -> String {
    let code = mask(&source.text);
    let lines = first_test_line(source, &code);
    code.lines().take(lines).collect::<Vec<_>>().join("\n")
}

fn is_name(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Names, `::`, and every other character that is no blank.
fn tokens(code: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    let mut chars = code.chars().peekable();
    while let Some(c) = chars.next() {
        if c.is_alphanumeric() || c == '_' {
            let mut word = c.to_string();
            while let Some(next) = chars.next_if(|c| c.is_alphanumeric() || *c == '_') {
                word.push(next);
            }
            tokens.push(word);
        } else if c == ':' && chars.next_if_eq(&':').is_some() {
            tokens.push("::".to_owned());
        } else if !c.is_whitespace() {
            tokens.push(c.to_string());
        }
    }
    tokens
}
