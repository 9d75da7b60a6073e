//! The Huffman code of RFC 7541 appendix B. The code is canonical (codes of one length are
//! consecutive, in symbol order), so the table of code lengths is all that is needed.

use super::HpackError;

/// Decodes `input` and appends it to `out`. Output is at most 8/5 of the input.
pub(super) fn decode(input: &[u8], out: &mut Vec<u8>) -> Result<(), HpackError> {
    let mut bytes = input.iter();
    let mut bits: u64 = 0;
    let mut bit_count: u32 = 0;
    loop {
        while bit_count <= 32 {
            let Some(&byte) = bytes.next() else { break };
            bits = bits << 8 | u64::from(byte);
            bit_count += 8;
        }
        if bit_count == 0 {
            return Ok(());
        }
        let window = window(bits, bit_count);
        let row = &ROWS[ROWS
            .iter()
            .position(|row| window < row.limit)
            .unwrap_or(ROWS.len() - 1)];
        if row.length > bit_count {
            // Only padding may be left: fewer than 8 bits, all ones (RFC 7541 5.2).
            let padding = (1u64 << bit_count) - 1;
            let valid = bit_count < 8 && bits & padding == padding;
            return if valid {
                Ok(())
            } else {
                Err(HpackError::Huffman)
            };
        }
        let code = (window >> (32 - row.length)) as usize - row.first_code;
        // EOS is the only symbol that is not a byte.
        let symbol = u8::try_from(SYMBOLS[row.first_symbol + code]);
        out.push(symbol.map_err(|_| HpackError::Huffman)?);
        bit_count -= row.length;
    }
}

/// The next 32 bits, filled up with ones behind the end of the input.
fn window(bits: u64, bit_count: u32) -> u64 {
    let mask = u64::from(u32::MAX);
    if bit_count >= 32 {
        bits >> (bit_count - 32) & mask
    } else {
        let missing = 32 - bit_count;
        (bits << missing | ((1 << missing) - 1)) & mask
    }
}

/// All codes of one length.
#[derive(Clone, Copy, Debug)]
struct Row {
    /// First value of a 32-bit window that belongs to a longer code.
    limit: u64,
    length: u32,
    first_code: usize,
    /// Index of the symbol of `first_code` in `SYMBOLS`.
    first_symbol: usize,
}

const SYMBOL_COUNT: usize = 257;
const LENGTH_MAX: usize = 30;

/// Symbols ordered by (code length, symbol); 256 is EOS.
const SYMBOLS: [u16; SYMBOL_COUNT] = symbols();

/// One row for each length in use, shortest first.
const ROWS: [Row; 21] = rows();

const fn symbols() -> [u16; SYMBOL_COUNT] {
    let mut sorted = [0; SYMBOL_COUNT];
    let mut next = 0;
    let mut length = 1;
    while length <= LENGTH_MAX {
        let mut symbol = 0;
        while symbol < SYMBOL_COUNT {
            if LENGTHS[symbol] as usize == length {
                sorted[next] = symbol as u16;
                next += 1;
            }
            symbol += 1;
        }
        length += 1;
    }
    sorted
}

const fn rows() -> [Row; 21] {
    let mut rows = [Row {
        limit: 0,
        length: 0,
        first_code: 0,
        first_symbol: 0,
    }; 21];
    let (mut row, mut code, mut first_symbol, mut length) = (0, 0usize, 0, 1);
    while length <= LENGTH_MAX {
        code <<= 1;
        let mut count = 0;
        let mut symbol = 0;
        while symbol < SYMBOL_COUNT {
            if LENGTHS[symbol] as usize == length {
                count += 1;
            }
            symbol += 1;
        }
        if count > 0 {
            let limit = ((code + count) as u64) << (32 - length);
            rows[row] = Row {
                limit,
                length: length as u32,
                first_code: code,
                first_symbol,
            };
            row += 1;
            code += count;
            first_symbol += count;
        }
        length += 1;
    }
    rows
}

/// Bits of the code of each byte, then of EOS.
#[rustfmt::skip]
const LENGTHS: [u8; SYMBOL_COUNT] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28,
    28, 28, 28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7,
    7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21,
    23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24,
    21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn code_of(symbol: u16) -> (u64, u32) {
        let at = SYMBOLS.iter().position(|&s| s == symbol).unwrap();
        let row = ROWS
            .iter()
            .rev()
            .find(|row| row.first_symbol <= at)
            .unwrap();
        ((row.first_code + at - row.first_symbol) as u64, row.length)
    }

    fn encode(text: &[u8]) -> Vec<u8> {
        let mut bits = String::new();
        for &byte in text {
            let (code, length) = code_of(u16::from(byte));
            bits.push_str(&format!("{code:0width$b}", width = length as usize));
        }
        while !bits.len().is_multiple_of(8) {
            bits.push('1');
        }
        bits.as_bytes()
            .chunks(8)
            .map(|c| u8::from_str_radix(std::str::from_utf8(c).unwrap(), 2).unwrap())
            .collect()
    }

    #[test]
    fn the_code_is_complete_and_has_the_values_of_the_appendix() {
        let kraft: u64 = LENGTHS.iter().map(|&l| 1u64 << (30 - l)).sum();
        assert_eq!(kraft, 1 << 30);
        assert_eq!(ROWS[20].limit, 1 << 32);
        let cases: [(u16, u64, u32); 8] = [
            (0, 0x1ff8, 13),
            (10, 0x3fff_fffc, 30),
            (48, 0, 5),
            (97, 0x3, 5),
            (92, 0x7fff0, 19),
            (255, 0x3ff_ffee, 26),
            (249, 0xfff_fffe, 28),
            (256, 0x3fff_ffff, 30),
        ];
        for (symbol, code, length) in cases {
            assert_eq!(code_of(symbol), (code, length), "symbol {symbol}");
        }
    }

    #[test]
    fn every_byte_decodes() {
        let all: Vec<u8> = (0..=255).chain((0..=255).rev()).collect();
        let mut out = Vec::new();
        decode(&encode(&all), &mut out).unwrap();
        assert_eq!(out, all);
    }

    #[test]
    fn eos_and_bad_padding_are_errors() {
        let cases: [&[u8]; 5] = [
            &[0xff, 0xff, 0xff, 0xff], // EOS
            &[0x1f, 0xff],             // 'a' and more than 7 bits of padding
            &[0x18],                   // 'a' and padding of zeros
            &[0xff],                   // 8 bits of padding
            &[0xff, 0xff, 0xff],       // a truncated long code
        ];
        for case in cases {
            assert_eq!(
                decode(case, &mut Vec::new()),
                Err(HpackError::Huffman),
                "{case:02x?}"
            );
        }
        let mut out = Vec::new();
        decode(&[0x1f], &mut out).unwrap();
        assert_eq!(out, b"a");
    }
}
