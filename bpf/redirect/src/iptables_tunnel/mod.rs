//! Redirection by iptables, policy routing and two tunnels: the node-level path of Istio 1.17-1.20.
//!
//! A pod's TCP is marked in the mangle table and routed into a tunnel to ztunnel's namespace, where
//! TPROXY gives it to a listener; later packets of the connection go straight to ztunnel's
//! interface by the connection's mark. [`Variant::Hardened`] is the same path with the defects
//! fixed that lose connections (resets of node-local connections, leaked TIME_WAIT answers, refused
//! SYN cookies, errors of the path that never reach ztunnel) or go around policies, and source
//! ports of ztunnel's own apart from the pods'.
//!
//! Uses, on the node: ipset `ztunnel-pods-ips`, chains `ztunnel-*`, interfaces `istioin` and
//! `istioout`, route tables 100 to 102, rule preferences 98 to 104; in ztunnel's namespace
//! `pistioin`, `pistioout`, tables 100 to 102, preferences 20000 and 20003. What others put into
//! these is not preserved. The hardened variant moves the rule for local addresses from preference
//! 0 to 99: what answers ztunnel goes to ztunnel also where ztunnel speaks with an address of the
//! node's.
//!
//! With ztunnel gone, packets find no listener and are dropped; with its interface gone too, the
//! hardened variant has routes that end there, where the faithful one lets what is left of open
//! connections out by the main table. Limits: IPv4 only as upstream. TCP by IPv6 of captured pods
//! is dropped by the hardened variant and left alone by the faithful one, where it is a way around
//! the mesh; UDP other than captured DNS is exempt, but for what would be opened out of a tunnel on
//! the node; a pod may use another's source address (there is no check); a pod's open connections
//! break when it is added or removed. A pod sees a client that its own node masquerades with the
//! inbound tunnel's address, 192.168.126.1.

mod inventory;
mod links;
mod rules;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use crate::back_end::{BackEnd, Redirect};
use crate::error::{Error, Result};
use crate::journal::undo::Undo;
use crate::journal::{Journal, Owners};
use crate::settings::{Pod, TunnelSettings, Variant};
use crate::status::{Counters, Failure, PodStatus, Status, TunnelStatus, Uncaptured};
use crate::system::iptables::{self, Family, Table};
use crate::system::links::Links;
use crate::system::netns::{self, Netns};
use crate::system::{command, sysctl};
use crate::{Redirection, cut_off};
use rules::{IN, OUT, PEER_IN, PEER_OUT, POD_SET};

type Settings = crate::settings::Settings<TunnelSettings>;

/// Source ports of ztunnel's connections, below the 32,768 where Linux' default for pods begins.
/// They leave with the client's address: on a port that the client has used towards the same
/// server they would meet the conntrack entry of the client's own connection, and its mark sends
/// them to the wrong place until the SYN's retransmission a second later.
const SOURCE_PORTS: &str = "10240\t32767";

/// Used only when there is no other route.
const LAST_METRIC: u32 = 4_278_198_272;

/// The `tunnel` back end.
#[derive(Debug)]
pub(crate) struct IptablesTunnel {
    settings: Settings,
    journal: Journal,
}

impl IptablesTunnel {
    /// For the given node; reads the journal, changes nothing.
    ///
    /// # Errors
    /// If the journal cannot be read.
    pub(crate) fn new(settings: Settings) -> Result<Self> {
        let journal = Journal::open(&settings.state_dir, Redirect::Tunnel)?;
        Ok(Self { settings, journal })
    }

    /// In this order, so that nothing is marked before what handles the mark is there.
    fn install_steps(&mut self, node: &Netns, ztunnel: &Netns) -> Result<()> {
        let s = &self.settings;
        netns::interface(node, &s.ztunnel.host_interface)?;
        netns::interface(ztunnel, &s.ztunnel.interface)?;
        for netns in self.sets(node, ztunnel) {
            self.journal.add(
                None,
                netns,
                &format!("ipset create {POD_SET} hash:ip family inet comment -exist"),
                &format!("ipset destroy {POD_SET}"),
            )?;
        }
        let addresses = (s.node.address, s.ztunnel.address);
        let tunnels = links::ensure(&mut self.journal, node, ztunnel, addresses)?;
        self.node_sysctls(node)?;
        self.ztunnel_sysctls(ztunnel)?;
        self.ztunnel_routes(ztunnel)?;
        self.node_routes(node)?;
        let of_ztunnel = rules::ztunnel(&self.settings);
        let of_node = rules::node(&self.settings, tunnels.port);
        let iptables = self.settings.back_end.iptables;
        for (netns, rules) in [(ztunnel, of_ztunnel), (node, of_node)] {
            self.apply(netns, Family::V4, &rules)?;
        }
        self.apply_ipv6(node)?;
        self.journal.retain_chains(iptables)
    }

