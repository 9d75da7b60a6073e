//! What all connections of one worker share.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hbone::Role;
use identity::{Certificates, NoCertificate, WorkloadTls};
use mesh::{Identity, Snapshot, Workload};
use rt::net::{ConnectOptions, Listener, TcpStream};
use rt::sync::Broadcast;
use telemetry::WorkerTelemetry;

use crate::config::{ProxyConfig, RedirectMode, SockmapBypass};
use crate::error::ProxyError;
use crate::gate::{Handshakes, Place};
use crate::memory::WorkerMemory;
use crate::pods::Pods;
use crate::pool::Pool;
use crate::tunnel::{Setup, Tunnel};
use crate::watch::Watches;

/// One worker's state.
pub(crate) struct Context {
    pub(crate) config: Arc<ProxyConfig>,
    pub(crate) certificates: Rc<Certificates>,
    pub(crate) telemetry: WorkerTelemetry,
    pub(crate) pool: Pool,
    pub(crate) handshakes: Handshakes,
    memory: Rc<WorkerMemory>,
    /// Connections that policies have allowed, to be looked at again when those change.
    pub(crate) watches: Watches,
    /// What redirection says of addresses of this node.
    pub(crate) pods: Pods,
    snapshot: RefCell<Arc<Snapshot>>,
    /// The snapshot was replaced.
    pub(crate) updated: Broadcast,
    /// Accepted tunnels, for draining.
    accepted: RefCell<Vec<Weak<Tunnel>>>,
    pub(crate) draining: Cell<bool>,
    /// How long a draining worker goes on accepting.
    pub(crate) accept_for: Cell<Duration>,
    pub(crate) drain: Broadcast,
    connections: Cell<usize>,
    pub(crate) ended: Broadcast,
    random: Cell<u64>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("connections", &self.connections)
            .field("draining", &self.draining)
            .finish_non_exhaustive()
    }
}

/// Counts a connection as long as it lives.
#[derive(Debug)]
pub(crate) struct Alive(Rc<Context>);

impl Alive {
    pub(crate) fn context(&self) -> &Context {
        &self.0
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.connections.set(self.0.connections.get() - 1);
        self.0.ended.notify();
    }
}

impl Context {
    pub(crate) fn new(
        config: Arc<ProxyConfig>,
        certificates: Rc<Certificates>,
        telemetry: WorkerTelemetry,
        snapshot: Arc<Snapshot>,
        seed: u64,
    ) -> Self {
        Self {
            handshakes: Handshakes::new(config.handshakes_max),
            memory: WorkerMemory::new(&config.tunnel_memory),
            watches: Watches::default(),
            pods: Pods::new(config.pods.as_ref()),
            config,
            certificates,
            telemetry,
            pool: Pool::default(),
            snapshot: RefCell::new(snapshot),
            updated: Broadcast::default(),
            accepted: RefCell::default(),
            draining: Cell::new(false),
            accept_for: Cell::default(),
            drain: Broadcast::default(),
            connections: Cell::new(0),
            ended: Broadcast::default(),
            random: Cell::new(seed | 1),
        }
    }

    pub(crate) fn alive(self: &Rc<Self>) -> Alive {
        self.connections.set(self.connections.get() + 1);
        Alive(Rc::clone(self))
    }

