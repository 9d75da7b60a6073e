//! The HTTP endpoints' common part, for every program that has some: a small HTTP/1.1 server with
//! bounds ([`serve`]), the formats of metrics ([`Page`]), and readiness ([`Ready`]).
//!
//! It knows nothing of the mesh: what is served is the caller's.
#![forbid(unsafe_code)]

mod connections;
mod exposition;
mod ready;
mod server;

pub use exposition::{
    Exposition, MetricKind, Page, append_label, is_label_name, is_metric_name, labels,
};
pub use hyper::{Method, StatusCode};
pub use ready::{PendingTask, Ready};
pub use server::{Answer, HttpLimits, Query, query_value, serve};
