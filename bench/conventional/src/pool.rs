//! Tunnels to other proxies, shared by all connections of the process.
//!
//! A tunnel carries the connections of one source workload to one destination. Only one caller
//! sets a tunnel up; others for the same destination wait for it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{Builder, ResponseFuture, SendRequest};
use h2::{Ping, PingPong, SendStream};
use http::Request;
use mesh::Identity;
use rustls_pki_types::ServerName;
use tokio::io::BufReader;
use tokio_rustls::TlsConnector;

use crate::error::Error;
use crate::proxy::Proxy;
use crate::sockets;

pub(crate) const STREAM_WINDOW: u32 = 4 << 20;
pub(crate) const CONNECTION_WINDOW: u32 = 16 << 20;
pub(crate) const FRAME_SIZE: u32 = 1 << 20;
/// Bound on TLS and HTTP/2 handshakes together.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Ciphertext rustls holds before it wants it written: one large frame rather than a quarter.
pub(crate) const TLS_BUFFER: usize = 256 << 10;
/// Streams on one tunnel, at most.
const STREAMS_MAX: usize = 100;
/// Tunnels without streams are closed after this time.
const UNUSED_MAX: Duration = Duration::from_secs(300);
const SWEEP: Duration = Duration::from_secs(30);
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Tunnels tried for one request: those in the pool may have been closed by the other end.
const ATTEMPTS: usize = 3;

/// Connections with equal keys share tunnels.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) struct Key {
    /// Whose certificate we show.
    pub(crate) identity: Identity,
    /// The other proxy.
    pub(crate) gateway: SocketAddr,
    /// Identities it may show.
    pub(crate) expected: Arc<[Identity]>,
    /// Further names it may show.
    pub(crate) names: Arc<[Arc<str>]>,
    /// Where we connect from.
    pub(crate) source: IpAddr,
}

/// All tunnels.
#[derive(Debug, Default)]
pub(crate) struct Pool(Mutex<HashMap<Key, Arc<Slot>>>);

/// The tunnels of one key.
#[derive(Debug, Default)]
struct Slot {
    tunnels: Mutex<Vec<Arc<Tunnel>>>,
    connecting: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Tunnel {
    sender: SendRequest<Bytes>,
    streams: AtomicUsize,
    unused_since: Mutex<Instant>,
    /// Takes no more streams.
    closed: Arc<AtomicBool>,
}

/// A place on a tunnel. Keep it as long as the stream.
#[derive(Debug)]
pub(crate) struct Lease(Arc<Tunnel>);

impl Drop for Lease {
    fn drop(&mut self) {
        if self.0.streams.fetch_sub(1, Ordering::AcqRel) == 1 {
            *lock(&self.0.unused_since) = Instant::now();
        }
    }
}

impl Tunnel {
    fn lease(self: &Arc<Self>) -> Option<Lease> {
        let limit = STREAMS_MAX.min(self.sender.current_max_send_streams());
        let more = |streams| (streams < limit).then_some(streams + 1);
        let taken = self
            .streams
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        taken.is_ok().then(|| Lease(Arc::clone(self)))
    }

    fn is_wanted(&self) -> bool {
        let unused = self.streams.load(Ordering::Acquire) == 0
            && lock(&self.unused_since).elapsed() > UNUSED_MAX;
        !unused && !self.closed.load(Ordering::Acquire)
    }
}

impl Slot {
    fn lease(&self) -> Option<Lease> {
        let mut tunnels = lock(&self.tunnels);
        tunnels.retain(|tunnel| !tunnel.closed.load(Ordering::Acquire));
        tunnels.iter().find_map(Tunnel::lease)
    }
}

impl Pool {
    /// Sends `request` through a tunnel for `key`.
    pub(crate) async fn open(
        &self,
        proxy: &Proxy,
        key: &Key,
        request: &Request<()>,
    ) -> Result<(Lease, ResponseFuture, SendStream<Bytes>), Error> {
        let mut last = Error::TunnelEnded;
        for _ in 0..ATTEMPTS {
            let lease = self.lease(proxy, key).await?;
            let opened = match lease.0.sender.clone().ready().await {
                Ok(mut sender) => sender.send_request(request.clone(), false),
                Err(error) => Err(error),
            };
            match opened {
                Ok((response, send)) => return Ok((lease, response, send)),
                Err(error) => {
                    lease.0.closed.store(true, Ordering::Release);
                    last = error.into();
                }
            }
        }
        Err(last)
    }

