//! Cells that differ from those without a mesh: by design, and for now.

use lab::Redirect;

use crate::cells::Cell;
use crate::run::Path;

/// A pod that reaches itself through a service is seen by its own address where ztunnel made the
/// connection, and by its node's where kube-proxy did (hairpin).
pub(crate) fn sees_itself(cell: &Cell, got: &str, without: &str) -> bool {
    let (Some((who, _)), Some((same, _))) =
        (got.split_once(" sees "), without.split_once(" sees "))
    else {
        return false;
    };
    who == same && cell.from == who && cell.target.name.starts_with("vip ")
}

/// Who asks, whom, and how, by both IP versions.
type Row = (
    &'static [&'static str],
    &'static [&'static str],
    &'static [&'static str],
);

/// What does not work yet on path `ebpf`, to be mended: this only ever shrinks. A connection takes
/// the bypass in one direction and the stack, with its conntrack, in the other.
const EBPF: &[Row] = &[
    (
        &[
            "client-a",
            "hostnet-a",
            "node-a",
            "node-b",
            "outside",
            "plain-b",
            "server-a",
            "server-b",
        ],
        &["nodeport node-a server-b", "nodeport node-b server-a"],
        &["bulk", "tcp"],
    ),
    (
        &["client-a", "hostnet-a", "node-a", "server-a"],
        &["nodeport node-a local-b", "unknown unknown-b"],
        &["bulk", "tcp"],
    ),
    (
        &["client-a", "node-b", "server-b"],
        &["unknown unknown-a"],
        &["bulk", "tcp"],
    ),
    (
        &["client-a", "server-a"],
        &[
            "nodeport node-a local-a",
            "nodeport node-a server-a",
            "unknown unknown-plain",
        ],
        &["bulk", "tcp"],
    ),
    (
        &["hostnet-a", "node-a"],
        &["vip server-b"],
        &["bulk", "tcp"],
    ),
    (
        &["hostnet-a", "node-a", "outside"],
        &["pod server-b"],
        &["bulk", "tcp"],
    ),
    (&["node-b"], &["vip server-a"], &["bulk", "tcp"]),
    (&["node-b", "outside"], &["pod server-a"], &["bulk", "tcp"]),
    (
        &["node-b", "server-b"],
        &["nodeport node-b local-a"],
        &["bulk", "tcp"],
    ),
    (
        &["server-b"],
        &[
            "nodeport node-b local-b",
            "nodeport node-b server-b",
            "unknown unknown-node",
        ],
        &["bulk", "tcp"],
    ),
];

/// What works at times, by which cell was asked first.
const EBPF_AT_TIMES: &[Row] = &[
    (
        &["client-a", "server-a"],
        &["nodeport node-b server-b"],
        &["bulk"],
    ),
    (&["server-b"], &["nodeport node-a server-a"], &["bulk"]),
    // The error that answers the SYN is taken for an end, or not at all.
    (
        &["client-a", "server-a", "server-b"],
        &["unknown nobody"],
        &["tcp"],
    ),
];

fn holds(rows: &[Row], cell: &Cell) -> bool {
    rows.iter().any(|(sources, targets, ways)| {
        sources.contains(&cell.from)
            && targets.contains(&cell.target.name.as_str())
            && ways.contains(&cell.way.name())
    })
}

/// Whether the cell differs until it is mended.
pub(crate) fn differs(path: Path, cell: &Cell) -> bool {
    path.redirect == Redirect::Ebpf && holds(EBPF, cell)
}

/// Whether the cell may differ until it is mended, and may not.
pub(crate) fn differs_at_times(path: Path, cell: &Cell) -> bool {
    path.redirect == Redirect::Ebpf && holds(EBPF_AT_TIMES, cell)
}
