//! HTTP/2 frames and header blocks as an attacker writes them: whatever is asked for, valid or not.
//! Independent of the product's own codec on purpose.

/// Frame types (RFC 9113 section 6).
pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const PRIORITY: u8 = 2;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PUSH_PROMISE: u8 = 5;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;

/// Flags.
pub(super) const ACK: u8 = 1;
pub(super) const END_STREAM: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;
pub(super) const PADDED: u8 = 8;

/// Error codes.
pub(super) const CANCEL: u32 = 8;

pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame whose length is that of its payload.
pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    // Nothing here is longer than 24 bits can say.
    let length = u32::try_from(payload.len())
        .unwrap_or(u32::MAX)
        .to_be_bytes();
    let mut out = vec![length[1], length[2], length[3], kind, flags];
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// SETTINGS with these values.
pub(super) fn settings(values: &[(u16, u32)]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(values.len() * 6);
    for (id, value) in values {
        payload.extend(id.to_be_bytes());
        payload.extend(value.to_be_bytes());
    }
    frame(SETTINGS, 0, 0, &payload)
}

/// What an honest client begins with. Without a header table, so that answers need no state to be
/// read.
pub(super) fn hello() -> Vec<u8> {
    [PREFACE, &settings(&[(1, 0), (2, 0), (4, 4 << 20)])].concat()
}

pub(super) fn window_update(stream: u32, increment: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &increment.to_be_bytes())
}

pub(super) fn reset(stream: u32, code: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &code.to_be_bytes())
}

pub(super) fn data(stream: u32, payload: &[u8]) -> Vec<u8> {
    frame(DATA, 0, stream, payload)
}

pub(super) fn ping() -> Vec<u8> {
    frame(PING, 0, 0, b"attacker")
}

/// HEADERS that open `stream` to `authority` by CONNECT.
pub(super) fn connect(stream: u32, authority: &str) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &connect_block(authority))
}

pub(super) fn connect_block(authority: &str) -> Vec<u8> {
    block(&[(":method", "CONNECT"), (":authority", authority)])
}

/// A header block of literals without indexing.
pub(super) fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in fields {
        out.push(0);
        string(&mut out, name.as_bytes());
        string(&mut out, value.as_bytes());
    }
    out
}

/// HEADERS with these fields on `stream`.
pub(super) fn headers(stream: u32, flags: u8, fields: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | flags, stream, &block(fields))
}

fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    if bytes.len() < 127 {
        out.push(bytes.len() as u8);
    } else {
        out.push(127);
        let mut rest = bytes.len() - 127;
        while rest >= 128 {
            out.push((rest & 127) as u8 | 128);
            rest >>= 7;
        }
        out.push(rest as u8);
    }
    out.extend(bytes);
}

/// The `:status` that an answer's block begins with: indexed, or a literal of three digits, plain.
/// Entries of the dynamic table cannot be there ([`hello`]).
pub(super) fn status(block: &[u8]) -> Option<u16> {
    // A size update may come first.
    let block = match block {
        [first, rest @ ..] if first & 0xe0 == 0x20 => rest,
        other => other,
    };
    match block {
        [first, ..] if (0x88..=0x8e).contains(first) => {
            Some([200, 204, 206, 304, 400, 404, 500][usize::from(first - 0x88)])
        }
        [0x08 | 0x18 | 0x48, 3, digits @ ..] => {
            std::str::from_utf8(digits.get(..3)?).ok()?.parse().ok()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_blocks_have_the_layout_of_the_standards() {
        assert_eq!(ping()[..9], [0, 0, 8, 6, 0, 0, 0, 0, 0]);
        assert_eq!(reset(3, 8), [0, 0, 4, 3, 0, 0, 0, 0, 3, 0, 0, 0, 8]);
        assert_eq!(settings(&[(4, 1)])[9..], [0, 4, 0, 0, 0, 1]);
        assert_eq!(block(&[("a", "bc")]), [0, 1, b'a', 2, b'b', b'c']);
        let long = "x".repeat(300);
        assert_eq!(block(&[("a", &long)])[3..6], [127, 0x80 | 45, 1]);
    }

    #[test]
    fn statuses_are_read_in_every_form_that_is_sent() {
        for (block, expected) in [
            (&[0x88][..], Some(200)),
            (&[0x20, 0x8c], Some(400)),
            (&[0x08, 3, b'4', b'0', b'1', 0x88], Some(401)),
            (&[0x48, 3, b'5', b'0', b'3'], Some(503)),
            (&[0x08, 3, b'4'], None),
            (&[], None),
        ] {
            assert_eq!(status(block), expected, "{block:?}");
        }
    }
}
