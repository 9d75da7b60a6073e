//! Handshake messages behind the handshake: KeyUpdate and NewSessionTicket (RFC 8446, 4.6).
//!
//! Tickets are skipped unread, since nothing is ever resumed; so a message needs no buffer, no
//! matter how it is spread over records. Renegotiation and post-handshake authentication do not
//! exist here: their messages are errors.

use rustls::AlertDescription;

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
/// Type and length in front of each message.
const MESSAGE_HEADER: usize = 4;
/// Longest ticket message put up with.
const MAX_TICKET: u32 = 1 << 16;

/// Why a handshake message is not acceptable.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum MessageError {
    /// A message that may not come after the handshake, or not from this side.
    #[error("handshake message of type {0} after the handshake")]
    Unexpected(u8),
    /// A handshake record without content.
    #[error("empty handshake record")]
    Empty,
    /// A message with an impossible length.
    #[error("handshake message of type {message_type} announces {length} bytes")]
    BadLength {
        /// Type of the message.
        message_type: u8,
        /// Announced length.
        length: u32,
    },
    /// Neither 0 nor 1.
    #[error("key update with request {0}, expected 0 or 1")]
    BadRequest(u8),
    /// Bytes behind a KeyUpdate are protected with which key?
    #[error("more handshake data behind a key update in the same record")]
    BehindKeyUpdate,
}

impl MessageError {
    pub(super) const fn alert(&self) -> AlertDescription {
        match self {
            Self::Unexpected(_) | Self::Empty | Self::BehindKeyUpdate => {
                AlertDescription::UnexpectedMessage
            }
            Self::BadLength { .. } => AlertDescription::DecodeError,
            Self::BadRequest(_) => AlertDescription::IllegalParameter,
        }
    }
}

/// The peer's KeyUpdate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct KeyUpdate {
    /// Whether the peer wants us to update our key as well.
    pub(super) answer_requested: bool,
}

/// Follows the peer's messages across records.
#[derive(Debug)]
pub(super) struct MessageReader {
    tickets_allowed: bool,
    header: [u8; MESSAGE_HEADER],
    /// Bytes of the header received; all of them while in the body.
    header_received: usize,
    /// Bytes of the body still to come.
    body_left: u32,
}

impl MessageReader {
    /// `tickets_allowed`: we are the client.
    pub(super) const fn new(tickets_allowed: bool) -> Self {
        Self {
            tickets_allowed,
            header: [0; MESSAGE_HEADER],
            header_received: 0,
            body_left: 0,
        }
    }

    /// Whether no message is incomplete.
    #[inline]
    pub(super) const fn is_aligned(&self) -> bool {
        self.header_received == 0
    }

    /// Takes the content of one handshake record.
    pub(super) fn read(&mut self, mut content: &[u8]) -> Result<Option<KeyUpdate>, MessageError> {
        if content.is_empty() {
            return Err(MessageError::Empty);
        }
        while let Some((first, rest)) = content.split_first() {
            if self.header_received < MESSAGE_HEADER {
                self.header[self.header_received] = *first;
                self.header_received += 1;
                content = rest;
                if self.header_received == MESSAGE_HEADER {
                    self.body_left = self.body_length()?;
                }
            } else if self.header[0] == KEY_UPDATE {
                return self.key_update(*first, rest).map(Some);
            } else {
                let skipped = content.len().min(self.body_left as usize);
                content = &content[skipped..];
                self.body_left -= u32::try_from(skipped).unwrap_or(self.body_left);
                if self.body_left == 0 {
                    self.header_received = 0;
                }
            }
        }
        Ok(None)
    }

    /// The length of the message whose header is complete, if it is one we take.
    fn body_length(&self) -> Result<u32, MessageError> {
        let [message_type, high, middle, low] = self.header;
        let length = u32::from_be_bytes([0, high, middle, low]);
        let acceptable = match message_type {
            KEY_UPDATE => length == 1,
            NEW_SESSION_TICKET if self.tickets_allowed => (1..=MAX_TICKET).contains(&length),
            other => return Err(MessageError::Unexpected(other)),
        };
        if !acceptable {
            return Err(MessageError::BadLength {
                message_type,
                length,
            });
        }
        Ok(length)
    }

    fn key_update(&mut self, request: u8, rest: &[u8]) -> Result<KeyUpdate, MessageError> {
        if request > 1 {
            return Err(MessageError::BadRequest(request));
        }
        if !rest.is_empty() {
            return Err(MessageError::BehindKeyUpdate);
        }
        self.header_received = 0;
        self.body_left = 0;
        Ok(KeyUpdate {
            answer_requested: request == 1,
        })
    }
}

/// A KeyUpdate message of ours.
pub(super) fn key_update(request_answer: bool) -> [u8; 5] {
    [KEY_UPDATE, 0, 0, 1, u8::from(request_answer)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(length: u16) -> Vec<u8> {
        let [high, low] = length.to_be_bytes();
        let mut message = vec![NEW_SESSION_TICKET, 0, high, low];
        message.resize(MESSAGE_HEADER + usize::from(length), 7);
        message
    }

    #[test]
    fn tickets_are_skipped_however_they_are_cut() {
        let mut messages = ticket(100);
        messages.extend(ticket(1));
        messages.extend(key_update(true));
        for cut in 1..messages.len() {
            let mut reader = MessageReader::new(true);
            let (front, back) = messages.split_at(cut);
            assert_eq!(reader.read(front), Ok(None));
            let answer_requested = true;
            let update = KeyUpdate { answer_requested };
            assert_eq!(reader.read(back), Ok(Some(update)), "cut at {cut}");
            assert!(reader.is_aligned());
        }
    }

    #[test]
    fn servers_get_no_tickets() {
        let mut reader = MessageReader::new(false);
        let unexpected = MessageError::Unexpected(NEW_SESSION_TICKET);
        assert_eq!(reader.read(&ticket(9)), Err(unexpected));
    }

    #[test]
    fn malformed_messages() {
        let read = |bytes: &[u8]| MessageReader::new(true).read(bytes);
        assert_eq!(read(&[]), Err(MessageError::Empty));
        assert_eq!(read(&[24, 0, 0, 1, 2]), Err(MessageError::BadRequest(2)));
        assert_eq!(
            read(&[24, 0, 0, 1, 0, 4]),
            Err(MessageError::BehindKeyUpdate)
        );
        assert_eq!(read(&[1, 0, 0, 1]), Err(MessageError::Unexpected(1)));
        for (message_type, length) in [(24, 0), (24, 2), (4, 0), (4, 0x01_0001)] {
            let [_, a, b, c] = u32::to_be_bytes(length);
            assert_eq!(
                read(&[message_type, a, b, c]),
                Err(MessageError::BadLength {
                    message_type,
                    length
                })
            );
        }
    }
}
