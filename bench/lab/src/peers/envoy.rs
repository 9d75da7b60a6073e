//! Envoy in ztunnel's place: static configurations, no control plane.
//!
//! Outbound (15001), connections to the other node's main pod are proxied over mutual TLS 1.3;
//! everything else, pods of the same node among it, is connected plainly to where it was going,
//! as our own ztunnel does on one node. `envoy-tcp` gives each connection a TLS session of its
//! own to the pod's own port, which the other Envoy terminates on 15006. `envoy-hbone` opens an
//! HTTP/2 CONNECT stream with the original destination as `:authority` to the pod's port 15008;
//! Envoy's connection pool shares HTTP/2 connections among the streams of one worker and client
//! address.
//!
//! The client's address is kept on both hops (`original_src`), as ours is. Peers are verified as
//! ours are: outbound by the pod's exact SPIFFE URI, inbound by the trust domain. Which cipher
//! TLS 1.3 uses is not Envoy's to configure: its library takes AES-128-GCM, cheaper than the
//! AES-256-GCM of ztunnel and HAProxy.

use std::path::Path;

use serde_json::{Value, json};

use super::{Place, ProxyKind};
use crate::mesh_file::TRUST_DOMAIN;

const TYPES: &str = "type.googleapis.com/envoy";
/// Connections, requests and retries without a bound of Envoy's own.
const UNBOUNDED: u32 = 1_000_000;
/// As ztunnel's.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
const BACKLOG: u32 = 4096;

/// Envoy's bootstrap configuration.
#[must_use]
pub fn config(kind: ProxyKind, place: &Place) -> Value {
    let hbone = kind == ProxyKind::EnvoyHbone;
    let mut listeners = vec![ready(), outbound(place, hbone), inbound(place, hbone)];
    let mut clusters = vec![plain(), tunnel(place, hbone)];
    if hbone {
        listeners.push(inbound_hbone(place));
        clusters.push(application());
    }
    json!({
        "node": {"id": place.node.name(), "cluster": "lab"},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    })
}

/// Envoy's arguments.
#[must_use]
pub fn arguments(file: &Path, place: &Place) -> Vec<String> {
    [
        "--config-path",
        &file.display().to_string(),
        "--concurrency",
        &place.threads.to_string(),
        // No shared memory with other Envoys of the machine.
        "--disable-hot-restart",
        "--log-level",
        "warning",
    ]
    .map(str::to_owned)
    .to_vec()
}

fn typed(name: &str, kind: &str, mut fields: Value) -> Value {
    fields["@type"] = format!("{TYPES}.{kind}").into();
    json!({"name": name, "typed_config": fields})
}

/// A listener that takes what redirection brings: foreign addresses, the original destination
/// from the socket, the client's address for what is connected on its behalf.
fn captured(name: &str, port: u16, mut rest: Value) -> Value {
    let filters = "extensions.filters.listener";
    rest["name"] = name.into();
    rest["address"] = address(port);
    rest["transparent"] = true.into();
    rest["enable_reuse_port"] = true.into();
    rest["tcp_backlog_size"] = BACKLOG.into();
    rest["listener_filters"] = json!([
        typed(
            "original_dst",
            &format!("{filters}.original_dst.v3.OriginalDst"),
            json!({})
        ),
        typed(
            "original_src",
            &format!("{filters}.original_src.v3.OriginalSrc"),
            json!({})
        ),
    ]);
    rest
}

fn address(port: u16) -> Value {
    json!({"socket_address": {"address": "0.0.0.0", "port_value": port}})
}

fn tcp_proxy(cluster: &str, tunneling: Option<Value>) -> Value {
    let mut fields = json!({
        "stat_prefix": cluster,
        "cluster": cluster,
        // As ours: a connection may be idle for as long as its ends like.
        "idle_timeout": "0s",
    });
    if let Some(tunneling) = tunneling {
        fields["tunneling_config"] = tunneling;
    }
    let kind = "extensions.filters.network.tcp_proxy.v3.TcpProxy";
    typed("tcp_proxy", kind, fields)
}

fn outbound(place: &Place, hbone: bool) -> Value {
    let (pod, _) = place.far_pod();
    let far = json!({"address_prefix": pod.address(), "prefix_len": 32});
    let tunneling = hbone.then(|| json!({"hostname": "%DOWNSTREAM_LOCAL_ADDRESS%"}));
    captured(
        "outbound",
        15001,
        json!({
            "filter_chains": [{
                "filter_chain_match": {"prefix_ranges": [far]},
                "filters": [tcp_proxy("tunnel", tunneling)],
            }],
            "default_filter_chain": {"filters": [tcp_proxy("plain", None)]},
        }),
    )
}

/// Everything to pods but HBONE: with TLS where that is how the other node's connections come.
fn inbound(place: &Place, hbone: bool) -> Value {
    let mut chain = json!({"filters": [tcp_proxy("plain", None)]});
    if !hbone {
        chain["transport_socket"] = server_tls(place, &[]);
    }
    captured("inbound", 15006, json!({"filter_chains": [chain]}))
}

