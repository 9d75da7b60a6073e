//! Heads of CONNECT requests and of their answers: building, and the validation of RFC 9113
//! sections 8.2, 8.3 and 8.5. Only the headers HBONE uses are kept; everything else is checked for
//! validity and dropped.

use std::borrow::Cow;

use crate::hpack;

/// What a client asks for. Values are sent as they are.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ConnectRequest<'a> {
    /// `:authority`: `a.b.c.d:port`, `[v6]:port` or `host:port`.
    pub authority: &'a str,
    /// `forwarded`, for example `for="10.0.0.1:4711";host=name`.
    pub forwarded: Option<&'a str>,
    /// `baggage`: the source workload's attributes.
    pub baggage: Option<&'a str>,
    /// `traceparent`.
    pub traceparent: Option<&'a str>,
    /// `x-forwarded-network`, inside double HBONE.
    pub x_forwarded_network: Option<&'a str>,
}

/// What a peer asked for. Field values that are not UTF-8 count as absent.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RequestHead {
    /// `:method`, as sent.
    pub method: Cow<'static, str>,
    /// `:authority`, not parsed; never empty for CONNECT, may be empty for other methods.
    pub authority: Box<str>,
    /// `baggage`; several fields are joined by commas.
    pub baggage: Option<Box<str>>,
    /// `forwarded`; several fields are joined by commas.
    pub forwarded: Option<Box<str>>,
    /// `traceparent`, the first one.
    pub traceparent: Option<Box<str>>,
    /// `x-forwarded-network`, the first one.
    pub x_forwarded_network: Option<Box<str>>,
}

impl RequestHead {
    /// Whether this is a tunnel request; any other method deserves a 400.
    pub fn is_connect(&self) -> bool {
        self.method == "CONNECT"
    }
}

impl ConnectRequest<'_> {
    fn fields(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let Self {
            authority,
            forwarded,
            baggage,
            traceparent,
            x_forwarded_network,
        } = *self;
        [
            (":method", Some("CONNECT")),
            (":authority", Some(authority)),
            ("forwarded", forwarded),
            ("baggage", baggage),
            ("traceparent", traceparent),
            ("x-forwarded-network", x_forwarded_network),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
    }

    /// Name of the first header whose value cannot be sent.
    pub(crate) fn invalid_field(&self) -> Option<&'static str> {
        let bad = |name: &str, value: &str| {
            !is_valid_value(value.as_bytes()) || name == ":authority" && value.is_empty()
        };
        self.fields()
            .find(|(name, value)| bad(name, value))
            .map(|(name, _)| name)
    }

    /// RFC 9113 6.5.2 size.
    pub(crate) fn list_size(&self) -> usize {
        self.fields()
            .map(|(name, value)| field_size(name.as_bytes(), value.as_bytes()))
            .sum()
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        for (name, value) in self.fields() {
            hpack::literal(out, name, value);
        }
    }
}

/// Why a head is malformed; the stream is reset with PROTOCOL_ERROR.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Malformed(pub(crate) &'static str);

/// Collects the fields of one header block as they are decoded. Keeps no more than the header
/// list limit; the size goes on being counted beyond it.
#[derive(Debug, Default)]
pub(crate) struct Fields {
    head: RequestHead,
    method: Option<Cow<'static, str>>,
    authority: Option<Box<str>>,
    status: Option<u16>,
    has_scheme: bool,
    has_path: bool,
    /// A regular field was seen: no pseudo-header may follow.
    regular: bool,
    malformed: Option<Malformed>,
    size: usize,
    limit: usize,
}

impl Fields {
    pub(crate) fn new(limit: u32) -> Self {
        Self {
            limit: limit as usize,
            ..Self::default()
        }
    }

    /// Whether the list exceeded the limit.
    pub(crate) fn too_large(&self) -> bool {
        self.size > self.limit
    }

