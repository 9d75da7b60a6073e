//! Just enough HTTP to ask a ztunnel for readiness and metrics from inside its namespace.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use crate::network::namespace::in_namespace;

/// Largest answer read, in bytes.
const ANSWER_MAX: u64 = 32 << 20;

/// `GET path` from `server`, out of the namespace at `netns`: (status, body).
///
/// # Errors
/// The namespace cannot be entered, the server cannot be reached within `timeout`, or what it
/// sends is not HTTP.
pub fn http_get(
    netns: &Path,
    server: SocketAddr,
    path: &str,
    timeout: Duration,
) -> io::Result<(u16, String)> {
    in_namespace(netns, || get(server, path, timeout)).map_err(io::Error::other)?
}

fn get(server: SocketAddr, path: &str, timeout: Duration) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&server, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    // Version 1.0: the body ends with the connection and is never chunked.
    write!(
        stream,
        "GET {path} HTTP/1.0\r\nHost: {server}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX).read_to_end(&mut answer)?;
    parse(&String::from_utf8_lossy(&answer))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP"))
}

fn parse(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?;
    Some((status.parse().ok()?, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_body_are_separated() {
        let answer = "HTTP/1.1 500 Internal Server Error\r\nx: y\r\n\r\nnot ready\r\n\r\n";
        assert_eq!(parse(answer), Some((500, "not ready\r\n\r\n".to_owned())));
        assert_eq!(parse("SSH-2.0\r\n\r\n"), None);
        assert_eq!(parse("HTTP/1.1 ok\r\n\r\n"), None);
    }
}
