//! The last step to a pod of this node: authorize, watch, connect, relay. Whichever way a
//! connection takes, and wherever it comes from, it takes this one.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;

use mesh::{ConnectionFacts, Identity, Workload};
use rt::net::TcpStream;
use telemetry::{ConnectionRecord, ResponseFlags};

use crate::context::{Alive, Context};
use crate::error::ProxyError;
use crate::relay;
use crate::watch::Watch;

/// A connection that has come as far as a pod of this node.
#[derive(Debug)]
pub(crate) struct Arrival<'a> {
    pub(crate) pod: &'a Arc<Workload>,
    /// Who it is from, if that is known.
    pub(crate) identity: Option<&'a Identity>,
    pub(crate) src: IpAddr,
    /// The pod's address and the application's port.
    pub(crate) target: SocketAddr,
}

/// A connection to a pod that policies allow, for as long as they do.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) server: TcpStream,
    pub(crate) watch: Watch,
}

impl Context {
    /// Connects to a pod if policies allow it.
    pub(crate) async fn admit(&self, arrival: &Arrival<'_>) -> Result<Admitted, ProxyError> {
        let facts = ConnectionFacts {
            identity: arrival.identity,
            src: arrival.src,
            dst: arrival.target,
        };
        let snapshot = self.snapshot();
        let watch = self.watches.authorize(&snapshot, arrival.pod, &facts)?;
        let connect = self.connect(arrival.target, self.source_for(arrival.src));
        let server = watch.while_allowed(pin!(connect)).await??;
        Ok(Admitted { server, watch })
    }
}

/// Where a connection between two sockets is counted: always at the pod's side, and at the client's
/// as well if that is of this node, too.
#[derive(Debug)]
pub(crate) struct Books {
    pub(crate) outbound: Option<ConnectionRecord>,
    pub(crate) inbound: ConnectionRecord,
}

impl Books {
    fn close(self, error: Option<&dyn fmt::Display>, flags: ResponseFlags) {
        if let Some(outbound) = self.outbound {
            outbound.close(error, flags);
        }
        self.inbound.close(error, flags);
    }
}

/// Relays between a client and the pod it was admitted to by a task of its own, or resets a client
/// that was not.
pub(crate) fn relay_if(
    admitted: Result<Admitted, ProxyError>,
    client: TcpStream,
    books: Books,
    alive: Alive,
) {
    let Admitted { server, watch } = match admitted {
        Ok(admitted) => admitted,
        Err(error) => {
            let _ = client.reset_on_close(); // the client may be gone already
            return books.close(Some(&error), error.flags());
        }
    };
    rt::spawn(async move {
        let result = {
            let (one, both);
            let records: &[&ConnectionRecord] = match &books.outbound {
                Some(outbound) => {
                    both = [outbound, &books.inbound];
                    &both
                }
                None => {
                    one = [&books.inbound];
                    &one
                }
            };
            let sockmap = alive.context().sockmap();
            relay::client_to_server(client, server, records, Some(&watch), sockmap).await
        };
        let error = result.as_ref().err();
        let shown = error.map(|error| error as &dyn fmt::Display);
        books.close(shown, ResponseFlags::None);
    });
}