    pub(crate) fn push(&mut self, name: &[u8], value: &[u8]) {
        self.size = self.size.saturating_add(field_size(name, value));
        if self.too_large() || self.malformed.is_some() {
            return;
        }
        let result = match name {
            _ if !is_valid_value(value) => Err(Malformed("a field value has forbidden bytes")),
            [b':', ..] if self.regular => Err(Malformed("a pseudo-header follows a field")),
            [b':', ..] => self.pseudo(name, value),
            _ => self.regular(name, value),
        };
        self.malformed = result.err();
    }

    fn pseudo(&mut self, name: &[u8], value: &[u8]) -> Result<(), Malformed> {
        let duplicate = match name {
            b":method" => {
                let method = match value {
                    b"CONNECT" => Cow::Borrowed("CONNECT"),
                    other => Cow::Owned(text(other).ok_or(Malformed("bad :method"))?.into()),
                };
                self.method.replace(method).is_some()
            }
            b":authority" => {
                let authority = text(value).ok_or(Malformed(":authority is not UTF-8"))?;
                self.authority.replace(authority).is_some()
            }
            b":scheme" => std::mem::replace(&mut self.has_scheme, true),
            b":path" => std::mem::replace(&mut self.has_path, true),
            b":status" => {
                let status = status(value).ok_or(Malformed(":status is not three digits"))?;
                self.status.replace(status).is_some()
            }
            _ => return Err(Malformed("unknown pseudo-header")),
        };
        if duplicate {
            Err(Malformed("a pseudo-header is repeated"))
        } else {
            Ok(())
        }
    }

    fn regular(&mut self, name: &[u8], value: &[u8]) -> Result<(), Malformed> {
        self.regular = true;
        let head = &mut self.head;
        match name {
            b"baggage" => join(&mut head.baggage, value),
            b"forwarded" => join(&mut head.forwarded, value),
            b"traceparent" => keep_first(&mut head.traceparent, value),
            b"x-forwarded-network" => keep_first(&mut head.x_forwarded_network, value),
            b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding"
            | b"upgrade" => return Err(Malformed("a connection-specific field is present")),
            b"te" if value != b"trailers" => return Err(Malformed("te is not trailers")),
            _ if !is_valid_name(name) => return Err(Malformed("a field name is invalid")),
            _ => {}
        }
        Ok(())
    }

    pub(crate) fn into_request(self) -> Result<RequestHead, Malformed> {
        if let Some(malformed) = self.malformed {
            return Err(malformed);
        }
        let method = self.method.ok_or(Malformed(":method is missing"))?;
        if self.status.is_some() {
            return Err(Malformed("a request has :status"));
        }
        let authority = self.authority.unwrap_or_default();
        let head = RequestHead {
            method,
            authority,
            ..self.head
        };
        if head.is_connect() {
            if self.has_scheme || self.has_path {
                return Err(Malformed("CONNECT with :scheme or :path"));
            }
            if head.authority.is_empty() {
                return Err(Malformed("CONNECT without :authority"));
            }
        } else if !self.has_scheme || !self.has_path {
            return Err(Malformed("a request without :scheme or :path"));
        }
        Ok(head)
    }

    /// Status and baggage.
    pub(crate) fn into_response(self) -> Result<(u16, Option<Box<str>>), Malformed> {
        if let Some(malformed) = self.malformed {
            return Err(malformed);
        }
        let status = self.status.ok_or(Malformed(":status is missing"))?;
        if self.has_request_pseudo() {
            return Err(Malformed("a response has a request's pseudo-header"));
        }
        if status == 101 {
            return Err(Malformed("101 does not exist in HTTP/2"));
        }
        Ok((status, self.head.baggage))
    }

    pub(crate) fn into_trailers(self) -> Result<(), Malformed> {
        match self.malformed {
            Some(malformed) => Err(malformed),
            None if self.status.is_some() || self.has_request_pseudo() => {
                Err(Malformed("trailers with a pseudo-header"))
            }
            None => Ok(()),
        }
    }

    fn has_request_pseudo(&self) -> bool {
        self.method.is_some() || self.authority.is_some() || self.has_scheme || self.has_path
    }
}

