//! The mesh as data, and the decisions taken on it.
#![forbid(unsafe_code)]

pub mod identity;

pub use identity::{Identity, IdentityError};
