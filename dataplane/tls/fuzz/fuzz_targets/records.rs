//! libFuzzer's way into [`tls_fuzz::records`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tls_fuzz::records(data));