    fn apply(&mut self, netns: &Netns, family: Family, rules: &[Table]) -> Result<()> {
        let iptables = self.settings.back_end.iptables;
        let undo = Undo::Chains {
            netns: netns.clone(),
            iptables,
            family,
        };
        self.journal.record(None, undo)?;
        netns.run(|| iptables::apply(family, iptables, rules))
    }

    /// Drops IPv6 of the pods that the journal has, and no other's.
    fn apply_ipv6(&mut self, node: &Netns) -> Result<()> {
        if !self.drops_ipv6() {
            return Ok(());
        }
        let pods = self.journal.pods().iter();
        let rules = rules::node_ipv6(pods.map(|pod| pod.host_interface.as_str()));
        self.apply(node, Family::V6, &rules)
    }

    /// Whether IPv6 of captured pods is dropped.
    fn drops_ipv6(&self) -> bool {
        self.settings.back_end.variant == Variant::Hardened
            && Path::new("/proc/sys/net/ipv6").exists()
    }

    /// Namespaces that need the set of pods.
    fn sets<'a>(&self, node: &'a Netns, ztunnel: &'a Netns) -> Vec<&'a Netns> {
        match self.settings.back_end.variant {
            Variant::Faithful => vec![node],
            Variant::Hardened => vec![node, ztunnel],
        }
    }

    fn node_sysctls(&mut self, node: &Netns) -> Result<()> {
        let zv = self.settings.ztunnel.host_interface.clone();
        for scope in ["all", "default", &zv, IN, OUT] {
            let name = format!("net/ipv4/conf/{scope}/rp_filter");
            self.journal.set_sysctl(None, node, &name, "0")?;
        }
        // ztunnel's replies may carry an address of the node.
        for scope in [&zv, IN, OUT] {
            let name = format!("net/ipv4/conf/{scope}/accept_local");
            self.journal.set_sysctl(None, node, &name, "1")?;
        }
        Ok(())
    }

    fn ztunnel_sysctls(&mut self, ztunnel: &Netns) -> Result<()> {
        let interface = self.settings.ztunnel.interface.clone();
        for scope in ["all", "default", &interface, PEER_IN, PEER_OUT] {
            let name = format!("net/ipv4/conf/{scope}/rp_filter");
            self.journal.set_sysctl(None, ztunnel, &name, "0")?;
        }
        if self.settings.back_end.variant == Variant::Hardened {
            let name = "net/ipv4/ip_local_port_range";
            self.journal.set_sysctl(None, ztunnel, name, SOURCE_PORTS)?;
        }
        Ok(())
    }

    fn route(&mut self, netns: &Netns, table: u32, route: &str, key: &str) -> Result<()> {
        self.journal.add(
            None,
            netns,
            &format!("ip route replace {route} table {table}"),
            &format!("ip route del {key} table {table}"),
        )
    }

    fn rule(&mut self, netns: &Netns, rule: &str) -> Result<()> {
        let (add, remove) = (format!("ip rule add {rule}"), format!("ip rule del {rule}"));
        self.journal.add(None, netns, &add, &remove)
    }

    fn node_routes(&mut self, node: &Netns) -> Result<()> {
        let zip = self.settings.ztunnel.address;
        let zv = self.settings.ztunnel.host_interface.clone();
        for table in [100, 101, 102] {
            let link = format!("{zip} dev {zv} scope link");
            self.route(node, table, &link, &zip.to_string())?;
        }
        let out = format!("default via 192.168.127.2 dev {OUT}");
        self.route(node, 101, &out, "default")?;
        let back = format!("default via {zip} dev {zv} onlink");
        self.route(node, 102, &back, "default")?;
        if self.settings.back_end.variant == Variant::Hardened {
            // The routes above go with ztunnel's interface. Without these, what is marked for
            // ztunnel would then take the main table, around the mesh.
            let zip = zip.to_string();
            for (table, to) in [(100, zip.as_str()), (101, &zip), (102, "default")] {
                let dead = format!("unreachable {to} metric {LAST_METRIC}");
                self.route(node, table, &dead, &dead)?;
            }
        }
        if self.settings.back_end.variant == Variant::Hardened {
            self.local_after_ztunnel(node)?;
        }
        self.rule(node, "pref 100 fwmark 0x200/0x200 goto 32766")?;
        self.rule(node, "pref 101 fwmark 0x100/0x100 lookup 101")?;
        self.rule(node, "pref 102 fwmark 0x040/0x040 lookup 102")?;
        match self.settings.back_end.variant {
            Variant::Faithful => self.rule(node, "pref 103 lookup 100"),
            // What the node itself sends to pods is not the mesh's (probes).
            Variant::Hardened => {
                self.rule(node, "pref 103 not iif lo lookup 100")?;
                self.rule(node, &format!("pref 104 to {zip} lookup 100"))
            }
        }
    }

