//! Vectors of RFC 7541 appendix C and hostile blocks.

use super::*;

type Fields = Vec<(String, String)>;

fn bytes(hex: &str) -> Vec<u8> {
    let digits: String = hex.chars().filter(char::is_ascii_hexdigit).collect();
    (0..digits.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap())
        .collect()
}

fn decode(decoder: &mut Decoder, block: &[u8]) -> Result<Fields, HpackError> {
    let mut fields = Vec::new();
    decoder.decode(block, &mut |name, value| {
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        fields.push((text(name), text(value)));
    })?;
    Ok(fields)
}

fn check(decoder: &mut Decoder, hex: &str, expected: &[(&str, &str)], table_size: usize) {
    let fields = decode(decoder, &bytes(hex)).unwrap();
    let found: Vec<_> = fields.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    assert_eq!(found, expected, "{hex}");
    assert_eq!(decoder.table_size(), table_size, "table after {hex}");
}

#[test]
fn c2_single_representations() {
    check(
        &mut Decoder::new(4096),
        "400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572",
        &[("custom-key", "custom-header")],
        55,
    );
    check(
        &mut Decoder::new(4096),
        "040c 2f73 616d 706c 652f 7061 7468",
        &[(":path", "/sample/path")],
        0,
    );
    check(
        &mut Decoder::new(4096),
        "1008 7061 7373 776f 7264 0673 6563 7265 74",
        &[("password", "secret")],
        0,
    );
    check(&mut Decoder::new(4096), "82", &[(":method", "GET")], 0);
}

const REQUESTS: [(&[(&str, &str)], usize); 3] = [
    (
        &[
            (":method", "GET"),
            (":scheme", "http"),
            (":path", "/"),
            (":authority", "www.example.com"),
        ],
        57,
    ),
    (
        &[
            (":method", "GET"),
            (":scheme", "http"),
            (":path", "/"),
            (":authority", "www.example.com"),
            ("cache-control", "no-cache"),
        ],
        110,
    ),
    (
        &[
            (":method", "GET"),
            (":scheme", "https"),
            (":path", "/index.html"),
            (":authority", "www.example.com"),
            ("custom-key", "custom-value"),
        ],
        164,
    ),
];

#[test]
fn c3_requests_without_huffman() {
    let blocks = [
        "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
        "8286 84be 5808 6e6f 2d63 6163 6865",
        "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
    ];
    let mut decoder = Decoder::new(4096);
    for (block, (fields, size)) in blocks.iter().zip(REQUESTS) {
        check(&mut decoder, block, fields, size);
    }
}

#[test]
fn c4_requests_with_huffman() {
    let blocks = [
        "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
        "8286 84be 5886 a8eb 1064 9cbf",
        "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
    ];
    let mut decoder = Decoder::new(4096);
    for (block, (fields, size)) in blocks.iter().zip(REQUESTS) {
        check(&mut decoder, block, fields, size);
    }
}

const DATE_21: (&str, &str) = ("date", "Mon, 21 Oct 2013 20:13:21 GMT");
const LOCATION: (&str, &str) = ("location", "https://www.example.com");
const PRIVATE: (&str, &str) = ("cache-control", "private");
const COOKIE: (&str, &str) = (
    "set-cookie",
    "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
);

const RESPONSES: [(&[(&str, &str)], usize); 3] = [
    (&[(":status", "302"), PRIVATE, DATE_21, LOCATION], 222),
    (&[(":status", "307"), PRIVATE, DATE_21, LOCATION], 222),
    (
        &[
            (":status", "200"),
            PRIVATE,
            ("date", "Mon, 21 Oct 2013 20:13:22 GMT"),
            LOCATION,
            ("content-encoding", "gzip"),
            COOKIE,
        ],
        215,
    ),
];

