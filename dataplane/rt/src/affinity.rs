//! Which CPUs this process may use, and pinning a worker to one of them.

use std::io;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// CPUs in this thread's affinity mask, in ascending order.
///
/// # Errors
/// The error of `sched_getaffinity(2)`.
pub fn available_cpus() -> io::Result<Vec<u32>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU)
        .filter(|&cpu| set.is_set(cpu))
        .map(|cpu| cpu as u32)
        .collect())
}

/// Pins the calling thread to one CPU.
///
/// # Errors
/// `InvalidInput` for a CPU number beyond the kernel's set, else that of `sched_setaffinity(2)`.
pub fn pin_current_thread(cpu: u32) -> io::Result<()> {
    if cpu as usize >= CpuSet::MAX_CPU {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("cpu {cpu} is out of range 0..{}", CpuSet::MAX_CPU),
        ));
    }
    let mut set = CpuSet::new();
    set.set(cpu as usize);
    Ok(sched_setaffinity(None, &set)?)
}