/// RFC 9113 8.2.1: no NUL, CR, LF and no white space around; stricter: no control characters.
pub(crate) fn is_valid_value(value: &[u8]) -> bool {
    let blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    !blank(value.first())
        && !blank(value.last())
        && all_bytes(value, |byte| {
            (byte >= b' ') & (byte != 0x7f) | (byte == b'\t')
        })
}

/// Whether `good` is true of every byte. Without branches in `good`, sixteen at a time: values are
/// long (baggage), and are looked at by whoever sends and whoever receives them.
#[inline]
fn all_bytes(bytes: &[u8], good: impl Fn(u8) -> bool + Copy) -> bool {
    const LANES: usize = 16;
    let all_good = |lanes: &[u8; LANES]| lanes.iter().fold(true, |all, &byte| all & good(byte));
    match bytes.last_chunk::<LANES>() {
        None => bytes.iter().all(|&byte| good(byte)),
        // The last chunk may overlap the one before.
        Some(last) => bytes.as_chunks::<LANES>().0.iter().all(all_good) && all_good(last),
    }
}

/// RFC 9113 8.2.1: a field name is lower case, printable and without colon.
fn is_valid_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name
            .iter()
            .all(|b| matches!(b, 0x21..=0x39 | 0x3b..=0x40 | 0x5b..=0x7e))
}

fn field_size(name: &[u8], value: &[u8]) -> usize {
    name.len() + value.len() + 32
}

fn text(value: &[u8]) -> Option<Box<str>> {
    std::str::from_utf8(value).ok().map(Box::from)
}

fn status(value: &[u8]) -> Option<u16> {
    let &[a @ b'1'..=b'9', b @ b'0'..=b'9', c @ b'0'..=b'9'] = value else {
        return None;
    };
    Some(
        [a, b, c]
            .iter()
            .fold(0, |code, digit| code * 10 + u16::from(digit - b'0')),
    )
}

fn keep_first(slot: &mut Option<Box<str>>, value: &[u8]) {
    if slot.is_none() {
        *slot = text(value);
    }
}

