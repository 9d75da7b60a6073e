//! The report's plots as SVG text.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::metric::Metric;
use super::schema::{Cell, Document, Estimate, Row};

pub(super) const FONT: &str = "sans-serif";
pub(super) const AXIS: RGBColor = RGBColor(90, 96, 105);
pub(super) const GRID: RGBColor = RGBColor(228, 231, 236);
/// Colours of the paths in their order; the first is for `none`.
const COLOURS: [RGBColor; 10] = [
    RGBColor(140, 146, 156),
    RGBColor(217, 119, 6),
    RGBColor(37, 99, 235),
    RGBColor(5, 150, 105),
    RGBColor(190, 24, 93),
    RGBColor(109, 40, 217),
    RGBColor(8, 145, 178),
    RGBColor(101, 67, 33),
    RGBColor(101, 163, 13),
    RGBColor(15, 23, 42),
];
/// Width of a category's group of bars, the categories being 1 apart.
const GROUP: f64 = 0.78;

/// Colour of a path.
pub(super) fn colour(document: &Document, path: &str) -> RGBColor {
    if path == "none" {
        return COLOURS[0];
    }
    let others = document.paths.iter().filter(|p| *p != "none");
    let at = others.into_iter().position(|p| p == path).unwrap_or(0);
    COLOURS[1 + at % (COLOURS.len() - 1)]
}

/// The colour of a path as CSS.
#[must_use]
pub fn css_colour(document: &Document, path: &str) -> String {
    let RGBColor(r, g, b) = colour(document, path);
    format!("rgb({r},{g},{b})")
}

/// Bars of one metric for several cells, a bar per path, with a dot per trial and the interval of
/// the median. `None` if no row has the metric.
pub(super) fn bars(
    document: &Document,
    cells: &[Cell<'_>],
    metric: Metric,
    unit: (&str, f64),
) -> Result<Option<String>> {
    let estimate = |cell: &Cell<'_>, path: &str| -> Option<&Estimate> {
        document.row(path, cell)?.metrics.get(&metric)
    };
    let all = cells
        .iter()
        .flat_map(|cell| document.paths.iter().map(move |path| (cell, path)));
    let highest = all
        .filter_map(|(cell, path)| estimate(cell, path))
        .flat_map(|e| e.values.iter().copied())
        .fold(0.0, f64::max);
    if highest <= 0.0 {
        return Ok(None);
    }
    let (name, scale) = unit;
    let width = 170 + 130 * u32::try_from(cells.len()).unwrap_or(6);
    let draw = |root: &Root<'_>| -> Result<(), Failed> {
        let x = -0.5..cells.len() as f64 - 0.5;
        let mut chart = ChartBuilder::on(root)
            .margin(8)
            .x_label_area_size(40)
            .y_label_area_size(62)
            .build_cartesian_2d(x, 0.0..highest / scale * 1.06)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .axis_style(AXIS)
            .label_style((FONT, 12).into_font().color(&AXIS))
            .x_labels(0)
            .y_labels(6)
            .y_desc(name)
            .draw()?;
        for (i, cell) in cells.iter().enumerate() {
            let label = [cell.label(), cell.scope.to_owned()];
            for (line, text) in label.iter().enumerate() {
                let (px, py) = chart.backend_coord(&(i as f64, 0.0));
                let shift = 6 + 14 * i32::try_from(line).unwrap_or(0);
                root.draw(&Text::new(text.clone(), (px, py + shift), centred()))?;
            }
            for (j, path) in document.paths.iter().enumerate() {
                let Some(estimate) = estimate(cell, path) else {
                    continue;
                };
                let step = GROUP / document.paths.len() as f64;
                let left = i as f64 - GROUP / 2.0 + step * j as f64;
                let bar = Bar {
                    left,
                    width: step * 0.86,
                    scale,
                    colour: colour(document, path),
                };
                chart.draw_series(bar.body(estimate))?;
                chart.draw_series(bar.interval(estimate))?;
                chart.draw_series(bar.dots(estimate))?;
            }
        }
        Ok(())
    };
    svg(width, 300, draw).map(Some)
}

/// A bar's place and look.
struct Bar {
    left: f64,
    width: f64,
    scale: f64,
    colour: RGBColor,
}

impl Bar {
    fn body(&self, estimate: &Estimate) -> Option<Rectangle<(f64, f64)>> {
        let top = estimate.median / self.scale;
        let corners = [(self.left, 0.0), (self.left + self.width, top)];
        Some(Rectangle::new(corners, self.colour.mix(0.55).filled()))
    }

    fn interval(&self, estimate: &Estimate) -> Option<PathElement<(f64, f64)>> {
        let x = self.left + self.width / 2.0;
        let [low, high] = estimate.ci95;
        let points = vec![(x, low / self.scale), (x, high / self.scale)];
        Some(PathElement::new(points, self.colour.stroke_width(3)))
    }

    /// Trials side by side, in the order of the rounds, so that a drift shows.
    fn dots(&self, estimate: &Estimate) -> Vec<Circle<(f64, f64), i32>> {
        let count = estimate.values.len() as f64;
        let at = |i: usize| self.left + self.width * (i as f64 + 0.5) / count;
        let style = BLACK.mix(0.65).filled();
        let dot = |(i, value): (usize, &f64)| Circle::new((at(i), value / self.scale), 2, style);
        estimate.values.iter().enumerate().map(dot).collect()
    }
}

