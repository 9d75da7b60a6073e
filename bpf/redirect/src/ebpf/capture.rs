//! Capturing one pod after another: map entries, programs, and the connections it has already.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::Path;

use super::attach::{Attacher, Hook};
use super::existing_connections;
use super::layout::{self, POD_ENROLLING, POD_OLDER};
use super::maps::{FlowKey, OlderFlows, Pods};
use crate::error::{Error, Result};
use crate::settings::Pod;

/// A pod that is being added.
pub(crate) struct Addition<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) index: u32,
    /// Not captured before.
    pub(crate) is_new: bool,
}

impl Addition<'_> {
    pub(crate) fn hooks(&self) -> [Hook<'_>; 2] {
        [layout::APP_OUTBOUND, layout::APP_INBOUND].map(|program| Hook {
            program,
            interface: &self.pod.host_interface,
            index: self.index,
            owner: Some(&self.pod.uid),
            cut_off: false,
        })
    }
}

/// What adding pods needs open.
pub(crate) struct Capture<'a> {
    attacher: Attacher<'a>,
    pods: Pods,
    older: OlderFlows,
    ztunnel: &'a Path,
    /// ztunnel's connections seen from their other ends; read when a pod has any.
    ztunnels: Option<HashSet<(SocketAddr, SocketAddr)>>,
    broken: u64,
}

impl<'a> Capture<'a> {
    /// `ztunnel` is the path of its network namespace.
    pub(crate) fn begin(attacher: Attacher<'a>, ztunnel: &'a Path) -> Result<Self> {
        Ok(Self {
            pods: Pods::open(attacher.pins)?,
            older: OlderFlows::open(attacher.pins)?,
            attacher,
            ztunnel,
            ztunnels: None,
            broken: 0,
        })
    }

    /// Connections that found no place and break.
    pub(crate) fn broken(&self) -> u64 {
        self.broken
    }

    /// The map comes first, so that no packet the programs hand on meets a ztunnel that takes the
    /// pod for a stranger. Connections are listed before the programs are attached and again
    /// after, for those that came in between; until then the programs drop what may be of one.
    pub(crate) fn add(&mut self, addition: &Addition<'_>) -> Result<()> {
        let Addition { pod, index, is_new } = *addition;
        let mut older = Older::default();
        if is_new {
            self.list_older(pod, &mut older, false);
            self.pods.set(pod, index, POD_OLDER | POD_ENROLLING)?;
        } else if self.pods.get(pod).is_none() {
            self.pods.set(pod, index, 0)?;
        }
        for hook in addition.hooks() {
            self.attacher.attach(hook)?;
        }
        if is_new {
            // What ztunnel has by now may have come through the programs already.
            self.list_older(pod, &mut older, true);
            let flags = if older.kept.is_empty() { 0 } else { POD_OLDER };
            self.pods.set(pod, index, flags)?;
            self.tell_broken(pod, &older);
        }
        Ok(())
    }

    /// Puts the pod's connections into the map and into `older`, less those with ztunnel. What does
    /// not fit, or cannot be told from ztunnel's, is captured like all else: ztunnel has no such
    /// connection and resets it.
    fn list_older(&mut self, pod: &Pod, older: &mut Older, look_again: bool) {
        let all = match existing_connections::connections(&pod.netns) {
            Ok(all) => all,
            Err(error) => {
                tracing::warn!(%error, uid = pod.uid, "open connections cannot be seen and break");
                return;
            }
        };
        let mut keys = existing_connections::keys(&all, pod);
        keys.retain(|key| !older.kept.contains(key) && !older.broken.contains(key));
        if keys.is_empty() {
            return;
        }
        let ztunnels = match self.ztunnels.take().filter(|_| !look_again) {
            Some(known) => known,
            None => match existing_connections::connections(self.ztunnel) {
                Ok(all) => existing_connections::mirrored(all),
                Err(error) => {
                    older.why = Some(error);
                    older.broken.extend(keys);
                    return;
                }
            },
        };
        let of_ztunnel = existing_connections::keys(&ztunnels, pod);
        self.ztunnels = Some(ztunnels);
        for key in keys.difference(&of_ztunnel) {
            let has_room = older.why.is_none() && older.kept.len() < layout::OLDER_FLOWS_PER_POD;
            if has_room && let Err(error) = self.older.add(*key) {
                older.why = Some(error);
            }
            if has_room && older.why.is_none() {
                older.kept.insert(*key);
            } else {
                older.broken.insert(*key);
            }
        }
    }

    fn tell_broken(&mut self, pod: &Pod, older: &Older) {
        let broken = older.broken.len();
        if broken == 0 {
            return;
        }
        self.broken += broken as u64;
        let (uid, kept) = (&pod.uid, older.kept.len());
        let why = match &older.why {
            Some(error) => error.to_string(),
            None => format!("a pod's share is {}", layout::OLDER_FLOWS_PER_POD),
        };
        tracing::warn!(
            uid,
            kept,
            broken,
            why,
            "connections older than the capture break"
        );
    }
}

/// A pod's connections that are older than its capture.
#[derive(Default)]
struct Older {
    /// In the map.
    kept: HashSet<FlowKey>,
    /// For which there was no place.
    broken: HashSet<FlowKey>,
    /// Why, if not because the pod has its share.
    why: Option<Error>,
}
