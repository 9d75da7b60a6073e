//! Adding and removing pods, many at once.
//!
//! The journal is written once for all of them, before anything is changed; each pod then costs a
//! few system calls. Others are not touched.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::attach::{self, Hook};
use super::layout::{self, POD_ENROLLING, POD_OLDER};
use super::links::Links;
use super::maps::{FlowKey, OlderFlows, Pods};
use super::{Ebpf, filters, inventory, not_installed, older};
use crate::error::Result;
use crate::expedite;
use crate::netns::Netns;
use crate::settings::Pod;

/// A pod that is being added.
struct Addition<'a> {
    pod: &'a Pod,
    index: u32,
    /// Not captured before.
    is_new: bool,
}

impl Addition<'_> {
    fn hooks(&self) -> [Hook<'_>; 2] {
        [layout::APP_OUTBOUND, layout::APP_INBOUND].map(|program| Hook {
            program,
            interface: &self.pod.host_interface,
            index: self.index,
            owner: Some(&self.pod.uid),
        })
    }
}

/// Keeps the first error and logs the others.
#[derive(Default)]
struct FirstError(Option<crate::Error>);

impl FirstError {
    fn take<T>(&mut self, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) if self.0.is_none() => {
                self.0 = Some(error);
                None
            }
            Err(error) => {
                tracing::error!("{error}");
                None
            }
        }
    }

    fn into_result(self) -> Result<()> {
        self.0.map_or(Ok(()), Err)
    }
}

pub(crate) fn add(redirection: &mut Ebpf, node: &Netns, pods: &[Pod]) -> Result<()> {
    let links = Links::read(node)?;
    let mut errors = FirstError::default();
    let mut sound = Vec::new();
    for pod in pods {
        let checked = redirection
            .settings
            .validate_pod(pod)
            .and_then(|()| links.veth("host_interface", &pod.host_interface));
        sound.extend(errors.take(checked).map(|index| (pod, index)));
    }
    let outdated = outdated(redirection, &sound)?;
    if !outdated.is_empty() {
        crate::Redirection::remove_pods(redirection, &outdated)?;
    }
    let additions = note(redirection, node, &sound, &mut errors)?;
    if additions.is_empty() {
        return errors.into_result();
    }
    expedite::begin(&mut redirection.journal, additions.len())?;
    let captured = capture(redirection, node, &additions, &mut errors);
    redirection.journal.end_expedited()?;
    let failed = captured?;
    if !failed.is_empty()
        && let Err(error) = crate::Redirection::remove_pods(redirection, &failed)
    {
        tracing::warn!(%error, "not all of a pod's capture was taken back");
    }
    errors.into_result()
}

/// Captures all of them; returns the UIDs of new ones that could not be.
fn capture<'a>(
    redirection: &mut Ebpf,
    node: &Netns,
    additions: &[Addition<'a>],
    errors: &mut FirstError,
) -> Result<Vec<&'a str>> {
    let mut capture = Capture::begin(redirection, node)?;
    let mut failed = Vec::new();
    for addition in additions {
        let done = capture.add(addition);
        if errors.take(done).is_none() && addition.is_new {
            failed.push(addition.pod.uid.as_str());
        }
    }
    Ok(failed)
}

/// UIDs of those of which anything differs from what is known.
fn outdated<'a>(redirection: &Ebpf, pods: &[(&'a Pod, u32)]) -> Result<Vec<&'a str>> {
    let map = Pods::open(&redirection.settings.bpffs)?;
    let known = redirection.journal.pods().iter();
    let known: HashMap<_, _> = known.map(|pod| (&pod.uid, pod)).collect();
    let differs = |pod: &Pod, index: u32| {
        let known = known.get(&pod.uid).copied();
        known
            .is_some_and(|known| known != pod || map.get(known).is_none_or(|[now, _]| now != index))
    };
    let chosen = pods.iter().filter(|(pod, index)| differs(pod, *index));
    Ok(chosen.map(|(pod, _)| pod.uid.as_str()).collect())
}

/// Writes all of them into the journal.
fn note<'a>(
    redirection: &mut Ebpf,
    node: &Netns,
    pods: &[(&'a Pod, u32)],
    errors: &mut FirstError,
) -> Result<Vec<Addition<'a>>> {
    let pins = redirection.settings.bpffs.clone();
    let by_filter = redirection.journal.detail() == Some(attach::CLSACT);
    let clsact = if by_filter {
        filters::clsact_interfaces()?
    } else {
        HashSet::new()
    };
    let mut additions = Vec::new();
    redirection.journal.batch(|journal| {
        let mut owners = journal.owners();
        let free = pods.iter().filter(|(pod, _)| {
            let is_free = errors.take(owners.check_free(pod)).is_some();
            if is_free {
                owners.add(pod);
            }
            is_free
        });
        let free: Vec<_> = free.copied().collect();
        let noted: Vec<_> = free.iter().map(|&(pod, _)| pod).collect();
        let new = journal.set_pods(&noted)?;
        for (pod, index) in free {
            let is_new = new.contains(pod.uid.as_str());
            let addition = Addition { pod, index, is_new };
            for hook in addition.hooks() {
                if by_filter {
                    let has_clsact = clsact.contains(hook.interface);
                    attach::note_filter(journal, node, hook, has_clsact)?;
                } else {
                    attach::note_link(journal, &pins, hook)?;
                }
            }
            additions.push(addition);
        }
        Ok(())
    })?;
    Ok(additions)
}

