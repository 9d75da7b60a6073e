//! Adding and removing pods, many at once.
//!
//! The journal is written once for all of them, before anything is changed; each pod then costs a
//! few system calls. Others are not touched. What fails for one pod leaves it cut off, see
//! `cut_off.rs`.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::attach::{self, Hook};
use super::layout::{self, POD_ENROLLING, POD_OLDER};
use super::maps::{FlowKey, OlderFlows, Pods};
use super::{Ebpf, cut_off, existing_connections, inventory, not_installed};
use crate::error::Result;
use crate::settings::Pod;
use crate::status::Failure;
use crate::system::links::Links;
use crate::system::netns::Netns;
use crate::system::tc;

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
            cut_off: false,
        })
    }
}

/// Collects what went wrong, pod by pod.
#[derive(Default)]
struct Failures(Vec<Failure>);

impl Failures {
    fn take<T>(&mut self, pod: &Pod, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.0.push(Failure {
                    uid: pod.uid.clone(),
                    error,
                    cut_off: false,
                });
                None
            }
        }
    }
}

pub(crate) fn add(redirection: &mut Ebpf, node: &Netns, pods: &[Pod]) -> Result<Vec<Failure>> {
    let links = Links::read(node)?;
    let mut failures = Failures::default();
    let mut sound = Vec::new();
    for pod in pods {
        let checked = redirection
            .settings
            .validate_pod(pod)
            .and_then(|()| links.veth("host_interface", &pod.host_interface));
        sound.extend(failures.take(pod, checked).map(|index| (pod, index)));
    }
    replace_outdated(redirection, node, &links, &sound)?;
    let additions = note(redirection, node, &sound, &mut failures)?;
    if additions.is_empty() {
        return Ok(failures.0);
    }
    redirection.journal.begin_expedited(additions.len());
    let captured = capture(redirection, node, &additions, &mut failures);
    redirection.journal.end_expedited();
    let open = match captured {
        Ok(open) => open,
        Err(error) => {
            // Nothing was captured; what is new is not to look as if it were.
            let new = additions.iter().filter(|addition| addition.is_new);
            let new: Vec<_> = new.map(|addition| addition.pod.uid.as_str()).collect();
            redirection.journal.remove_pods(&new)?;
            return Err(error);
        }
    };
    let captured = additions.iter().map(|addition| addition.pod);
    let captured = captured.filter(|pod| !open.contains(&pod.uid.as_str()));
    let interfaces: Vec<_> = captured.map(|pod| pod.host_interface.as_str()).collect();
    if let Err(error) = crate::cut_off::end_filters(&mut redirection.journal, &interfaces) {
        tracing::warn!(%error, "pods are captured and still cut off");
    }
    for addition in additions {
        if open.contains(&addition.pod.uid.as_str()) {
            close(redirection, node, &addition, &mut failures);
        }
    }
    Ok(failures.0)
}

/// Cuts off a pod whose capture failed.
fn close(redirection: &mut Ebpf, node: &Netns, addition: &Addition<'_>, failures: &mut Failures) {
    let pod = addition.pod;
    let result = cut_off::one(redirection, node, &pod.host_interface, addition.index);
    match result {
        Ok(()) => {
            let failed = failures
                .0
                .iter_mut()
                .rfind(|failure| failure.uid == pod.uid);
            if let Some(failure) = failed {
                failure.cut_off = true;
            }
        }
        Err(error) => {
            tracing::error!(%error, uid = pod.uid, "neither captured nor cut off");
            if let Err(error) = crate::Redirection::remove_pods(redirection, &[&pod.uid]) {
                tracing::warn!(%error, "not all of a pod's capture was taken back");
            }
        }
    }
}

