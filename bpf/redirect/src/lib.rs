//! Redirection of mesh pods' TCP through the node's ztunnel.
//!
//! One trait, [`Redirection`], and two complete back ends, so that they can be compared honestly:
//! `iptables_tunnel`, the node-level path of Istio 1.17-1.20, and `ebpf`, six tc programs and one
//! socket-lookup program.
//!
//! Invariants, for both:
//! - Traffic that should be captured and cannot be delivered to ztunnel is refused or dropped,
//!   never let around the mesh. That holds while the caller is not running, too.
//! - Whatever is changed on the node or in ztunnel's network namespace is written to a journal in
//!   the state directory first, so that clean-up after a crash removes exactly that.
//! - A step that fails takes back what its operation did before it.
//! - A pod that cannot be captured never keeps another from being captured, and is cut off.
//! - Whose each captured address is stands in the [`PodTable`] before the pod is captured.
//! - Installing over what an earlier process left adopts it: capture is not interrupted.
//!
//! In layers, of which none knows those above it: `system` asks and changes the kernel, `journal`
//! notes changes and takes them back, `cut_off` and the back ends stand on both. `sockmap` and the
//! listener map stand beside them and need no journal.
//!
//! Everything runs in the caller's network namespace, which must be the node's. Kernel floor:
//! 5.10 for `ebpf` (tcx from 6.6, clsact before), xt_TPROXY and ipset for `iptables_tunnel`.

#![deny(unsafe_code)]

use std::collections::BTreeSet;

mod back_end;
mod cut_off;
mod ebpf;
mod error;
mod iptables_tunnel;
mod journal;
mod listener_map;
mod observation;
pub mod pod_table;
mod settings;
pub mod sockmap;
mod status;
mod system;

pub use back_end::{AttachedBy, BackEnd, Driver, Redirect};
pub use ebpf::{Dropped, MAX_CPUS, Outcome, Role};
pub use error::{Error, Result};
pub use listener_map::ListenerMap;
pub use observation::Observation;
pub use pod_table::{Lookup, PodIdentity, PodTable};
pub use settings::{Attach, EbpfSettings, Node, Pod, Settings, TunnelSettings, Variant, Ztunnel};
pub use status::{Counters, EbpfStatus, Failure, PodStatus, Status, TunnelStatus, Uncaptured, Why};
pub use system::iptables::Iptables;
pub use system::local_addresses::AddressWatch;
pub use system::netns::{check_namespaces, interface_index};
pub use system::privileges::check as check_privileges;
pub use system::sock_diag::listening;
pub use system::trust::check_trusted;

/// The back end that these settings are for; reads the journal, changes nothing.
///
/// # Errors
/// If the journal cannot be read.
pub fn redirection(settings: Settings) -> Result<Box<dyn Redirection + Send>> {
    Ok(match settings.back_end.clone() {
        BackEnd::Ebpf(own) => Box::new(ebpf::Ebpf::new(settings.with(own))?),
        BackEnd::IptablesTunnel(own) => {
            Box::new(iptables_tunnel::IptablesTunnel::new(settings.with(own))?)
        }
    })
}

/// A way to bring mesh pods' TCP to ztunnel.
///
/// [`redirection`] makes the one that [`Settings`] name; the set of pods is kept by the caller.
pub trait Redirection: std::fmt::Debug {
    /// Installs everything that does not belong to a pod, or adopts what is there already.
    ///
    /// Pods of an earlier process stay captured; [`Redirection::enrolled`] lists them.
    ///
    /// # Errors
    /// Whatever stopped it; what this call had installed is taken back first.
    fn install(&mut self) -> Result<()>;

    /// Captures pods, or brings them up to date (new interface, say). Others are not touched.
    /// Each is tried; one that cannot be captured costs itself: it is told, and cut off if it is
    /// not captured already and its interface is its own.
    ///
    /// # Errors
    /// What kept all of them from being captured.
    fn try_pods(&mut self, pods: &[Pod]) -> Result<Vec<Failure>>;

    /// As [`Redirection::try_pods`], for callers to whom one pod is as good as all.
    ///
    /// # Errors
    /// As [`Redirection::try_pods`], or the first failure.
    fn add_pods(&mut self, pods: &[Pod]) -> Result<()> {
        let mut failures = self.try_pods(pods)?.into_iter();
        failures.next().map_or(Ok(()), |first| Err(first.error))
    }

