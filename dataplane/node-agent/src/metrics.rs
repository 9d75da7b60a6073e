//! The agent's metrics.

use httpd::{Exposition, MetricKind, Page, labels};
use redirect::{Counters, Outcome, Redirect, Uncaptured, Why, sockmap};

/// What they are of.
#[derive(Debug)]
pub(crate) struct Measured<'a> {
    pub(crate) redirect: Redirect,
    /// Captured pods.
    pub(crate) pods: usize,
    pub(crate) uncaptured: &'a [Uncaptured],
    pub(crate) older_broken: u64,
    /// Of the back end.
    pub(crate) counters: &'a Counters,
    /// If it is installed.
    pub(crate) sockmap: Option<&'a sockmap::Status>,
}

/// All of them.
pub(crate) fn page(measured: &Measured<'_>, exposition: Exposition) -> String {
    let (counters, sockmap) = (measured.counters, measured.sockmap);
    let mut page = Page::new(exposition);
    let (name, help) = ("node_agent_pods", "Captured pods of this node.");
    single(
        &mut page,
        name,
        help,
        MetricKind::Gauge,
        measured.pods as u64,
    );
    uncaptured(&mut page, measured.uncaptured);
    let name = "node_agent_older_connections_broken_total";
    let help = "Connections older than their pod's capture that found no place in the map.";
    single(
        &mut page,
        name,
        help,
        MetricKind::Counter,
        measured.older_broken,
    );
    match measured.redirect {
        Redirect::Ebpf => programs(&mut page, counters),
        Redirect::Tunnel => rules(&mut page, counters),
    }
    let name = "node_agent_sockmap_enabled";
    let help = "Whether new connections may use sockmap.";
    let enabled = sockmap.is_some_and(|status| status.enabled);
    single(&mut page, name, help, MetricKind::Gauge, enabled.into());
    if let Some(status) = sockmap {
        of_sockmap(&mut page, status);
    }
    page.finish()
}

fn single(page: &mut Page, name: &str, help: &str, kind: MetricKind, value: u64) {
    page.family(name, help, kind);
    page.sample(name, "", value);
}

fn uncaptured(page: &mut Page, pods: &[Uncaptured]) {
    let name = "node_agent_pods_not_captured";
    let help = "Listed pods that are not captured, by reason and whether they are cut off.";
    page.family(name, help, MetricKind::Gauge);
    for why in Why::ALL {
        for (cut_off, text) in [(true, "true"), (false, "false")] {
            let alike = pods.iter();
            let alike = alike.filter(|pod| pod.why == why && pod.cut_off == cut_off);
            let pairs = [("reason", why.name()), ("cut_off", text)];
            page.sample(name, &labels(&pairs), alike.count() as u64);
        }
    }
}

fn programs(page: &mut Page, counters: &Counters) {
    let name = "node_agent_packets_total";
    let help = "Packets by BPF program and what became of them; connections for ztunnel_ingress.";
    page.family(name, help, MetricKind::Counter);
    for (program, reasons) in counters {
        for (reason, count) in reasons {
            let pairs = [
                ("program", program.as_str()),
                ("outcome", Outcome::of(reason).name()),
                ("reason", reason),
            ];
            page.sample(name, &labels(&pairs), *count);
        }
    }
}

fn rules(page: &mut Page, counters: &Counters) {
    let name = "node_agent_rule_packets_total";
    page.family(
        name,
        "Packets by iptables rule that saw any.",
        MetricKind::Counter,
    );
    for (place, rules) in counters {
        for (rule, count) in rules {
            page.sample(name, &labels(&[("place", place), ("rule", rule)]), *count);
        }
    }
}

fn of_sockmap(page: &mut Page, status: &sockmap::Status) {
    let count = |name: &str| status.counters.get(name).copied().unwrap_or(0);
    let families = [
        (
            "node_agent_sockmap_bytes_total",
            "Bytes of sockets in the maps: from socket to socket, or past it, by TCP.",
            "way",
            &[
                ("to_ztunnel", "to_ztunnel_bytes"),
                ("to_pod", "to_pod_bytes"),
                ("bypassed", "bypassed_bytes"),
            ][..],
        ),
        (
            "node_agent_sockmap_messages_total",
            "Messages that went from socket to socket.",
            "way",
            &[
                ("to_ztunnel", "to_ztunnel_messages"),
                ("to_pod", "to_pod_messages"),
            ],
        ),
        (
            "node_agent_sockmap_sockets_total",
            "Sockets put into the maps, and those not: they block, use MPTCP, maps full.",
            "result",
            &[("entered", "sockets"), ("refused", "refused")],
        ),
        (
            "node_agent_sockmap_demotions_total",
            "Connections given back to TCP, by reason.",
            "reason",
            &[
                ("budget", "demoted_budget"),
                ("pressure", "demoted_pressure"),
                ("blocking", "demoted_blocking"),
                ("no_peer", "demoted_no_peer"),
                ("closed", "demoted_closed"),
            ],
        ),
    ];
    for (name, help, label, samples) in families {
        page.family(name, help, MetricKind::Counter);
        for (content, counter) in samples {
            page.sample(name, &labels(&[(label, content)]), count(counter));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl Fn(&mut Page)) -> String {
        let mut page = Page::new(Exposition::Text);
        write(&mut page);
        page.finish()
    }

    #[test]
    fn counters_become_samples() {
        let of_program = [("spoofed".to_owned(), 3), ("dns".to_owned(), 4)];
        let counters = Counters::from([("app_outbound".to_owned(), of_program.into())]);
        let of_rule = [(r#"a "b" \c"#.to_owned(), 1)];
        let of_rules = Counters::from([("node".to_owned(), of_rule.into())]);
        let text = written(|page| {
            programs(page, &counters);
            rules(page, &of_rules);
        });
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[1], "# TYPE node_agent_packets_total counter");
        assert_eq!(
            lines[2..4],
            [
                r#"node_agent_packets_total{program="app_outbound",outcome="redirected",reason="dns"} 4"#,
                r#"node_agent_packets_total{program="app_outbound",outcome="dropped",reason="spoofed"} 3"#,
            ]
        );
        assert_eq!(
            lines[6],
            r#"node_agent_rule_packets_total{place="node",rule="a \"b\" \\c"} 1"#
        );
    }

    #[test]
    fn every_counter_of_the_sockmap_is_told() {
        let counters = (1..).zip(sockmap::COUNTER_NAMES);
        let counters = counters.map(|(value, name)| (name.to_owned(), 1000 + value));
        let status = sockmap::Status {
            enabled: true,
            forced: false,
            memory_max: None,
            counters: counters.collect(),
        };
        let text = written(|page| of_sockmap(page, &status));
        for value in status.counters.values() {
            assert!(text.contains(&format!("}} {value}\n")), "{value}: {text}");
        }
    }
}
