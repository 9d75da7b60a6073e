//! Micro-benchmarks: what the parts of the data path cost, each beside what others use for it.
//!
//! * [`relay`]: the same TCP relay on `rt`, tokio, tokio-uring and monoio, as processes of their
//!   own whose CPU time the kernel counts.
//! * [`codec`]: the HBONE codec against the `h2` crate, both ends in memory.
//! * [`records`]: TLS records against rustls' buffered interface and the bare AEAD.
//! * [`model`]: routing, authorization, load balancing and replacing the mesh model by its size.
//! * [`accounting`]: metrics and access log per connection.
//!
//! Every bench target leaves its [`rows`] in the target directory; `bench-table` collects them
//! into the table and `bench.json`. `BENCH_QUICK=1` shortens everything to a first look.
#![forbid(unsafe_code)]

pub mod accounting;
pub mod callgrind;
pub mod codec;
pub mod criteria;
pub mod document;
pub mod machine;
pub mod model;
pub mod records;
pub mod relay;
pub mod rows;
