//! Frame layout of RFC 9113 sections 4 and 6: the header and the writers of control frames.

pub(crate) const HEADER_LEN: usize = 9;

/// What a client sends first (RFC 9113 3.4).
pub(crate) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Highest stream identifier and highest window.
pub(crate) const MAX_31: u32 = i32::MAX as u32;

/// Frame types.
pub(crate) mod kind {
    pub(crate) const DATA: u8 = 0;
    pub(crate) const HEADERS: u8 = 1;
    pub(crate) const PRIORITY: u8 = 2;
    pub(crate) const RST_STREAM: u8 = 3;
    pub(crate) const SETTINGS: u8 = 4;
    pub(crate) const PUSH_PROMISE: u8 = 5;
    pub(crate) const PING: u8 = 6;
    pub(crate) const GOAWAY: u8 = 7;
    pub(crate) const WINDOW_UPDATE: u8 = 8;
    pub(crate) const CONTINUATION: u8 = 9;
}

/// Frame flags.
pub(crate) mod flag {
    pub(crate) const END_STREAM: u8 = 0x1;
    pub(crate) const ACK: u8 = 0x1;
    pub(crate) const END_HEADERS: u8 = 0x4;
    pub(crate) const PADDED: u8 = 0x8;
    pub(crate) const PRIORITY: u8 = 0x20;
}

/// Identifiers in SETTINGS.
pub(crate) mod setting {
    pub(crate) const HEADER_TABLE_SIZE: u16 = 1;
    pub(crate) const ENABLE_PUSH: u16 = 2;
    pub(crate) const MAX_CONCURRENT_STREAMS: u16 = 3;
    pub(crate) const INITIAL_WINDOW_SIZE: u16 = 4;
    pub(crate) const MAX_FRAME_SIZE: u16 = 5;
    pub(crate) const MAX_HEADER_LIST_SIZE: u16 = 6;
}

/// The nine bytes in front of every frame, decoded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct FrameHeader {
    /// Payload length, 24 bits.
    pub(crate) length: u32,
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    /// 31 bits; the reserved bit is ignored on receipt.
    pub(crate) stream: u32,
}

impl FrameHeader {
    #[inline]
    pub(crate) fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = *bytes;
        Self {
            length: u32::from_be_bytes([0, l0, l1, l2]),
            kind,
            flags,
            stream: u32::from_be_bytes([s0, s1, s2, s3]) & MAX_31,
        }
    }

    #[inline]
    pub(crate) fn bytes(self) -> [u8; HEADER_LEN] {
        let [_, l0, l1, l2] = self.length.to_be_bytes();
        let [s0, s1, s2, s3] = self.stream.to_be_bytes();
        [l0, l1, l2, self.kind, self.flags, s0, s1, s2, s3]
    }

    #[inline]
    pub(crate) fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    pub(crate) fn name(self) -> &'static str {
        NAMES
            .get(usize::from(self.kind))
            .copied()
            .unwrap_or("unknown")
    }
}

pub(crate) fn write_header(out: &mut Vec<u8>, length: usize, kind: u8, flags: u8, stream: u32) {
    debug_assert!(length < 1 << 24, "frame length has 24 bits");
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    out.extend_from_slice(
        &FrameHeader {
            length,
            kind,
            flags,
            stream,
        }
        .bytes(),
    );
}

pub(crate) fn write_settings(out: &mut Vec<u8>, values: &[(u16, u32)]) {
    write_header(out, values.len() * 6, kind::SETTINGS, 0, 0);
    for (id, value) in values {
        out.extend_from_slice(&id.to_be_bytes());
        out.extend_from_slice(&value.to_be_bytes());
    }
}

pub(crate) fn write_settings_ack(out: &mut Vec<u8>) {
    write_header(out, 0, kind::SETTINGS, flag::ACK, 0);
}

pub(crate) fn write_window_update(out: &mut Vec<u8>, stream: u32, increment: u32) {
    debug_assert!((1..=MAX_31).contains(&increment));
    write_header(out, 4, kind::WINDOW_UPDATE, 0, stream);
    out.extend_from_slice(&increment.to_be_bytes());
}

pub(crate) fn write_ping(out: &mut Vec<u8>, ack: bool, payload: [u8; 8]) {
    write_header(out, 8, kind::PING, if ack { flag::ACK } else { 0 }, 0);
    out.extend_from_slice(&payload);
}

