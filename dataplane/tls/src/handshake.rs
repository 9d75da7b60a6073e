//! The handshake, sans-io: bytes from the peer in, bytes for the peer out, a session at the end.
//!
//! rustls' unbuffered connection is given one record at a time. It would otherwise go on to
//! decrypt what the client sent right behind its Finished, and those bytes belong to the session.
//!
//! Time is the caller's: it gives up on peers that take too long.
//!
//! Limits: a peer may send [`MAX_HANDSHAKE`] bytes before the handshake is complete. On failure
//! the output holds the alert to send, if one is due, and the handshake is over. A peer that offers
//! no application protocol at all is accepted; one that offers only others is not.

use std::fmt;
use std::mem;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{AlertDescription, ClientConnection, CommonState, ExtractedSecrets, ServerConnection};
use rustls_pki_types::ServerName;

use crate::peer::{Acceptance, ExpectedPeers, Peer, PeerRefused};
use crate::record::{RECORD_HEADER, RecordPath, RecordTooLong, record_len};
use crate::session::{Buffered, InPlace, Keys, Layer, Session};
use crate::settings::{ClientSettings, ServerSettings};
use crate::verify::Case;

/// Bytes a peer may send during a handshake: more than any sane certificate chain.
pub const MAX_HANDSHAKE: usize = 128 * 1024;

/// Types of records: change_cipher_spec to application_data.
const CONTENT_TYPES: RangeInclusive<u8> = 20..=23;

/// Why there is no session. Messages are one line and name the peer as far as it is known.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// We do not accept the peer's certificate.
    #[error(transparent)]
    Refused(Box<PeerRefused>),
    /// The peer sent a fatal alert.
    #[error("the peer gave up with alert {0:?}{hint}", hint = alert_hint(*.0))]
    Alert(AlertDescription),
    /// The peer closed the TLS connection in the middle of the handshake.
    #[error("the peer closed the connection during the handshake")]
    Closed,
    /// More handshake bytes than allowed.
    #[error("the peer sent more than {MAX_HANDSHAKE} bytes without completing the handshake")]
    TooLarge,
    /// What was sent is not a TLS record, by its first byte.
    #[error("the peer does not speak TLS: record starts with byte {0:#04x}, expected 0x14 to 0x17")]
    NotTls(u8),
    /// What was sent is not a TLS record, by its length.
    #[error(transparent)]
    Record(#[from] RecordTooLong),
    /// The TLS library found the peer at fault, or refuses to go on.
    #[error("TLS handshake failed: {0}")]
    Tls(rustls::Error),
    /// The traffic keys cannot be used by the record layer.
    #[error("traffic keys unusable: {0}")]
    Keys(String),
    /// The handshake completed without the peer having been verified; never expected.
    #[error("the handshake completed without a verified peer certificate; refusing it")]
    NotAuthenticated,
    /// [`Handshake::advance`] was called after the handshake had ended.
    #[error("the handshake is over")]
    Over,
}

/// What one call of [`Handshake::advance`] achieved.
#[derive(Debug)]
pub struct Progress {
    /// Bytes of the input that belong to the handshake: all of them, unless a session was
    /// established; what remains is the session's first records.
    pub consumed: usize,
    /// The session, once. Output of the same call must be sent before anything it seals.
    pub established: Option<Session>,
}

/// A handshake in progress.
pub struct Handshake {
    state: State,
    /// Always there, but while the TLS library is at work.
    case: Option<Case>,
    /// The record being received, and records rustls keeps to join a fragmented message.
    pending: Vec<u8>,
    /// Where in `pending` the incomplete record starts.
    record_start: usize,
    /// Bytes received, against [`MAX_HANDSHAKE`].
    received: usize,
}

enum State {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
    /// Either side, where rustls does the records as well.
    Buffered(Box<rustls::Connection>),
    Over,
}

