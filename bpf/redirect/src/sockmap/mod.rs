//! The sockmap between the applications of a node and its ztunnel: data moves from
//! socket to socket within the kernel, connections and their checks stay as they are.
//!
//! `bpf/src/sockmap.bpf.c` says how and by which rules. This module loads it, tells it which pods
//! and which ztunnel there are, and takes sockets out again (`reaper.rs`). Everything is pinned
//! and works on without this process, except that demoted sockets then stay in the maps.
//!
//! Limits: 65,536 sockets and pods; more are not in it. Kernel 6.13 or later, where unread
//! redirected data is charged to its receiver, or an older one with that repaired, as Debian's 6.1
//! is; others are found out by trying (`probe.rs`) and refused, and then everything uses TCP.
//! Connections older than the installation use TCP.

mod layout;
mod probe;
mod reaper;
mod sockets;
mod sys;

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, SockHash};
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, Program, ProgramError, SkMsg, SockOps};
use aya::{Ebpf as Object, EbpfLoader};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::settings::Pod;
use crate::system::netns::Netns;
use crate::system::pins::{
    check_layout, ignore_missing, load_over, open, program_of, replace_link, rescue, write_failed,
};
use crate::system::program_load::load_program;
pub use layout::COUNTER_NAMES;
use layout::{CONFIG_BYTES, Config, END_BYTES, Key, POD_BYTES};
use reaper::Reaper;
pub use sockets::Sockets;

/// Name of the directory for pins, below the redirection's.
const DIRECTORY: &str = "sockmap";
/// How long a clean-up waits for readers of what was redirected already.
const DRAIN: Duration = Duration::from_secs(2);
const DRAIN_POLL: Duration = Duration::from_millis(50);

/// What it is for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Settings {
    /// Directory of the redirection's pins, in a bpffs.
    pub bpffs: PathBuf,
    /// cgroup (version 2) that holds the pods' and ztunnel's processes.
    pub cgroup: PathBuf,
    /// Path of ztunnel's network namespace.
    pub ztunnel_netns: PathBuf,
    /// Also on kernels whose FIONREAD is wrong for sockets in a map. Programs that ask it and wait
    /// for edges, nginx above all, stall there.
    pub force: bool,
    /// Memory of all TCP sockets of the machine, in bytes, above which messages of more than 2 KiB
    /// go by TCP; None: only the kernel's own limit (`net.ipv4.tcp_mem`) counts. The kernel counts
    /// what it has in reserve, a MiB per CPU, a little late.
    pub memory_max: Option<u64>,
}

/// State of the sockmap.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Whether new connections get it.
    pub enabled: bool,
    /// Whether it is used although this kernel's FIONREAD is wrong.
    pub forced: bool,
    /// [`Settings::memory_max`], in whole pages.
    pub memory_max: Option<u64>,
    /// Sockets, messages, bytes; demoted directions by reason. All CPUs, since installation.
    pub counters: BTreeMap<String, u64>,
}

/// The installed sockmap. Dropping it leaves it installed.
#[derive(Debug)]
pub struct Sockmap {
    pins: PathBuf,
    ztunnel: Netns,
    /// Of the pods' namespaces, by path and inode.
    cookies: std::collections::HashMap<(PathBuf, u64), u64>,
    /// Keeps maps alive while their pins are gone.
    object: Object,
    _reaper: Reaper,
}

impl Sockmap {
    /// Tries the kernel out, loads, attaches and enables, or adopts what is there.
    ///
    /// # Errors
    /// If the kernel lacks something: the reason says what. Nothing is enabled then.
    pub fn install(settings: &Settings) -> Result<Self> {
        let pins = settings.bpffs.join(DIRECTORY);
        fs::create_dir_all(&pins).map_err(|e| Error::file("make directory", &pins, e))?;
        let abilities = probe::run()?;
        if let Err(error) = bounded(abilities) {
            disable(&pins)?;
            return Err(error);
        }
        if !abilities.tells_unread && !settings.force {
            disable(&pins)?;
            return Err(unsupported(
                "this kernel's FIONREAD does not tell of all unread data on sockets in a map, so \
                 that nginx and others like it would stall; sockmap: force uses it nevertheless",
            ));
        }
        let programs = || {
            program_of(&pins.join(layout::SOCKETS))
                .into_iter()
                .collect()
        };
        // Programs that cannot be replaced, because their maps are others, are to do nothing more.
        let mut object = load_over(&pins, &layout::MAPS, None, programs, || load(&pins))
            .or_else(|error| disable(&pins).and(Err(error)))?;
        attach(&mut object, &pins, &settings.cgroup)?;
        let reaper = Reaper::start(&pins)?;
        let ztunnel = Netns::at(&settings.ztunnel_netns)?;
        let config = Config {
            ztunnel_netns: netns_cookie(&ztunnel, &settings.ztunnel_netns)?,
            enabled: true,
            forced: !abilities.tells_unread,
            memory_pages_max: settings.memory_max.map_or(0, pages),
        };
        set_config(&pins, config)?;
        Ok(Self {
            pins,
            ztunnel,
            cookies: std::collections::HashMap::new(),
            object,
            _reaper: reaper,
        })
    }

