//! How the journal's file says which back end it is of, and what that one found out when it was
//! installed: `redirect` is its name, `detail` is how programs are attached (`ebpf`), or driver and
//! UDP port of the tunnels (`tunnel`).

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::back_end::{AttachedBy, BackEnd, Redirect, Tunnels};

/// None: not found out yet.
pub(super) type Installed = BackEnd<Option<AttachedBy>, Option<Tunnels>>;

/// As nothing is known of it.
pub(super) fn new(redirect: Redirect) -> Installed {
    match redirect {
        Redirect::Ebpf => BackEnd::Ebpf(None),
        Redirect::Tunnel => BackEnd::IptablesTunnel(None),
    }
}

#[derive(Deserialize, Serialize)]
struct Written {
    redirect: Redirect,
    detail: Option<String>,
}

pub(super) fn serialize<S: Serializer>(
    installed: &Installed,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let detail = match installed {
        BackEnd::Ebpf(by) => by.map(|by| by.name().to_owned()),
        BackEnd::IptablesTunnel(tunnels) => tunnels.map(|tunnels| tunnels.to_string()),
    };
    let redirect = installed.redirect();
    Written { redirect, detail }.serialize(serializer)
}

/// A detail that this version does not know counts as none, so that all of it can still be removed.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Installed, D::Error> {
    let Written { redirect, detail } = Written::deserialize(deserializer)?;
    let detail = detail.unwrap_or_default();
    Ok(match redirect {
        Redirect::Ebpf => BackEnd::Ebpf(detail.parse().ok()),
        Redirect::Tunnel => BackEnd::IptablesTunnel(detail.parse().ok()),
    })
}
