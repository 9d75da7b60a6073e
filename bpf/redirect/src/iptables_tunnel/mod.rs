//! Redirection by iptables, policy routing and two tunnels: the node-level path of Istio 1.17-1.20.
//!
//! A pod's TCP is marked in the mangle table and routed into a tunnel to ztunnel's namespace, where
//! TPROXY gives it to a listener; later packets of the connection go straight to ztunnel's
//! interface by the connection's mark. [`Variant::Hardened`] is the same
//! path with three defects fixed, and source ports of ztunnel's own apart from the pods'.
//!
//! Uses, on the node: ipset `ztunnel-pods-ips`, chains `ztunnel-*`, interfaces `istioin` and
//! `istioout`, route tables 100 to 102, rule preferences 100 to 103; in ztunnel's namespace
//! `pistioin`, `pistioout`, tables 100 to 102, preferences 20000 and 20003. What others put into
//! these is not preserved.
//!
//! With ztunnel gone, packets find no listener and are dropped; with its interface gone too, the
//! hardened variant has routes that end there, where the faithful one lets what is left of open
//! connections out by the main table. Limits: IPv4 only, IPv6 is not captured; UDP is exempt; a
//! pod may use another's source address (there is no check); a pod's open connections break when
//! it is added or removed.

pub(crate) mod links;
pub(crate) mod rules;
pub(crate) mod tables;

use crate::Redirection;
use crate::error::Result;
use crate::journal::{Journal, Undo};
use crate::netns::{self, Netns};
use crate::settings::{Pod, Settings, Variant};
use crate::status::{PodStatus, Status};
use links::Transport;
use rules::{IN, OUT, PEER_IN, PEER_OUT, POD_SET};

const NAME: &str = "tunnel";

/// Source ports of ztunnel's connections, below the 32,768 where Linux' default for pods begins.
/// They leave with the client's address: on a port that the client has used towards the same
/// server they would meet the conntrack entry of the client's own connection, and its mark sends
/// them to the wrong place until the SYN's retransmission a second later.
const SOURCE_PORTS: &str = "10240\t32767";

/// Used only when there is no other route.
const LAST_METRIC: u32 = 4_278_198_272;

/// The `tunnel` back end.
#[derive(Debug)]
pub struct IptablesTunnel {
    settings: Settings,
    journal: Journal,
}

impl IptablesTunnel {
    /// For the given node; reads the journal, changes nothing.
    ///
    /// # Errors
    /// If the journal cannot be read.
    pub fn new(settings: Settings) -> Result<Self> {
        let journal = Journal::open(&settings.state_dir, NAME)?;
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
        let transport = links::ensure(&mut self.journal, node, ztunnel, addresses)?;
        self.node_sysctls(node)?;
        self.ztunnel_sysctls(ztunnel)?;
        self.ztunnel_routes(ztunnel)?;
        self.node_routes(node)?;
        let of_ztunnel = rules::ztunnel(&self.settings);
        self.journal.record(
            None,
            Undo::Chains {
                netns: ztunnel.clone(),
            },
        )?;
        ztunnel.run(|| tables::apply(&of_ztunnel))?;
        let of_node = rules::node(&self.settings, transport.port);
        self.journal.record(
            None,
            Undo::Chains {
                netns: node.clone(),
            },
        )?;
        node.run(|| tables::apply(&of_node))
    }

