//! Telling the eBPF redirection which listener takes the connections that arrive on which CPU.
//!
//! The node agent pins a socket map; this registers each worker's listeners in it, and again when
//! the agent has replaced the map. A younger ztunnel of the same namespace takes the slots of the
//! elder. Until it has succeeded once the process is not ready. While
//! packets go to a ztunnel in another network namespace (one takes over from the other), nothing is
//! registered: the map is that one's. Where the agent's sockmap between sockets is asked for, the
//! listeners ask for it here, too.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proxy::Listeners;
use redirect::{ListenerMap, Role};
use telemetry::PendingTask;

use crate::handover::Neighbours;
use crate::sockmap::Sockmap;

/// How often the pinned map is looked at.
const INTERVAL: Duration = Duration::from_millis(200);

/// The listeners to register, in the order of workers.
#[derive(Debug)]
pub(crate) struct Steering {
    path: PathBuf,
    listeners: Vec<[(Role, TcpListener); 3]>,
    cpus: Vec<u32>,
    sockmap: Option<Arc<Sockmap>>,
    neighbours: Neighbours,
}

impl Steering {
    /// Keeps a second descriptor of each listener.
    pub(crate) fn new(
        path: &Path,
        listeners: &[Listeners],
        cpus: &[u32],
        sockmap: Option<Arc<Sockmap>>,
        neighbours: &Neighbours,
    ) -> io::Result<Self> {
        let listeners = listeners
            .iter()
            .map(|set| {
                Ok([
                    (Role::Outbound, set.outbound.try_clone()?),
                    (Role::InboundPlain, set.inbound_plain.try_clone()?),
                    (Role::InboundHbone, set.inbound_hbone.try_clone()?),
                ])
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            path: path.to_owned(),
            listeners,
            cpus: cpus.to_owned(),
            sockmap,
            neighbours: neighbours.clone(),
        })
    }

    /// Registers now, whenever the map is another one, and when another ztunnel has ended: where
    /// the map was replaced while both were there, slots may have been that one's.
    pub(crate) async fn run(self, pending: PendingTask) {
        let mut pending = Some(pending);
        let mut registered = None;
        let mut reported = String::new();
        let mut accompanied = self.neighbours.are_there();
        loop {
            if std::mem::replace(&mut accompanied, self.neighbours.are_there()) && !accompanied {
                registered = None;
            }
            if let Some(sockmap) = &self.sockmap {
                let listeners = self.listeners.iter().flatten();
                sockmap.follow(listeners.map(|(_, listener)| listener.as_fd()));
            }
            let current = fs::metadata(&self.path)
                .map(|pin| (pin.dev(), pin.ino()))
                .ok();
            let is_ours = ListenerMap::is_for_this_namespace(&self.path);
            if matches!(is_ours, Ok(false)) {
                registered = None;
            }
            if current != registered || registered.is_none() {
                match is_ours.and_then(|is_ours| self.register_if(is_ours)) {
                    Ok(()) => {
                        tracing::info!("listeners registered in {}", self.path.display());
                        registered = current;
                        reported.clear();
                        if let Some(pending) = pending.take() {
                            pending.ready();
                        }
                    }
                    Err(error) => {
                        let text = error.to_string();
                        if text != reported {
                            tracing::warn!("listeners not registered, trying again: {text}");
                            reported = text;
                        }
                    }
                }
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    fn register_if(&self, is_ours: bool) -> Result<(), redirect::Error> {
        if is_ours {
            return self.register();
        }
        Err(redirect::Error::Setting {
            field: "ZTUNNEL_LISTENER_MAP",
            value: self.path.display().to_string(),
            reason: "is for the ztunnel of another network namespace".to_owned(),
        })
    }

    /// Every CPU of the machine gets a worker: its own where it has one.
    fn register(&self) -> Result<(), redirect::Error> {
        let mut map = ListenerMap::open(&self.path)?;
        for cpu in 0..configured_cpus() {
            let worker = worker_of(cpu, &self.cpus, self.listeners.len());
            for (role, listener) in &self.listeners[worker] {
                map.set(*role, cpu, listener.as_fd())?;
            }
        }
        Ok(())
    }
}

/// The worker that takes what arrives on `cpu`: its own if there is one. The others are dealt out
/// in turn, so that a limit on workers or CPUs leaves no CPU without a listener.
fn worker_of(cpu: u32, cpus: &[u32], workers: usize) -> usize {
    let own = cpus.iter().position(|own| *own == cpu);
    own.filter(|worker| *worker < workers)
        .unwrap_or(cpu as usize % workers)
}

/// CPUs the machine has, whether or not this process may use them: packets arrive on all.
fn configured_cpus() -> u32 {
    use nix::unistd::{SysconfVar, sysconf};
    let count = sysconf(SysconfVar::_NPROCESSORS_CONF).ok().flatten();
    count
        .and_then(|count| u32::try_from(count).ok())
        .unwrap_or(1)
        .max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_fewer_workers_than_cpus_every_cpu_has_one() {
        let dealt = |cpus: &[u32], workers, machine| -> Vec<usize> {
            (0..machine)
                .map(|cpu| worker_of(cpu, cpus, workers))
                .collect()
        };
        assert_eq!(dealt(&[0, 1, 2, 3], 4, 4), [0, 1, 2, 3]);
        assert_eq!(dealt(&[0, 1, 2, 3], 1, 4), [0, 0, 0, 0]);
        assert_eq!(dealt(&[0, 1, 2, 3], 2, 4), [0, 1, 0, 1]);
        // Only CPUs 4 and 6 of eight may be used.
        assert_eq!(dealt(&[4, 6], 2, 8), [0, 1, 0, 1, 0, 1, 1, 1]);
    }
}
