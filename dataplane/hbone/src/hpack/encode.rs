//! Encoder of header blocks: static table and literals without indexing, no Huffman code. It has
//! no state, so a block costs no bookkeeping and can be dropped without losing synchronisation.

/// Tells the peer that we use no dynamic table. Required once after the peer changed
/// SETTINGS_HEADER_TABLE_SIZE (RFC 7541 4.2), harmless otherwise.
pub(crate) fn table_size_update(out: &mut Vec<u8>) {
    out.push(0x20);
}

/// `:status`.
pub(crate) fn status(out: &mut Vec<u8>, code: u16) {
    let index = match code {
        200 => 8,
        204 => 9,
        206 => 10,
        304 => 11,
        400 => 12,
        404 => 13,
        500 => 14,
        _ => {
            integer(out, 0x00, 4, STATUS_INDEX);
            text(out, code.to_string().as_bytes());
            return;
        }
    };
    integer(out, 0x80, 7, index);
}

/// Literal field without indexing; the names that every request has by static index.
pub(crate) fn literal(out: &mut Vec<u8>, name: &str, value: &str) {
    match name {
        ":authority" => out.push(AUTHORITY_INDEX),
        ":method" => out.push(METHOD_INDEX),
        _ => {
            out.push(0x00);
            text(out, name.as_bytes());
        }
    }
    text(out, value.as_bytes());
}

/// String without Huffman code.
fn text(out: &mut Vec<u8>, bytes: &[u8]) {
    integer(out, 0x00, 7, bytes.len());
    out.extend_from_slice(bytes);
}

/// Integer with a prefix of `bits` bits below the flags in `first` (RFC 7541 5.1).
fn integer(out: &mut Vec<u8>, first: u8, bits: u32, value: usize) {
    let prefix = (1usize << bits) - 1;
    if value < prefix {
        out.push(first | value as u8);
        return;
    }
    out.push(first | prefix as u8);
    let mut rest = value - prefix;
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

/// Indices of static entries with these names.
const AUTHORITY_INDEX: u8 = 1;
const METHOD_INDEX: u8 = 2;
const STATUS_INDEX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hpack::Decoder;

    #[test]
    fn integers_of_the_rfc() {
        let cases: [(u32, usize, &[u8]); 4] = [
            (5, 10, &[0x0a]),
            (5, 31, &[0x1f, 0]),
            (5, 1337, &[0x1f, 0x9a, 0x0a]),
            (8, 42, &[42]),
        ];
        for (bits, value, expected) in cases {
            let mut out = Vec::new();
            integer(&mut out, 0, bits, value);
            assert_eq!(out, expected, "{value} with {bits} bits");
        }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let long = "x".repeat(5000);
        let fields = [
            (":authority", "10.0.0.1:80"),
            ("baggage", &long),
            ("forwarded", ""),
        ];
        let mut block = Vec::new();
        table_size_update(&mut block);
        for code in [200, 204, 206, 304, 400, 401, 404, 500, 503] {
            status(&mut block, code);
        }
        for (name, value) in fields {
            literal(&mut block, name, value);
        }
        let mut seen = Vec::new();
        Decoder::new(0)
            .decode(&block, &mut |name, value| {
                let text = |b: &[u8]| String::from_utf8(b.to_vec()).unwrap();
                seen.push((text(name), text(value)));
            })
            .unwrap();
        let statuses: Vec<_> = seen.drain(..9).map(|(_, value)| value).collect();
        assert_eq!(
            statuses,
            [
                "200", "204", "206", "304", "400", "401", "404", "500", "503"
            ]
        );
        for ((name, value), expected) in seen.iter().zip(fields) {
            assert_eq!((&name[..], &value[..]), expected);
        }
        assert_eq!(seen.len(), fields.len());
    }
}