impl Handshake {
    /// Starts a handshake as the client; the first [`advance`](Self::advance), with empty input,
    /// produces the ClientHello.
    ///
    /// # Errors
    /// The TLS library refuses the settings.
    pub fn client(
        settings: &ClientSettings,
        expected: impl Into<ExpectedPeers>,
    ) -> Result<Self, HandshakeError> {
        let case = Case::new(Acceptance::Servers(expected.into()));
        // Servers are told apart by their SPIFFE identity. No server name is sent, and the
        // verifier ignores this one; the library wants some.
        let name = ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let config = settings.config();
        let state = match settings.records() {
            RecordPath::Own => UnbufferedClientConnection::new(config, name)
                .map(|connection| State::Client(Box::new(connection))),
            RecordPath::Rustls => ClientConnection::new(config, name)
                .map(|connection| State::Buffered(Box::new(connection.into()))),
        };
        Ok(Self::new(state.map_err(HandshakeError::Tls)?, case))
    }

    /// Starts a handshake as the server.
    ///
    /// # Errors
    /// The TLS library refuses the settings.
    pub fn server(settings: &ServerSettings) -> Result<Self, HandshakeError> {
        let case = Case::new(settings.acceptance());
        let config = settings.config();
        let state = match settings.records() {
            RecordPath::Own => UnbufferedServerConnection::new(config)
                .map(|connection| State::Server(Box::new(connection))),
            RecordPath::Rustls => ServerConnection::new(config)
                .map(|connection| State::Buffered(Box::new(connection.into()))),
        };
        Ok(Self::new(state.map_err(HandshakeError::Tls)?, case))
    }

    const fn new(state: State, case: Case) -> Self {
        Self {
            state,
            case: Some(case),
            pending: Vec::new(),
            record_start: 0,
            received: 0,
        }
    }

