//! What the maps hold of pods: their addresses, and the connections that are older than their
//! capture.

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::Path;

use super::existing_connections;
use super::layout::{self, POD_ENROLLING, POD_OLDER};
use super::maps::{OlderFlows, Pods};
use crate::error::Result;
use crate::settings::Pod;
use crate::system::links::Links;

/// Makes the map hold the addresses of these pods: those that a lost map had, and no others.
pub(crate) fn restore(pins: &Path, pods: &[Pod], links: &Links) -> Result<()> {
    let mut map = Pods::open(pins)?;
    map.retain(pods)?;
    for pod in pods {
        if map.get(pod).is_none()
            && let Ok(index) = links.index(&pod.host_interface)
        {
            map.set(pod, index, 0)?;
        }
    }
    Ok(())
}

/// Takes pods out of the maps.
pub(crate) fn forget(pins: &Path, pods: &[Pod], uids: &[&str]) -> Result<()> {
    if !pins.join(layout::PODS).exists() {
        return Ok(());
    }
    let uids: HashSet<_> = uids.iter().copied().collect();
    let mut map = Pods::open(pins)?;
    let mut addresses: HashSet<IpAddr> = HashSet::new();
    for pod in pods.iter().filter(|pod| uids.contains(pod.uid.as_str())) {
        addresses.extend(pod.addresses.iter().copied());
        map.remove(pod)?;
    }
    let mut older = OlderFlows::open(pins)?;
    for key in older.all()? {
        if addresses.contains(&existing_connections::pod_address(&key)) {
            older.remove(&key)?;
        }
    }
    Ok(())
}

/// Forgets older connections that have ended. A pod without any costs its packets nothing more.
pub(crate) fn forget_ended(pins: &Path, pods: &[Pod]) -> Result<()> {
    if !pins.join(layout::PODS).exists() {
        return Ok(()); // somebody removed it; the next look at what is missing brings it back
    }
    let (mut map, mut older) = (Pods::open(pins)?, OlderFlows::open(pins)?);
    let all = older.all()?;
    for pod in pods {
        let Some([index, flags]) = map.get(pod).filter(|[_, flags]| flags & POD_OLDER != 0) else {
            continue;
        };
        // A pod whose network namespace is gone has none.
        let open = existing_connections::connections(&pod.netns).unwrap_or_default();
        let open = existing_connections::keys(&open, pod);
        let own = all.iter().filter(|key| {
            pod.addresses
                .contains(&existing_connections::pod_address(key))
        });
        let (alive, ended): (Vec<_>, Vec<_>) = own.partition(|key| open.contains(*key));
        for key in ended {
            older.remove(key)?;
        }
        if alive.is_empty() {
            map.set(pod, index, flags & !(POD_OLDER | POD_ENROLLING))?;
        }
    }
    Ok(())
}

/// Connections that are left alone because they are older than their pod's capture.
pub(crate) fn older_count(pins: &Path) -> usize {
    OlderFlows::open(pins)
        .and_then(|map| map.all())
        .map_or(0, |all| all.len())
}
