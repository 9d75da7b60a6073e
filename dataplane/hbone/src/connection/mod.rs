//! One HTTP/2 connection: the public face and the state shared by receiving and sending.
//!
//! Invariants:
//! * every flow-controlled byte received is in exactly one of: unreleased, credit, announced;
//! * `streams` holds exactly the streams that are not closed; a stream that leaves it is remembered
//!   in `ended` (by the peer) or `reset` (by us) for as long as those have room;
//! * after a failure or `go_away` nothing is parsed and nothing further is queued.

mod control;
mod flow;
mod heads;
mod receive;
mod send;
mod streams;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use crate::config::{Config, Role};
use crate::error::{ConnectionError, ErrorCode};
use crate::event::{Event, StreamId};
use crate::frame::{self, MAX_31, setting};
use crate::hpack::Decoder;

use flow::{RecvWindow, SendWindow};
use heads::Block;
use receive::Parser;
use send::Output;
use streams::{RecentIds, Stream, Streams};

/// A shared send window with less than this left counts as crowded. Less than the window every
/// connection starts with, so that a new one is not crowded.
const CROWDED_BELOW: u32 = 16 * 1024;

/// The state machine of one HTTP/2 connection that carries CONNECT tunnels. See the crate
/// documentation for the contract with the caller.
#[derive(Debug)]
pub struct Connection {
    role: Role,
    config: Config,
    output: Output,
    parser: Parser,
    /// Header block whose CONTINUATION frames are still to come.
    block: Option<Block>,
    decoder: Decoder,
    streams: Streams,
    send: SendWindow,
    recv: RecvWindow,
    peer: PeerSettings,
    /// The peer's first SETTINGS have arrived.
    peer_settings_received: bool,
    /// The peer has acknowledged our SETTINGS.
    settings_acknowledged: bool,
    /// The next header block has to begin with a table size update.
    table_update_due: bool,
    /// Client: identifier of the next stream.
    next_id: u32,
    /// Server: highest stream the peer has used, processed or not.
    peer_highest: u32,
    /// Server: highest stream handed to the caller, announced in GOAWAY.
    last_processed: u32,
    /// Streams that the peer ended: frames on them are errors.
    ended: RecentIds,
    /// Streams that we reset: frames on them are still in flight and ignored.
    reset: RecentIds,
    budget: u32,
    /// How many more streams may come to nothing.
    patience: u32,
    /// Too many streams came to nothing: GOAWAY has said so.
    calmed: bool,
    /// Streams that were reset because the peer broke the protocol on them.
    stream_errors: u64,
    /// Streams may have become writable as a whole: tell them at the end of `receive`.
    unblocked: bool,
    /// Which stream hears first that the connection is writable, for fairness.
    turn: usize,
    shutdown: Shutdown,
    /// The peer has sent GOAWAY with this last stream.
    peer_go_away: Option<u32>,
    failure: Option<ConnectionError>,
    /// How often every stream's window was moved.
    #[cfg(test)]
    window_walks: std::cell::Cell<u32>,
}

/// What the peer has announced; the defaults of RFC 9113 6.5.2 before.
#[derive(Clone, Copy, Debug)]
struct PeerSettings {
    initial_window: u32,
    max_frame_size: u32,
    max_concurrent_streams: u32,
    max_header_list_size: u32,
}

/// How far our own shutdown is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Shutdown {
    /// Not begun.
    None,
    /// GOAWAY with 2^31-1 is sent and a PING: streams in flight are still accepted.
    Announced,
    /// GOAWAY with the last stream is sent: further streams are ignored.
    Final,
    /// Failed or closed at once: only the output remains to be flushed.
    Dead,
}

