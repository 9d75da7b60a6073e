//! The house rules that neither rustfmt nor clippy check, as a library whose test fails where the
//! tree breaks them:
//!
//! - lines of at most [`COLUMNS_MAX`] columns, but for strings in tests;
//! - functions of at most [`FUNCTION_LINES_MAX`] lines and files of at most [`FILE_LINES_MAX`],
//!   tests not counted, as a table of cases is long and still simple;
//! - no `unwrap()` outside tests;
//! - `unsafe` only in the crates that may have it ([`UNSAFE_CRATES`]), forbidden in all others;
//! - no notes to oneself left behind;
//! - each line of `docs/security.md` names tests, and they exist;
//! - no crate has files that import each other in a circle ([`check_circles`]);
//! - `ARCHITECTURE.md` names every crate and every arrow between crates ([`check_map`]).
//!
//! Functions that are too long today are listed in `long-functions.txt` with their length, beyond
//! which they must not grow; the entry of one that is short by now, or gone, is a finding as well.
//!
//! Sources are not parsed, only read far enough to tell code from comments and strings
//! ([`mask`]). That is right for what rustfmt lays out; macros that build functions are not seen.
#![forbid(unsafe_code)]

mod circles;
mod functions;
mod imports;
mod map;
mod mask;
mod ratchet;
mod rules;
mod security;
mod tree;

pub use circles::{CIRCLES, check_circles};
pub use functions::{Function, functions};
pub use map::{MAP, check_map};
pub use mask::mask;
pub use ratchet::Ratchet;
pub use rules::{
    COLUMNS_MAX, FILE_LINES_MAX, FUNCTION_LINES_MAX, Finding, Source, UNSAFE_CRATES, check,
};
pub use security::{SECURITY, check_security};
pub use tree::{crates, dependencies, sources};
