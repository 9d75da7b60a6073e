//! Runs the matrix on the labs and compares.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{self, Write as _};
use std::slice;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use lab::{LabOptions, Redirect, Services, network::namespace};

use crate::alike;
use crate::cells::{self, Cell, Expected, MESH_POLICY};
use crate::probe::{self, NO_ANSWER};
use crate::servers::Servers;
use crate::support::{TestLab, turn, unique};

/// How long an answer may take at first; a cell that differs is asked again, alone and longer.
const LIMIT: Duration = Duration::from_millis(2_500);
const PATIENT_LIMIT: Duration = Duration::from_secs(8);
/// How many are asked at once.
const AT_ONCE: usize = 128;
/// More than these that differ are no accident of load: they are not asked again.
const RETRIED: usize = 60;
/// Of the links between nodes and to the outside, bytes.
const UNDERLAY_MTU: u32 = 1_400;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Path {
    pub(crate) name: &'static str,
    pub(crate) redirect: Redirect,
    pub(crate) sockmap: bool,
}

/// Outcomes by cell.
type Outcomes = BTreeMap<String, String>;

/// Compares all `paths` with `twin`.
pub(crate) fn compare(services: Services, twin: Path, paths: &[Path]) {
    let _turn = turn();
    let cells = cells::all();
    let wanted = std::env::var("LAB_PATHS").ok();
    let wanted = |path: &&Path| {
        let listed = wanted.as_ref();
        listed.is_none_or(|listed| listed.split(',').any(|name| name == path.name))
    };
    let expected = {
        let up = Up::new(twin, services);
        let mut outcomes = up.ask_all(&cells, LIMIT);
        // Silence here would be what silence is compared with: it must not be an accident.
        let silent: Vec<Cell> = cells
            .iter()
            .filter(|cell| outcomes[&cell.to_string()] == NO_ANSWER)
            .cloned()
            .collect();
        outcomes.extend(up.ask_all(&silent, LIMIT));
        outcomes
    };
    let answered = expected
        .values()
        .filter(|outcome| outcome.contains(" sees "))
        .count();
    assert!(
        answered * 2 > cells.len(),
        "the twin answers {answered} only"
    );
    let mut differing = Vec::new();
    for path in paths.iter().filter(wanted) {
        differing.extend(differences(*path, services, &cells, &expected));
    }
    for line in &differing {
        let _ = writeln!(io::stderr(), "{line}");
    }
    assert!(
        differing.is_empty(),
        "{} cells are not as without a mesh",
        differing.len()
    );
}

/// Cells of `path` that are not as they should be.
fn differences(path: Path, services: Services, cells: &[Cell], expected: &Outcomes) -> Vec<String> {
    let start = Instant::now();
    let up = Up::new(path, services);
    let mut outcomes = up.ask_all(cells, LIMIT);
    let is_right = |cell: &Cell, outcomes: &Outcomes| {
        let key = cell.to_string();
        agrees(cell, path.redirect, &outcomes[&key], &expected[&key])
    };
    let wrong = |outcomes: &Outcomes| -> Vec<Cell> {
        let wrong = cells.iter().filter(|cell| !is_right(cell, outcomes));
        wrong.cloned().collect()
    };
    let again = wrong(&outcomes);
    if again.len() <= RETRIED {
        for cell in &again {
            outcomes.extend(up.ask_all(slice::from_ref(cell), PATIENT_LIMIT));
        }
    }
    let wrong = wrong(&outcomes);
    let _ = writeln!(
        io::stderr(),
        "services {services}, path {}: {} cells, {} asked twice, {} differ ({:.1?})",
        path.name,
        cells.len(),
        again.len(),
        wrong.len(),
        start.elapsed()
    );
    let line = |cell: &Cell| {
        let key = cell.to_string();
        let (got, without) = (&outcomes[&key], &expected[&key]);
        let right = match cell.by_design(path.redirect) {
            Some(right) => format!("should be {right:?}"),
            None => format!("without a mesh: {without}"),
        };
        format!("{} {services} {key}: {got}; {right}", path.name)
    };
    wrong.iter().map(line).collect()
}

