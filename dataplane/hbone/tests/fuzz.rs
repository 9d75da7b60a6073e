//! The fuzz targets on stable: the committed corpus, then seeded mutations of it for a while.
//! `HBONE_FUZZ_SECONDS` (1 per target by default) searches longer.
#![forbid(unsafe_code)]

#[path = "../fuzz/src/lib.rs"]
#[allow(unreachable_pub, reason = "a library for the fuzzer, a module here")]
mod targets;

use std::path::Path;

fn fuzz(name: &str, target: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    testkit::fuzz::fuzz(&corpus.join(name), "HBONE_FUZZ_SECONDS", target);
}

#[test]
fn frames() {
    fuzz("frames", targets::frames);
}

#[test]
fn hpack() {
    fuzz("hpack", targets::hpack);
}

#[test]
fn streams() {
    fuzz("streams", targets::streams);
}
