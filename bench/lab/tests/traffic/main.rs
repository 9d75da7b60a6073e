//! Traffic through the mesh, on each redirection path: it arrives whole, from the right address,
//! encrypted between the nodes, accounted for, and not at all when a ztunnel is missing.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod accounts;
mod closing;
mod ends;
mod exact;
mod ipv6;
mod outage;
mod pressure;
#[path = "../support/mod.rs"]
mod support;
mod workers;

use lab::Redirect;
use support::{Case, at, run_cases};

const MIB: u64 = 1 << 20;

const CASES: &[Case] = &[
    ("small_echoes_are_exact", exact::small_echoes_are_exact),
    ("64_mib_each_way_are_exact", exact::bulk_echo_is_exact),
    ("many_connections_at_once", exact::many_connections_at_once),
    (
        "server_sees_the_clients_address",
        exact::server_sees_the_clients_address,
    ),
    (
        "underlay_holds_no_plaintext",
        exact::underlay_holds_no_plaintext,
    ),
    ("client_closes_first", closing::client_closes_first),
    ("server_closes_first", closing::server_closes_first),
    (
        "refused_connection_surfaces",
        closing::refused_connection_surfaces,
    ),
    (
        "reset_by_the_server_surfaces",
        closing::reset_by_the_server_surfaces,
    ),
    (
        "plain_pod_comes_in_and_is_reached",
        exact::plain_pod_comes_in_and_is_reached,
    ),
    (
        "nodes_and_their_pods_talk",
        exact::nodes_and_their_pods_talk,
    ),
    ("ipv6_is_exact", ipv6::is_exact),
    (
        "metrics_agree_with_the_traffic",
        accounts::metrics_agree_with_the_traffic,
    ),
    (
        "one_log_line_per_connection",
        accounts::one_log_line_per_connection,
    ),
    (
        "the_setting_of_one_hop_is_told",
        accounts::the_setting_is_told,
    ),
    ("source_port_reuse", closing::source_port_reuse),
    (
        "bulk_both_ways_side_by_side",
        pressure::bulk_both_ways_side_by_side,
    ),
    (
        "a_server_that_does_not_read",
        pressure::a_server_that_does_not_read,
    ),
    (
        "aborted_connections_cost_the_others_nothing",
        pressure::aborted_connections_cost_nothing,
    ),
    (
        "stalled_connections_do_not_stop_others",
        pressure::stalled_connections_do_not_stop_others,
    ),
    (
        "draining_lets_connections_finish",
        outage::draining_lets_connections_finish,
    ),
    (
        "without_the_clients_ztunnel_nothing_passes",
        outage::without_the_clients_ztunnel,
    ),
    (
        "without_the_servers_ztunnel_nothing_passes",
        outage::without_the_servers_ztunnel,
    ),
];

#[test]
fn tunnel() {
    run_cases("tunnel", Redirect::Tunnel, CASES);
}

#[test]
fn ebpf() {
    run_cases("ebpf", Redirect::Ebpf, CASES);
}

/// How connections end is the same on every way, on both back ends, and without a mesh.
#[test]
fn ends_on_io_uring() {
    let backend = [("ZTUNNEL_RUNTIME_BACKEND", "io_uring")];
    ends::run("ends_on_io_uring", Redirect::Ebpf, false, &backend);
}

#[test]
fn ends_on_epoll_with_tunnels_on_one_node() {
    let variables = [
        ("ZTUNNEL_RUNTIME_BACKEND", "epoll"),
        ("SAME_NODE_TUNNEL", "true"),
    ];
    let test = "ends_on_epoll_with_tunnels_on_one_node";
    ends::run(test, Redirect::Tunnel, false, &variables);
}

#[test]
fn ends_with_the_short_cut() {
    ends::run("ends_with_the_short_cut", Redirect::Ebpf, true, &[]);
}

#[test]
fn ends_without_a_mesh() {
    ends::run("ends_without_a_mesh", Redirect::None, false, &[]);
}

#[test]
fn one_worker_serves_every_cpu() {
    workers::one_worker_serves_every_cpu("one_worker_serves_every_cpu");
}

/// The control: the same capture does find the marker where nothing encrypts, so that the case of
/// the other paths can fail.
#[test]
fn none() {
    let cases: &[Case] = &[
        ("underlay_holds_the_plaintext", |lab| {
            let capture = exact::capture_marker(lab);
            assert!(
                exact::contains(&capture, exact::MARKER),
                "{} bytes without the marker",
                capture.len()
            );
        }),
        ("small_echoes_are_exact", |lab| {
            exact::echo_sizes(lab, "server-b", at("server-b", 7000));
        }),
        ("ipv6_is_exact", ipv6::is_exact),
        ("client_closes_first", closing::client_closes_first),
        ("server_closes_first", closing::server_closes_first),
    ];
    run_cases("none", Redirect::None, cases);
}
