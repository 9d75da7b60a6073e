//! What the load generator does, and between which pods. Pure data.

/// Connections of the open loop and of the closed one that finds its rates.
pub(super) const OPEN_CONNECTIONS: u32 = 32;

/// Where the server is, seen from the client on node A.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Scope {
    CrossNode,
    SameNode,
}

impl Scope {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::CrossNode => "cross-node",
            Self::SameNode => "same-node",
        }
    }

    /// The host the server runs on.
    pub(super) fn server(self) -> &'static str {
        match self {
            Self::CrossNode => "server-b",
            Self::SameNode => "server-a",
        }
    }
}

/// What the load generator does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Workload {
    Rr,
    Stream,
    Connect,
    RrOpen,
    /// As `Rr`, with a plain listener in ztunnel's place.
    RedirectRr,
    /// As `Connect`, with a plain listener in ztunnel's place.
    RedirectConnect,
}

impl Workload {
    pub(super) const ALL: [Self; 6] = [
        Self::Rr,
        Self::Stream,
        Self::Connect,
        Self::RrOpen,
        Self::RedirectRr,
        Self::RedirectConnect,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Rr => "rr",
            Self::Stream => "stream",
            Self::Connect => "connect",
            Self::RrOpen => "rr-open",
            Self::RedirectRr => "redirect-rr",
            Self::RedirectConnect => "redirect-connect",
        }
    }

    /// Whether ztunnels are left out: the price of redirection alone.
    pub(super) fn redirection_only(self) -> bool {
        matches!(self, Self::RedirectRr | Self::RedirectConnect)
    }

    /// The load generator's command.
    pub(super) fn command(self) -> &'static str {
        match self {
            Self::Rr | Self::RrOpen | Self::RedirectRr => "rr",
            Self::Stream => "stream",
            Self::Connect | Self::RedirectConnect => "connect",
        }
    }

    /// The server's mode.
    pub(super) fn server_mode(self) -> &'static str {
        match self {
            Self::Stream => "sink",
            _ => "echo",
        }
    }

    /// Numbers of connections it is measured at.
    pub(super) fn connections(self, scope: Scope, quick: bool) -> &'static [u32] {
        match (self, scope) {
            (Self::Rr, Scope::SameNode) if quick => &[32],
            (Self::Rr, _) => &[1, 32, 256],
            (Self::Stream, Scope::CrossNode) if !quick => &[1, 8],
            (Self::Stream, _) => &[8],
            (Self::Connect, _) => &[16],
            (Self::RrOpen, _) => &[OPEN_CONNECTIONS],
            // Between nodes there would be nothing to leave out: each end redirects by itself.
            (Self::RedirectRr | Self::RedirectConnect, Scope::CrossNode) => &[],
            (Self::RedirectRr, _) if quick => &[32],
            (Self::RedirectRr, _) => &[1, 32],
            (Self::RedirectConnect, _) if quick => &[16],
            (Self::RedirectConnect, _) => &[1, 16],
        }
    }

    pub(super) fn size_bytes(self) -> u32 {
        match self {
            Self::Stream => 0,
            _ => 64,
        }
    }
}
