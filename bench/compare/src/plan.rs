//! What is measured and in which order. Pure data.

use std::path::PathBuf;

use anyhow::{Result, bail};

use super::placement::Placement;
pub(super) use super::workload::{OPEN_CONNECTIONS, Scope, Workload};
use lab::Redirect;

/// Redirections of this project's own ztunnel, all measured unless others are asked for.
const OWN: [Redirect; 3] = [Redirect::None, Redirect::Tunnel, Redirect::Ebpf];
/// The path with the sockmap short-cut, measured if it is asked for.
const SHORTCUT: &str = "ebpf+sockmap";
/// Longest name of a path: the labs' names are made from it.
const NAME_MAX: usize = 16;

/// What is measured against others: a way that traffic takes between the pods, as ours or a
/// competitor's. Reports and options say path.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Arm {
    /// As in reports.
    pub(super) name: String,
    pub(super) redirect: Redirect,
    /// With the sockmap short-cut between pods and ztunnel.
    pub(super) sockmap: bool,
    /// The arm that this one is a second measurement of.
    pub(super) replicate_of: Option<String>,
    /// A proxy that is not ours.
    pub(super) competitor: Option<PathBuf>,
    /// It carries nothing between pods of one node.
    pub(super) cross_node_only: bool,
}

impl Arm {
    fn own(redirect: Redirect) -> Self {
        Self {
            name: redirect.name().to_owned(),
            redirect,
            sockmap: false,
            replicate_of: None,
            competitor: None,
            cross_node_only: false,
        }
    }

    /// `ebpf` with the short-cut.
    fn shortcut() -> Self {
        Self {
            name: SHORTCUT.to_owned(),
            sockmap: true,
            ..Self::own(Redirect::Ebpf)
        }
    }

    /// A competitor's on `redirect`.
    pub(super) fn competitor(name: &str, binary: PathBuf, redirect: Redirect) -> Self {
        Self {
            name: name.to_owned(),
            redirect,
            sockmap: false,
            replicate_of: None,
            competitor: Some(binary),
            cross_node_only: false,
        }
    }

    fn parse(name: &str) -> Result<Self> {
        if name == SHORTCUT {
            return Ok(Self::shortcut());
        }
        OWN.into_iter()
            .find(|redirect| redirect.name() == name)
            .map_or_else(
                || bail!("path `{name}` is none of none, tunnel, ebpf, {SHORTCUT}"),
                |redirect| Ok(Self::own(redirect)),
            )
    }

    /// The same once more, in a lab of its own.
    fn replicate(&self) -> Self {
        Self {
            name: format!("{}#2", self.name),
            replicate_of: Some(self.name.clone()),
            ..self.clone()
        }
    }

    /// Whether it is measured at `cell`.
    fn meets(&self, cell: &Cell) -> bool {
        if cell.workload.redirection_only() && !self.redirects_alone() {
            return false;
        }
        (self.replicate_of.is_none() || cell.repeated())
            && !(self.cross_node_only && cell.scope == Scope::SameNode)
    }

    /// Whether it can be measured without a ztunnel: each way of redirection once, and plain
    /// forwarding to hold it against.
    fn redirects_alone(&self) -> bool {
        self.competitor.is_none() && self.replicate_of.is_none() && !self.sockmap
    }

    /// Whether it needs, at `cell`, a lab with listeners in the place of ztunnels.
    pub(super) fn needs_listener(&self, cell: &Cell) -> bool {
        self.redirect != Redirect::None && cell.workload.redirection_only() && self.meets(cell)
    }

    /// Its part of its lab's name.
    pub(super) fn slug(&self) -> String {
        self.name.replace(['#', '+'], "-")
    }
}

/// Whether `name` can stand for a peer in reports and lab names.
pub(super) fn check_peer_name(name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(allowed) {
        bail!("--peer `{name}`: a name has 1 to {NAME_MAX} of a-z, 0-9 and `-`");
    }
    if OWN.iter().any(|redirect| redirect.name() == name) {
        bail!("--peer `{name}`: this is a path's own name; choose another");
    }
    Ok(())
}

