//! Tunnels to other proxies, kept and shared by the connections of one worker.
//!
//! The key is upstream's: who we are, where we dial, whom we accept there, and the source address.
//! When a tunnel carries as many streams as it may, the next connection opens another. Streams that
//! end make room again. Unused tunnels are closed by [`Pool::close_unused`].
//!
//! Who finds no room waits in a queue of its key, first come, first served ([`queue`]): while a
//! tunnel is being set up nobody opens one of its own, and if it cannot be had all who wait fail
//! with it instead of trying one after the other.

mod queue;

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hbone::{ConnectRequest, OpenError, Role};
use mesh::Identity;
use telemetry::Event;
use tls::{ExpectedPeers, Handshake};

use crate::context::Context;
use crate::error::ProxyError;
use crate::gate::Overload;
use crate::inbound;
use crate::tunnel::{self, ClientSide, Tunnel, TunnelStream};

use queue::Entry;

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

/// One worker's tunnels by key.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    entries: RefCell<HashMap<Key, Rc<Entry>>>,
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
                Ok(200) => return Ok(stream),
                Ok(status) => return Err(ProxyError::Status(status)),
                Err(failure) if failure.is_unprocessed() && !retried => {
                    retried = true;
                    context.telemetry.count_event(Event::Retry);
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
        let mut has_waited = false;
        loop {
            let entry = self.entry(key);
            let place = match entry.place() {
                Some(place) => place,
                None => {
                    let place = entry.wait(context, key, has_waited).await?;
                    has_waited = true;
                    place
                }
            };
            match place.tunnel().open(request) {
                Ok(stream) => return Ok(stream),
                // It filled up or ended since it was found.
                Err(OpenError::Exhausted { .. } | OpenError::GoingAway) => rt::yield_now().await,
                Err(OpenError::IdsExhausted) => place.tunnel().shutdown_graceful(),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn entry(&self, key: &Key) -> Rc<Entry> {
        let mut entries = self.entries.borrow_mut();
        if let Some(entry) = entries.get(key) {
            return Rc::clone(entry);
        }
        Rc::clone(entries.entry(key.clone()).or_default())
    }

    /// Forgets `key` if nothing is left of it.
    fn forget_unused(&self, key: &Key) {
        let mut entries = self.entries.borrow_mut();
        if entries.get(key).is_some_and(|entry| entry.is_unused()) {
            entries.remove(key);
        }
    }

    /// Closes tunnels that no stream has used for `unused`.
    pub(crate) fn close_unused(&self, unused: Duration) {
        let mut idle = Vec::new();
        self.entries.borrow_mut().retain(|_, entry| {
            idle.extend(entry.take_idle(unused));
            !entry.is_unused()
        });
        for tunnel in idle {
            tunnel.shutdown_graceful();
        }
    }

    /// All tunnels that are kept.
    pub(crate) fn tunnels(&self) -> Vec<Rc<Tunnel>> {
        let entries = self.entries.borrow();
        entries.values().flat_map(|entry| entry.tunnels()).collect()
    }
}

async fn establish(context: &Rc<Context>, key: &Key) -> Result<Rc<Tunnel>, ProxyError> {
    let addr = key.gateway;
    let deadline = context.handshake_deadline();
    let workload = context.certificate(&key.identity, deadline).await?;
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
    let max = context.config.handshakes_max;
    let tunnel = async {
        let place = context.handshakes.outgoing(addr.ip()).await;
        let place = place.map_err(|Overload| ProxyError::HandshakeOverload { addr, max })?;
        let setup = context.tunnel_setup(Role::Client, &place);
        let owner = Box::new(ClientSide);
        let tunnel = tunnel::run(stream, addr, handshake, &setup, owner);
        tunnel.await.map_err(failed)
    };
    match rt::time::timeout(context.config.handshake_timeout, tunnel).await {
        Ok(result) => result,
        Err(_) => Err(ProxyError::HandshakeTimeout { addr }),
    }
}
