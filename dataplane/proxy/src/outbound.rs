//! Connections captured from local pods (port 15001).

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use hbone::ConnectRequest;
use mesh::{Authority, Delivery, Identity, Route, Workload};
use rt::net::TcpStream;
use telemetry::{ConnectionInfo, HboneTarget, Reporter, Security};

use crate::baggage::{baggage, forwarded, traceparent};
use crate::config::RedirectMode;
use crate::context::{Alive, Context};
use crate::error::ProxyError;
use crate::local::{self, Arrival, Books};
use crate::pool::Key;
use crate::{plaintext, relay};

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
            .failed_early(Reporter::Source, src, dst, error.told());
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
    let prepared = async {
        let source = context.wait_for_source(src.ip()).await?;
        let node = &context.config.node;
        let route = context
            .snapshot()
            .route(node, &source, dst, context.random())?;
        if let Route::Passthrough { dst } | Route::Tcp { dst, .. } = &route {
            context.check_not_ourselves(&source, *dst)?;
        }
        Ok::<_, ProxyError>((source, route))
    };
    let (source, route) = match prepared.await {
        Ok(prepared) => prepared,
        Err(error) => {
            let _ = client.reset_on_close(); // the client may be gone already
            return Err(error);
        }
    };
    let delivery = delivery(context, &route);
    let connection = Connection {
        context,
        client,
        src,
        source,
        alive,
    };
    match (route, delivery) {
        (Route::Passthrough { dst }, delivery) => {
            connection.plain(dst, delivery, None, None).await;
        }
        (
            Route::Tcp {
                dst,
                workload,
                service,
            },
            delivery,
        ) => {
            connection
                .plain(dst, delivery, Some(workload), service)
                .await;
        }
        (route @ Route::Hbone { .. }, Delivery::OneHop(target)) => {
            connection.one_hop(target, route).await;
        }
        (route @ Route::Hbone { .. }, delivery) => {
            connection
                .hbone(route, delivery == Delivery::OwnTunnel)
                .await;
        }
    }
    Ok(())
}

/// In node mode captured pods of this node are not reached by the network (what is sent to them
/// from here goes past redirection) but by this proxy in its other role.
fn delivery(context: &Context, route: &Route) -> Delivery {
    match context.config.mode {
        RedirectMode::InPod => Delivery::Network,
        RedirectMode::Node => {
            // Without redirection's word, waypoints are taken for pods that terminate tunnels
            // themselves.
            let waypoint = matches!(
                route,
                Route::Hbone {
                    to_waypoint: true,
                    ..
                }
            );
            let guess = waypoint && context.config.pods.is_none();
            let is_captured = |ip| !guess && context.is_captured(ip);
            route.delivery(is_captured, context.config.same_node_tunnel)
        }
    }
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
        delivery: Delivery,
        workload: Option<Arc<Workload>>,
        service: Option<Arc<mesh::Service>>,
    ) {
        let mut info = self.info(Reporter::Source, dst);
        info.destination = workload;
        info.service = service;
        let record = self.context.telemetry.opened(info);
        if delivery != Delivery::Network {
            let ends = (self.src, dst);
            let Self {
                context,
                client,
                alive,
                ..
            } = self;
            return plaintext::serve(context, client, ends, Some(record), alive).await;
        }
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
                    let sockmap = alive.context().sockmap();
                    let relay = relay::client_to_server(client, server, &records, None, sockmap);
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
    async fn one_hop(self, target: SocketAddr, route: Route) {
        let Route::Hbone {
            workload,
            service,
            expected,
            ..
        } = route
        else {
            return;
        };
        let identity = self.source.identity();
        let mut info = self.info(Reporter::Source, target);
        info.destination = workload;
        info.service = service;
        info.source_identity = Some(identity.clone());
        info.destination_identity = expected.first().cloned();
        let found = self.find(target, &expected).await;
        if let Ok((pod, _)) = &found {
            info.destination = Some(Arc::clone(pod));
            info.destination_identity = Some(pod.identity());
        }
        let inbound = ConnectionInfo {
            reporter: Reporter::Destination,
            ..info.clone()
        };
        let books = Books {
            outbound: Some(self.context.telemetry.opened(info)),
            inbound: self.context.telemetry.opened(inbound),
        };
        let admitted = match found {
            Ok((pod, target)) => {
                let arrival = Arrival {
                    pod: &pod,
                    identity: Some(&identity),
                    src: self.src.ip(),
                    target,
                };
                self.context.admit(&arrival).await
            }
            Err(error) => Err(error),
        };
        local::relay_if(admitted, self.client, books, self.alive);
    }

    /// The pod at `target`, if it is one of those `expected` there, and where in it the connection
    /// goes.
    async fn find(
        &self,
        target: SocketAddr,
        expected: &[Identity],
    ) -> Result<(Arc<Workload>, SocketAddr), ProxyError> {
        let context = self.context;
        let pod = context.wait_for_destination(target.ip()).await?;
        let found = pod.identity();
        if !expected.contains(&found) {
            let ip = target.ip();
            return Err(ProxyError::OtherIdentity { ip, found });
        }
        let (node, authority) = (&context.config.node, target.to_string());
        let target = context
            .snapshot()
            .resolve_inbound(node, &pod, target, &authority)?;
        Ok((pod, target))
    }
}