impl Connection {
    /// A connection whose output holds the preface (client), SETTINGS, and the WINDOW_UPDATE of the
    /// connection. Values of `config` outside their range are clamped into it.
    pub fn new(role: Role, config: &Config) -> Self {
        let config = config.clamped();
        let mut connection = Self {
            role,
            output: Output::default(),
            parser: Parser::new(role),
            block: None,
            decoder: Decoder::new(config.header_table_size),
            streams: Streams::new(),
            send: SendWindow::new(DEFAULT_WINDOW),
            recv: RecvWindow::new(config.connection_window),
            peer: PeerSettings {
                initial_window: DEFAULT_WINDOW,
                max_frame_size: DEFAULT_FRAME_SIZE,
                max_concurrent_streams: u32::MAX,
                max_header_list_size: u32::MAX,
            },
            peer_settings_received: false,
            settings_acknowledged: false,
            table_update_due: false,
            next_id: 1,
            peer_highest: 0,
            last_processed: 0,
            ended: RecentIds::new(),
            reset: RecentIds::new(),
            budget: config.flood_budget,
            patience: config.flood_budget / 2,
            calmed: false,
            stream_errors: 0,
            unblocked: false,
            turn: 0,
            shutdown: Shutdown::None,
            peer_go_away: None,
            failure: None,
            #[cfg(test)]
            window_walks: std::cell::Cell::default(),
            config,
        };
        connection.queue_preface();
        connection
    }

    /// Feeds decrypted bytes, any number, cut anywhere. Everything is consumed. Events are appended
    /// in order; the ranges of [`Event::Data`] index into `input`.
    ///
    /// # Errors
    /// The peer broke the connection: the output ends with a GOAWAY, no stream exists any more.
    /// Events appended before the failure are valid. Further calls return the same error. After
    /// [`Connection::go_away`], input is ignored without error.
    pub fn receive(
        &mut self,
        input: &[u8],
        events: &mut VecDeque<Event>,
    ) -> Result<(), ConnectionError> {
        if self.shutdown == Shutdown::Dead {
            return self.failure.map_or(Ok(()), Err);
        }
        let mut outcome = self.parse(input, events);
        if outcome.is_ok() && std::mem::take(&mut self.unblocked) {
            let told = self.report_writable(events);
            // For next to nothing a peer could have all streams looked at again and again.
            outcome = self.charge(told / TOLD_PER_UNIT, "windows opened by next to nothing");
        }
        if let Err(error) = outcome {
            self.failure = Some(error);
            self.die(error.code(), error.code().name().as_bytes());
            return Err(error);
        }
        Ok(())
    }

    /// Control frames to send, oldest first. Empty if there is nothing to send.
    pub fn output(&self) -> &[u8] {
        self.output.pending()
    }

    /// The first `n` bytes of the output were sent (or copied to where they will be sent from).
    pub fn consume_output(&mut self, n: usize) {
        self.output.consume(n);
    }

    /// The peer's SETTINGS_MAX_FRAME_SIZE, in bytes: most payload of one DATA frame.
    #[inline]
    pub fn max_data_len(&self) -> usize {
        self.peer.max_frame_size as usize
    }

    /// How many payload bytes may be sent on the stream now: the lower of both windows. 0 if the
    /// stream is closed, ended by us or (server) not yet answered; otherwise 0 means: wait for
    /// [`Event::Writable`].
    #[inline]
    pub fn send_capacity(&self, id: StreamId) -> usize {
        match self.streams.get(id.0) {
            Some(stream) if self.may_send(stream) => {
                stream.send.available().min(self.send.available()) as usize
            }
            _ => 0,
        }
    }

    /// The caller has drained `n` payload bytes delivered for the stream: credits both windows.
    /// The WINDOW_UPDATE is queued at half a window. Also for streams that are closed by now.
    #[inline]
    pub fn release(&mut self, id: StreamId, n: usize) {
        if self.shutdown == Shutdown::Dead {
            return;
        }
        if let Some(stream) = self.streams.get_mut(id.0) {
            stream.recv.release(n);
            if !stream.remote_ended
                && let Some(increment) = stream.recv.take_update()
            {
                self.output.window_update(id.0, increment);
            }
        }
        self.recv.release(n);
        self.announce_connection_credit();
    }

    /// How many streams were reset because of what the peer did on them, or for want of room, so
    /// far.
    #[inline]
    pub fn stream_errors(&self) -> u64 {
        self.stream_errors
    }

