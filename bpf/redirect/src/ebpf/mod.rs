//! Redirection by five BPF programs, without iptables or tunnels.
//!
//! The node's side is tc programs that hand packets straight to the peer of ztunnel's or a pod's
//! veth; ztunnel's side is one policy rule (what comes in by its interface is local) and a socket
//! lookup that gives each new connection to the listener of the worker on this CPU. See
//! `bpf/src/redirect.bpf.c` for what each program drops, passes and redirects.
//!
//! Programs and maps are pinned and stay when the agent ends. With ztunnel gone, connections are
//! refused; with its network namespace gone, packets are dropped.
//!
//! Limits: IPv4 (IPv6 of mesh pods is dropped except ICMPv6); the node's netfilter does not see
//! what is redirected, so network policies built on it do not apply to that; a pod's connections
//! open at the time it is added or removed break.

pub(crate) mod attach;
pub(crate) mod layout;
pub(crate) mod maps;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use aya::{Ebpf as Object, EbpfLoader};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::command;
use crate::error::{Error, Result};
use crate::journal::{Journal, Undo};
use crate::netns::{self, Netns};
use crate::settings::{Pod, Settings};
use crate::status::{PodStatus, Status};
use crate::{Redirection, sysctl};
use attach::{Attacher, Hook};
use layout::Config;

const NAME: &str = "ebpf";

/// Adds and the matching removals in ztunnel's network namespace: TCP for anyone is local if it
/// came in by ztunnel's interface.
const TABLE: u32 = 100;
const RULE_PREF: u32 = 20_000;

/// The `ebpf` back end.
#[derive(Debug)]
pub struct Ebpf {
    settings: Settings,
    journal: Journal,
    object: Option<Object>,
}

impl Ebpf {
    /// For the given node; reads the journal, changes nothing.
    ///
    /// # Errors
    /// If the journal cannot be read.
    pub fn new(settings: Settings) -> Result<Self> {
        let journal = Journal::open(&settings.state_dir, NAME)?;
        Ok(Self {
            settings,
            journal,
            object: None,
        })
    }

    fn install_steps(&mut self, node: &Netns, ztunnel: &Netns) -> Result<()> {
        let s = &self.settings;
        let outside = netns::interface(node, &s.ztunnel.host_interface)?;
        let inside = netns::interface(ztunnel, &s.ztunnel.interface)?;
        check_veth(node, &s.ztunnel.host_interface)?;
        let mut underlays = Vec::new();
        for name in &s.node.interfaces {
            underlays.push((name.clone(), netns::interface(node, name)?.index));
        }
        make_dirs(&mut self.journal, &s.bpffs)?;
        self.object = Some(load(&mut self.journal, &s.bpffs)?);
        prepare_ztunnel(&mut self.journal, ztunnel, &s.ztunnel.interface)?;
        allow_foreign_sources(&mut self.journal, node, &s.ztunnel.host_interface)?;
        let config = Config {
            ztunnel_ifindex: outside.index,
            ztunnel_address: s.ztunnel.address,
            node_addresses: node_addresses(s),
            underlays: underlays.iter().map(|&(_, index)| index).collect(),
            ztunnel_mac: inside.mac,
        };
        maps::set_config(&s.bpffs, &config)?;
        maps::set_pod_cidrs(&s.bpffs, &s.node.pod_cidrs)?;
        maps::retain_pods(&s.bpffs, self.journal.pods())?;
        let (interface, netns) = (s.ztunnel.host_interface.clone(), s.ztunnel.netns.clone());
        let mut attacher = self.attacher(node)?;
        attacher.attach_sk_lookup(&netns)?;
        let mut hooks = vec![Hook {
            program: layout::ZTUNNEL_HOST,
            interface: &interface,
            index: outside.index,
            owner: None,
        }];
        hooks.extend(underlays.iter().map(|(interface, index)| Hook {
            program: layout::UNDERLAY_INGRESS,
            interface,
            index: *index,
            owner: None,
        }));
        for hook in &hooks {
            attacher.attach(*hook)?;
        }
        let interfaces: Vec<_> = hooks.iter().map(|hook| hook.interface).collect();
        self.journal.retain_filters(&interfaces)?;
        remove_stale_hooks(&self.settings.bpffs, &hooks)
    }