    async fn lease(&self, proxy: &Proxy, key: &Key) -> Result<Lease, Error> {
        let slot = Arc::clone(lock(&self.0).entry(key.clone()).or_default());
        if let Some(lease) = slot.lease() {
            return Ok(lease);
        }
        let _turn = slot.connecting.lock().await;
        if let Some(lease) = slot.lease() {
            return Ok(lease);
        }
        let tunnel = Arc::new(connect(proxy, key).await?);
        tunnel.streams.store(1, Ordering::Release);
        lock(&slot.tunnels).push(Arc::clone(&tunnel));
        Ok(Lease(tunnel))
    }

    fn close_unused(&self) {
        lock(&self.0).retain(|_, slot| {
            let mut tunnels = lock(&slot.tunnels);
            tunnels.retain(|tunnel| tunnel.is_wanted());
            // Somebody who holds the slot is about to use it.
            !tunnels.is_empty() || Arc::strong_count(slot) > 1
        });
    }
}

/// Closes what is not used any more, as long as the proxy lives.
pub(crate) async fn sweep(proxy: Weak<Proxy>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        let Some(proxy) = proxy.upgrade() else { return };
        proxy.pool.close_unused();
    }
}

async fn connect(proxy: &Proxy, key: &Key) -> Result<Tunnel, Error> {
    let addr = key.gateway;
    let credentials = proxy.certificates.get(&key.identity)?;
    let expected = key
        .expected
        .iter()
        .map(|identity| identity.uri().to_owned());
    let names = key.names.iter().map(|name| (**name).to_owned());
    let config = credentials.client(expected.chain(names).collect());
    let tcp = sockets::connect(addr, Some(key.source)).await?;
    let handshake = async {
        let tcp = BufReader::with_capacity(proxy.config.read_buffer, tcp);
        let name = ServerName::IpAddress(addr.ip().into()); // not sent, not checked
        let tls = TlsConnector::from(config).connect(name, tcp).await;
        let mut tls = tls.map_err(|error| Error::Tls { addr, error })?;
        tls.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
        let handshake = Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME_SIZE)
            .max_header_list_size(16 << 10)
            .max_send_buffer_size(STREAM_WINDOW as usize)
            .initial_max_send_streams(STREAMS_MAX)
            .enable_push(false)
            .handshake(tls)
            .await?;
        Ok::<_, Error>(handshake)
    };
    let (sender, mut connection) = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake)
        .await
        .map_err(|_| Error::Timeout {
            what: "the TLS handshake",
            addr,
        })??;
    let closed = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&closed);
    let pings = connection.ping_pong();
    tokio::spawn(async move {
        let result = tokio::select! {
            result = connection => result.map_err(|error| error.to_string()),
            () = unanswered(pings) => Err("the peer does not answer pings".to_owned()),
        };
        ended.store(true, Ordering::Release);
        if let Err(error) = result {
            tracing::debug!("tunnel to {addr} ended: {error}");
        }
    });
    Ok(Tunnel {
        sender,
        streams: AtomicUsize::new(0),
        unused_since: Mutex::new(Instant::now()),
        closed,
    })
}

/// Returns when the other end has not answered a ping in time.
pub(crate) async fn unanswered(pings: Option<PingPong>) {
    let Some(mut pings) = pings else {
        return std::future::pending().await; // taken elsewhere: that is where it is watched
    };
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        let pong = tokio::time::timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await;
        if !matches!(pong, Ok(Ok(_))) {
            return;
        }
    }
}

/// Nothing under these locks can panic half-way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
