//! One direction of record protection: AES-GCM in place (RFC 8446, 5.2 and 5.3).

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;
use zeroize::Zeroizing;

use super::{MAX_PLAINTEXT, RECORD_HEADER, RECORD_TRAILER, TAG, write_header};

/// Why a traffic key could not be used. None of these carries secrets.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum ProtectionError {
    /// The negotiated suite is not one of AES-GCM; settings offer no other.
    #[error("the negotiated cipher suite is not AES-GCM")]
    UnsupportedSuite,
    /// The secrets have the wrong length for their algorithm.
    #[error("the traffic key is malformed")]
    MalformedKey,
    /// Authentication failed, or the record is too short to hold a tag.
    #[error("authentication failed")]
    BadRecord,
    /// The buffer is too short for header and trailer or holds too much plaintext.
    #[error("buffer of {0} bytes does not fit one record")]
    BadLength(usize),
    /// 2^64 - 1 records: the sequence number would wrap.
    #[error("sequence numbers are exhausted")]
    Exhausted,
}

/// A traffic key with its nonce base and sequence number, for one direction.
///
/// The key lives in the AEAD context, which AWS-LC clears when it is freed; the nonce base is
/// cleared here.
pub(crate) struct TrafficKey {
    key: LessSafeKey,
    iv: Zeroizing<[u8; NONCE_LEN]>,
    /// Sequence number of the next record.
    sequence: u64,
}

impl TrafficKey {
    /// Takes over `secrets` at `sequence`; the secrets are cleared when this returns.
    pub(crate) fn new(
        secrets: ConnectionTrafficSecrets,
        sequence: u64,
    ) -> Result<Self, ProtectionError> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            _ => return Err(ProtectionError::UnsupportedSuite),
        };
        let key =
            UnboundKey::new(algorithm, key.as_ref()).map_err(|_| ProtectionError::MalformedKey)?;
        let mut nonce_base = Zeroizing::new([0; NONCE_LEN]);
        if iv.as_ref().len() != NONCE_LEN {
            return Err(ProtectionError::MalformedKey);
        }
        nonce_base.copy_from_slice(iv.as_ref());
        Ok(Self {
            key: LessSafeKey::new(key),
            iv: nonce_base,
            sequence,
        })
    }

    /// Sequence number of the next record, which is how many were protected with this key.
    pub(crate) const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Pretends that `sequence` records have been protected.
    #[cfg(test)]
    pub(crate) const fn set_sequence(&mut self, sequence: u64) {
        self.sequence = sequence;
    }

    /// Makes `record` (header room, plaintext, trailer room) a complete protected record.
    #[inline]
    pub(crate) fn seal(
        &mut self,
        content_type: u8,
        record: &mut [u8],
    ) -> Result<(), ProtectionError> {
        if record.len() > RECORD_HEADER + MAX_PLAINTEXT + RECORD_TRAILER {
            return Err(ProtectionError::BadLength(record.len()));
        }
        self.seal_any_length(content_type, record)
    }

    /// As [`seal`](Self::seal), without its limit: tests build what peers must refuse.
    #[inline]
    pub(crate) fn seal_any_length(
        &mut self,
        content_type: u8,
        record: &mut [u8],
    ) -> Result<(), ProtectionError> {
        let total = record.len();
        let bad_length = ProtectionError::BadLength(total);
        let plaintext = total
            .checked_sub(RECORD_HEADER + RECORD_TRAILER)
            .ok_or(bad_length)?;
        let protected = u16::try_from(total - RECORD_HEADER).map_err(|_| bad_length)?;
        let (header, body) = record
            .split_first_chunk_mut::<RECORD_HEADER>()
            .ok_or(bad_length)?;
        let (inner, tag_room) = body.split_at_mut(plaintext + 1);
        write_header(header, protected);
        inner[plaintext] = content_type;
        let nonce = self.next_nonce()?;
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(&*header), inner)
            .map_err(|_| bad_length)?;
        tag_room.copy_from_slice(tag.as_ref());
        Ok(())
    }

    /// Authenticates and decrypts a complete record in place.
    ///
    /// Returns the length of the inner plaintext (content, type, padding), which then starts
    /// right behind the header.
    #[inline]
    pub(crate) fn open(&mut self, record: &mut [u8]) -> Result<usize, ProtectionError> {
        let (header, body) = record
            .split_first_chunk_mut::<RECORD_HEADER>()
            .ok_or(ProtectionError::BadRecord)?;
        if body.len() < TAG {
            return Err(ProtectionError::BadRecord);
        }
        let nonce = self.next_nonce()?;
        let inner = self
            .key
            .open_in_place(nonce, Aad::from(&*header), body)
            .map_err(|_| ProtectionError::BadRecord)?;
        Ok(inner.len())
    }

    /// The nonce of the next record; advances the sequence number, so that no nonce is given
    /// out twice even when the operation it was for fails.
    #[inline]
    fn next_nonce(&mut self) -> Result<Nonce, ProtectionError> {
        let next = self
            .sequence
            .checked_add(1)
            .ok_or(ProtectionError::Exhausted)?;
        let mut nonce = *self.iv;
        for (byte, sequence) in nonce[NONCE_LEN - 8..]
            .iter_mut()
            .zip(self.sequence.to_be_bytes())
        {
            *byte ^= sequence;
        }
        self.sequence = next;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

#[cfg(test)]
mod tests;