    fn attacher<'a>(&'a mut self, node: &'a Netns) -> Result<Attacher<'a>> {
        let ebpf = self.object.as_mut().ok_or_else(|| Error::Setting {
            field: "redirection",
            value: NAME.to_owned(),
            reason: "must be installed before pods are added".to_owned(),
        })?;
        Ok(Attacher {
            ebpf,
            journal: &mut self.journal,
            node,
            pins: &self.settings.bpffs,
            wanted: self.settings.attach,
        })
    }

    fn add_pod_steps(&mut self, node: &Netns, pod: &Pod, index: u32) -> Result<()> {
        check_veth(node, &pod.host_interface)?;
        // First the map, so that no packet the programs hand on meets a ztunnel that takes the
        // pod for a stranger.
        maps::add_pod(&self.settings.bpffs, pod, index)?;
        let mut attacher = self.attacher(node)?;
        for program in [layout::APP_OUTBOUND, layout::APP_INBOUND] {
            attacher.attach(Hook {
                program,
                interface: &pod.host_interface,
                index,
                owner: Some(&pod.uid),
            })?;
        }
        Ok(())
    }

    /// The enrolled pod of this UID, if anything about it differs from `pod` as it is now.
    fn outdated(&self, pod: &Pod, index: u32) -> Result<bool> {
        let Some(known) = self
            .journal
            .pods()
            .iter()
            .find(|known| known.uid == pod.uid)
        else {
            return Ok(false);
        };
        let known_index = maps::pod_index(&self.settings.bpffs, known)?;
        Ok(known != pod || known_index != Some(index))
    }
}

impl Redirection for Ebpf {
    fn install(&mut self) -> Result<()> {
        self.settings.validate()?;
        check_bpffs(&self.settings.bpffs)?;
        let node = Netns::node()?;
        let ztunnel = Netns::at(&self.settings.ztunnel.netns)?;
        self.journal.begin(&node, &ztunnel)?;
        let mark = self.journal.mark();
        let result = self.install_steps(&node, &ztunnel);
        if result.is_err() {
            self.object = None;
            self.journal.rollback(mark);
        }
        result
    }

    fn add_pod(&mut self, pod: &Pod) -> Result<()> {
        self.settings.validate_pod(pod)?;
        self.journal.check_address_free(pod)?;
        let node = Netns::node()?;
        let index = netns::interface(&node, &pod.host_interface)?.index;
        if self.outdated(pod, index)? {
            self.remove_pod(&pod.uid)?;
        }
        let is_new = self.journal.set_pod(pod)?;
        let result = self.add_pod_steps(&node, pod, index);
        if result.is_err()
            && is_new
            && let Err(error) = self.remove_pod(&pod.uid)
        {
            tracing::warn!(%error, uid = pod.uid, "not all of the pod's capture was taken back");
        }
        result
    }

    fn remove_pod(&mut self, uid: &str) -> Result<()> {
        // First the map: until its programs are gone, the pod's packets are dropped as spoofed
        // rather than let past ztunnel half-way.
        if let Some(pod) = self.journal.pods().iter().find(|pod| pod.uid == uid) {
            maps::remove_pod(&self.settings.bpffs, pod)?;
        }
        self.journal.remove_pod(uid)
    }

    fn enrolled(&self) -> Vec<Pod> {
        self.journal.pods().to_vec()
    }

    fn status(&self) -> Result<Status> {
        let installed = self.journal.installed_redirect() == Some(NAME);
        let counters = if installed {
            maps::counters(&self.settings.bpffs)?
        } else {
            Default::default()
        };
        Ok(Status {
            redirect: NAME,
            installed,
            variant: None,
            tunnel_driver: None,
            attach: self.journal.detail().map(str::to_owned),
            pods: self.journal.pods().iter().map(PodStatus::of).collect(),
            counters,
        })
    }

    fn cleanup(&mut self) -> Result<()> {
        self.object = None;
        let result = self.journal.undo_all();
        // Pins survive a lost journal and are known by their names.
        for pin in attach::own_pins(&self.settings.bpffs) {
            std::fs::remove_file(&pin).map_err(|e| Error::file("remove pin", &pin, e))?;
        }
        result
    }
}

/// The address pods know and those of the underlay: traffic between a pod and these is the node's
/// own. Others (a bridge's, the service addresses that IPVS puts on an interface) are captured.
fn node_addresses(settings: &Settings) -> Vec<Ipv4Addr> {
    let mut all = vec![settings.node.address];
    all.extend(netns::addresses(&settings.node.interfaces));
    all.dedup();
    if all.len() > layout::NODE_ADDRESSES_MAX {
        let (most, found) = (layout::NODE_ADDRESSES_MAX, all.len());
        tracing::warn!(
            most,
            found,
            "more addresses of the node than are exempt from capture"
        );
    }
    all
}

