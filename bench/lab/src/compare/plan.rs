//! What is measured and in which order. Pure data.

use anyhow::{Result, bail};

use crate::state::Redirect;

/// Paths that are measured unless others are asked for.
const DEFAULT_PATHS: [Path; 3] = [
    Path(Redirect::None),
    Path(Redirect::Tunnel),
    Path(Redirect::Ebpf),
];

/// A way traffic takes between the pods.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Path(pub(super) Redirect);

impl Path {
    /// As in reports.
    pub(super) fn name(self) -> &'static str {
        self.0.name()
    }

    fn parse(name: &str) -> Result<Self> {
        if name == "ebpf+sockmap" {
            bail!("path ebpf+sockmap: the sockmap short-cut does not exist yet; leave it out");
        }
        DEFAULT_PATHS
            .into_iter()
            .find(|path| path.name() == name)
            .map_or_else(|| bail!("path `{name}` is none of none, tunnel, ebpf"), Ok)
    }
}

/// Where the server is, seen from the client on node A.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Scope {
    CrossNode,
    SameNode,
}

impl Scope {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::CrossNode => "cross-node",
            Self::SameNode => "same-node",
        }
    }

    /// The host the server runs on.
    pub(super) fn server(self) -> &'static str {
        match self {
            Self::CrossNode => "server-b",
            Self::SameNode => "server-a",
        }
    }
}

/// What the load generator does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Workload {
    Rr,
    Stream,
    Connect,
}

impl Workload {
    const ALL: [Self; 3] = [Self::Rr, Self::Stream, Self::Connect];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Rr => "rr",
            Self::Stream => "stream",
            Self::Connect => "connect",
        }
    }

    /// The server's mode.
    pub(super) fn server_mode(self) -> &'static str {
        match self {
            Self::Rr | Self::Connect => "echo",
            Self::Stream => "sink",
        }
    }

    fn connections(self, quick: bool) -> &'static [u32] {
        match self {
            Self::Rr => &[1, 32, 256],
            Self::Stream if quick => &[8],
            Self::Stream => &[1, 8],
            Self::Connect => &[16],
        }
    }

    fn size_bytes(self) -> u32 {
        match self {
            Self::Rr | Self::Connect => 64,
            Self::Stream => 0,
        }
    }
}

/// A workload between two places: what every path is measured at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Cell {
    pub(super) scope: Scope,
    pub(super) workload: Workload,
    pub(super) connections: u32,
    /// Bytes per request and response.
    pub(super) size_bytes: u32,
}

/// The whole of it.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) paths: Vec<Path>,
    pub(super) cells: Vec<Cell>,
}

impl Plan {
    /// Empty lists stand for the defaults.
    pub(super) fn new(paths: &[String], workloads: &[String], quick: bool) -> Result<Self> {
        let paths = match paths {
            [] => DEFAULT_PATHS.to_vec(),
            given => given
                .iter()
                .map(|name| Path::parse(name))
                .collect::<Result<_>>()?,
        };
        if let Some(i) = (1..paths.len()).find(|&i| paths[..i].contains(&paths[i])) {
            bail!("--paths names {} twice", paths[i].name());
        }
        let mut chosen = Vec::new();
        for name in workloads {
            let found = Workload::ALL
                .into_iter()
                .find(|workload| workload.name() == name);
            let Some(workload) = found else {
                bail!("--workloads: `{name}` is none of rr, stream, connect");
            };
            chosen.push(workload);
        }
        if chosen.is_empty() {
            chosen = Workload::ALL.to_vec();
        }
        let mut cells = Vec::new();
        for scope in [Scope::CrossNode, Scope::SameNode] {
            for workload in &chosen {
                cells.extend(workload.connections(quick).iter().map(|&connections| Cell {
                    scope,
                    workload: *workload,
                    connections,
                    size_bytes: workload.size_bytes(),
                }));
            }
        }
        Ok(Self { paths, cells })
    }

    /// The trials of one round as indices of cell and path: a cell's paths one right after the
    /// other, so that they meet the same state of the machine; their order flips every round.
    pub(super) fn round(&self, round: u32) -> Vec<(usize, usize)> {
        let mut order = Vec::with_capacity(self.trials_per_round());
        for cell in 0..self.cells.len() {
            let paths = 0..self.paths.len();
            if round.is_multiple_of(2) {
                order.extend(paths.map(|path| (cell, path)));
            } else {
                order.extend(paths.rev().map(|path| (cell, path)));
            }
        }
        order
    }

    pub(super) fn trials_per_round(&self) -> usize {
        self.cells.len() * self.paths.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn every_path_meets_every_cell_once_a_round_in_flipping_order() {
        let plan = Plan::new(&[], &[], true).unwrap();
        assert_eq!(plan.trials_per_round(), 30);
        let (even, odd) = (plan.round(0), plan.round(1));
        assert_eq!(even[..3], [(0, 0), (0, 1), (0, 2)]);
        assert_eq!(odd[..3], [(0, 2), (0, 1), (0, 0)]);
        let sorted = |mut round: Vec<(usize, usize)>| {
            round.sort_unstable();
            round.dedup();
            round
        };
        assert_eq!(sorted(even).len(), 30);
        assert_eq!(sorted(odd).len(), 30);
    }

    #[test]
    fn names_that_cannot_be_measured_are_refused_with_the_reason() {
        let refused = |paths: &[&str], workloads: &[&str]| {
            Plan::new(&strings(paths), &strings(workloads), false)
                .unwrap_err()
                .to_string()
        };
        assert!(refused(&["ebpf+sockmap"], &[]).contains("does not exist yet"));
        assert!(refused(&["magic"], &[]).contains("none of none, tunnel, ebpf"));
        assert!(refused(&["none", "none"], &[]).contains("twice"));
        assert!(refused(&[], &["udp"]).contains("none of rr, stream, connect"));
    }

    #[test]
    fn chosen_workloads_are_measured_in_both_scopes() {
        let plan = Plan::new(&strings(&["ebpf"]), &strings(&["connect"]), false).unwrap();
        let scopes: Vec<&str> = plan.cells.iter().map(|cell| cell.scope.name()).collect();
        assert_eq!(scopes, ["cross-node", "same-node"]);
    }
}
