//! The agent's configuration: settings of the node. Its pods are desired state, see
//! [`crate::source`].

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use redirect::{
    Attach, BackEnd, EbpfSettings, Iptables, Node, Redirect, Redirection, Settings, TunnelSettings,
    Variant, Ztunnel, sockmap,
};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::error::{Error, Result};

/// Whether something is used.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Switch {
    #[default]
    Off,
    On,
    /// Also on a kernel whose FIONREAD is wrong.
    Force,
}

/// The file. Unknown keys are errors.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Back end: `tunnel` or `ebpf`.
    pub(crate) redirect: Redirect,
    /// `tunnel`: `hardened` (default) or `faithful`.
    #[serde(default)]
    variant: Variant,
    /// `tunnel`: `auto` (default), `nft` or `legacy`.
    #[serde(default)]
    iptables: Iptables,
    /// Whether DNS queries go to ztunnel; off by default.
    #[serde(default)]
    dns: bool,
    /// `ebpf`: `auto` (default), `tcx` or `clsact`.
    #[serde(default)]
    attach: Attach,
    /// Seconds between looks for what others removed (1 to 3600, 10 by default).
    #[serde(default = "default_reconcile_s")]
    reconcile_s: u32,
    /// `ebpf`: whether connections between pods and ztunnel use the sockmap.
    #[serde(default)]
    sockmap: Switch,
    /// `sockmap`: cgroup2 directory that holds the pods' and ztunnel's processes; by default the
    /// root of that hierarchy.
    #[serde(default)]
    cgroup: Option<PathBuf>,
    /// `sockmap`: MiB of memory of all TCP sockets above which the sockmap is not used (1 to
    /// 1,048,576); by default only the kernel's own limit counts.
    #[serde(default)]
    sockmap_memory_mib: Option<u32>,
    /// Where counters for Prometheus are served, at `/metrics`; nowhere by default.
    #[serde(default)]
    pub(crate) stats_address: Option<SocketAddr>,
    node: Node,
    ztunnel: Ztunnel,
    /// Directory for the journal and the lock.
    pub(crate) state_dir: PathBuf,
    /// `ebpf`: directory in a mounted bpffs.
    #[serde(default)]
    bpffs: PathBuf,
    /// In the same file, but no configuration.
    #[serde(default, rename = "pods")]
    _pods: IgnoredAny,
}

fn default_reconcile_s() -> u32 {
    10
}

impl Config {
    /// Reads and checks a file.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::ReadConfig {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &text)
    }

    /// Checks the contents of a file; `path` is for the error.
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self> {
        let config: Self = serde_saphyr::from_str(text).map_err(|error| wrong(path, &error))?;
        let wrong = |reason: String| refused(path, &reason);
        if config.redirect == Redirect::Ebpf && !config.bpffs.is_absolute() {
            return Err(wrong(
                "bpffs: an absolute path is needed with redirect: ebpf".to_owned(),
            ));
        }
        if !(1..=3600).contains(&config.reconcile_s) {
            return Err(wrong(format!(
                "reconcile_s {}: must be 1 to 3600",
                config.reconcile_s
            )));
        }
        if let Some(mib) = config.sockmap_memory_mib
            && !(1..=1 << 20).contains(&mib)
        {
            return Err(wrong(format!(
                "sockmap_memory_mib {mib}: must be 1 to 1048576"
            )));
        }
        if config.sockmap != Switch::Off {
            config.check_sockmap().map_err(wrong)?;
        }
        if !config.state_dir.is_absolute() {
            return Err(wrong("state_dir: an absolute path is needed".to_owned()));
        }
        config
            .settings()
            .validate()
            .map_err(|error| wrong(error.to_string()))?;
        Ok(config)
    }

    pub(crate) fn reconcile(&self) -> Duration {
        Duration::from_secs(self.reconcile_s.into())
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings {
            node: self.node.clone(),
            ztunnel: self.ztunnel.clone(),
            state_dir: self.state_dir.clone(),
            dns: self.dns,
            back_end: match self.redirect {
                Redirect::Ebpf => BackEnd::Ebpf(EbpfSettings {
                    bpffs: self.bpffs.clone(),
                    attach: self.attach,
                }),
                Redirect::Tunnel => BackEnd::IptablesTunnel(TunnelSettings {
                    variant: self.variant,
                    iptables: self.iptables,
                }),
            },
        }
    }

    fn check_sockmap(&self) -> Result<(), String> {
        if self.redirect != Redirect::Ebpf {
            return Err("sockmap: on needs redirect: ebpf".to_owned());
        }
        if self.sockmap().is_none() {
            let missing = "no cgroup2 file system is mounted; name one by cgroup";
            return Err(format!("sockmap: {missing}"));
        }
        Ok(())
    }

    /// What the sockmap needs, if it is asked for.
    pub(crate) fn sockmap(&self) -> Option<sockmap::Settings> {
        (self.sockmap != Switch::Off).then_some(())?;
        Some(sockmap::Settings {
            bpffs: self.bpffs.clone(),
            cgroup: self.cgroup.clone().or_else(sockmap::root_cgroup)?,
            ztunnel_netns: self.ztunnel.netns.clone(),
            force: self.sockmap == Switch::Force,
            memory_max: self.sockmap_memory_mib.map(|mib| u64::from(mib) << 20),
        })
    }

    /// Where pins are, if the back end has any.
    pub(crate) fn pins(&self) -> Option<&Path> {
        (self.redirect == Redirect::Ebpf).then_some(&*self.bpffs)
    }

    /// The back end, nothing installed yet.
    pub(crate) fn redirection(&self) -> Result<Box<dyn Redirection + Send>> {
        Ok(redirect::redirection(self.settings())?)
    }

    /// Whether a running agent can go from this to `next`.
    pub(crate) fn can_become(&self, next: &Self) -> bool {
        self.redirect == next.redirect
            && self.state_dir == next.state_dir
            && self.bpffs == next.bpffs
            && self.attach == next.attach
    }
}