    /// Has what is marked as ztunnel's go there before the node's own addresses are looked for.
    /// There is a rule for these at any time.
    fn local_after_ztunnel(&mut self, node: &Netns) -> Result<()> {
        self.rule(node, "pref 98 fwmark 0x040/0x040 lookup 102")?;
        self.rule(node, "pref 99 lookup local")?;
        let rules = node.run(|| command::ip("rule show"))?;
        let first = rules.lines().next().unwrap_or_default();
        let words: Vec<_> = first.split_whitespace().collect();
        if words == ["0:", "from", "all", "lookup", "local"] {
            let (remove, add) = (
                "rule del pref 0 lookup local",
                "rule add pref 0 lookup local",
            );
            self.journal
                .add(None, node, &format!("ip {remove}"), &format!("ip {add}"))?;
        }
        Ok(())
    }

    fn ztunnel_routes(&mut self, ztunnel: &Netns) -> Result<()> {
        let local = "local 0.0.0.0/0 dev lo";
        self.route(ztunnel, 100, local, local)?;
        if self.settings.back_end.variant == Variant::Faithful {
            // No rule selects these; Istio installed them all the same.
            let hip = self.settings.node.address;
            let interface = self.settings.ztunnel.interface.clone();
            let links = [
                (101, format!("default via 192.168.127.1 dev {PEER_OUT}")),
                (102, format!("default via 192.168.126.1 dev {PEER_IN}")),
            ];
            for (table, default) in links {
                let link = format!("{hip} dev {interface} scope link");
                self.route(ztunnel, table, &link, &hip.to_string())?;
                self.route(ztunnel, table, &default, "default")?;
            }
        }
        self.rule(ztunnel, "pref 20000 fwmark 0x400/0xfff lookup 100")?;
        self.rule(ztunnel, "pref 20003 fwmark 0x4d3/0xfff lookup 100")
    }

