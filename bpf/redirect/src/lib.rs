//! Redirection of mesh pods' TCP through the node's ztunnel.
//!
//! One trait, [`Redirection`], and two complete back ends, so that they can be compared honestly:
//! [`iptables_tunnel`], the node-level path of Istio 1.17-1.20, and [`ebpf`], four tc programs
//! and one socket-lookup program.
//!
//! Invariants, for both:
//! - Traffic that should be captured and cannot be delivered to ztunnel is refused or dropped,
//!   never let around the mesh. That holds while the caller is not running, too.
//! - Whatever is changed on the node or in ztunnel's network namespace is written to a journal in
//!   the state directory first, so that clean-up after a crash removes exactly that.
//! - A step that fails takes back what its operation did before it.
//! - Installing over what an earlier process left adopts it: capture is not interrupted.
//!
//! Everything runs in the caller's network namespace, which must be the node's. Kernel floor:
//! 5.10 for `ebpf` (tcx from 6.6, clsact before), xt_TPROXY and ipset for `iptables_tunnel`.

#![deny(unsafe_code)]

mod command;
pub mod ebpf;
mod error;
pub mod iptables_tunnel;
mod journal;
mod listener_map;
mod netns;
mod privileges;
mod settings;
pub mod sockmap;
mod status;
mod sysctl;

pub use error::{Error, Result};
pub use listener_map::{ListenerMap, MAX_CPUS, Role};
pub use netns::Observation;
pub use privileges::check as check_privileges;
pub use settings::{Attach, Node, Pod, Settings, Variant, Ztunnel};
pub use status::{PodStatus, Status};

/// A way to bring mesh pods' TCP to ztunnel.
///
/// An implementation is created from [`Settings`] and a set of pods is kept by the caller.
pub trait Redirection: std::fmt::Debug {
    /// Installs everything that does not belong to a pod, or adopts what is there already.
    ///
    /// Pods of an earlier process stay captured; [`Redirection::enrolled`] lists them.
    ///
    /// # Errors
    /// Whatever stopped it; what this call had installed is taken back first.
    fn install(&mut self) -> Result<()>;

    /// Captures a pod. Adding a pod again brings it up to date (new interface, say).
    ///
    /// # Errors
    /// As [`Redirection::install`]; the pod is then not captured by this call.
    fn add_pod(&mut self, pod: &Pod) -> Result<()>;

    /// Ends the capture of the pod. Not an error if it is unknown.
    ///
    /// # Errors
    /// What could not be removed; the rest is.
    fn remove_pod(&mut self, uid: &str) -> Result<()>;

    /// The pods captured now, also by an earlier process.
    fn enrolled(&self) -> Vec<Pod>;

    /// What is installed, from the journal and the kernel; works without [`Redirection::install`].
    ///
    /// # Errors
    /// If the kernel's or the journal's state cannot be read.
    fn status(&self) -> Result<Status>;

    /// Removes everything that was ever installed, also by an earlier process.
    ///
    /// # Errors
    /// The first thing that could not be removed; everything else is.
    fn cleanup(&mut self) -> Result<()>;
}