/// What is wrong with the YAML of a file.
pub(crate) fn wrong(path: &Path, error: &serde_saphyr::Error) -> Error {
    refused(path, &error.without_snippet().to_string())
}

fn refused(path: &Path, reason: &str) -> Error {
    let lines = reason.lines().map(str::trim);
    let lines: Vec<_> = lines.filter(|line| !line.is_empty()).collect();
    Error::Config {
        path: path.to_owned(),
        reason: lines.join("; "),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const SOUND: &str = "
redirect: ebpf
node: {interfaces: [und], address: 10.244.1.1, pod_cidrs: [10.244.0.0/16]}
ztunnel: {netns: /run/netns/z, interface: eth0, host_interface: vz, address: 10.244.1.2}
state_dir: /run/x
bpffs: /run/y
pods:
- {uid: a, namespace: ns, name: a, service_account: s, addresses: [10.244.1.11], netns: /run/netns/a,
   host_interface: va1}
";

    fn error(text: &str) -> String {
        Config::parse(Path::new("/c.yaml"), text)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_sound_file_is_read() {
        let config = Config::parse(Path::new("/c.yaml"), SOUND).unwrap();
        assert_eq!(config.redirect, Redirect::Ebpf);
        assert_eq!(config.variant, Variant::Hardened);
    }

    #[test]
    fn the_sockmap_is_off_unless_asked_for() {
        let config = Config::parse(Path::new("/c.yaml"), SOUND).unwrap();
        assert_eq!(config.sockmap(), None);
        let on = SOUND.replace("pods:", "sockmap: on\ncgroup: /c\npods:");
        let config = Config::parse(Path::new("/c.yaml"), &on).unwrap();
        let sockmap = config.sockmap().unwrap();
        assert_eq!(sockmap.cgroup, Path::new("/c"));
        assert_eq!(sockmap.bpffs, Path::new("/run/y"));
        assert_eq!(sockmap.memory_max, None);
        let bounded = on.replace("pods:", "sockmap_memory_mib: 64\npods:");
        let config = Config::parse(Path::new("/c.yaml"), &bounded).unwrap();
        assert_eq!(config.sockmap().unwrap().memory_max, Some(64 << 20));
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        let cases = [
            ("", "configuration /c.yaml"),
            ("redirect: [", "configuration /c.yaml"),
            (&SOUND.replace("ebpf", "carrier-pigeon"), "carrier-pigeon"),
            (&SOUND.replace("state_dir", "statedir"), "statedir"),
            (&SOUND.replace("pods:", "sockmap: maybe\npods:"), "maybe"),
            (
                &SOUND
                    .replace("ebpf", "tunnel")
                    .replace("pods:", "sockmap: on\npods:"),
                "sockmap",
            ),
            (&SOUND.replace("/run/y", "y"), "bpffs"),
            (
                &SOUND.replace("redirect:", "reconcile_s: 0\nredirect:"),
                "1 to 3600",
            ),
            (
                &SOUND.replace("redirect:", "sockmap_memory_mib: 0\nredirect:"),
                "1 to 1048576",
            ),
        ];
        for (text, expected) in cases {
            let message = error(text);
            assert!(message.contains(expected), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }
}