    /// Changes one pod needs: what to run, and how it is taken back.
    fn pod_changes<'a>(
        &self,
        node: &'a Netns,
        ztunnel: &'a Netns,
        pod: &Pod,
    ) -> Vec<(&'a Netns, Change)> {
        let hip = self.settings.node.address;
        let mut all = Vec::new();
        for address in pod.ipv4() {
            let route =
                format!("replace {address}/32 via 192.168.126.2 dev {IN} src {hip} table 100");
            all.push((
                node,
                Change {
                    tool: "ip",
                    words: format!("route {route}"),
                    undo: format!("ip route del {address}/32 table 100"),
                },
            ));
            // ztunnel's side first: it tells by the set which way a connection goes.
            for netns in self.sets(node, ztunnel).into_iter().rev() {
                let change = Change {
                    tool: "ipset",
                    words: format!("add {POD_SET} {address} comment {} -exist", pod.uid),
                    undo: format!("ipset del {POD_SET} {address} -exist"),
                };
                all.push((netns, change));
            }
        }
        all
    }

    /// Notes everything with one write of the journal, then changes it with one run of each tool.
    fn add_pods_steps(&mut self, node: &Netns, ztunnel: &Netns, pods: &[&Pod]) -> Result<()> {
        let changes: Vec<Vec<_>> = pods
            .iter()
            .map(|pod| self.pod_changes(node, ztunnel, pod))
            .collect();
        let rp_filter = |pod: &Pod| format!("net/ipv4/conf/{}/rp_filter", pod.host_interface);
        self.journal.batch(|journal| {
            let mut owners = journal.owners();
            for pod in pods {
                owners.check_free(pod)?;
                owners.add(pod);
            }
            journal.set_pods(pods)?;
            for (pod, changes) in pods.iter().zip(&changes) {
                let uid = Some(pod.uid.as_str());
                journal.note_sysctl(uid, node, &rp_filter(pod), "0")?;
                for (netns, change) in changes {
                    journal.record(uid, Undo::command(netns, change.undo.as_str()))?;
                }
            }
            Ok(())
        })?;
        for pod in pods {
            node.run(|| sysctl::write(&rp_filter(pod), "0"))?;
        }
        let all: Vec<_> = changes.iter().flatten().collect();
        for (netns, tool, args) in [
            (node, "ip", ["-batch", "-"]),
            (ztunnel, "ipset", ["restore", "-exist"]),
            (node, "ipset", ["restore", "-exist"]),
        ] {
            let script: String = all
                .iter()
                .filter(|(at, change)| *at == netns && change.tool == tool)
                .map(|(_, change)| format!("{}\n", change.words.trim_end_matches(" -exist")))
                .collect();
            if !script.is_empty() {
                netns.run(|| command::run_with_input(tool, &args, &script))?;
            }
        }
        self.apply_ipv6(node)
    }

    /// Those of which anything differs from what is known are captured anew, and cut off
    /// meanwhile.
    fn remove_outdated(&mut self, node: &Netns, pods: &[&Pod]) -> Result<()> {
        let known = self.journal.pods().iter();
        let known: HashMap<_, _> = known.map(|pod| (pod.uid.as_str(), pod)).collect();
        let old = |pod: &&Pod| {
            let old = known.get(pod.uid.as_str());
            let old = old.filter(|old| !old.is_captured_as(pod))?;
            Some((*old).clone())
        };
        let outdated: Vec<Pod> = pods.iter().filter_map(old).collect();
        for pod in &outdated {
            if let Err(error) = self.cut_off_one(node, &pod.host_interface) {
                tracing::info!(%error, uid = pod.uid, "not cut off while it is captured anew");
            }
        }
        let uids: Vec<&str> = outdated.iter().map(|pod| pod.uid.as_str()).collect();
        self.remove_pods(&uids)
    }

    /// Adds the filters, then takes back what captured the pod there.
    fn cut_off_one(&mut self, node: &Netns, interface: &str) -> Result<()> {
        cut_off::by_filters(&mut self.journal, node, interface)?;
        let uid = self.journal.pod_at(interface).map(|pod| pod.uid.clone());
        match uid {
            Some(uid) => self.journal.remove_pods(&[&uid]),
            None => Ok(()),
        }
    }

    /// Cuts off a pod whose capture failed.
    fn close(&mut self, node: &Netns, pod: &Pod, error: Error) -> Failure {
        let done = self.cut_off_one(node, &pod.host_interface);
        if let Err(error) = &done {
            tracing::error!(%error, uid = pod.uid, "neither captured nor cut off");
            if let Err(error) = self.journal.remove_pods(&[&pod.uid]) {
                tracing::warn!(%error, "not all of a pod's capture was taken back");
            }
        }
        Failure {
            uid: pod.uid.clone(),
            error,
            cut_off: done.is_ok(),
        }
    }

    fn node(&self) -> Result<Netns> {
        Netns::node_at(self.settings.node.netns.as_deref())
    }

    /// A pod that cannot be captured, or one of several that can.
    fn check_pod(&self, owners: &Owners, pod: &Pod) -> Result<()> {
        self.settings.validate_pod(pod)?;
        owners.check_free(pod)?;
        if pod.ipv4().next().is_none() {
            return Err(Error::Setting {
                field: "pods.addresses",
                value: pod.uid.clone(),
                reason: "the pod needs an IPv4 address for redirection tunnel".to_owned(),
            });
        }
        netns::index("the node", &pod.host_interface).map(drop)
    }
}

/// What a tool is to do, and the command that takes it back.
struct Change {
    tool: &'static str,
    words: String,
    undo: String,
}

impl Redirection for IptablesTunnel {
    fn install(&mut self) -> Result<()> {
        self.settings.validate()?;
        let node = self.node()?;
        let ztunnel = Netns::at(&self.settings.ztunnel.netns)?;
        self.journal.begin(&node, &ztunnel)?;
        let mark = self.journal.mark();
        let result = self.install_steps(&node, &ztunnel);
        if result.is_err() {
            self.journal.rollback(mark);
        }
        result
    }

