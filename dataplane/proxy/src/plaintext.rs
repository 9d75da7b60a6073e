//! Connections to local pods in plain text: from outside the mesh (port 15006), and from pods of
//! this node whose route is plain. Authorized without an identity.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use mesh::Workload;
use rt::net::TcpStream;
use telemetry::{ConnectionInfo, ConnectionRecord, Reporter};

use crate::context::{Alive, Context};
use crate::error::ProxyError;
use crate::local::{self, Arrival, Books};

/// Sets one captured connection up. Its bytes are relayed by a task of their own.
pub(crate) async fn handle(context: Rc<Context>, client: TcpStream, alive: Alive) {
    let Ok(src) = client.peer_addr() else { return }; // reset before it was looked at
    let Ok(dst) = context.original_dst(&client) else {
        return;
    };
    serve(&context, client, (src, dst), None, alive).await;
}

/// Serves a connection between the two addresses `ends`. `outbound` is the client's side, if its
/// pod is of this node.
pub(crate) async fn serve(
    context: &Rc<Context>,
    client: TcpStream,
    ends: (SocketAddr, SocketAddr),
    outbound: Option<ConnectionRecord>,
    alive: Alive,
) {
    let (src, dst) = ends;
    let (pod, target) = match find(context, dst).await {
        Ok(found) => found,
        Err(error) => {
            let _ = client.reset_on_close(); // the client may be gone already
            if let Some(outbound) = outbound {
                outbound.close(Some(&error), error.flags());
            }
            let telemetry = &context.telemetry;
            return telemetry.failed_early(Reporter::Destination, src, dst, error.told());
        }
    };
    let mut info = ConnectionInfo::new(Reporter::Destination, src, dst);
    info.source = context.workload(src.ip());
    info.destination = Some(Arc::clone(&pod));
    let inbound = context.telemetry.opened(info);
    let arrival = Arrival {
        pod: &pod,
        identity: None,
        src: src.ip(),
        target,
    };
    let admitted = context.admit(&arrival).await;
    local::relay_if(admitted, client, Books { outbound, inbound }, alive);
}

/// The pod at `dst`, and where the connection goes there.
async fn find(
    context: &Context,
    dst: SocketAddr,
) -> Result<(Arc<Workload>, SocketAddr), ProxyError> {
    let target = context
        .snapshot()
        .resolve_plain(&context.config.node, dst)?;
    let pod = context.wait_for_destination(dst.ip()).await?;
    Ok((pod, target))
}
