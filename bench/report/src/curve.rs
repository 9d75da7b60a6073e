//! Latency against offered load, as SVG text.

use anyhow::Result;
use plotters::prelude::*;

use super::metric::Metric;
use super::plot::{AXIS, FONT, Failed, GRID, Root, colour, svg};
use super::schema::{Document, Estimate, Row};
use super::units;

const WIDTH: u32 = 560;
const HEIGHT: u32 = 320;

/// A metric of the open loops against their rates: a line per path through the medians, a dot per
/// trial. `None` if there are no two rates.
pub(super) fn against_load(
    document: &Document,
    metric: Metric,
    name: &str,
) -> Result<Option<String>> {
    let curves: Vec<(&str, Vec<(f64, &Estimate)>)> = document
        .paths
        .iter()
        .map(|path| (path.as_str(), points(document, path, metric)))
        .filter(|(_, points)| points.len() >= 2)
        .collect();
    let values = || {
        let points = curves.iter().flat_map(|(_, points)| points);
        points.flat_map(|(_, estimate)| estimate.values.iter().copied())
    };
    let lowest = values().fold(f64::INFINITY, f64::min);
    let highest = values().fold(0.0, f64::max);
    let rates = curves.iter().flat_map(|(_, points)| points);
    let fastest = rates.map(|(rate, _)| *rate).fold(0.0, f64::max);
    if curves.is_empty() || lowest <= 0.0 || highest <= lowest {
        return Ok(None);
    }
    let draw = |root: &Root<'_>| -> Result<(), Failed> {
        let mut chart = ChartBuilder::on(root)
            .margin(8)
            .margin_right(26)
            .caption(name, (FONT, 14).into_font().color(&BLACK))
            .x_label_area_size(42)
            .y_label_area_size(62)
            .build_cartesian_2d(
                0.0..fastest * 1.06,
                (lowest * 0.8..highest * 1.25).log_scale(),
            )?;
        chart
            .configure_mesh()
            .bold_line_style(GRID)
            .light_line_style(GRID.mix(0.5))
            .axis_style(AXIS)
            .label_style((FONT, 12).into_font().color(&AXIS))
            .x_labels(6)
            .x_desc("requests due per second")
            .x_label_formatter(&|rate| units::scaled(*rate))
            .y_label_formatter(&|us| units::Unit::Latency.show(*us))
            .y_labels(6)
            .draw()?;
        for (path, points) in &curves {
            let colour = colour(document, path);
            let line = points.iter().map(|(rate, e)| (*rate, e.median));
            chart.draw_series(LineSeries::new(line, colour.stroke_width(2)))?;
            for (rate, estimate) in points {
                let dot = |us: &f64| Circle::new((*rate, *us), 2, colour.mix(0.6).filled());
                chart.draw_series(estimate.values.iter().map(dot))?;
            }
        }
        Ok(())
    };
    svg(WIDTH, HEIGHT, draw).map(Some)
}

/// Rates and figures of a path's open loops, slowest first.
fn points<'d>(document: &'d Document, path: &str, metric: Metric) -> Vec<(f64, &'d Estimate)> {
    let of_path = |row: &&Row| row.path == path;
    let mut points: Vec<(f64, &Estimate)> = document
        .rows
        .iter()
        .filter(of_path)
        .filter_map(|row| Some((row.offered_per_s?, row.metrics.get(&metric)?)))
        .collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::example;

    #[test]
    fn there_is_a_dot_per_trial_and_no_plot_without_rates() {
        let document = example();
        let svg = against_load(&document, Metric::P99, "p99")
            .unwrap()
            .unwrap();
        let open = document
            .rows
            .iter()
            .filter(|row| row.offered_per_s.is_some());
        assert_eq!(
            svg.matches("<circle").count(),
            open.map(|row| row.trials).sum::<usize>()
        );
        assert!(svg.contains("requests due per second"), "{svg}");
        assert!(
            against_load(&document, Metric::Errors, "")
                .unwrap()
                .is_none()
        );
    }
}
