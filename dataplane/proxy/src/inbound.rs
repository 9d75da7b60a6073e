//! Tunnels from other proxies and waypoints (port 15008).

use std::future::poll_fn;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use hbone::{RequestHead, Role};
use mesh::{Identity, Workload};
use rt::net::TcpStream;
use telemetry::{ConnectionInfo, HboneTarget, Reporter, Security};
use tls::Handshake;

use crate::baggage::baggage;
use crate::context::{Alive, Context};
use crate::error::ProxyError;
use crate::local::{Admitted, Arrival};
use crate::pods::Nobody;
use crate::pool::Key;
use crate::tunnel::{self, Transport, Tunnel, TunnelOwner, TunnelStream};
use crate::{plaintext, relay};

/// Accepts one tunnel. The tunnel's own tasks go on after this returns.
pub(crate) async fn handle(context: Rc<Context>, client: TcpStream, _alive: Alive) {
    let Ok(src) = client.peer_addr() else { return }; // reset before it was looked at
    let Ok(dst) = context.original_dst(&client) else {
        return;
    };
    handle_from(context, client, src, dst).await;
}

/// The client's end of a connection whose other end is accepted here, as if it had come from a pod
/// of this node to another: its HBONE port, or whichever it wants tunnels on. It goes over
/// loopback.
pub(crate) async fn own_end(context: &Rc<Context>, key: &Key) -> Result<TcpStream, ProxyError> {
    let dst = key.gateway;
    let failed = |error| ProxyError::Connect { addr: dst, error };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed)?;
    let addr = listener.local_addr().map_err(failed)?;
    let mut listener = context.listener(listener);
    let client = context.connect(addr, None).await?;
    let local = client.local_addr().map_err(failed)?;
    // Anyone in this namespace could have been quicker.
    let server = loop {
        let server = listener.accept().await.map_err(failed)?;
        if server.peer_addr().is_ok_and(|peer| peer == local) {
            break server;
        }
    };
    let src = SocketAddr::new(key.source.unwrap_or_else(|| local.ip()), local.port());
    if dst.port() == context.config.node.hbone_port {
        rt::spawn_giving_way(handle_from(Rc::clone(context), server, src, dst));
    } else {
        let (context, alive) = (Rc::clone(context), context.alive());
        rt::spawn(async move {
            plaintext::serve(&context, server, (src, dst), None, alive).await;
        });
    }
    Ok(client)
}

async fn handle_from(context: Rc<Context>, client: TcpStream, src: SocketAddr, dst: SocketAddr) {
    match accept(&context, client, src, dst).await {
        Ok(tunnel) => {
            context.track(&tunnel);
            if context.draining.get() {
                tunnel.shutdown_graceful();
            }
        }
        Err(error) => {
            if let Some(fault) = error.fault() {
                context.telemetry.hbone_error(fault);
            }
            context
                .telemetry
                .failed_early(Reporter::Destination, src, dst, error.told());
        }
    }
}

async fn accept(
    context: &Rc<Context>,
    client: TcpStream,
    src: SocketAddr,
    dst: SocketAddr,
) -> Result<Rc<Tunnel>, ProxyError> {
    let workload = match context.wait_for_destination(dst.ip()).await {
        Ok(workload) => workload,
        Err(error) => {
            let _ = client.reset_on_close(); // the client may be gone already
            return Err(error);
        }
    };
    let owner = Box::new(Inbound {
        context: Rc::clone(context),
        dst,
        workload,
    });
    let deadline = context.handshake_deadline();
    let tunnel = shake_hands(context, client, src, owner, deadline);
    match rt::time::timeout(context.config.handshake_timeout, tunnel).await {
        Ok(result) => result,
        Err(_) => Err(ProxyError::HandshakeTimeout { addr: src }),
    }
}

/// The tunnel of a client that means it: nothing is spent on one that only connects.
async fn shake_hands(
    context: &Rc<Context>,
    client: TcpStream,
    src: SocketAddr,
    owner: Box<Inbound>,
    deadline: Instant,
) -> Result<Rc<Tunnel>, ProxyError> {
    let failed = |error: tunnel::SetupError| ProxyError::Setup { addr: src, error };
    let mut transport = Transport::from(client);
    let hello = context
        .handshakes
        .arrival(src.ip(), transport.client_hello())
        .await;
    hello
        .map_err(|displaced| failed(displaced.into()))?
        .map_err(failed)?;
    // Before it takes a place: whoever waits here is in nobody's way.
    let identity = owner.workload.identity_ref();
    let tls = match context.certificate(identity, deadline).await {
        Ok(tls) => tls,
        Err(error) => {
            transport.reset();
            return Err(error);
        }
    };
    let Ok(place) = context.handshakes.incoming(src.ip()).await else {
        transport.reset();
        let max = context.config.handshakes_max;
        return Err(ProxyError::HandshakeOverload { addr: src, max });
    };
    let handshake = Handshake::server(&tls.server).map_err(|error| failed(error.into()))?;
    let setup = context.tunnel_setup(Role::Server, &place);
    let tunnel = tunnel::run(transport, src, handshake, &setup, owner);
    tunnel.await.map_err(failed)
}

