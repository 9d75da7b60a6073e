//! Why a configuration is not a mesh.

use crate::identity::IdentityError;

/// What is wrong with a configuration; one line that names the item, the field, the value and
/// what would be right.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ModelError {
    /// A field has a value it cannot have.
    #[error("{item}: {field} {value} {problem}")]
    Field {
        /// Kind and key of the item.
        item: Box<str>,
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
        /// Kind and key of the item.
        item: Box<str>,
        /// What is wrong with its parts.
        source: IdentityError,
    },
    /// Two items have the same key.
    #[error("{kind} `{key}` is configured twice: {unique} must be unique")]
    Duplicate {
        /// Workload, service or policy.
        kind: &'static str,
        /// The key both have.
        key: Box<str>,
        /// What makes up the key.
        unique: &'static str,
    },
    /// Two workloads claim one address.
    #[error(
        "workloads `{first}` and `{second}` both have workloadIps `{address}`: an address must \
         belong to one workload of its network (networkMode HostNetwork if they share a node's)"
    )]
    AddressTaken {
        /// Network and address.
        address: Box<str>,
        /// Uid of the workload that has it.
        first: Box<str>,
        /// Uid of the workload that also claims it.
        second: Box<str>,
    },
    /// More items than fit the indexes.
    #[error(
        "{kind}: {count} items are too many, at most {} are supported",
        u32::MAX
    )]
    TooMany {
        /// Workloads, services or policies.
        kind: &'static str,
        /// How many there are.
        count: usize,
    },
}
