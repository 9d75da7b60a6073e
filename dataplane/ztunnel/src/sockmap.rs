//! The node agent's sockmap between pods' sockets and ztunnel's (`SOCKMAP=on`): ztunnel marks the
//! sockets that may take it, and asks whether they have left it before it splices. Sockets without
//! a mark never take it.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use redirect::sockmap::Sockets;

/// Marks sockets; what fails costs only speed.
#[derive(Debug)]
pub(crate) struct Sockmap {
    sockets: Sockets,
    /// What was said of the last failure to follow.
    reported: Mutex<String>,
}

impl Sockmap {
    /// The one whose maps are pinned beside `listener_map`.
    pub(crate) fn new(listener_map: &Path) -> Self {
        Self {
            sockets: Sockets::new(listener_map),
            reported: Mutex::default(),
        }
    }

    /// Marks the listeners whenever the sockmap is another one.
    pub(crate) fn follow<'a>(&self, listeners: impl IntoIterator<Item = BorrowedFd<'a>>) {
        let text = match self.sockets.follow(listeners) {
            Ok(true) => {
                tracing::info!("sockmap: new connections may take it");
                String::new()
            }
            Ok(false) => String::new(),
            Err(error) => error.to_string(),
        };
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if *reported != text && !text.is_empty() {
            tracing::warn!("sockmap, new connections use TCP: {text}");
        }
        *reported = text;
    }
}

impl proxy::SockmapBypass for Sockmap {
    fn offer(&self, socket: BorrowedFd<'_>) {
        if let Err(error) = self.sockets.mark(socket) {
            tracing::debug!("sockmap, a connection uses TCP: {error}");
        }
    }

    fn is_plain(&self, socket: BorrowedFd<'_>) -> bool {
        self.sockets.is_plain(socket)
    }
}
