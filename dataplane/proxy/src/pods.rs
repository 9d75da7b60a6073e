//! Who has an address of this node: the configuration's word, and redirection's.
//!
//! The configuration says which workload has an address, redirection which pod it captures there.
//! Either may be late: a pod that has just started is not configured yet, and an address that a new
//! pod was given is configured as its former owner's. A connection is served only where both agree
//! on namespace, name and service account (uids are of two kinds); what they disagree on is waited
//! for, then refused.
//!
//! Without redirection's word ([`crate::ProxyConfig::pods`]) the configuration's is taken.

use std::cell::RefCell;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh::{Snapshot, Workload, WorkloadName};

use crate::config::{CapturedPod, LocalPods, Lookup, PodReader};
use crate::context::Context;
use crate::error::ProxyError;

/// Connections of one worker that may wait for their pod to become known.
const WAITING_MAX: usize = 4096;
/// How often a wait looks at redirection's word; a new configuration is seen at once.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Redirection's word on the pods of this node, where there is one. One worker's.
#[derive(Debug, Default)]
pub(crate) struct Pods(Option<RefCell<Box<dyn PodReader>>>);

impl Pods {
    pub(crate) fn new(pods: Option<&Arc<dyn LocalPods>>) -> Self {
        Self(pods.map(|pods| RefCell::new(pods.reader())))
    }

    /// None: redirection does not say anything.
    fn get(&self, ip: IpAddr) -> Option<Lookup> {
        self.0.as_ref().map(|pods| pods.borrow_mut().pod(ip))
    }
}

/// Why an address is nobody's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Nobody {
    /// The configuration has no workload of this node there.
    NotConfigured,
    /// Configuration and redirection do not agree.
    Disagreed {
        captured: Arc<CapturedPod>,
        configured: WorkloadName,
    },
    /// Redirection captures no pod there.
    NotCaptured,
    /// What redirection says cannot be read.
    NoTable,
    /// While it was waited for, another pod got the address.
    Changed,
    /// Too many wait.
    Overload,
}

impl fmt::Display for Nobody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |f: &mut fmt::Formatter<'_>, name: &WorkloadName| {
            let (namespace, pod, account) = (&name.namespace, &name.name, &name.service_account);
            write!(f, "{namespace}/{pod} (service account {account})")
        };
        match self {
            Self::NotConfigured => {
                f.write_str("it is not in the configuration (yet), or its node is another there")
            }
            Self::Disagreed {
                captured,
                configured,
            } => {
                f.write_str("redirection says it is pod ")?;
                shown(f, &captured.name)?;
                write!(f, ", uid {}, the configuration says it is ", captured.uid)?;
                shown(f, configured)?;
                f.write_str(": one of them is out of date")
            }
            Self::NotCaptured => f.write_str("redirection captures no pod with that address"),
            Self::NoTable => f.write_str(
                "ZTUNNEL_POD_TABLE cannot be read: does the node agent run, and is its directory \
                 mounted here?",
            ),
            Self::Changed => f.write_str("another pod got that address meanwhile"),
            Self::Overload => write!(f, "{WAITING_MAX} connections of this worker wait already"),
        }
    }
}

impl Context {
    /// Whether a pod that this proxy captures has `ip`, known or not. Without redirection's word:
    /// whether a workload of this node has it.
    pub(crate) fn is_captured(&self, ip: IpAddr) -> bool {
        match self.pods.get(ip) {
            None => self.configured(ip).is_some(),
            Some(Lookup::Pod(_)) => true,
            Some(Lookup::NotCaptured | Lookup::NoTable) => false,
        }
    }

    /// The workload of this node that the configuration has at `ip`.
    fn configured(&self, ip: IpAddr) -> Option<Arc<Workload>> {
        let snapshot: Arc<Snapshot> = self.snapshot();
        let node = &self.config.node;
        let workload = snapshot.workload_by_ip(&node.network, ip)?;
        node.is_local(workload).then(|| Arc::clone(workload))
    }

    /// The workload of this node that has `ip` now.
    pub(crate) fn pod_at(&self, ip: IpAddr) -> Result<Arc<Workload>, Nobody> {
        self.agreed(ip, self.pods.get(ip))
    }

    fn agreed(&self, ip: IpAddr, said: Option<Lookup>) -> Result<Arc<Workload>, Nobody> {
        let captured = match said {
            None => None,
            Some(Lookup::Pod(pod)) => Some(pod),
            Some(Lookup::NotCaptured) => return Err(Nobody::NotCaptured),
            Some(Lookup::NoTable) => return Err(Nobody::NoTable),
        };
        let workload = self.configured(ip).ok_or(Nobody::NotConfigured)?;
        match captured {
            Some(captured) if !captured.name.names(&workload) => Err(Nobody::Disagreed {
                captured,
                configured: WorkloadName {
                    namespace: Arc::clone(&workload.namespace),
                    name: Arc::clone(&workload.name),
                    service_account: Arc::clone(&workload.service_account),
                    trust_domain: None,
                },
            }),
            _ => Ok(workload),
        }
    }

    /// Whose a connection from `ip` is, waiting a while for a pod that has just started.
    ///
    /// It is the pod's that had the address when the connection was accepted: an entry is there
    /// before its pod is captured, so one that comes or changes while this waits is of another.
    pub(crate) async fn wait_for_source(&self, ip: IpAddr) -> Result<Arc<Workload>, ProxyError> {
        let first = self.pods.get(ip);
        let is_same = |now: &Option<Lookup>| *now == first || first == Some(Lookup::NoTable);
        let found = self.wait_for_pod(ip, first.clone(), is_same).await;
        found.map_err(|why| ProxyError::UnknownSource {
            ip,
            node: (*self.config.node.node).into(),
            why,
        })
    }

    /// Whom a connection to `ip` reaches, waiting a while for a pod that has just started.
    pub(crate) async fn wait_for_destination(
        &self,
        ip: IpAddr,
    ) -> Result<Arc<Workload>, ProxyError> {
        let found = self.wait_for_pod(ip, self.pods.get(ip), |_| true).await;
        found.map_err(|why| self.unknown_destination(ip, why))
    }

    pub(crate) fn unknown_destination(&self, ip: IpAddr, why: Nobody) -> ProxyError {
        let node = (*self.config.node.node).into();
        ProxyError::UnknownDestination { ip, node, why }
    }

    async fn wait_for_pod(
        &self,
        ip: IpAddr,
        first: Option<Lookup>,
        is_same: impl Fn(&Option<Lookup>) -> bool,
    ) -> Result<Arc<Workload>, Nobody> {
        let mut why = match self.agreed(ip, first) {
            Ok(workload) => return Ok(workload),
            // Nobody to wait for: the entry of a captured pod would be there already.
            Err(Nobody::NotCaptured) => return Err(Nobody::NotCaptured),
            Err(why) => why,
        };
        if self.updated.waiting() >= WAITING_MAX {
            return Err(Nobody::Overload);
        }
        let found = rt::time::timeout(self.config.workload_timeout, async {
            loop {
                // Whichever comes first.
                let _ = rt::time::timeout(LOOK_AGAIN, self.updated.wait()).await;
                let said = self.pods.get(ip);
                if !is_same(&said) {
                    return Err(Nobody::Changed);
                }
                match self.agreed(ip, said) {
                    Ok(workload) => return Ok(workload),
                    Err(nobody) => why = nobody,
                }
            }
        });
        match found.await {
            Ok(found) => found,
            Err(_) => Err(why),
        }
    }
}
