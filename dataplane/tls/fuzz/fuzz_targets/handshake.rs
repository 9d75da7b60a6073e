//! libFuzzer's way into [`tls_fuzz::handshake`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tls_fuzz::handshake(data));
