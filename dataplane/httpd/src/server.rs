//! The small HTTP/1.1 server under metrics, readiness and administration.
//!
//! It may share a thread with other work, so nobody may keep it busy: connections are bounded
//! in number and time, headers in size and time, and request bodies are not read. A new connection
//! is always taken: where there are too many, the longest idle one goes, first of all one of an
//! address that has more than its share (`connections`). So a probe is answered whoever else holds
//! connections open.

use std::convert::Infallible;
use std::io;
use std::net::TcpListener as StdListener;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tracing::{debug, warn};

use crate::connections::{Connections, Seat};

/// Bounds of one server.
#[derive(Clone, Copy, Debug)]
pub struct HttpLimits {
    /// Connections served at a time; for another one the longest idle goes.
    pub connections_max: usize,
    /// Time a client has to send a request's header.
    pub header_timeout: Duration,
    /// Age at which a connection is asked to end.
    pub connection_age_max: Duration,
    /// Time it has to do so before it is cut.
    pub grace: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            connections_max: 64,
            header_timeout: Duration::from_secs(5),
            connection_age_max: Duration::from_secs(60),
            grace: Duration::from_secs(10),
        }
    }
}

/// Bytes of header accepted.
const HEADER_BYTES_MAX: usize = 16 << 10;
/// Header fields accepted.
const HEADERS_MAX: usize = 64;
/// Pause after a failed accept, which is mostly a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A request, as far as anyone here cares.
#[derive(Debug)]
pub struct Query<'a> {
    /// GET, say.
    pub method: &'a Method,
    /// The target up to the question mark.
    pub path: &'a str,
    /// What follows the question mark, still encoded.
    pub query: &'a str,
    /// The `Accept` header; empty without one.
    pub accept: &'a str,
}

impl Query<'_> {
    /// Whether it only reads: GET, or HEAD.
    pub fn is_read(&self) -> bool {
        matches!(*self.method, Method::GET | Method::HEAD)
    }
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// The status of the response.
    pub status: StatusCode,
    /// The `Content-Type` header.
    pub content_type: &'static str,
    /// All of the body.
    pub body: String,
}

impl Answer {
    /// Plain text.
    pub fn text(status: StatusCode, body: impl Into<String>) -> Self {
        Self {
            status,
            content_type: "text/plain; charset=utf-8",
            body: body.into(),
        }
    }

    /// 200.
    pub fn ok(content_type: &'static str, body: impl Into<String>) -> Self {
        Self {
            status: StatusCode::OK,
            content_type,
            body: body.into(),
        }
    }

    /// 404.
    pub fn not_found() -> Self {
        Self::text(StatusCode::NOT_FOUND, "not found\n")
    }

    /// 405, with what is `allowed`.
    pub fn method_not_allowed(allowed: &str) -> Self {
        let body = format!("method not allowed: use {allowed}\n");
        Self::text(StatusCode::METHOD_NOT_ALLOWED, body)
    }
}

/// Serves `answer` on `listener` until the future is dropped, on a current-thread or any other
/// tokio runtime. Connections of then go on until their bounds, or the runtime, end them.
///
/// # Errors
/// The listener cannot be handed to tokio.
pub async fn serve(
    name: &'static str,
    listener: StdListener,
    limits: HttpLimits,
    answer: impl Fn(&Query<'_>) -> Answer + Send + Sync + 'static,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let answer = Arc::new(answer);
    let connections = Arc::<Connections>::default();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let answer = Arc::clone(&answer);
                let seat = Arc::new(connections.enter(peer.ip(), limits.connections_max));
                tokio::spawn(async move {
                    let served = connection(stream, Arc::clone(&seat), limits, answer);
                    tokio::select! {
                        ended = served => if let Err(error) = ended {
                            debug!(server = name, %peer, %error, "connection ended");
                        },
                        () = seat.displaced() => {
                            debug!(server = name, %peer, "idle connection closed for another one");
                        }
                    }
                });
            }
            Err(error) => {
                warn!(server = name, %error, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection<A>(
    stream: TcpStream,
    seat: Arc<Seat>,
    limits: HttpLimits,
    answer: Arc<A>,
) -> Result<(), hyper::Error>
where
    A: Fn(&Query<'_>) -> Answer + Send + Sync + 'static,
{
    let service = service_fn(move |request| {
        seat.is_used();
        let response = respond(&request, &*answer);
        async move { Ok::<_, Infallible>(response) }
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(HEADER_BYTES_MAX)
        .max_headers(HEADERS_MAX);
    let mut served = pin!(builder.serve_connection(TokioIo::new(stream), service));
    if let Ok(ended) = tokio::time::timeout(limits.connection_age_max, served.as_mut()).await {
        return ended;
    }
    served.as_mut().graceful_shutdown();
    // A client that still reads slowly after that is cut.
    tokio::time::timeout(limits.grace, served)
        .await
        .unwrap_or(Ok(()))
}

fn respond(
    request: &Request<Incoming>,
    answer: &impl Fn(&Query<'_>) -> Answer,
) -> Response<Full<Bytes>> {
    let accept = request.headers().get(hyper::header::ACCEPT);
    let answer = answer(&Query {
        method: request.method(),
        path: request.uri().path(),
        query: request.uri().query().unwrap_or_default(),
        accept: accept
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default(),
    });
    let mut response = Response::new(Full::new(Bytes::from(answer.body)));
    *response.status_mut() = answer.status;
    let content_type = HeaderValue::from_static(answer.content_type);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// The value of `key` in an encoded query; empty for a key without value.
pub fn query_value(query: &str, key: &str) -> Option<String> {
    query.split('&').find_map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (name == key).then(|| percent_decode(value))
    })
}

/// Undoes percent encoding; what is not valid encoding stays as it is.
fn percent_decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        let encoded = match (first, tail) {
            (b'%', [high, low, after @ ..]) => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => Some((high << 4 | low, after)),
                _ => None,
            },
            (b'+', after) => Some((b' ', after)),
            _ => None,
        };
        let (byte, after) = encoded.unwrap_or((*first, tail));
        out.push(byte);
        rest = if encoded.is_some() { after } else { rest };
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let cases = [
            ("level=info", "level", Some("info")),
            (
                "level=a%3Ddebug%2Cinfo&reset",
                "level",
                Some("a=debug,info"),
            ),
            ("level=a=debug,info", "level", Some("a=debug,info")),
            ("level=x&reset", "reset", Some("")),
            ("level=%zz%4", "level", Some("%zz%4")),
            ("level=a+b", "level", Some("a b")),
            ("levels=x", "level", None),
            ("", "level", None),
            ("level=%ff", "level", Some("\u{fffd}")),
        ];
        for (query, key, expected) in cases {
            assert_eq!(query_value(query, key).as_deref(), expected, "{query}");
        }
    }
}