    /// Server: whether so many streams came to nothing that the peer may open no more.
    #[inline]
    pub fn is_calmed(&self) -> bool {
        self.calmed
    }

    /// The caller says that `seconds` have passed since it last said so: what a peer does now and
    /// then is no flood, however long the connection lives.
    pub fn pass_time(&mut self, seconds: u32) {
        let units = seconds.saturating_mul(UNITS_PER_SECOND);
        self.refill(units);
        let patience = self.patience.saturating_add(units);
        self.patience = patience.min(self.config.flood_budget / 2);
    }

    /// Streams that are not closed in both directions.
    pub fn active_streams(&self) -> usize {
        self.streams.len()
    }

    /// Client: whether `open` would be accepted now, as far as the connection decides it.
    pub fn can_open(&self) -> bool {
        self.check_open().is_ok()
    }

    /// Client: how many streams `open` would accept now.
    pub fn room(&self) -> usize {
        match self.check_open() {
            Ok(()) => self.streams_max() - self.streams.len(),
            Err(_) => 0,
        }
    }

    /// Whether streams that do not progress hold so much of a window all streams share that a new
    /// stream would have to wait for them. A client then does better to open a connection more.
    pub fn is_crowded(&self) -> bool {
        self.recv.is_held() || self.send.available() < CROWDED_BELOW
    }

    /// Nothing more will happen: the connection has failed, or `go_away` was called, or either side
    /// has finished a graceful shutdown and no stream is left. Flush the output and close.
    pub fn is_closed(&self) -> bool {
        let going = self.shutdown == Shutdown::Final || self.peer_go_away.is_some();
        self.shutdown == Shutdown::Dead || going && self.streams.len() == 0
    }

    /// Whether receivers that do not read hold so much of the connection's window that the other
    /// streams would soon wait for them; then [`lend`](Self::lend).
    #[inline]
    pub fn wants_credit(&self) -> bool {
        self.recv.is_scarce()
    }

    /// Opens the connection's window for data that is held, as far as half of its size. The caller
    /// bounds the memory that this may take: each stream may hold its own window then. What is
    /// released later makes up for it first.
    pub fn lend(&mut self) {
        if self.shutdown != Shutdown::Dead
            && let Some(increment) = self.recv.lend()
        {
            self.output.window_update(0, increment);
        }
    }

    fn may_send(&self, stream: &Stream) -> bool {
        !stream.local_ended && (self.role == Role::Client || stream.answered)
    }

    fn announce_connection_credit(&mut self) {
        if let Some(increment) = self.recv.take_shared_update() {
            self.output.window_update(0, increment);
        }
    }

    /// Takes `cost` off the flood budget.
    fn charge(&mut self, cost: u32, what: &'static str) -> Result<(), ConnectionError> {
        self.budget = self
            .budget
            .checked_sub(cost)
            .ok_or(ConnectionError::Flood { what })?;
        Ok(())
    }

    #[inline]
    fn refill(&mut self, units: u32) {
        self.budget = self
            .budget
            .saturating_add(units)
            .min(self.config.flood_budget);
    }

    /// Payload has moved: what a peer does to make that possible is no flood.
    #[inline]
    fn progress(&mut self, payload: u32) {
        self.refill(2 + payload / BYTES_PER_UNIT);
    }

    /// A stream was worth opening.
    fn answered(&mut self) {
        self.patience = (self.patience + 1).min(self.config.flood_budget / 2);
    }

    /// A stream came to nothing. A peer that does little else is told to open no more; what it has
    /// open goes on.
    fn fruitless(&mut self, what: &'static str) -> Result<(), ConnectionError> {
        if let Some(left) = self.patience.checked_sub(1) {
            self.patience = left;
            return Ok(());
        }
        if self.role == Role::Client {
            return Err(ConnectionError::Flood { what });
        }
        // From here on its new streams are ignored, and what it sends for them is charged.
        if self.shutdown != Shutdown::Final {
            self.shutdown = Shutdown::Final;
            self.calmed = true;
            let (last, code) = (self.last_processed, ErrorCode::ENHANCE_YOUR_CALM);
            let out = self.output.buffer();
            frame::write_go_away(out, last, code.0, code.name().as_bytes());
        }
        self.charge(RESET_COST, what)
    }