/// What the streams of one accepted tunnel share.
#[derive(Debug)]
struct Inbound {
    context: Rc<Context>,
    /// Where the tunnel arrived: a pod's address and the HBONE port.
    dst: SocketAddr,
    workload: Arc<Workload>,
}

impl TunnelOwner for Inbound {
    fn request(&self, tunnel: &Rc<Tunnel>, stream: TunnelStream, head: RequestHead) {
        let peer = tunnel.peer();
        rt::spawn_giving_way(serve(Request {
            alive: self.context.alive(),
            context: Rc::clone(&self.context),
            dst: self.dst,
            workload: Arc::clone(&self.workload),
            src: tunnel.peer_addr(),
            identity: peer.identity().cloned(),
            head,
            stream,
        }));
    }
}

/// One CONNECT request.
struct Request {
    /// From the start: a request that has not been looked at yet is not lost in a drain.
    alive: Alive,
    context: Rc<Context>,
    dst: SocketAddr,
    workload: Arc<Workload>,
    src: SocketAddr,
    identity: Option<Identity>,
    head: RequestHead,
    stream: TunnelStream,
}

/// Sets the connection to the server up. Bytes are relayed by a task of their own, which is all
/// that stays.
async fn serve(request: Request) {
    // Reset before it was looked at. Nobody is told: the codec counts, and bounds, such streams.
    if request.stream.is_gone() {
        return;
    }
    let context = &request.context;
    let target = match request.target() {
        Ok(target) => target,
        Err(error) => {
            request.refuse(&error);
            let dst = request.dst;
            context
                .telemetry
                .failed_early(Reporter::Destination, request.src, dst, error.told());
            return;
        }
    };
    let record = context.telemetry.opened(request.info(target));
    let Some(connected) = request.unless_gone(request.connect(target)).await else {
        record.close(None, telemetry::ResponseFlags::None);
        return;
    };
    match connected {
        Ok(Admitted { server, watch }) => {
            let baggage = context
                .config
                .response_baggage
                .then(|| baggage(&request.workload));
            let answered = request.stream.respond(200, baggage.as_deref(), false);
            if answered.is_err() {
                // The client reset the stream in the same moment.
                record.close(None, telemetry::ResponseFlags::None);
                return;
            }
            let Request { alive, stream, .. } = request;
            rt::spawn(async move {
                let _alive = alive;
                let result = relay::tunnel_to_server(&stream, server, &record, &watch).await;
                relay::finish(record, result);
            });
        }
        Err(error) => {
            request.refuse(&error);
            record.close(Some(&error), error.flags());
        }
    }
}

impl Request {
    /// What the request asks for, if it may ask for it at all.
    fn target(&self) -> Result<SocketAddr, ProxyError> {
        if !self.head.is_connect() {
            let method: String = self.head.method.chars().take(32).collect();
            return Err(ProxyError::Method(method.into()));
        }
        let (context, ip) = (&self.context, self.dst.ip());
        let pod = context
            .pod_at(ip)
            .and_then(|pod| match pod.uid == self.workload.uid {
                true => Ok(pod),
                false => Err(Nobody::Changed),
            });
        let pod = pod.map_err(|why| {
            // Whose certificate was shown is not there any more: what comes next is to see another.
            self.stream.tunnel().shutdown_graceful();
            context.unknown_destination(ip, why)
        })?;
        let (node, snapshot) = (&context.config.node, context.snapshot());
        Ok(snapshot.resolve_inbound(node, &pod, self.dst, &self.head.authority)?)
    }

    async fn connect(&self, target: SocketAddr) -> Result<Admitted, ProxyError> {
        let arrival = Arrival {
            pod: &self.workload,
            identity: self.identity.as_ref(),
            src: self.src.ip(),
            target,
        };
        self.context.admit(&arrival).await
    }

    /// Runs `future` as long as the client waits for its answer. One that opens streams and resets
    /// them must not leave a connection being set up behind for each.
    async fn unless_gone<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        poll_fn(|cx| {
            if self.stream.poll_failure(cx).is_ready() {
                return Poll::Ready(None);
            }
            future.as_mut().poll(cx).map(Some)
        })
        .await
    }

    fn refuse(&self, error: &ProxyError) {
        // Fails only when the client has already reset the stream.
        let _ = self.stream.respond(error.status(), None, true);
    }

    fn info(&self, target: SocketAddr) -> ConnectionInfo {
        let mut info = ConnectionInfo::new(Reporter::Destination, self.src, self.dst);
        // Behind a gateway of another network the peer's address says nothing about the source.
        if self.head.x_forwarded_network.is_none() {
            info.source = self.context.workload(self.src.ip());
        }
        info.destination = Some(Arc::clone(&self.workload));
        info.source_identity = self.identity.clone();
        info.destination_identity = Some(self.workload.identity());
        info.security = Security::MutualTls;
        info.hbone_dst = Some(HboneTarget::Address(target));
        info
    }
}
