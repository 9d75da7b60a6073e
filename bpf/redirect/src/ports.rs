//! Ports of ztunnel's listeners, as everywhere in Istio; those of `bpf/src/layout.h`.

/// Connections that local pods make.
pub(crate) const OUTBOUND: u16 = 15_001;
/// Plaintext connections to local pods.
pub(crate) const INBOUND_PLAIN: u16 = 15_006;
/// HBONE connections to local pods.
pub(crate) const INBOUND_HBONE: u16 = 15_008;
/// DNS queries of local pods, if they are captured.
pub(crate) const DNS: u16 = 15_053;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_have_the_same() {
        let header = include_str!("../../src/layout.h");
        for (name, port) in [
            ("OUTBOUND", OUTBOUND),
            ("INBOUND_PLAIN", INBOUND_PLAIN),
            ("INBOUND_HBONE", INBOUND_HBONE),
        ] {
            let line = format!("#define PORT_{name} {port}\n");
            assert!(header.contains(&line), "{line}");
        }
    }
}