    pub(crate) fn connections(&self) -> usize {
        self.connections.get()
    }

    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshot.borrow())
    }

    pub(crate) fn replace_snapshot(&self, snapshot: Arc<Snapshot>) {
        self.watches.recheck(&snapshot, &self.telemetry);
        *self.snapshot.borrow_mut() = snapshot;
        self.telemetry.model_changed();
        self.updated.notify();
    }

    /// A pseudo-random number (xorshift64*): load balancing and trace ids, nothing secret.
    pub(crate) fn random(&self) -> u64 {
        let mut x = self.random.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.random.set(x);
        x.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The workload with `ip` anywhere in the mesh.
    pub(crate) fn workload(&self, ip: IpAddr) -> Option<Arc<Workload>> {
        self.snapshot
            .borrow()
            .workload_by_ip(&self.config.node.network, ip)
            .cloned()
    }

    /// Where a captured connection was going.
    pub(crate) fn original_dst(&self, stream: &TcpStream) -> std::io::Result<SocketAddr> {
        match self.config.mode {
            RedirectMode::Node => stream.local_addr(),
            RedirectMode::InPod => stream.original_dst().or_else(|_| stream.local_addr()),
        }
    }

    /// Refuses what would come back to this proxy, again and again: one of its own ports at an
    /// address of its namespace or of the client. At other addresses they are anyone's.
    pub(crate) fn check_not_ourselves(
        &self,
        source: &Workload,
        dst: SocketAddr,
    ) -> Result<(), ProxyError> {
        if self.config.node.is_own_port(dst.port())
            && (source.workload_ips.contains(&dst.ip()) || is_of_this_namespace(dst.ip()))
        {
            return Err(ProxyError::Recursive(dst));
        }
        Ok(())
    }

    /// The certificate of `identity`, waited for until `deadline` where there is none yet.
    pub(crate) async fn certificate(
        &self,
        identity: &Identity,
        deadline: Instant,
    ) -> Result<Arc<WorkloadTls>, ProxyError> {
        if let Some(ready) = self.certificates.ready(identity) {
            return Ok(ready);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        match rt::time::timeout(left, self.certificates.get(identity)).await {
            Ok(found) => Ok(found?),
            Err(_) => Err(ProxyError::Identity(NoCertificate {
                identity: identity.clone(),
                reason: "none has come in time: does the CA answer?".into(),
            })),
        }
    }

    /// When a handshake that begins now must have ended.
    pub(crate) fn handshake_deadline(&self) -> Instant {
        Instant::now() + self.config.handshake_timeout
    }

    /// Connects to `addr`, from `source` if one is given, within the time allowed.
    pub(crate) async fn connect(
        &self,
        addr: SocketAddr,
        source: Option<IpAddr>,
    ) -> Result<TcpStream, ProxyError> {
        // A connection to oneself must not have its own address as foreign source.
        let source = source.filter(|source| *source != addr.ip());
        let options = ConnectOptions {
            source,
            mark: self.config.mark,
            keepalive: self.config.keepalive,
        };
        let connect = rt::net::connect_prepared(addr, &options, |socket| {
            if let Some(sockmap) = self.sockmap() {
                sockmap.offer(socket);
            }
        });
        match rt::time::timeout(self.config.connect_timeout, connect).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(ProxyError::Connect { addr, error }),
            Err(_) => Err(ProxyError::ConnectTimeout { addr }),
        }
    }

    pub(crate) fn sockmap(&self) -> Option<&dyn SockmapBypass> {
        self.config.sockmap.as_deref()
    }

    /// Source address for connections on behalf of `client`.
    pub(crate) fn source_for(&self, client: IpAddr) -> Option<IpAddr> {
        self.config.original_source.then_some(client)
    }

    /// Takes over a listening socket, with the options that every connection it accepts inherits.
    pub(crate) fn listener(&self, listener: TcpListener) -> Listener {
        let listener = Listener::from_std(listener);
        let mut set = listener.set_nodelay();
        if let Some(keepalive) = &self.config.keepalive {
            set = set.and_then(|()| listener.set_keepalive(keepalive));
        }
        if let Err(error) = set {
            tracing::warn!("cannot set the options of accepted connections: {error}");
        }
        listener
    }

    /// What a tunnel of this worker is run with.
    pub(crate) fn tunnel_setup<'a>(&'a self, role: Role, place: &'a Place) -> Setup<'a> {
        Setup {
            role,
            config: match role {
                Role::Client => &self.config.client,
                Role::Server => &self.config.server,
            },
            cpu: self.handshakes.cpu(),
            place: Some(place),
            telemetry: &self.telemetry,
            memory: &self.memory,
            ping: (self.config.ping_interval, self.config.ping_timeout),
        }
    }

    /// Connections that wait for their workload to become known.
    #[cfg(test)]
    pub(crate) fn waiting_for_workloads(&self) -> usize {
        self.updated.waiting()
    }

    pub(crate) fn track(&self, tunnel: &Rc<Tunnel>) {
        let mut accepted = self.accepted.borrow_mut();
        if accepted.len() == accepted.capacity() {
            accepted.retain(|tunnel| tunnel.strong_count() > 0);
        }
        accepted.push(Rc::downgrade(tunnel));
    }

    /// Stops accepting, and tells all peers that nothing new is taken.
    pub(crate) fn begin_drain(&self, accept_for: Duration) {
        self.accept_for.set(accept_for);
        self.draining.set(true);
        self.drain.notify();
        for tunnel in self.accepted.borrow().iter().filter_map(Weak::upgrade) {
            tunnel.shutdown_graceful();
        }
    }

    /// Ends the tunnels this worker opened: connections that a drain lets finish may still have
    /// needed them.
    pub(crate) fn end_drain(&self) {
        for tunnel in self.pool.tunnels() {
            tunnel.shutdown_graceful();
        }
    }

    /// All tunnels, accepted and opened.
    pub(crate) fn tunnels(&self) -> Vec<Rc<Tunnel>> {
        let accepted = self.accepted.borrow();
        let mut all: Vec<_> = accepted.iter().filter_map(Weak::upgrade).collect();
        all.extend(self.pool.tunnels());
        all
    }
}

/// Whether an interface here has `ip`: only then can a socket that is not transparent be bound to
/// it. What cannot be found out counts as one.
fn is_of_this_namespace(ip: IpAddr) -> bool {
    let bound = UdpSocket::bind((ip, 0));
    !bound.is_err_and(|error| error.kind() == std::io::ErrorKind::AddrNotAvailable)
}
