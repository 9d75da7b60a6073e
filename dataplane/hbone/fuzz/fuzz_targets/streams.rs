//! libFuzzer's way into [`hbone_fuzz::streams`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hbone_fuzz::streams(data));