    /// Counts a reply that the peer has to read before the output can shrink.
    fn count_reply(&mut self) -> Result<(), ConnectionError> {
        if self.output.count_reply() > self.config.queued_replies_max {
            return Err(ConnectionError::Flood {
                what: "replies it does not read",
            });
        }
        Ok(())
    }

    /// Removes a stream that ended in both directions.
    fn finish_if_ended(&mut self, id: u32) {
        if self
            .streams
            .get(id)
            .is_some_and(|s| s.local_ended && s.remote_ended)
        {
            self.streams.remove(id);
            self.ended.add(id);
        }
    }

    /// Returns how many streams are told.
    fn report_writable(&mut self, events: &mut VecDeque<Event>) -> u32 {
        if self.send.available() == 0 {
            return 0;
        }
        let before = events.len();
        self.turn = self.turn.wrapping_add(1);
        for stream in self.streams.iter_from(self.turn) {
            if self.may_send(stream) && stream.send.available() > 0 {
                events.push_back(Event::Writable {
                    id: StreamId(stream.id),
                });
            }
        }
        u32::try_from(events.len() - before).unwrap_or(u32::MAX)
    }

    fn queue_preface(&mut self) {
        let config = &self.config;
        let mut settings = vec![
            (setting::INITIAL_WINDOW_SIZE, config.stream_window),
            (setting::MAX_FRAME_SIZE, config.max_frame_size),
            (setting::MAX_HEADER_LIST_SIZE, config.max_header_list_size),
        ];
        if config.header_table_size != DEFAULT_TABLE_SIZE {
            settings.push((setting::HEADER_TABLE_SIZE, config.header_table_size));
        }
        let raise = config.connection_window - DEFAULT_WINDOW;
        let concurrent = config.max_concurrent_streams;
        let out = self.output.buffer();
        match self.role {
            Role::Client => {
                out.extend_from_slice(frame::PREFACE);
                settings.push((setting::ENABLE_PUSH, 0));
            }
            Role::Server => settings.push((setting::MAX_CONCURRENT_STREAMS, concurrent)),
        }
        frame::write_settings(out, &settings);
        if raise > 0 {
            frame::write_window_update(out, 0, raise);
        }
    }

    /// Says GOAWAY and forgets everything.
    fn die(&mut self, code: ErrorCode, debug: &[u8]) {
        frame::write_go_away(self.output.buffer(), self.last_processed, code.0, debug);
        self.shutdown = Shutdown::Dead;
        self.streams = Streams::new();
        self.block = None;
        self.parser = Parser::new(self.role);
    }
}

/// Window of streams and connection before SETTINGS and WINDOW_UPDATE (RFC 9113 6.9.2).
const DEFAULT_WINDOW: u32 = 65_535;
/// SETTINGS_MAX_FRAME_SIZE before SETTINGS.
const DEFAULT_FRAME_SIZE: u32 = 16_384;
/// SETTINGS_HEADER_TABLE_SIZE before SETTINGS.
const DEFAULT_TABLE_SIZE: u32 = 4096;
/// Payload bytes that give a unit of the flood budget back: a peer that credits what it reads in
/// small pieces sends so many WINDOW_UPDATEs and no more.
const BYTES_PER_UNIT: u32 = 512;
/// Units of the flood budget, and streams without success, that a second makes up for.
const UNITS_PER_SECOND: u32 = 32;
/// Streams that are told that they may send, for each unit of the flood budget.
const TOLD_PER_UNIT: u32 = 32;
/// What a stream costs of the flood budget that comes to nothing after all patience.
const RESET_COST: u32 = 2;
/// Highest identifier a client may use.
const ID_MAX: u32 = MAX_31;