/// Shares of the highest closed-loop rate that an open loop is measured at, in percent.
fn open_loads(quick: bool) -> &'static [u32] {
    if quick { &[40, 80] } else { &[30, 60, 80, 95] }
}

/// An open loop's load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Load {
    /// Percent of the highest closed-loop rate of the session.
    pub(super) percent: u32,
    /// Requests per second; known once that rate is.
    pub(super) per_s: f64,
}

/// A workload between two places: what every arm is measured at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cell {
    pub(super) scope: Scope,
    pub(super) workload: Workload,
    pub(super) connections: u32,
    /// Bytes per request and response.
    pub(super) size_bytes: u32,
    /// Where it runs; `Free` stands for what the whole comparison is set to.
    pub(super) placement: Placement,
    /// Of an open loop.
    pub(super) load: Option<Load>,
}

impl Cell {
    /// A request and response cell, closed loop, placed freely.
    pub(super) fn closed_rr(connections: u32) -> Self {
        Self {
            scope: Scope::CrossNode,
            workload: Workload::Rr,
            connections,
            size_bytes: Workload::Rr.size_bytes(),
            placement: Placement::Free,
            load: None,
        }
    }

    /// Whether a path measured twice is measured a second time here: cells of every kind, but
    /// not all of them, for the sake of time.
    fn repeated(&self) -> bool {
        match self.workload {
            Workload::Rr => self.connections == 32 || self.placement == Placement::OneCpu,
            Workload::Stream => self.connections > 1,
            Workload::Connect => true,
            Workload::RrOpen => self.load.is_some_and(|load| load.percent == 80),
            Workload::RedirectRr | Workload::RedirectConnect => false,
        }
    }

    /// For people: `cross-node rr x32`.
    pub(super) fn label(&self) -> String {
        let mut label = format!(
            "{} {} x{}",
            self.scope.name(),
            self.workload.name(),
            self.connections
        );
        if self.placement != Placement::Free {
            label = format!("{label} {}", self.placement.name());
        }
        match self.load {
            Some(load) => format!("{label} {}%", load.percent),
            None => label,
        }
    }
}

/// The whole of it.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) arms: Vec<Arm>,
    pub(super) cells: Vec<Cell>,
}

impl Plan {
    /// Empty lists stand for the defaults. A path named twice is measured against itself.
    pub(super) fn new(paths: &[String], workloads: &[String], quick: bool) -> Result<Self> {
        let mut chosen_arms: Vec<Arm> = Vec::new();
        for name in paths {
            let arm = Arm::parse(name)?;
            match chosen_arms
                .iter()
                .filter(|other| (other.redirect, other.sockmap) == (arm.redirect, arm.sockmap))
                .count()
            {
                0 => chosen_arms.push(arm),
                1 => chosen_arms.push(arm.replicate()),
                _ => bail!("--paths names {name} more than twice"),
            }
        }
        if chosen_arms.is_empty() {
            chosen_arms = OWN.map(Arm::own).to_vec();
        }
        let mut chosen = Vec::new();
        for name in workloads {
            let found = Workload::ALL
                .into_iter()
                .find(|workload| workload.name() == name);
            let Some(workload) = found else {
                let all = Workload::ALL.map(Workload::name).join(", ");
                bail!("--workloads: `{name}` is none of {all}");
            };
            chosen.push(workload);
        }
        if chosen.is_empty() {
            chosen = Workload::ALL.to_vec();
            // Three minutes are not enough for all of it.
            chosen.retain(|workload| !quick || !workload.redirection_only());
        }
        let mut cells = Vec::new();
        for scope in [Scope::CrossNode, Scope::SameNode] {
            for workload in &chosen {
                add_cells(&mut cells, scope, *workload, quick);
            }
        }
        let mut plan = Self {
            arms: chosen_arms,
            cells,
        };
        plan.order_arms();
        Ok(plan)
    }

