//! Maps and links that outlive this process, pinned by name in a directory of a bpffs.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use aya::Ebpf as Object;
use aya::maps::{Map, MapData, MapError, MapInfo};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::loaded_programs;

use super::pin_kind::{self, Kind};
use super::programs;
use crate::error::{Error, Result};

/// A map, by its name in the object and as a pin: key size, value size, entries.
pub(crate) struct MapLayout {
    pub(crate) name: &'static str,
    pub(crate) key_bytes: u32,
    pub(crate) value_bytes: u32,
    pub(crate) entries_max: u32,
}

/// Opens a pinned map. Types are told apart by what the kernel says of it.
pub(crate) fn open<T>(pins: &Path, name: &'static str) -> Result<T>
where
    T: TryFrom<Map, Error = MapError>,
{
    let pin = pins.join(name);
    let failed = |e: MapError| Error::bpf("open map", pin.display().to_string(), &e);
    let map = MapData::from_pin(&pin)
        .and_then(Map::from_map_data)
        .map_err(failed)?;
    T::try_from(map).map_err(failed)
}

/// Turns a failure to write a map into an error of ours.
pub(crate) fn write_failed(name: &'static str) -> impl Fn(MapError) -> Error {
    move |e| Error::bpf("write map", name, &e)
}

/// That what is to be removed is not there is fine.
pub(crate) fn ignore_missing(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(e)) if e.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Refuses a pinned map that is not like the programs'; none is fine.
pub(crate) fn check_layout(pin: &Path, wanted: &MapLayout) -> Result<()> {
    if !pin.exists() {
        return Ok(());
    }
    let info = MapInfo::from_pin(pin)
        .map_err(|e| Error::bpf("open map", pin.display().to_string(), &e))?;
    let describe =
        |key, value, entries| format!("{key}-byte keys, {value}-byte values, {entries} entries");
    let found = describe(info.key_size(), info.value_size(), info.max_entries());
    let expected = describe(wanted.key_bytes, wanted.value_bytes, wanted.entries_max);
    if found == expected {
        return Ok(());
    }
    Err(Error::Layout {
        path: pin.to_owned(),
        found,
        expected,
    })
}

/// Pins the link, without a gap if an earlier one is pinned there.
pub(crate) fn replace_link(link: FdLink, pin: &Path) -> Result<()> {
    let name = pin.file_name().and_then(|name| name.to_str());
    let next = pin.with_file_name(next_name(name.unwrap_or_default()));
    let _ = fs::remove_file(&next); // left over if an earlier process was killed right here
    link.pin(&next)
        .map_err(|e| Error::bpf("pin link", next.display().to_string(), &e))?;
    fs::rename(&next, pin).map_err(|e| Error::file("replace pin", pin, e))
}

/// Name of the pin that is about to become `name`.
pub(crate) fn next_name(name: &str) -> String {
    format!("{name}_next")
}

/// The program of a pinned link.
pub(crate) fn program_of(link: &Path) -> Option<u32> {
    let link = FdLink::from(PinnedLink::from_pin(link).ok()?);
    link.info().ok().map(|info| info.program_id())
}

/// Name of the map that is pinned there, as the kernel has it; None if it is no map.
pub(crate) fn map_name(pin: &Path) -> Option<String> {
    (pin_kind::kind(pin).ok()? == Kind::Map).then_some(())?;
    let info = MapInfo::from_pin(pin).ok()?;
    info.name_as_str().map(str::to_owned)
}

/// Name of the program whose link is pinned there, as the kernel has it; None if it is no link, or
/// one whose program is gone.
pub(crate) fn program_name(pin: &Path) -> Option<String> {
    (pin_kind::kind(pin).ok()? == Kind::Link).then_some(())?;
    let wanted = program_of(pin)?;
    // Numbers are not given anew while the kernel has others, so that what was read stays true; and
    // there may be thousands of pins of a few programs.
    static NAMES: Mutex<BTreeMap<u32, String>> = Mutex::new(BTreeMap::new());
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if !names.contains_key(&wanted) {
        let all = loaded_programs().flatten();
        *names = all
            .filter_map(|program| Some((program.id(), program.name_as_str()?.to_owned())))
            .collect();
    }
    names.get(&wanted).cloned()
}

/// Whether a pin that the journal knows as ours is another's by now: a map or a link of another
/// name. What is neither, or dead, nobody else can have any use for.
pub(crate) fn is_foreign(pin: &Path) -> bool {
    let name = pin.file_name().and_then(|name| name.to_str());
    let name = name.unwrap_or_default();
    match (map_name(pin), program_name(pin)) {
        (Some(shown), _) => !programs::is_called(&shown, name),
        (_, Some(shown)) => programs::own(&shown).is_none(),
        _ => false,
    }
}

/// How often loading is tried while somebody keeps removing pins.
const LOADS_MAX: usize = 5;

/// Loads an object over pinned maps with `load`. Maps that are in use stay the ones that are used,
/// also if somebody removes their pins, even meanwhile.
pub(crate) fn load_over(
    pins: &Path,
    maps: &[MapLayout],
    own: Option<&Object>,
    programs: impl Fn() -> HashSet<u32>,
    mut load: impl FnMut() -> Result<Object>,
) -> Result<Object> {
    let mut loads = 0;
    loop {
        rescue(pins, maps, own, &programs);
        // As long as these are open, they do not go with their pins.
        let held = open_fitting(pins, maps);
        let object = load()?;
        loads += 1;
        let replaced: Vec<_> = held
            .into_iter()
            .filter(|(name, map)| !is_pinned_as(map, &pins.join(name)))
            .collect();
        if replaced.is_empty() || loads == LOADS_MAX {
            return Ok(object);
        }
        for (name, map) in replaced {
            let pin = pins.join(name);
            let _ = fs::remove_file(&pin); // gone again, maybe
            if let Err(error) = map.pin(&pin) {
                tracing::warn!(map = name, %error, "its pin is gone");
            }
        }
    }
}

/// The maps that are pinned and like the programs'.
fn open_fitting(pins: &Path, maps: &[MapLayout]) -> Vec<(&'static str, MapData)> {
    let open = |map: &MapLayout| {
        let pin = pins.join(map.name);
        check_layout(&pin, map).ok()?;
        Some((map.name, MapData::from_pin(pin).ok()?))
    };
    maps.iter().filter_map(open).collect()
}

fn is_pinned_as(map: &MapData, pin: &Path) -> bool {
    let id = |info: std::result::Result<MapInfo, MapError>| info.map(|info| info.id()).ok();
    id(map.info()) == id(MapInfo::from_pin(pin))
}

/// Pins again those maps that lost their pin but are still in use, so that what is in them is kept:
/// this process's own, else those of `programs`. What cannot be rescued is made anew by loading.
pub(crate) fn rescue(
    pins: &Path,
    maps: &[MapLayout],
    own: Option<&Object>,
    programs: impl FnOnce() -> HashSet<u32>,
) {
    let mut missing: Vec<_> = maps.iter().map(|map| map.name).collect();
    missing.retain(|name| !pins.join(name).exists());
    if missing.is_empty() {
        return;
    }
    let of_object: HashMap<_, _> = own.iter().flat_map(|object| object.maps()).collect();
    let in_use = maps_of(&programs());
    for name in missing {
        let pin = pins.join(name);
        let pinned = match (of_object.get(name), in_use.get(name)) {
            (Some(map), _) => map.pin(&pin).map_err(|e| e.to_string()),
            (None, Some(&id)) => MapData::from_id(id)
                .map_err(|error| error.to_string())
                .and_then(|data| data.pin(&pin).map_err(|e| e.to_string())),
            (None, None) => continue,
        };
        match pinned {
            Ok(()) => tracing::warn!(map = name, "its pin was gone, pinned again"),
            Err(error) => tracing::warn!(map = name, error, "its pin is gone"),
        }
    }
}

/// Identifiers of the maps that these programs use, by name.
fn maps_of(programs: &HashSet<u32>) -> HashMap<String, u32> {
    if programs.is_empty() {
        return HashMap::new();
    }
    loaded_programs()
        .flatten()
        .filter(|program| programs.contains(&program.id()))
        .filter_map(|program| program.map_ids().ok()?)
        .flatten()
        .filter_map(|id| Some((MapInfo::from_id(id).ok()?.name_as_str()?.to_owned(), id)))
        .collect()
}
