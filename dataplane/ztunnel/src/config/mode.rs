//! For whom this proxy works, and where connections and certificates come from.

use std::path::Path;
use std::sync::Arc;

use mesh::WorkloadName;

use super::{AuthoritySource, ConfigError, Transparent};
use crate::environment::{BadSetting, Environment};
use crate::sockmap::Sockmap;

/// The workload this proxy serves alone (`PROXY_MODE=dedicated`), if it does.
pub(super) fn dedicated_to(
    environment: &Environment<'_>,
) -> Result<Option<WorkloadName>, ConfigError> {
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
pub(super) fn authority(
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
pub(super) fn transparent(
    environment: &Environment<'_>,
    dedicated: bool,
) -> Result<Transparent, ConfigError> {
    let node = environment.text("REDIRECT_MODE").as_deref() == Some("node");
    Ok(match (dedicated, environment.boolean("ENABLE_ORIG_SRC")?) {
        (false, _) if node => Transparent::Required,
        (false, _) | (true, Some(false)) => Transparent::No,
        (true, None) => Transparent::IfAllowed,
        (true, Some(true)) => Transparent::Required,
    })
}

/// The node agent's sockmap (`SOCKMAP=on`): its maps are pinned beside the listener map.
pub(super) fn sockmap(
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
