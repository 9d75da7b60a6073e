//! The fuzz targets on stable: the committed corpus, then seeded mutations of it for a while.
//! `TLS_FUZZ_SECONDS` (1 per target by default) searches longer.
#![forbid(unsafe_code)]

#[path = "../fuzz/src/lib.rs"]
#[allow(unreachable_pub, reason = "a library for the fuzzer, a module here")]
mod targets;

use std::path::Path;

fn fuzz(name: &str, target: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    testkit::fuzz::fuzz(&corpus.join(name), "TLS_FUZZ_SECONDS", target);
}

#[test]
fn handshake() {
    fuzz("handshake", targets::handshake);
}

#[test]
fn records() {
    fuzz("records", targets::records);
}
