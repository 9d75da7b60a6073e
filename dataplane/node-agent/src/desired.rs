//! The desired state: the pods of this node that belong to the mesh, whoever says so.

use redirect::Pod;
use serde::Deserialize;
use time::OffsetDateTime;

/// What the node is to be brought to. Beside it there is only configuration, which says how.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Desired {
    /// Pods, and what cannot be read as one, in the source's order.
    pub(crate) pods: Vec<Entry>,
}

/// Where a pod is in its life; Kubernetes' `status.phase`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
pub(crate) enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
    Unknown,
}

impl Phase {
    /// Whether its containers have ended for good.
    pub(crate) fn is_over(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }
}

/// A pod that is listed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Listed {
    pub(crate) pod: Pod,
    pub(crate) phase: Option<Phase>,
    /// Kubernetes' `status.startTime`: of two pods with one address, the later started one has it.
    pub(crate) started: Option<OffsetDateTime>,
}

/// An entry that cannot be read as a pod: it costs itself.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Unreadable {
    /// Its uid, or which entry it is.
    pub(crate) uid: String,
    pub(crate) host_interface: Option<String>,
    pub(crate) reason: String,
}

/// One of the listed pods.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Entry {
    Pod(Box<Listed>),
    Unreadable(Unreadable),
}

impl Entry {
    /// The interface it names.
    pub(crate) fn host_interface(&self) -> Option<&str> {
        match self {
            Self::Pod(listed) => Some(&listed.pod.host_interface),
            Self::Unreadable(unreadable) => unreadable.host_interface.as_deref(),
        }
    }
}
