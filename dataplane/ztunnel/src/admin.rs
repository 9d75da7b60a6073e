//! The JSON of `/config_dump`.

use std::time::SystemTime;

use control::SnapshotPublisher;
use identity::CertificateStatus;
use proxy::{ProxyConfig, RedirectMode};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tls::Validity;

/// Model, certificates and state of the configuration, in upstream's shape; of the settings, how
/// traffic gets here and what that means for pods of this node.
pub(crate) fn config_dump(
    publisher: &SnapshotPublisher,
    certificates: &identity::Handle,
    proxy: &ProxyConfig,
) -> Value {
    let mut dump = control::dump::config_dump(&publisher.snapshot());
    let status = publisher.status();
    let certificates: Vec<Value> = certificates.list().iter().map(certificate).collect();
    if let Some(object) = dump.as_object_mut() {
        object.insert("certificates".into(), Value::Array(certificates));
        object.insert(
            "version".into(),
            json!({"version": env!("CARGO_PKG_VERSION")}),
        );
        object.insert(
            "config".into(),
            json!({
                "generation": status.generation,
                "lastError": status.last_error,
                "redirectMode": proxy.mode.label(),
                "podTable": proxy.pods.is_some(),
                "sameNodeTunnel": proxy.mode == RedirectMode::InPod || proxy.same_node_tunnel,
            }),
        );
    }
    dump
}

fn certificate(status: &CertificateStatus) -> Value {
    let chain = status.current.as_ref().map(|current| {
        let info = current.info();
        json!([{
            "serialNumber": info.serial,
            "validFrom": rfc3339(info.not_before),
            "expirationTime": rfc3339(info.not_after),
        }])
    });
    let now = SystemTime::now();
    let validity = status.current.as_ref().map(|tls| tls.info().validity(now));
    let unusable = validity.filter(|validity| *validity != Validity::Valid);
    let state = match (&status.current, &status.error) {
        (Some(_), None) if let Some(why) = unusable => format!("Unavailable: {why}"),
        (Some(_), None) => "Available".to_owned(),
        (Some(_), Some(error)) => format!("Available, renewal failed: {error}"),
        (None, Some(error)) => format!("Unavailable: {error}"),
        (None, None) => "Initializing".to_owned(),
    };
    json!({"identity": status.identity.uri(), "state": state, "certChain": chain})
}

fn rfc3339(time: SystemTime) -> String {
    OffsetDateTime::from(time)
        .format(&Rfc3339)
        .unwrap_or_default()
}