    fn try_pods(&mut self, pods: &[Pod]) -> Result<Vec<Failure>> {
        let node = self.node()?;
        let ztunnel = Netns::at(&self.settings.ztunnel.netns)?;
        let mut failures = Vec::new();
        let mut sound = Vec::new();
        let mut owners = self.journal.owners();
        for pod in pods {
            match self.check_pod(&owners, pod) {
                Ok(()) => {
                    owners.add(pod);
                    sound.push(pod);
                }
                Err(error) => failures.push(Failure {
                    uid: pod.uid.clone(),
                    error,
                    cut_off: false,
                }),
            }
        }
        self.remove_outdated(&node, &sound)?;
        if let Err(error) = self.add_pods_steps(&node, &ztunnel, &sound) {
            tracing::warn!(%error, "pods are tried one by one");
            for pod in &sound {
                let done = self.add_pods_steps(&node, &ztunnel, &[*pod]);
                failures.extend(done.err().map(|error| self.close(&node, pod, error)));
            }
        }
        let failed = |pod: &Pod| failures.iter().any(|failure| failure.uid == pod.uid);
        let captured = sound.iter().filter(|pod| !failed(pod));
        let interfaces: Vec<_> = captured.map(|pod| pod.host_interface.as_str()).collect();
        self.let_go(&interfaces)?;
        Ok(failures)
    }

    fn cut_off(&mut self, interfaces: &[&str]) -> Result<Vec<(String, Error)>> {
        if interfaces.is_empty() {
            return Ok(Vec::new());
        }
        let node = self.node()?;
        let links = Links::read(&node)?;
        let mut failures = Vec::new();
        for interface in interfaces {
            let done = cut_off::check(&self.settings, &links, interface)
                .and_then(|_| self.cut_off_one(&node, interface));
            failures.extend(done.err().map(|error| ((*interface).to_owned(), error)));
        }
        Ok(failures)
    }

    fn interfaces_cut_off(&self) -> Vec<String> {
        self.journal.cut_off().map(str::to_owned).collect()
    }

    fn let_go(&mut self, interfaces: &[&str]) -> Result<()> {
        let known: Vec<String> = self
            .journal
            .cut_off()
            .filter(|name| interfaces.contains(name))
            .map(str::to_owned)
            .collect();
        let names: Vec<&str> = known.iter().map(String::as_str).collect();
        cut_off::end(&mut self.journal, &names)
    }

    fn note_uncaptured(&mut self, pods: Vec<Uncaptured>) -> Result<()> {
        self.journal.set_uncaptured(pods)
    }

    fn uncaptured(&self) -> &[Uncaptured] {
        self.journal.uncaptured()
    }

    fn remove_pods(&mut self, uids: &[&str]) -> Result<()> {
        let removed = self.journal.remove_pods(uids);
        if self.journal.is_installed() && !uids.is_empty() {
            let node = self.node()?;
            self.apply_ipv6(&node)?;
        }
        removed
    }

    fn enrolled(&self) -> Vec<Pod> {
        self.journal.pods().to_vec()
    }

    fn status(&self) -> Result<Status> {
        Ok(Status {
            installed: self.journal.is_installed(),
            dns: self.settings.dns,
            pods: self.journal.pods().iter().map(PodStatus::of).collect(),
            not_captured: self.journal.uncaptured().to_vec(),
            owned: self.inventory()?,
            counters: self.counters()?,
            back_end: BackEnd::IptablesTunnel(TunnelStatus {
                variant: self.settings.back_end.variant,
                driver: self.journal.tunnels().map(|tunnels| tunnels.driver),
            }),
        })
    }

    fn counters(&self) -> Result<Counters> {
        let mut counters = Counters::new();
        if self.journal.is_installed() {
            let iptables = self.settings.back_end.iptables;
            counters.insert("node".to_owned(), iptables::counters(Family::V4, iptables)?);
            if self.drops_ipv6() {
                let dropped = iptables::counters(Family::V6, iptables)?;
                counters.insert("node_ipv6".to_owned(), dropped);
            }
            if let Ok(ztunnel) = Netns::at(&self.settings.ztunnel.netns) {
                let of_ztunnel = ztunnel.run(|| iptables::counters(Family::V4, iptables))?;
                counters.insert("ztunnel".to_owned(), of_ztunnel);
            }
        }
        Ok(counters)
    }

    fn inventory(&self) -> Result<BTreeSet<String>> {
        let mut all = BTreeSet::new();
        if !self.journal.is_installed() {
            return Ok(all);
        }
        let iptables = self.settings.back_end.iptables;
        let node = self.node()?;
        all.extend(node.run(|| inventory::of("node", iptables))?);
        all.extend(cut_off::inventory(&self.journal, &node));
        if let Ok(ztunnel) = Netns::at(&self.settings.ztunnel.netns) {
            all.extend(ztunnel.run(|| inventory::of("ztunnel", iptables))?);
        }
        all.extend(self.journal.describe_sysctls());
        all.extend(self.journal.describe_table());
        Ok(all)
    }

    fn cleanup(&mut self) -> Result<()> {
        self.journal.undo_all()
    }
}
