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

/// What does not work yet on path `ebpf`, to be mended: this only ever shrinks.
const EBPF: &[Row] = &[];

/// What works at times, by which cell was asked first.
const EBPF_AT_TIMES: &[Row] = &[
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
