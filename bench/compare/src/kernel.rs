//! Counters of a lab that are read from inside its namespaces: io_uring enters, conntrack
//! entries, packets through the tunnel. What a path does not have is missing.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use lab::Lab;
use lab::Redirect;
use lab::http_get;
use mesh::ports;

const NODES: [&str; 2] = ["node-a", "node-b"];
const ZTUNNELS: [&str; 2] = ["ztunnel-a", "ztunnel-b"];
const ENTERS: &str = "ztunnel_worker_enters";
/// The node's ends of the tunnel, in Istio's names.
const TUNNEL: [&str; 2] = ["istioin", "istioout"];
const CONNTRACK: &str = "/proc/sys/net/netfilter/nf_conntrack_count";
const TIMEOUT: Duration = Duration::from_millis(500);

/// Counters at one moment, or what they grew by.
#[derive(Clone, Debug, Default)]
pub(super) struct Readings {
    /// io_uring enters of all ztunnel workers, of ztunnels that export it.
    pub(super) enters: Option<u64>,
    /// Packets through the nodes' tunnel interfaces, both ways.
    pub(super) tunnel_packets: Option<u64>,
    /// Conntrack entries of nodes and ztunnels; a level, not a count.
    pub(super) conntrack_entries: Option<u64>,
}

impl Readings {
    /// Reads what the lab has.
    pub(super) fn take(lab: &Lab) -> Self {
        let redirected = lab.redirect() != Redirect::None;
        let tunnel = lab.redirect() == Redirect::Tunnel;
        Self {
            enters: redirected
                .then(|| sum(&ZTUNNELS, |host| enters(lab, host)))
                .flatten(),
            tunnel_packets: tunnel
                .then(|| sum(&NODES, |host| lab.on(host, tunnel_packets).ok().flatten()))
                .flatten(),
            conntrack_entries: sum(&[NODES, ZTUNNELS].concat(), |host| {
                lab.on(host, conntrack_entries).ok().flatten()
            }),
        }
    }

    /// Growth of the counters since `earlier`; levels stay.
    pub(super) fn since(self, earlier: &Self) -> Self {
        let grown = |now: Option<u64>, then: Option<u64>| Some(now?.saturating_sub(then?));
        Self {
            enters: grown(self.enters, earlier.enters),
            tunnel_packets: grown(self.tunnel_packets, earlier.tunnel_packets),
            conntrack_entries: self.conntrack_entries,
        }
    }
}

/// The sum over all hosts; `None` unless all of them have it.
fn sum(hosts: &[&str], read: impl Fn(&str) -> Option<u64>) -> Option<u64> {
    hosts.iter().map(|host| read(host)).sum()
}

fn enters(lab: &Lab, host: &str) -> Option<u64> {
    let server = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::METRICS));
    let (status, text) = http_get(&lab.netns(host).ok()?, server, "/metrics", TIMEOUT).ok()?;
    (status == 200)
        .then(|| sum_of_samples(&text, ENTERS))
        .flatten()
}

/// The sum of a metric's samples over all labels in Prometheus' text format.
fn sum_of_samples(text: &str, name: &str) -> Option<u64> {
    let samples = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let rest = rest.strip_prefix("_total").unwrap_or(rest);
        let rest = match rest.strip_prefix('{') {
            Some(labels) => labels.split_once('}')?.1,
            None => rest.strip_prefix(' ')?,
        };
        rest.split_whitespace().next()?.parse::<f64>().ok()
    });
    samples.map(|value| value as u64).reduce(|a, b| a + b)
}

fn tunnel_packets() -> Option<u64> {
    packets(&fs::read_to_string("/proc/thread-self/net/dev").ok()?)
}

/// Received and sent packets of the tunnel's interfaces in `/proc/net/dev`.
fn packets(text: &str) -> Option<u64> {
    let interfaces = text.lines().filter_map(|line| {
        let (name, counters) = line.split_once(':')?;
        TUNNEL.contains(&name.trim()).then_some(())?;
        let field = |n| counters.split_whitespace().nth(n)?.parse::<u64>().ok();
        Some(field(1)? + field(9)?)
    });
    interfaces.reduce(|a, b| a + b)
}

fn conntrack_entries() -> Option<u64> {
    fs::read_to_string(CONNTRACK).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_over_labels_and_other_metrics_left_out() {
        let text = "# TYPE ztunnel_worker_enters counter\n\
                    ztunnel_worker_enters_total{worker=\"0\"} 40\n\
                    ztunnel_worker_enters_total{worker=\"1\"} 2\n\
                    ztunnel_worker_enters_other 7\n";
        assert_eq!(sum_of_samples(text, ENTERS), Some(42));
        assert_eq!(sum_of_samples("ztunnel_worker_enters 5\n", ENTERS), Some(5));
        assert_eq!(sum_of_samples("", ENTERS), None);
    }

    #[test]
    fn only_the_tunnels_packets_count() {
        let text = "Inter-| Receive | Transmit\n face |bytes packets\n\
                    \x20   lo: 1 100 0 0 0 0 0 0 1 100 0 0 0 0 0 0\n\
                    istioin: 9 3 0 0 0 0 0 0 9 4 0 0 0 0 0 0\n\
                    istioout: 9 10 0 0 0 0 0 0 9 20 0 0 0 0 0 0\n";
        assert_eq!(packets(text), Some(37));
        assert_eq!(packets("lo: 1 100 0 0 0 0 0 0 1 100 0\n"), None);
    }

    #[test]
    fn counters_grow_and_levels_stay() {
        let reading = |enters, entries| Readings {
            enters,
            tunnel_packets: None,
            conntrack_entries: entries,
        };
        let grown = reading(Some(10), Some(3)).since(&reading(Some(4), Some(9)));
        assert_eq!(grown.enters, Some(6));
        assert_eq!(grown.conntrack_entries, Some(3));
        assert_eq!(
            reading(Some(1), None).since(&reading(None, None)).enters,
            None
        );
    }
}
