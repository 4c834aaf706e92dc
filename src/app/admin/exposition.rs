//! The Prometheus text format, version 0.0.4.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::domain::counters::MetricKind;

#[derive(Debug)]
struct MetricFamily {
    /// The type of the metric, as the format spells it.
    kind: &'static str,
    help: String,
    samples: String,
}

/// Collects the samples of the metrics page. Samples may be added in any order. The page groups
/// them by metric, as the format requires.
#[derive(Debug)]
pub struct MetricsPage {
    service: String,
    families: BTreeMap<String, MetricFamily>,
}

impl MetricsPage {
    /// Creates an empty page. Every sample gets the label `service`.
    pub fn new(service: &str) -> Self {
        Self { service: service.to_owned(), families: BTreeMap::new() }
    }

    /// Adds one sample.
    pub fn sample(
        &mut self,
        kind: MetricKind,
        name: &str,
        help: &str,
        labels: &[(&str, &str)],
        value: f64,
    ) {
        let labels = self.labels(labels);
        let kind = match kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
        };
        let family = self.family(kind, name, help);
        writeln!(family.samples, "{name}{labels} {value}").expect(STRING);
    }

    /// Adds a histogram: the count of each bucket (not cumulative; one more than bounds) and the sum
    /// of all values.
    pub fn histogram(
        &mut self,
        name: &str,
        help: &str,
        labels: &[(&str, &str)],
        bounds: &[f64],
        counts: &[u64],
        sum: f64,
    ) {
        assert_eq!(counts.len(), bounds.len() + 1, "the last bucket has no bound");
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
        self.family("histogram", name, help).samples.push_str(&lines);
    }

    fn family(&mut self, kind: &'static str, name: &str, help: &str) -> &mut MetricFamily {
        let family = self.families.entry(name.to_owned()).or_insert_with(|| MetricFamily {
            kind,
            help: help.to_owned(),
            samples: String::new(),
        });
        assert_eq!(family.kind, kind, "{name} has one type");
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

    /// The page as text.
    pub fn render(&self) -> String {
        let mut out = String::new();
        for (name, family) in &self.families {
            let (help, kind) = (escape(&family.help, false), family.kind);
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

/// Escapes backslash and newline, and quotes in label values.
fn escape(text: &str, quotes: bool) -> String {
    let text = text.replace('\\', "\\\\").replace('\n', "\\n");
    if quotes { text.replace('"', "\\\"") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_is_rendered_in_the_text_format() {
        let mut page = MetricsPage::new("push");
        page.sample(MetricKind::Gauge, "b", "open\nnow", &[], 3.0);
        page.sample(MetricKind::Counter, "a_total", "two \"words\"", &[("path", "/\"\\")], 1.0);
        page.sample(MetricKind::Gauge, "c", "other", &[], 0.5);
        page.sample(MetricKind::Counter, "a_total", "two \"words\"", &[("path", "/ws")], 18e6);
        page.histogram("h_seconds", "times", &[("m", "x")], &[0.001, 1.0], &[1, 2, 3], 9.5);
        assert_eq!(
            page.render(),
            "# HELP a_total two \"words\"\n\
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
