//! Connections captured from local pods (port 15001).

use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

use hbone::ConnectRequest;
use mesh::{Authority, ConnectionFacts, Route, Workload};
use rt::net::TcpStream;
use telemetry::{ConnectionInfo, HboneTarget, Reporter, ResponseFlags, Security};

use crate::baggage::{baggage, forwarded, traceparent};
use crate::config::RedirectMode;
use crate::context::{Alive, Context};
use crate::error::ProxyError;
use crate::pool::Key;
use crate::relay;

/// Sets one captured connection up. Its bytes are relayed by a task of their own: what setting up
/// takes is several times the state of the relay, and would be spread between its parts.
pub(crate) async fn handle(context: Rc<Context>, client: TcpStream, alive: Alive) {
    let Ok(src) = client.peer_addr() else { return }; // reset before it was looked at
    let Ok(dst) = context.original_dst(&client) else {
        return;
    };
    if let Err(error) = serve(&context, client, src, dst, alive).await {
        context
            .telemetry
            .failed_early(Reporter::Source, src, dst, &error);
    }
}

/// Errors returned are those before the connection was counted as opened.
async fn serve(
    context: &Rc<Context>,
    client: TcpStream,
    src: SocketAddr,
    dst: SocketAddr,
    alive: Alive,
) -> Result<(), ProxyError> {
    let reset = |client: &TcpStream| {
        let _ = client.reset_on_close(); // the client may be gone already
    };
    let prepared = async {
        let source = context.wait_for_workload(src.ip()).await?;
        let route = route(context, &source, dst)?;
        Ok::<_, ProxyError>((source, route))
    };
    let (source, route) = match prepared.await {
        Ok(prepared) => prepared,
        Err(error) => {
            reset(&client);
            return Err(error);
        }
    };
    let connection = Connection {
        context,
        client,
        src,
        source,
        alive,
    };
    match route {
        Route::Passthrough { dst } => connection.plain(dst, None, None).await,
        Route::Tcp {
            dst,
            workload,
            service,
        } => {
            connection.plain(dst, Some(workload), service).await;
        }
        route @ Route::Hbone { .. } => match local_target(context, &route) {
            Some((target, workload)) if !context.config.same_node_tunnel => {
                connection.local(target, workload, route).await;
            }
            own => connection.hbone(route, own.is_some()).await,
        },
    }
    Ok(())
}

fn route(context: &Context, source: &Workload, dst: SocketAddr) -> Result<Route, ProxyError> {
    let node = &context.config.node;
    let route = context
        .snapshot()
        .route(node, source, dst, context.random())?;
    match &route {
        // Not a workload, and one of our ports: only this proxy listens there.
        Route::Passthrough { dst } if node.is_own_port(dst.port()) => {
            Err(ProxyError::Recursive(*dst))
        }
        // The pod's own address: it would arrive here again, and again.
        Route::Tcp { dst, .. }
            if node.is_own_port(dst.port()) && source.workload_ips.contains(&dst.ip()) =>
        {
            Err(ProxyError::Recursive(*dst))
        }
        _ => Ok(route),
    }
}

/// In node mode a pod of this node is not reached by a tunnel through the network (its HBONE port
/// is captured for this very proxy) but directly, after the checks the far end would have made, or
/// by a tunnel that does not leave this process.
fn local_target(context: &Context, route: &Route) -> Option<(SocketAddr, Arc<Workload>)> {
    let Route::Hbone {
        authority: Authority::Address(target),
        workload: Some(workload),
        to_waypoint: false,
        ..
    } = route
    else {
        return None;
    };
    let local = context.config.mode == RedirectMode::Node
        && context.config.node.is_local(workload)
        && workload.workload_ips.contains(&target.ip());
    local.then(|| (*target, Arc::clone(workload)))
}

/// A captured connection whose way is known.
struct Connection<'a> {
    context: &'a Rc<Context>,
    client: TcpStream,
    src: SocketAddr,
    source: Arc<Workload>,
    alive: Alive,
}