/// What adding pods needs open.
struct Capture<'a> {
    attacher: attach::Attacher<'a>,
    pods: Pods,
    older: OlderFlows,
    ztunnel: &'a Path,
    /// ztunnel's connections seen from their other ends; read when a pod has any.
    ztunnels: Option<HashSet<(SocketAddr, SocketAddr)>>,
}

impl<'a> Capture<'a> {
    fn begin(redirection: &'a mut Ebpf, node: &'a Netns) -> Result<Self> {
        let pins = &redirection.settings.bpffs;
        let (pods, older) = (Pods::open(pins)?, OlderFlows::open(pins)?);
        let object = redirection.object.as_mut();
        let ebpf = object.ok_or_else(not_installed)?;
        Ok(Self {
            attacher: attach::Attacher {
                ebpf,
                journal: &mut redirection.journal,
                node,
                pins,
                wanted: redirection.settings.attach,
                clsact: None,
            },
            pods,
            older,
            ztunnel: &redirection.settings.ztunnel.netns,
            ztunnels: None,
        })
    }

    /// The map comes first, so that no packet the programs hand on meets a ztunnel that takes the
    /// pod for a stranger. Connections are listed before the programs are attached and again
    /// after, for those that came in between; until then the programs drop what may be of one.
    fn add(&mut self, addition: &Addition<'_>) -> Result<()> {
        let Addition { pod, index, is_new } = *addition;
        let mut older = HashSet::new();
        if is_new {
            self.list_older(pod, &mut older, false)?;
            self.pods.set(pod, index, POD_OLDER | POD_ENROLLING)?;
        } else if self.pods.get(pod).is_none() {
            self.pods.set(pod, index, 0)?;
        }
        for hook in addition.hooks() {
            self.attacher.attach(hook)?;
        }
        if is_new {
            // What ztunnel has by now may have come through the programs already.
            self.list_older(pod, &mut older, true)?;
            let flags = if older.is_empty() { 0 } else { POD_OLDER };
            self.pods.set(pod, index, flags)?;
        }
        Ok(())
    }

    /// Puts the pod's connections into the map and into `found`, less those with ztunnel.
    fn list_older(
        &mut self,
        pod: &Pod,
        found: &mut HashSet<FlowKey>,
        look_again: bool,
    ) -> Result<()> {
        let all = match older::connections(&pod.netns) {
            Ok(all) => all,
            Err(error) => {
                tracing::warn!(%error, uid = pod.uid, "open connections cannot be seen and break");
                return Ok(());
            }
        };
        let mut keys = older::keys(&all, pod);
        keys.retain(|key| !found.contains(key));
        if keys.is_empty() {
            return Ok(());
        }
        let ztunnels = match self.ztunnels.take().filter(|_| !look_again) {
            Some(known) => known,
            None => older::mirrored(older::connections(self.ztunnel)?),
        };
        let of_ztunnel = older::keys(&ztunnels, pod);
        self.ztunnels = Some(ztunnels);
        for key in keys.difference(&of_ztunnel) {
            self.older.add(*key)?;
            found.insert(*key);
        }
        Ok(())
    }
}

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

/// How long the kernel may take to detach programs whose links are gone.
const DETACH_PATIENCE: Duration = Duration::from_secs(5);

/// First the map: until its programs are gone, a pod's packets are dropped as spoofed rather than
/// let past ztunnel half-way.
pub(crate) fn remove(redirection: &mut Ebpf, uids: &[&str]) -> Result<()> {
    let journal = &redirection.journal;
    let mapped = forget(&redirection.settings.bpffs, journal.pods(), uids);
    let wanted: HashSet<_> = uids.iter().copied().collect();
    let gone = journal
        .pods()
        .iter()
        .filter(|pod| wanted.contains(pod.uid.as_str()));
    let interfaces: Vec<_> = gone.map(|pod| pod.host_interface.clone()).collect();
    let by_link = journal.detail() != Some(attach::CLSACT);
    let removed = redirection.journal.remove_pods(uids);
    if by_link {
        wait_until_detached(&interfaces);
    }
    removed.and(mapped)
}

/// The kernel detaches programs a little after their links are gone.
fn wait_until_detached(interfaces: &[String]) {
    let deadline = Instant::now() + DETACH_PATIENCE;
    let mut left: Vec<&str> = interfaces.iter().map(String::as_str).collect();
    loop {
        left.retain(|interface| !inventory::links(&[interface]).is_empty());
        if left.is_empty() {
            return;
        }
        if Instant::now() >= deadline {
            tracing::warn!(interfaces = left.len(), "programs are still attached");
            return;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Takes pods out of the maps.
fn forget(pins: &Path, pods: &[Pod], uids: &[&str]) -> Result<()> {
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
        if addresses.contains(&older::pod_address(&key)) {
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
        let open = older::connections(&pod.netns).unwrap_or_default();
        let open = older::keys(&open, pod);
        let own = all
            .iter()
            .filter(|key| pod.addresses.contains(&older::pod_address(key)));
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

pub(crate) fn older_count(pins: &Path) -> usize {
    OlderFlows::open(pins)
        .and_then(|map| map.all())
        .map_or(0, |all| all.len())
}