    /// Takes bytes from the peer, in any portions, and appends to `output` what is to be sent.
    ///
    /// # Errors
    /// The handshake failed; `output` may hold an alert to send before closing.
    pub fn advance(
        &mut self,
        input: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<Progress, HandshakeError> {
        let progress = self.try_advance(input, output);
        if progress.is_err() {
            self.flush_alert(output);
            self.state = State::Over;
        }
        progress
    }

    fn try_advance(
        &mut self,
        input: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<Progress, HandshakeError> {
        let mut consumed = 0;
        // Before any input: what is to be sent first.
        let mut complete = self.process(output)?;
        while !complete {
            let (taken, whole) = self.take_record(&input[consumed..])?;
            consumed += taken;
            if !whole {
                return Ok(Progress {
                    consumed,
                    established: None,
                });
            }
            complete = self.process(output)?;
        }
        let session = self.establish()?;
        Ok(Progress {
            consumed,
            established: Some(session),
        })
    }

    /// Moves bytes of at most one record from `input` to `pending`. Returns how many, and whether
    /// the record is now whole.
    fn take_record(&mut self, input: &[u8]) -> Result<(usize, bool), HandshakeError> {
        let mut taken = 0;
        loop {
            let record = &self.pending[self.record_start..];
            // Without this, plain text would look like the start of a long record.
            if let Some(first) = record
                .first()
                .filter(|first| !CONTENT_TYPES.contains(first))
            {
                return Err(HandshakeError::NotTls(*first));
            }
            let need = record_len(record)?.unwrap_or(RECORD_HEADER);
            let missing = need - record.len();
            if missing == 0 {
                self.record_start = self.pending.len();
                return Ok((taken, true));
            }
            let part = missing.min(input.len() - taken);
            if part == 0 {
                return Ok((taken, false));
            }
            self.received += part;
            if self.received > MAX_HANDSHAKE {
                return Err(HandshakeError::TooLarge);
            }
            self.pending.extend_from_slice(&input[taken..taken + part]);
            taken += part;
        }
    }

    /// Lets rustls work on the whole records in `pending`. True when the handshake is complete.
    fn process(&mut self, output: &mut Vec<u8>) -> Result<bool, HandshakeError> {
        let records = &mut self.pending[..self.record_start];
        let state = &mut self.state;
        let (discard, result) = Case::during(&mut self.case, || match state {
            State::Client(connection) => run(records, output, connection, |c, records, output| {
                step(c.process_tls_records(records), output)
            }),
            State::Server(connection) => run(records, output, connection, |c, records, output| {
                step(c.process_tls_records(records), output)
            }),
            State::Buffered(connection) => (records.len(), feed(connection, records, output)),
            State::Over => (0, Err(StepError::Over)),
        });
        self.pending.drain(..discard);
        self.record_start -= discard;
        result.map_err(|error| self.explain(error))
    }

    /// Takes the keys out of the completed handshake.
    fn establish(&mut self) -> Result<Session, HandshakeError> {
        if !self.pending.is_empty() {
            return Err(HandshakeError::Tls(rustls::Error::General(
                "bytes behind Finished in the same record".to_owned(),
            )));
        }
        let peer = self.authenticated_peer()?;
        self.pending = Vec::new();
        let layer = match mem::replace(&mut self.state, State::Over) {
            State::Client(connection) => connection
                .dangerous_into_kernel_connection()
                .map_err(HandshakeError::Tls)
                .and_then(|(secrets, kernel)| in_place(secrets, Keys::Client(kernel))),
            State::Server(connection) => connection
                .dangerous_into_kernel_connection()
                .map_err(HandshakeError::Tls)
                .and_then(|(secrets, kernel)| in_place(secrets, Keys::Server(kernel))),
            State::Buffered(connection) => {
                Ok(Layer::Buffered(Box::new(Buffered::new(*connection))))
            }
            State::Over => Err(HandshakeError::Over),
        };
        Ok(Session::new(peer, layer?))
    }

    /// The peer as the verifier accepted it in the course of this handshake.
    fn authenticated_peer(&self) -> Result<Peer, HandshakeError> {
        match self.outcome() {
            Some(Ok(peer)) => Ok(peer.clone()),
            Some(Err(refused)) => Err(HandshakeError::Refused(Box::new(refused.clone()))),
            None => Err(HandshakeError::NotAuthenticated),
        }
    }

    fn outcome(&self) -> Option<&Result<Peer, PeerRefused>> {
        self.case.as_ref().and_then(Case::outcome)
    }

    /// Says whom we refused where rustls only knows that the certificate was invalid.
    fn explain(&self, error: StepError) -> HandshakeError {
        match error {
            StepError::Over => HandshakeError::Over,
            StepError::Closed => HandshakeError::Closed,
            StepError::Library(rustls::Error::AlertReceived(alert)) => HandshakeError::Alert(alert),
            StepError::Library(error) => match self.outcome() {
                Some(Err(refused)) => HandshakeError::Refused(Box::new(refused.clone())),
                _ => HandshakeError::Tls(error),
            },
        }
    }

    /// Appends the alert rustls has queued for the error it reported, if any.
    fn flush_alert(&mut self, output: &mut Vec<u8>) {
        // After an error rustls answers with what is queued before it looks at input again, so
        // nothing but encoding can happen here.
        match &mut self.state {
            State::Client(connection) => {
                while connection.wants_write()
                    && step(connection.process_tls_records(&mut []), output)
                        .1
                        .is_ok()
                {}
            }
            State::Server(connection) => {
                while connection.wants_write()
                    && step(connection.process_tls_records(&mut []), output)
                        .1
                        .is_ok()
                {}
            }
            State::Buffered(connection) => {
                // Encoding into a vector; what rustls still wants to say is the alert.
                let _ = drain(connection, output);
            }
            State::Over => {}
        }
    }
}

impl fmt::Debug for Handshake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.state {
            State::Client(_) => "client",
            State::Server(_) => "server",
            State::Buffered(_) => "by rustls",
            State::Over => "over",
        };
        f.debug_struct("Handshake")
            .field("side", &side)
            .field("received", &self.received)
            .finish_non_exhaustive()
    }
}

fn in_place(secrets: ExtractedSecrets, keys: Keys) -> Result<Layer, HandshakeError> {
    InPlace::new(secrets, keys)
        .map(Layer::InPlace)
        .map_err(|error| HandshakeError::Keys(error.to_string()))
}

/// Has a buffered connection work on whole records. True when the handshake is complete.
fn feed(
    connection: &mut rustls::Connection,
    mut records: &[u8],
    output: &mut Vec<u8>,
) -> Result<bool, StepError> {
    while !records.is_empty() {
        let taken = connection.read_tls(&mut records).map_err(|error| {
            StepError::Library(rustls::Error::General(format!(
                "cannot take records: {error}"
            )))
        })?;
        let state = connection
            .process_new_packets()
            .map_err(StepError::Library)?;
        if state.peer_has_closed() || taken == 0 {
            return Err(StepError::Closed);
        }
    }
    drain(connection, output).map_err(StepError::Library)?;
    Ok(!connection.is_handshaking())
}

