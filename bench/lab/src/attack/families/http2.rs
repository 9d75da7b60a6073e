//! Prefaces, SETTINGS, sizes and order of frames, header compression: HTTP/2 as it must not be.

use super::Expect::{End, Ignore, Refuse};
use super::{Attack, Expect, Input};
use crate::attack::frames::{
    CANCEL, CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PADDED, PING, PREFACE,
    PRIORITY, PUSH_PROMISE, RST_STREAM, SETTINGS, WINDOW_UPDATE, connect, connect_block, data,
    frame, headers, ping, reset, settings, window_update,
};

pub(super) fn attacks() -> Vec<Attack> {
    let inputs = [prefaces(), single_frames(), sequences(), compression()];
    inputs.into_iter().flatten().map(Input::attack).collect()
}

fn prefaces() -> Vec<Input> {
    const FAMILY: &str = "preface";
    let of =
        |name, bytes: Vec<u8>| Input::new((name, FAMILY), End, move |_| bytes.clone()).ungreeted();
    let altered = PREFACE.to_ascii_lowercase();
    vec![
        of("http1-get", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n".to_vec()),
        of(
            "http1-connect",
            b"CONNECT 10.244.2.11:8080 HTTP/1.1\r\n\r\n".to_vec(),
        ),
        of("preface-altered", altered),
        of("preface-then-ping", [PREFACE, &ping()].concat()),
        of(
            "preface-then-headers",
            [PREFACE, &connect(1, "10.244.2.11:8080")].concat(),
        ),
        of(
            "preface-then-ack",
            [PREFACE, &frame(SETTINGS, 1, 0, &[])].concat(),
        ),
        of("garbage-in-tls", vec![0xa5; 64 << 10]),
        Input::new(("preface-twice", FAMILY), End, |_| PREFACE.to_vec()),
    ]
}

/// A frame on a fresh connection.
type Frame = (&'static str, u8, u8, u32, &'static [u8]);

const SINGLE: [Frame; 29] = [
    ("data-on-stream-0", DATA, 0, 0, b"x"),
    ("data-on-idle-stream", DATA, 0, 1, b"x"),
    ("headers-on-stream-0", HEADERS, 4, 0, &[0x82]),
    ("headers-on-even-stream", HEADERS, 4, 2, &[0x82]),
    ("headers-padding-too-long", HEADERS, 0xc, 1, &[9, 0x88]),
    ("headers-padding-missing", HEADERS, 0xc, 1, &[]),
    ("headers-priority-cut", HEADERS, 0x24, 1, &[0; 4]),
    ("continuation-alone", CONTINUATION, 4, 1, &[]),
    ("priority-on-stream-0", PRIORITY, 0, 0, &[0; 5]),
    ("reset-on-stream-0", RST_STREAM, 0, 0, &[0; 4]),
    ("reset-on-idle-stream", RST_STREAM, 0, 1, &[0; 4]),
    ("reset-length", RST_STREAM, 0, 1, &[0; 3]),
    ("settings-on-a-stream", SETTINGS, 0, 1, &[]),
    ("settings-length", SETTINGS, 0, 0, &[0; 5]),
    ("settings-ack-with-payload", SETTINGS, 1, 0, &[0; 6]),
    ("settings-push-2", SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 2]),
    (
        "settings-window-too-large",
        SETTINGS,
        0,
        0,
        &[0, 4, 0x80, 0, 0, 0],
    ),
    (
        "settings-frames-too-small",
        SETTINGS,
        0,
        0,
        &[0, 5, 0, 0, 0x3f, 0xff],
    ),
    (
        "settings-frames-too-large",
        SETTINGS,
        0,
        0,
        &[0, 5, 1, 0, 0, 0],
    ),
    ("push-promise", PUSH_PROMISE, 4, 1, &[0; 4]),
    ("ping-on-a-stream", PING, 0, 1, &[0; 8]),
    ("ping-length", PING, 0, 0, &[0; 7]),
    ("goaway-on-a-stream", GOAWAY, 0, 1, &[0; 8]),
    ("goaway-length", GOAWAY, 0, 0, &[0; 7]),
    ("window-update-length", WINDOW_UPDATE, 0, 0, &[0; 5]),
    (
        "window-update-on-idle-stream",
        WINDOW_UPDATE,
        0,
        1,
        &[0, 0, 0, 1],
    ),
    ("window-update-of-0", WINDOW_UPDATE, 0, 0, &[0; 4]),
    (
        "window-overflow",
        WINDOW_UPDATE,
        0,
        0,
        &[0x7f, 0xff, 0xff, 0xff],
    ),
    ("hpack-index-0", HEADERS, 4, 1, &[0x80]),
];

