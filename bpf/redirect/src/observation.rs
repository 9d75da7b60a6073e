//! What redirection depends on and others may replace, to be compared with what it was.

use std::path::Path;

use crate::settings::Settings;
use crate::system::netns::inode;

/// What redirection depends on and others may replace: interfaces, namespaces.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Observation {
    /// Two that differ mean that everything must be installed anew.
    pub node: NodeObservation,
    /// Two that differ mean that pods must be looked at anew.
    pub pods: PodsObservation,
}

/// Of the node and its ztunnel.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NodeObservation {
    ztunnel: Option<u64>,
    interfaces: Vec<Option<u32>>,
}

/// Of listed pods, whatever else is wrong with them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PodsObservation {
    interfaces: Vec<Option<u32>>,
    namespaces: Vec<Option<u64>>,
}

impl Observation {
    /// Looks at the node as it is now; `interfaces` and `namespaces` are those that pods name.
    #[must_use]
    pub fn take(settings: &Settings, interfaces: &[&str], namespaces: &[&Path]) -> Self {
        let index = |name: &str| nix::net::if_::if_nametoindex(name).ok();
        let of_node = settings.node.interfaces.iter();
        let of_node = of_node.chain([&settings.ztunnel.host_interface]);
        Self {
            node: NodeObservation {
                ztunnel: inode(&settings.ztunnel.netns).ok(),
                interfaces: of_node.map(|name| index(name)).collect(),
            },
            pods: PodsObservation {
                interfaces: interfaces.iter().map(|name| index(name)).collect(),
                namespaces: namespaces.iter().map(|path| inode(path).ok()).collect(),
            },
        }
    }
}
