//! What the lab remembers on disk between commands: `/run/zt-lab/<name>/state.json`.
//!
//! Written before the first thing is created and after every process started, by rename, so that
//! whatever kills `up`, the next command knows what there is to remove.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::kinds::{ProxyKind, Redirect, Services, Variant};
use crate::lock::ROOT;
use crate::process::Process;

/// The lab's root certificate and its key.
pub(crate) fn ca_paths(lab: &str) -> (PathBuf, PathBuf) {
    (
        directory(lab).join("ca.pem"),
        directory(lab).join("ca-key.pem"),
    )
}

/// The mesh file that ztunnels read.
pub(crate) fn mesh_path(lab: &str) -> PathBuf {
    directory(lab).join("mesh.yaml")
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
}
