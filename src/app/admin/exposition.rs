//! The Prometheus text format, version 0.0.4.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// What a family of samples is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FamilyKind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Buckets, a sum and a count.
    Histogram,
}

impl FamilyKind {
    fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

#[derive(Debug)]
struct Family {
    kind: FamilyKind,
    help: String,
    samples: String,
}

/// A page in the making. Samples of one family may be added in any order: the format wants them
/// together, so the page keeps them so.
#[derive(Debug)]
pub struct Page {
    service: String,
    families: BTreeMap<String, Family>,
}

impl Page {
    /// Every sample carries the label `service`.
    pub fn new(service: &str) -> Self {
        Self { service: service.to_owned(), families: BTreeMap::new() }
    }

    /// Adds one sample.
    pub fn sample(
        &mut self,
        kind: FamilyKind,
        name: &str,
        help: &str,
        labels: &[(&str, &str)],
        value: f64,
    ) {
        let labels = self.labels(labels);
        let family = self.family(kind, name, help);
        writeln!(family.samples, "{name}{labels} {value}").expect(STRING);
    }

    /// Adds a histogram: the count of each bucket (not cumulative; one more than there are bounds)
    /// and the sum of all values.
    pub fn histogram(
        &mut self,
        name: &str,
        help: &str,
        labels: &[(&str, &str)],
        bounds: &[f64],
        counts: &[u64],
        sum: f64,
    ) {
        assert_eq!(counts.len(), bounds.len() + 1, "the last bucket takes the rest");
        let mut lines = String::new();
        let mut cumulative = 0;
        let bounds = bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(counts) {
            cumulative += count;
            let labels = self.labels(&[labels, &[("le", &bound)]].concat());
            writeln!(lines, "{name}_bucket{labels} {cumulative}").expect(STRING);
        }
        let labels = self.labels(labels);
        write!(lines, "{name}_sum{labels} {sum}\n{name}_count{labels} {cumulative}\n")
            .expect(STRING);
        self.family(FamilyKind::Histogram, name, help).samples.push_str(&lines);
    }

    fn family(&mut self, kind: FamilyKind, name: &str, help: &str) -> &mut Family {
        let family = self.families.entry(name.to_owned()).or_insert_with(|| Family {
            kind,
            help: help.to_owned(),
            samples: String::new(),
        });
        assert_eq!(family.kind, kind, "{name} is of one kind");
        family
    }

    fn labels(&self, labels: &[(&str, &str)]) -> String {
        let mut out = format!("{{service=\"{}\"", escape(&self.service, true));
        for (name, value) in labels {
            write!(out, ",{name}=\"{}\"", escape(value, true)).expect(STRING);
        }
        out.push('}');
        out
    }

    /// The whole page.
    pub fn render(&self) -> String {
        let mut out = String::new();
        for (name, family) in &self.families {
            let (help, kind) = (escape(&family.help, false), family.kind.word());
            write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{}", family.samples)
                .expect(STRING);
        }
        out
    }
}

/// A count as the value of a sample.
#[allow(clippy::cast_precision_loss, reason = "exact up to 2^53")]
pub fn number(value: u64) -> f64 {
    value as f64
}

const STRING: &str = "writing to a string does not fail";

/// Backslash and newline everywhere, quotes in label values.
fn escape(text: &str, quotes: bool) -> String {
    let text = text.replace('\\', "\\\\").replace('\n', "\\n");
    if quotes { text.replace('"', "\\\"") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_is_the_text_format() {
        let mut page = Page::new("push");
        page.sample(FamilyKind::Gauge, "b", "open\nnow", &[], 3.0);
        page.sample(FamilyKind::Counter, "a_total", "so \"many\"", &[("path", "/\"\\")], 1.0);
        page.sample(FamilyKind::Gauge, "c", "other", &[], 0.5);
        page.sample(FamilyKind::Counter, "a_total", "so \"many\"", &[("path", "/ws")], 18e6);
        page.histogram("h_seconds", "times", &[("m", "x")], &[0.001, 1.0], &[1, 2, 3], 9.5);
        assert_eq!(
            page.render(),
            "# HELP a_total so \"many\"\n\
             # TYPE a_total counter\n\
             a_total{service=\"push\",path=\"/\\\"\\\\\"} 1\n\
             a_total{service=\"push\",path=\"/ws\"} 18000000\n\
             # HELP b open\\nnow\n\
             # TYPE b gauge\n\
             b{service=\"push\"} 3\n\
             # HELP c other\n\
             # TYPE c gauge\n\
             c{service=\"push\"} 0.5\n\
             # HELP h_seconds times\n\
             # TYPE h_seconds histogram\n\
             h_seconds_bucket{service=\"push\",m=\"x\",le=\"0.001\"} 1\n\
             h_seconds_bucket{service=\"push\",m=\"x\",le=\"1\"} 3\n\
             h_seconds_bucket{service=\"push\",m=\"x\",le=\"+Inf\"} 6\n\
             h_seconds_sum{service=\"push\",m=\"x\"} 9.5\n\
             h_seconds_count{service=\"push\",m=\"x\"} 6\n"
        );
    }
}