/// Captures all of them; returns the UIDs of those whose packets nothing stops.
fn capture<'a>(
    redirection: &mut Ebpf,
    node: &Netns,
    additions: &[Addition<'a>],
    failures: &mut Failures,
) -> Result<Vec<&'a str>> {
    let by_filter = redirection.journal.detail() == Some(attach::CLSACT);
    let mut capture = Capture::begin(redirection, node)?;
    let mut open = Vec::new();
    for addition in additions {
        let done = capture.add(addition);
        if failures.take(addition.pod, done).is_some() {
            continue;
        }
        let interface = &addition.pod.host_interface;
        let guarded = !addition.is_new && inventory::is_guarded(interface, by_filter);
        if !guarded {
            open.push(addition.pod.uid.as_str());
        }
    }
    let broken = capture.broken;
    redirection.journal.count_older_broken(broken)?;
    Ok(open)
}

/// Those of which anything differs from what is known are captured anew, and cut off meanwhile.
fn replace_outdated(
    redirection: &mut Ebpf,
    node: &Netns,
    links: &Links,
    pods: &[(&Pod, u32)],
) -> Result<()> {
    let outdated = outdated(redirection, pods)?;
    let mut gone = Vec::new();
    for uid in outdated {
        let known = redirection.journal.pods().iter().find(|pod| pod.uid == uid);
        let Some(interface) = known.map(|pod| pod.host_interface.clone()) else {
            continue;
        };
        let index = links.index(&interface);
        let done = index.and_then(|index| cut_off::one(redirection, node, &interface, index));
        if done.is_err() {
            gone.push(uid);
        }
    }
    if gone.is_empty() {
        return Ok(());
    }
    crate::Redirection::remove_pods(redirection, &gone)
}

/// UIDs of those of which anything differs from what is known.
fn outdated<'a>(redirection: &Ebpf, pods: &[(&'a Pod, u32)]) -> Result<Vec<&'a str>> {
    let map = Pods::open(&redirection.settings.bpffs)?;
    let known = redirection.journal.pods().iter();
    let known: HashMap<_, _> = known.map(|pod| (&pod.uid, pod)).collect();
    let differs = |pod: &Pod, index: u32| {
        let known = known.get(&pod.uid).copied();
        known.is_some_and(|known| {
            !known.is_captured_as(pod) || map.get(known).is_none_or(|[now, _]| now != index)
        })
    };
    let chosen = pods.iter().filter(|(pod, index)| differs(pod, *index));
    Ok(chosen.map(|(pod, _)| pod.uid.as_str()).collect())
}

/// Writes all of them into the journal.
fn note<'a>(
    redirection: &mut Ebpf,
    node: &Netns,
    pods: &[(&'a Pod, u32)],
    failures: &mut Failures,
) -> Result<Vec<Addition<'a>>> {
    let pins = redirection.settings.bpffs.clone();
    let by_filter = redirection.journal.detail() == Some(attach::CLSACT);
    let clsact = if by_filter {
        tc::clsact_interfaces()?
    } else {
        HashSet::new()
    };
    let mut additions = Vec::new();
    redirection.journal.batch(|journal| {
        let mut owners = journal.owners();
        let free = pods.iter().filter(|(pod, _)| {
            let is_free = failures.take(pod, owners.check_free(pod)).is_some();
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
            let interface = pod.host_interface.as_str();
            if journal.cut_off().any(|name| name == interface) {
                journal.hand_over(&crate::cut_off::owner(interface), &pod.uid)?;
                journal.set_cut_off(interface, false)?;
            }
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
    /// Connections that found no place and break.
    broken: u64,
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
            broken: 0,
        })
    }

    /// The map comes first, so that no packet the programs hand on meets a ztunnel that takes the
    /// pod for a stranger. Connections are listed before the programs are attached and again
    /// after, for those that came in between; until then the programs drop what may be of one.
    fn add(&mut self, addition: &Addition<'_>) -> Result<()> {
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
    why: Option<crate::Error>,
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
pub(super) fn wait_until_detached(interfaces: &[String]) {
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
pub(super) fn forget(pins: &Path, pods: &[Pod], uids: &[&str]) -> Result<()> {
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

pub(crate) fn older_count(pins: &Path) -> usize {
    OlderFlows::open(pins)
        .and_then(|map| map.all())
        .map_or(0, |all| all.len())
}