#[test]
fn c5_responses_without_huffman_evict() {
    let blocks = [
        "4803 3330 3258 0770 7269 7661 7465 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 \
         2032 303a 3133 3a32 3120 474d 546e 1768 7474 7073 3a2f 2f77 7777 2e65 7861 6d70 \
         6c65 2e63 6f6d",
        "4803 3330 37c1 c0bf",
        "88c1 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3220 474d \
         54c0 5a04 677a 6970 7738 666f 6f3d 4153 444a 4b48 514b 425a 584f 5157 454f 5049 \
         5541 5851 5745 4f49 553b 206d 6178 2d61 6765 3d33 3630 303b 2076 6572 7369 6f6e \
         3d31",
    ];
    responses(&blocks);
}

#[test]
fn c6_responses_with_huffman_evict() {
    let blocks = [
        "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 \
         2d1b ff6e 919d 29ad 1718 63c7 8f0b 97c8 e9ae 82ae 43d3",
        "4883 640e ffc1 c0bf",
        "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab \
         77ad 94e7 821d d7f2 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f \
         9587 3160 65c0 03ed 4ee5 b106 3d50 07",
    ];
    responses(&blocks);
}

fn responses(blocks: &[&str; 3]) {
    let mut decoder = Decoder::new(4096);
    decode(&mut decoder, &bytes("3fe1 01")).unwrap(); // size update to 256
    for (block, (fields, size)) in blocks.iter().zip(RESPONSES) {
        check(&mut decoder, block, fields, size);
    }
}

#[test]
fn corrupt_blocks_are_refused() {
    let cases: [(&str, HpackError); 11] = [
        ("80", HpackError::Index { index: 0, last: 61 }),
        (
            "be",
            HpackError::Index {
                index: 62,
                last: 61,
            },
        ),
        (
            "7f 00",
            HpackError::Index {
                index: 63,
                last: 61,
            },
        ),
        ("ff ff ff ff ff ff", HpackError::IntegerOverflow),
        ("ff ff ff ff 7f", HpackError::IntegerOverflow),
        ("ff", HpackError::Truncated),
        ("40 05 61 62", HpackError::Truncated),
        ("40 01 61", HpackError::Truncated),
        ("00 81 18 00", HpackError::Huffman),
        ("82 20", HpackError::TableSize { size: 0, max: 4096 }),
        (
            "3f e2 1f",
            HpackError::TableSize {
                size: 4097,
                max: 4096,
            },
        ),
    ];
    for (hex, error) in cases {
        let found = decode(&mut Decoder::new(4096), &bytes(hex));
        assert_eq!(found, Err(error), "{hex}");
    }
}

#[test]
fn a_reduced_table_requires_an_update_after_the_acknowledgement() {
    let mut decoder = Decoder::new(0);
    assert!(
        decode(&mut decoder, &bytes("4001 6101 62")).is_ok(),
        "not acknowledged yet"
    );
    assert_eq!(decoder.table_size(), 34);
    decoder.acknowledged(0);
    let missing = HpackError::TableSize { size: 4096, max: 0 };
    assert_eq!(decode(&mut decoder, &bytes("82")), Err(missing));
    assert!(decode(&mut decoder, &bytes("20 82")).is_ok());
    assert_eq!(decoder.table_size(), 0);
}

#[test]
fn a_bomb_of_references_uses_no_memory() {
    let mut decoder = Decoder::new(4096);
    let mut block = vec![0x40, 1, b'a', 0x7f, 0xd1, 0x1e]; // value of 4048 bytes
    block.extend(vec![b'v'; 127 + 0x51 + (0x1e << 7)]);
    block.extend(vec![0xbe; 60_000]);
    let mut total = 0;
    decoder
        .decode(&block, &mut |name, value| total += name.len() + value.len())
        .unwrap();
    assert!(total > 200_000_000);
    assert!(decoder.table_size() <= 4096);
    assert!(decoder.scratch.value.capacity() <= SCRATCH_KEPT);
}
