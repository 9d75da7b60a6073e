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

mod buffered;
mod error;
mod in_place;
mod layer;
mod post_handshake;

pub(crate) use self::buffered::Buffered;
pub use self::error::{OpenError, SealError};
pub(crate) use self::in_place::{InPlace, Keys};
pub use self::layer::Opened;
use self::layer::RecordLayer;
pub use self::post_handshake::MessageError;
use crate::peer::Peer;
use crate::record::{
    self, MAX_PLAINTEXT, RECORD_HEADER, RECORD_TRAILER, RecordPath, RecordTooLong,
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

/// Which record layer the connection has. Not a trait object: the usual one is called directly,
/// behind a branch that always goes the same way.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "the large one is the usual one; in a box it would cost a look-up for each record"
)]
pub(crate) enum Layer {
    InPlace(InPlace),
    Buffered(Box<Buffered>),
}

/// Calls the record layer there is.
macro_rules! layer {
    ($of:expr, $call:ident($($argument:expr),*)) => {
        match $of {
            Layer::InPlace(layer) => layer.$call($($argument),*),
            Layer::Buffered(layer) => layer.$call($($argument),*),
        }
    };
}

/// An authenticated connection. Exists only after the peer's certificate has been verified.
#[derive(Debug)]
pub struct Session {
    layer: Layer,
    peer: Peer,
}

impl Session {
    /// Bytes of room in front of the plaintext for [`seal`](Self::seal).
    pub const RECORD_HEADER: usize = RECORD_HEADER;
    /// Bytes of room behind the plaintext for [`seal`](Self::seal).
    pub const RECORD_TRAILER: usize = RECORD_TRAILER;
    /// Most plaintext bytes in one record.
    pub const MAX_PLAINTEXT: usize = MAX_PLAINTEXT;

    pub(crate) const fn new(peer: Peer, layer: Layer) -> Self {
        Self { layer, peer }
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
        layer!(&mut self.layer, seal(record))
    }

    /// Opens the complete record `record`, header included, in place.
    ///
    /// # Errors
    /// The peer broke the protocol, sent a fatal alert, or the record was tampered with. The
    /// session is over, unless the error is [`OpenError::Incomplete`].
    #[inline]
    pub fn open(&mut self, record: &mut [u8]) -> Result<Opened, OpenError> {
        layer!(&mut self.layer, open(record))
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
        layer!(&mut self.layer, fail(error));
    }

    /// Whether [`take_control_output`](Self::take_control_output) has something to append.
    #[inline]
    pub fn has_control_output(&self) -> bool {
        layer!(&self.layer, has_control_output())
    }

    /// Appends the control records that are due to `output`, sealed. They are to be sent after
    /// all records sealed before this call, and before all records sealed after it.
    ///
    /// When a key cannot be updated nothing can be sealed any more, which the next
    /// [`seal`](Self::seal) reports.
    pub fn take_control_output(&mut self, output: &mut Vec<u8>) {
        layer!(&mut self.layer, take_control_output(output));
    }

    /// Appends close_notify, after what is due before it; nothing can be sealed afterwards.
    pub fn close_notify(&mut self, output: &mut Vec<u8>) {
        layer!(&mut self.layer, close_notify(output));
    }

    /// Wishes for new keys: ours, and with `ask_peer` the peer's as well.
    pub fn update_keys(&mut self, ask_peer: bool) {
        layer!(&mut self.layer, update_keys(ask_peer));
    }

    /// Updates the sealing key every `records` records, 1 to [`KEY_UPDATE_AFTER`]; values outside
    /// are brought into this range.
    pub fn set_key_update_after(&mut self, records: u64) {
        layer!(&mut self.layer, set_key_update_after(records));
    }

    /// Who the peer is.
    pub const fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Whether the peer closed its direction with close_notify. A transport that ends without it
    /// was cut off, and what was received may be incomplete.
    pub fn received_close_notify(&self) -> bool {
        layer!(&self.layer, received_close_notify())
    }

    /// Who seals and opens the records.
    pub const fn records(&self) -> RecordPath {
        match self.layer {
            Layer::InPlace(_) => RecordPath::Own,
            Layer::Buffered(_) => RecordPath::Rustls,
        }
    }

    /// The keys, to forge records with.
    #[cfg(test)]
    fn in_place(&mut self) -> &mut InPlace {
        match &mut self.layer {
            Layer::InPlace(layer) => layer,
            Layer::Buffered(_) => panic!("the library keeps its keys"),
        }
    }
}

#[cfg(test)]
mod tests;
