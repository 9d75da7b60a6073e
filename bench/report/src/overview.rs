//! The README's picture: what each path and proxy costs in one common case, as SVG.

use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::metric::{Metric, Spender, Work};
use super::plot::{AXIS, FONT, Failed, GRID, Root, colour, svg};
use super::schema::{Cell, Document};

/// What the picture is of: `none` has no metric of a ztunnel and is in the first panel only.
const SCOPE: &str = "cross-node";
const WORKLOAD: &str = "rr";
const CONNECTIONS: u32 = 32;
const PANELS: [(Metric, &str); 2] = [
    (
        Metric::Throughput(Work::Request),
        "requests/s: more is better",
    ),
    (
        Metric::Cpu(Spender::Ztunnels, Work::Request),
        "CPU of both proxies per request: less is better",
    ),
];

const WIDTH: u32 = 880;
const NAMES: i32 = 120;
const PANEL: i32 = 380;
/// Length of the longest bar; its figure follows it.
const LONGEST: f64 = 285.0;
const TOP: i32 = 62;
const BAR: i32 = 26;

/// The picture; `None` if the case was not measured.
pub(super) fn picture(document: &Document) -> Result<Option<String>> {
    let cells = document.cells();
    let Some(cell) = cells.iter().find(|cell| {
        let closed = cell.offered_per_s.is_none() && cell.placement.is_none();
        closed && (cell.scope, cell.workload, cell.connections) == (SCOPE, WORKLOAD, CONNECTIONS)
    }) else {
        return Ok(None);
    };
    let height = TOP + BAR * i32::try_from(document.paths.len())? + 8;
    let draw = |root: &Root<'_>| -> Result<(), Failed> {
        root.fill(&WHITE)?;
        let title =
            format!("Between nodes, {CONNECTIONS} connections, 64-byte requests and answers");
        root.draw(&Text::new(title, (8, 8), style(15, HPos::Left, VPos::Top)))?;
        for (i, path) in document.paths.iter().enumerate() {
            let at = (NAMES - 10, middle(i));
            let style = style(13, HPos::Right, VPos::Center);
            root.draw(&Text::new(path.clone(), at, style))?;
        }
        for (i, (metric, name)) in PANELS.into_iter().enumerate() {
            let left = NAMES + PANEL * i32::try_from(i).unwrap_or(0);
            panel(root, document, cell, (left, metric, name))?;
        }
        Ok(())
    };
    svg(WIDTH, u32::try_from(height)?, draw).map(Some)
}

fn panel(
    root: &Root<'_>,
    document: &Document,
    cell: &Cell<'_>,
    (left, metric, name): (i32, Metric, &str),
) -> Result<(), Failed> {
    let median = |path: &String| {
        let estimate = document.row(path, cell)?.metrics.get(&metric)?;
        Some(estimate.median)
    };
    let longest = document.paths.iter().filter_map(median).fold(0.0, f64::max);
    let heading = style(13, HPos::Left, VPos::Top);
    root.draw(&Text::new(name.to_owned(), (left, 36), heading))?;
    let bottom = middle(document.paths.len()) - BAR / 2;
    let axis = vec![(left, TOP - 4), (left, bottom)];
    root.draw(&PathElement::new(axis, GRID.stroke_width(2)))?;
    for (i, path) in document.paths.iter().enumerate() {
        let Some(value) = median(path).filter(|_| longest > 0.0) else {
            continue;
        };
        let right = left + (value / longest * LONGEST).round() as i32;
        let corners = [
            (left, middle(i) - BAR / 2 + 3),
            (right, middle(i) + BAR / 2 - 3),
        ];
        let colour = colour(document, path);
        root.draw(&Rectangle::new(corners, colour.mix(0.75).filled()))?;
        let style = style(12, HPos::Left, VPos::Center);
        let text = metric.show(Some(value));
        root.draw(&Text::new(text, (right + 6, middle(i)), style))?;
    }
    Ok(())
}

/// Height of the middle of the `i`th bar.
fn middle(i: usize) -> i32 {
    TOP + BAR / 2 + BAR * i32::try_from(i).unwrap_or(0)
}

fn style(size: i32, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    let font = (FONT, size).into_font();
    font.color(&AXIS).pos(Pos::new(horizontal, vertical))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::example;

    #[test]
    fn every_path_has_its_name_and_its_figures() {
        let document = example();
        let picture = picture(&document).unwrap().unwrap();
        for path in &document.paths {
            assert!(
                picture.contains(&format!("\n{path}\n")),
                "{path}: {picture}"
            );
        }
        let bars = picture.matches("<rect").count() - 1; // the background is one
        let (paths, with_ztunnel) = (document.paths.len(), document.paths.len() - 1);
        assert_eq!(bars, paths + with_ztunnel);
    }

    #[test]
    fn a_case_that_was_not_measured_has_no_picture() {
        let mut document = example();
        document.rows.retain(|row| row.connections != CONNECTIONS);
        assert!(picture(&document).unwrap().is_none());
    }
}
