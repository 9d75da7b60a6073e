//! Records by rustls' buffered connections: the reference for [`InPlace`](super::InPlace).
//!
//! Plaintext is copied into rustls and records out of it, and back. Callers see what they see of
//! the records in place, so that everything above can be run, tested and measured with both.
//!
//! Differences: rustls makes no empty records; it always asks the peer to update its key, too; the
//! alerts of its errors are its own choice, and there is none for other records without data than
//! empty ones and key updates; a key update it has made must be taken before anything is sealed.

use std::fmt;
use std::io::{Read as _, Write as _};

use rustls::{Connection, Error, PeerMisbehaved};

use super::layer::{Direction, Opened, RecordLayer};
use super::{KEY_UPDATE_AFTER, MAX_WITHOUT_DATA, OpenError, SealError};
use crate::record::{
    self, APPLICATION_DATA, MAX_PLAINTEXT, RECORD_HEADER, RECORD_TRAILER, write_header,
};

/// A connection that rustls serves to its end.
pub(crate) struct Buffered {
    connection: Connection,
    writing: Direction,
    reading: Direction,
    /// Records sealed with the present key, and how many there may be.
    sealed: u64,
    update_after: u64,
    /// Records opened with the present key, for messages.
    opened: u64,
    /// rustls may keep an answer until something is written.
    answer_due: bool,
    without_data: u8,
    /// One record on its way out of rustls.
    wire: Vec<u8>,
}

impl Buffered {
    /// Goes on where the handshake ended; its output has been taken.
    pub(crate) const fn new(connection: Connection) -> Self {
        Self {
            connection,
            writing: Direction::Open,
            reading: Direction::Open,
            sealed: 0,
            update_after: KEY_UPDATE_AFTER,
            opened: 0,
            answer_due: false,
            without_data: 0,
            wire: Vec::new(),
        }
    }

    /// Has rustls open `record`; returns how much plaintext came of it.
    fn process(&mut self, mut record: &[u8]) -> Result<usize, Error> {
        let mut plaintext = 0;
        while !record.is_empty() {
            let taken = self.connection.read_tls(&mut record);
            if taken.map_err(|error| Error::General(error.to_string()))? == 0 {
                break;
            }
            plaintext = self
                .connection
                .process_new_packets()?
                .plaintext_bytes_to_read();
        }
        Ok(plaintext)
    }

    /// rustls' error as ours. The alert, if one is due, waits in the connection.
    fn explain(&self, error: Error, record: &[u8]) -> OpenError {
        match error {
            Error::AlertReceived(alert) => OpenError::Alert(alert),
            _ if record[0] != APPLICATION_DATA => OpenError::UnexpectedRecord(record[0]),
            Error::DecryptError => OpenError::BadRecordMac {
                sequence: self.opened,
            },
            Error::PeerSentOversizedRecord => {
                OpenError::PlaintextTooLong(record.len() - RECORD_HEADER)
            }
            Error::PeerMisbehaved(
                PeerMisbehaved::TooManyEmptyFragments | PeerMisbehaved::TooManyKeyUpdateRequests,
            ) => OpenError::TooManyWithoutData,
            error => OpenError::Library(error.to_string()),
        }
    }

    /// Appends what rustls wants to send.
    fn drain(&mut self, output: &mut Vec<u8>) {
        while self.connection.wants_write() {
            if self.connection.write_tls(output).is_err() {
                // Never happens: a vector takes everything.
                self.writing = Direction::Failed;
                return;
            }
        }
    }

    /// The record of `plaintext`, in `wire`.
    fn write(&mut self, plaintext: &[u8]) -> bool {
        let mut wire = std::mem::take(&mut self.wire);
        wire.clear();
        let written = self.connection.writer().write(plaintext);
        self.drain(&mut wire);
        self.wire = wire;
        written.is_ok_and(|n| n == plaintext.len())
            && self.wire.len() == RECORD_HEADER + plaintext.len() + RECORD_TRAILER
    }

    fn refresh(&mut self) {
        self.sealed = 0;
        if self.connection.refresh_traffic_keys().is_err() {
            self.writing = Direction::Failed;
        }
    }
}

