//! What all connections share, and the accept loops.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use control::SnapshotPublisher;
use mesh::Workload;
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};

use crate::config::Config;
use crate::error::Error;
use crate::identity::Certificates;
use crate::pool::{self, Pool};
use crate::record::Stats;
use crate::sockets::Listeners;
use crate::{inbound, outbound};

/// How long a captured connection waits for its pod to become known.
const WORKLOAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after `accept(2)` failed for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The proxy. One per process, or several in a test.
#[derive(Debug)]
pub struct Proxy {
    pub(crate) config: Config,
    pub(crate) publisher: SnapshotPublisher,
    pub(crate) certificates: Certificates,
    pub(crate) pool: Pool,
    pub(crate) stats: Arc<Stats>,
    /// Set once, when draining begins.
    pub(crate) draining: watch::Sender<bool>,
    changed: Arc<Notify>,
    connections: AtomicUsize,
    ended: Notify,
}

/// Counts a connection, or a request in a tunnel, as long as it lives.
#[derive(Debug)]
pub(crate) struct Alive(Arc<Proxy>);

impl Drop for Alive {
    fn drop(&mut self) {
        if self.0.connections.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.ended.notify_waiters();
        }
    }
}

impl Proxy {
    /// A proxy for the workloads of `config`'s node in `publisher`.
    pub fn new(
        config: Config,
        publisher: SnapshotPublisher,
        certificates: Certificates,
    ) -> Arc<Self> {
        let changed = Arc::new(Notify::new());
        let notify = Arc::clone(&changed);
        publisher.on_change(Box::new(move |_| notify.notify_waiters()));
        Arc::new(Self {
            config,
            publisher,
            certificates,
            pool: Pool::default(),
            stats: Arc::default(),
            draining: watch::Sender::new(false),
            changed,
            connections: AtomicUsize::new(0),
            ended: Notify::new(),
        })
    }

    /// The counters.
    pub const fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Serves `listeners` until [`Proxy::drain`]. Call it in the runtime that is to do the work.
    ///
    /// # Errors
    /// A listener cannot be used.
    pub fn serve(self: &Arc<Self>, listeners: Listeners) -> io::Result<()> {
        tokio::spawn(accept(self, listeners.outbound, outbound::handle)?);
        tokio::spawn(accept(
            self,
            listeners.plaintext,
            inbound::handle_plaintext,
        )?);
        tokio::spawn(accept(self, listeners.hbone, inbound::handle)?);
        tokio::spawn(pool::sweep(Arc::downgrade(self)));
        Ok(())
    }

    /// Stops accepting and waits until all connections have ended, but not longer than `patience`.
    pub async fn drain(&self, patience: Duration) {
        self.draining.send_replace(true);
        let ended = async {
            loop {
                let ended = self.ended.notified();
                if self.connections.load(Ordering::Acquire) == 0 {
                    return;
                }
                ended.await;
            }
        };
        let _ = tokio::time::timeout(patience, ended).await; // what is left ends with the process
    }

    pub(crate) fn alive(self: &Arc<Self>) -> Alive {
        self.connections.fetch_add(1, Ordering::AcqRel);
        Alive(Arc::clone(self))
    }

    /// The workload with `ip`, anywhere in the mesh.
    pub(crate) fn workload(&self, ip: IpAddr) -> Option<Arc<Workload>> {
        let snapshot = self.publisher.snapshot();
        let found = snapshot.workload_by_ip(&self.config.node.network, ip);
        found.cloned()
    }

    /// The workload with `ip`, if it is on this node.
    pub(crate) fn local_workload(&self, ip: IpAddr) -> Result<Arc<Workload>, Error> {
        let workload = self.workload(ip);
        workload
            .filter(|workload| self.config.node.is_local(workload))
            .ok_or_else(|| Error::UnknownWorkload {
                ip,
                node: (*self.config.node.node).into(),
            })
    }

    /// As [`Proxy::local_workload`], waiting a while for a pod that has just started.
    pub(crate) async fn wait_for_workload(&self, ip: IpAddr) -> Result<Arc<Workload>, Error> {
        if let Ok(workload) = self.local_workload(ip) {
            return Ok(workload);
        }
        let appeared = async {
            loop {
                let changed = self.changed.notified();
                if let Ok(workload) = self.local_workload(ip) {
                    return workload;
                }
                changed.await;
            }
        };
        match tokio::time::timeout(WORKLOAD_TIMEOUT, appeared).await {
            Ok(workload) => Ok(workload),
            Err(_) => self.local_workload(ip),
        }
    }

    /// Source address of connections to local pods on behalf of `client`.
    pub(crate) fn source_for(&self, client: IpAddr) -> Option<IpAddr> {
        self.config.original_source.then_some(client)
    }
}

/// Hands every connection of `listener` to `handle`, with the addresses it was captured with.
fn accept<F, H>(
    proxy: &Arc<Proxy>,
    listener: TcpListener,
    handle: F,
) -> io::Result<impl Future<Output = ()> + Send + use<F, H>>
where
    F: Fn(Arc<Proxy>, TcpStream, SocketAddr, SocketAddr) -> H + Send,
    H: Future<Output = ()> + Send + 'static,
{
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let proxy = Arc::clone(proxy);
    let mut draining = proxy.draining.subscribe();
    Ok(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = draining.wait_for(|draining| *draining) => return,
            };
            match accepted {
                Ok((stream, src)) => {
                    let Ok(dst) = stream.local_addr() else {
                        continue;
                    }; // gone already
                    let (src, dst) = (canonical(src), canonical(dst));
                    tokio::spawn(handle(Arc::clone(&proxy), stream, src, dst));
                }
                Err(error) => {
                    tracing::warn!("cannot accept connections: {error}; trying again");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