    /// Measures the path `name` a second time, unless it is already.
    pub(super) fn repeat(&mut self, name: &str) -> Result<()> {
        if self
            .arms
            .iter()
            .any(|arm| arm.replicate_of.as_deref() == Some(name))
        {
            return Ok(());
        }
        let Some(arm) = self.arms.iter().find(|arm| arm.name == name) else {
            bail!("--aa {name}: no such path is measured");
        };
        self.arms.push(arm.replicate());
        Ok(())
    }

    /// Adds a peer.
    pub(super) fn add_competitor(&mut self, arm: Arm) {
        self.arms.push(arm);
        self.order_arms();
    }

    /// `none` first, then peers, then our own: ratios are of later paths to earlier ones.
    fn order_arms(&mut self) {
        self.arms.sort_by_key(|arm| match arm {
            Arm {
                replicate_of: Some(_),
                ..
            } => 3,
            Arm {
                competitor: Some(_),
                ..
            } => 1,
            Arm {
                redirect: Redirect::None,
                ..
            } => 0,
            _ => 2,
        });
    }

    /// Sets the open loops' rates from the highest closed-loop rate.
    pub(super) fn set_rates(&mut self, highest_per_s: f64) {
        for load in self.cells.iter_mut().filter_map(|cell| cell.load.as_mut()) {
            let rate = highest_per_s * f64::from(load.percent) / 100.0;
            // Two digits are enough and read better.
            let step = 10f64.powf(rate.max(1.0).log10().floor() - 1.0);
            load.per_s = ((rate / step).round() * step).max(1.0);
        }
    }

    /// The trials of one round as indices of cell and arm: a cell's arms one right after the
    /// other, so that they meet the same state of the machine. Every odd round runs the order of
    /// the round before it backwards, and every pair of rounds begins with another arm: over
    /// the rounds no arm has a place in the order of its own.
    pub(super) fn round(&self, round: u32) -> Vec<(usize, usize)> {
        let mut order = Vec::with_capacity(self.trials_per_round());
        for (index, cell) in self.cells.iter().enumerate() {
            let mut arms: Vec<usize> = (0..self.arms.len())
                .filter(|&arm| self.arms[arm].meets(cell))
                .collect();
            let count = arms.len();
            arms.rotate_left((round / 2) as usize % count.max(1));
            if !round.is_multiple_of(2) {
                arms.reverse();
            }
            order.extend(arms.into_iter().map(|arm| (index, arm)));
        }
        order
    }

    /// Whether the usual lab of a path is used at all.
    pub(super) fn needs_ztunnels(&self, arm: &Arm) -> bool {
        let mut cells = self.cells.iter();
        cells.any(|cell| arm.meets(cell) && !arm.needs_listener(cell))
    }

    pub(super) fn trials_per_round(&self) -> usize {
        let met = |cell| self.arms.iter().filter(|arm| arm.meets(cell)).count();
        self.cells.iter().map(met).sum()
    }
}

