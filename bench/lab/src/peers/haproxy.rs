//! HAProxy in ztunnel's place: TCP over mutual TLS 1.3 between the nodes.
//!
//! Outbound (15001), connections to the other node's main pod get a TLS session of their own to
//! the pod's own port, which the other HAProxy terminates on 15006; everything else is connected
//! plainly to where it was going. The client's address is kept on both hops (`usesrc clientip`).
//!
//! HAProxy checks a server's name against DNS names only, not URIs: outbound the chain is
//! verified, the SPIFFE identity is not. HAProxy speaks no CONNECT on the client's side of a TCP
//! proxy, so there is no HBONE variant.

use std::path::Path;

use super::Place;

/// As ztunnel's preference.
const SUITES: &str = "TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256";
/// Bytes of each of a connection's two buffers: HAProxy's default, and the size of a TLS record.
const BUFFER_BYTES: u32 = 16_384;

/// HAProxy's configuration file. Its bound on connections is what the limit of open files allows.
#[must_use]
pub fn config(place: &Place) -> String {
    let (pod, _) = place.far_pod();
    let threads = place.threads;
    let (both, root) = (place.tls.both.display(), place.tls.root.display());
    format!(
        "global\n    \
             nbthread {threads}\n    \
             tune.bufsize {BUFFER_BYTES}\n    \
             ssl-default-bind-options ssl-min-ver TLSv1.3\n    \
             ssl-default-bind-ciphersuites {SUITES}\n    \
             ssl-default-bind-curves X25519\n    \
             ssl-default-server-options ssl-min-ver TLSv1.3\n    \
             ssl-default-server-ciphersuites {SUITES}\n\
         defaults\n    \
             mode tcp\n    \
             backlog 4096\n    \
             timeout connect 10s\n    \
             timeout client 1d\n    \
             timeout server 1d\n\
         frontend outbound\n    \
             bind 0.0.0.0:15001 transparent shards by-thread\n    \
             acl far dst {address}/32\n    \
             use_backend tunnel if far\n    \
             default_backend plain\n\
         frontend inbound\n    \
             bind 0.0.0.0:15006 transparent shards by-thread ssl crt {both} ca-file {root} \
             verify required\n    \
             default_backend plain\n\
         frontend ready\n    \
             mode http\n    \
             timeout client 5s\n    \
             bind 0.0.0.0:15021\n    \
             monitor-uri /healthz/ready\n\
         backend tunnel\n    \
             source 0.0.0.0 usesrc clientip\n    \
             server original 0.0.0.0 ssl crt {both} ca-file {root} verify required\n\
         backend plain\n    \
             source 0.0.0.0 usesrc clientip\n    \
             server original 0.0.0.0\n",
        address = pod.address()
    )
}

/// HAProxy's arguments: in the foreground.
#[must_use]
pub fn arguments(file: &Path) -> Vec<String> {
    ["-db", "-f", &file.display().to_string()]
        .map(str::to_owned)
        .to_vec()
}
