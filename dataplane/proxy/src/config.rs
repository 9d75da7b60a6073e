//! What a worker needs to know that does not change while it runs.

use std::fmt::Debug;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use mesh::{NodeContext, WorkloadName};
use rt::net::Keepalive;

use crate::memory::TunnelMemory;

/// How traffic reaches the proxy (`REDIRECT_MODE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RedirectMode {
    /// Sockets live in the namespace this process runs in, where netfilter redirects: that of the
    /// one pod it serves (dedicated mode). Sockets in the namespaces of other pods, which Istio's
    /// agent asks for, are not built: this mode is the default because upstream's is.
    InPod,
    /// Sockets live in the proxy's own namespace; packets of all pods of the node come here.
    Node,
}

impl RedirectMode {
    /// The setting's value.
    pub fn label(self) -> &'static str {
        match self {
            Self::InPod => "in-pod",
            Self::Node => "node",
        }
    }
}

/// A sockmap that the redirection may have put between pods' sockets and the proxy's.
pub trait SockmapBypass: Debug + Send + Sync {
    /// Lets `socket`, which is about to be connected, take it.
    fn offer(&self, socket: BorrowedFd<'_>);
    /// Whether `socket` does not take it and never will: splice(2) is right only then.
    fn is_plain(&self, socket: BorrowedFd<'_>) -> bool;
}

/// A pod of this node, as redirection knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapturedPod {
    /// What Kubernetes calls it; of any trust domain.
    pub name: WorkloadName,
    /// Redirection's own name for it, for people.
    pub uid: Arc<str>,
}

/// What redirection says of an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// It captures this pod there. The entry is there before the pod is captured, and changes
    /// before another pod with that address is.
    Pod(Arc<CapturedPod>),
    /// It captures none there.
    NotCaptured,
    /// It cannot be asked (yet).
    NoTable,
}

/// Tells one worker which pods redirection captures. Asked once or twice for each connection.
pub trait PodReader: Debug {
    /// Who has `ip` now.
    fn pod(&mut self, ip: IpAddr) -> Lookup;
}

/// Where [`PodReader`]s come from.
pub trait LocalPods: Debug + Send + Sync {
    /// One for the calling worker.
    fn reader(&self) -> Box<dyn PodReader>;
}

/// Settings of the data path.
#[derive(Debug, Clone)]
pub struct ProxyConfig {
    /// The node and its ports.
    pub node: NodeContext,
    /// How traffic gets here.
    pub mode: RedirectMode,
    /// Connect to local pods from the client's address (`ENABLE_ORIG_SRC`).
    pub original_source: bool,
    /// In node mode: pods of this node are reached by a tunnel, too (`SAME_NODE_TUNNEL`).
    pub same_node_tunnel: bool,
    /// In node mode: which pods redirection captures at which addresses (`ZTUNNEL_POD_TABLE`).
    /// Without it an address is whose the configuration says.
    pub pods: Option<Arc<dyn LocalPods>>,
    /// What the sockets of this proxy may take in node mode (`SOCKMAP`); without it they never do.
    pub sockmap: Option<Arc<dyn SockmapBypass>>,
    /// `SO_MARK` of outgoing sockets (`PACKET_MARK`).
    pub mark: Option<u32>,
    /// Keepalive probes on accepted and connected sockets (`KEEPALIVE_*`).
    pub keepalive: Option<Keepalive>,
    /// Bound on establishing a connection.
    pub connect_timeout: Duration,
    /// Bound on a TLS handshake, either role.
    pub handshake_timeout: Duration,
    /// Handshakes under way on one worker in each direction; as many more may wait.
    pub handshakes_max: usize,
    /// Descriptors of the data path ([`rt::descriptors::open`]) from which on new connections are
    /// reset: the rest of what the process may have is for the control plane.
    pub descriptors_max: usize,
    /// Memory for what has arrived in tunnels, of all workers (`ZTUNNEL_TUNNEL_MEMORY_BYTES`).
    pub tunnel_memory: Arc<TunnelMemory>,
    /// How long a captured connection waits for its pod's workload to become known.
    pub workload_timeout: Duration,
    /// HTTP/2 settings of tunnels this proxy opens.
    pub client: hbone::Config,
    /// HTTP/2 settings of tunnels it accepts.
    pub server: hbone::Config,
    /// Silence after which a tunnel's peer is asked for a sign of life.
    pub ping_interval: Duration,
    /// How long the peer may take to answer before the tunnel is given up.
    pub ping_timeout: Duration,
    /// Unused tunnels are closed after this time (`POOL_UNUSED_RELEASE_TIMEOUT`).
    pub pool_unused: Duration,
    /// Send `baggage` with the answer to a CONNECT (`ENABLE_RESPONSE_BAGGAGE`).
    pub response_baggage: bool,
}
