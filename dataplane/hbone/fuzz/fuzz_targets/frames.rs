//! libFuzzer's way into [`hbone_fuzz::frames`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hbone_fuzz::frames(data));
