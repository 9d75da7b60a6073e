//! Text shared by the access log and the process log: time stamps and quoting.
//!
//! Everything appends to a caller's `String`, so that a reused buffer makes a line cost no
//! allocation. Quoting must keep a line a line: peers choose some of the values (host names,
//! identities, error texts), so control characters never pass through.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::SystemTime;

use time::OffsetDateTime;

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum LogFormat {
    /// Tab-separated columns, then `k=v` fields.
    #[default]
    Plain,
    /// One JSON object per line.
    Json,
}

/// Writes RFC 3339 time stamps in microseconds, and remembers the part down to the second.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timestamps {
    second: Option<i64>,
    prefix: String,
}

impl Timestamps {
    /// Appends `now` in UTC, for example `2026-01-02T03:04:05.000678Z`.
    pub(crate) fn append(&mut self, out: &mut String, now: SystemTime) {
        let now = OffsetDateTime::from(now);
        let second = now.unix_timestamp();
        if self.second != Some(second) {
            self.second = Some(second);
            self.prefix.clear();
            let (year, month, day) = (now.year(), u8::from(now.month()), now.day());
            let (hour, minute, second) = (now.hour(), now.minute(), now.second());
            infallible(write!(
                self.prefix,
                "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}."
            ));
        }
        out.push_str(&self.prefix);
        append_digits(out, now.microsecond().into(), 6);
        out.push('Z');
    }
}

/// Appends `address` as its `Display` writes it, in a tenth of the time where it is an IPv4 one.
pub(crate) fn append_address(out: &mut String, address: SocketAddr) {
    let SocketAddr::V4(address) = address else {
        return infallible(write!(out, "{address}"));
    };
    let [first, rest @ ..] = address.ip().octets();
    append_digits(out, first.into(), 1);
    for octet in rest {
        out.push('.');
        append_digits(out, octet.into(), 1);
    }
    out.push(':');
    append_digits(out, address.port().into(), 1);
}

/// Appends `number` with at least `digits` digits, 20 at most.
pub(crate) fn append_digits(out: &mut String, mut number: u64, digits: usize) {
    let mut text = [b'0'; 20];
    let mut at = text.len();
    while number > 0 {
        at -= 1;
        text[at] = b'0' + (number % 10) as u8;
        number /= 10;
    }
    let at = at.min(text.len() - digits);
    out.extend(text[at..].iter().map(|digit| char::from(*digit)));
}

/// Appends `value` in double quotes, escaped so that it stays on one line.
///
/// What is printable ASCII needs no escape and takes the short way; the rest is escaped as Rust's
/// `Debug` does it, which is what consumers of this log format know.
pub(crate) fn append_quoted(out: &mut String, value: &str) {
    let plain = |b: u8| matches!(b, b' '..=b'~') & (b != b'"') & (b != b'\\');
    // To the end, not to the first that is not: so it takes many bytes at a time.
    if value.bytes().fold(true, |all, b| all & plain(b)) {
        out.push('"');
        out.push_str(value);
        out.push('"');
    } else {
        infallible(write!(out, "{value:?}"));
    }
}

/// Appends `value` as a JSON string, quotes included (RFC 8259, section 7).
pub(crate) fn append_json_string(out: &mut String, value: &str) {
    out.push('"');
    for c in value.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            // Line and paragraph separators are legal JSON, but end a line for some readers.
            c if c < ' ' || matches!(c, '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}') => {
                infallible(write!(out, "\\u{:04x}", u32::from(c)));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Appends `value` without quotes, but with its control characters escaped.
pub(crate) fn append_bare(out: &mut String, value: &str) {
    if value
        .bytes()
        .fold(true, |all, b| all & matches!(b, b' '..=b'~'))
    {
        out.push_str(value);
        return;
    }
    for c in value.chars() {
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
}

/// Writing to a `String` cannot fail; a `Display` that reports an error leaves a short text.
pub(crate) fn infallible(result: std::fmt::Result) {
    debug_assert!(result.is_ok(), "a Display implementation reported an error");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn time_is_utc_in_microseconds() {
        let mut stamps = Timestamps::default();
        let mut out = String::new();
        let start = UNIX_EPOCH + Duration::new(1_790_000_000, 1_234_567);
        stamps.append(&mut out, start);
        assert_eq!(out, "2026-09-21T14:13:20.001234Z");
        out.clear();
        stamps.append(&mut out, start + Duration::from_micros(998_765));
        assert_eq!(out, "2026-09-21T14:13:20.999999Z");
        out.clear();
        stamps.append(&mut out, start + Duration::from_secs(1));
        assert_eq!(out, "2026-09-21T14:13:21.001234Z");
        out.clear();
        stamps.append(&mut out, UNIX_EPOCH);
        assert_eq!(out, "1970-01-01T00:00:00.000000Z");
    }

    #[test]
    fn quoting_keeps_a_line_a_line() {
        let cases = [
            ("plain text", "\"plain text\"", "\"plain text\""),
            ("a\"b\\c", r#""a\"b\\c""#, r#""a\"b\\c""#),
            ("a\nb\tc\r", r#""a\nb\tc\r""#, r#""a\nb\tc\r""#),
            ("\u{1b}[31m", r#""\u{1b}[31m""#, r#""\u001b[31m""#),
            ("é", "\"é\"", "\"é\""),
        ];
        for (value, quoted, json) in cases {
            let (mut a, mut b) = (String::new(), String::new());
            append_quoted(&mut a, value);
            append_json_string(&mut b, value);
            assert_eq!((a.as_str(), b.as_str()), (quoted, json));
            let back: String = serde_json::from_str(&b).unwrap();
            assert_eq!(back, value);
        }
        let mut bare = String::new();
        append_bare(&mut bare, "one\ntwo\u{2028}three \"é\"");
        assert_eq!(bare, "one\\ntwo\\u{2028}three \"é\"");
    }

    #[test]
    fn addresses_and_numbers_are_as_displayed() {
        for text in [
            "10.0.0.1:80",
            "255.255.255.255:65535",
            "0.0.0.0:0",
            "1.20.100.9:10000",
            "[2001:db8::1]:15008",
            "[fe80::1%3]:9",
        ] {
            let address: SocketAddr = text.parse().unwrap();
            let mut out = String::new();
            append_address(&mut out, address);
            assert_eq!(out, text);
        }
        for number in [0, 1, 9, 10, 99, 100, 12_345, u64::MAX] {
            let mut out = String::new();
            append_digits(&mut out, number, 1);
            out.push(' ');
            append_digits(&mut out, number, 6);
            assert_eq!(out, format!("{number} {number:06}"));
        }
    }
}