fn single_frames() -> Vec<Input> {
    let mut inputs: Vec<_> = SINGLE
        .into_iter()
        .map(|(name, kind, flags, stream, payload)| {
            let family = match kind {
                SETTINGS => "settings",
                _ if name.starts_with("hpack") => "hpack",
                _ => "frames",
            };
            let bytes = frame(kind, flags, stream, payload);
            Input::new((name, family), End, move |_| bytes.clone())
        })
        .collect();
    let too_long = vec![0xff, 0, 0, 0, 0, 0, 0, 0, 1];
    inputs.push(of("frame-above-the-maximum", End, move |_| {
        too_long.clone()
    }));
    let unknown = [
        frame(0xfa, 0xff, 0, &[1; 300]),
        frame(PRIORITY, 0, 77, &[0; 5]),
        settings(&[(0x0a0a, 7)]),
    ];
    let unknown = unknown.concat();
    inputs.push(of("frames-without-meaning", Ignore, move |_| {
        unknown.clone()
    }));
    inputs
}

fn of(
    name: &'static str,
    expect: Expect,
    bytes: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static,
) -> Input {
    Input::new((name, "frames"), expect, bytes)
}

/// What is wrong by its order.
fn sequences() -> Vec<Input> {
    let open = |to: &str| frame(HEADERS, 0, 1, &connect_block(to));
    vec![
        of("lower-stream-number", End, |to| {
            [connect(5, to), connect(3, to)].concat()
        })
        .reaching(1),
        of("header-block-interrupted", End, move |to| {
            [open(to), ping()].concat()
        }),
        of("header-block-of-another-stream", End, move |to| {
            [open(to), frame(CONTINUATION, 4, 3, &[0; 8])].concat()
        }),
        of("data-padding-too-long", End, |to| {
            [connect(1, to), frame(DATA, PADDED, 1, &[3, 0, 0])].concat()
        })
        .reaching(1),
        of("data-padding-missing", End, |to| {
            [connect(1, to), frame(DATA, PADDED, 1, &[])].concat()
        })
        .reaching(1),
        of("data-after-reset", End, |to| {
            [connect(1, to), reset(1, CANCEL), data(1, b"x")].concat()
        })
        .reaching(1),
        of("headers-after-reset", End, |to| {
            [connect(1, to), reset(1, CANCEL), connect(1, to)].concat()
        })
        .reaching(1),
        of("data-after-its-end", Refuse, |to| {
            let end = frame(DATA, END_STREAM, 1, &[]);
            [connect(1, to), end, data(1, b"x")].concat()
        })
        .reaching(1),
        of("trailers-on-a-tunnel", Refuse, |to| {
            [connect(1, to), headers(1, END_STREAM, &[("a", "b")])].concat()
        })
        .reaching(1),
        of("stream-window-of-0", Refuse, |to| {
            [connect(1, to), window_update(1, 0)].concat()
        })
        .reaching(1),
        of("stream-window-overflow", Refuse, |to| {
            [connect(1, to), window_update(1, 0x7fff_ffff)].concat()
        })
        .reaching(1),
        Input::new(("settings-overflow-a-window", "settings"), End, |to| {
            let raised = window_update(1, 0x7fff_ffff - (4 << 20));
            [connect(1, to), raised, settings(&[(4, 0x7fff_ffff)])].concat()
        })
        .reaching(1),
        // 17 MiB at once: more than the window of the connection, to nobody who reads.
        of("data-beyond-the-windows", Refuse, |to| {
            let piece = data(1, &[0; 1 << 20]);
            [connect(1, to), piece.repeat(17)].concat()
        })
        .reaching(1),
    ]
}

fn compression() -> Vec<Input> {
    let of = |name, expect, block: Vec<u8>| {
        Input::new((name, "hpack"), expect, move |_| {
            frame(HEADERS, END_HEADERS, 1, &block)
        })
    };
    // A field of 4 KiB in the table, then a reference to it as often as a block admits.
    let mut bomb = vec![0x40, 1, b'a', 0x7f, 0x80 + 0x41, 0x1e];
    bomb.extend(vec![b'b'; 4032]);
    bomb.extend(vec![0xbe; 12_000]);
    let fields: Vec<_> = (0..4000).map(|_| ("a", "b")).collect();
    vec![
        of("hpack-bomb", Refuse, bomb),
        of("hpack-index-unknown", End, vec![0xff, 0xff, 0xff, 0x7f]),
        of("hpack-integer-endless", End, vec![0xff; 64]),
        of(
            "hpack-integer-overflow",
            End,
            vec![0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f],
        ),
        of("hpack-string-cut", End, vec![0x00, 0x05, b'a', b'b']),
        of(
            "hpack-huffman-eos",
            End,
            vec![0x00, 0x84, 0xff, 0xff, 0xff, 0xff, 0x00],
        ),
        of("hpack-table-too-large", End, vec![0x3f, 0xe1, 0xff, 0x03]),
        of("hpack-block-too-long", End, vec![0; 70_000]),
        Input::new(("hpack-fields-too-many", "hpack"), Refuse, move |_| {
            headers(1, 0, &fields)
        }),
    ]
}
