//! Reading and writing the pinned maps.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;

use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, MapInfo, PerCpuArray};
use ipnet::Ipv4Net;

use super::layout::{self, CONFIG_BYTES, Config, MapLayout};
use crate::error::{Error, Result};
use crate::settings::Pod;

fn open<T>(pins: &Path, name: &'static str) -> Result<T>
where
    T: TryFrom<Map, Error = MapError>,
{
    let pin = pins.join(name);
    let failed = |e: MapError| Error::bpf("open map", pin.display().to_string(), &e);
    // Map types are told apart by what the kernel says of the pinned one.
    let map = MapData::from_pin(&pin)
        .and_then(Map::from_map_data)
        .map_err(failed)?;
    T::try_from(map).map_err(failed)
}

fn write_failed(name: &'static str) -> impl Fn(MapError) -> Error {
    move |e| Error::bpf("write map", name, &e)
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

pub(crate) fn set_config(pins: &Path, config: &Config) -> Result<()> {
    let mut map: Array<MapData, [u8; CONFIG_BYTES]> = open(pins, layout::CONFIG)?;
    map.set(0, config.encode(), 0)
        .map_err(write_failed(layout::CONFIG))
}

/// Makes the map hold exactly these networks.
pub(crate) fn set_pod_cidrs(pins: &Path, cidrs: &[Ipv4Net]) -> Result<()> {
    let failed = write_failed(layout::POD_CIDRS);
    let mut map: LpmTrie<MapData, [u8; 4], u32> = open(pins, layout::POD_CIDRS)?;
    let wanted: Vec<_> = cidrs
        .iter()
        .map(|cidr| (u32::from(cidr.prefix_len()), cidr.network().octets()))
        .collect();
    let old = map.keys().collect::<Result<Vec<_>, _>>().map_err(&failed)?;
    for key in old {
        if !wanted.contains(&(key.prefix_len(), key.data())) {
            map.remove(&key).map_err(&failed)?;
        }
    }
    for (prefix, address) in wanted {
        map.insert(&Key::new(prefix, address), 1, 0)
            .map_err(&failed)?;
    }
    Ok(())
}

type Pods = HashMap<MapData, [u8; 4], u32>;

/// Interface index of the pod's addresses, if all have the same.
pub(crate) fn pod_index(pins: &Path, pod: &Pod) -> Result<Option<u32>> {
    let map: Pods = open(pins, layout::PODS)?;
    let mut indexes = pod.ipv4().map(|address| map.get(&address.octets(), 0).ok());
    let first = indexes.next().flatten();
    Ok(first.filter(|_| indexes.all(|other| other == first)))
}

pub(crate) fn add_pod(pins: &Path, pod: &Pod, index: u32) -> Result<()> {
    let mut map: Pods = open(pins, layout::PODS)?;
    for address in pod.ipv4() {
        map.insert(address.octets(), index, 0)
            .map_err(write_failed(layout::PODS))?;
    }
    Ok(())
}

pub(crate) fn remove_pod(pins: &Path, pod: &Pod) -> Result<()> {
    if !pins.join(layout::PODS).exists() {
        return Ok(());
    }
    let mut map: Pods = open(pins, layout::PODS)?;
    for address in pod.ipv4() {
        match map.remove(&address.octets()) {
            Ok(()) | Err(MapError::KeyNotFound) => {}
            Err(error) if is_not_found(&error) => {}
            Err(error) => return Err(write_failed(layout::PODS)(error)),
        }
    }
    Ok(())
}

/// Removes addresses that belong to none of these pods.
pub(crate) fn retain_pods(pins: &Path, pods: &[Pod]) -> Result<()> {
    let failed = write_failed(layout::PODS);
    let mut map: Pods = open(pins, layout::PODS)?;
    let wanted: Vec<Ipv4Addr> = pods.iter().flat_map(Pod::ipv4).collect();
    let known = map.keys().collect::<Result<Vec<_>, _>>().map_err(&failed)?;
    for address in known {
        if !wanted.contains(&Ipv4Addr::from(address)) {
            map.remove(&address).map_err(&failed)?;
        }
    }
    Ok(())
}

fn is_not_found(error: &MapError) -> bool {
    matches!(error, MapError::SyscallError(e)
        if e.io_error.kind() == std::io::ErrorKind::NotFound)
}

/// All counters that are not zero, by program and reason, over all CPUs.
pub(crate) fn counters(pins: &Path) -> Result<BTreeMap<String, BTreeMap<String, u64>>> {
    let map: PerCpuArray<MapData, u64> = open(pins, layout::COUNTERS)?;
    let mut all = BTreeMap::new();
    for (program_index, program) in layout::PROGRAMS.iter().enumerate() {
        let mut of_program = BTreeMap::new();
        for (reason_index, reason) in layout::REASONS.iter().enumerate() {
            let index = (program_index * layout::REASONS.len() + reason_index) as u32;
            let values = map
                .get(&index, 0)
                .map_err(|e| Error::bpf("read map", layout::COUNTERS, &e))?;
            let sum: u64 = values.iter().sum();
            if sum > 0 {
                of_program.insert((*reason).to_owned(), sum);
            }
        }
        all.insert((*program).to_owned(), of_program);
    }
    Ok(all)
}
