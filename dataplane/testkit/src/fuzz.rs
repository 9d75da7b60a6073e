//! Fuzz targets without a fuzzer, for tests on stable: the committed corpus, then seeded mutations
//! of it for a while. Nothing here finds its way to new code as libFuzzer does; it keeps targets
//! from rotting, and finds what is near to the corpus.
//!
//! Inputs are at most [`INPUT_MAX`] bytes. A failure prints the file or the seed and the input, and
//! fails the test; the same seed makes the same input.
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::Random;

/// Longest input made.
pub const INPUT_MAX: usize = 1 << 16;
/// Inputs a corpus has at the very least.
const CORPUS_MIN: usize = 5;

impl Random {
    /// A few changes to one input, sometimes with a piece of another.
    pub fn mutated(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = corpus[self.below(corpus.len())].clone();
        for _ in 0..1 + self.below(6) {
            let at = self.below(bytes.len() + 1);
            match self.below(6) {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, self.below(256) as u8),
                2 => {
                    let other = &corpus[self.below(corpus.len())];
                    let from = self.below(other.len() + 1);
                    let to = (from + self.below(64)).min(other.len());
                    bytes.splice(at..at, other[from..to].iter().copied());
                }
                3 => {
                    let end = (at + self.below(32)).min(bytes.len());
                    let piece = bytes[at..end].to_vec();
                    for _ in 0..self.below(20) {
                        bytes.splice(at..at, piece.iter().copied());
                    }
                }
                _ if at < bytes.len() => {
                    bytes[at] = match self.below(4) {
                        0 => 0,
                        1 => 0xff,
                        2 => bytes[at].wrapping_add(1),
                        _ => bytes[at] ^ 1 << self.below(8),
                    }
                }
                _ => {}
            }
        }
        bytes.truncate(INPUT_MAX);
        bytes
    }
}

/// Runs `target` over the corpus in `directory`, then over mutations of it for one second, or as
/// many as the environment variable `seconds` says.
///
/// # Panics
/// The corpus is missing, or `target` panics.
pub fn fuzz(directory: &Path, seconds: &str, target: fn(&[u8])) {
    let corpus = corpus(directory);
    for (origin, input) in &corpus {
        check(origin, target, input);
    }
    let inputs: Vec<Vec<u8>> = corpus.into_iter().map(|(_, input)| input).collect();
    let seconds = std::env::var(seconds).ok();
    let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or(1);
    let (started, mut rounds) = (Instant::now(), 0_u64);
    while rounds == 0 || started.elapsed() < Duration::from_secs(seconds) {
        rounds += 1;
        let input = Random::new(rounds).mutated(&inputs);
        check(&format!("seed {rounds}"), target, &input);
    }
    println!(
        "{}: {} inputs and {rounds} mutations",
        directory.display(),
        inputs.len()
    );
}

/// The files of a directory in the order of their names, with these.
fn corpus(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let at = directory.display();
    let entries = fs::read_dir(directory);
    let entries = entries.unwrap_or_else(|error| panic!("{at} has no corpus: {error}"));
    let mut corpus: Vec<(String, Vec<u8>)> = entries
        .map(|entry| {
            let path = entry.unwrap_or_else(|error| panic!("{at}: {error}")).path();
            let name = path.display().to_string();
            let input = fs::read(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
            (name, input)
        })
        .collect();
    corpus.sort();
    assert!(
        corpus.len() >= CORPUS_MIN,
        "{at} has a corpus of {}",
        corpus.len()
    );
    corpus
}

/// Runs `target` on one input; says which it was before it lets a panic go on.
///
/// # Panics
/// `target` does.
pub fn check(origin: &str, target: fn(&[u8]), input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
        eprintln!("{origin}: {input:02x?}");
        resume_unwind(panic);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_input() {
        let corpus = [b"one".to_vec(), b"another".to_vec()];
        let made = |seed| Random::new(seed).mutated(&corpus);
        assert_eq!(made(7), made(7));
        let different: std::collections::BTreeSet<_> = (1..100).map(made).collect();
        assert!(different.len() > 50, "{}", different.len());
        let long = [vec![1; 2 * INPUT_MAX]];
        assert!((1..50).all(|seed| Random::new(seed).mutated(&long).len() <= INPUT_MAX));
    }

    #[test]
    #[should_panic(expected = "found")]
    fn what_a_target_finds_fails_the_test() {
        check("here", |input| assert!(input.is_empty(), "found"), b"x");
    }

    #[test]
    #[should_panic(expected = "no corpus")]
    fn a_missing_corpus_fails_the_test() {
        fuzz(Path::new("/nowhere"), "NO_SUCH_VARIABLE", |_| {});
    }
}