pub(crate) fn write_reset(out: &mut Vec<u8>, stream: u32, code: u32) {
    write_header(out, 4, kind::RST_STREAM, 0, stream);
    out.extend_from_slice(&code.to_be_bytes());
}

pub(crate) fn write_go_away(out: &mut Vec<u8>, last: u32, code: u32, debug: &[u8]) {
    write_header(out, 8 + debug.len(), kind::GOAWAY, 0, 0);
    out.extend_from_slice(&last.to_be_bytes());
    out.extend_from_slice(&code.to_be_bytes());
    out.extend_from_slice(debug);
}

/// Writes a header block as HEADERS and as many CONTINUATION frames as `frame_max` requires.
pub(crate) fn write_headers(
    out: &mut Vec<u8>,
    stream: u32,
    block: &[u8],
    end_stream: bool,
    frame_max: usize,
) {
    let mut rest = block;
    let mut frame_kind = kind::HEADERS;
    let mut flags = if end_stream { flag::END_STREAM } else { 0 };
    loop {
        let (fragment, tail) = rest.split_at(rest.len().min(frame_max));
        if tail.is_empty() {
            flags |= flag::END_HEADERS;
        }
        write_header(out, fragment.len(), frame_kind, flags, stream);
        out.extend_from_slice(fragment);
        if tail.is_empty() {
            return;
        }
        (rest, frame_kind, flags) = (tail, kind::CONTINUATION, 0);
    }
}

const NAMES: [&str; 10] = [
    "DATA",
    "HEADERS",
    "PRIORITY",
    "RST_STREAM",
    "SETTINGS",
    "PUSH_PROMISE",
    "PING",
    "GOAWAY",
    "WINDOW_UPDATE",
    "CONTINUATION",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_encoding_and_the_reserved_bit_is_dropped() {
        let header = FrameHeader {
            length: 0x01_02_03,
            kind: 9,
            flags: 0x2d,
            stream: 0x7abb_ccdd,
        };
        assert_eq!(header.bytes(), [1, 2, 3, 9, 0x2d, 0x7a, 0xbb, 0xcc, 0xdd]);
        assert_eq!(FrameHeader::parse(&header.bytes()), header);
        let reserved = FrameHeader::parse(&[0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(reserved.stream, MAX_31);
        assert_eq!(
            FrameHeader {
                kind: 200,
                ..header
            }
            .name(),
            "unknown"
        );
        assert_eq!(FrameHeader { kind: 8, ..header }.name(), "WINDOW_UPDATE");
    }

    #[test]
    fn control_frames_have_the_layout_of_the_rfc() {
        type Writer = fn(&mut Vec<u8>);
        let cases: [(Writer, &[u8]); 6] = [
            (write_settings_ack, &[0, 0, 0, 4, 1, 0, 0, 0, 0]),
            (
                |out| write_settings(out, &[(4, 65_536)]),
                &[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 1, 0, 0],
            ),
            (
                |out| write_window_update(out, 5, 7),
                &[0, 0, 4, 8, 0, 0, 0, 0, 5, 0, 0, 0, 7],
            ),
            (
                |out| write_ping(out, true, *b"abcdefgh"),
                b"\x00\x00\x08\x06\x01\x00\x00\x00\x00abcdefgh",
            ),
            (
                |out| write_reset(out, 3, 8),
                &[0, 0, 4, 3, 0, 0, 0, 0, 3, 0, 0, 0, 8],
            ),
            (
                |out| write_go_away(out, 9, 11, b"x"),
                b"\x00\x00\x09\x07\x00\x00\x00\x00\x00\x00\x00\x00\x09\x00\x00\x00\x0bx",
            ),
        ];
        for (write, expected) in cases {
            let mut out = Vec::new();
            write(&mut out);
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn long_header_blocks_are_continued() {
        let mut out = Vec::new();
        write_headers(&mut out, 1, &[7; 25], true, 10);
        let frames: Vec<_> = [0, 19, 38]
            .iter()
            .map(|&at| FrameHeader::parse(out[at..].first_chunk().unwrap()))
            .map(|h| (h.length, h.kind, h.flags))
            .collect();
        assert_eq!(frames, [(10, 1, 1), (10, 9, 0), (5, 9, 4)]);
        let mut exact = Vec::new();
        write_headers(&mut exact, 1, &[7; 10], false, 10);
        assert_eq!(
            exact.len(),
            19,
            "a block that fits exactly needs no CONTINUATION"
        );
    }
}