    /// Whether all of it is there and for ztunnel's network namespace as it is now. If not, it is
    /// to be installed again.
    #[must_use]
    pub fn is_current(&self) -> bool {
        let maps = layout::MAPS.iter().map(|map| map.name);
        let mut pins = maps.chain([layout::SOCKETS]);
        self.ztunnel.is_alive() && pins.all(|name| self.pins.join(name).exists())
    }

    /// Pins those maps again that somebody has unpinned, so that what is in them is not lost with
    /// this value: installing again then adopts them.
    ///
    /// # Errors
    /// If the directory for the pins cannot be made.
    pub fn pin_again(&self) -> Result<()> {
        fs::create_dir_all(&self.pins).map_err(|e| Error::file("make directory", &self.pins, e))?;
        rescue(&self.pins, &layout::MAPS, Some(&self.object), HashSet::new);
        Ok(())
    }

    /// New connections of exactly these pods use the sockmap. Every pod is tried.
    ///
    /// # Errors
    /// The first network namespace that cannot be entered, or if the map cannot be written.
    pub fn set_pods(&mut self, pods: &[Pod]) -> Result<()> {
        let mut map: Pods = open(&self.pins, layout::PODS)?;
        let mut results = Vec::new();
        let mut wanted = std::collections::HashMap::new();
        for pod in pods {
            match self.cookie(&pod.netns) {
                Ok(cookie) => wanted.extend(
                    pod.addresses
                        .iter()
                        .map(|address| (layout::pod_key(*address), cookie)),
                ),
                Err(error) => results.push(Err(error)),
            }
        }
        let paths: HashSet<_> = pods.iter().map(|pod| &pod.netns).collect();
        self.cookies.retain(|(path, _), _| paths.contains(path));
        let failed = write_failed(layout::PODS);
        let known: Vec<_> = map.iter().flatten().collect();
        for (address, cookie) in &known {
            if wanted.get(address) == Some(cookie) {
                wanted.remove(address);
            } else if !wanted.contains_key(address) {
                results.push(ignore_missing(map.remove(address)).map_err(&failed));
            }
        }
        for (address, cookie) in wanted {
            results.push(map.insert(address, cookie, 0).map_err(&failed));
        }
        results.into_iter().collect()
    }

    /// Asked once for each namespace.
    fn cookie(&mut self, path: &Path) -> Result<u64> {
        let netns = Netns::at(path)?;
        let key = (path.to_owned(), netns.inode());
        if let Some(cookie) = self.cookies.get(&key) {
            return Ok(*cookie);
        }
        let cookie = netns_cookie(&netns, path)?;
        self.cookies.insert(key, cookie);
        Ok(cookie)
    }
}

type Pods = HashMap<MapData, [u8; POD_BYTES], u64>;

/// `shortcut_senders`: cookies of sockets.
type Senders = HashMap<MapData, Key, u64>;

fn map_data(pins: &Path, name: &'static str) -> Result<MapData> {
    let pin = pins.join(name);
    MapData::from_pin(&pin).map_err(|e| Error::bpf("open map", pin.display().to_string(), &e))
}

fn open_senders(pins: &Path) -> Result<Senders> {
    senders(map_data(pins, layout::SENDERS)?)
}

/// aya takes maps of sockets with four-byte values only, and those cannot be looked into.
fn senders(map: MapData) -> Result<Senders> {
    let failed = |e: MapError| Error::bpf("use map", layout::SENDERS, &e);
    Senders::try_from(Map::HashMap(map)).map_err(failed)
}

