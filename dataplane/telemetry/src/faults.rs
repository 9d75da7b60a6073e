//! Reasons for which tunnels and their streams are given up, as label values of
//! `ztunnel_hbone_errors_total`, and what else is counted once per worker.

/// Why a tunnel did not come to be or ended early, or a stream was reset for breaking HTTP/2.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Fault {
    /// The worker has as many handshakes under way and waiting as it may.
    HandshakeOverload,
    /// A handshake took too long.
    HandshakeTimeout,
    /// The transport ended during the handshake.
    HandshakeClosed,
    /// The peer broke the handshake, or does not speak TLS.
    Handshake,
    /// We do not accept the peer's certificate.
    TlsRefused,
    /// The peer ended TLS by an alert.
    TlsAlert,
    /// A record that does not authenticate, is too long or may not come.
    TlsRecord,
    /// The transport ended without close_notify, or in the middle of a record.
    Truncated,
    /// The first bytes are not those of HTTP/2.
    Preface,
    /// FRAME_SIZE_ERROR.
    FrameSize,
    /// PROTOCOL_ERROR.
    Protocol,
    /// FLOW_CONTROL_ERROR.
    FlowControl,
    /// STREAM_CLOSED.
    StreamClosed,
    /// COMPRESSION_ERROR.
    Compression,
    /// ENHANCE_YOUR_CALM: load without progress.
    Flood,
    /// A single stream was reset because the peer broke HTTP/2 on it.
    Stream,
    /// The peer makes us answer and reads nothing.
    Unread,
    /// No answer to PING.
    Keepalive,
    /// The transport failed.
    Io,
}

impl Fault {
    /// Every one, in the order of their numbers.
    pub const ALL: [Self; 19] = [
        Self::HandshakeOverload,
        Self::HandshakeTimeout,
        Self::HandshakeClosed,
        Self::Handshake,
        Self::TlsRefused,
        Self::TlsAlert,
        Self::TlsRecord,
        Self::Truncated,
        Self::Preface,
        Self::FrameSize,
        Self::Protocol,
        Self::FlowControl,
        Self::StreamClosed,
        Self::Compression,
        Self::Flood,
        Self::Stream,
        Self::Unread,
        Self::Keepalive,
        Self::Io,
    ];
    pub(crate) const COUNT: usize = Self::ALL.len();

    /// Value of the label `reason`.
    pub const fn label(self) -> &'static str {
        match self {
            Self::HandshakeOverload => "handshake_overload",
            Self::HandshakeTimeout => "handshake_timeout",
            Self::HandshakeClosed => "handshake_closed",
            Self::Handshake => "handshake",
            Self::TlsRefused => "tls_refused",
            Self::TlsAlert => "tls_alert",
            Self::TlsRecord => "tls_record",
            Self::Truncated => "truncated",
            Self::Preface => "preface",
            Self::FrameSize => "frame_size",
            Self::Protocol => "protocol",
            Self::FlowControl => "flow_control",
            Self::StreamClosed => "stream_closed",
            Self::Compression => "compression",
            Self::Flood => "flood",
            Self::Stream => "stream",
            Self::Unread => "unread",
            Self::Keepalive => "keepalive",
            Self::Io => "io",
        }
    }
}

/// Something worth counting that is no error of one connection.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Event {
    /// A CONNECT that the peer had not processed was sent again.
    Retry,
    /// A stream had data and no window.
    WindowStall,
    /// A connection was closed because a later configuration does not allow it.
    Revoked,
}

impl Event {
    pub(crate) const COUNT: usize = 3;
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn numbers_and_labels_are_those_of_the_list() {
        let labels: BTreeSet<_> = Fault::ALL.iter().map(|fault| fault.label()).collect();
        assert_eq!(labels.len(), Fault::COUNT);
        assert!(
            Fault::ALL
                .iter()
                .enumerate()
                .all(|(n, fault)| *fault as usize == n)
        );
        assert_eq!(Event::Revoked as usize + 1, Event::COUNT);
    }
}
