//! What can go wrong on an established connection.

use rustls::AlertDescription;

use super::{MAX_WITHOUT_DATA, MessageError};
use crate::record::{MAX_PLAINTEXT, RECORD_HEADER, RECORD_TRAILER, RecordTooLong};

/// Why a record could not be sealed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SealError {
    /// close_notify or an alert has been sent or is due.
    #[error("cannot seal: this direction of the TLS connection is closed")]
    Closed,
    /// The buffer is no record with room for header and trailer.
    #[error(
        "cannot seal a buffer of {0} bytes: {min} to {max} are allowed, header and trailer room \
         included",
        min = RECORD_HEADER + RECORD_TRAILER,
        max = RECORD_HEADER + MAX_PLAINTEXT + RECORD_TRAILER
    )]
    BadLength(usize),
    /// A key update was not taken for sending; only with rustls' records, which leave no choice.
    #[error("cannot seal: a key update has to be sent first")]
    KeyUpdateDue,
    /// The key's limit is reached because a due key update was never taken for sending.
    #[error("cannot seal: the traffic key is used up and its update was never sent")]
    KeyExhausted,
}

/// Why a record could not be opened. Messages are one line.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum OpenError {
    /// The slice is not exactly one record; the caller's mistake, the session goes on.
    #[error("{have} bytes given to open, the record has {need}")]
    Incomplete {
        /// Bytes in the slice.
        have: usize,
        /// Bytes of the record by its header, or those of a header.
        need: usize,
    },
    /// More ciphertext than allowed.
    #[error(transparent)]
    TooLong(#[from] RecordTooLong),
    /// More plaintext than allowed.
    #[error("record holds {0} bytes with type and padding, at most 16385 are allowed")]
    PlaintextTooLong(usize),
    /// A record of a type that may not come here.
    #[error(
        "unexpected record of type {0}; after the handshake only protected application data, \
         alerts and handshake messages are allowed"
    )]
    UnexpectedRecord(u8),
    /// Authentication failed: tampered with, reordered, or sealed with another key.
    #[error(
        "record {sequence} does not authenticate; it was altered, lost or reordered on its way"
    )]
    BadRecordMac {
        /// Sequence number under the current key.
        sequence: u64,
    },
    /// Nothing but padding.
    #[error("record holds nothing but padding")]
    NoContentType,
    /// Another record in the middle of a handshake message.
    #[error("record of type {0} in the middle of a handshake message")]
    Interleaved(u8),
    /// A handshake message that is malformed or may not come here.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// Too many records that carry no application data.
    #[error("more than {MAX_WITHOUT_DATA} records in a row without application data")]
    TooManyWithoutData,
    /// An alert is two bytes.
    #[error("alert of {0} bytes, expected 2")]
    MalformedAlert(usize),
    /// The peer gave the connection up.
    #[error("the peer ended the TLS connection with alert {0:?}{hint}", hint = hint(*.0))]
    Alert(AlertDescription),
    /// The peer's new key could not be derived.
    #[error("the peer's key update failed: {0}")]
    KeyUpdate(String),
    /// 2^64 - 1 records were received with one key.
    #[error("the peer sent 2^64 records with one key")]
    Exhausted,
    /// rustls refused the record for a reason that has no name here.
    #[error("{0}")]
    Library(String),
    /// An earlier record had failed.
    #[error("the TLS connection failed before")]
    Failed,
}

impl OpenError {
    /// The alert that tells the peer, if one is due.
    pub const fn alert(&self) -> Option<AlertDescription> {
        match self {
            // rustls has queued its own.
            Self::Library(_) | Self::Incomplete { .. } | Self::Alert(_) | Self::Failed => None,
            Self::TooLong(_) | Self::PlaintextTooLong(_) => Some(AlertDescription::RecordOverflow),
            Self::UnexpectedRecord(_)
            | Self::NoContentType
            | Self::Interleaved(_)
            | Self::TooManyWithoutData => Some(AlertDescription::UnexpectedMessage),
            Self::BadRecordMac { .. } => Some(AlertDescription::BadRecordMac),
            Self::Message(error) => Some(error.alert()),
            Self::MalformedAlert(_) => Some(AlertDescription::DecodeError),
            Self::KeyUpdate(_) | Self::Exhausted => Some(AlertDescription::InternalError),
        }
    }
}

/// In TLS 1.3 a client has finished when the server looks at its certificate, so that a refusal
/// arrives as an alert on the established connection.
const fn hint(alert: AlertDescription) -> &'static str {
    match alert {
        AlertDescription::UnknownCA => "; it does not trust the CA of our certificate",
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::AccessDenied => "; it does not accept our identity",
        AlertDescription::CertificateExpired => "; our certificate expired, or a clock is wrong",
        AlertDescription::CertificateRequired => "; it wants a client certificate",
        _ => "",
    }
}
