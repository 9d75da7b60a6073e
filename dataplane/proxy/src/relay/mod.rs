//! Moving bytes between an application's socket and a tunnel or another socket, both ways at once,
//! each direction ending on its own (half-close).
//!
//! An end is passed on as an end, and a reset, like every other failure, as a reset (in a tunnel
//! RST_STREAM with CONNECT_ERROR, RFC 9113 8.5), behind what came before it: what was cut off never
//! looks like a complete answer (`relay/ends.rs`). Upstream passes resets on as ends.

mod ends;
#[cfg(feature = "slowdown")]
mod slowdown;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd as _;
use std::pin::pin;
use std::task::Poll;

use rt::buf::Buf;
use rt::net::{Placement, ReadHalf, Splice, Spliced, TcpStream, WriteHalf};
use telemetry::{ConnectionRecord, ResponseFlags};

use crate::config::SockmapBypass;
use crate::error::ProxyError;
use crate::tunnel::TunnelStream;
use crate::watch::Watch;
pub(crate) use ends::Who;
use ends::{Flow, Side, both};

/// Which way bytes are counted.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// From the client to the server.
    Request,
    /// From the server to the client.
    Response,
}

impl Way {
    /// Counts a chunk that was relayed.
    fn count(self, record: &ConnectionRecord, bytes: usize) {
        #[cfg(feature = "slowdown")]
        slowdown::relayed();
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
    let sides = [
        Side::Socket(client.observer(), Who::Client),
        Side::Stream(server),
    ];
    let (mut read, mut write) = client.split();
    let result = {
        let (up, down) = (Flow::default(), Flow::default());
        both(
            pin!(upload(&mut read, server, record, Way::Request, &up)),
            pin!(download(server, &mut write, record, Way::Response, &down)),
            [&up, &down],
            sides,
        )
        .await
    };
    if result.is_err() {
        server.cut_off();
        let _ = write.reset_on_close(); // the client may be gone already
    }
    result
}

/// Inbound: the client is behind a tunnel, the server is a socket.
pub(crate) async fn tunnel_to_server(
    client: &TunnelStream,
    server: TcpStream,
    record: &ConnectionRecord,
    watch: &Watch,
) -> Result<(), ProxyError> {
    let sides = [
        Side::Socket(server.observer(), Who::Server),
        Side::Stream(client),
    ];
    let (mut read, mut write) = server.split();
    let result = {
        let (up, down) = (Flow::default(), Flow::default());
        let upload = pin!(upload(&mut read, client, record, Way::Response, &up));
        let download = pin!(download(client, &mut write, record, Way::Request, &down));
        let relay = pin!(both(upload, download, [&up, &down], sides));
        watch.while_allowed(relay).await.flatten()
    };
    if result.is_err() {
        client.cut_off();
        let _ = write.reset_on_close(); // the application may be gone already
    }
    result
}

/// Plain: both are sockets. Counted on every one of `records`; ended by `watch`, if there is one.
/// They may take `sockmap`.
pub(crate) async fn client_to_server(
    client: TcpStream,
    server: TcpStream,
    records: &[&ConnectionRecord],
    watch: Option<&Watch>,
    sockmap: Option<&dyn SockmapBypass>,
) -> Result<(), ProxyError> {
    let sides = [
        Side::Socket(client.observer(), Who::Client),
        Side::Socket(server.observer(), Who::Server),
    ];
    let (mut client_read, mut client_write) = client.split();
    let (mut server_read, mut server_write) = server.split();
    let result = {
        let (up, down) = (Flow::default(), Flow::default());
        let request = Books(records, Way::Request, &up);
        let response = Books(records, Way::Response, &down);
        let upload = pin!(copy(&mut client_read, &mut server_write, request, sockmap));
        let download = pin!(copy(&mut server_read, &mut client_write, response, sockmap));
        let mut relay = pin!(both(upload, download, [&up, &down], sides));
        match watch {
            Some(watch) => watch.while_allowed(relay).await.flatten(),
            None => relay.as_mut().await,
        }
    };
    if result.is_err() {
        // Either may be gone already.
        let _ = client_write.reset_on_close();
        let _ = server_write.reset_on_close();
    }
    result
}

/// Socket into tunnel. Bulk data is received where it will be sealed.
async fn upload(
    from: &mut ReadHalf,
    to: &TunnelStream,
    record: &ConnectionRecord,
    way: Way,
    flow: &Flow,
) -> Result<(), ProxyError> {
    from.set_placement(Placement::Segmented);
    let mut bufs = VecDeque::new();
    loop {
        flow.receiving.set(true);
        let received = poll_fn(|cx| {
            // Also while the application is silent: nothing it could say would arrive.
            if let Poll::Ready(failure) = to.poll_failure(cx) {
                return Poll::Ready(Err(failure));
            }
            from.poll_recv(cx, &mut bufs, &mut None).map(Ok)
        });
        let received = received.await;
        flow.receiving.set(false);
        let sent = match received {
            Ok(Ok(0)) => {
                to.finish()?;
                return flow.end().await;
            }
            Ok(Ok(n)) => to.send(&mut bufs).await.map(|()| n),
            Ok(Err(error)) => return Err(error.into()),
            Err(failure) => Err(failure),
        };
        match sent {
            Ok(n) => {
                way.count(record, n);
                flow.moved();
            }
            Err(failure) if failure.is_clean() => {
                flow.receiving.set(true);
                return discard(from, &mut bufs).await;
            }
            Err(failure) => return Err(failure.into()),
        }
    }
}

/// Takes what nobody wants until its sender ends: closing a socket with unread data would reset it,
/// and take away what is still on its way to the application.
async fn discard(from: &mut ReadHalf, bufs: &mut VecDeque<Buf>) -> Result<(), ProxyError> {
    loop {
        bufs.clear();
        if from.recv(bufs).await? == 0 {
            return Ok(());
        }
    }
}

/// Tunnel into socket. The tunnel's peer gets credit for what the socket has taken.
async fn download(
    from: &TunnelStream,
    to: &mut WriteHalf,
    record: &ConnectionRecord,
    way: Way,
    flow: &Flow,
) -> Result<(), ProxyError> {
    let mut bufs = VecDeque::new();
    loop {
        flow.receiving.set(true);
        let received = from.recv(&mut bufs).await;
        flow.receiving.set(false);
        let n = received?;
        if n == 0 {
            end(to, flow).await?;
            return flow.end().await;
        }
        deliver(to, &mut bufs).await?;
        from.release(n);
        way.count(record, n);
        flow.moved();
    }
}

/// Where one direction of a relay between sockets is counted.
#[derive(Clone, Copy)]
struct Books<'a>(&'a [&'a ConnectionRecord], Way, &'a Flow);

impl Books<'_> {
    fn count(self, bytes: usize) {
        self.2.moved();
        for record in self.0 {
            self.1.count(record, bytes);
        }
    }
}

