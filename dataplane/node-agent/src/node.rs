//! The node as the agent sees it, beside what its redirection says.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::Path;
use std::time::SystemTime;

use redirect::{Observation, Redirection};

use crate::config::Config;
use crate::desired::{Desired, Entry};
use crate::error::Result;
use crate::reconcile::Observed;
use crate::source::Wanted;

/// What others have changed on the node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Change {
    Nothing,
    /// Interfaces or network namespaces of pods have come, gone or been replaced.
    Pods,
    /// So have the underlay's interfaces, or ztunnel's namespace or interface.
    Node,
}

/// Looks at the node.
pub(crate) trait Node: fmt::Debug {
    /// The back end of this configuration; nothing is installed by this.
    fn redirection(&self, config: &Config) -> Result<Box<dyn Redirection + Send>>;

    /// What concerns these pods.
    fn observe(&self, desired: &Desired) -> Observed;

    /// Whether the interface is there.
    fn has_interface(&self, name: &str) -> bool;

    /// Takes the node as it is now for what was brought to what is wanted.
    fn remember(&mut self, wanted: &Wanted);

    /// What is different from what was remembered.
    fn change(&self, wanted: &Wanted) -> Change;

    /// When a pin was last made or removed, by anyone.
    fn pins_changed(&self, config: &Config) -> Option<SystemTime>;
}

/// The one this process runs on.
#[derive(Debug, Default)]
pub(crate) struct ThisNode {
    remembered: Option<Observation>,
}

impl Node for ThisNode {
    fn redirection(&self, config: &Config) -> Result<Box<dyn Redirection + Send>> {
        config.redirection()
    }

    fn observe(&self, desired: &Desired) -> Observed {
        let names: BTreeSet<_> = interfaces(desired).collect();
        let missing = names.into_iter().filter_map(|name| {
            let error = redirect::interface_index(name).err()?;
            Some((name.to_owned(), error.to_string()))
        });
        let paths: BTreeSet<_> = namespaces(desired).collect();
        let paths: Vec<&Path> = paths.into_iter().collect();
        let checked = redirect::check_namespaces(&paths);
        let closed = paths.iter().zip(checked).filter_map(|(path, result)| {
            let error = result.err()?;
            Some(((*path).to_owned(), error.to_string()))
        });
        Observed {
            interfaces: missing.collect(),
            namespaces: closed.collect::<HashMap<_, _>>(),
        }
    }

    fn has_interface(&self, name: &str) -> bool {
        redirect::interface_index(name).is_ok()
    }

    fn remember(&mut self, wanted: &Wanted) {
        self.remembered = Some(take(wanted));
    }

    fn change(&self, wanted: &Wanted) -> Change {
        let now = take(wanted);
        match &self.remembered {
            Some(then) if *then == now => Change::Nothing,
            Some(then) if then.node == now.node => Change::Pods,
            _ => Change::Node,
        }
    }

    /// The kernel notes it for their directory.
    fn pins_changed(&self, config: &Config) -> Option<SystemTime> {
        let directory = std::fs::metadata(config.pins()?).ok()?;
        directory.modified().ok()
    }
}

fn take(wanted: &Wanted) -> Observation {
    let interfaces: Vec<_> = interfaces(&wanted.desired).collect();
    let namespaces: Vec<_> = namespaces(&wanted.desired).collect();
    Observation::take(&wanted.config.settings(), &interfaces, &namespaces)
}

/// Those that pods name, also unreadable ones.
fn interfaces(desired: &Desired) -> impl Iterator<Item = &str> {
    desired.pods.iter().filter_map(Entry::host_interface)
}

fn namespaces(desired: &Desired) -> impl Iterator<Item = &Path> {
    desired.pods.iter().filter_map(|entry| match entry {
        Entry::Pod(listed) => Some(&*listed.pod.netns),
        Entry::Unreadable(_) => None,
    })
}
