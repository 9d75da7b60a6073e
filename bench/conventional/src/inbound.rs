//! Connections to local pods: tunnels (port 15008), and plaintext from outside the mesh (15006).

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use h2::server::{Builder, Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::{Method, Request, Response};
use mesh::{ConnectionFacts, Identity, Verdict, Workload};
use tokio::io::BufReader;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::copy;
use crate::error::Error;
use crate::headers::baggage;
use crate::identity::peer_identity;
use crate::pool::{
    CONNECTION_WINDOW, FRAME_SIZE, HANDSHAKE_TIMEOUT, STREAM_WINDOW, TLS_BUFFER, unanswered,
};
use crate::proxy::Proxy;
use crate::record::{Parties, Record, Reporter, Way, failed_early};
use crate::sockets::{connect, prepare, reset_on_close};

/// Serves one tunnel to its end.
pub(crate) async fn handle(proxy: Arc<Proxy>, client: TcpStream, src: SocketAddr, dst: SocketAddr) {
    if let Err(error) = serve(&proxy, client, src, dst).await {
        failed_early(&proxy.stats, Reporter::Destination, (src, dst), &error);
    }
}

type Tunnel = Connection<TlsStream<BufReader<TcpStream>>, Bytes>;

/// What the requests in one tunnel share.
#[derive(Debug)]
struct Peer {
    proxy: Arc<Proxy>,
    src: SocketAddr,
    /// Where the tunnel arrived: a pod's address and the HBONE port.
    dst: SocketAddr,
    workload: Arc<Workload>,
    identity: Option<Identity>,
}

/// Errors returned are those before the tunnel was set up.
async fn serve(
    proxy: &Arc<Proxy>,
    client: TcpStream,
    src: SocketAddr,
    dst: SocketAddr,
) -> Result<(), Error> {
    prepare(&client)?;
    let workload = match proxy.local_workload(dst.ip()) {
        Ok(workload) => workload,
        Err(error) => {
            reset_on_close(&client);
            return Err(error);
        }
    };
    let setup = set_up(proxy, client, src, &workload);
    let setup = tokio::time::timeout(HANDSHAKE_TIMEOUT, setup).await;
    let (mut tunnel, identity) = setup.map_err(|_| Error::Timeout {
        what: "the TLS handshake",
        addr: src,
    })??;
    let peer = Arc::new(Peer {
        proxy: Arc::clone(proxy),
        src,
        dst,
        workload,
        identity,
    });
    let unanswered = unanswered(tunnel.ping_pong());
    tokio::pin!(unanswered);
    let mut draining = proxy.draining.subscribe();
    let mut told = false;
    loop {
        tokio::select! {
            request = tunnel.accept() => match request {
                Some(Ok((request, respond))) => {
                    tokio::spawn(answer(Arc::clone(&peer), request, respond));
                }
                Some(Err(error)) => {
                    tracing::debug!("tunnel from {src} ended: {error}");
                    return Ok(());
                }
                None => return Ok(()),
            },
            _ = draining.wait_for(|draining| *draining), if !told => {
                told = true;
                tunnel.graceful_shutdown();
            }
            () = &mut unanswered => {
                tracing::debug!("tunnel from {src} ended: the peer does not answer pings");
                tunnel.abrupt_shutdown(Reason::NO_ERROR);
                return Ok(());
            }
        }
    }
}

async fn set_up(
    proxy: &Proxy,
    client: TcpStream,
    src: SocketAddr,
    workload: &Workload,
) -> Result<(Tunnel, Option<Identity>), Error> {
    let credentials = proxy.certificates.get(workload.identity_ref())?;
    let client = BufReader::with_capacity(proxy.config.read_buffer, client);
    let acceptor = TlsAcceptor::from(Arc::clone(&credentials.server));
    let tls = acceptor.accept(client).await;
    let mut tls = tls.map_err(|error| Error::Tls { addr: src, error })?;
    let session = tls.get_mut().1;
    session.set_buffer_limit(Some(TLS_BUFFER));
    let domain = workload.identity_ref().trust_domain();
    let identity = peer_identity(session.peer_certificates(), domain);
    let tunnel = Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_SIZE)
        .max_header_list_size(64 << 10)
        .max_send_buffer_size(STREAM_WINDOW as usize)
        .max_concurrent_streams(200)
        .handshake(tls)
        .await?;
    Ok((tunnel, identity))
}

