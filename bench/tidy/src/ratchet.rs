//! The list of functions that are longer than allowed, which may only get better.

use std::collections::BTreeMap;

/// Allowed lengths by file and function.
#[derive(Clone, Debug, Default)]
pub struct Ratchet {
    allowed: BTreeMap<(String, String), usize>,
}

impl Ratchet {
    /// Reads lines of `path function lines`; empty ones and those that begin with `#` are skipped.
    ///
    /// # Errors
    /// The first line that is not of this form.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut allowed = BTreeMap::new();
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let words: Vec<_> = line.split_whitespace().collect();
            let [path, function, lines] = words[..] else {
                return Err(format!("`{line}` is not `path function lines`"));
            };
            let lines = lines
                .parse()
                .map_err(|_| format!("`{lines}` is not a number: `{line}`"))?;
            allowed.insert((path.to_owned(), function.to_owned()), lines);
        }
        Ok(Self { allowed })
    }

    /// Takes out what is allowed for a function.
    pub(crate) fn take(&mut self, path: &str, function: &str) -> Option<usize> {
        self.allowed.remove(&(path.to_owned(), function.to_owned()))
    }

    /// What nobody took.
    pub(crate) fn left(&self) -> impl Iterator<Item = (&str, &str)> {
        self.allowed
            .keys()
            .map(|(path, function)| (path.as_str(), function.as_str()))
    }
}
