//! One TLS connection of an attacker to an HBONE port, below HTTP/2: it sends what it is given, a
//! record per call, and takes note of what comes back.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

use super::frames::{
    ACK, DATA, GOAWAY, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS, ping, status,
};

/// How long a read waits before deadlines are looked at again.
const SLICE: Duration = Duration::from_millis(20);
/// How long one write may take: who does not read for that long has stopped reading.
const WRITE_LIMIT: Duration = Duration::from_secs(15);

/// What came back so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Heard {
    /// The other side has ended: how.
    pub(super) ended: Option<String>,
    /// Code of the last GOAWAY.
    pub(super) go_away: Option<u32>,
    /// RST_STREAMs: stream and code.
    pub(super) resets: Vec<(u32, u32)>,
    /// Answers: stream and status.
    pub(super) statuses: Vec<(u32, u16)>,
    /// Streams that the other side opened or answered.
    pub(super) opened: Vec<u32>,
    /// PINGs that were answered.
    pub(super) pongs: usize,
    /// SETTINGS that were acknowledged.
    pub(super) acks: usize,
    /// Bytes of DATA.
    pub(super) data: u64,
}

impl Heard {
    /// Whether the tunnel is over or is told to be.
    pub(super) fn over(&self) -> bool {
        self.ended.is_some() || self.go_away.is_some()
    }

    /// In a few words.
    pub(super) fn words(&self) -> String {
        let mut words = Vec::new();
        if let Some(code) = self.go_away {
            words.push(format!("GOAWAY {code}"));
        }
        if let Some((_, code)) = self.resets.last() {
            let more = match self.resets.len() {
                1 => String::new(),
                n => format!(" x{n}"),
            };
            words.push(format!("RST_STREAM {code}{more}"));
        }
        if let Some((_, status)) = self.statuses.last() {
            words.push(format!("status {status}"));
        }
        if let Some(ended) = &self.ended {
            words.push(ended.clone());
        }
        if words.is_empty() {
            words.push("no answer".to_owned());
        }
        words.join(", ")
    }
}

/// A tunnel's connection on the attacker's side.
#[derive(Debug)]
pub(super) struct Session {
    tls: Connection,
    socket: TcpStream,
    plain: Vec<u8>,
    /// Bytes to come that are no frames: a client's preface.
    skip: usize,
    heard: Heard,
}

impl Session {
    /// Shakes hands over `tcp`, to the end: TLS 1.3's server may still refuse the certificate,
    /// which shows with the first read.
    pub(super) fn open(tcp: TcpStream, config: &Arc<ClientConfig>) -> io::Result<Self> {
        let name = ServerName::IpAddress(tcp.peer_addr()?.ip().into());
        let tls = ClientConnection::new(Arc::clone(config), name).map_err(io::Error::other)?;
        Self::shake_hands(tls.into(), tcp)
    }

    /// The server's side.
    pub(super) fn accept(tcp: TcpStream, config: &Arc<ServerConfig>) -> io::Result<Self> {
        let tls = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
        let mut session = Self::shake_hands(tls.into(), tcp)?;
        session.skip = PREFACE.len();
        Ok(session)
    }

    fn shake_hands(mut tls: Connection, mut socket: TcpStream) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(WRITE_LIMIT))?;
        socket.set_write_timeout(Some(WRITE_LIMIT))?;
        while tls.is_handshaking() {
            tls.complete_io(&mut socket)?;
        }
        socket.set_read_timeout(Some(SLICE))?;
        Ok(Self {
            tls,
            socket,
            plain: Vec::new(),
            skip: 0,
            heard: Heard::default(),
        })
    }

    /// Sends `bytes` in records of their own.
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        // What the library holds at a time is bounded, so in pieces.
        for piece in bytes.chunks(16 << 10) {
            self.tls.writer().write_all(piece)?;
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.socket)?;
        }
        Ok(())
    }

    /// Reads what there is, into `buffer`.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.tls.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
            if self.tls.read_tls(&mut self.socket)? == 0 {
                // The library tells whether this end was announced, if it is asked again.
                let announced = self.tls.reader().read(buffer);
                return match announced {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        Err(io::ErrorKind::UnexpectedEof.into())
                    }
                    told => told,
                };
            }
            self.tls.process_new_packets().map_err(io::Error::other)?;
            // Answers of TLS itself; who does not take them has ended.
            let _ = self.flush();
        }
    }

    /// Sends bytes below TLS.
    pub(super) fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Updates the sending key, asking the peer to do so too.
    pub(super) fn update_keys(&mut self) -> io::Result<()> {
        self.tls.refresh_traffic_keys().map_err(io::Error::other)?;
        self.flush()
    }

    /// Ends the TCP connection's sending side without TLS's close_notify.
    pub(super) fn cut(&mut self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Write)
    }

    /// What came back so far, without reading.
    pub(super) fn heard(&self) -> &Heard {
        &self.heard
    }

    /// Reads until `enough` or `patience` is over, without patience what is there; returns what was
    /// heard in all.
    pub(super) fn hear(
        &mut self,
        patience: Duration,
        mut enough: impl FnMut(&Heard) -> bool,
    ) -> &Heard {
        let at_once = patience.is_zero();
        let deadline = Instant::now() + patience;
        let mut buffer = vec![0; 64 << 10];
        // Fails, if ever, on a socket that the reads below fail on.
        let _ = self.socket.set_nonblocking(at_once);
        while self.heard.ended.is_none()
            && (at_once || !enough(&self.heard) && Instant::now() < deadline)
        {
            match self.read(&mut buffer) {
                Ok(0) => self.heard.ended = Some("closed".to_owned()),
                Ok(n) => {
                    self.plain.extend_from_slice(&buffer[..n]);
                    self.take_frames();
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock if at_once => break,
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {}
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::UnexpectedEof => {
                        self.heard.ended = Some("closed without close_notify".to_owned());
                    }
                    io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                        self.heard.ended = Some("reset".to_owned());
                    }
                    _ => self.heard.ended = Some(error.to_string()),
                },
            }
        }
        let _ = self.socket.set_nonblocking(false);
        &self.heard
    }

    /// Whether the tunnel still answers a PING.
    pub(super) fn lives(&mut self, patience: Duration) -> bool {
        let before = self.heard.pongs;
        self.send(&ping()).is_ok() && {
            self.hear(patience, |heard| heard.pongs > before || heard.over());
            self.heard.pongs > before && !self.heard.over()
        }
    }

    fn take_frames(&mut self) {
        let mut at = self.skip.min(self.plain.len());
        self.skip -= at;
        while let [a, b, c, kind, flags, w, x, y, z, rest @ ..] = &self.plain[at..] {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            let Some(payload) = rest.get(..length) else {
                break;
            };
            let stream = u32::from_be_bytes([w & 0x7f, *x, *y, *z]);
            let word = |at: usize| {
                let bytes = payload.get(at..at + 4).and_then(|b| b.try_into().ok());
                u32::from_be_bytes(bytes.unwrap_or_default())
            };
            match *kind {
                DATA => self.heard.data += length as u64,
                HEADERS => {
                    let status = status(payload).unwrap_or_default();
                    self.heard.statuses.push((stream, status));
                    self.heard.opened.push(stream);
                }
                RST_STREAM => self.heard.resets.push((stream, word(0))),
                GOAWAY => self.heard.go_away = Some(word(4)),
                PING => self.heard.pongs += usize::from(flags & ACK != 0),
                SETTINGS => self.heard.acks += usize::from(flags & ACK != 0),
                _ => {}
            }
            at += 9 + length;
        }
        self.plain.drain(..at);
    }
}