/// The latency spectrum of one cell: a line per path over a logarithmic axis of the share of
/// requests above. `None` if no path has one.
pub(super) fn spectrum(document: &Document, cell: &Cell<'_>) -> Result<Option<String>> {
    let rows: Vec<&Row> = document
        .paths
        .iter()
        .filter_map(|path| document.row(path, cell))
        .filter(|row| row.spectrum_us.len() >= 2)
        .collect();
    let points = || rows.iter().flat_map(|row| row.spectrum_us.iter().copied());
    let lowest = points().map(|(_, us)| us).fold(f64::INFINITY, f64::min);
    let highest = points().map(|(_, us)| us).fold(0.0, f64::max);
    let furthest = points()
        .map(|(quantile, _)| nines(quantile))
        .fold(0.0, f64::max);
    if rows.is_empty() || lowest <= 0.0 || highest <= lowest {
        return Ok(None);
    }
    let draw = |root: &Root<'_>| -> Result<(), Failed> {
        let mut chart = ChartBuilder::on(root)
            .margin(8)
            .margin_right(26)
            .caption(
                format!("{}, {}", cell.scope, cell.label()),
                (FONT, 14).into_font().color(&BLACK),
            )
            .x_label_area_size(30)
            .y_label_area_size(62)
            .build_cartesian_2d(
                0.0..furthest.max(1.0),
                (lowest * 0.9..highest * 1.1).log_scale(),
            )?;
        chart
            .configure_mesh()
            .bold_line_style(GRID)
            .light_line_style(GRID.mix(0.5))
            .axis_style(AXIS)
            .label_style((FONT, 12).into_font().color(&AXIS))
            .x_labels(usize_of(furthest) + 1)
            .x_label_formatter(&|nines| percentile_label(*nines))
            .y_label_formatter(&|us| super::units::Unit::Latency.show(*us))
            .y_labels(6)
            .draw()?;
        for row in &rows {
            let style = colour(document, &row.path).stroke_width(2);
            let line = row
                .spectrum_us
                .iter()
                .map(|&(quantile, us)| (nines(quantile), us));
            chart.draw_series(LineSeries::new(line, style))?;
        }
        Ok(())
    };
    svg(440, 280, draw).map(Some)
}

/// 0.9 is one nine, 0.99 two: the logarithmic axis of the share above.
fn nines(quantile: f64) -> f64 {
    -(1.0 - quantile).max(1e-9).log10()
}

fn percentile_label(nines: f64) -> String {
    if (nines - nines.round()).abs() > 0.01 {
        return String::new();
    }
    let digits = usize_of(nines - 2.0);
    format!("{:.digits$} %", (1.0 - 10f64.powf(-nines)) * 100.0)
}

fn usize_of(value: f64) -> usize {
    value.round().max(0.0) as usize
}

fn centred() -> TextStyle<'static> {
    use plotters::style::text_anchor::{HPos, Pos, VPos};
    (FONT, 12)
        .into_font()
        .color(&AXIS)
        .pos(Pos::new(HPos::Center, VPos::Top))
}

pub(super) type Root<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub(super) type Failed = DrawingAreaErrorKind<std::io::Error>;

pub(super) fn svg(
    width: u32,
    height: u32,
    draw: impl Fn(&Root<'_>) -> Result<(), Failed>,
) -> Result<String> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (width, height)).into_drawing_area();
        draw(&root)
            .and_then(|()| root.present())
            .map_err(|e| anyhow!("drawing a plot: {e}"))?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::example;

    #[test]
    fn bars_have_a_dot_per_trial() {
        let document = example();
        let cells = document.cells();
        let svg = bars(
            &document,
            &cells,
            Metric::throughput("rr"),
            ("krequests/s", 1e3),
        )
        .unwrap()
        .unwrap();
        let trials: usize = document.rows.iter().map(|row| row.trials).sum();
        assert_eq!(svg.matches("<circle").count(), trials);
        assert!(svg.contains("rr x32"), "{svg}");
        assert!(
            bars(&document, &cells, Metric::SkippedShare, ("", 1.0))
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn the_spectrum_has_a_line_per_path_and_percentile_labels() {
        let document = example();
        let cell = document.cells()[0];
        let svg = spectrum(&document, &cell).unwrap().unwrap();
        for path in &document.paths {
            let RGBColor(r, g, b) = colour(&document, path);
            assert!(
                svg.contains(&format!("#{r:02X}{g:02X}{b:02X}")),
                "no line of {path}"
            );
        }
        assert!(svg.contains("99 %"), "{svg}");
        assert!(
            spectrum(
                &document,
                &Cell {
                    connections: 7,
                    ..cell
                }
            )
            .unwrap()
            .is_none()
        );
    }

    #[test]
    fn percentiles_are_labelled_at_whole_nines() {
        assert_eq!(percentile_label(0.0), "0 %");
        assert_eq!(percentile_label(1.0), "90 %");
        assert_eq!(percentile_label(3.0), "99.9 %");
        assert_eq!(percentile_label(1.5), "");
    }
}
