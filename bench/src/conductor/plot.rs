//! Plots as SVG: bars, and lines over the number of sessions, both with the spread of the rounds.

use std::io;

use plotters::prelude::*;

use super::samples::{Metric, Samples, Summary};
use super::work::Work;

/// Pixels.
const WIDTH: u32 = 640;
const HEIGHT: u32 = 320;
const BAR: u32 = 38;
/// What a bar plot needs beside its bars: title and axis.
const FRAME: u32 = 88;
const MARGIN: u32 = 8;
const WHISKER: u32 = 6;
const TITLE: (&str, u32) = ("sans-serif", 16);
const TEXT: (&str, u32) = ("sans-serif", 14);
/// Part of the width of a bar plot that is left for texts.
const TEXT_SHARE: f64 = 0.4;
const DELIVERY: RGBColor = RGBColor(0xd1, 0x24, 0x2f);
const OTHERS: RGBColor = RGBColor(0xb4, 0xba, 0xc1);

type Drawn = Result<(), DrawingAreaErrorKind<io::Error>>;

/// A line: values at some numbers of sessions, in ascending order.
pub(super) struct Line {
    pub(super) name: String,
    pub(super) points: Vec<(f64, Summary)>,
}

/// Processor time per message, one bar per server.
pub(super) fn bars(work: &Work, contenders: &[&str], samples: &Samples) -> String {
    let of = |name: &&'_ str| samples.summary(work.name, name, Metric::CpuUs);
    let rows: Vec<_> = contenders.iter().filter_map(|name| Some((*name, of(name)?))).collect();
    let mut svg = String::new();
    draw_bars(&mut svg, work.title, &rows).expect("drawn into memory");
    svg
}

/// Lines; sessions on a logarithmic scale, values from 0.
pub(super) fn lines(title: &str, subtitle: &str, drawn: &[Line]) -> String {
    let mut svg = String::new();
    draw_lines(&mut svg, title, subtitle, drawn).expect("drawn into memory");
    svg
}

fn draw_bars(svg: &mut String, title: &str, rows: &[(&str, Summary)]) -> Drawn {
    let most = rows.iter().map(|(_, summary)| summary.max).fold(f64::MIN_POSITIVE, f64::max);
    let size = (WIDTH, FRAME + BAR * rows.len() as u32);
    let root = SVGBackend::with_string(svg, size).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, TITLE)
        .margin(MARGIN)
        .x_label_area_size(40)
        .build_cartesian_2d(0.0..most * (1.0 + TEXT_SHARE), 0.0..rows.len().max(1) as f64)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_desc("CPU µs per message, process and ksoftirqd; median, least to most")
        .draw()?;
    for (row, (name, summary)) in rows.iter().rev().enumerate() {
        let Summary { median, min, max } = *summary;
        let [bottom, middle, top] = [0.15, 0.5, 0.85].map(|part| row as f64 + part);
        let colour = if name.starts_with("delivery") { DELIVERY } else { OTHERS };
        let bar = Rectangle::new([(0.0, bottom), (median, top)], colour.filled());
        chart.draw_series([bar])?;
        chart.draw_series([ErrorBar::new_horizontal(
            middle,
            min,
            median,
            max,
            BLACK.filled(),
            WHISKER,
        )])?;
        let place = (max + most * 0.02, middle + 0.2);
        chart.draw_series([Text::new(format!("{name} {median:.2}"), place, TEXT)])?;
    }
    root.present()
}

fn draw_lines(svg: &mut String, title: &str, subtitle: &str, drawn: &[Line]) -> Drawn {
    let points = || drawn.iter().flat_map(|line| &line.points);
    let least =
        points().map(|(at, _)| *at).fold(f64::INFINITY, f64::min).clamp(1.0, f64::MAX / 2.0);
    let greatest = points().map(|(at, _)| *at).fold(least + 1.0, f64::max);
    let most = points().map(|(_, amount)| amount.max).fold(f64::MIN_POSITIVE, f64::max);
    let root = SVGBackend::with_string(svg, (WIDTH, HEIGHT)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, TITLE)
        .margin(MARGIN)
        .x_label_area_size(40)
        .y_label_area_size(48)
        .build_cartesian_2d((least..greatest).log_scale(), 0.0..most)?;
    chart.configure_mesh().x_desc(subtitle).draw()?;
    for (number, line) in drawn.iter().enumerate() {
        let style = Palette99::pick(number).stroke_width(2);
        let last = line.points.last().map_or(f64::NAN, |(_, amount)| amount.median);
        let medians = line.points.iter().map(|(at, amount)| (*at, amount.median));
        chart
            .draw_series(LineSeries::new(medians, style))?
            .label(format!("{} {last:.1}", line.name))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
        chart.draw_series(line.points.iter().map(|(at, amount)| {
            ErrorBar::new_vertical(*at, amount.min, amount.median, amount.max, style, WHISKER)
        }))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .label_font(TEXT)
        .draw()?;
    root.present()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conductor::WORKS;

    #[test]
    fn every_server_with_numbers_has_a_bar() {
        let mut samples = Samples::default();
        samples.add("push", "bare", Metric::CpuUs, 2.0);
        samples.add("push", "delivery", Metric::CpuUs, 2.2);
        let svg = bars(&WORKS[0], &["bare", "delivery", "absent"], &samples);
        assert!(svg.contains("bare 2.00") && svg.contains("delivery 2.20"), "{svg}");
        assert!(!svg.contains("absent") && !svg.contains("NaN"), "{svg}");
        // One rectangle is the background.
        assert_eq!(svg.matches("<rect").count(), 3, "{svg}");
        assert!(svg.ends_with("</svg>\n"));
    }

    #[test]
    fn every_line_has_a_label() {
        let point = |at: f64, amount: f64| (at, Summary::of(&[amount, amount + 1.0]));
        let line = |name: &str, points| Line { name: name.to_owned(), points };
        let two = [
            line("bare", vec![point(1e3, 5.0), point(2e5, 9.0)]),
            line("delivery", vec![point(1e3, 6.0)]),
        ];
        let svg = lines("growth", "µs", &two);
        assert!(svg.contains("bare 9.5") && svg.contains("delivery 6.5"), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
