//! Why a configuration is not a mesh.

use std::fmt;

use crate::identity::IdentityError;

/// What is wrong with a configuration; one line that names the item, the field, the value and
/// what would be right.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ModelError {
    /// A field has a value it cannot have.
    #[error("{item}: {field} {value} {problem}")]
    Field {
        /// The item.
        item: ItemRef,
        /// Name of the field, as in the configuration.
        field: &'static str,
        /// What the field holds.
        value: Box<str>,
        /// What it should hold and the likely mistake.
        problem: &'static str,
    },
    /// A workload has no valid identity.
    #[error("{item}: {source}")]
    Identity {
        /// The workload.
        item: ItemRef,
        /// What is wrong with the parts of its identity.
        source: IdentityError,
    },
    /// Two items have the same key.
    #[error("{item} is configured twice: {unique} must be unique")]
    Duplicate {
        /// The second of the two.
        item: ItemRef,
        /// What makes up the key.
        unique: &'static str,
    },
    /// Two workloads claim one address.
    #[error(
        "{item}: workloadIps `{address}` already belongs to workload `{holder}`: an address must \
         belong to one workload of its network (networkMode HostNetwork if they share a node's)"
    )]
    AddressTaken {
        /// The workload that also claims it.
        item: ItemRef,
        /// Network and address.
        address: Box<str>,
        /// Uid of the workload that has it.
        holder: Box<str>,
    },
    /// More items than fit the indexes.
    #[error(
        "{kind}: {count} items are too many, at most {} are supported",
        u32::MAX
    )]
    TooMany {
        /// What there are too many of.
        kind: ItemKind,
        /// How many there are.
        count: usize,
    },
}

impl ModelError {
    /// The item that is wrong, if it is a single one.
    pub fn item(&self) -> Option<&ItemRef> {
        match self {
            Self::Field { item, .. }
            | Self::Identity { item, .. }
            | Self::Duplicate { item, .. }
            | Self::AddressTaken { item, .. } => Some(item),
            Self::TooMany { .. } => None,
        }
    }
}

/// Kind of a configured item.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ItemKind {
    /// A workload.
    Workload,
    /// A service.
    Service,
    /// A policy.
    Policy,
}

/// An item of a configuration: where it stands and what it is called.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ItemRef {
    /// Workload, service or policy.
    pub kind: ItemKind,
    /// Position in the list that was configured, from 0.
    pub index: u32,
    /// Uid of a workload, `namespace/hostname` of a service, `namespace/name` of a policy.
    pub key: Box<str>,
}

impl fmt::Display for ItemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Workload => "workload",
            Self::Service => "service",
            Self::Policy => "policy",
        })
    }
}

impl fmt::Display for ItemRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} `{}`", self.kind, self.key)
    }
}
