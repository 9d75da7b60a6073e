//! Tunnels to other proxies, kept and shared by the connections of one worker.
//!
//! The key is upstream's: who we are, where we dial, whom we accept there, and the source address.
//! While a tunnel is being set up others with the same key wait for it instead of opening more, and
//! if it cannot be had they all fail with it instead of trying one after the other; when a tunnel
//! carries as many streams as it may, the next connection opens another. Streams that end make room
//! again. Unused tunnels are closed by [`Pool::close_unused`].

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use hbone::{ConnectRequest, OpenError, Role};
use mesh::Identity;
use rt::sync::Broadcast;
use telemetry::Happening;
use tls::{ExpectedPeers, Handshake};

use crate::context::Context;
use crate::error::ProxyError;
use crate::gate::Overload;
use crate::inbound;
use crate::tunnel::{self, ClientSide, Tunnel, TunnelStream};

/// What connections must have in common to share a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) identity: Identity,
    pub(crate) gateway: SocketAddr,
    pub(crate) expected: Arc<[Identity]>,
    pub(crate) names: Arc<[Arc<str>]>,
    pub(crate) source: Option<IpAddr>,
    /// The other end is this proxy, for a pod of this node.
    pub(crate) own: bool,
}

#[derive(Debug, Default)]
struct Entry {
    tunnels: Vec<Rc<Tunnel>>,
    attempt: Option<Rc<Attempt>>,
}

/// A tunnel being set up, and those who wait for it.
#[derive(Debug, Default)]
struct Attempt {
    over: Broadcast,
    failure: RefCell<Option<Rc<ProxyError>>>,
}

/// One worker's tunnels by key.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    entries: RefCell<HashMap<Key, Entry>>,
}

enum Found {
    Tunnel(Rc<Tunnel>),
    /// It is this caller's turn to connect.
    Connect(Rc<Attempt>),
    /// Somebody else connects.
    Wait(Rc<Attempt>),
}

/// Ends a caller's turn to connect, whatever happens to it.
struct Turn<'a> {
    pool: &'a Pool,
    key: &'a Key,
    attempt: Rc<Attempt>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut entries = self.pool.entries.borrow_mut();
        if let Some(entry) = entries.get_mut(self.key) {
            entry.attempt = None;
            if entry.tunnels.is_empty() {
                entries.remove(self.key);
            }
        }
        self.attempt.over.notify();
    }
}

impl Pool {
    /// Connects through a tunnel to `key.gateway`: a stream whose request was answered with 200.
    ///
    /// A request that the peer says it has not looked at (REFUSED_STREAM, or GOAWAY with a lower
    /// last stream) is sent once more; any other failure may come after the server has seen the
    /// connection, and is final.
    ///
    /// # Errors
    /// No tunnel, or the request was refused.
    pub(crate) async fn connect(
        &self,
        context: &Rc<Context>,
        key: &Key,
        request: &ConnectRequest<'_>,
    ) -> Result<TunnelStream, ProxyError> {
        let mut retried = false;
        loop {
            let stream = self.open(context, key, request).await?;
            match stream.response().await {
                Ok(response) if response.status == 200 => return Ok(stream),
                Ok(response) => return Err(ProxyError::Status(response.status)),
                Err(failure) if failure.is_unprocessed() && !retried => {
                    retried = true;
                    context.telemetry.happened(Happening::Retry);
                    let tunnel = Rc::clone(stream.tunnel());
                    drop(stream);
                    tunnel.note_refusal();
                }
                Err(failure) => return Err(failure.into()),
            }
        }
    }

