//! An established connection: application data in and out of records, in the caller's buffers.
//!
//! Order matters: records must reach the peer in the order in which [`Session::seal`],
//! [`Session::take_control_output`] and [`Session::close_notify`] produced them. Control records
//! (key updates, alerts) are only wished for while opening or sealing and are sealed when they are
//! taken, so that a pipeline that opens and seals at different paces cannot break that order.
//!
//! Callers ask [`Session::has_control_output`] after opening and before sealing. One that never
//! does keeps working until the key's hard limit, and then [`SealError::KeyExhausted`] stops it.
//!
//! Failure: after an error of `open` the session is over in both directions; what is left to do is
//! to send the control output, which then holds the alert, and to close. After the peer's
//! close_notify sealing still works: the two directions close independently.
//!
//! Limits: [`KEY_UPDATE_AFTER`] records per key, [`MAX_WITHOUT_DATA`] records in a row that carry
//! no application data. Secrets are cleared when the session is dropped.

mod error;
mod post_handshake;

use std::fmt;
use std::ops::Range;

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{AlertDescription, ConnectionTrafficSecrets, ExtractedSecrets};

pub use self::error::{OpenError, SealError};
pub use self::post_handshake::MessageError;
use self::post_handshake::MessageReader;
use crate::handshake::HandshakeError;
use crate::peer::Peer;
use crate::record::protection::{ProtectionError, TrafficKey};
use crate::record::{
    self, ALERT, APPLICATION_DATA, HANDSHAKE, MAX_PLAINTEXT, RECORD_HEADER, RECORD_TRAILER,
    RecordTooLong,
};

/// Records sealed with one key before it is updated. AES-GCM allows 2^24.5 full records (RFC 8446,
/// 5.5); half of 2^24 leaves room for what is sealed before the update is sent.
pub const KEY_UPDATE_AFTER: u64 = 1 << 23;
/// Records sealed with one key at the very most.
const KEY_LIMIT: u64 = 1 << 24;
/// Records in a row without application data that a peer may send: tickets, key updates, padding.
pub const MAX_WITHOUT_DATA: u8 = 32;
/// Level of an alert on the wire; ignored by TLS 1.3 receivers, but written as RFC 8446 asks.
const WARNING: u8 = 1;
const FATAL: u8 = 2;

/// What a record held.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Opened {
    /// Application data: this range of the record, possibly empty.
    Data(Range<usize>),
    /// Nothing for the application. There may be control output now.
    Handled,
    /// The peer sends nothing any more (close_notify). Further records are ignored.
    Closed,
}

/// The handshake's secrets from which further keys come.
pub(crate) enum Keys {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Direction {
    Open,
    Closed,
    Failed,
}

/// An authenticated connection. Exists only after the peer's certificate has been verified.
pub struct Session {
    transmit: TrafficKey,
    receive: TrafficKey,
    writing: Direction,
    reading: Direction,
    /// Records after which the sealing key is updated.
    update_after: u64,
    /// Whether to send a KeyUpdate, and if so whether it asks the peer to update as well.
    update_wanted: Option<bool>,
    /// The fatal alert to send.
    alert_wanted: Option<AlertDescription>,
    /// Records since the last application data.
    without_data: u8,
    messages: MessageReader,
    keys: Keys,
    peer: Peer,
}

impl Session {
    /// Bytes of room in front of the plaintext for [`seal`](Self::seal).
    pub const RECORD_HEADER: usize = RECORD_HEADER;
    /// Bytes of room behind the plaintext for [`seal`](Self::seal).
    pub const RECORD_TRAILER: usize = RECORD_TRAILER;
    /// Most plaintext bytes in one record.
    pub const MAX_PLAINTEXT: usize = MAX_PLAINTEXT;

    pub(crate) fn new(
        peer: Peer,
        secrets: ExtractedSecrets,
        keys: Keys,
    ) -> Result<Self, HandshakeError> {
        let key = |(sequence, secrets)| {
            TrafficKey::new(secrets, sequence)
                .map_err(|error| HandshakeError::Keys(error.to_string()))
        };
        Ok(Self {
            transmit: key(secrets.tx)?,
            receive: key(secrets.rx)?,
            writing: Direction::Open,
            reading: Direction::Open,
            update_after: KEY_UPDATE_AFTER,
            update_wanted: None,
            alert_wanted: None,
            without_data: 0,
            messages: MessageReader::new(matches!(keys, Keys::Client(_))),
            keys,
            peer,
        })
    }