/// Packets redirected to the peer of any other kind of interface would vanish.
fn check_veth(node: &Netns, name: &str) -> Result<()> {
    let shown = node.run(|| command::ip(&format!("-d -o link show dev {name}")))?;
    if shown.contains(" veth ") || shown.contains(" netkit ") {
        return Ok(());
    }
    Err(Error::Setting {
        field: "host_interface",
        value: name.to_owned(),
        reason: "must be a veth or netkit interface for redirection ebpf".to_owned(),
    })
}

fn check_bpffs(dir: &Path) -> Result<()> {
    let existing = dir
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or_else(|| Path::new("/"));
    match statfs(existing) {
        Ok(info) if info.filesystem_type() == BPF_FS_MAGIC => Ok(()),
        _ => Err(Error::NotBpffs {
            path: dir.to_owned(),
        }),
    }
}

/// Makes `dir` and what is missing above it.
fn make_dirs(journal: &mut Journal, dir: &Path) -> Result<()> {
    let missing: Vec<PathBuf> = dir
        .ancestors()
        .take_while(|path| !path.exists())
        .map(Path::to_owned)
        .collect();
    for path in missing.into_iter().rev() {
        journal.record(None, Undo::Directory { path: path.clone() })?;
        std::fs::create_dir(&path).map_err(|e| Error::file("make directory", &path, e))?;
    }
    Ok(())
}

/// Loads maps (those pinned already are used as they are) and programs.
fn load(journal: &mut Journal, pins: &Path) -> Result<Object> {
    let mut loader = EbpfLoader::new();
    for map in &layout::MAPS {
        let pin = pins.join(map.name);
        maps::check_layout(&pin, map)?;
        journal.record(None, Undo::Pin { path: pin.clone() })?;
        loader.map_pin_path(map.name, pin);
    }
    let mut object = loader
        .load(layout::OBJECT)
        .map_err(|e| Error::bpf("load object", "redirect.bpf.o", &e))?;
    attach::load_programs(&mut object)?;
    Ok(object)
}

/// Makes what comes in by ztunnel's interface local to it, whatever its destination.
fn prepare_ztunnel(journal: &mut Journal, ztunnel: &Netns, interface: &str) -> Result<()> {
    for scope in ["all", interface] {
        let name = format!("net/ipv4/conf/{scope}/rp_filter");
        journal.set_sysctl(None, ztunnel, &name, "0")?;
    }
    let route = format!("local 0.0.0.0/0 dev lo table {TABLE}");
    let add = format!("ip route add {route}");
    journal.add(None, ztunnel, &add, &format!("ip route del {route}"))?;
    let rule = format!("pref {RULE_PREF} iif {interface} lookup {TABLE}");
    let add = format!("ip rule add {rule}");
    journal.add(None, ztunnel, &add, &format!("ip rule del {rule}"))
}

/// What ztunnel sends off-cluster takes the node's stack with a pod's address, which a strict
/// reverse-path filter on ztunnel's interface would drop. The laxer of "all" and the interface's
/// own setting is not what counts but the larger number, and 2 is loose.
fn allow_foreign_sources(journal: &mut Journal, node: &Netns, interface: &str) -> Result<()> {
    let own = format!("net/ipv4/conf/{interface}/rp_filter");
    let strict = |name: &str| sysctl::read(name).map(|value| value == "1");
    if strict("net/ipv4/conf/all/rp_filter")? || strict(&own)? {
        journal.set_sysctl(None, node, &own, "2")?;
    }
    Ok(())
}

/// Removes pinned links of interfaces that are no longer ztunnel's or the underlay's.
fn remove_stale_hooks(pins: &Path, wanted: &[Hook<'_>]) -> Result<()> {
    let wanted: Vec<_> = wanted
        .iter()
        .map(|hook| pins.join(hook.pin_name()))
        .collect();
    let own = [layout::ZTUNNEL_HOST, layout::UNDERLAY_INGRESS];
    for pin in attach::own_pins(pins) {
        let name = pin
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if own.iter().any(|program| name.starts_with(program)) && !wanted.contains(&pin) {
            std::fs::remove_file(&pin).map_err(|e| Error::file("remove pin", &pin, e))?;
        }
    }
    Ok(())
}
