//! The node agent's word on whose an address of this node is (`ZTUNNEL_POD_TABLE`).

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh::WorkloadName;
use proxy::{CapturedPod, LocalPods, Lookup, PodReader};
use redirect::PodTable;

/// The table at a path; each worker reads it for itself.
#[derive(Debug)]
pub(crate) struct PodTablePath(PathBuf);

impl PodTablePath {
    pub(crate) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

impl LocalPods for PodTablePath {
    fn reader(&self) -> Box<dyn PodReader> {
        Box::new(Reader(PodTable::new(&self.0)))
    }
}

#[derive(Debug)]
struct Reader(PodTable);

impl PodReader for Reader {
    fn pod(&mut self, ip: IpAddr) -> Lookup {
        match self.0.get(ip) {
            redirect::Lookup::Pod(pod) => Lookup::Pod(Arc::new(CapturedPod {
                name: WorkloadName {
                    namespace: Arc::clone(&pod.namespace),
                    name: Arc::clone(&pod.name),
                    service_account: Arc::clone(&pod.service_account),
                    trust_domain: None,
                },
                uid: Arc::clone(&pod.uid),
            })),
            redirect::Lookup::NotCaptured => Lookup::NotCaptured,
            redirect::Lookup::NoTable => Lookup::NoTable,
        }
    }
}