fn inbound_hbone(place: &Place) -> Value {
    let route = json!({
        "match": {"connect_matcher": {}},
        "route": {
            "cluster": "application",
            "timeout": "0s",
            "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
        },
    });
    let router = typed(
        "router",
        "extensions.filters.http.router.v3.Router",
        json!({"suppress_envoy_headers": true}),
    );
    let manager = http_manager(json!({
        "stat_prefix": "hbone",
        "codec_type": "HTTP2",
        "route_config": {"virtual_hosts": [{"name": "any", "domains": ["*"], "routes": [route]}]},
        "http_filters": [router],
        "http2_protocol_options": http2(),
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "stream_idle_timeout": "0s",
        "generate_request_id": false,
    }));
    let chain = json!({"filters": [manager], "transport_socket": server_tls(place, &["h2"])});
    captured("hbone", 15008, json!({"filter_chains": [chain]}))
}

fn http_manager(fields: Value) -> Value {
    let kind = "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    typed("http_connection_manager", kind, fields)
}

fn http2() -> Value {
    json!({
        "allow_connect": true,
        "initial_stream_window_size": STREAM_WINDOW_BYTES,
        "initial_connection_window_size": CONNECTION_WINDOW_BYTES,
    })
}

/// Readiness where ztunnel has it. Envoy listens once all listeners and clusters are there.
fn ready() -> Value {
    let route = json!({
        "match": {"path": "/healthz/ready"},
        "direct_response": {"status": 200, "body": {"inline_string": "ready\n"}},
    });
    let router = typed(
        "router",
        "extensions.filters.http.router.v3.Router",
        json!({}),
    );
    let manager = http_manager(json!({
        "stat_prefix": "ready",
        "http_protocol_options": {"accept_http_10": true},
        "route_config": {"virtual_hosts": [{"name": "any", "domains": ["*"], "routes": [route]}]},
        "http_filters": [router],
    }));
    json!({
        "name": "ready",
        "address": address(15021),
        "filter_chains": [{"filters": [manager]}],
    })
}

/// A cluster whose hosts are the original destinations.
fn original_destination(name: &str, mut rest: Value) -> Value {
    let bounds: Vec<Value> = ["DEFAULT", "HIGH"]
        .iter()
        .map(|priority| {
            json!({
                "priority": priority,
                "max_connections": UNBOUNDED,
                "max_pending_requests": UNBOUNDED,
                "max_requests": UNBOUNDED,
            })
        })
        .collect();
    rest["name"] = name.into();
    rest["type"] = "ORIGINAL_DST".into();
    rest["lb_policy"] = "CLUSTER_PROVIDED".into();
    rest["connect_timeout"] = "10s".into();
    rest["circuit_breakers"] = json!({"thresholds": bounds});
    rest
}

fn plain() -> Value {
    original_destination("plain", json!({}))
}

/// The application a CONNECT request names.
fn application() -> Value {
    let by_authority = json!({"use_http_header": true, "http_header_name": ":authority"});
    original_destination(
        "application",
        json!({"original_dst_lb_config": by_authority}),
    )
}

fn tunnel(place: &Place, hbone: bool) -> Value {
    if !hbone {
        let rest = json!({"transport_socket": client_tls(place, &[])});
        return original_destination("tunnel", rest);
    }
    let options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    original_destination(
        "tunnel",
        json!({
            "transport_socket": client_tls(place, &["h2"]),
            "original_dst_lb_config": {"upstream_port_override": 15008},
            "typed_extension_protocol_options": {
                options: {
                    "@type": format!("type.googleapis.com/{options}"),
                    "explicit_http_config": {"http2_protocol_options": http2()},
                },
            },
        }),
    )
}

fn server_tls(place: &Place, protocols: &[&str]) -> Value {
    let peers = json!({"prefix": format!("spiffe://{TRUST_DOMAIN}/")});
    let fields = json!({
        "common_tls_context": common_tls(place, protocols, &peers),
        "require_client_certificate": true,
    });
    tls("DownstreamTlsContext", fields)
}

fn client_tls(place: &Place, protocols: &[&str]) -> Value {
    let (_, identity) = place.far_pod();
    let peers = json!({"exact": identity});
    let fields = json!({"common_tls_context": common_tls(place, protocols, &peers)});
    tls("UpstreamTlsContext", fields)
}

fn tls(context: &str, fields: Value) -> Value {
    let kind = format!("extensions.transport_sockets.tls.v3.{context}");
    typed("envoy.transport_sockets.tls", &kind, fields)
}

fn common_tls(place: &Place, protocols: &[&str], peers: &Value) -> Value {
    let files = &place.tls;
    let file = |path: &Path| json!({"filename": path});
    json!({
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
            "ecdh_curves": ["X25519"],
        },
        "tls_certificates": [{
            "certificate_chain": file(&files.certificate),
            "private_key": file(&files.key),
        }],
        "validation_context": {
            "trusted_ca": file(&files.root),
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": peers}],
        },
        "alpn_protocols": protocols,
    })
}