    /// Makes `record` a complete TLS record of application data, in place.
    ///
    /// `record` is [`RECORD_HEADER`](Self::RECORD_HEADER) bytes of room, the plaintext, and
    /// [`RECORD_TRAILER`](Self::RECORD_TRAILER) bytes of room; all of it is to be sent.
    ///
    /// # Errors
    /// The buffer does not fit one record, or this direction is closed or its key used up. Nothing
    /// of `record` may be sent then.
    #[inline]
    pub fn seal(&mut self, record: &mut [u8]) -> Result<(), SealError> {
        if self.writing != Direction::Open {
            return Err(SealError::Closed);
        }
        if self.transmit.sequence() >= KEY_LIMIT {
            return Err(SealError::KeyExhausted);
        }
        self.transmit
            .seal(APPLICATION_DATA, record)
            .map_err(|_| SealError::BadLength(record.len()))?;
        if self.transmit.sequence() >= self.update_after && self.update_wanted.is_none() {
            self.update_wanted = Some(false);
        }
        Ok(())
    }

    /// Opens the complete record `record`, header included, in place.
    ///
    /// # Errors
    /// The peer broke the protocol, sent a fatal alert, or the record was tampered with. The
    /// session is over, unless the error is [`OpenError::Incomplete`].
    #[inline]
    pub fn open(&mut self, record: &mut [u8]) -> Result<Opened, OpenError> {
        match self.reading {
            Direction::Open => {}
            Direction::Closed => return Ok(Opened::Closed),
            Direction::Failed => return Err(OpenError::Failed),
        }
        let opened = self.try_open(record);
        match &opened {
            Ok(_) | Err(OpenError::Incomplete { .. }) => {}
            Err(error) => self.fail(error),
        }
        opened
    }

    /// Total length of the record that starts at `bytes[0]`; `None`: more bytes needed to tell.
    ///
    /// # Errors
    /// The record announces more than TLS allows; pass the error to [`fail`](Self::fail).
    #[inline]
    pub fn record_len(bytes: &[u8]) -> Result<Option<usize>, RecordTooLong> {
        record::record_len(bytes)
    }

    /// Gives the session up because of `error`, and queues the alert that is due.
    pub fn fail(&mut self, error: &OpenError) {
        self.reading = Direction::Failed;
        if self.writing != Direction::Open {
            return;
        }
        self.writing = Direction::Closed;
        self.alert_wanted = error.alert();
    }

    /// Whether [`take_control_output`](Self::take_control_output) has something to append.
    #[inline]
    pub const fn has_control_output(&self) -> bool {
        self.update_wanted.is_some() || self.alert_wanted.is_some()
    }

    /// Appends the control records that are due to `output`, sealed. They are to be sent after
    /// all records sealed before this call, and before all records sealed after it.
    ///
    /// When a key cannot be updated nothing can be sealed any more, which the next
    /// [`seal`](Self::seal) reports.
    pub fn take_control_output(&mut self, output: &mut Vec<u8>) {
        if let Some(alert) = self.alert_wanted.take() {
            // Final; an answer to a key update would be pointless before it.
            self.update_wanted = None;
            self.seal_control(ALERT, &[FATAL, u8::from(alert)], output);
            return;
        }
        let Some(request) = self.update_wanted.take() else {
            return;
        };
        if self.writing != Direction::Open {
            return;
        }
        let message = post_handshake::key_update(request);
        self.seal_control(HANDSHAKE, &message, output);
        match self.keys.update_transmit() {
            Ok(key) => self.transmit = key,
            Err(_) => self.writing = Direction::Failed,
        }
    }

    /// Appends close_notify, after what is due before it; nothing can be sealed afterwards.
    pub fn close_notify(&mut self, output: &mut Vec<u8>) {
        self.take_control_output(output);
        if self.writing == Direction::Open {
            let alert = [WARNING, u8::from(AlertDescription::CloseNotify)];
            self.seal_control(ALERT, &alert, output);
            self.writing = Direction::Closed;
        }
    }

    /// Wishes for new keys: ours, and with `ask_peer` the peer's as well.
    pub fn update_keys(&mut self, ask_peer: bool) {
        if self.writing == Direction::Open {
            self.update_wanted = Some(ask_peer || self.update_wanted == Some(true));
        }
    }

    /// Updates the sealing key every `records` records, 1 to [`KEY_UPDATE_AFTER`]; values outside
    /// are brought into this range.
    pub fn set_key_update_after(&mut self, records: u64) {
        self.update_after = records.clamp(1, KEY_UPDATE_AFTER);
    }

    /// Who the peer is.
    pub const fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Whether the peer closed its direction with close_notify. A transport that ends without it
    /// was cut off, and what was received may be incomplete.
    pub const fn received_close_notify(&self) -> bool {
        matches!(self.reading, Direction::Closed)
    }

