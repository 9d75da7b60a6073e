//! Redirection by seven BPF programs, without iptables or tunnels.
//!
//! The node's side is tc programs that hand packets straight to the peer of ztunnel's or a pod's
//! veth; ztunnel's side is one policy rule (what comes in by its interface is local) and a socket
//! lookup that gives each new connection to the listener of the worker on this CPU. See
//! `bpf/src/redirect.bpf.c` for what each program drops, passes and redirects.
//!
//! Programs and maps are pinned and stay when the agent ends. With ztunnel gone, connections are
//! refused; with its network namespace gone, packets are dropped.
//!
//! Connections that are open when a pod is added go on as they are (`existing_connections.rs`).
//! Pinned maps that another version made with another layout are replaced; so are the programs, one
//! by one, and what is redirected goes on. ztunnel puts its listeners into a new map within a
//! second.
//!
//! IPv4 and IPv6, the latter if ztunnel has an IPv6 address; without one, IPv6 TCP of pods is
//! dropped in its network namespace.
//!
//! Limits: the node's netfilter does not see what is redirected, so network policies built on it
//! do not apply to that; a pod's connections break when it is removed (they are ztunnel's).

mod attach;
mod capture;
mod cut_off;
mod entries;
mod events;
mod existing_connections;
mod inventory;
mod layout;
mod maps;
mod pods;

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use aya::{Ebpf as Object, EbpfLoader};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::Redirection;
use crate::back_end::{BackEnd, Redirect};
use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::journal::undo::Undo;
use crate::settings::{EbpfSettings, Pod};
use crate::status::{Counters, EbpfStatus, Failure, PodStatus, Status, Uncaptured};
use crate::system::links::Links;
use crate::system::netns::{self, Netns};
use crate::system::{local_addresses, pins, sysctl};
use attach::{Attacher, Hook};
pub use events::Dropped;
use layout::Config;
pub use layout::{MAX_CPUS, Outcome, Role};

type Settings = crate::settings::Settings<EbpfSettings>;

/// Adds and the matching removals in ztunnel's network namespace: TCP for anyone is local if it
/// came in by ztunnel's interface.
const TABLE: u32 = 100;
const RULE_PREF: u32 = 20_000;

/// The `ebpf` back end.
#[derive(Debug)]
pub(crate) struct Ebpf {
    settings: Settings,
    journal: Journal,
    object: Option<Object>,
}

impl Ebpf {
    /// For the given node; reads the journal, changes nothing.
    ///
    /// # Errors
    /// If the journal cannot be read.
    pub(crate) fn new(settings: Settings) -> Result<Self> {
        let journal = Journal::open(&settings.state_dir, Redirect::Ebpf)?;
        Ok(Self {
            settings,
            journal,
            object: None,
        })
    }

    fn node(&self) -> Result<Netns> {
        Netns::node_at(self.settings.node.netns.as_deref())
    }

    /// Everything is ready before the first program is attached.
    fn install_steps(&mut self, node: &Netns, ztunnel: &Netns) -> Result<()> {
        let links = Links::read(node)?;
        let s = &self.settings;
        let outside = links.veth("host_interface", &s.ztunnel.host_interface)?;
        let mut underlays = Vec::new();
        for name in &s.node.interfaces {
            underlays.push((name.clone(), links.with_ethernet("node.interfaces", name)?));
        }
        make_dirs(&mut self.journal, &s.back_end.bpffs)?;
        let config = self.config(ztunnel, outside, &underlays)?;
        self.object = Some(self.load()?);
        let s = &self.settings;
        prepare_ztunnel(&mut self.journal, ztunnel, &s.ztunnel)?;
        allow_foreign_sources(&mut self.journal, node, &s.ztunnel.host_interface)?;
        maps::set_config(&s.back_end.bpffs, &config)?;
        maps::set_pod_cidrs(&s.back_end.bpffs, &s.node.pod_cidrs)?;
        maps::set_node_addresses(&s.back_end.bpffs, &node_addresses(s)?)?;
        entries::restore(&s.back_end.bpffs, self.journal.pods(), &links)?;
        self.attach_hooks(node, outside, &underlays)
    }

    /// Loads maps and programs; maps that are in use are used on.
    fn load(&mut self) -> Result<Object> {
        let Self {
            settings,
            journal,
            object,
        } = self;
        let pins = &settings.back_end.bpffs;
        let interfaces: Vec<String> = inventory::interfaces(settings, journal)
            .into_iter()
            .map(str::to_owned)
            .collect();
        let interfaces: Vec<&str> = interfaces.iter().map(String::as_str).collect();
        let programs = || inventory::attached_programs(pins, &interfaces);
        pins::load_over(pins, &layout::MAPS, object.as_ref(), programs, || {
            load(journal, pins)
        })
    }

