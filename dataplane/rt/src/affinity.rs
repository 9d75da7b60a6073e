//! Which CPUs this process may use, and pinning a worker to one of them.

use std::io;

/// CPUs in this thread's affinity mask, in ascending order.
///
/// # Errors
/// The error of `sched_getaffinity(2)`.
pub fn available_cpus() -> io::Result<Vec<u32>> {
    // SAFETY: cpu_set_t is a plain bit array; all zeroes is its empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is valid for writes of its own size; pid 0 is the calling thread.
    let rc = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    let is_set = |cpu: u32| {
        // SAFETY: CPU_ISSET only reads the set, and `cpu` is below CPU_SETSIZE.
        unsafe { libc::CPU_ISSET(cpu as usize, &set) }
    };
    Ok((0..libc::CPU_SETSIZE as u32)
        .filter(|&cpu| is_set(cpu))
        .collect())
}

/// Pins the calling thread to one CPU.
///
/// # Errors
/// `InvalidInput` for a CPU number beyond the kernel's set, else that of `sched_setaffinity(2)`.
pub fn pin_current_thread(cpu: u32) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as u32 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("cpu {cpu} is out of range 0..{}", libc::CPU_SETSIZE),
        ));
    }
    // SAFETY: cpu_set_t is a plain bit array; all zeroes is its empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `cpu` was checked to be below CPU_SETSIZE, so the bit lies inside the set.
    unsafe { libc::CPU_SET(cpu as usize, &mut set) };
    // SAFETY: `set` is initialised and its own size is passed; pid 0 is the calling thread.
    let rc = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) };
    if rc != 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
