//! Line plots over the number of sessions, with the spread at each point, as SVG.

use std::fmt::Write as _;

use super::plot::{STYLE, TOP, WIDTH, colour};
use super::samples::Summary;

const HEIGHT: f64 = 320.0;
const LEFT: f64 = 48.0;
const RIGHT: f64 = 150.0;
const BOTTOM: f64 = 32.0;
/// Maximum of horizontal lines above that of 0.
const RULES: f64 = 8.0;
/// Minimum distance between texts.
const TEXT_HEIGHT: f64 = 17.0;
const TEXT_WIDTH: f64 = 56.0;

/// A line: values at some numbers of sessions, in ascending order.
pub(super) struct Line {
    pub(super) name: String,
    pub(super) points: Vec<(f64, Summary)>,
}

/// Draws the lines; sessions on a logarithmic scale, values from 0.
pub(super) fn lines(title: &str, subtitle: &str, drawn: &[Line]) -> String {
    let axes = Axes::of(drawn);
    let mut svg = String::new();
    let out = &mut svg;
    let _ = writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="14">
{STYLE}
<text x="0" y="18" font-weight="bold">{title}</text>
<text x="0" y="36" font-size="12">{subtitle}</text>"##
    );
    axes.draw(out, drawn);
    for line in drawn {
        axes.draw_line(out, line);
    }
    axes.draw_names(out, drawn);
    svg.push_str("</svg>\n");
    svg
}

/// From numbers to places.
struct Axes {
    least: f64,
    /// Logarithm of the greatest number of sessions to the least.
    span: f64,
    most: f64,
}

impl Axes {
    fn of(drawn: &[Line]) -> Self {
        let points = || drawn.iter().flat_map(|line| &line.points);
        let least = points().map(|(at, _)| *at).fold(f64::INFINITY, f64::min).max(1.0);
        let greatest = points().map(|(at, _)| *at).fold(least, f64::max);
        let most = points().map(|(_, amount)| amount.max).fold(f64::MIN_POSITIVE, f64::max);
        Self { least, span: (greatest / least).ln().max(f64::MIN_POSITIVE), most }
    }

    fn x(&self, sessions: f64) -> f64 {
        LEFT + (sessions / self.least).ln() / self.span * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, amount: f64) -> f64 {
        HEIGHT - BOTTOM - amount / self.most * (HEIGHT - BOTTOM - TOP)
    }

    fn draw(&self, out: &mut String, drawn: &[Line]) {
        let step = round_step(self.most / RULES);
        for rule in (0..).map(|number| f64::from(number) * step).take_while(|at| *at <= self.most) {
            let y = self.y(rule);
            let _ = writeln!(
                out,
                r##"<line x1="{LEFT}" x2="{:.1}" y1="{y:.1}" y2="{y:.1}" stroke-opacity="0.2"/><text x="{:.1}" y="{:.1}" font-size="12" text-anchor="end">{rule}</text>"##,
                WIDTH - RIGHT,
                LEFT - 6.0,
                y + 4.0
            );
        }
        let mut places: Vec<f64> =
            drawn.iter().flat_map(|line| &line.points).map(|(at, _)| *at).collect();
        places.sort_by(f64::total_cmp);
        let mut last = f64::NEG_INFINITY;
        for sessions in places {
            let x = self.x(sessions);
            if x - last < TEXT_WIDTH {
                continue;
            }
            last = x;
            let _ = writeln!(
                out,
                r##"<text x="{x:.1}" y="{:.1}" font-size="12" text-anchor="middle">{sessions:.0}</text>"##,
                HEIGHT - BOTTOM + 18.0
            );
        }
    }

    fn draw_line(&self, out: &mut String, line: &Line) {
        let colour = colour(&line.name);
        let way: Vec<_> = line
            .points
            .iter()
            .map(|(at, amount)| format!("{:.1},{:.1}", self.x(*at), self.y(amount.median)))
            .collect();
        let way = way.join(" ");
        let _ = writeln!(
            out,
            r##"<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>"##
        );
        for (at, amount) in line.points.iter().filter(|(_, amount)| amount.max > amount.min) {
            let (x, least, most) = (self.x(*at), self.y(amount.min), self.y(amount.max));
            let _ = writeln!(
                out,
                r##"<line x1="{x:.1}" x2="{x:.1}" y1="{least:.1}" y2="{most:.1}" stroke-width="2"/>"##
            );
        }
    }

    /// Beside the end of each line.
    fn draw_names(&self, out: &mut String, drawn: &[Line]) {
        let mut names: Vec<_> = drawn
            .iter()
            .filter_map(|line| {
                let (at, amount) = line.points.last()?;
                let text = format!("{} {:.1}", line.name, amount.median);
                Some((self.x(*at) + 8.0, self.y(amount.median) + 5.0, text))
            })
            .collect();
        names.sort_by(|a, b| a.1.total_cmp(&b.1));
        let mut free = f64::NEG_INFINITY;
        for (x, y, text) in names {
            let y = y.max(free);
            free = y + TEXT_HEIGHT;
            let _ = writeln!(out, r##"<text x="{x:.1}" y="{y:.1}">{text}</text>"##);
        }
    }
}

/// The least of 1, 2, 5, 10, 20 … that is at least this.
fn round_step(least: f64) -> f64 {
    let unit = 10.0_f64.powf(least.log10().floor());
    let steps = [1.0, 2.0, 5.0].map(|times| times * unit);
    steps.into_iter().find(|step| *step >= least).unwrap_or(10.0 * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_stay_within_the_picture() {
        let point = |at: f64, amount: f64| (at, Summary::of(&[amount, amount + 1.0]));
        let line = |name: &str, points| Line { name: name.to_owned(), points };
        let svg = lines(
            "growth",
            "µs",
            &[
                line("bare", vec![point(1e3, 5.0), point(2e5, 9.0)]),
                line("delivery", vec![point(1e3, 6.0)]),
            ],
        );
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains(r#"points="48.0,"#) && !svg.contains("NaN"), "{svg}");
        assert_eq!([round_step(2.4), round_step(0.3), round_step(80.0)], [5.0, 0.5, 100.0]);
    }
}