    /// Makes these interfaces of the node drop everything, until [`Redirection::let_go`] or until
    /// a pod with that interface is captured. A captured pod with one of them is no longer.
    ///
    /// Never done to an interface that others may need: the underlay's, ztunnel's, `lo`, bridges
    /// and whatever else is not one pod's.
    ///
    /// Returns those that could not be cut off, and why.
    ///
    /// # Errors
    /// What kept all of them from being cut off.
    fn cut_off(&mut self, interfaces: &[&str]) -> Result<Vec<(String, Error)>>;

    /// Interfaces that are cut off, also by an earlier process.
    fn interfaces_cut_off(&self) -> Vec<String>;

    /// Ends [`Redirection::cut_off`] of these. Unknown ones are fine.
    ///
    /// # Errors
    /// What could not be removed first; the rest is.
    fn let_go(&mut self, interfaces: &[&str]) -> Result<()>;

    /// Keeps, for [`Status::not_captured`] of any process, which listed pods are not captured.
    ///
    /// # Errors
    /// If it cannot be written.
    fn note_uncaptured(&mut self, pods: Vec<Uncaptured>) -> Result<()>;

    /// What [`Redirection::note_uncaptured`] last kept.
    fn uncaptured(&self) -> &[Uncaptured];

    /// Connections older than their pod's capture that found no place and broke, since
    /// installation.
    fn older_broken(&self) -> u64 {
        0
    }

    /// Captures a pod, see [`Redirection::add_pods`].
    ///
    /// # Errors
    /// As [`Redirection::add_pods`].
    fn add_pod(&mut self, pod: &Pod) -> Result<()> {
        self.add_pods(std::slice::from_ref(pod))
    }

    /// Ends the capture of these pods. Unknown ones are fine. Others are not touched.
    ///
    /// # Errors
    /// What could not be removed first; the rest is.
    fn remove_pods(&mut self, uids: &[&str]) -> Result<()>;

    /// Ends the capture of a pod, see [`Redirection::remove_pods`].
    ///
    /// # Errors
    /// As [`Redirection::remove_pods`].
    fn remove_pod(&mut self, uid: &str) -> Result<()> {
        self.remove_pods(&[uid])
    }

    /// The pods captured now, also by an earlier process.
    fn enrolled(&self) -> Vec<Pod>;

    /// What is installed, from the journal and the kernel; works without [`Redirection::install`].
    ///
    /// # Errors
    /// If the kernel's or the journal's state cannot be read.
    fn status(&self) -> Result<Status>;

    /// Packets by place and reason since installation: what [`Status::counters`] has, without the
    /// rest. Empty if nothing is installed.
    ///
    /// # Errors
    /// If they cannot be read.
    fn counters(&self) -> Result<Counters>;

    /// What is there, in the kernel, of what was installed: one line for each program, rule, route,
    /// link, set entry, map entry, pin and setting. Two that differ mean that someone interfered;
    /// [`Redirection::install`] and [`Redirection::add_pods`] bring back what is missing.
    ///
    /// # Errors
    /// If it cannot be read.
    fn inventory(&self) -> Result<BTreeSet<String>>;

    /// Forgets what has ended by itself; to be called every few seconds.
    ///
    /// # Errors
    /// If it fails; nothing depends on it but memory.
    fn expire(&mut self) -> Result<()> {
        Ok(())
    }

    /// To be called when addresses of the node have come or gone ([`AddressWatch`] tells), and
    /// every few seconds in case that was missed. Nothing else is touched.
    ///
    /// # Errors
    /// If the kernel's state cannot be written; the addresses known before stay.
    fn follow_node(&mut self) -> Result<()> {
        Ok(())
    }

    /// Packets dropped since the last call, at most `most` and not all of them under load.
    ///
    /// # Errors
    /// If they cannot be read.
    fn take_dropped(&mut self, most: usize) -> Result<Vec<Dropped>> {
        let _ = most;
        Ok(Vec::new())
    }

    /// Removes everything that was ever installed, also by an earlier process.
    ///
    /// # Errors
    /// The first thing that could not be removed; everything else is.
    fn cleanup(&mut self) -> Result<()>;
}
