//! Names of the redirection's programs, by which its links and filters are known as ours wherever
//! they are found.

pub(crate) const APP_OUTBOUND: &str = "app_outbound";
pub(crate) const APP_INBOUND: &str = "app_inbound";
pub(crate) const ZTUNNEL_HOST: &str = "ztunnel_host";
pub(crate) const UNDERLAY_INGRESS: &str = "underlay_ingress";
pub(crate) const ZTUNNEL_INGRESS: &str = "ztunnel_ingress";
pub(crate) const CUT_OFF: &str = "cut_off";
pub(crate) const ZTUNNEL_GUARD: &str = "ztunnel_guard";

/// All of them, in the order of `enum program` of `bpf/src/layout.h`.
pub(crate) const PROGRAMS: [&str; 7] = [
    APP_OUTBOUND,
    APP_INBOUND,
    ZTUNNEL_HOST,
    UNDERLAY_INGRESS,
    ZTUNNEL_INGRESS,
    CUT_OFF,
    ZTUNNEL_GUARD,
];

/// Names in the kernel are cut.
const NAME_BYTES_MAX: usize = 15;

/// Whether the kernel, which cuts names, would call it so.
pub(crate) fn is_called(shown: &str, full: &str) -> bool {
    shown == &full[..full.len().min(NAME_BYTES_MAX)]
}

/// The program of ours that the kernel calls so.
pub(crate) fn own(shown: &str) -> Option<&'static str> {
    PROGRAMS.into_iter().find(|full| is_called(shown, full))
}