/// Appends what a buffered connection wants to send.
fn drain(connection: &mut rustls::Connection, output: &mut Vec<u8>) -> Result<(), rustls::Error> {
    while connection.wants_write() {
        connection
            .write_tls(output)
            .map_err(|error| rustls::Error::General(format!("cannot encode: {error}")))?;
    }
    Ok(())
}

/// What rustls wants next.
enum Step {
    /// Call it again.
    Again,
    /// Nothing to do before the next record.
    NeedRecord,
}

enum StepError {
    /// There was nothing left to do.
    Over,
    Closed,
    Library(rustls::Error),
}

/// Calls `step` on `connection` until it wants another record. Returns the bytes at the front of
/// `records` that are done with, and whether the handshake is complete.
fn run<C>(
    records: &mut [u8],
    output: &mut Vec<u8>,
    connection: &mut C,
    mut step: impl FnMut(&mut C, &mut [u8], &mut Vec<u8>) -> (usize, Result<Step, StepError>),
) -> (usize, Result<bool, StepError>)
where
    C: Connection,
{
    let complete = |connection: &C| {
        let common = connection.common();
        !common.is_handshaking() && !common.wants_write()
    };
    let mut discarded = 0;
    loop {
        // Checked before each step: a step on a completed handshake would read on.
        if complete(connection) {
            return (discarded, Ok(true));
        }
        let (discard, result) = step(connection, &mut records[discarded..], output);
        discarded += discard;
        match result {
            Ok(Step::Again) => {}
            Ok(Step::NeedRecord) => return (discarded, Ok(complete(connection))),
            Err(error) => return (discarded, Err(error)),
        }
    }
}

/// Acts on one status of rustls. Returns the bytes it is done with beside what it wants.
fn step<Data>(
    UnbufferedStatus { discard, state, .. }: UnbufferedStatus<'_, '_, Data>,
    output: &mut Vec<u8>,
) -> (usize, Result<Step, StepError>) {
    let result = match state {
        Err(error) => Err(StepError::Library(error)),
        Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut data, output)
            .map(|()| Step::Again)
            .map_err(|error| {
                StepError::Library(rustls::Error::General(format!("cannot encode: {error}")))
            }),
        Ok(ConnectionState::TransmitTlsData(transmit)) => {
            transmit.done();
            Ok(Step::Again)
        }
        Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => {
            Ok(Step::NeedRecord)
        }
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Err(StepError::Closed),
        // Early data is off, and traffic is not read here.
        Ok(_) => Err(StepError::Library(rustls::Error::General(
            "application data during the handshake".to_owned(),
        ))),
    };
    (discard, result)
}

/// Appends one chunk of handshake data to `output`.
fn encode<Data>(
    data: &mut EncodeTlsData<'_, Data>,
    output: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let start = output.len();
    // The first try tells the size.
    let required = match data.encode(&mut []) {
        Ok(_) => return Ok(()),
        Err(EncodeError::InsufficientSize(size)) => size.required_size,
        Err(error) => return Err(error),
    };
    output.resize(start + required, 0);
    data.encode(&mut output[start..]).map(|_| ())
}

/// The part of a connection both sides share.
trait Connection {
    fn common(&self) -> &CommonState;
}

impl Connection for Box<UnbufferedClientConnection> {
    fn common(&self) -> &CommonState {
        self
    }
}

impl Connection for Box<UnbufferedServerConnection> {
    fn common(&self) -> &CommonState {
        self
    }
}

/// What usually makes a peer send an alert.
const fn alert_hint(alert: AlertDescription) -> &'static str {
    match alert {
        AlertDescription::UnknownCA => "; it does not trust the CA of our certificate",
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::AccessDenied => "; it does not accept our identity",
        AlertDescription::CertificateExpired => "; our certificate expired, or a clock is wrong",
        AlertDescription::CertificateRequired => "; it wants a client certificate",
        AlertDescription::HandshakeFailure
        | AlertDescription::ProtocolVersion
        | AlertDescription::InsufficientSecurity => "; it does not support TLS 1.3 with AES-GCM",
        AlertDescription::NoApplicationProtocol => "; it does not speak HTTP/2",
        _ => "",
    }
}
