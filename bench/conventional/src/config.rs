//! Settings, from the environment variables ztunnel has.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use control::LocalConfig;
use mesh::NodeContext;

/// Why the settings cannot be used; one line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A variable that must be set is not.
    #[error("{name} is not set: {purpose}")]
    Missing {
        /// The variable.
        name: &'static str,
        /// What it is for.
        purpose: &'static str,
    },
    /// A variable has a value that is not understood.
    #[error("{name}=`{value}` is not valid: expected {expected}")]
    Invalid {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        expected: String,
    },
    /// The source of the mesh configuration.
    #[error(transparent)]
    Load(#[from] control::LoadError),
}

/// What the data path needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// The node and its ports.
    pub node: NodeContext,
    /// Connect to local pods from the client's address (`ENABLE_ORIG_SRC`).
    pub original_source: bool,
    /// Bytes of ciphertext read at once from a tunnel's socket (`CONVENTIONAL_READ_BUFFER`). With
    /// 0, as upstream, rustls reads 4 KiB at a time.
    pub read_buffer: usize,
}

impl Config {
    /// The defaults on `node`.
    pub const fn new(node: NodeContext) -> Self {
        Self {
            node,
            original_source: true,
            read_buffer: 64 << 10,
        }
    }
}

/// Everything the binary needs.
#[derive(Debug)]
pub struct Settings {
    /// The data path's.
    pub proxy: Config,
    /// Where the model comes from (`LOCAL_XDS_PATH`, `LOCAL_XDS`).
    pub source: LocalConfig,
    /// PEM file of the CA's certificate (`LOCAL_CA_CERT`).
    pub ca_certificate: PathBuf,
    /// PEM file of the CA's key (`LOCAL_CA_KEY`).
    pub ca_key: PathBuf,
    /// Worker threads (`ZTUNNEL_WORKER_THREADS`: N, N% or 0 for all CPUs, the default).
    pub workers: usize,
    /// Socket map of the eBPF redirection (`ZTUNNEL_LISTENER_MAP`).
    pub listener_map: Option<PathBuf>,
    /// Listen on IPv6 as well (`IPV6_ENABLED`).
    pub ipv6: bool,
    /// How long connections may finish after SIGTERM (`CONNECTION_TERMINATION_DEADLINE`, seconds).
    pub drain: Duration,
}

impl Settings {
    /// Reads all settings; `lookup` returns a variable's value.
    ///
    /// # Errors
    /// The first one that is missing or wrong.
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let text = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let required = |name, purpose| {
            text(name)
                .map(PathBuf::from)
                .ok_or(ConfigError::Missing { name, purpose })
        };
        if text("REDIRECT_MODE").as_deref() != Some("node") {
            let value = text("REDIRECT_MODE").unwrap_or_default();
            return Err(invalid(
                "REDIRECT_MODE",
                value,
                "node, the only mode there is",
            ));
        }
        let source = LocalConfig::from_settings(
            text("LOCAL_XDS_PATH").as_deref(),
            text("LOCAL_XDS").as_deref(),
        )?;
        let network = text("NETWORK").unwrap_or_default();
        let node = text("NODE_NAME").unwrap_or_default();
        let mut proxy = Config::new(NodeContext::new(&network, &node));
        if let Some(spoof) = boolean("ENABLE_ORIG_SRC", text("ENABLE_ORIG_SRC").as_deref())? {
            proxy.original_source = spoof;
        }
        let buffer = text("CONVENTIONAL_READ_BUFFER");
        if let Some(bytes) = number("CONVENTIONAL_READ_BUFFER", buffer, 0..=1 << 20)? {
            proxy.read_buffer = bytes;
        }
        let deadline = text("CONNECTION_TERMINATION_DEADLINE")
            .map(|value| value.trim_end_matches('s').to_owned());
        let drain = number("CONNECTION_TERMINATION_DEADLINE", deadline, 0..=86_400)?;
        Ok(Self {
            proxy,
            source: source.ok_or(ConfigError::Missing {
                name: "LOCAL_XDS_PATH",
                purpose: "a file of workloads is the only source of configuration",
            })?,
            ca_certificate: required("LOCAL_CA_CERT", "PEM certificate of the workloads' CA")?,
            ca_key: required("LOCAL_CA_KEY", "PEM key of the workloads' CA")?,
            workers: workers(text("ZTUNNEL_WORKER_THREADS"))?,
            listener_map: text("ZTUNNEL_LISTENER_MAP").map(PathBuf::from),
            ipv6: boolean("IPV6_ENABLED", text("IPV6_ENABLED").as_deref())?.unwrap_or(true),
            drain: Duration::from_secs(drain.unwrap_or(5)),
        })
    }
}

fn invalid(name: &'static str, value: String, expected: impl Into<String>) -> ConfigError {
    ConfigError::Invalid {
        name,
        value,
        expected: expected.into(),
    }
}

fn boolean(name: &'static str, value: Option<&str>) -> Result<Option<bool>, ConfigError> {
    match value {
        None => Ok(None),
        Some("true" | "1") => Ok(Some(true)),
        Some("false" | "0") => Ok(Some(false)),
        Some(other) => Err(invalid(name, other.to_owned(), "true or false")),
    }
}

fn number<T: FromStr + PartialOrd + std::fmt::Display>(
    name: &'static str,
    value: Option<String>,
    range: RangeInclusive<T>,
) -> Result<Option<T>, ConfigError> {
    let Some(value) = value else { return Ok(None) };
    match value.parse() {
        Ok(number) if range.contains(&number) => Ok(Some(number)),
        _ => {
            let expected = format!("a number from {} to {}", range.start(), range.end());
            Err(invalid(name, value, expected))
        }
    }
}

/// All usable CPUs unless told otherwise: upstream's quarter of them would be a straw man here.
fn workers(setting: Option<String>) -> Result<usize, ConfigError> {
    const NAME: &str = "ZTUNNEL_WORKER_THREADS";
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let Some(value) = setting else {
        return Ok(cpus);
    };
    if let Some(percent) = value.strip_suffix('%') {
        let percent = number(NAME, Some(percent.to_owned()), 1..=100)?.unwrap_or(100);
        return Ok((cpus * percent).div_ceil(100));
    }
    Ok(match number(NAME, Some(value), 0..=4096)?.unwrap_or(0) {
        0 => cpus,
        number => number,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(extra: &[(&str, &str)]) -> Result<Settings, ConfigError> {
        let mut pairs = vec![
            ("REDIRECT_MODE", "node"),
            ("LOCAL_XDS", "{}"),
            ("LOCAL_CA_CERT", "/a"),
            ("LOCAL_CA_KEY", "/b"),
        ];
        pairs.extend(extra);
        Settings::read(|name| {
            let pair = pairs.iter().rev().find(|(key, _)| *key == name);
            pair.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn settings_are_read_and_errors_name_the_variable() {
        let settings = with(&[("ZTUNNEL_WORKER_THREADS", "3"), ("NODE_NAME", "n")]).unwrap();
        assert_eq!(settings.workers, 3);
        assert_eq!(&*settings.proxy.node.node, "n");
        assert!(settings.ipv6 && settings.proxy.original_source);
        for (name, value) in [
            ("REDIRECT_MODE", "in-pod"),
            ("ZTUNNEL_WORKER_THREADS", "many"),
            ("IPV6_ENABLED", "maybe"),
            ("CONVENTIONAL_READ_BUFFER", "-1"),
            ("LOCAL_CA_KEY", ""),
        ] {
            let text = with(&[(name, value)]).unwrap_err().to_string();
            assert!(text.contains(name) && text.contains(value), "{text}");
        }
    }
}
