//! What tests of several crates need: numbers and bytes that look random and are the same for the
//! same seed, fuzz targets without a fuzzer and, with the feature `certificates`, certificates of a
//! throw-away CA.
//!
//! A dev-dependency, but for the lab, whose attackers speak TLS as tests do: no program of the data
//! plane is linked with it. It knows no other crate here.
#![forbid(unsafe_code)]

#[cfg(feature = "certificates")]
pub mod certificates;
pub mod fuzz;
mod random;

pub use random::{Random, pattern};
