//! The `h2` crate's side of the comparison: polled by hand, without an executor, so that only the
//! crate's own work is counted.

use std::cell::RefCell;
use std::future::Future as _;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{Method, Request, Response};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{AUTHORITY, BAGGAGE, CONNECTION_WINDOW, FORWARDED, STREAM_WINDOW, Wire};

/// One end of the transport. Readiness needs no wakers: everything is polled in turn.
struct Transport {
    incoming: Rc<RefCell<Wire>>,
    outgoing: Rc<RefCell<Wire>>,
}

impl AsyncRead for Transport {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // As a socket would: what is not read into is not touched.
        let n = self.incoming.borrow_mut().take(buf.remaining(), |bytes| {
            buf.put_slice(bytes);
        });
        if n == 0 {
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Transport {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.outgoing.borrow_mut().write(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut outgoing = self.outgoing.borrow_mut();
        for slice in slices {
            outgoing.write(slice);
        }
        Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

type Client = h2::client::Connection<Transport, Bytes>;
type Server = h2::server::Connection<Transport, Bytes>;

/// Both ends of an established connection.
pub struct Pair {
    client: Client,
    server: Server,
    requests: SendRequest<Bytes>,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").finish_non_exhaustive()
    }
}

/// A stream, both halves at both ends.
#[derive(Debug)]
pub struct Stream {
    send: SendStream<Bytes>,
    receive: RecvStream,
    server_send: SendStream<Bytes>,
    server_receive: RecvStream,
}

fn context() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

impl Pair {
    /// A connection after the exchange of settings.
    ///
    /// # Errors
    /// h2 refused something.
    pub fn new() -> Result<Self> {
        let (up, down) = (Rc::default(), Rc::default());
        let near = Transport {
            incoming: Rc::clone(&down),
            outgoing: Rc::clone(&up),
        };
        let far = Transport {
            incoming: up,
            outgoing: down,
        };
        let mut client = h2::client::Builder::new();
        client
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(1 << 20);
        let mut server = h2::server::Builder::new();
        server
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(1 << 20)
            .max_concurrent_streams(200);
        let mut near = pin!(client.handshake(near));
        let mut far = pin!(server.handshake(far));
        let (mut first, mut second) = (None, None);
        for _ in 0..4 {
            if first.is_none()
                && let Poll::Ready(done) = near.as_mut().poll(&mut context())
            {
                first = Some(done?);
            }
            if second.is_none()
                && let Poll::Ready(done) = far.as_mut().poll(&mut context())
            {
                second = Some(done?);
            }
        }
        let (requests, client) = first.context("the client's handshake does not end")?;
        let server = second.context("the server's handshake does not end")?;
        let mut pair = Self {
            client,
            server,
            requests,
        };
        for _ in 0..3 {
            pair.poll_client()?;
            ensure!(pair.poll_server()?.is_none(), "a request out of nothing");
        }
        Ok(pair)
    }

    fn poll_client(&mut self) -> Result<()> {
        match Pin::new(&mut self.client).poll(&mut context()) {
            Poll::Ready(Ok(())) => anyhow::bail!("the client's connection has ended"),
            Poll::Ready(Err(error)) => Err(error.into()),
            Poll::Pending => Ok(()),
        }
    }

    fn poll_server(&mut self) -> Result<Option<Accepted>> {
        match self.server.poll_accept(&mut context()) {
            Poll::Ready(Some(accepted)) => Ok(Some(accepted?)),
            Poll::Ready(None) => anyhow::bail!("the server's connection has ended"),
            Poll::Pending => Ok(None),
        }
    }

    /// Opens a stream up to the `200`.
    ///
    /// # Errors
    /// h2 refused something.
    pub fn open(&mut self) -> Result<Stream> {
        let ready = self.requests.poll_ready(&mut context());
        ensure!(ready.is_ready(), "no stream may be opened");
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri(AUTHORITY)
            .header("forwarded", FORWARDED)
            .header("baggage", BAGGAGE)
            .body(())?;
        let (response, send) = self.requests.send_request(request, false)?;
        self.poll_client()?;
        let accepted = self.poll_server()?.context("no request arrived")?;
        let (request, mut respond) = accepted;
        ensure!(request.method() == Method::CONNECT, "another method");
        let answer = Response::builder().header("baggage", BAGGAGE).body(())?;
        let server_send = respond.send_response(answer, false)?;
        let server_receive = request.into_body();
        ensure!(self.poll_server()?.is_none(), "a second request");
        self.poll_client()?;
        let Poll::Ready(response) = pin!(response).poll(&mut context()) else {
            anyhow::bail!("no response arrived");
        };
        let response = response?;
        ensure!(response.status() == 200, "refused");
        Ok(Stream {
            send,
            receive: response.into_body(),
            server_send,
            server_receive,
        })
    }

    /// Ends a stream from both sides.
    ///
    /// # Errors
    /// h2 refused something.
    pub fn close(&mut self, mut stream: Stream) -> Result<()> {
        stream.send.send_data(Bytes::new(), true)?;
        self.poll_client()?;
        ensure!(self.poll_server()?.is_none(), "a request too much");
        Self::ended(&mut stream.server_receive)?;
        stream.server_send.send_data(Bytes::new(), true)?;
        ensure!(self.poll_server()?.is_none(), "a request too much");
        self.poll_client()?;
        Self::ended(&mut stream.receive)
    }

    /// Takes the end of a body, which h2 may precede by an empty frame.
    fn ended(body: &mut RecvStream) -> Result<()> {
        while let Poll::Ready(chunk) = body.poll_data(&mut context()) {
            match chunk {
                None => return Ok(()),
                Some(chunk) => ensure!(chunk?.is_empty(), "data out of nothing"),
            }
        }
        anyhow::bail!("the end did not arrive")
    }

    /// One DATA frame from client to server, released on arrival.
    ///
    /// # Errors
    /// h2 refused something.
    pub fn send(&mut self, stream: &mut Stream, payload: &Bytes) -> Result<()> {
        stream.send.reserve_capacity(payload.len());
        while stream.send.capacity() < payload.len() {
            // Credit is on its way.
            ensure!(self.poll_server()?.is_none(), "a request out of nothing");
            self.poll_client()?;
        }
        stream.send.send_data(payload.clone(), false)?;
        self.poll_client()?;
        ensure!(self.poll_server()?.is_none(), "a request out of nothing");
        let mut left = payload.len();
        while left > 0 {
            let Poll::Ready(Some(chunk)) = stream.server_receive.poll_data(&mut context()) else {
                anyhow::bail!("{left} bytes did not arrive");
            };
            let n = chunk?.len();
            stream.server_receive.flow_control().release_capacity(n)?;
            left -= n;
        }
        Ok(())
    }
}

type Accepted = (Request<RecvStream>, h2::server::SendResponse<Bytes>);

/// Sends `count` frames of `len` payload bytes on one stream.
///
/// # Errors
/// h2 refused something.
pub fn data(len: usize, count: u64) -> Result<()> {
    let mut pair = Pair::new()?;
    let mut stream = pair.open()?;
    let payload = payload(len);
    for n in 0..count {
        pair.send(&mut stream, &payload)
            .with_context(|| format!("frame {n}"))?;
    }
    Ok(())
}

/// A payload of `len` bytes.
#[must_use]
pub fn payload(len: usize) -> Bytes {
    Bytes::from(vec![7; len])
}

/// Opens and closes `count` streams, one after the other.
///
/// # Errors
/// h2 refused something.
pub fn connect(count: u64) -> Result<()> {
    let mut pair = Pair::new()?;
    for n in 0..count {
        let stream = pair.open().with_context(|| format!("stream {n}"))?;
        pair.close(stream).with_context(|| format!("stream {n}"))?;
    }
    Ok(())
}
