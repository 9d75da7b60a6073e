//! Where the model of the mesh comes from, off the data path.
//!
//! [`SnapshotPublisher`] publishes one immutable [`mesh::Snapshot`] after another. Whoever wants to
//! know is called with each; ztunnel puts it into each worker's cell (`rt::mailbox::latest`), whose
//! lock is held while a pointer moves. What feeds it is a module each:
//!
//! * [`local`]: a YAML file or inline text (`LOCAL_XDS_PATH`, `LOCAL_XDS`), and [`watch`],
//!   which follows changes of the file. A file that is wrong never replaces one that was right.
//! * The control plane's protocols (`xds` for configuration, `ca` for certificates, `zds` for
//!   pods) belong beside it, each turning what it receives into a snapshot and publishing it.
//!
//! [`dump`] turns a snapshot into the JSON that `/config_dump` serves.
//!
//! Everything here runs on the control thread, and takes no lock that a worker waits for: a worker
//! has its own copy of the newest snapshot.
#![forbid(unsafe_code)]

pub mod dump;
pub mod local;
pub mod publisher;
pub mod watch;

pub use local::{LoadError, LocalConfig};
pub use publisher::{SnapshotPublisher, Status};
pub use watch::Watcher;