impl Connection<'_> {
    fn info(&self, reporter: Reporter, dst: SocketAddr) -> ConnectionInfo {
        let mut info = ConnectionInfo::new(reporter, self.src, dst);
        info.source = Some(Arc::clone(&self.source));
        info
    }

    /// Plain TCP to a destination that is not in the mesh or does not speak HBONE.
    async fn plain(
        self,
        dst: SocketAddr,
        workload: Option<Arc<Workload>>,
        service: Option<Arc<mesh::Service>>,
    ) {
        let mut info = self.info(Reporter::Source, dst);
        info.destination = workload;
        info.service = service;
        let record = self.context.telemetry.opened(info);
        // The pod's own address where the socket is not in its namespace.
        let source = match self.context.config.mode {
            RedirectMode::Node => self.context.source_for(self.src.ip()),
            RedirectMode::InPod => None,
        };
        match self.context.connect(dst, source).await {
            Ok(server) => {
                let Self { client, alive, .. } = self;
                rt::spawn(async move {
                    let records = [&record];
                    let short_cut = alive.context().short_cut();
                    let relay = relay::client_to_server(client, server, &records, None, short_cut);
                    let result = relay.await;
                    relay::finish(record, result);
                });
            }
            Err(error) => {
                let _ = self.client.reset_on_close();
                record.close(Some(&error), error.flags());
            }
        }
    }

    /// Through a tunnel, `own` if its other end is this proxy.
    async fn hbone(self, route: Route, own: bool) {
        let Route::Hbone {
            gateway,
            authority,
            workload,
            service,
            expected,
            extra_sans,
            ..
        } = route
        else {
            return;
        };
        let mut info = self.info(Reporter::Source, gateway);
        info.destination = workload;
        info.service = service.clone();
        info.source_identity = Some(self.source.identity());
        info.destination_identity = expected.first().cloned();
        info.security = Security::MutualTls;
        info.hbone_dst = Some(match &authority {
            Authority::Address(addr) => HboneTarget::Address(*addr),
            other => HboneTarget::Host(other.to_string().into()),
        });
        let record = self.context.telemetry.opening(info);
        let context = self.context;
        let key = Key {
            identity: self.source.identity(),
            gateway,
            expected,
            names: extra_sans,
            source: match context.config.mode {
                // Not the socket's but what this proxy tells itself.
                RedirectMode::Node if own => Some(self.src.ip()),
                RedirectMode::Node => context.source_for(self.src.ip()),
                RedirectMode::InPod => None,
            },
            own,
        };
        let request = ConnectRequest {
            authority: &authority.to_string(),
            forwarded: Some(&forwarded(self.src, service.as_deref())),
            baggage: Some(&baggage(&self.source)),
            traceparent: Some(&traceparent(std::array::from_fn(|_| context.random()))),
            x_forwarded_network: None,
        };
        match context.pool.connect(context, &key, &request).await {
            Ok(stream) => {
                // Of all that are accepted there, the one that was reached.
                let record = record.proved(stream.tunnel().peer().identity());
                let Self { client, alive, .. } = self;
                rt::spawn(async move {
                    let _alive = alive;
                    let result = relay::client_to_tunnel(client, &stream, &record).await;
                    drop(stream);
                    relay::finish(record, result);
                });
            }
            Err(error) => {
                let _ = self.client.reset_on_close();
                record.close(Some(&error), error.flags());
            }
        }
    }

    /// To a pod of this node: one hop, both proxies' duties.
    async fn local(self, target: SocketAddr, workload: Arc<Workload>, route: Route) {
        let service = match route {
            Route::Hbone { service, .. } => service,
            _ => None,
        };
        let mut info = self.info(Reporter::Source, target);
        info.destination = Some(Arc::clone(&workload));
        info.service = service;
        info.source_identity = Some(self.source.identity());
        info.destination_identity = Some(workload.identity());
        let inbound = ConnectionInfo {
            reporter: Reporter::Destination,
            ..info.clone()
        };
        let outbound = self.context.telemetry.opened(info);
        let inbound = self.context.telemetry.opened(inbound);
        let connected = async {
            let identity = self.source.identity();
            let snapshot = self.context.snapshot();
            let node = &self.context.config.node;
            let authority = target.to_string();
            let target = snapshot.resolve_inbound(node, &workload, target, &authority)?;
            let facts = ConnectionFacts {
                identity: Some(&identity),
                src: self.src.ip(),
                dst: target,
            };
            let context = self.context;
            let watch = context.watches.authorize(&snapshot, &workload, &facts)?;
            let connect = context.connect(target, context.source_for(self.src.ip()));
            let server = watch.while_allowed(pin!(connect)).await??;
            Ok::<_, ProxyError>((server, watch))
        };
        match connected.await {
            Ok((server, watch)) => {
                let Self { client, alive, .. } = self;
                rt::spawn(async move {
                    let records = [&outbound, &inbound];
                    let (watch, short_cut) = (Some(&watch), alive.context().short_cut());
                    let relay = relay::client_to_server(client, server, &records, watch, short_cut);
                    let result = relay.await;
                    let error = result.as_ref().err();
                    let shown = error.map(|error| error as &dyn std::fmt::Display);
                    outbound.close(shown, ResponseFlags::None);
                    inbound.close(shown, ResponseFlags::None);
                });
            }
            Err(error) => {
                let _ = self.client.reset_on_close();
                outbound.close(Some(&error), error.flags());
                inbound.close(Some(&error), error.flags());
            }
        }
    }
}
