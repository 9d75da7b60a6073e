//! Requests that are no CONNECT to a place of this workload's.

use super::Expect::{End, Refuse, Status};
use super::{Attack, Expect, Input};
use crate::attack::frames::{END_HEADERS, HEADERS, connect, frame, headers};

const FAMILY: &str = "connect";

pub(super) fn attacks() -> Vec<Attack> {
    let inputs = [requests(), authorities()];
    inputs.into_iter().flatten().map(Input::attack).collect()
}

/// A request of these fields; `TO` stands for the honest target.
fn request(
    name: &'static str,
    expect: Expect,
    fields: &'static [(&'static str, &'static str)],
) -> Input {
    Input::new((name, FAMILY), expect, move |to| {
        let fields: Vec<_> = fields
            .iter()
            .map(|(name, value)| (*name, if *value == "TO" { to } else { *value }))
            .collect();
        headers(1, 0, &fields)
    })
}

const CONNECT: (&str, &str) = (":method", "CONNECT");
const TO: (&str, &str) = (":authority", "TO");

fn requests() -> Vec<Input> {
    vec![
        request(
            "get",
            Status(400),
            &[(":method", "GET"), (":scheme", "https"), (":path", "/"), TO],
        ),
        request(
            "post",
            Status(400),
            &[
                (":method", "POST"),
                (":scheme", "https"),
                (":path", "/"),
                TO,
            ],
        ),
        request(
            "method-in-lower-case",
            Refuse,
            &[(":method", "connect"), TO],
        ),
        request("connect-with-path", Refuse, &[CONNECT, TO, (":path", "/")]),
        request(
            "connect-with-scheme",
            Refuse,
            &[CONNECT, TO, (":scheme", "https")],
        ),
        request(
            "connect-extended",
            Refuse,
            &[
                CONNECT,
                TO,
                (":protocol", "websocket"),
                (":scheme", "https"),
                (":path", "/"),
            ],
        ),
        request("no-method", Refuse, &[TO]),
        request("no-authority", Refuse, &[CONNECT]),
        request("method-twice", Refuse, &[CONNECT, CONNECT, TO]),
        request("authority-twice", Refuse, &[CONNECT, TO, TO]),
        request("pseudo-field-unknown", Refuse, &[CONNECT, TO, (":x", "y")]),
        request("pseudo-field-late", Refuse, &[CONNECT, ("a", "b"), TO]),
        request("response-as-request", Refuse, &[(":status", "200")]),
        request("field-name-empty", Refuse, &[CONNECT, TO, ("", "b")]),
        request(
            "field-name-in-upper-case",
            Refuse,
            &[CONNECT, TO, ("Forwarded", "b")],
        ),
        request(
            "field-with-line-end",
            Refuse,
            &[CONNECT, TO, ("baggage", "a\r\nb: c")],
        ),
        Input::new(("connect-cut-into-continuations", FAMILY), End, |_| {
            // A block in a thousand pieces without an end.
            let pieces = frame(9, 0, 1, &[]).repeat(1000);
            [frame(HEADERS, 0, 1, &[]), pieces].concat()
        }),
        Input::new(("connect-block-empty", FAMILY), Refuse, |_| {
            frame(HEADERS, END_HEADERS, 1, &[])
        }),
    ]
}

fn authorities() -> Vec<Input> {
    let of = |name, expect, authority: &'static str| {
        Input::new((name, FAMILY), expect, move |_| connect(1, authority))
    };
    vec![
        of("authority-empty", Refuse, ""),
        of("authority-without-port", Refuse, "10.244.2.11"),
        of("authority-port-0", Refuse, "10.244.2.11:0"),
        of("authority-port-65536", Refuse, "10.244.2.11:65536"),
        of("authority-port-signed", Refuse, "10.244.2.11:+8080"),
        of("authority-with-user", Refuse, "user@10.244.2.11:8080"),
        of("authority-with-path", Refuse, "10.244.2.11:8080/x"),
        of("authority-with-nul", Refuse, "10.244.2.11:8080\0"),
        of("authority-octal", Refuse, "012.0364.02.013:8080"),
        of("authority-mapped", Refuse, "[::ffff:10.244.2.12]:8080"),
        of("authority-of-another-pod", Status(400), "10.244.2.12:8080"),
        of("authority-of-another-node", Status(400), "10.244.1.12:8080"),
        of("authority-of-the-node", Status(400), "10.244.2.1:22"),
        of("authority-outside", Status(400), "192.0.2.1:80"),
        of(
            "authority-metadata-server",
            Status(400),
            "169.254.169.254:80",
        ),
        of("authority-loopback", Status(400), "127.0.0.1:15000"),
        of("authority-loopback-v6", Status(400), "[::1]:15000"),
        of("authority-unspecified", Status(400), "0.0.0.0:15000"),
        of("authority-own-hbone-port", Status(503), "10.244.2.11:15008"),
        of(
            "authority-own-inbound-port",
            Status(503),
            "10.244.2.11:15006",
        ),
        of(
            "authority-own-outbound-port",
            Status(503),
            "10.244.2.11:15001",
        ),
        of(
            "authority-unknown-service",
            Refuse,
            "none.default.svc.cluster.local:80",
        ),
        of("authority-denied-port", Status(401), "10.244.2.11:9001"),
        of(
            "authority-denied-by-name",
            Refuse,
            "server-b.default.svc.cluster.local:9001",
        ),
        Input::new(("authority-of-60-kib", FAMILY), Refuse, |_| {
            connect(1, &format!("{}:80", "a".repeat(60_000)))
        }),
    ]
}
