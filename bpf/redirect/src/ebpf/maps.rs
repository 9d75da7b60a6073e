//! Reading and writing the pinned maps.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::path::Path;

use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, MapData, PerCpuArray};
use ipnet::IpNet;

use super::layout::{self, ADDRESS_BYTES, CONFIG_BYTES, Config, FLOW_BYTES};
use crate::error::{Error, Result};
use crate::settings::Pod;
use crate::status::Counters;
use crate::system::pins::{ignore_missing, open, write_failed};

type AddressKey = [u8; ADDRESS_BYTES];
pub(crate) type FlowKey = [u8; FLOW_BYTES];

pub(crate) fn set_config(pins: &Path, config: &Config) -> Result<()> {
    let mut map: Array<MapData, [u8; CONFIG_BYTES]> = open(pins, layout::CONFIG)?;
    map.set(0, config.encode(), 0)
        .map_err(write_failed(layout::CONFIG))
}

pub(crate) fn config(pins: &Path) -> Result<[u8; CONFIG_BYTES]> {
    let map: Array<MapData, [u8; CONFIG_BYTES]> = open(pins, layout::CONFIG)?;
    map.get(&0, 0)
        .map_err(|e| Error::bpf("read map", layout::CONFIG, &e))
}

type Cidrs = LpmTrie<MapData, AddressKey, u32>;

/// Makes the map hold exactly these networks.
pub(crate) fn set_pod_cidrs(pins: &Path, cidrs: &[IpNet]) -> Result<()> {
    let failed = write_failed(layout::POD_CIDRS);
    let mut map: Cidrs = open(pins, layout::POD_CIDRS)?;
    let wanted: Vec<_> = cidrs
        .iter()
        .map(|cidr| {
            let outside = if cidr.addr().is_ipv4() { 96 } else { 0 };
            let prefix = outside + u32::from(cidr.prefix_len());
            (prefix, layout::address(cidr.network()))
        })
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

/// The networks in the map, for people.
pub(crate) fn pod_cidrs(pins: &Path) -> Result<Vec<String>> {
    let map: Cidrs = open(pins, layout::POD_CIDRS)?;
    let describe = |key: Key<AddressKey>| {
        let network = layout::parse_address(key.data());
        let outside = if network.is_ipv4() { 96 } else { 0 };
        format!("{network}/{}", key.prefix_len().saturating_sub(outside))
    };
    map.keys()
        .map(|key| key.map(describe))
        .collect::<Result<_, _>>()
        .map_err(|e| Error::bpf("read map", layout::POD_CIDRS, &e))
}

/// Makes the map hold exactly these addresses of the node. New ones come first.
pub(crate) fn set_node_addresses(pins: &Path, addresses: &HashSet<IpAddr>) -> Result<()> {
    let failed = write_failed(layout::NODE_ADDRESSES);
    let mut map: HashMap<MapData, AddressKey, u8> = open(pins, layout::NODE_ADDRESSES)?;
    let wanted: HashSet<AddressKey> = addresses.iter().map(|ip| layout::address(*ip)).collect();
    let old = map
        .keys()
        .collect::<Result<HashSet<_>, _>>()
        .map_err(&failed)?;
    for key in wanted.difference(&old) {
        map.insert(key, 1, 0).map_err(&failed)?;
    }
    for key in old.difference(&wanted) {
        ignore_missing(map.remove(key)).map_err(&failed)?;
    }
    Ok(())
}

/// The map of captured addresses: interface index and flags by address.
pub(crate) struct Pods(HashMap<MapData, AddressKey, [u32; 2]>);

impl Pods {
    pub(crate) fn open(pins: &Path) -> Result<Self> {
        open(pins, layout::PODS).map(Self)
    }

    /// Interface index and flags of the pod, if all its addresses have the same.
    pub(crate) fn get(&self, pod: &Pod) -> Option<[u32; 2]> {
        let mut all = pod.addresses.iter().map(|address| {
            let [index, word] = self.0.get(&layout::address(*address), 0).ok()?;
            Some([index, word & layout::POD_FLAGS])
        });
        let first = all.next().flatten();
        first.filter(|_| all.all(|other| other == first))
    }

    /// What the programs have noted of the pod stays if it is the same interface's.
    pub(crate) fn set(&mut self, pod: &Pod, index: u32, flags: u32) -> Result<()> {
        for address in &pod.addresses {
            let key = layout::address(*address);
            let known = self.0.get(&key, 0).unwrap_or_default();
            let kept = if known[0] == index {
                known[1] & !layout::POD_FLAGS
            } else {
                0
            };
            self.0
                .insert(key, [index, flags | kept], 0)
                .map_err(write_failed(layout::PODS))?;
        }
        Ok(())
    }

    pub(crate) fn remove(&mut self, pod: &Pod) -> Result<()> {
        for address in &pod.addresses {
            ignore_missing(self.0.remove(&layout::address(*address)))
                .map_err(write_failed(layout::PODS))?;
        }
        Ok(())
    }

    /// All addresses with their interface's index.
    pub(crate) fn all(&self) -> Result<Vec<(IpAddr, u32)>> {
        self.0
            .iter()
            .map(|entry| entry.map(|(key, [index, _])| (layout::parse_address(key), index)))
            .collect::<Result<_, _>>()
            .map_err(|e| Error::bpf("read map", layout::PODS, &e))
    }

    /// Removes addresses that belong to none of these pods.
    pub(crate) fn retain(&mut self, pods: &[Pod]) -> Result<()> {
        let wanted: HashSet<IpAddr> = pods
            .iter()
            .flat_map(|pod| &pod.addresses)
            .copied()
            .collect();
        for (address, _) in self.all()? {
            if !wanted.contains(&address) {
                ignore_missing(self.0.remove(&layout::address(address)))
                    .map_err(write_failed(layout::PODS))?;
            }
        }
        Ok(())
    }
}

/// The map of connections that are older than their pod's capture.
pub(crate) struct OlderFlows(HashMap<MapData, FlowKey, u8>);

impl OlderFlows {
    pub(crate) fn open(pins: &Path) -> Result<Self> {
        open(pins, layout::OLDER_FLOWS).map(Self)
    }

    pub(crate) fn add(&mut self, key: FlowKey) -> Result<()> {
        self.0
            .insert(key, 1, 0)
            .map_err(write_failed(layout::OLDER_FLOWS))
    }

    pub(crate) fn all(&self) -> Result<Vec<FlowKey>> {
        self.0
            .keys()
            .collect::<Result<_, _>>()
            .map_err(|e| Error::bpf("read map", layout::OLDER_FLOWS, &e))
    }

    pub(crate) fn remove(&mut self, key: &FlowKey) -> Result<()> {
        ignore_missing(self.0.remove(key)).map_err(write_failed(layout::OLDER_FLOWS))
    }
}

/// All counters that are not zero, by program and reason, over all CPUs.
pub(crate) fn counters(pins: &Path) -> Result<Counters> {
    let map: PerCpuArray<MapData, u64> = open(pins, layout::COUNTERS)?;
    let mut all = Counters::new();
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
