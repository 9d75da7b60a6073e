//! The sending side of a tunnel: frames become records, records become sends.

use hbone::FRAME_HEADER;
use rt::buf::Buf;
use rt::net::WriteHalf;
use tls::{SealError, Session};

/// Payload up to this size is copied next to other frames into one record: cheaper than a record
/// of its own (AEAD set-up, 22 bytes, a vector) and the receive block is free at once.
const COPY_MAX: usize = 1024;
const HEADER: usize = Session::RECORD_HEADER;
const TRAILER: usize = Session::RECORD_TRAILER;

/// Records being built and sent. Order of calls is order on the wire.
#[derive(Debug)]
pub(super) struct Outgoing {
    write: WriteHalf,
    /// Plaintext of the record under construction, with room for header and trailer around.
    record: Option<Buf>,
    /// Bytes given to `write` so far.
    pushed: u64,
}

impl Outgoing {
    pub(super) fn new(write: WriteHalf) -> Self {
        Self {
            write,
            record: None,
            pushed: 0,
        }
    }

    pub(super) fn write(&mut self) -> &mut WriteHalf {
        &mut self.write
    }

    /// Bytes that wait to be taken by the socket.
    pub(super) fn pending_bytes(&self) -> usize {
        self.write.pending_bytes() + self.record.as_ref().map_or(0, |record| record.len())
    }

    /// Bytes queued so far, and how many of them the socket has taken.
    pub(super) fn progress(&self) -> (u64, u64) {
        let building = self.record.as_ref().map_or(0, |record| record.len());
        let taken = self
            .pushed
            .saturating_sub(self.write.pending_bytes() as u64);
        (self.pushed + building as u64, taken)
    }

    fn send(&mut self, record: Buf) {
        self.pushed += record.len() as u64;
        self.write.push(record);
    }

    fn send_copy(&mut self, bytes: &[u8]) {
        self.pushed += bytes.len() as u64;
        self.write.push_copy(bytes);
    }

    /// Appends a copy of `bytes` to the record under construction.
    pub(super) fn append(
        &mut self,
        session: &mut Session,
        mut bytes: &[u8],
    ) -> Result<(), SealError> {
        while !bytes.is_empty() {
            let record = match &mut self.record {
                Some(record) => record,
                none => none.insert(empty_record(&self.write)),
            };
            let n = bytes.len().min(Session::MAX_PLAINTEXT - record.len());
            record.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            if record.len() == Session::MAX_PLAINTEXT {
                self.seal(session)?;
            }
        }
        Ok(())
    }

    /// Queues a DATA frame.
    pub(super) fn data(
        &mut self,
        session: &mut Session,
        header: [u8; FRAME_HEADER],
        mut payload: Buf,
    ) -> Result<(), SealError> {
        let fits = payload.head_room() >= FRAME_HEADER + HEADER
            && payload.tail_room() >= TRAILER
            && payload.len() + FRAME_HEADER <= Session::MAX_PLAINTEXT;
        if payload.len() <= COPY_MAX || !fits {
            self.append(session, &header)?;
            return self.append(session, &payload);
        }
        self.seal(session)?;
        payload.grow_head(FRAME_HEADER);
        payload[..FRAME_HEADER].copy_from_slice(&header);
        self.push(session, payload)
    }

    /// Seals the record under construction, if there is one, and queues it.
    pub(super) fn seal(&mut self, session: &mut Session) -> Result<(), SealError> {
        match self.record.take() {
            Some(record) => self.push(session, record),
            None => Ok(()),
        }
    }

    fn push(&mut self, session: &mut Session, mut record: Buf) -> Result<(), SealError> {
        self.control(session);
        record.grow_head(HEADER);
        record.grow_tail(TRAILER);
        session.seal(&mut record)?;
        self.send(record);
        Ok(())
    }

    /// Queues key updates and alerts that are due before the next record.
    pub(super) fn control(&mut self, session: &mut Session) {
        if session.has_control_output() {
            let mut output = Vec::new();
            session.take_control_output(&mut output);
            self.send_copy(&output);
        }
    }

    /// Queues close_notify behind everything else.
    pub(super) fn close(&mut self, session: &mut Session) {
        // A seal error means that nothing can be sent any more; the transport closes anyway.
        let _ = self.seal(session);
        let mut output = Vec::new();
        session.close_notify(&mut output);
        self.send_copy(&output);
    }
}

/// A record buffer positioned so that a full record and its trailer fit behind the header room.
fn empty_record(write: &WriteHalf) -> Buf {
    let mut record = write.pool().record();
    record.grow_head(FRAME_HEADER);
    record.truncate(0);
    record
}
