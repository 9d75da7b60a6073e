//! Moving bytes between an application's socket and a tunnel or another socket, both ways at once,
//! each direction ending on its own (half-close).
//!
//! A reset by the application counts as the end of its data, as upstream does it: the other side
//! sees a clean end. A receiver that is gone ends its direction only: what it has sent before is
//! still delivered. Payload that a failed tunnel cut off ends in a reset of the application's
//! connection, never in what looks like a complete answer.

#[cfg(debug_assertions)]
mod slowdown;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd as _;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use rt::buf::Buf;
use rt::net::{Placement, ReadHalf, Splice, Spliced, TcpStream, WriteHalf};
use telemetry::{ConnectionRecord, ResponseFlags};

use crate::config::ShortCut;
use crate::error::{ProxyError, is_gone};
use crate::tunnel::{StreamFailure, TunnelStream};
use crate::watch::Watch;

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
        #[cfg(debug_assertions)]
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
    let (mut read, mut write) = client.split();
    let cut = Cut::default();
    both(
        pin!(upload(&mut read, server, record, Way::Request, &cut)),
        pin!(download(server, &mut write, record, Way::Response)),
        &cut,
    )
    .await
}

/// Inbound: the client is behind a tunnel, the server is a socket.
pub(crate) async fn tunnel_to_server(
    client: &TunnelStream,
    server: TcpStream,
    record: &ConnectionRecord,
    watch: &Watch,
) -> Result<(), ProxyError> {
    let (mut read, mut write) = server.split();
    let result = {
        let cut = Cut::default();
        let up = pin!(upload(&mut read, client, record, Way::Response, &cut));
        let down = pin!(download(client, &mut write, record, Way::Request));
        watch.while_allowed(pin!(both(up, down, &cut))).await
    };
    if result.is_err() {
        client.cut_off();
        let _ = write.reset_on_close(); // the application may be gone already
    }
    result?
}

/// Plain: both are sockets. Counted on every one of `records`; ended by `watch`, if there is one.
/// They may take `short_cut`.
pub(crate) async fn client_to_server(
    client: TcpStream,
    server: TcpStream,
    records: &[&ConnectionRecord],
    watch: Option<&Watch>,
    short_cut: Option<&dyn ShortCut>,
) -> Result<(), ProxyError> {
    let (mut client_read, mut client_write) = client.split();
    let (mut server_read, mut server_write) = server.split();
    let result = {
        let cut = Cut::default();
        let (request, response) = (Books(records, Way::Request), Books(records, Way::Response));
        let up = pin!(copy(
            &mut client_read,
            &mut server_write,
            request,
            short_cut
        ));
        let down = pin!(copy(
            &mut server_read,
            &mut client_write,
            response,
            short_cut
        ));
        let mut relay = pin!(both(up, down, &cut));
        match watch {
            Some(watch) => watch.while_allowed(relay).await,
            None => Ok(relay.as_mut().await),
        }
    };
    if result.is_err() {
        // Either may be gone already.
        let _ = client_write.reset_on_close();
        let _ = server_write.reset_on_close();
    }
    result?
}

/// Why the stream takes no more from the application, once it does not.
type Cut = RefCell<Option<StreamFailure>>;

/// How long an application may go on sending what nobody takes after all it gets is on its way.
const LINGER: Duration = Duration::from_secs(1);

/// Runs both directions to their ends; the first error ends the other one too. If `one` is `cut`
/// the end of `other` is the end, after [`LINGER`].
///
/// Pinned by the caller: a future that is moved into another one's state is in it twice.
async fn both(
    mut one: Pin<&mut impl Future<Output = Result<(), ProxyError>>>,
    mut other: Pin<&mut impl Future<Output = Result<(), ProxyError>>>,
    cut: &Cut,
) -> Result<(), ProxyError> {
    let (mut one_open, mut other_open) = (true, true);
    let mut linger = None;
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
        if other_open {
            return Poll::Pending;
        }
        if one_open && cut.borrow().is_some() {
            let wait = linger.get_or_insert_with(|| Box::pin(rt::time::sleep(LINGER)));
            if wait.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
        match &*cut.borrow() {
            Some(failure) if failure.is_clean() => Poll::Ready(Ok(())),
            Some(failure) => Poll::Ready(Err(failure.clone().into())),
            None if one_open => Poll::Pending,
            None => Poll::Ready(Ok(())),
        }
    })
    .await
}