fn add_cells(cells: &mut Vec<Cell>, scope: Scope, workload: Workload, quick: bool) {
    for &connections in workload.connections(scope, quick) {
        let cell = Cell {
            scope,
            workload,
            connections,
            size_bytes: workload.size_bytes(),
            placement: Placement::Free,
            load: None,
        };
        if workload == Workload::RrOpen {
            // The knee is looked for once: between nodes, where both ztunnels work.
            if scope == Scope::CrossNode {
                cells.extend(open_loads(quick).iter().map(|&percent| Cell {
                    load: Some(Load {
                        percent,
                        per_s: 0.0,
                    }),
                    ..cell
                }));
            }
            continue;
        }
        if workload.redirection_only() && connections == 1 {
            // On one CPU nothing but the price is left of a lone connection's latency.
            let placement = Placement::OneCpu;
            cells.push(Cell { placement, ..cell });
            continue;
        }
        cells.push(cell);
        // Where a lone connection's few threads happen to run decides its latency.
        if workload == Workload::Rr && connections == 1 && scope == Scope::CrossNode {
            let pinned: &[Placement] = if quick {
                &[Placement::OneCpu]
            } else {
                &[Placement::OneCpu, Placement::CpuPerNode]
            };
            cells.extend(pinned.iter().map(|&placement| Cell { placement, ..cell }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn every_path_meets_every_cell_once_a_round_in_flipping_and_rotating_order() {
        let plan = Plan::new(&[], &[], true).unwrap();
        let count = plan.trials_per_round();
        assert_eq!(count, plan.cells.len() * 3);
        let (even, odd) = (plan.round(0), plan.round(1));
        assert_eq!(even[..3], [(0, 0), (0, 1), (0, 2)]);
        assert_eq!(odd[..3], [(0, 2), (0, 1), (0, 0)]);
        assert_eq!(plan.round(2)[..3], [(0, 1), (0, 2), (0, 0)]);
        for round in 0..6 {
            let mut order = plan.round(round);
            order.sort_unstable();
            order.dedup();
            assert_eq!(order.len(), count);
        }
        // Over six rounds every path has been first, second and last equally often.
        for place in 0..3 {
            for arm in 0..3 {
                let times = (0..6).filter(|&r| plan.round(r)[place].1 == arm).count();
                assert_eq!(times, 2);
            }
        }
    }

    #[test]
    fn a_path_named_twice_or_repeated_is_measured_twice_in_some_cells_of_every_kind() {
        let twice = Plan::new(&strings(&["ebpf", "ebpf"]), &[], false).unwrap();
        let mut repeated = Plan::new(&strings(&["ebpf"]), &[], false).unwrap();
        repeated.repeat("ebpf").unwrap();
        repeated.repeat("ebpf").unwrap();
        assert_eq!(twice.arms, repeated.arms);
        assert_eq!(twice.arms[1].name, "ebpf#2");
        assert_eq!(twice.arms[1].slug(), "ebpf-2");
        let round = twice.round(0);
        assert_eq!(round.len(), twice.trials_per_round());
        for workload in Workload::ALL.into_iter().filter(|w| !w.redirection_only()) {
            let again = round
                .iter()
                .any(|&(cell, arm)| arm == 1 && twice.cells[cell].workload == workload);
            assert!(again, "{workload:?}");
        }
        assert!(round.len() < twice.cells.len() * 2);
        assert!(repeated.repeat("tunnel").is_err());
    }

    #[test]
    fn peers_come_between_none_and_our_own() {
        let mut plan = Plan::new(&[], &[], false).unwrap();
        plan.repeat("ebpf").unwrap();
        plan.add_competitor(Arm::competitor("other", "/bin/true".into(), Redirect::Ebpf));
        let names: Vec<&str> = plan.arms.iter().map(|arm| arm.name.as_str()).collect();
        assert_eq!(names, ["none", "other", "tunnel", "ebpf", "ebpf#2"]);
        for wrong in ["", "ebpf", "Other", "a/b", "a-name-that-is-too-long"] {
            assert!(check_peer_name(wrong).is_err(), "{wrong}");
        }
        assert!(check_peer_name("other-1").is_ok());
    }

    #[test]
    fn a_peer_that_serves_one_pod_per_node_is_measured_between_nodes() {
        let mut plan = Plan::new(&[], &strings(&["connect"]), true).unwrap();
        let before = plan.trials_per_round();
        let mut arm = Arm::competitor("other", "/bin/true".into(), Redirect::Tunnel);
        arm.cross_node_only = true;
        plan.add_competitor(arm);
        assert_eq!(plan.cells.len(), 2);
        assert_eq!(plan.trials_per_round(), before + 1);
        assert_eq!(plan.round(1).len(), plan.trials_per_round());
    }

    #[test]
    fn redirection_alone_is_measured_once_a_way_between_pods_of_one_node() {
        let paths = strings(&["none", "tunnel", "ebpf", "ebpf", "ebpf+sockmap"]);
        let mut plan = Plan::new(&paths, &strings(&["redirect-rr"]), false).unwrap();
        plan.add_competitor(Arm::competitor("other", "/bin/true".into(), Redirect::Ebpf));
        let labels: Vec<String> = plan.cells.iter().map(Cell::label).collect();
        let expected = [
            "same-node redirect-rr x1 one-cpu",
            "same-node redirect-rr x32",
        ];
        assert_eq!(labels, expected);
        let order = plan.round(0);
        let at = |wanted| order.iter().filter(move |&&(cell, _)| cell == wanted);
        let names: Vec<&str> = at(1)
            .map(|&(_, arm)| plan.arms[arm].name.as_str())
            .collect();
        assert_eq!(names, ["none", "tunnel", "ebpf"]);
        let listeners = |arm: &&Arm| arm.needs_listener(&plan.cells[0]);
        let names: Vec<&str> = plan
            .arms
            .iter()
            .filter(listeners)
            .map(|p| &*p.name)
            .collect();
        assert_eq!(names, ["tunnel", "ebpf"]);
    }

    #[test]
    fn the_short_cut_is_a_path_of_its_own() {
        let plan = Plan::new(&strings(&["ebpf", "ebpf+sockmap"]), &[], false).unwrap();
        let sockmap: Vec<bool> = plan.arms.iter().map(|arm| arm.sockmap).collect();
        assert_eq!(sockmap, [false, true]);
        assert_eq!(plan.arms[1].slug(), "ebpf-sockmap");
    }

    #[test]
    fn names_that_cannot_be_measured_are_refused_with_the_reason() {
        let refused = |paths: &[&str], workloads: &[&str]| {
            Plan::new(&strings(paths), &strings(workloads), false)
                .unwrap_err()
                .to_string()
        };
        assert!(refused(&["magic"], &[]).contains("none of none, tunnel, ebpf"));
        assert!(refused(&["none", "none", "none"], &[]).contains("more than twice"));
        assert!(refused(&[], &["udp"]).contains("none of rr, stream, connect, rr-open"));
    }

    #[test]
    fn chosen_workloads_are_measured_in_both_scopes_and_lone_connections_pinned_as_well() {
        let plan = Plan::new(&strings(&["ebpf"]), &strings(&["connect"]), false).unwrap();
        let scopes: Vec<&str> = plan.cells.iter().map(|cell| cell.scope.name()).collect();
        assert_eq!(scopes, ["cross-node", "same-node"]);
        let plan = Plan::new(&[], &strings(&["rr"]), false).unwrap();
        let labels: Vec<String> = plan.cells.iter().map(Cell::label).collect();
        assert_eq!(labels[0], "cross-node rr x1");
        assert_eq!(labels[1], "cross-node rr x1 one-cpu");
        assert_eq!(labels[2], "cross-node rr x1 cpu-per-node");
    }

    #[test]
    fn open_loops_rates_are_shares_of_the_highest_closed_rate() {
        let mut plan = Plan::new(&[], &strings(&["rr-open"]), false).unwrap();
        plan.set_rates(20_000.0);
        let rates: Vec<f64> = plan
            .cells
            .iter()
            .filter_map(|c| c.load)
            .map(|l| l.per_s)
            .collect();
        assert_eq!(rates, [6000.0, 12_000.0, 16_000.0, 19_000.0]);
    }

    #[test]
    fn a_default_comparison_takes_about_fifteen_minutes() {
        let mut plan = Plan::new(&[], &[], false).unwrap();
        plan.repeat("ebpf").unwrap();
        // 1.1 s of load and some 0.15 s around it, ten rounds.
        let minutes = plan.trials_per_round() as f64 * 10.0 * 1.25 / 60.0;
        assert!((13.5..15.0).contains(&minutes), "{minutes}");
        let mut plan = Plan::new(&[], &[], true).unwrap();
        plan.repeat("ebpf").unwrap();
        let seconds = plan.trials_per_round() as f64 * 5.0 * 0.7;
        assert!(seconds < 145.0, "{seconds}");
    }
}
