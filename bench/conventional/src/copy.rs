//! Moving bytes both ways until both directions have ended, each on its own (half-close).
//!
//! A reset by the application counts as the end of its data, as upstream does it. Any other error
//! ends both directions; the caller then resets what is left.

use std::future::poll_fn;
use std::io;

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use crate::error::Error;
use crate::record::{Record, Way};

/// Sizes of the read buffer, by bytes a direction has moved: small while nobody knows whether the
/// connection will ever move much, then as large as pays.
const SIZES: [(u64, usize); 2] = [(128 << 10, 1 << 10), (10 << 20, 16_320)];
const SIZE_MAX: usize = 262_080;

/// A read buffer that grows with what it has seen.
#[derive(Debug, Default)]
struct Buffer {
    bytes: BytesMut,
    moved: u64,
}

impl Buffer {
    fn size(&self) -> usize {
        let step = SIZES.iter().find(|(until, _)| self.moved < *until);
        step.map_or(SIZE_MAX, |(_, size)| *size)
    }

    /// What `from` has now; empty at the end.
    async fn fill(&mut self, from: &mut ReadHalf<'_>) -> io::Result<Bytes> {
        self.bytes.reserve(self.size());
        let n = end_if_gone(from.read_buf(&mut self.bytes).await)?;
        self.moved += n as u64;
        Ok(self.bytes.split().freeze())
    }
}

/// An application's socket and a stream of a tunnel. `upload` is the way of the bytes that the
/// application sends.
pub(crate) async fn socket_and_tunnel(
    socket: &mut TcpStream,
    tunnel: (SendStream<Bytes>, RecvStream),
    record: &Record,
    upload: Way,
) -> Result<(), Error> {
    let (mut read, mut write) = socket.split();
    let (mut send, mut recv) = tunnel;
    let sent = async {
        let mut buffer = Buffer::default();
        loop {
            let chunk = buffer.fill(&mut read).await?;
            if chunk.is_empty() {
                send.send_data(Bytes::new(), true)?;
                return Ok(());
            }
            let n = chunk.len();
            send_all(&mut send, chunk).await?;
            record.count(upload, n);
        }
    };
    let received = async {
        while let Some(chunk) = next(&mut recv).await? {
            write.write_all(&chunk).await?;
            // Credit for what the application has taken, not for what we hold.
            recv.flow_control().release_capacity(chunk.len())?;
            record.count(upload.opposite(), chunk.len());
        }
        end_if_gone(write.shutdown().await.map(|()| 0))?;
        Ok(())
    };
    tokio::try_join!(sent, received).map(|_| ())
}

/// Two sockets.
pub(crate) async fn sockets(
    client: &mut TcpStream,
    server: &mut TcpStream,
    record: &Record,
) -> Result<(), Error> {
    let (client_read, client_write) = client.split();
    let (server_read, server_write) = server.split();
    tokio::try_join!(
        one_way(client_read, server_write, record, Way::Request),
        one_way(server_read, client_write, record, Way::Response),
    )
    .map(|_| ())
}

async fn one_way(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    record: &Record,
    way: Way,
) -> Result<(), Error> {
    let mut buffer = Buffer::default();
    loop {
        let chunk = buffer.fill(&mut from).await?;
        if chunk.is_empty() {
            end_if_gone(to.shutdown().await.map(|()| 0))?;
            return Ok(());
        }
        to.write_all(&chunk).await?;
        record.count(way, chunk.len());
    }
}

async fn send_all(to: &mut SendStream<Bytes>, mut chunk: Bytes) -> Result<(), Error> {
    to.reserve_capacity(chunk.len());
    loop {
        let capacity = poll_fn(|cx| to.poll_capacity(cx)).await;
        let capacity = capacity.ok_or(Error::TunnelEnded)??;
        if capacity >= chunk.len() {
            return Ok(to.send_data(chunk, false)?);
        }
        if capacity > 0 {
            to.send_data(chunk.split_to(capacity), false)?;
        }
    }
}

/// The next bytes from the tunnel; none at the end. A stream reset without an error has ended.
async fn next(from: &mut RecvStream) -> Result<Option<Bytes>, h2::Error> {
    match from.data().await {
        Some(Err(error)) if error.reason() == Some(Reason::NO_ERROR) => Ok(None),
        other => other.transpose(),
    }
}

/// An application that went away has reached its end.
fn end_if_gone(result: io::Result<usize>) -> io::Result<usize> {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected, UnexpectedEof};
    match result {
        Err(error)
            if matches!(
                error.kind(),
                BrokenPipe | ConnectionReset | NotConnected | UnexpectedEof
            ) =>
        {
            Ok(0)
        }
        other => other,
    }
}
