//! What the lab remembers on disk between commands: `/run/zt-lab/<name>/state.json`.
//!
//! Written before the first thing is created and after every process started, by rename, so that
//! whatever kills `up`, the next command knows what there is to remove.

use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::lock::ROOT;
use crate::peers::ProxyKind;
use crate::process::Process;
use crate::services::Services;

/// Which path captured traffic takes to ztunnel.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Redirect {
    /// No ztunnel and no redirection: plain forwarding.
    None,
    /// iptables marks, policy routes and a tunnel, as Istio 1.17 to 1.20.
    Tunnel,
    /// tc programs and sk_lookup.
    #[default]
    Ebpf,
}

impl Redirect {
    /// The name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Tunnel => "tunnel",
            Self::Ebpf => "ebpf",
        }
    }
}

impl fmt::Display for Redirect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Redirect {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::None, Self::Tunnel, Self::Ebpf]
            .into_iter()
            .find(|redirect| redirect.name() == text)
            .ok_or_else(|| {
                Error::Options(format!("redirect `{text}` is none of none, tunnel, ebpf"))
            })
    }
}

/// Rule set of the `tunnel` path.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// Istio 1.20's, with its four defects that lose connections: resets of node-local ones, leaked
    /// TIME_WAIT answers, SYN cookies refused, the path's errors and its MTU unheard.
    Faithful,
    /// The same path with the defects fixed.
    #[default]
    Hardened,
}

impl Variant {
    /// The name in the node agent's configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Faithful => "faithful",
            Self::Hardened => "hardened",
        }
    }
}

impl FromStr for Variant {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Faithful, Self::Hardened]
            .into_iter()
            .find(|variant| variant.name() == text)
            .ok_or_else(|| {
                Error::Options(format!("variant `{text}` is neither faithful nor hardened"))
            })
    }
}

/// How far `up` came.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Phase {
    /// `up` is at work, or died.
    Starting,
    /// The lab works.
    Up,
}

/// The state file's content.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct State {
    pub(crate) schema: u32,
    pub(crate) name: String,
    pub(crate) phase: Phase,
    pub(crate) redirect: Redirect,
    pub(crate) variant: Variant,
    pub(crate) sockmap: bool,
    /// Whose rules for services the nodes have.
    #[serde(default)]
    pub(crate) services: Services,
    /// What stands in ztunnel's place.
    #[serde(default)]
    pub(crate) proxy: ProxyKind,
    /// The ztunnel binary, if there is one.
    pub(crate) ztunnel: Option<PathBuf>,
    /// The node agent's binary, if there is one.
    pub(crate) node_agent: Option<PathBuf>,
    /// Tunnel driver in use on the `tunnel` path.
    pub(crate) tunnel_driver: Option<String>,
    pub(crate) processes: Vec<Process>,
}

/// Directory of the lab `name`.
pub(crate) fn directory(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

/// Refuses names that would not be safe in paths and namespace names.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let usable = (1..=32).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if usable {
        Ok(())
    } else {
        Err(Error::BadName {
            name: name.to_owned(),
        })
    }
}

impl State {
    /// Reads the state of the lab `name`; `None` if there is none.
    pub(crate) fn load(name: &str) -> Result<Option<Self>> {
        let path = Self::path(name);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("reading", path)(error)),
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|error| Error::State {
                path,
                reason: error.to_string(),
            })
    }

    /// Replaces the state file.
    pub(crate) fn save(&self) -> Result<()> {
        let path = Self::path(&self.name);
        let text = serde_json::to_string_pretty(self).map_err(|error| Error::State {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        let temporary = path.with_extension("json.new");
        let mut file = fs::File::create(&temporary).map_err(Error::io("creating", &temporary))?;
        file.write_all(text.as_bytes())
            .map_err(Error::io("writing", &temporary))?;
        fs::rename(&temporary, &path).map_err(Error::io("replacing", path))
    }

    /// Of a lab that nobody has brought up, on the `tunnel` path.
    #[cfg(test)]
    pub(crate) fn example(proxy: ProxyKind) -> Self {
        Self {
            schema: 1,
            name: "x".to_owned(),
            phase: Phase::Starting,
            redirect: Redirect::Tunnel,
            variant: Variant::Hardened,
            sockmap: false,
            services: Services::None,
            proxy,
            ztunnel: None,
            node_agent: None,
            tunnel_driver: None,
            processes: Vec::new(),
        }
    }

    fn path(name: &str) -> PathBuf {
        directory(name).join("state.json")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_are_safe_in_paths_are_accepted() {
        for good in ["zt", "a", "lab-2", &"a".repeat(32)] {
            check_name(good).unwrap();
        }
        for bad in [
            "",
            "-x",
            "2x",
            "a/b",
            "..",
            "A",
            "a b",
            "ä",
            &"a".repeat(33),
        ] {
            assert!(check_name(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn redirect_and_variant_names_parse_back() {
        for redirect in [Redirect::None, Redirect::Tunnel, Redirect::Ebpf] {
            assert_eq!(redirect.name().parse::<Redirect>().unwrap(), redirect);
        }
        assert!(
            "geneve"
                .parse::<Redirect>()
                .unwrap_err()
                .to_string()
                .contains("tunnel")
        );
        assert_eq!("faithful".parse::<Variant>().unwrap(), Variant::Faithful);
        assert!("fast".parse::<Variant>().is_err());
    }
}
