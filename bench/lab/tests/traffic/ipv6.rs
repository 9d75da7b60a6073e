//! IPv6 between the pods: through the mesh on path `ebpf`, and not at all on `tunnel`, which does
//! not carry it: it must not get past the mesh.

use std::io::{self, Write as _};
use std::time::Duration;

use lab::Redirect;
use lab::network::has_ipv6;

use crate::support::{Pattern, TestLab, at_v6, check_echo, echo_server, eventually};

const SIZES: [u64; 5] = [1, 1400, 16_385, 100_000, 3 << 20];

/// Whole, from the client's own address, and through the ztunnels where there are any.
pub(super) fn is_exact(lab: &mut TestLab) {
    if !has_ipv6() {
        let _ = writeln!(
            io::stderr(),
            "skipped: ipv6_is_exact: the machine has no IPv6"
        );
        return;
    }
    let pattern = Pattern::new(21);
    let captured = lab.lab.redirect() == Redirect::Ebpf;
    for (client, server) in [
        ("client-a", "server-b"),
        ("client-a", "server-a"),
        ("server-b", "server-a"),
        ("plain-b", "server-b"),
    ] {
        if lab.lab.redirect() == Redirect::Tunnel {
            let _listener = lab.listen_v6(server, 8080);
            let to = at_v6(server, 8080);
            let connected = lab.try_connect(client, to, Duration::from_millis(1_200));
            assert!(connected.is_err(), "{client} -> {server} past the mesh");
            continue;
        }
        let before = opened(lab);
        let echo = echo_server(lab.listen_v6(server, 8080), SIZES.len());
        for (seed, size) in (0..).zip(SIZES) {
            let stream = lab.connect(client, at_v6(server, 8080));
            check_echo(&stream, &pattern, size, seed);
        }
        for peer in echo.join().unwrap() {
            assert_eq!(peer.ip(), at_v6(client, 1).ip(), "{client} -> {server}");
        }
        if captured {
            eventually("ztunnels counted the connections", || {
                (opened(lab) >= before + SIZES.len() as u64).then_some(())
            });
        } else {
            assert_eq!(opened(lab), before, "{client} -> {server}");
        }
    }
}

/// Connections that the ztunnels have seen; none without ztunnels.
fn opened(lab: &TestLab) -> u64 {
    if lab.lab.redirect() == Redirect::None {
        return 0;
    }
    let of = |host| {
        let metrics = lab.metrics(host);
        metrics.sum("istio_tcp_connections_opened_total", &[])
    };
    of("ztunnel-a") + of("ztunnel-b")
}
