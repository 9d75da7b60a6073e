//! Whether this process may do what redirection needs.

use crate::error::{Error, Result};

/// Number of the capability in <linux/capability.h>, and its name.
const NET_ADMIN: (u32, &str) = (12, "CAP_NET_ADMIN");
const NET_RAW: (u32, &str) = (13, "CAP_NET_RAW");
const SYS_ADMIN: (u32, &str) = (21, "CAP_SYS_ADMIN");
const BPF: (u32, &str) = (39, "CAP_BPF");

/// Checks for CAP_NET_ADMIN (interfaces, rules, attaching programs), CAP_SYS_ADMIN (entering
/// ztunnel's network namespace), CAP_NET_RAW (iptables) and, if `bpf`, CAP_BPF.
///
/// # Errors
/// [`Error::Privileges`] with the names of those missing; [`Error::File`] if /proc cannot be read.
pub fn check(bpf: bool) -> Result<()> {
    const STATUS: &str = "/proc/thread-self/status";
    let status =
        std::fs::read_to_string(STATUS).map_err(|source| Error::file("read", STATUS, source))?;
    let missing = missing(effective(&status), bpf);
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::Privileges {
        missing: missing.join(", "),
    })
}

/// The effective capability set of a `/proc/.../status`; empty if it has none.
fn effective(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0)
}

fn missing(effective: u64, bpf: bool) -> Vec<&'static str> {
    let has = |number: u32| effective & (1 << number) != 0;
    let needed = if bpf {
        [NET_ADMIN, SYS_ADMIN, BPF]
    } else {
        [NET_ADMIN, SYS_ADMIN, NET_RAW]
    };
    needed
        .into_iter()
        .filter(|&(number, _)| !has(number))
        .filter(|&(number, _)| number != BPF.0 || !has(SYS_ADMIN.0))
        .map(|(_, name)| name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        let all = effective("Name:\tx\nCapEff:\t000001ffffffffff\n");
        assert!(missing(all, true).is_empty() && missing(all, false).is_empty());
        assert_eq!(
            missing(0, true),
            ["CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_BPF"]
        );
        assert_eq!(missing(1 << 12 | 1 << 21, true), [""; 0]);
        assert_eq!(missing(1 << 12 | 1 << 21, false), ["CAP_NET_RAW"]);
        assert_eq!(effective("nothing"), 0);
    }
}