/// Socket into tunnel. Bulk data is received where it will be sealed.
async fn upload(
    from: &mut ReadHalf,
    to: &TunnelStream,
    record: &ConnectionRecord,
    way: Way,
    cut: &Cut,
) -> Result<(), ProxyError> {
    from.set_placement(Placement::Segmented);
    let mut bufs = VecDeque::new();
    loop {
        let received = poll_fn(|cx| {
            // Also while the application is silent: nothing it could say would arrive.
            if let Poll::Ready(failure) = to.poll_failure(cx) {
                return Poll::Ready(Err(failure));
            }
            from.poll_recv(cx, &mut bufs, &mut None).map(Ok)
        });
        let sent = match received.await {
            Ok(received) => match end_if_gone(received) {
                Ok(0) => return Ok(to.finish()?),
                Ok(n) => to.send(&mut bufs).await.map(|()| n),
                Err(error) => {
                    to.cut_off();
                    return Err(error.into());
                }
            },
            Err(failure) => Err(failure),
        };
        match sent {
            Ok(n) => way.count(record, n),
            Err(failure) => {
                *cut.borrow_mut() = Some(failure);
                return discard(from, &mut bufs).await;
            }
        }
    }
}

/// Takes what nobody wants until its sender ends: closing a socket with unread data would reset it,
/// and take away what is still on its way to the application.
async fn discard(from: &mut ReadHalf, bufs: &mut VecDeque<Buf>) -> Result<(), ProxyError> {
    loop {
        bufs.clear();
        if end_if_gone(from.recv(bufs).await)? == 0 {
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
) -> Result<(), ProxyError> {
    let mut bufs = VecDeque::new();
    loop {
        let n = match from.recv(&mut bufs).await {
            Ok(n) => n,
            Err(failure) => {
                let _ = to.reset_on_close(); // the application may be gone already
                return Err(failure.into());
            }
        };
        if n == 0 {
            return end(to).await;
        }
        if !deliver(to, &mut bufs).await? {
            return Ok(());
        }
        from.release(n);
        way.count(record, n);
    }
}

/// Where one direction of a relay between sockets is counted.
#[derive(Clone, Copy)]
struct Books<'a>(&'a [&'a ConnectionRecord], Way);

impl Books<'_> {
    fn count(self, bytes: usize) {
        for record in self.0 {
            self.1.count(record, bytes);
        }
    }
}

/// Bytes that a bulk flow copies before it asks again whether its sockets are plain. Asking costs
/// four system calls at most.
const ASK_EVERY_BYTES: usize = 1 << 20;

/// Decides when a direction may be spliced: once both of its sockets have left the short-cut, which
/// bulk does by itself.
struct Gate<'a> {
    /// None: both are plain.
    short_cut: Option<&'a dyn ShortCut>,
    copied: usize,
}

impl<'a> Gate<'a> {
    fn new(short_cut: Option<&'a dyn ShortCut>) -> Self {
        Self {
            short_cut,
            copied: ASK_EVERY_BYTES,
        }
    }

    fn is_open(&mut self, from: &ReadHalf, to: &WriteHalf) -> bool {
        let Some(short_cut) = self.short_cut else {
            return true;
        };
        if self.copied < ASK_EVERY_BYTES {
            return false;
        }
        self.copied = 0;
        let plain = short_cut.is_plain(from.as_fd()) && short_cut.is_plain(to.as_fd());
        if plain {
            self.short_cut = None;
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
    short_cut: Option<&dyn ShortCut>,
) -> Result<(), ProxyError> {
    let mut bufs = VecDeque::new();
    let (mut pipe, mut may_splice) = (None, true);
    let mut gate = Gate::new(short_cut);
    loop {
        if may_splice && Splice::is_possible(from) && gate.is_open(from, to) {
            if pipe.is_none() {
                pipe = Splice::new().ok(); // without descriptors to spare it is copied
            }
            may_splice = pipe.is_some();
            if let Some(pipe) = &mut pipe {
                // Boxed: idle connections would hold its state otherwise.
                match Box::pin(pipe.relay(from, to, |n| books.count(n))).await {
                    Ok(Spliced::Small) => {}
                    Ok(Spliced::End) => return end(to).await,
                    // Whichever side is gone: nothing more comes, or nobody takes it.
                    Err(error) if is_gone(&error) => return end(to).await,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        let n = end_if_gone(from.recv(&mut bufs).await)?;
        if n == 0 {
            return end(to).await;
        }
        if !deliver(to, &mut bufs).await? {
            return Ok(());
        }
        books.count(n);
        gate.copied(n);
    }
}

/// Hands `bufs` over to be sent. False: the receiver is gone, which the other direction sees as its
/// end.
async fn deliver(to: &mut WriteHalf, bufs: &mut VecDeque<Buf>) -> Result<bool, ProxyError> {
    for buf in bufs.drain(..) {
        to.push(buf);
    }
    match to.hand_over().await {
        Err(error) if is_gone(&error) => Ok(false),
        other => Ok(other.map(|()| true)?),
    }
}

/// Sends what is left, then FIN. A receiver that is gone needs neither.
async fn end(to: &mut WriteHalf) -> Result<(), ProxyError> {
    let ended = to.flush().await.and_then(|()| to.shutdown());
    end_if_gone(ended.map(|()| 0))?;
    Ok(())
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