    /// Opens a stream to `key.gateway`, over a tunnel that is there or a new one.
    pub(crate) async fn open(
        &self,
        context: &Rc<Context>,
        key: &Key,
        request: &ConnectRequest<'_>,
    ) -> Result<TunnelStream, ProxyError> {
        loop {
            let tunnel = match self.find(key) {
                Found::Tunnel(tunnel) => tunnel,
                Found::Wait(attempt) => {
                    self.wait(key, &attempt).await;
                    if let Some(failure) = &*attempt.failure.borrow() {
                        return Err(ProxyError::Shared(Rc::clone(failure)));
                    }
                    continue;
                }
                Found::Connect(attempt) => {
                    let turn = Turn {
                        pool: self,
                        key,
                        attempt,
                    };
                    let tunnel = establish(context, key).await.map_err(|error| {
                        if let Some(fault) = error.fault() {
                            context.telemetry.hbone_error(fault);
                        }
                        let error = Rc::new(error);
                        *turn.attempt.failure.borrow_mut() = Some(Rc::clone(&error));
                        ProxyError::Shared(error)
                    })?;
                    let mut entries = self.entries.borrow_mut();
                    entries
                        .entry(key.clone())
                        .or_default()
                        .tunnels
                        .push(Rc::clone(&tunnel));
                    tunnel
                }
            };
            match tunnel.open(request) {
                Ok(stream) => return Ok(stream),
                // It filled up or ended since it was found.
                Err(OpenError::Exhausted { .. } | OpenError::GoingAway) => rt::yield_now().await,
                Err(OpenError::IdsExhausted) => tunnel.shutdown_graceful(),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn find(&self, key: &Key) -> Found {
        let mut entries = self.entries.borrow_mut();
        let Some(entry) = entries.get_mut(key) else {
            let attempt = Rc::new(Attempt::default());
            let entry = Entry {
                tunnels: Vec::new(),
                attempt: Some(Rc::clone(&attempt)),
            };
            entries.insert(key.clone(), entry);
            return Found::Connect(attempt);
        };
        entry.tunnels.retain(|tunnel| tunnel.error().is_none());
        if let Some(tunnel) = entry.tunnels.iter().find(|tunnel| tunnel.can_open()) {
            return Found::Tunnel(Rc::clone(tunnel));
        }
        if let Some(attempt) = &entry.attempt {
            return Found::Wait(Rc::clone(attempt));
        }
        let attempt = entry.attempt.insert(Rc::default());
        Found::Connect(Rc::clone(attempt))
    }

    async fn wait(&self, key: &Key, attempt: &Attempt) {
        let mut registered = false;
        poll_fn(|cx| {
            if registered {
                return Poll::Ready(());
            }
            registered = true;
            let entries = self.entries.borrow();
            let Some(entry) = entries.get(key) else {
                return Poll::Ready(());
            };
            attempt.over.register(cx);
            for tunnel in &entry.tunnels {
                tunnel.register_change(cx);
            }
            Poll::Pending
        })
        .await;
    }

    /// Closes tunnels that no stream has used for `unused`.
    pub(crate) fn close_unused(&self, unused: Duration) {
        self.entries.borrow_mut().retain(|_, entry| {
            entry.tunnels.retain(|tunnel| {
                let idle = tunnel
                    .idle_since()
                    .is_some_and(|since| since.elapsed() >= unused);
                if idle {
                    tunnel.shutdown_graceful();
                }
                !idle && tunnel.error().is_none()
            });
            entry.attempt.is_some() || !entry.tunnels.is_empty()
        });
    }

    /// All tunnels that are kept.
    pub(crate) fn tunnels(&self) -> Vec<Rc<Tunnel>> {
        let entries = self.entries.borrow();
        let tunnels = entries.values().flat_map(|entry| &entry.tunnels);
        tunnels.cloned().collect()
    }
}

async fn establish(context: &Rc<Context>, key: &Key) -> Result<Rc<Tunnel>, ProxyError> {
    let addr = key.gateway;
    let workload = context.certificates.get(&key.identity)?;
    let expected = ExpectedPeers::new(Arc::clone(&key.expected), Arc::clone(&key.names));
    let failed = |error: tunnel::SetupError| ProxyError::Setup { addr, error };
    let handshake =
        Handshake::client(&workload.client, expected).map_err(|error| failed(error.into()))?;
    let connected = if key.own {
        inbound::own_end(context, key).await
    } else {
        context.connect(addr, key.source).await
    };
    let stream = match connected {
        Err(ProxyError::ConnectTimeout { addr }) => return Err(ProxyError::HboneTimeout { addr }),
        other => other?,
    };
    let setup = context.tunnel_setup(Role::Client);
    let max = context.config.handshakes_max;
    let tunnel = async {
        let place = context.handshakes.outgoing().await;
        let _place = place.map_err(|Overload| ProxyError::HandshakeOverload { addr, max })?;
        let owner = Box::new(ClientSide);
        let tunnel = tunnel::run(stream, addr, handshake, &setup, owner);
        tunnel.await.map_err(failed)
    };
    match rt::time::timeout(context.config.handshake_timeout, tunnel).await {
        Ok(result) => result,
        Err(_) => Err(ProxyError::HandshakeTimeout { addr }),
    }
}
