//! Connections to local pods from outside the mesh (port 15006): authorized without an identity.

use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

use mesh::ConnectionFacts;
use rt::net::TcpStream;
use telemetry::{ConnectionInfo, Reporter};

use crate::context::{Alive, Context};
use crate::error::ProxyError;
use crate::relay;

/// Sets one captured connection up. Its bytes are relayed by a task of their own.
pub(crate) async fn handle(context: Rc<Context>, client: TcpStream, alive: Alive) {
    let Ok(src) = client.peer_addr() else { return }; // reset before it was looked at
    let Ok(dst) = context.original_dst(&client) else {
        return;
    };
    if let Err((client, error)) = serve(&context, client, src, dst, alive).await {
        let _ = client.reset_on_close(); // the client may be gone already
        context
            .telemetry
            .failed_early(Reporter::Destination, src, dst, &error);
    }
}

/// Errors returned are those before the connection was counted as opened.
async fn serve(
    context: &Rc<Context>,
    client: TcpStream,
    src: SocketAddr,
    dst: SocketAddr,
    alive: Alive,
) -> Result<(), (TcpStream, ProxyError)> {
    let node = &context.config.node;
    if node.is_own_port(dst.port()) {
        return Err((client, ProxyError::Recursive(dst)));
    }
    let Some(workload) = context.local_workload(dst.ip()) else {
        let error = ProxyError::UnknownDestination {
            ip: dst.ip(),
            node: (*node.node).into(),
        };
        return Err((client, error));
    };
    let mut info = ConnectionInfo::new(Reporter::Destination, src, dst);
    info.source = context.workload(src.ip());
    info.destination = Some(Arc::clone(&workload));
    let record = context.telemetry.opened(info);
    let facts = ConnectionFacts {
        identity: None,
        src: src.ip(),
        dst,
    };
    let connected = async {
        let snapshot = context.snapshot();
        let watch = context.watches.authorize(&snapshot, &workload, &facts)?;
        let connect = context.connect(dst, context.source_for(src.ip()));
        let server = watch.while_allowed(pin!(connect)).await??;
        Ok::<_, ProxyError>((server, watch))
    };
    match connected.await {
        Ok((server, watch)) => {
            rt::spawn(async move {
                let records = [&record];
                let (watch, short_cut) = (Some(&watch), alive.context().short_cut());
                let relay = relay::client_to_server(client, server, &records, watch, short_cut);
                let result = relay.await;
                relay::finish(record, result);
            });
        }
        Err(error) => {
            let _ = client.reset_on_close();
            record.close(Some(&error), error.flags());
        }
    }
    Ok(())
}