/// Bytes that a bulk flow copies before it asks again whether its sockets are plain. Asking costs
/// four system calls at most.
const ASK_EVERY_BYTES: usize = 1 << 20;

/// Decides when a direction may be spliced: once both of its sockets have left the sockmap, which
/// bulk does by itself.
struct Gate<'a> {
    /// None: both are plain.
    sockmap: Option<&'a dyn SockmapBypass>,
    copied: usize,
}

impl<'a> Gate<'a> {
    fn new(sockmap: Option<&'a dyn SockmapBypass>) -> Self {
        Self {
            sockmap,
            copied: ASK_EVERY_BYTES,
        }
    }

    fn is_open(&mut self, from: &ReadHalf, to: &WriteHalf) -> bool {
        let Some(sockmap) = self.sockmap else {
            return true;
        };
        if self.copied < ASK_EVERY_BYTES {
            return false;
        }
        self.copied = 0;
        let plain = sockmap.is_plain(from.as_fd()) && sockmap.is_plain(to.as_fd());
        if plain {
            self.sockmap = None;
        }
        plain
    }

    fn copied(&mut self, bytes: usize) {
        self.copied = self.copied.saturating_add(bytes);
    }
}

/// Socket into socket; bulk goes through a pipe instead of through this process's memory.
async fn copy(
    from: &mut ReadHalf,
    to: &mut WriteHalf,
    books: Books<'_>,
    sockmap: Option<&dyn SockmapBypass>,
) -> Result<(), ProxyError> {
    let mut bufs = VecDeque::new();
    let (mut pipe, mut may_splice) = (None, true);
    let mut gate = Gate::new(sockmap);
    let flow = books.2;
    loop {
        if may_splice && Splice::is_possible(from) && gate.is_open(from, to) {
            if pipe.is_none() {
                pipe = Splice::new().ok(); // without descriptors to spare it is copied
            }
            may_splice = pipe.is_some();
            if let Some(pipe) = &mut pipe {
                // Boxed: idle connections would hold its state otherwise.
                match Box::pin(pipe.relay(from, to, |n| books.count(n))).await? {
                    Spliced::Small => {}
                    Spliced::End => break,
                }
            }
        }
        flow.receiving.set(true);
        let received = from.recv(&mut bufs).await;
        flow.receiving.set(false);
        let n = received?;
        if n == 0 {
            break;
        }
        deliver(to, &mut bufs).await?;
        books.count(n);
        gate.copied(n);
    }
    end(to, flow).await?;
    flow.end().await
}

/// Hands `bufs` over to be sent.
async fn deliver(to: &mut WriteHalf, bufs: &mut VecDeque<Buf>) -> io::Result<()> {
    for buf in bufs.drain(..) {
        to.push(buf);
    }
    to.hand_over().await
}

/// Sends what is left, then FIN. Where the relay ends with this, close(2) sends that as well: all
/// that comes from the same socket has been received.
async fn end(to: &mut WriteHalf, flow: &Flow) -> io::Result<()> {
    to.flush().await?;
    if flow.is_last.get() {
        return Ok(());
    }
    to.shutdown()
}

/// Closes the books on a connection that was established.
pub(crate) fn finish(record: ConnectionRecord, result: Result<(), ProxyError>) {
    match result {
        Ok(()) => record.close(None, ResponseFlags::None),
        Err(error) => record.close(Some(&error), ResponseFlags::None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Size of the future that a function of these arguments returns.
    fn size<A, B, C, D, F>(_: impl FnOnce(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    /// Every connection holds one of these, and touches most of it for each message: with many
    /// connections their size is cache misses per message.
    #[test]
    fn relays_are_small() {
        type Record = &'static ConnectionRecord;
        type Stream = &'static TunnelStream;
        let sizes = [
            size(|client, server: Stream, record: Record, _: ()| {
                client_to_tunnel(client, server, record)
            }),
            size(
                |client: Stream, server, record: Record, watch: &'static Watch| {
                    tunnel_to_server(client, server, record, watch)
                },
            ),
            size(|client, server, records: &'static [Record], watch| {
                client_to_server(client, server, records, watch, None)
            }),
        ];
        assert!(sizes.iter().all(|size| *size <= 1024), "bytes: {sizes:?}");
    }
}
