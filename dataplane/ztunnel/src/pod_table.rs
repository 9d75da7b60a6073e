//! The node agent's word on whose an address of this node is (`ZTUNNEL_POD_TABLE`).

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use mesh::WorkloadName;
use proxy::{CapturedPod, LocalPods, Lookup, PodReader};
use redirect::{PodIdentity, PodTable};

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
        Box::new(Reader(PodTable::of(&self.0, captured)))
    }
}

#[derive(Debug)]
struct Reader(PodTable<CapturedPod>);

fn captured(pod: PodIdentity) -> CapturedPod {
    CapturedPod {
        name: WorkloadName {
            namespace: pod.namespace,
            name: pod.name,
            service_account: pod.service_account,
            trust_domain: None,
        },
        uid: pod.uid,
    }
}

impl PodReader for Reader {
    fn pod(&mut self, ip: IpAddr) -> Lookup {
        match self.0.get(ip) {
            redirect::Lookup::Pod(pod) => Lookup::Pod(pod),
            redirect::Lookup::NotCaptured => Lookup::NotCaptured,
            redirect::Lookup::NoTable => Lookup::NoTable,
        }
    }
}