fn join(slot: &mut Option<Box<str>>, value: &[u8]) {
    let Some(value) = text(value) else { return };
    *slot = Some(match slot.take() {
        None => value,
        Some(before) => [&before, ",", &value].concat().into_boxed_str(),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(fields: &[(&str, &str)]) -> Fields {
        let mut collected = Fields::new(1000);
        for (name, value) in fields {
            collected.push(name.as_bytes(), value.as_bytes());
        }
        collected
    }

    const METHOD: (&str, &str) = (":method", "CONNECT");
    const AUTHORITY: (&str, &str) = (":authority", "10.0.0.1:80");

    #[test]
    fn forbidden_bytes_are_found_wherever_they_are() {
        for len in 0..70 {
            let good = vec![b'v'; len];
            assert!(is_valid_value(&good), "{len}");
            for at in 0..len {
                for byte in [0, 8, 9, 10, 13, 31, 32, 126, 127, 128, 255] {
                    let mut value = good.clone();
                    value[at] = byte;
                    let edge = at == 0 || at + 1 == len;
                    let valid = match byte {
                        9 | 32 => !edge,
                        0..32 | 127 => false,
                        _ => true,
                    };
                    assert_eq!(is_valid_value(&value), valid, "{byte} at {at} of {len}");
                }
            }
        }
    }

    #[test]
    fn a_connect_keeps_what_hbone_uses() {
        let head = collect(&[
            METHOD,
            AUTHORITY,
            ("baggage", "a=1"),
            ("x-other", "1"),
            ("baggage", "b=2"),
            ("forwarded", "for=\"10.0.0.2:4\""),
            ("traceparent", "t1"),
            ("traceparent", "t2"),
            ("x-forwarded-network", "n"),
        ])
        .into_request()
        .unwrap();
        assert!(head.is_connect());
        assert_eq!(&*head.authority, "10.0.0.1:80");
        assert_eq!(head.baggage.as_deref(), Some("a=1,b=2"));
        assert_eq!(head.forwarded.as_deref(), Some("for=\"10.0.0.2:4\""));
        assert_eq!(head.traceparent.as_deref(), Some("t1"));
        assert_eq!(head.x_forwarded_network.as_deref(), Some("n"));
    }

    #[test]
    fn malformed_requests_are_refused() {
        let cases: &[&[(&str, &str)]] = &[
            &[METHOD],
            &[AUTHORITY],
            &[METHOD, (":authority", "")],
            &[METHOD, AUTHORITY, (":scheme", "https")],
            &[METHOD, AUTHORITY, (":path", "/")],
            &[METHOD, AUTHORITY, AUTHORITY],
            &[METHOD, METHOD, AUTHORITY],
            &[METHOD, AUTHORITY, (":protocol", "websocket")],
            &[METHOD, AUTHORITY, (":status", "200")],
            &[METHOD, ("a", "b"), AUTHORITY],
            &[METHOD, AUTHORITY, ("Upper", "x")],
            &[METHOD, AUTHORITY, ("", "x")],
            &[METHOD, AUTHORITY, ("co:lon", "x")],
            &[METHOD, AUTHORITY, ("a", " x")],
            &[METHOD, AUTHORITY, ("a", "x\t")],
            &[METHOD, AUTHORITY, ("a", "x\r\ny: z")],
            &[METHOD, AUTHORITY, ("a", "x\0")],
            &[METHOD, AUTHORITY, ("connection", "close")],
            &[METHOD, AUTHORITY, ("transfer-encoding", "chunked")],
            &[METHOD, AUTHORITY, ("te", "gzip")],
            &[(":method", "GET"), AUTHORITY],
            &[(":method", "GET"), (":scheme", "http"), AUTHORITY],
        ];
        for case in cases {
            assert!(collect(case).into_request().is_err(), "{case:?}");
        }
    }

    #[test]
    fn another_method_surfaces() {
        let get = collect(&[
            (":method", "GET"),
            (":scheme", "https"),
            (":path", "/"),
            AUTHORITY,
        ]);
        let head = get.into_request().unwrap();
        assert!(!head.is_connect());
        assert_eq!(head.method, "GET");
        assert!(
            collect(&[METHOD, AUTHORITY, ("te", "trailers")])
                .into_request()
                .is_ok()
        );
    }

    #[test]
    fn responses_and_trailers() {
        let ok = collect(&[(":status", "200"), ("baggage", "x=y")])
            .into_response()
            .unwrap();
        assert_eq!((ok.0, ok.1.as_deref()), (200, Some("x=y")));
        let cases: &[&[(&str, &str)]] = &[
            &[],
            &[(":status", "20")],
            &[(":status", "2000")],
            &[(":status", "abc")],
            &[(":status", "099")],
            &[(":status", "101")],
            &[(":status", "200"), (":status", "200")],
            &[(":status", "200"), METHOD],
        ];
        for case in cases {
            assert!(collect(case).into_response().is_err(), "{case:?}");
        }
        assert!(collect(&[("grpc-status", "0")]).into_trailers().is_ok());
        assert!(collect(&[(":status", "200")]).into_trailers().is_err());
        assert!(collect(&[METHOD]).into_trailers().is_err());
    }

    #[test]
    fn the_list_is_bounded() {
        let long = "x".repeat(900);
        let mut fields = collect(&[METHOD, AUTHORITY]);
        assert!(!fields.too_large());
        fields.push(b"baggage", long.as_bytes());
        assert!(fields.too_large());
        assert_eq!(
            fields.head.baggage, None,
            "nothing is kept beyond the limit"
        );
    }

    #[test]
    fn requests_with_unsendable_values_name_the_field() {
        let good = ConnectRequest {
            authority: "a:1",
            ..ConnectRequest::default()
        };
        assert_eq!(good.invalid_field(), None);
        assert_eq!(
            ConnectRequest::default().invalid_field(),
            Some(":authority")
        );
        let bad = ConnectRequest {
            baggage: Some("a\nb"),
            ..good
        };
        assert_eq!(bad.invalid_field(), Some("baggage"));
        assert_eq!(good.list_size(), 7 + 7 + 32 + 10 + 3 + 32);
    }
}
