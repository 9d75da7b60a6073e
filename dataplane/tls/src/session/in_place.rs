//! Records in the caller's buffers: AES-GCM in place, in user space. What ztunnel uses.
//!
//! rustls has given its secrets away and keeps only the key schedule, for key updates.

use std::fmt;

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{AlertDescription, ConnectionTrafficSecrets, ExtractedSecrets};

use super::layer::{Direction, Opened, RecordLayer};
use super::post_handshake::{self, MessageReader};
use super::{FATAL, KEY_LIMIT, KEY_UPDATE_AFTER, MAX_WITHOUT_DATA, OpenError, SealError, WARNING};
use crate::record::protection::{ProtectionError, TrafficKey};
use crate::record::{
    self, ALERT, APPLICATION_DATA, HANDSHAKE, MAX_PLAINTEXT, RECORD_HEADER, RECORD_TRAILER,
};

/// The handshake's secrets from which further keys come.
pub(crate) enum Keys {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

/// Both directions of one connection.
pub(crate) struct InPlace {
    pub(super) transmit: TrafficKey,
    pub(super) receive: TrafficKey,
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
}

impl InPlace {
    pub(crate) fn new(secrets: ExtractedSecrets, keys: Keys) -> Result<Self, ProtectionError> {
        let key = |(sequence, secrets)| TrafficKey::new(secrets, sequence);
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
        })
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

impl RecordLayer for InPlace {
    #[inline]
    fn seal(&mut self, record: &mut [u8]) -> Result<(), SealError> {
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

    #[inline]
    fn reading(&self) -> Direction {
        self.reading
    }

    fn fail(&mut self, error: &OpenError) {
        self.reading = Direction::Failed;
        if self.writing != Direction::Open {
            return;
        }
        self.writing = Direction::Closed;
        self.alert_wanted = error.alert();
    }

    #[inline]
    fn has_control_output(&self) -> bool {
        self.update_wanted.is_some() || self.alert_wanted.is_some()
    }

    fn take_control_output(&mut self, output: &mut Vec<u8>) {
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

    fn close_notify(&mut self, output: &mut Vec<u8>) {
        self.take_control_output(output);
        if self.writing == Direction::Open {
            let alert = [WARNING, u8::from(AlertDescription::CloseNotify)];
            self.seal_control(ALERT, &alert, output);
            self.writing = Direction::Closed;
        }
    }

    fn update_keys(&mut self, ask_peer: bool) {
        if self.writing == Direction::Open {
            self.update_wanted = Some(ask_peer || self.update_wanted == Some(true));
        }
    }

    fn set_key_update_after(&mut self, records: u64) {
        self.update_after = records.clamp(1, KEY_UPDATE_AFTER);
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

impl fmt::Debug for InPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InPlace")
            .field("reading", &self.reading)
            .field("writing", &self.writing)
            .field("opened", &self.receive.sequence())
            .field("sealed", &self.transmit.sequence())
            .finish_non_exhaustive()
    }
}
