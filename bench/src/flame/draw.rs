//! The flame graph: an SVG without scripts. A browser shows a frame's name and share on hovering.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::Stacks;

const WIDTH: f64 = 1200.0;
const ROW: f64 = 16.0;
const TOP: f64 = 28.0;
/// Frames narrower than this are not drawn, px.
const NARROWEST: f64 = 1.0;
/// Width of a letter, px.
const LETTER: f64 = 6.6;

#[derive(Default)]
struct Node {
    count: u64,
    under: BTreeMap<String, Node>,
}

/// Draws a flame graph.
pub fn svg(title: &str, stacks: &Stacks) -> String {
    let mut root = Node::default();
    for (stack, count) in stacks {
        root.count += count;
        let mut node = &mut root;
        for frame in stack {
            node = node.under.entry(frame.clone()).or_default();
            node.count += count;
        }
    }
    let scale = WIDTH / root.count.max(1) as f64;
    let height = TOP + depth(&root, scale) as f64 * ROW;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"monospace\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"4\" y=\"18\" font-size=\"14\">{}</text>\n",
        escape(title)
    );
    draw(&mut svg, &root, 0.0, height, scale, root.count);
    svg.push_str("</svg>\n");
    svg
}

fn depth(node: &Node, scale: f64) -> usize {
    let shown = node.under.values().filter(|child| child.count as f64 * scale >= NARROWEST);
    shown.map(|child| 1 + depth(child, scale)).max().unwrap_or(0)
}

fn draw(svg: &mut String, node: &Node, left: f64, bottom: f64, scale: f64, total: u64) {
    let mut x = left;
    for (name, child) in &node.under {
        let width = child.count as f64 * scale;
        if width >= NARROWEST {
            let y = bottom - ROW;
            let share = child.count as f64 / total as f64 * 100.0;
            let _ = write!(
                svg,
                "<g><title>{} ({share:.1} %)</title><rect x=\"{x:.1}\" y=\"{y:.0}\" width=\"{:.1}\" \
                 height=\"{:.0}\" fill=\"{}\"/>",
                escape(name),
                width - 0.3,
                ROW - 1.0,
                colour(name),
            );
            let letters = ((width - 4.0) / LETTER) as usize;
            if letters >= 3 {
                let text: String = name.chars().take(letters).collect();
                let _ = write!(
                    svg,
                    "<text x=\"{:.1}\" y=\"{:.0}\">{}</text>",
                    x + 2.0,
                    y + ROW - 5.0,
                    escape(&text)
                );
            }
            svg.push_str("</g>\n");
            draw(svg, child, x, y, scale, total);
        }
        x += width;
    }
}

/// Delivery is red, Kafka's client green, the allocator violet, everything else beige.
fn colour(name: &str) -> &'static str {
    if name.contains("delivery") {
        "#e5705a"
    } else if name.contains("rd_kafka") || name.starts_with("rdk") {
        "#8cc084"
    } else if name.trim_start_matches('_').starts_with("mi_") {
        "#b39ddb"
    } else {
        "#eed9a6"
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn width_of_a_frame_is_its_share() {
        let stack = |frames: &[&str]| frames.iter().map(|frame| (*frame).to_owned()).collect();
        let stacks = Stacks::from([(stack(&["shard", "a<b>"]), 3), (stack(&["shard", "c"]), 1)]);
        let svg = svg("title", &stacks);
        assert!(svg.contains("a&lt;b&gt; (75.0 %)") && svg.contains("shard (100.0 %)"), "{svg}");
        assert!(svg.contains("width=\"899.7\""), "{svg}");
    }
}
