//! The proxy's settings, from upstream's environment variables and our own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use control::LocalConfig;
use mesh::{NodeContext, WorkloadName};
use proxy::{LocalPods, ProxyConfig, RedirectMode, TunnelMemory};
use rt::net::Keepalive;
use rt::{Backend, RuntimeConfig};
use tls::RecordPath;

use crate::environment::{BadSetting, Environment};
use crate::pod_table::PodTablePath;
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
    let dedicated_to = dedicated_to(environment)?;
    let cpus = rt::available_cpus().map_or(1, |cpus| cpus.len());
    let listener_map = environment.text("ZTUNNEL_LISTENER_MAP").map(PathBuf::from);
    let sockmap = sockmap(environment, listener_map.as_deref())?;
    let proxy = ProxyConfig {
        sockmap: sockmap.clone().map(|sockmap| sockmap as _),
        ..proxy_config(environment, dedicated_to.clone())?
    };
    Ok(Settings {
        authority: authority(environment, dedicated_to.is_some())?,
        transparent: transparent(environment, dedicated_to.is_some())?,
        proxy: Arc::new(proxy),
        source,
        certificate_ttl: environment
            .duration("SECRET_TTL")?
            .unwrap_or(Duration::from_secs(24 * 3600)),
        tls_records: tls_records(environment)?,
        workers: workers(environment, cpus, rt::cpu_limit())?,
        backend: backend(environment)?,
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

/// The node agent's sockmap (`SOCKMAP=on`): its maps are pinned beside the listener map.
fn sockmap(
    environment: &Environment<'_>,
    listener_map: Option<&Path>,
) -> Result<Option<Arc<Sockmap>>, ConfigError> {
    let switch = [("off", false), ("on", true)];
    if environment.one_of("SOCKMAP", &switch)? != Some(true) {
        return Ok(None);
    }
    let node = environment.text("REDIRECT_MODE").as_deref() == Some("node");
    match listener_map.filter(|_| node) {
        Some(map) => Ok(Some(Arc::new(Sockmap::new(map)))),
        None => Err(ConfigError::Unsupported {
            name: "SOCKMAP",
            value: "on".to_owned(),
            instead: "sockmap is for REDIRECT_MODE=node with ZTUNNEL_LISTENER_MAP; use off",
        }),
    }
}

/// The workload this proxy serves alone (`PROXY_MODE=dedicated`), if it does.
fn dedicated_to(environment: &Environment<'_>) -> Result<Option<WorkloadName>, ConfigError> {
    let modes = [("shared", false), ("dedicated", true)];
    let info = environment.text("PROXY_WORKLOAD_INFO");
    if environment.one_of("PROXY_MODE", &modes)? != Some(true) {
        return match info {
            Some(value) => Err(ConfigError::OtherMode {
                name: "PROXY_WORKLOAD_INFO",
                value,
                mode: "shared",
            }),
            None => Ok(None),
        };
    }
    for name in ["REDIRECT_MODE", "ZTUNNEL_LISTENER_MAP"] {
        if let Some(value) = environment.text(name) {
            let mode = "dedicated";
            return Err(ConfigError::OtherMode { name, value, mode });
        }
    }
    let info = info.ok_or(ConfigError::NoWorkload)?;
    let parts: Vec<&str> = info.split('/').collect();
    let [namespace, name, service_account] = parts[..] else {
        return Err(bad_workload(info).into());
    };
    if parts.iter().any(|part| part.is_empty()) {
        return Err(bad_workload(info).into());
    }
    Ok(Some(WorkloadName {
        namespace: namespace.into(),
        name: name.into(),
        service_account: service_account.into(),
        trust_domain: environment.text("TRUST_DOMAIN").map(Arc::from),
    }))
}

fn bad_workload(value: String) -> BadSetting {
    BadSetting {
        name: "PROXY_WORKLOAD_INFO".to_owned(),
        value,
        reason: "expected namespace/name/service-account".to_owned(),
    }
}

/// The CA of `LOCAL_CA_CERT` and `LOCAL_CA_KEY`, or the fake one where nothing is at stake.
fn authority(
    environment: &Environment<'_>,
    dedicated: bool,
) -> Result<AuthoritySource, ConfigError> {
    let (certificate, key) = ("LOCAL_CA_CERT", "LOCAL_CA_KEY");
    let fake = environment.boolean("FAKE_CA")? == Some(true);
    if fake && !dedicated {
        return Err(ConfigError::Unsupported {
            name: "FAKE_CA",
            value: environment.text_or("FAKE_CA", ""),
            instead: "its key is public, so only PROXY_MODE=dedicated takes it; give a CA by \
                      LOCAL_CA_CERT and LOCAL_CA_KEY",
        });
    }
    match (environment.text(certificate), environment.text(key)) {
        (Some(certificate), Some(key)) => {
            Ok(AuthoritySource::Files(certificate.into(), key.into()))
        }
        (None, None) if fake => Ok(AuthoritySource::Fake),
        (None, _) => Err(ConfigError::NoAuthority { name: certificate }),
        (_, None) => Err(ConfigError::NoAuthority { name: key }),
    }
}

/// Where packets of others come to this process's namespace, its sockets must be transparent. In
/// dedicated mode that is so with TPROXY and not so with REDIRECT, so ENABLE_ORIG_SRC decides, as
/// upstream's does.
fn transparent(environment: &Environment<'_>, dedicated: bool) -> Result<Transparent, ConfigError> {
    let node = environment.text("REDIRECT_MODE").as_deref() == Some("node");
    Ok(match (dedicated, environment.boolean("ENABLE_ORIG_SRC")?) {
        (false, _) if node => Transparent::Required,
        (false, _) | (true, Some(false)) => Transparent::No,
        (true, None) => Transparent::IfAllowed,
        (true, Some(true)) => Transparent::Required,
    })
}

fn proxy_config(
    environment: &Environment<'_>,
    dedicated_to: Option<WorkloadName>,
) -> Result<ProxyConfig, ConfigError> {
    let modes = [
        ("in-pod", RedirectMode::InPod),
        ("node", RedirectMode::Node),
    ];
    let mode = environment
        .one_of("REDIRECT_MODE", &modes)?
        .unwrap_or(RedirectMode::InPod);
    let mut node = NodeContext::new(
        &environment.text_or("NETWORK", ""),
        &environment.text_or("NODE_NAME", ""),
    );
    node.preferred_service_namespace = environment
        .text("PREFERED_SERVICE_NAMESPACE")
        .map(Arc::from);
    node.dedicated_to = dedicated_to;
    let mark = environment.number("PACKET_MARK", 0..=u64::from(u32::MAX))?;
    let default_mark = match mode {
        // Upstream's defaults: no rule outside of a pod knows the mark.
        RedirectMode::InPod if node.dedicated_to.is_some() => None,
        RedirectMode::InPod => Some(1337),
        // On the node, marks belong to redirection; the proxy's packets are known by their device.
        RedirectMode::Node => None,
    };
    let (client, server) = http2(environment)?;
    Ok(ProxyConfig {
        node,
        mode,
        sockmap: None,
        original_source: environment.boolean("ENABLE_ORIG_SRC")?.unwrap_or(true),
        same_node_tunnel: same_node_tunnel(environment, mode)?,
        pods: pods(environment, mode)?,
        mark: mark.map(|mark| mark as u32).or(default_mark),
        keepalive: keepalive(environment)?,
        connect_timeout: Duration::from_secs(10),
        handshake_timeout: Duration::from_secs(10),
        descriptors_max: descriptors_max(),
        handshakes_max: environment
            .number("ZTUNNEL_HANDSHAKES_MAX", 1..=65_536)?
            .unwrap_or(1024) as usize,
        tunnel_memory: TunnelMemory::new(
            environment
                .number("ZTUNNEL_TUNNEL_MEMORY_BYTES", 16 << 20..=1 << 40)?
                .unwrap_or(512 << 20) as usize,
        ),
        workload_timeout: Duration::from_secs(5),
        client,
        server,
        ping_interval: Duration::from_secs(10),
        ping_timeout: Duration::from_secs(20),
        pool_unused: environment
            .duration("POOL_UNUSED_RELEASE_TIMEOUT")?
            .unwrap_or(Duration::from_secs(300)),
        response_baggage: environment
            .boolean("ENABLE_RESPONSE_BAGGAGE")?
            .unwrap_or(true),
    })
}

/// What the data path may use of the limit of open files: all but a sixteenth, or 1,024 where that
/// is less, which is for configuration, endpoints and logs.
fn descriptors_max() -> usize {
    let limit = crate::limits::open_files();
    limit - (limit / 16).min(1024)
}

/// Without effect elsewhere: in a pod's namespace every mesh connection takes a tunnel.
fn same_node_tunnel(
    environment: &Environment<'_>,
    mode: RedirectMode,
) -> Result<bool, ConfigError> {
    let name = "SAME_NODE_TUNNEL";
    let wanted = environment.boolean(name)?.unwrap_or(false);
    if wanted && mode != RedirectMode::Node {
        return Err(ConfigError::Unsupported {
            name,
            value: environment.text(name).unwrap_or_default(),
            instead: "it is for REDIRECT_MODE=node, elsewhere tunnels are always used; unset it",
        });
    }
    Ok(wanted)
}

/// The node agent's word on whose an address is.
fn pods(
    environment: &Environment<'_>,
    mode: RedirectMode,
) -> Result<Option<Arc<dyn LocalPods>>, ConfigError> {
    let name = "ZTUNNEL_POD_TABLE";
    let Some(value) = environment.text(name) else {
        return Ok(None);
    };
    if mode != RedirectMode::Node {
        let instead = "it is for REDIRECT_MODE=node, where the node agent captures pods; unset it";
        return Err(ConfigError::Unsupported {
            name,
            value,
            instead,
        });
    }
    Ok(Some(Arc::new(PodTablePath::new(Path::new(&value)))))
}

fn http2(environment: &Environment<'_>) -> Result<(hbone::Config, hbone::Config), ConfigError> {
    let (mut client, mut server) = (hbone::Config::client(), hbone::Config::server());
    let window = 65_535..=0x7fff_ffff;
    for config in [&mut client, &mut server] {
        if let Some(size) = environment.number("HTTP2_STREAM_WINDOW_SIZE", window.clone())? {
            config.stream_window = size as u32;
        }
        if let Some(size) = environment.number("HTTP2_CONNECTION_WINDOW_SIZE", window.clone())? {
            config.connection_window = size as u32;
        }
        if let Some(size) = environment.number("HTTP2_FRAME_SIZE", 16_384..=16_777_215)? {
            config.max_frame_size = size as u32;
        }
    }
    if let Some(streams) =
        environment.number("POOL_MAX_STREAMS_PER_CONNECTION", 1..=u64::from(u16::MAX))?
    {
        client.max_concurrent_streams = streams as u32;
    }
    Ok((client, server))
}

fn keepalive(environment: &Environment<'_>) -> Result<Option<Keepalive>, ConfigError> {
    if environment.boolean("KEEPALIVE_ENABLED")? == Some(false) {
        return Ok(None);
    }
    let seconds = |name, default| {
        Ok::<_, BadSetting>(
            environment
                .duration(name)?
                .unwrap_or_else(|| Duration::from_secs(default)),
        )
    };
    Ok(Some(Keepalive {
        time: seconds("KEEPALIVE_TIME", 180)?,
        interval: seconds("KEEPALIVE_INTERVAL", 180)?,
        retries: environment
            .number("KEEPALIVE_RETRIES", 1..=127)?
            .unwrap_or(9) as u32,
    }))
}

/// What the data path does its operations with.
fn backend(environment: &Environment<'_>) -> Result<Backend, ConfigError> {
    let backends = [
        ("auto", Backend::Auto),
        ("io_uring", Backend::IoUring),
        ("epoll", Backend::Epoll),
    ];
    let chosen = environment.one_of("ZTUNNEL_RUNTIME_BACKEND", &backends)?;
    Ok(chosen.unwrap_or_default())
}

/// Worker threads: `ZTUNNEL_WORKER_THREADS` as N, N% or 0 (all); else one per usable CPU.
///
/// Upstream's default is a quarter of the CPUs because its workers share work; here a worker is
/// the CPU its packets arrive on, so every CPU the process may use has one, within
/// `ZTUNNEL_CPU_LIMIT` or else the limit of the control group: more workers than that would only
/// take turns at being throttled. A number that is asked for may exceed the limit.
fn workers(
    environment: &Environment<'_>,
    cpus: usize,
    group_limit: Option<usize>,
) -> Result<usize, ConfigError> {
    let limit = environment.number("ZTUNNEL_CPU_LIMIT", 1..=4096)?;
    let limit = limit.map(|limit| limit as usize).or(group_limit);
    let (usable, cpus) = (
        cpus.max(1),
        limit.map_or(cpus, |limit| cpus.min(limit)).max(1),
    );
    let Some(text) = environment.text("ZTUNNEL_WORKER_THREADS") else {
        return Ok(cpus);
    };
    let wanted = match text.strip_suffix('%') {
        Some(percent) => percent
            .parse::<usize>()
            .ok()
            .filter(|percent| *percent <= 100)
            .map(|percent| (cpus * percent).div_ceil(100).max(1)),
        None => text
            .parse::<usize>()
            .ok()
            .filter(|number| *number <= 4096)
            .map(|number| {
                if number == 0 {
                    cpus
                } else {
                    number.min(usable)
                }
            }),
    };
    wanted.ok_or_else(|| {
        let reason = "expected a number from 0 (all CPUs) to 4096, or 0% to 100%";
        BadSetting {
            name: "ZTUNNEL_WORKER_THREADS".to_owned(),
            value: text,
            reason: reason.to_owned(),
        }
        .into()
    })
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
mod tests {
    use super::*;

    const LOCAL: [(&str, &str); 3] = [
        ("LOCAL_XDS", "workloads: []"),
        ("LOCAL_CA_CERT", "/a"),
        ("LOCAL_CA_KEY", "/b"),
    ];

    fn with(extra: &[(&'static str, &'static str)]) -> Result<Settings, ConfigError> {
        let pairs: Vec<_> = LOCAL.iter().copied().chain(extra.iter().copied()).collect();
        read(&Environment::of(&pairs))
    }

    #[test]
    fn defaults_are_upstreams() {
        let settings = with(&[]).unwrap();
        assert_eq!(settings.proxy.mode, RedirectMode::InPod);
        assert_eq!(settings.proxy.mark, Some(1337));
        assert_eq!(settings.proxy.client.stream_window, 4 << 20);
        assert_eq!(settings.proxy.server.connection_window, 16 << 20);
        assert_eq!(settings.proxy.client.max_concurrent_streams, 100);
        assert_eq!(settings.drain, Duration::from_secs(5));
        assert_eq!(settings.certificate_ttl, Duration::from_secs(86_400));
        assert_eq!(settings.tls_records, RecordPath::Own);
    }

    #[test]
    fn tls_records_are_ours_or_rustls() {
        let name = "ZTUNNEL_TLS_RECORDS";
        let chosen = |value| with(&[(name, value)]).map(|settings| settings.tls_records);
        assert_eq!(chosen("own").unwrap(), RecordPath::Own);
        assert_eq!(chosen("rustls").unwrap(), RecordPath::Rustls);
        let error = chosen("ktls").unwrap_err().to_string();
        let expected = "ZTUNNEL_TLS_RECORDS=`ktls` is not valid: expected own or rustls";
        assert_eq!(error, expected);
    }

    #[test]
    fn what_is_missing_or_not_supported_is_named() {
        let error = |pairs: &[(&str, &str)]| read(&Environment::of(pairs)).unwrap_err().to_string();
        assert!(error(&[]).contains("LOCAL_XDS_PATH"));
        assert!(error(&LOCAL[..1]).contains("LOCAL_CA_CERT"));
        assert!(error(&LOCAL[..2]).contains("LOCAL_CA_KEY"));
        for (name, value) in [
            ("XDS_ADDRESS", "https://istiod:15012"),
            ("SOCKMAP", "on"),
            ("SOCKMAP", "maybe"),
            ("TLS12_ENABLED", "true"),
            ("SAME_NODE_TUNNEL", "true"),
            ("SAME_NODE_TUNNEL", "perhaps"),
        ] {
            let text = with(&[(name, value)]).unwrap_err().to_string();
            assert!(
                text.contains(name) && text.contains(value) && !text.contains('\n'),
                "{text}"
            );
        }
        assert!(with(&[("XDS_ADDRESS", ""), ("SOCKMAP", "off")]).is_ok());
        let node = ("REDIRECT_MODE", "node");
        let map = ("ZTUNNEL_LISTENER_MAP", "/sys/fs/bpf/listeners");
        let sockmap = with(&[node, map, ("SOCKMAP", "on")]).unwrap();
        assert!(sockmap.proxy.sockmap.is_some());
        assert!(!sockmap.proxy.same_node_tunnel);
        let plain = with(&[node, map]).unwrap();
        assert!(plain.proxy.sockmap.is_none());
        let lacking = with(&[node, ("SOCKMAP", "on")]).unwrap_err().to_string();
        assert!(lacking.contains("ZTUNNEL_LISTENER_MAP"), "{lacking}");
        let tunnel = with(&[("REDIRECT_MODE", "node"), ("SAME_NODE_TUNNEL", "true")]);
        assert!(tunnel.unwrap().proxy.same_node_tunnel);
        let table = ("ZTUNNEL_POD_TABLE", "/run/agent/pods/table");
        assert!(with(&[node, table]).unwrap().proxy.pods.is_some());
        assert!(with(&[node]).unwrap().proxy.pods.is_none());
        let elsewhere = with(&[table]).unwrap_err().to_string();
        assert!(elsewhere.contains("REDIRECT_MODE=node"), "{elsewhere}");
    }

    #[test]
    fn a_dedicated_proxy_knows_its_workload_and_takes_the_fake_ca() {
        let read = |extra: &[(&'static str, &'static str)]| {
            let base = [
                ("LOCAL_XDS", "workloads: []"),
                ("PROXY_MODE", "dedicated"),
                ("FAKE_CA", "true"),
                ("XDS_ADDRESS", ""),
            ];
            let pairs: Vec<_> = base.iter().chain(extra).copied().collect();
            read(&Environment::of(&pairs))
        };
        let workload = ("PROXY_WORKLOAD_INFO", "ns/pod/account");
        let settings = read(&[workload, ("ENABLE_ORIG_SRC", "true")]).unwrap();
        assert_eq!(settings.authority, AuthoritySource::Fake);
        assert_eq!(settings.transparent, Transparent::Required);
        assert_eq!(settings.proxy.mark, None);
        let name = settings.proxy.node.dedicated_to.clone().unwrap();
        assert_eq!((&*name.namespace, &*name.name), ("ns", "pod"));
        assert_eq!(&*name.service_account, "account");
        let files = read(&[workload, ("LOCAL_CA_CERT", "/a"), ("LOCAL_CA_KEY", "/b")]).unwrap();
        assert_eq!(files.transparent, Transparent::IfAllowed);
        assert_eq!(
            files.authority,
            AuthoritySource::Files("/a".into(), "/b".into())
        );
        let error = |extra: &[(&'static str, &'static str)]| read(extra).unwrap_err().to_string();
        assert!(error(&[]).contains("PROXY_WORKLOAD_INFO is not set"));
        for wrong in ["ns/pod", "ns//account", "a/b/c/d"] {
            let text = error(&[("PROXY_WORKLOAD_INFO", wrong)]);
            assert!(text.contains(wrong) && text.contains("expected"), "{text}");
        }
        assert!(error(&[workload, ("REDIRECT_MODE", "node")]).contains("REDIRECT_MODE"));
        let text = with(&[("FAKE_CA", "true")]).unwrap_err().to_string();
        assert!(text.contains("only PROXY_MODE=dedicated"), "{text}");
        assert!(with(&[workload]).is_err());
        assert!(with(&[("PROXY_MODE", "sidecar")]).is_err());
    }

    #[test]
    fn workers_by_number_and_percentage() {
        let count = |value: &str, cpus| {
            workers(
                &Environment::of(&[("ZTUNNEL_WORKER_THREADS", value)]),
                cpus,
                None,
            )
        };
        let cases = [
            ("", 8, 8),
            ("0", 8, 8),
            ("3", 8, 3),
            ("25%", 8, 2),
            ("1%", 8, 1),
            ("99", 4, 4),
        ];
        for (value, cpus, expected) in cases {
            assert_eq!(count(value, cpus).unwrap(), expected, "{value} of {cpus}");
        }
        for value in ["many", "-1", "101%", "%"] {
            assert!(count(value, 8).is_err(), "{value}");
        }
    }

    #[test]
    fn workers_follow_the_cpu_limit_unless_told_otherwise() {
        let count =
            |pairs: &[(&str, &str)], group| workers(&Environment::of(pairs), 8, group).unwrap();
        assert_eq!(count(&[], None), 8);
        assert_eq!(count(&[], Some(2)), 2);
        assert_eq!(count(&[], Some(64)), 8);
        assert_eq!(count(&[("ZTUNNEL_CPU_LIMIT", "3")], Some(2)), 3);
        assert_eq!(count(&[("ZTUNNEL_WORKER_THREADS", "50%")], Some(4)), 2);
        assert_eq!(count(&[("ZTUNNEL_WORKER_THREADS", "0")], Some(4)), 4);
        assert_eq!(count(&[("ZTUNNEL_WORKER_THREADS", "6")], Some(2)), 6);
    }

    #[test]
    fn the_back_end_can_be_forced() {
        let chosen = |value| with(&[("ZTUNNEL_RUNTIME_BACKEND", value)]).map(|s| s.backend);
        assert_eq!(with(&[]).unwrap().backend, Backend::Auto);
        assert_eq!(chosen("epoll").unwrap(), Backend::Epoll);
        assert_eq!(chosen("io_uring").unwrap(), Backend::IoUring);
        let text = chosen("kqueue").unwrap_err().to_string();
        assert!(text.contains("auto or io_uring or epoll"), "{text}");
    }

    #[test]
    fn busy_polling_is_off_and_bounded() {
        let chosen = |value| with(&[("ZTUNNEL_BUSY_POLL_US", value)]).map(|s| s.runtime());
        assert_eq!(with(&[]).unwrap().runtime().busy_poll, Duration::ZERO);
        assert_eq!(chosen("50").unwrap().busy_poll, Duration::from_micros(50));
        let text = chosen("1001").unwrap_err().to_string();
        assert!(text.contains("from 0 to 1000"), "{text}");
    }

    #[test]
    fn drain_time_follows_the_grace_period() {
        for (grace, seconds) in [("30", 25), ("11", 6), ("10", 9), ("1", 1), ("0", 1)] {
            let settings = with(&[("TERMINATION_GRACE_PERIOD_SECONDS", grace)]).unwrap();
            assert_eq!(settings.drain, Duration::from_secs(seconds), "{grace}");
        }
    }
}