    /// Namespaces that need the set of pods.
    fn sets<'a>(&self, node: &'a Netns, ztunnel: &'a Netns) -> Vec<&'a Netns> {
        match self.settings.variant {
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
        if self.settings.variant == Variant::Hardened {
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
        if self.settings.variant == Variant::Hardened {
            // The routes above go with ztunnel's interface. Without these, what is marked for
            // ztunnel would then take the main table, around the mesh.
            let zip = zip.to_string();
            for (table, to) in [(100, zip.as_str()), (101, &zip), (102, "default")] {
                let dead = format!("unreachable {to} metric {LAST_METRIC}");
                self.route(node, table, &dead, &dead)?;
            }
        }
        self.rule(node, "pref 100 fwmark 0x200/0x200 goto 32766")?;
        self.rule(node, "pref 101 fwmark 0x100/0x100 lookup 101")?;
        self.rule(node, "pref 102 fwmark 0x040/0x040 lookup 102")?;
        self.rule(node, "pref 103 lookup 100")
    }

    fn ztunnel_routes(&mut self, ztunnel: &Netns) -> Result<()> {
        let local = "local 0.0.0.0/0 dev lo";
        self.route(ztunnel, 100, local, local)?;
        if self.settings.variant == Variant::Faithful {
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

    fn add_pod_steps(&mut self, node: &Netns, ztunnel: &Netns, pod: &Pod) -> Result<()> {
        let uid = Some(pod.uid.as_str());
        let rp_filter = format!("net/ipv4/conf/{}/rp_filter", pod.host_interface);
        self.journal.set_sysctl(uid, node, &rp_filter, "0")?;
        let hip = self.settings.node.address;
        for address in pod.ipv4() {
            self.journal.add(
                uid,
                node,
                &format!(
                    "ip route replace {address}/32 via 192.168.126.2 dev {IN} src {hip} table 100"
                ),
                &format!("ip route del {address}/32 table 100"),
            )?;
            // ztunnel's side first: it tells by the set which way a connection goes.
            for netns in self.sets(node, ztunnel).into_iter().rev() {
                self.journal.add(
                    uid,
                    netns,
                    &format!("ipset add {POD_SET} {address} comment {} -exist", pod.uid),
                    &format!("ipset del {POD_SET} {address} -exist"),
                )?;
            }
        }
        Ok(())
    }
}

impl Redirection for IptablesTunnel {
    fn install(&mut self) -> Result<()> {
        self.settings.validate()?;
        let node = Netns::node()?;
        let ztunnel = Netns::at(&self.settings.ztunnel.netns)?;
        self.journal.begin(&node, &ztunnel)?;
        let mark = self.journal.mark();
        let result = self.install_steps(&node, &ztunnel);
        if result.is_err() {
            self.journal.rollback(mark);
        }
        result
    }

    fn add_pod(&mut self, pod: &Pod) -> Result<()> {
        self.settings.validate_pod(pod)?;
        self.journal.check_address_free(pod)?;
        let node = Netns::node()?;
        let ztunnel = Netns::at(&self.settings.ztunnel.netns)?;
        netns::interface(&node, &pod.host_interface)?;
        let known = self
            .journal
            .pods()
            .iter()
            .find(|known| known.uid == pod.uid);
        if known.is_some_and(|known| known != pod) {
            self.remove_pod(&pod.uid)?;
        }
        let is_new = self.journal.set_pod(pod)?;
        let result = self.add_pod_steps(&node, &ztunnel, pod);
        if result.is_err()
            && is_new
            && let Err(error) = self.journal.remove_pod(&pod.uid)
        {
            tracing::warn!(%error, uid = pod.uid, "not all of the pod's capture was taken back");
        }
        result
    }

    fn remove_pod(&mut self, uid: &str) -> Result<()> {
        self.journal.remove_pod(uid)
    }

    fn enrolled(&self) -> Vec<Pod> {
        self.journal.pods().to_vec()
    }

    fn status(&self) -> Result<Status> {
        let transport = self
            .journal
            .detail()
            .and_then(|detail| detail.parse::<Transport>().ok());
        Ok(Status {
            redirect: NAME,
            installed: self.journal.installed_redirect() == Some(NAME),
            variant: Some(self.settings.variant),
            tunnel_driver: transport.map(|transport| transport.driver.to_owned()),
            attach: None,
            pods: self.journal.pods().iter().map(PodStatus::of).collect(),
            counters: Default::default(),
        })
    }

    fn cleanup(&mut self) -> Result<()> {
        self.journal.undo_all()
    }
}
