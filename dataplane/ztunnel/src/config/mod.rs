//! The proxy's settings, from upstream's environment variables and our own.

mod mode;
mod proxying;
mod threads;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use control::LocalConfig;
use proxy::ProxyConfig;
use rt::{Backend, RuntimeConfig};
use tls::RecordPath;

use crate::environment::{BadSetting, Environment};
use crate::sockmap::Sockmap;

/// Why the settings cannot be used. `Display` is one line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error(transparent)]
    Setting(#[from] BadSetting),
    #[error(transparent)]
    Local(#[from] control::LoadError),
    #[error(
        "no source of configuration: set LOCAL_XDS_PATH to a file of workloads (this version has \
         no xDS client; XDS_ADDRESS must be empty)"
    )]
    NoSource,
    #[error(
        "{name}=`{value}` asks for a control plane: this version has no xDS or CA client; set it \
         to the empty string and use LOCAL_XDS_PATH, LOCAL_CA_CERT and LOCAL_CA_KEY"
    )]
    ControlPlane { name: &'static str, value: String },
    #[error(
        "{name} is not set: without it no workload certificate can be issued; set LOCAL_CA_CERT \
         and LOCAL_CA_KEY to the PEM files of a CA"
    )]
    NoAuthority { name: &'static str },
    #[error(
        "PROXY_WORKLOAD_INFO is not set: PROXY_MODE=dedicated serves one workload; name it as \
         namespace/name/service-account"
    )]
    NoWorkload,
    #[error("{name}=`{value}` has no meaning with PROXY_MODE={mode}: unset it")]
    OtherMode {
        name: &'static str,
        value: String,
        mode: &'static str,
    },
    #[error("{name}=`{value}` is not supported by this version: {instead}")]
    Unsupported {
        name: &'static str,
        value: String,
        instead: &'static str,
    },
}

/// Everything `main` needs.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) proxy: Arc<ProxyConfig>,
    pub(crate) source: LocalConfig,
    pub(crate) authority: AuthoritySource,
    pub(crate) transparent: Transparent,
    pub(crate) certificate_ttl: Duration,
    pub(crate) tls_records: RecordPath,
    pub(crate) workers: usize,
    pub(crate) backend: Backend,
    /// How long a worker polls for work before it sleeps; zero: not at all.
    pub(crate) busy_poll: Duration,
    /// What asks for the node agent's sockmap, if it is to be used.
    pub(crate) sockmap: Option<Arc<Sockmap>>,
    pub(crate) listener_map: Option<PathBuf>,
    pub(crate) ipv6: bool,
    pub(crate) drain: Duration,
}

/// Where the CA comes from that issues workload certificates in process.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum AuthoritySource {
    /// PEM files of certificate and key.
    Files(PathBuf, PathBuf),
    /// The one whose key is public, for tests.
    Fake,
}

/// Whether listeners take connections to foreign addresses (`IP_TRANSPARENT`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transparent {
    No,
    IfAllowed,
    Required,
}

impl Settings {
    /// What each worker's runtime is set up with.
    pub(crate) fn runtime(&self) -> RuntimeConfig {
        RuntimeConfig {
            backend: self.backend,
            busy_poll: self.busy_poll,
            ..RuntimeConfig::default()
        }
    }
}

/// Reads and checks all settings.
pub(crate) fn read(environment: &Environment<'_>) -> Result<Settings, ConfigError> {
    for name in ["XDS_ADDRESS", "CA_ADDRESS"] {
        if let Some(value) = environment.text(name) {
            return Err(ConfigError::ControlPlane { name, value });
        }
    }
    refuse_unsupported(environment)?;
    let source = LocalConfig::from_settings(
        environment.text("LOCAL_XDS_PATH").as_deref(),
        environment.text("LOCAL_XDS").as_deref(),
    )?
    .ok_or(ConfigError::NoSource)?;
    let dedicated_to = mode::dedicated_to(environment)?;
    let cpus = rt::available_cpus().map_or(1, |cpus| cpus.len());
    let listener_map = environment.text("ZTUNNEL_LISTENER_MAP").map(PathBuf::from);
    let sockmap = mode::sockmap(environment, listener_map.as_deref())?;
    let proxy = ProxyConfig {
        sockmap: sockmap.clone().map(|sockmap| sockmap as _),
        ..proxying::proxy_config(environment, dedicated_to.clone())?
    };
    Ok(Settings {
        authority: mode::authority(environment, dedicated_to.is_some())?,
        transparent: mode::transparent(environment, dedicated_to.is_some())?,
        proxy: Arc::new(proxy),
        source,
        certificate_ttl: environment
            .duration("SECRET_TTL")?
            .unwrap_or(Duration::from_secs(24 * 3600)),
        tls_records: tls_records(environment)?,
        workers: threads::workers(environment, cpus, rt::cpu_limit())?,
        backend: threads::backend(environment)?,
        busy_poll: Duration::from_micros(
            environment
                .number("ZTUNNEL_BUSY_POLL_US", 0..=1_000)?
                .unwrap_or(0),
        ),
        sockmap,
        listener_map,
        ipv6: environment.boolean("IPV6_ENABLED")?.unwrap_or(true),
        drain: drain(environment)?,
    })
}

/// What would be ignored silently, and must not be.
fn refuse_unsupported(environment: &Environment<'_>) -> Result<(), ConfigError> {
    let refused = |name, instead| match environment.text(name) {
        Some(value) => Err(ConfigError::Unsupported {
            name,
            value,
            instead,
        }),
        None => Ok(()),
    };
    if environment.boolean("TLS12_ENABLED")? == Some(true) {
        refused("TLS12_ENABLED", "only TLS 1.3 is spoken; unset it")?;
    }
    if environment.boolean("XDS_ON_DEMAND")? == Some(true) {
        refused("XDS_ON_DEMAND", "there is no xDS client; unset it")?;
    }
    if environment.boolean("UNSTABLE_ENABLE_SOCKS5")? == Some(true) {
        refused(
            "UNSTABLE_ENABLE_SOCKS5",
            "there is no SOCKS listener; unset it",
        )?;
    }
    refused(
        "CRL_PATH",
        "revocation lists are not checked; unset it only if that is acceptable",
    )?;
    refused(
        "COMPLIANCE_POLICY",
        "no policy but the default is available; unset it",
    )?;
    Ok(())
}

/// Who seals and opens TLS records.
fn tls_records(environment: &Environment<'_>) -> Result<RecordPath, ConfigError> {
    let paths = [RecordPath::Own, RecordPath::Rustls].map(|path| (path.to_string(), path));
    let allowed = paths.each_ref().map(|(name, path)| (name.as_str(), *path));
    let chosen = environment.one_of("ZTUNNEL_TLS_RECORDS", &allowed)?;
    Ok(chosen.unwrap_or_default())
}

/// How long connections may finish after SIGTERM, by upstream's rule.
fn drain(environment: &Environment<'_>) -> Result<Duration, ConfigError> {
    if let Some(deadline) = environment.duration("CONNECTION_TERMINATION_DEADLINE")? {
        return Ok(deadline);
    }
    let grace = environment.number("TERMINATION_GRACE_PERIOD_SECONDS", 0..=86_400)?;
    Ok(Duration::from_secs(match grace {
        None => 5,
        Some(grace) if grace > 10 => grace - 5,
        Some(grace) => grace.saturating_sub(1).max(1),
    }))
}

#[cfg(test)]
mod tests;
