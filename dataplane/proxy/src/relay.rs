//! Moving bytes between an application's socket and a tunnel or another socket, both ways at once,
//! each direction ending on its own (half-close).
//!
//! A reset by the application counts as the end of its data, as upstream does it: the other side
//! sees a clean end. An error in sending ends both directions.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::Poll;

use rt::net::{Placement, ReadHalf, TcpStream, WriteHalf};
use telemetry::{ConnectionRecord, ResponseFlags};

use crate::error::{ProxyError, is_gone};
use crate::tunnel::TunnelStream;

/// Which way bytes are counted.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// From the client to the server.
    Request,
    /// From the server to the client.
    Response,
}

impl Way {
    fn count(self, record: &ConnectionRecord, bytes: usize) {
        match self {
            Self::Request => record.received(bytes as u64),
            Self::Response => record.sent(bytes as u64),
        }
    }
}

/// Outbound: the client is a socket, the server is behind a tunnel.
pub(crate) async fn client_to_tunnel(
    client: TcpStream,
    server: &TunnelStream,
    record: &ConnectionRecord,
) -> Result<(), ProxyError> {
    let (read, write) = client.split();
    both(
        upload(read, server, record, Way::Request),
        download(server, write, record, Way::Response),
    )
    .await
}

/// Inbound: the client is behind a tunnel, the server is a socket.
pub(crate) async fn tunnel_to_server(
    client: &TunnelStream,
    server: TcpStream,
    record: &ConnectionRecord,
) -> Result<(), ProxyError> {
    let (read, write) = server.split();
    both(
        upload(read, client, record, Way::Response),
        download(client, write, record, Way::Request),
    )
    .await
}

/// Plain: both are sockets. Counted on every one of `records`.
pub(crate) async fn client_to_server(
    client: TcpStream,
    server: TcpStream,
    records: &[&ConnectionRecord],
) -> Result<(), ProxyError> {
    let (client_read, client_write) = client.split();
    let (server_read, server_write) = server.split();
    both(
        copy(client_read, server_write, records, Way::Request),
        copy(server_read, client_write, records, Way::Response),
    )
    .await
}

/// Runs both directions to their ends; the first error ends the other one too.
async fn both(
    one: impl Future<Output = Result<(), ProxyError>>,
    other: impl Future<Output = Result<(), ProxyError>>,
) -> Result<(), ProxyError> {
    let (mut one, mut other) = (pin!(one), pin!(other));
    let (mut one_open, mut other_open) = (true, true);
    poll_fn(|cx| {
        if one_open && let Poll::Ready(result) = one.as_mut().poll(cx) {
            one_open = false;
            if result.is_err() {
                return Poll::Ready(result);
            }
        }
        if other_open && let Poll::Ready(result) = other.as_mut().poll(cx) {
            other_open = false;
            if result.is_err() {
                return Poll::Ready(result);
            }
        }
        if one_open || other_open {
            Poll::Pending
        } else {
            Poll::Ready(Ok(()))
        }
    })
    .await
}

/// Socket into tunnel. Bulk data is received where it will be sealed.
async fn upload(
    mut from: ReadHalf,
    to: &TunnelStream,
    record: &ConnectionRecord,
    way: Way,
) -> Result<(), ProxyError> {
    from.set_placement(Placement::Segmented);
    let mut bufs = VecDeque::new();
    loop {
        let n = end_if_gone(from.recv(&mut bufs).await)?;
        if n == 0 {
            return Ok(to.finish()?);
        }
        to.send(&mut bufs).await?;
        way.count(record, n);
    }
}

/// Tunnel into socket. The tunnel's peer gets credit for what the socket has taken.
async fn download(
    from: &TunnelStream,
    mut to: WriteHalf,
    record: &ConnectionRecord,
    way: Way,
) -> Result<(), ProxyError> {
    let mut bufs = VecDeque::new();
    loop {
        let n = from.recv(&mut bufs).await?;
        if n == 0 {
            end_if_gone(to.shutdown().map(|()| 0))?;
            return Ok(());
        }
        for buf in bufs.drain(..) {
            to.push(buf);
        }
        to.flush().await?;
        from.release(n);
        way.count(record, n);
    }
}

/// Socket into socket.
async fn copy(
    mut from: ReadHalf,
    mut to: WriteHalf,
    records: &[&ConnectionRecord],
    way: Way,
) -> Result<(), ProxyError> {
    let mut bufs = VecDeque::new();
    loop {
        let n = end_if_gone(from.recv(&mut bufs).await)?;
        if n == 0 {
            end_if_gone(to.shutdown().map(|()| 0))?;
            return Ok(());
        }
        for buf in bufs.drain(..) {
            to.push(buf);
        }
        to.flush().await?;
        for record in records {
            way.count(record, n);
        }
    }
}

/// Closes the books on a connection that was established.
pub(crate) fn finish(record: ConnectionRecord, result: Result<(), ProxyError>) {
    match result {
        Ok(()) => record.close(None, ResponseFlags::None),
        Err(error) => record.close(Some(&error), ResponseFlags::None),
    }
}

/// An application that went away has reached its end.
fn end_if_gone(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(error) if is_gone(&error) => Ok(0),
        other => other,
    }
}