    fn config(&self, ztunnel: &Netns, outside: u32, underlays: &[(String, u32)]) -> Result<Config> {
        let s = &self.settings;
        let inside = netns::interface(ztunnel, &s.ztunnel.interface)?;
        let v6 = s.ztunnel.address_v6.map(IpAddr::from);
        Ok(Config {
            ztunnel_ifindex: outside,
            dns: s.dns,
            ztunnel_addresses: [s.ztunnel.address.into()].into_iter().chain(v6).collect(),
            underlays: underlays.iter().map(|&(_, index)| index).collect(),
            ztunnel_mac: inside.mac,
        })
    }

    /// What does not belong to a pod.
    fn attach_hooks(
        &mut self,
        node: &Netns,
        outside: u32,
        underlays: &[(String, u32)],
    ) -> Result<()> {
        let interface = self.settings.ztunnel.host_interface.clone();
        let netns = self.settings.ztunnel.netns.clone();
        let mut attacher = self.attacher(node)?;
        attacher.attach_sk_lookup(&netns)?;
        let of_ztunnel = [layout::ZTUNNEL_HOST, layout::ZTUNNEL_GUARD];
        let mut hooks: Vec<_> = of_ztunnel
            .map(|program| Hook {
                program,
                interface: &interface,
                index: outside,
                owner: None,
                cut_off: false,
            })
            .into();
        hooks.extend(underlays.iter().map(|(interface, index)| Hook {
            program: layout::UNDERLAY_INGRESS,
            interface,
            index: *index,
            owner: None,
            cut_off: false,
        }));
        for hook in &hooks {
            attacher.attach(*hook)?;
        }
        let interfaces: Vec<_> = hooks.iter().map(|hook| hook.interface).collect();
        self.journal.retain_filters(&interfaces)?;
        remove_stale_hooks(&self.settings.back_end.bpffs, &hooks)
    }

    fn attacher<'a>(&'a mut self, node: &'a Netns) -> Result<Attacher<'a>> {
        let ebpf = self.object.as_mut().ok_or_else(not_installed)?;
        Ok(Attacher {
            ebpf,
            journal: &mut self.journal,
            node,
            pins: &self.settings.back_end.bpffs,
            wanted: self.settings.back_end.attach,
            clsact: None,
        })
    }
}

impl Redirection for Ebpf {
    fn install(&mut self) -> Result<()> {
        self.settings.validate()?;
        check_bpffs(&self.settings.back_end.bpffs)?;
        let node = self.node()?;
        let ztunnel = Netns::at(&self.settings.ztunnel.netns)?;
        self.journal.begin(&node, &ztunnel)?;
        let mark = self.journal.mark();
        let was_installed = self.object.is_some();
        let result = self.install_steps(&node, &ztunnel);
        if result.is_err() {
            // The maps of what is installed may have nobody else to keep them.
            self.object = self.object.take().filter(|_| was_installed);
            self.journal.rollback(mark);
        }
        result
    }

    fn try_pods(&mut self, pods: &[Pod]) -> Result<Vec<Failure>> {
        let node = self.node()?;
        self.add(&node, pods)
    }

    fn cut_off(&mut self, interfaces: &[&str]) -> Result<Vec<(String, Error)>> {
        let node = self.node()?;
        self.cut_off_all(&node, interfaces)
    }

    fn interfaces_cut_off(&self) -> Vec<String> {
        self.journal.cut_off().map(str::to_owned).collect()
    }

    fn let_go(&mut self, interfaces: &[&str]) -> Result<()> {
        self.end_cut_off(interfaces)
    }

    fn note_uncaptured(&mut self, pods: Vec<Uncaptured>) -> Result<()> {
        self.journal.set_uncaptured(pods)
    }

    fn uncaptured(&self) -> &[Uncaptured] {
        self.journal.uncaptured()
    }

    fn older_broken(&self) -> u64 {
        self.journal.older_broken()
    }

    fn remove_pods(&mut self, uids: &[&str]) -> Result<()> {
        self.remove(uids)
    }

    fn enrolled(&self) -> Vec<Pod> {
        self.journal.pods().to_vec()
    }

    fn status(&self) -> Result<Status> {
        let older = if self.journal.is_installed() {
            entries::older_count(&self.settings.back_end.bpffs)
        } else {
            0
        };
        Ok(Status {
            installed: self.journal.is_installed(),
            dns: self.settings.dns,
            pods: self.journal.pods().iter().map(PodStatus::of).collect(),
            not_captured: self.journal.uncaptured().to_vec(),
            owned: self.inventory()?,
            counters: self.counters().unwrap_or_default(),
            back_end: BackEnd::Ebpf(EbpfStatus {
                attached_by: self.journal.attached_by(),
                older_connections: older,
                older_connections_broken: self.journal.older_broken(),
            }),
        })
    }

    fn counters(&self) -> Result<Counters> {
        if !self.journal.is_installed() {
            return Ok(Counters::new());
        }
        maps::counters(&self.settings.back_end.bpffs)
    }

    fn inventory(&self) -> Result<BTreeSet<String>> {
        if !self.journal.is_installed() {
            return Ok(BTreeSet::new());
        }
        inventory::take(&self.settings, &self.journal, &self.node()?)
    }

