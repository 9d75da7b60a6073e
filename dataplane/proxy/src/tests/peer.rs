//! The other end of a tunnel, played by the test on a blocking socket: it has a certificate, makes
//! records like anybody else, and puts into them whatever it is told to.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};

use identity::WorkloadTls;
use tls::{Handshake, Opened, Session};

use super::{HANG, identity};

/// A peer that has shaken hands.
pub(super) struct Peer {
    pub(super) stream: TcpStream,
    pub(super) session: Session,
    received: Vec<u8>,
}

/// What one record was.
pub(super) enum Received {
    Data(Vec<u8>),
    /// Nothing for the application.
    Control,
    /// close_notify.
    Closed,
    /// The record ends the session: an alert, or one that does not open.
    Failed(String),
}

impl Peer {
    pub(super) fn connect(addr: SocketAddr, tls: &WorkloadTls) -> Self {
        let stream = TcpStream::connect(addr).unwrap();
        Self::client(stream, tls)
    }

    /// As [`connect`](Self::connect), over a connection that is there.
    pub(super) fn client(stream: TcpStream, tls: &WorkloadTls) -> Self {
        // A tunnel that does not end when it should fails the test and does not stop it.
        stream.set_read_timeout(Some(HANG)).unwrap();
        let handshake = Handshake::client(&tls.client, &identity("app"));
        Self::over(stream, handshake.unwrap())
    }

    /// The server's end.
    pub(super) fn accept(stream: TcpStream, tls: &WorkloadTls) -> Self {
        Self::over(stream, Handshake::server(&tls.server).unwrap())
    }

    pub(super) fn over(mut stream: TcpStream, mut handshake: Handshake) -> Self {
        let (mut output, mut input) = (Vec::new(), [0; 4096]);
        let mut n = 0;
        loop {
            let progress = handshake.advance(&input[..n], &mut output).unwrap();
            stream.write_all(&output).unwrap();
            output.clear();
            if let Some(session) = progress.established {
                let received = input[progress.consumed..n].to_vec();
                return Self {
                    stream,
                    session,
                    received,
                };
            }
            n = stream.read(&mut input).unwrap();
        }
    }

    /// A sealed record of `plaintext`.
    pub(super) fn record(&mut self, plaintext: &[u8]) -> Vec<u8> {
        let mut record = vec![0; Session::RECORD_HEADER];
        record.extend_from_slice(plaintext);
        record.resize(record.len() + Session::RECORD_TRAILER, 0);
        self.session.seal(&mut record).unwrap();
        record
    }

    /// Sends `plaintext` in as many records as it takes.
    pub(super) fn send(&mut self, plaintext: &[u8]) -> io::Result<()> {
        for piece in plaintext.chunks(Session::MAX_PLAINTEXT) {
            let record = self.record(piece);
            self.stream.write_all(&record)?;
        }
        Ok(())
    }

    /// The next record; none at the end of the connection.
    pub(super) fn receive(&mut self) -> Option<Received> {
        loop {
            if let Ok(Some(len)) = Session::record_len(&self.received)
                && len <= self.received.len()
            {
                let mut record: Vec<u8> = self.received.drain(..len).collect();
                return Some(match self.session.open(&mut record) {
                    Ok(Opened::Data(range)) => Received::Data(record[range].to_vec()),
                    Ok(Opened::Handled) => Received::Control,
                    Ok(Opened::Closed) => Received::Closed,
                    Err(error) => Received::Failed(error.to_string()),
                });
            }
            let mut buf = [0; 16_384];
            match self.stream.read(&mut buf) {
                Ok(0) => return None,
                Ok(n) => self.received.extend_from_slice(&buf[..n]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("the tunnel was not ended: {error}"),
            }
        }
    }
}

/// An HTTP/2 frame.
pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}