/// Root of the cgroup2 hierarchy, which holds every process: where the sockmap is attached if
/// nothing narrower is known.
#[must_use]
pub fn root_cgroup() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let path = words.next()?;
        (words.next()? == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// Tries out whether this kernel can have the sockmap at all, with [`Settings::force`] if need
/// be.
///
/// # Errors
/// What it lacks.
pub fn check_kernel() -> Result<()> {
    bounded(probe::run()?)
}

fn bounded(abilities: probe::Abilities) -> Result<()> {
    if abilities.accounts {
        return Ok(());
    }
    Err(unsupported(
        "this kernel does not charge redirected data to its receiver, so memory could not be \
         bounded: Linux 6.13 or an older one with that repaired is needed",
    ))
}

/// What is installed below `bpffs`; None if nothing is.
///
/// # Errors
/// If it cannot be read.
pub fn status(bpffs: &Path) -> Result<Option<Status>> {
    let pins = bpffs.join(DIRECTORY);
    if !pins.join(layout::CONFIG).exists() {
        return Ok(None);
    }
    let config: Array<MapData, [u8; CONFIG_BYTES]> = open(&pins, layout::CONFIG)?;
    let read = |e: MapError| Error::bpf("read map", layout::CONFIG, &e);
    let config = Config::decode(&config.get(&0, 0).map_err(read)?);
    let map: PerCpuArray<MapData, u64> = open(&pins, layout::COUNTERS)?;
    let mut counters = BTreeMap::new();
    for (index, name) in (0_u32..).zip(COUNTER_NAMES) {
        let values = map.get(&index, 0);
        let values = values.map_err(|e| Error::bpf("read map", layout::COUNTERS, &e))?;
        counters.insert(name.to_owned(), values.iter().sum());
    }
    Ok(Some(Status {
        enabled: config.enabled,
        forced: config.forced,
        memory_max: (config.memory_pages_max > 0)
            .then(|| u64::from(config.memory_pages_max) * page_bytes()),
        counters,
    }))
}

/// Sockets in the map below `bpffs`: those whose calls take the way through the programs.
///
/// # Errors
/// If it cannot be read.
pub fn sockets(bpffs: &Path) -> Result<usize> {
    let senders = open_senders(&bpffs.join(DIRECTORY))?;
    Ok(senders.keys().flatten().count())
}

/// Gives all connections back to TCP and removes everything below `bpffs`, but for one pin while
/// there are connections that may have redirected data unread: removing it would lose that. They
/// leave it as they close; then, calling this again removes it.
///
/// # Errors
/// What could not be removed.
pub fn remove(bpffs: &Path) -> Result<()> {
    let pins = bpffs.join(DIRECTORY);
    if !pins.exists() {
        return Ok(());
    }
    disable(&pins)?;
    unpin(&pins.join(layout::SOCKETS))?;
    let left = release_sockets(&pins)?;
    if left > 0 {
        tracing::warn!(left, "sockets keep {} until they close", layout::SENDERS);
    }
    let entries = fs::read_dir(&pins).map_err(|e| Error::file("list", &pins, e))?;
    let mut others = 0;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if !name
            .to_str()
            .is_some_and(|name| name.starts_with(layout::PREFIX))
        {
            others += 1;
        } else if left == 0 || name != layout::SENDERS {
            unpin(&entry.path())?;
        }
    }
    if left > 0 {
        return Ok(());
    }
    if others > 0 {
        tracing::warn!(others, directory = %pins.display(), "not ours, so that it stays");
        return Ok(());
    }
    fs::remove_dir(&pins).map_err(|e| Error::file("remove directory", &pins, e))
}

fn unpin(pin: &Path) -> Result<()> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::file("remove pin", pin, error))
        }
        _ => Ok(()),
    }
}

/// Takes out all sockets that cannot lose anything by it, waiting a moment for others to become
/// so. Returns how many are left.
fn release_sockets(pins: &Path) -> Result<usize> {
    let needed = [
        layout::SENDERS,
        layout::TARGETS,
        layout::ENDS,
        layout::EVENTS,
    ];
    if !pins.join(layout::SENDERS).exists() {
        return Ok(0);
    }
    let mut senders = open_senders(pins)?;
    if !needed.iter().all(|name| pins.join(name).exists()) {
        return Ok(senders.keys().flatten().count());
    }
    let mut targets: SockHash<MapData, Key> = open(pins, layout::TARGETS)?;
    let ends: HashMap<MapData, Key, [u8; END_BYTES]> = open(pins, layout::ENDS)?;
    for key in targets.keys().flatten().collect::<Vec<_>>() {
        let _ = targets.remove(&key); // closed meanwhile
    }
    for key in senders.keys().flatten().collect::<Vec<_>>() {
        // Only after it is no target: what has not started then never will.
        if ends
            .get(&key, 0)
            .is_ok_and(|end| !layout::end_is_started(&end))
        {
            let _ = senders.remove(&key); // closed meanwhile
        }
    }
    let _reaper = Reaper::start(pins)?;
    let deadline = Instant::now() + DRAIN;
    loop {
        let left = senders.keys().flatten().count();
        if left == 0 || Instant::now() >= deadline {
            return Ok(left);
        }
        thread::sleep(DRAIN_POLL);
    }
}

