//! TLS 1.3 records: framing (RFC 8446, 5.1 and 5.2) and their protection.
//!
//! `session::layer::RecordLayer` is what a session asks of whoever does the rest, and there are
//! three places for it, chosen by [`RecordPath`] before the handshake:
//!
//! * *own* (`protection`, `session::in_place`): AES-GCM in the caller's buffers, in user space;
//! * *rustls* (`session::buffered`): rustls' buffered connections, the reference to compare with;
//! * *kernel* (kTLS): nothing is there yet. It would be built from the same secrets as the first,
//!   after they were given to the socket with `setsockopt(SOL_TLS)`; sealing would leave the
//!   payload as it is, the room around it unsent, and control records would travel as ancillary
//!   data. Key updates stay with the session, which has the key schedule.

use std::fmt;

pub(crate) mod protection;

/// Bytes in front of a record's ciphertext: type, legacy version, length.
pub const RECORD_HEADER: usize = 5;
/// Bytes behind the plaintext in a sealed record: content type and authentication tag.
pub const RECORD_TRAILER: usize = 1 + TAG;
/// Most plaintext bytes in one record (RFC 8446, 5.1).
pub const MAX_PLAINTEXT: usize = 1 << 14;
/// Most bytes behind the header of a protected record (RFC 8446, 5.2).
pub const MAX_CIPHERTEXT: usize = MAX_PLAINTEXT + 256;
/// Length of an AES-GCM authentication tag.
pub(crate) const TAG: usize = 16;

/// `alert`.
pub(crate) const ALERT: u8 = 21;
/// `handshake`.
pub(crate) const HANDSHAKE: u8 = 22;
/// `application_data`, and the outer type of every protected record.
pub(crate) const APPLICATION_DATA: u8 = 23;

/// Who seals and opens records.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum RecordPath {
    /// This crate, in the caller's buffers.
    #[default]
    Own,
    /// rustls' buffered connections: slower, and what the first is compared with.
    Rustls,
}

impl fmt::Display for RecordPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Own => "own",
            Self::Rustls => "rustls",
        })
    }
}

/// A record announces more bytes than TLS 1.3 allows.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "record announces {announced} bytes, at most {MAX_CIPHERTEXT} are allowed; the peer may not \
     be speaking TLS"
)]
pub struct RecordTooLong {
    /// Bytes behind the header, by the header.
    pub announced: usize,
}

/// Total length of the record that starts at `bytes[0]`, header included.
///
/// `None` when fewer than the [`RECORD_HEADER`] bytes needed to tell are there. The answer is at
/// most `RECORD_HEADER + MAX_CIPHERTEXT`.
///
/// # Errors
/// The header announces more than [`MAX_CIPHERTEXT`] bytes.
#[inline]
pub fn record_len(bytes: &[u8]) -> Result<Option<usize>, RecordTooLong> {
    let [_, _, _, high, low, ..] = bytes else {
        return Ok(None);
    };
    let announced = usize::from(u16::from_be_bytes([*high, *low]));
    if announced > MAX_CIPHERTEXT {
        return Err(RecordTooLong { announced });
    }
    Ok(Some(RECORD_HEADER + announced))
}

/// Writes the header of a protected record with `length` bytes behind it.
#[inline]
pub(crate) fn write_header(header: &mut [u8; RECORD_HEADER], length: u16) {
    let [high, low] = length.to_be_bytes();
    // The version is frozen at TLS 1.2's for the sake of middleboxes.
    *header = [APPLICATION_DATA, 3, 3, high, low];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_needs_the_whole_header() {
        assert_eq!(record_len(&[]), Ok(None));
        assert_eq!(record_len(&[23, 3, 3, 0x41]), Ok(None));
        assert_eq!(record_len(&[23, 3, 3, 0, 0]), Ok(Some(5)));
    }

    #[test]
    fn length_is_bounded() {
        assert_eq!(record_len(&[23, 3, 3, 0x41, 0x00]), Ok(Some(5 + 16_640)));
        assert_eq!(
            record_len(&[23, 3, 3, 0x41, 0x01]),
            Err(RecordTooLong { announced: 16_641 })
        );
    }
}
