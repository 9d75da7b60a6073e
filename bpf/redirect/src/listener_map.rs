//! The map through which ztunnel offers its listening sockets to the `sk_lookup` program.

use std::os::fd::BorrowedFd;
use std::path::Path;

use aya::maps::{Map, MapData, SockMap};

use crate::ebpf::{self, MAX_CPUS, Role};
use crate::error::{Error, Result};

/// The pinned socket map, one slot for each role and CPU.
///
/// A slot empties when its socket is closed. A CPU without an entry uses CPU 0's; if that is
/// empty, connections are refused. To hand over, set the successor's socket before closing.
pub struct ListenerMap {
    sockets: SockMap<MapData>,
}

impl std::fmt::Debug for ListenerMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ListenerMap").finish_non_exhaustive()
    }
}

impl ListenerMap {
    /// Opens the map that the `ebpf` back end pinned.
    ///
    /// # Errors
    /// [`Error::Bpf`]: it does not exist (yet), is not the right map, or CAP_BPF is missing.
    pub fn open(pinned: &Path) -> Result<Self> {
        let name = || pinned.display().to_string();
        let data = MapData::from_pin(pinned).map_err(|e| Error::bpf("open map", name(), &e))?;
        let map = Map::from_map_data(data).map_err(|e| Error::bpf("use map", name(), &e))?;
        let sockets = SockMap::try_from(map).map_err(|e| Error::bpf("use map", name(), &e))?;
        Ok(Self { sockets })
    }

    /// Whether the ztunnel that packets go to is the one of the calling thread's network namespace,
    /// by its address. Two may overlap, each in a namespace of its own; the map is for that one,
    /// and listeners of the other would take no connection and keep that one's out.
    ///
    /// `pinned` is the map's pin, as for [`ListenerMap::open`].
    ///
    /// # Errors
    /// [`Error::Bpf`] if the configuration of the programs, pinned beside the map, cannot be read.
    pub fn is_for_this_namespace(pinned: &Path) -> Result<bool> {
        let directory = pinned.parent().unwrap_or_else(|| Path::new("/"));
        let address = ebpf::ztunnel_address(directory)?;
        let mut own = nix::ifaddrs::getifaddrs().map_err(|errno| Error::Bpf {
            action: "find addresses for",
            name: pinned.display().to_string(),
            reason: errno.to_string(),
        })?;
        Ok(own.any(|entry| {
            let own = entry
                .address
                .and_then(|own| Some(own.as_sockaddr_in()?.ip()));
            own == Some(address)
        }))
    }

    /// Makes `listener` the one that gets `role`'s connections arriving on `cpu`.
    ///
    /// The socket must be listening (UDP: bound), transparent (IP_TRANSPARENT) and in ztunnel's
    /// network namespace. Replaces an earlier one without a gap.
    ///
    /// # Errors
    /// [`Error::Setting`] if `cpu` is not below [`MAX_CPUS`]; [`Error::Bpf`] if the kernel refuses
    /// the socket (not listening, not bound).
    pub fn set(&mut self, role: Role, cpu: u32, listener: BorrowedFd<'_>) -> Result<()> {
        if cpu >= MAX_CPUS {
            return Err(Error::Setting {
                field: "cpu",
                value: cpu.to_string(),
                reason: format!("must be below {MAX_CPUS}"),
            });
        }
        let key = role as u32 * MAX_CPUS + cpu;
        self.sockets
            .set(key, &listener, 0)
            .map_err(|e| Error::bpf("set listener", format!("{role:?} of CPU {cpu}"), &e))
    }
}
