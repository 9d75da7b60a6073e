//! What the data path does: addresses, tunnels, timeouts and bounds.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh::{NodeContext, WorkloadName};
use proxy::{LocalPods, ProxyConfig, RedirectMode, TunnelMemory};
use rt::net::Keepalive;

use super::ConfigError;
use crate::environment::{BadSetting, Environment};
use crate::pod_table::PodTablePath;

pub(super) fn proxy_config(
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