/// Messages go by TCP from now on.
fn disable(pins: &Path) -> Result<()> {
    if pins.join(layout::CONFIG).exists() {
        set_config(pins, Config::default())?;
    }
    Ok(())
}

fn set_config(pins: &Path, config: Config) -> Result<()> {
    let mut map: Array<MapData, [u8; CONFIG_BYTES]> = open(pins, layout::CONFIG)?;
    map.set(0, config.encode(), 0)
        .map_err(|e| Error::bpf("write map", layout::CONFIG, &e))
}

/// Loads maps (those pinned already are used as they are) and programs.
fn load(pins: &Path) -> Result<Object> {
    let mut loader = EbpfLoader::new();
    for map in &layout::MAPS {
        let pin = pins.join(map.name);
        check_layout(&pin, map)?;
        loader.map_pin_path(map.name, pin);
    }
    let mut object = loader
        .load(layout::OBJECT)
        .map_err(|e| Error::bpf("load object", "sockmap.bpf.o", &e))?;
    let messages: &mut SkMsg = program(&mut object, layout::SEND)?;
    load_program(layout::SEND, || messages.load())?;
    let sockets: &mut SockOps = program(&mut object, layout::SOCKETS)?;
    load_program(layout::SOCKETS, || sockets.load())?;
    Ok(object)
}

/// The program on messages first, so that no socket is entered without it.
fn attach(object: &mut Object, pins: &Path, cgroup: &Path) -> Result<()> {
    let name = layout::SEND;
    let failed = |e: &(dyn std::error::Error + 'static)| Error::bpf("attach program", name, e);
    let senders = map_data(pins, layout::SENDERS)?;
    let messages: &mut SkMsg = program(object, name)?;
    let messages = messages.fd().map_err(|e| failed(&e))?;
    sys::attach_to_messages(messages.as_fd(), senders.fd().as_fd()).map_err(|e| failed(&e))?;
    let name = layout::SOCKETS;
    let failed = |e: &(dyn std::error::Error + 'static)| {
        Error::bpf(
            "attach program",
            format!("{name} to {}", cgroup.display()),
            e,
        )
    };
    let file = File::open(cgroup).map_err(|e| Error::file("open cgroup", cgroup, e))?;
    let sockets: &mut SockOps = program(object, name)?;
    let id = sockets
        .attach(file, CgroupAttachMode::Single)
        .map_err(|e| failed(&e))?;
    let link = sockets.take_link(id).map_err(|e| failed(&e))?;
    let link = FdLink::try_from(link).map_err(|e| failed(&e))?;
    replace_link(link, &pins.join(name))
}

/// A program of the object, as its kind.
fn program<'a, P>(object: &'a mut Object, name: &str) -> Result<&'a mut P>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = object.program_mut(name).ok_or_else(|| absent(name))?;
    program
        .try_into()
        .map_err(|e| Error::bpf("use program", name, &e))
}

fn netns_cookie(netns: &Netns, path: &Path) -> Result<u64> {
    netns.run(|| {
        let failed = |source| Error::file("ask for the cookie of", path, source);
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(failed)?;
        sys::netns_cookie(socket.as_fd()).map_err(failed)
    })
}

/// At least one: none would mean that there is no limit.
fn pages(bytes: u64) -> u32 {
    let pages = u32::try_from(bytes / page_bytes());
    pages.unwrap_or(u32::MAX).max(1)
}

fn page_bytes() -> u64 {
    use nix::unistd::{SysconfVar, sysconf};
    let size = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    size.and_then(|size| u64::try_from(size).ok())
        .unwrap_or(4096)
        .max(1)
}

fn absent(name: &str) -> Error {
    let missing = std::io::Error::new(std::io::ErrorKind::NotFound, "not in the object");
    Error::bpf("find", name, &missing)
}

fn unsupported(reason: &str) -> Error {
    Error::Bpf {
        action: "use",
        name: "sockmap".to_owned(),
        reason: reason.to_owned(),
    }
}