    fn expire(&mut self) -> Result<()> {
        entries::forget_ended(&self.settings.back_end.bpffs, self.journal.pods())
    }

    fn follow_node(&mut self) -> Result<()> {
        let pins = &self.settings.back_end.bpffs;
        if !pins.join(layout::NODE_ADDRESSES).exists() {
            return Ok(()); // the next look at what is missing brings it back
        }
        maps::set_node_addresses(pins, &node_addresses(&self.settings)?)
    }

    fn take_dropped(&mut self, most: usize) -> Result<Vec<Dropped>> {
        events::take(&self.settings.back_end.bpffs, most)
    }

    fn cleanup(&mut self) -> Result<()> {
        let cut_off = self.interfaces_cut_off();
        let cut_off: Vec<_> = cut_off.iter().map(String::as_str).collect();
        let let_go = self.let_go(&cut_off);
        self.object = None;
        let pods = self.enrolled();
        let uids: Vec<_> = pods.iter().map(|pod| pod.uid.as_str()).collect();
        let result = self.remove_pods(&uids).and(let_go);
        let result = self.journal.undo_all().and(result);
        // Pins survive a lost journal and are known by their names.
        for pin in attach::own_pins(&self.settings.back_end.bpffs) {
            std::fs::remove_file(&pin).map_err(|e| Error::file("remove pin", &pin, e))?;
        }
        result
    }
}

/// IPv4 address of the ztunnel that the programs know.
pub(crate) fn ztunnel_address(pins: &Path) -> Result<Ipv4Addr> {
    Ok(layout::ztunnel_address(&maps::config(pins)?))
}

fn not_installed() -> Error {
    Error::Setting {
        field: "redirection",
        value: Redirect::Ebpf.name().to_owned(),
        reason: "must be installed before pods are added".to_owned(),
    }
}

/// All local addresses of the node and those that the settings name: traffic between a pod and
/// these is the node's own.
fn node_addresses(settings: &Settings) -> Result<HashSet<IpAddr>> {
    let node = &settings.node;
    let named = [IpAddr::from(node.address)]
        .into_iter()
        .chain(node.other_addresses.iter().copied());
    let mut all: HashSet<IpAddr> = named.collect();
    let found = local_addresses::all()
        .map_err(|e| Error::file("list the addresses of", Path::new("/proc/self/ns/net"), e))?;
    for address in &found {
        if all.len() < layout::NODE_ADDRESSES_MAX {
            all.insert(*address);
        }
    }
    if found.iter().any(|address| !all.contains(address)) {
        let (most, found) = (layout::NODE_ADDRESSES_MAX, found.len());
        tracing::warn!(
            most,
            found,
            "more addresses of the node than are exempt from capture"
        );
    }
    Ok(all)
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

/// Loads maps (those pinned already are used as they are) and programs. A pinned map of another
/// layout is left to the programs that use it until they are replaced, too.
fn load(journal: &mut Journal, directory: &Path) -> Result<Object> {
    let mut loader = EbpfLoader::new();
    for map in &layout::MAPS {
        let pin = directory.join(map.name);
        attach::check_own(journal, &pin)?;
        journal.record(None, Undo::Pin { path: pin.clone() })?;
        if let Err(error) = pins::check_layout(&pin, map) {
            tracing::info!(%error, "replaced");
            std::fs::remove_file(&pin).map_err(|e| Error::file("remove pin", &pin, e))?;
        }
        loader.map_pin_path(map.name, pin);
    }
    let mut object = loader
        .load(layout::OBJECT)
        .map_err(|e| Error::bpf("load object", "redirect.bpf.o", &e))?;
    attach::load_programs(&mut object)?;
    Ok(object)
}

/// Makes what comes in by ztunnel's interface local to it, whatever its destination.
fn prepare_ztunnel(
    journal: &mut Journal,
    netns: &Netns,
    ztunnel: &crate::settings::Ztunnel,
) -> Result<()> {
    let interface = &ztunnel.interface;
    for scope in ["all", interface] {
        let name = format!("net/ipv4/conf/{scope}/rp_filter");
        journal.set_sysctl(None, netns, &name, "0")?;
    }
    let mut families = vec![("-4", "0.0.0.0/0")];
    if ztunnel.address_v6.is_some() {
        families.push(("-6", "::/0"));
    }
    for (family, everything) in families {
        let route = format!("local {everything} dev lo table {TABLE}");
        let add = format!("ip {family} route add {route}");
        let remove = format!("ip {family} route del {route}");
        journal.add(None, netns, &add, &remove)?;
        let rule = format!("pref {RULE_PREF} iif {interface} lookup {TABLE}");
        let add = format!("ip {family} rule add {rule}");
        journal.add(None, netns, &add, &format!("ip {family} rule del {rule}"))?;
    }
    Ok(())
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
    let own = [
        layout::ZTUNNEL_HOST,
        layout::ZTUNNEL_GUARD,
        layout::UNDERLAY_INGRESS,
    ];
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
