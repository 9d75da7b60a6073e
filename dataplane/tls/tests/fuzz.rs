//! The fuzz targets on stable: the committed corpus, then seeded mutations of it for a while.
//! `TLS_FUZZ_SECONDS` (1 per target by default) searches longer.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

#[path = "../fuzz/src/lib.rs"]
#[allow(unreachable_pub, reason = "a library for the fuzzer, a module here")]
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

/// Deterministic pseudo-random numbers (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }

    /// A few changes to one input, sometimes with a piece of another.
    fn mutated(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
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
        bytes.truncate(1 << 16);
        bytes
    }
}

fn fuzz(name: &str, target: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    let mut files: Vec<_> = fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let corpus: Vec<Vec<u8>> = files.iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(corpus.len() >= 5, "{} has no corpus", directory.display());
    for (path, input) in files.iter().zip(&corpus) {
        check(&path.display().to_string(), target, input);
    }
    let seconds = std::env::var("TLS_FUZZ_SECONDS").ok();
    let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or(1);
    let (started, mut rounds) = (Instant::now(), 0_u64);
    while started.elapsed() < Duration::from_secs(seconds) {
        rounds += 1;
        let seed = rounds.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let input = Random(seed).mutated(&corpus);
        check(&format!("seed {seed:#x}"), target, &input);
    }
    println!(
        "{name}: {} of the corpus and {rounds} mutations",
        corpus.len()
    );
    assert!(rounds > 0);
}

fn check(origin: &str, target: fn(&[u8]), input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
        eprintln!("{origin}: {input:02x?}");
        resume_unwind(panic);
    }
}

#[test]
fn handshake() {
    fuzz("handshake", targets::handshake);
}

#[test]
fn records() {
    fuzz("records", targets::records);
}