fn agrees(cell: &Cell, redirect: Redirect, got: &str, without: &str) -> bool {
    match cell.by_design(redirect) {
        Some(Expected::NoAnswer) => got == NO_ANSWER || got == without && !without.contains("sees"),
        Some(Expected::Refused) => !got.contains(" sees "),
        None => {
            got == without
                || alike::refused_later(cell, got, without)
                || alike::seen_otherwise(redirect, cell, got, without)
        }
    }
}

/// A lab with its servers.
struct Up {
    lab: TestLab,
    _servers: Servers,
    _mesh: tempfile::TempDir,
}

impl Up {
    fn new(path: Path, services: Services) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mesh = directory.path().join("mesh.yaml");
        let text = lab::default_mesh().replace("policies: []\n", MESH_POLICY);
        assert!(text.contains("strict-9000"));
        fs::write(&mesh, text).unwrap();
        let lab = TestLab::with(&LabOptions {
            name: unique(&format!("svc-{}", path.name.replace('+', "-"))),
            redirect: path.redirect,
            sockmap: path.sockmap,
            services,
            mesh: (path.redirect != Redirect::None).then_some(mesh),
            ..LabOptions::default()
        });
        narrow_the_underlay(&lab);
        reject_on_the_nodes(&lab);
        // For sockets that send ICMP echo.
        for host in cells::SOURCES.iter().filter(|host| **host != "hostnet-a") {
            let range = "/proc/sys/net/ipv4/ping_group_range";
            let write = || fs::write(range, "0 2147483647");
            lab.lab.on(host, write).unwrap().unwrap();
        }
        Self {
            _servers: Servers::start(&lab),
            lab,
            _mesh: directory,
        }
    }

    /// Asks all of `cells`, many at a time.
    fn ask_all(&self, cells: &[Cell], limit: Duration) -> Outcomes {
        let queue: Mutex<VecDeque<&Cell>> = Mutex::new(cells.iter().collect());
        let outcomes = Mutex::new(Outcomes::new());
        thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(cells.len()) {
                scope.spawn(|| {
                    loop {
                        let Some(cell) = queue.lock().unwrap().pop_front() else {
                            return;
                        };
                        namespace::enter(&self.lab.lab.netns(cell.host()).unwrap()).unwrap();
                        let outcome = probe::ask(cell, limit);
                        outcomes.lock().unwrap().insert(cell.to_string(), outcome);
                    }
                });
            }
        });
        outcomes.into_inner().unwrap()
    }
}

/// Smaller packets between nodes, and to the outside, than the pods' links take.
fn narrow_the_underlay(lab: &TestLab) {
    let links = [
        ("node-a", "und"),
        ("node-b", "und"),
        ("node-a", "ext"),
        ("node-b", "ext"),
        ("outside", "eth0"),
        ("outside", "eth1"),
    ];
    for (host, link) in links {
        let mtu = UNDERLAY_MTU.to_string();
        let output = lab.run(host, "ip", &["link", "set", link, "mtu", &mtu]);
        assert!(output.status.success(), "{host}: {output:?}");
    }
}

/// Rules of somebody else's on the nodes that refuse, in one way or another.
fn reject_on_the_nodes(lab: &TestLab) {
    for (node, host, port, v4, v6) in cells::REJECTS {
        let host: lab::Host = host.parse().unwrap();
        let families = [
            ("iptables", host.address().to_string(), v4),
            ("ip6tables", host.address_v6().to_string(), v6),
        ];
        for (tool, address, with) in families {
            if tool == "ip6tables" && !lab::network::has_ipv6() {
                continue;
            }
            let rule = format!(
                "-w -A FORWARD -d {address} -p tcp --dport {port} -j REJECT --reject-with {with}"
            );
            let words: Vec<&str> = rule.split(' ').collect();
            let output = lab.run(node, tool, &words);
            assert!(
                output.status.success(),
                "{tool} {rule} on {node}: {output:?}"
            );
        }
    }
}
