//! Our codec's side of the comparison.

use std::collections::VecDeque;

use anyhow::{Context as _, Result, ensure};
use hbone::{Config, ConnectRequest, Connection, Event, FRAME_HEADER, Role, StreamId};

use super::{AUTHORITY, BAGGAGE, CONNECTION_WINDOW, FORWARDED, STREAM_WINDOW, Wire};

/// Bytes one receive takes from the transport.
const READ: usize = 64 << 10;

/// One end: its connection, what it sends into, what it receives with.
struct End {
    connection: Connection,
    out: Wire,
    events: VecDeque<Event>,
    input: Box<[u8]>,
}

impl End {
    fn new(role: Role) -> Self {
        let mut config = match role {
            Role::Client => Config::client(),
            Role::Server => Config::server(),
        };
        config.stream_window = STREAM_WINDOW;
        config.connection_window = CONNECTION_WINDOW;
        Self {
            connection: Connection::new(role, &config),
            out: Wire::default(),
            events: VecDeque::new(),
            input: vec![0; READ].into(),
        }
    }

    /// Sends the control frames that wait.
    fn flush(&mut self) {
        let n = self.connection.output().len();
        if n > 0 {
            self.out.write(self.connection.output());
            self.connection.consume_output(n);
        }
    }

    /// Takes what `peer` has sent.
    fn receive(&mut self, peer: &mut Self) -> Result<()> {
        peer.flush();
        loop {
            let n = peer.out.read(&mut self.input);
            if n == 0 {
                return Ok(());
            }
            self.connection
                .receive(&self.input[..n], &mut self.events)?;
            // A frame's payload is released before its bytes are overwritten.
            self.release();
        }
    }

    fn release(&mut self) {
        for event in &self.events {
            if let Event::Data { id, range } = event {
                self.connection.release(*id, range.len());
            }
        }
        self.events
            .retain(|event| !matches!(event, Event::Data { .. }));
    }

    fn event(&mut self, wanted: impl Fn(&Event) -> bool) -> Result<Event> {
        while let Some(event) = self.events.pop_front() {
            if wanted(&event) {
                return Ok(event);
            }
        }
        anyhow::bail!("an expected event did not come")
    }
}

/// Both ends of an established connection.
pub struct Pair {
    client: End,
    server: End,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").finish_non_exhaustive()
    }
}

impl Pair {
    /// A connection after the exchange of settings.
    ///
    /// # Errors
    /// The codec refused something.
    pub fn new() -> Result<Self> {
        let mut pair = Self {
            client: End::new(Role::Client),
            server: End::new(Role::Server),
        };
        for _ in 0..2 {
            pair.exchange()?;
        }
        Ok(pair)
    }

    fn exchange(&mut self) -> Result<()> {
        self.server.receive(&mut self.client)?;
        self.client.receive(&mut self.server)
    }

    /// Opens a stream up to the `200`.
    ///
    /// # Errors
    /// The codec refused something.
    pub fn open(&mut self) -> Result<StreamId> {
        let id = self.client.connection.open(&ConnectRequest {
            authority: AUTHORITY,
            forwarded: Some(FORWARDED),
            baggage: Some(BAGGAGE),
            ..ConnectRequest::default()
        })?;
        self.server.receive(&mut self.client)?;
        let request = self
            .server
            .event(|event| matches!(event, Event::Request { head, .. } if head.is_connect()))?;
        let Event::Request { id: at_server, .. } = request else {
            anyhow::bail!("not a request: {request:?}")
        };
        let baggage = Some(BAGGAGE);
        self.server
            .connection
            .respond(at_server, 200, baggage, false)?;
        self.client.receive(&mut self.server)?;
        self.client
            .event(|event| matches!(event, Event::Response { status: 200, .. }))?;
        Ok(id)
    }

    /// Ends a stream from both sides.
    ///
    /// # Errors
    /// The codec refused something.
    pub fn close(&mut self, id: StreamId) -> Result<()> {
        let end = |event: &Event| matches!(event, Event::End { .. });
        let header = self.client.connection.data_header(id, 0, true)?;
        self.client.out.write(&header);
        self.server.receive(&mut self.client)?;
        self.server.event(end)?;
        let header = self.server.connection.data_header(id, 0, true)?;
        self.server.out.write(&header);
        self.client.receive(&mut self.server)?;
        self.client.event(end)?;
        ensure!(self.client.connection.active_streams() == 0, "still open");
        Ok(())
    }

    /// One DATA frame from client to server: `frame` has room for its header in front of the
    /// payload. The payload is released on arrival, credit goes back when it is due.
    ///
    /// # Errors
    /// The codec refused something.
    pub fn send(&mut self, id: StreamId, frame: &mut [u8]) -> Result<()> {
        let len = frame.len() - FRAME_HEADER;
        if self.client.connection.send_capacity(id) < len {
            self.client.receive(&mut self.server)?;
            self.client.events.clear();
        }
        let header = self.client.connection.data_header(id, len, false)?;
        frame[..FRAME_HEADER].copy_from_slice(&header);
        self.client.flush();
        self.client.out.write(frame);
        self.server.receive(&mut self.client)
    }
}

/// Sends `count` frames of `len` payload bytes on one stream.
///
/// # Errors
/// The codec refused something.
pub fn data(len: usize, count: u64) -> Result<()> {
    let mut pair = Pair::new()?;
    let id = pair.open()?;
    let mut frame = frame(len);
    for n in 0..count {
        pair.send(id, &mut frame)
            .with_context(|| format!("frame {n}"))?;
    }
    Ok(())
}

/// A frame of `len` payload bytes with room for its header in front.
#[must_use]
pub fn frame(len: usize) -> Vec<u8> {
    vec![7; FRAME_HEADER + len]
}

/// Opens and closes `count` streams, one after the other.
///
/// # Errors
/// The codec refused something.
pub fn connect(count: u64) -> Result<()> {
    let mut pair = Pair::new()?;
    for n in 0..count {
        let id = pair.open().with_context(|| format!("stream {n}"))?;
        pair.close(id).with_context(|| format!("stream {n}"))?;
    }
    Ok(())
}