impl RecordLayer for Buffered {
    fn seal(&mut self, record: &mut [u8]) -> Result<(), SealError> {
        if self.writing != Direction::Open {
            return Err(SealError::Closed);
        }
        // It would leave in front of this record, and there is no room for it.
        if self.has_control_output() {
            return Err(SealError::KeyUpdateDue);
        }
        let bad_length = SealError::BadLength(record.len());
        let plaintext = record
            .len()
            .checked_sub(RECORD_HEADER + RECORD_TRAILER)
            .filter(|plaintext| (1..=MAX_PLAINTEXT).contains(plaintext))
            .ok_or(bad_length)?;
        if !self.write(&record[RECORD_HEADER..RECORD_HEADER + plaintext]) {
            // What rustls has sealed is lost, and its sequence number with it.
            self.writing = Direction::Failed;
            return Err(SealError::Closed);
        }
        record.copy_from_slice(&self.wire);
        self.sealed += 1;
        if self.sealed >= self.update_after {
            self.refresh();
        }
        Ok(())
    }

    fn try_open(&mut self, record: &mut [u8]) -> Result<Opened, OpenError> {
        let need = record::record_len(record)?.unwrap_or(RECORD_HEADER);
        if record.len() != need {
            let have = record.len();
            return Err(OpenError::Incomplete { have, need });
        }
        let plaintext = self
            .process(record)
            .map_err(|error| self.explain(error, record))?;
        self.opened += 1;
        if plaintext > 0 {
            let range = RECORD_HEADER..RECORD_HEADER + plaintext;
            let taken = self
                .connection
                .reader()
                .read_exact(&mut record[range.clone()]);
            taken.map_err(|error| OpenError::Library(error.to_string()))?;
            self.without_data = 0;
            return Ok(Opened::Data(range));
        }
        if self
            .connection
            .process_new_packets()
            .is_ok_and(|state| state.peer_has_closed())
        {
            self.reading = Direction::Closed;
            return Ok(Opened::Closed);
        }
        self.without_data += 1;
        if self.without_data > MAX_WITHOUT_DATA {
            return Err(OpenError::TooManyWithoutData);
        }
        self.answer_due = true;
        Ok(Opened::Handled)
    }

    #[inline]
    fn reading(&self) -> Direction {
        self.reading
    }

    fn fail(&mut self, error: &OpenError) {
        if self.reading == Direction::Failed {
            return;
        }
        if let OpenError::TooLong(_) = error {
            // rustls' limit for headers is TLS 1.2's, a little more: this one it does not take.
            let mut header = [0; RECORD_HEADER];
            write_header(&mut header, u16::MAX);
            let refused = self.process(&header);
            debug_assert!(refused.is_err(), "rustls knows the limit");
        }
        self.reading = Direction::Failed;
        self.answer_due = false;
        if self.writing == Direction::Open {
            self.writing = Direction::Closed;
        }
    }

    fn has_control_output(&self) -> bool {
        self.answer_due || self.connection.wants_write()
    }

    fn take_control_output(&mut self, output: &mut Vec<u8>) {
        if std::mem::take(&mut self.answer_due) && self.writing == Direction::Open {
            // Nothing to write, which still makes rustls send the answer it keeps.
            let _ = self.connection.writer().write(&[]);
        }
        self.drain(output);
    }

    fn close_notify(&mut self, output: &mut Vec<u8>) {
        self.take_control_output(output);
        if self.writing == Direction::Open {
            self.connection.send_close_notify();
            self.drain(output);
            self.writing = Direction::Closed;
        }
    }

    fn update_keys(&mut self, _ask_peer: bool) {
        if self.writing == Direction::Open {
            self.refresh();
        }
    }

    fn set_key_update_after(&mut self, records: u64) {
        self.update_after = records.clamp(1, KEY_UPDATE_AFTER);
    }
}

impl fmt::Debug for Buffered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffered")
            .field("reading", &self.reading)
            .field("writing", &self.writing)
            .field("opened", &self.opened)
            .field("sealed", &self.sealed)
            .finish_non_exhaustive()
    }
}
