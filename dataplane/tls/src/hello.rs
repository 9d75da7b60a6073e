//! Whether a ClientHello has arrived in full, before anything is spent on it.
//!
//! The first handshake message may be spread over several records (RFC 8446, 5.1), and each of
//! those over several reads. Only lengths are looked at here. Whatever cannot be the beginning of
//! a ClientHello any more counts as arrived: the handshake refuses it in its first step, and says
//! why.

use crate::handshake::MAX_HANDSHAKE;
use crate::record::{HANDSHAKE, MAX_PLAINTEXT, RECORD_HEADER};

/// `client_hello` (RFC 8446, 4).
const CLIENT_HELLO: u8 = 1;
/// Type and length in front of a handshake message.
const MESSAGE_HEADER: usize = 4;

/// Follows the first bytes of a connection.
#[derive(Debug, Default)]
pub struct ClientHelloWatch {
    record_header: Vec<u8>,
    /// Bytes that are left of the record.
    record_left: usize,
    message_header: Vec<u8>,
    /// Bytes that are left of the message, once its header is known.
    message_left: usize,
    received: usize,
}

impl ClientHelloWatch {
    /// Takes the next bytes. True once a whole ClientHello has arrived, or what is none.
    pub fn advance(&mut self, mut bytes: &[u8]) -> bool {
        self.received += bytes.len();
        if self.received > MAX_HANDSHAKE {
            return true;
        }
        while let [first, rest @ ..] = bytes {
            if self.record_left == 0 {
                bytes = rest;
                self.record_header.push(*first);
                if self.header_byte() {
                    return true;
                }
            } else if self.message_header.len() < MESSAGE_HEADER {
                bytes = rest;
                self.record_left -= 1;
                self.message_header.push(*first);
                if self.message_byte() {
                    return true;
                }
            } else {
                let n = self.record_left.min(self.message_left).min(bytes.len());
                bytes = &bytes[n..];
                self.record_left -= n;
                self.message_left -= n;
                if self.message_left == 0 {
                    return true;
                }
            }
        }
        false
    }

    /// After a byte of a record's header. True if no ClientHello can follow.
    fn header_byte(&mut self) -> bool {
        let header = &self.record_header;
        if header[0] != HANDSHAKE {
            return true;
        }
        if header.len() < RECORD_HEADER {
            return false;
        }
        self.record_left = usize::from(u16::from_be_bytes([header[3], header[4]]));
        self.record_header.clear();
        // Handshake records may not be empty.
        self.record_left == 0 || self.record_left > MAX_PLAINTEXT
    }

    /// After a byte of the message's header. True if it is complete, or no ClientHello.
    fn message_byte(&mut self) -> bool {
        let header = &self.message_header;
        if header[0] != CLIENT_HELLO {
            return true;
        }
        let [_, high, middle, low] = header[..] else {
            return false;
        };
        self.message_left = u32::from_be_bytes([0, high, middle, low]) as usize;
        self.message_left == 0 || self.message_left > MAX_HANDSHAKE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ClientHello of `len` bytes behind its header, in records of `piece` bytes.
    fn hello(len: usize, piece: usize) -> Vec<u8> {
        let mut message = vec![CLIENT_HELLO];
        message.extend_from_slice(&(len as u32).to_be_bytes()[1..]);
        message.extend((0..len).map(|i| i as u8));
        let record = |part: &[u8]| {
            let mut record = vec![HANDSHAKE, 3, 1];
            record.extend_from_slice(&(part.len() as u16).to_be_bytes());
            record.extend_from_slice(part);
            record
        };
        message.chunks(piece).flat_map(record).collect()
    }

    #[test]
    fn a_hello_is_whole_at_its_last_byte_however_it_is_cut() {
        for (len, piece) in [
            (250, 16_384),
            (250, 1),
            (250, 3),
            (250, 100),
            (20_000, 16_384),
        ] {
            let bytes = hello(len, piece);
            for step in [1, 2, 7, 600, bytes.len()] {
                let mut watch = ClientHelloWatch::default();
                let chunks: Vec<_> = bytes.chunks(step).collect();
                let (last, before) = chunks.split_last().unwrap();
                for chunk in before {
                    assert!(!watch.advance(chunk), "{len} {piece} {step}");
                }
                assert!(watch.advance(last), "{len} {piece} {step}");
            }
            let mut behind = bytes.clone();
            behind.push(0);
            assert!(ClientHelloWatch::default().advance(&behind));
        }
    }

    #[test]
    fn what_is_no_hello_is_not_waited_for() {
        let long = [HANDSHAKE, 3, 1, 0xff, 0xff];
        let empty = [HANDSHAKE, 3, 1, 0, 0];
        let other = [HANDSHAKE, 3, 1, 0, 4, 2];
        let endless = [HANDSHAKE, 3, 1, 0, 4, CLIENT_HELLO, 0xff, 0xff, 0xff];
        let nothing = [HANDSHAKE, 3, 1, 0, 4, CLIENT_HELLO, 0, 0, 0];
        let cases: [&[u8]; 7] = [b"G", &[21], &long, &empty, &other, &endless, &nothing];
        for bytes in cases {
            let (last, before) = bytes.split_last().unwrap();
            let mut watch = ClientHelloWatch::default();
            assert!(!watch.advance(before), "{bytes:?}");
            assert!(watch.advance(&[*last]), "{bytes:?}");
        }
        // One byte a record, and never an end.
        let mut watch = ClientHelloWatch::default();
        let mut drops = 0;
        let start = hello(100_000, 1);
        while !watch.advance(&start[drops..=drops]) {
            drops += 1;
        }
        assert!(drops <= MAX_HANDSHAKE, "{drops}");
    }
}
