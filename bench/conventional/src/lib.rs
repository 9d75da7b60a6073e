//! A node proxy for HBONE built the conventional way: what this project is compared with.
//!
//! tokio with work stealing, `h2` for HTTP/2, `tokio-rustls` for TLS, one pool of tunnels for the
//! whole process. It takes ztunnel's environment, ports and redirection, decides by the same
//! `mesh` model and reads the same configuration, so that in a comparison only the data path
//! differs. Nothing here shares code with that data path: both ends can be mixed, and are in
//! tests.
//!
//! Meant to be as good as this construction gets, not a straw man. Where it departs from upstream
//! it does so in its own favour: TLS configurations are built once per identity instead of once
//! per connection, connections on a tunnel that was full are taken into use again, reads of
//! ciphertext are buffered ([`Config::read_buffer`]), and the log never blocks.
//!
//! Limits: `node` mode only; no policies re-checked on open connections, no DNS proxy, no admin
//! endpoint.

#![forbid(unsafe_code)]

mod config;
mod copy;
mod error;
mod headers;
mod identity;
mod inbound;
mod outbound;
mod pool;
mod proxy;
mod record;
mod sockets;

pub use config::{Config, ConfigError, Settings};
pub use identity::{Certificates, IdentityError};
pub use proxy::Proxy;
pub use record::Stats;
pub use sockets::{Listeners, register};
