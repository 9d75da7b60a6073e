//! The ground: how the system is asked and changed, one file for each of its faces. Nothing in here
//! knows of pods, of the journal or of a back end; errors are the crate's.

pub(crate) mod command;
pub(crate) mod iptables;
pub(crate) mod links;
pub(crate) mod local_addresses;
pub(crate) mod netns;
mod pin_kind;
pub(crate) mod pins;
pub(crate) mod privileges;
pub(crate) mod program_load;
pub(crate) mod programs;
pub(crate) mod rcu_expedited;
pub(crate) mod sock_diag;
pub(crate) mod sysctl;
pub(crate) mod tc;
pub(crate) mod trust;