/// Answers one CONNECT request and serves it to its end.
async fn answer(peer: Arc<Peer>, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
    let _alive = peer.proxy.alive();
    let target = match peer.target(&request) {
        Ok(target) => target,
        Err(error) => {
            refuse(&mut respond, &error);
            let ends = (peer.src, peer.dst);
            failed_early(&peer.proxy.stats, Reporter::Destination, ends, &error);
            return;
        }
    };
    let record = Record::open(&peer.proxy.stats, peer.parties(target));
    let mut server = match peer.connect(target).await {
        Ok(server) => server,
        Err(error) => {
            refuse(&mut respond, &error);
            record.close(&Err(error));
            return;
        }
    };
    let relayed = async {
        let mut response = Response::new(());
        let baggage = baggage(&peer.workload);
        response.headers_mut().insert("baggage", baggage);
        let send = respond.send_response(response, false)?;
        let stream = (send, request.into_body());
        copy::socket_and_tunnel(&mut server, stream, &record, Way::Response).await
    };
    let result = relayed.await;
    if result.is_err() {
        reset_on_close(&server);
    }
    record.close(&result);
}

fn refuse(respond: &mut SendResponse<Bytes>, error: &Error) {
    let mut response = Response::new(());
    *response.status_mut() = error.status();
    let _ = respond.send_response(response, true); // the client may have reset the stream
}

impl Peer {
    /// What `request` asks for, if it may ask for it at all.
    fn target(&self, request: &Request<RecvStream>) -> Result<SocketAddr, Error> {
        if request.method() != Method::CONNECT {
            return Err(Error::Method);
        }
        let authority = request.uri().authority().map_or("", |text| text.as_str());
        let snapshot = self.proxy.publisher.snapshot();
        let workload = snapshot.current(&self.workload);
        let workload = workload.ok_or_else(|| Error::UnknownWorkload {
            ip: self.dst.ip(),
            node: (*self.proxy.config.node.node).into(),
        })?;
        let node = &self.proxy.config.node;
        Ok(snapshot.resolve_inbound(node, workload, self.dst, authority)?)
    }

    async fn connect(&self, target: SocketAddr) -> Result<TcpStream, Error> {
        let facts = ConnectionFacts {
            identity: self.identity.as_ref(),
            src: self.src.ip(),
            dst: target,
        };
        let snapshot = self.proxy.publisher.snapshot();
        if let Verdict::Deny(reason) = snapshot.authorize(&self.workload, &facts) {
            return Err(Error::Denied(reason));
        }
        connect(target, self.proxy.source_for(self.src.ip())).await
    }

    fn parties(&self, target: SocketAddr) -> Parties {
        Parties {
            reporter: Reporter::Destination,
            src: self.src,
            dst: self.dst,
            source: self.proxy.workload(self.src.ip()),
            destination: Some(Arc::clone(&self.workload)),
            hbone: Some(target.to_string()),
            identity: self.identity.clone(),
        }
    }
}

/// Serves one connection from outside the mesh: authorized without an identity.
pub(crate) async fn handle_plaintext(
    proxy: Arc<Proxy>,
    mut client: TcpStream,
    src: SocketAddr,
    dst: SocketAddr,
) {
    let _alive = proxy.alive();
    let relayed = async {
        prepare(&client)?;
        if proxy.config.node.is_own_port(dst.port()) {
            return Err(Error::Recursive(dst));
        }
        let workload = proxy.local_workload(dst.ip())?;
        let facts = ConnectionFacts {
            identity: None,
            src: src.ip(),
            dst,
        };
        if let Verdict::Deny(reason) = proxy.publisher.snapshot().authorize(&workload, &facts) {
            return Err(Error::Denied(reason));
        }
        Ok((connect(dst, proxy.source_for(src.ip())).await?, workload))
    };
    let (mut server, workload) = match relayed.await {
        Ok(connected) => connected,
        Err(error) => {
            reset_on_close(&client);
            failed_early(&proxy.stats, Reporter::Destination, (src, dst), &error);
            return;
        }
    };
    let parties = Parties {
        reporter: Reporter::Destination,
        src,
        dst,
        source: proxy.workload(src.ip()),
        destination: Some(workload),
        hbone: None,
        identity: None,
    };
    let record = Record::open(&proxy.stats, parties);
    let result = copy::sockets(&mut client, &mut server, &record).await;
    if result.is_err() {
        reset_on_close(&client);
        reset_on_close(&server);
    }
    record.close(&result);
}