    #[inline]
    fn try_open(&mut self, record: &mut [u8]) -> Result<Opened, OpenError> {
        let need = record::record_len(record)?.unwrap_or(RECORD_HEADER);
        if record.len() != need {
            let have = record.len();
            return Err(OpenError::Incomplete { have, need });
        }
        // A change_cipher_spec is tolerated during the handshake only, and everything behind it
        // is protected.
        if record[0] != APPLICATION_DATA {
            return Err(OpenError::UnexpectedRecord(record[0]));
        }
        let sequence = self.receive.sequence();
        let inner = self.receive.open(record).map_err(|error| match error {
            ProtectionError::Exhausted => OpenError::Exhausted,
            _ => OpenError::BadRecordMac { sequence },
        })?;
        if inner > MAX_PLAINTEXT + 1 {
            return Err(OpenError::PlaintextTooLong(inner));
        }
        let inner = RECORD_HEADER..RECORD_HEADER + inner;
        // Zero bytes behind the content type are padding.
        let end = record[inner.clone()]
            .iter()
            .rposition(|byte| *byte != 0)
            .ok_or(OpenError::NoContentType)?;
        let content = inner.start..inner.start + end;
        match record[content.end] {
            APPLICATION_DATA if self.messages.is_aligned() && !content.is_empty() => {
                self.without_data = 0;
                Ok(Opened::Data(content))
            }
            content_type => self.handle_control(content_type, &record[content]),
        }
    }

    /// Acts on a record that holds anything but application data, or none of it.
    #[cold]
    fn handle_control(&mut self, content_type: u8, content: &[u8]) -> Result<Opened, OpenError> {
        self.without_data += 1;
        if self.without_data > MAX_WITHOUT_DATA {
            return Err(OpenError::TooManyWithoutData);
        }
        if content_type != HANDSHAKE && !self.messages.is_aligned() {
            return Err(OpenError::Interleaved(content_type));
        }
        match content_type {
            // Only empty ones come here.
            APPLICATION_DATA => Ok(Opened::Data(RECORD_HEADER..RECORD_HEADER)),
            HANDSHAKE => self.handle_messages(content),
            ALERT => self.handle_alert(content),
            other => Err(OpenError::UnexpectedRecord(other)),
        }
    }

    fn handle_alert(&mut self, content: &[u8]) -> Result<Opened, OpenError> {
        let [_level, description] = content else {
            return Err(OpenError::MalformedAlert(content.len()));
        };
        match AlertDescription::from(*description) {
            AlertDescription::CloseNotify => {
                self.reading = Direction::Closed;
                Ok(Opened::Closed)
            }
            // Says that a close_notify follows, nothing else (RFC 8446, 6.1).
            AlertDescription::UserCanceled => Ok(Opened::Handled),
            alert => Err(OpenError::Alert(alert)),
        }
    }

    fn handle_messages(&mut self, content: &[u8]) -> Result<Opened, OpenError> {
        if let Some(update) = self.messages.read(content)? {
            self.receive = self.keys.update_receive().map_err(OpenError::KeyUpdate)?;
            if update.answer_requested {
                self.update_keys(false);
            }
        }
        Ok(Opened::Handled)
    }

    /// Appends one control record.
    fn seal_control(&mut self, content_type: u8, content: &[u8], output: &mut Vec<u8>) {
        let start = output.len();
        output.resize(start + RECORD_HEADER, 0);
        output.extend_from_slice(content);
        output.resize(output.len() + RECORD_TRAILER, 0);
        if self
            .transmit
            .seal(content_type, &mut output[start..])
            .is_err()
        {
            output.truncate(start);
            self.writing = Direction::Failed;
        }
    }
}

impl Keys {
    fn update_transmit(&mut self) -> Result<TrafficKey, String> {
        usable(match self {
            Self::Client(kernel) => kernel.update_tx_secret(),
            Self::Server(kernel) => kernel.update_tx_secret(),
        })
    }

    fn update_receive(&mut self) -> Result<TrafficKey, String> {
        usable(match self {
            Self::Client(kernel) => kernel.update_rx_secret(),
            Self::Server(kernel) => kernel.update_rx_secret(),
        })
    }
}

fn usable(
    updated: Result<(u64, ConnectionTrafficSecrets), rustls::Error>,
) -> Result<TrafficKey, String> {
    let (sequence, secrets) = updated.map_err(|error| error.to_string())?;
    TrafficKey::new(secrets, sequence).map_err(|error| error.to_string())
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("peer", &self.peer)
            .field("reading", &self.reading)
            .field("writing", &self.writing)
            .field("opened", &self.receive.sequence())
            .field("sealed", &self.transmit.sequence())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
