//! Connections captured from local pods (port 15001).

use std::net::SocketAddr;
use std::sync::Arc;

use http::StatusCode;
use mesh::{Authority, ConnectionFacts, Route, Service, Verdict, Workload};
use tokio::net::TcpStream;

use crate::copy;
use crate::error::Error;
use crate::headers::{connect_request, random};
use crate::pool::Key;
use crate::proxy::Proxy;
use crate::record::{Parties, Record, Reporter, Way, failed_early};
use crate::sockets::{connect, prepare, reset_on_close};

/// Serves one captured connection to its end.
pub(crate) async fn handle(
    proxy: Arc<Proxy>,
    mut client: TcpStream,
    src: SocketAddr,
    dst: SocketAddr,
) {
    let _alive = proxy.alive();
    if let Err(error) = serve(&proxy, &mut client, src, dst).await {
        reset_on_close(&client);
        failed_early(&proxy.stats, Reporter::Source, (src, dst), &error);
    }
}

/// A connection whose way is known.
struct Connection<'a> {
    proxy: &'a Proxy,
    client: &'a mut TcpStream,
    src: SocketAddr,
    source: &'a Arc<Workload>,
}

/// Errors returned are those before the connection was counted as opened.
async fn serve(
    proxy: &Proxy,
    client: &mut TcpStream,
    src: SocketAddr,
    dst: SocketAddr,
) -> Result<(), Error> {
    prepare(client)?;
    let source = &proxy.wait_for_workload(src.ip()).await?;
    let node = &proxy.config.node;
    let route = proxy
        .publisher
        .snapshot()
        .route(node, source, dst, random())?;
    let mut connection = Connection {
        proxy,
        client,
        src,
        source,
    };
    match route {
        // Not a workload, and one of our ports: only we listen there.
        Route::Passthrough { dst } if node.is_own_port(dst.port()) => {
            return Err(Error::Recursive(dst));
        }
        Route::Passthrough { dst } => connection.plain(dst, None, false).await,
        Route::Tcp { dst, workload, .. } => connection.plain(dst, Some(workload), false).await,
        // A pod of this node: its HBONE port is captured for this very proxy. Connected directly,
        // after the checks the far end would have made.
        Route::Hbone {
            authority: Authority::Address(target),
            workload: Some(workload),
            to_waypoint: false,
            ..
        } if node.is_local(&workload) && workload.workload_ips.contains(&target.ip()) => {
            connection.plain(target, Some(workload), true).await;
        }
        Route::Hbone {
            gateway,
            authority,
            workload,
            service,
            expected,
            extra_sans,
            ..
        } => {
            let key = Key {
                identity: source.identity(),
                gateway,
                expected,
                names: extra_sans,
                source: src.ip(),
            };
            let service = service.as_deref();
            connection
                .tunnelled(key, &authority, workload, service)
                .await;
        }
    }
    Ok(())
}

impl Connection<'_> {
    fn record(
        &self,
        dst: SocketAddr,
        destination: Option<Arc<Workload>>,
        hbone: Option<String>,
    ) -> Record {
        let parties = Parties {
            reporter: Reporter::Source,
            src: self.src,
            dst,
            source: Some(Arc::clone(self.source)),
            destination,
            identity: hbone.is_some().then(|| self.source.identity()),
            hbone,
        };
        Record::open(&self.proxy.stats, parties)
    }

    fn close(&self, record: Record, result: &Result<(), Error>) {
        if result.is_err() {
            reset_on_close(self.client);
        }
        record.close(result);
    }

    /// In plain TCP; authorized here if the destination is a mesh pod of this node.
    async fn plain(&mut self, dst: SocketAddr, workload: Option<Arc<Workload>>, authorize: bool) {
        let record = self.record(dst, workload.clone(), None);
        let relayed = async {
            if let Some(workload) = workload.filter(|_| authorize) {
                self.authorize(&workload, dst)?;
            }
            let source = self.proxy.source_for(self.src.ip());
            let mut server = connect(dst, source).await?;
            let result = copy::sockets(self.client, &mut server, &record).await;
            if result.is_err() {
                reset_on_close(&server);
            }
            result
        };
        let result = relayed.await;
        self.close(record, &result);
    }

    fn authorize(&self, workload: &Workload, dst: SocketAddr) -> Result<(), Error> {
        if self.proxy.config.node.is_own_port(dst.port()) {
            return Err(Error::Recursive(dst));
        }
        let facts = ConnectionFacts {
            identity: Some(self.source.identity_ref()),
            src: self.src.ip(),
            dst,
        };
        match self.proxy.publisher.snapshot().authorize(workload, &facts) {
            Verdict::Allow => Ok(()),
            Verdict::Deny(reason) => Err(Error::Denied(reason)),
        }
    }

    async fn tunnelled(
        &mut self,
        key: Key,
        authority: &Authority,
        workload: Option<Arc<Workload>>,
        service: Option<&Service>,
    ) {
        let authority = authority.to_string();
        let record = self.record(key.gateway, workload, Some(authority.clone()));
        let relayed = async {
            let request = connect_request(&authority, self.src, self.source, service)?;
            let opened = self.proxy.pool.open(self.proxy, &key, &request).await?;
            let (_lease, response, send) = opened;
            let response = response.await?;
            if response.status() != StatusCode::OK {
                return Err(Error::Status(response.status()));
            }
            let stream = (send, response.into_body());
            copy::socket_and_tunnel(self.client, stream, &record, Way::Request).await
        };
        let result = relayed.await;
        self.close(record, &result);
    }
}
