//! Compares the metrics and memory figures in the documents with the metrics page of a node.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use delivery_testkit::ports::free_port;

use super::support::node::{Node, NodeBuilder};
use super::support::wait::until;
use super::tls::Certificates;

/// Metrics that appear only after an event, or only for partitions that are read.
const ONLY_SOMETIMES: [&str; 2] = ["kafka_consumer_lag", "http_request_duration_seconds"];

fn nobody_there() -> String {
    format!("127.0.0.1:{}", free_port())
}

/// The metrics pages of two nodes that have together every part with metrics: no node hands over both through
/// the log and through Redis. They need not be ready.
fn pages_of_everything() -> String {
    let files = Certificates::new(&["chat.test"]);
    let nodes = ["log", "redis"].map(|hand_off| node_with_everything(&files, hand_off));
    nodes.map(|node| node.get("/metrics").expect("answers").body).concat()
}

fn node_with_everything(files: &Certificates, hand_off: &str) -> Node {
    let node = files
        .settings(NodeBuilder::serve())
        .set("KAFKA_BROKERS", nobody_there())
        .set("REDIS_ADDR", nobody_there())
        .set("MSG_SVC_ADDR", nobody_there())
        .set("CONV_SVC_ADDR", nobody_there())
        .set("PRESENCE_SVC_ADDR", nobody_there())
        .set("PRESENCE_MODE", "service")
        .set("ROUTING_MODE", "group")
        .set("HANDOFF", hand_off)
        .set("DEAD_LETTER_TOPIC", "dead-letters")
        .set("CONNECTIONS_MAX", 1_000)
        .spawn();
    until(std::time::Duration::from_secs(30), "the admin port answers", || {
        node.get("/metrics").filter(|answer| answer.status == 200)
    });
    node
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn pages() -> Vec<PathBuf> {
    let docs = std::fs::read_dir(root().join("docs")).expect("the folder");
    let docs = docs.map(|entry| entry.expect("an entry").path());
    // Not the proposals: what they name does not exist yet.
    let mut pages: Vec<_> = docs.filter(|page| page.is_file()).collect();
    pages.extend(
        ["README.md", "deploy/prometheus/alerts.yaml", "deploy/grafana/delivery.json"]
            .map(|page| root().join(page)),
    );
    pages
}

/// The words of a text that may be metrics, with their first label; `…` stands for an omitted part.
fn metrics_named(text: &str) -> BTreeSet<(String, Option<String>)> {
    let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '…';
    let mut found = BTreeSet::new();
    let mut rest = text;
    while let Some(start) = rest.find(is_part) {
        let word: String = rest[start..].chars().take_while(|c| is_part(*c)).collect();
        let before = rest[..start].chars().next_back();
        rest = &rest[start + word.len()..];
        // `delivery_api…` are generated modules.
        let ours = word
            .strip_prefix("delivery_")
            .is_some_and(|rest| !rest.is_empty() && !rest.starts_with("api"));
        let abridged = word.starts_with('…') && word.ends_with("_total");
        let named = ["websocket_connections_active", "kafka_consumer_lag", "http_requests_total"];
        // Not a path, a crate or a test.
        let apart = !before.is_some_and(|c| c.is_alphanumeric() || "/:.-{".contains(c))
            && !rest.starts_with("::")
            && !rest.starts_with(".rs");
        if apart && (ours || abridged || named.contains(&word.as_str())) {
            let label = rest
                .strip_prefix("{")
                .and_then(|labels| labels.split_once('}'))
                .map(|labels| labels.0);
            let label = label.filter(|label| label.contains("=\"") && !label.contains(','));
            found.insert((word, label.map(str::to_owned)));
        }
    }
    found
}

/// Whether `name` is `metric` with parts omitted.
fn stands_for(name: &str, metric: &str) -> bool {
    let mut parts = name.split('…');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = metric.strip_prefix(first) else { return false };
    let mut last = first;
    for part in parts {
        let Some(at) = rest.rfind(part) else { return false };
        rest = &rest[at + part.len()..];
        last = part;
    }
    rest.is_empty() || (last.is_empty() && name.ends_with('…'))
}

#[test]
fn every_metric_that_a_page_names_is_on_the_metrics_page() {
    let page = pages_of_everything();
    let series: BTreeSet<&str> = page
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.rsplit_once(' ').map(|(series, _)| series))
        .collect();
    let mut findings = Vec::new();
    let mut checked = 0;
    for path in pages() {
        for (name, label) in metrics_named(&read(&path)) {
            checked += 1;
            let known = series.iter().any(|series| {
                let (metric, labels) = series.split_once('{').unwrap_or((series, ""));
                stands_for(&name, metric)
                    && label.as_ref().is_none_or(|label| labels.contains(label.as_str()))
            });
            if !known && !ONLY_SOMETIMES.contains(&name.as_str()) {
                findings.push(format!("{}: {name} {label:?}", path.display()));
            }
        }
    }
    assert!(checked > 80, "only {checked} names found");
    assert!(findings.is_empty(), "not on the metrics page: {findings:#?}");
}

#[test]
fn every_queue_is_in_the_memory_bound_and_every_part_of_it_is_a_queue() {
    let page = pages_of_everything();
    let parts: BTreeSet<&str> = page
        .lines()
        .filter(|line| line.starts_with("delivery_memory_bound_bytes{"))
        .filter_map(|line| line.split("part=\"").nth(1)?.split('"').next())
        .collect();
    assert!(parts.len() > 20, "{parts:?}");
    let queues = read(&root().join("docs/queues.md"));
    let mut named = BTreeSet::from(["process"]);
    let mut rows = 0;
    for row in queues.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| ---")) {
        let memory = row.trim_end_matches(['|', ' ']).rsplit(" | ").next().unwrap_or_default();
        if memory == "memory" {
            continue;
        }
        rows += 1;
        let in_row: Vec<_> = memory.split('`').skip(1).step_by(2).collect();
        assert!(!in_row.is_empty() || ["kernel", "none"].contains(&memory), "no part: {row}");
        let unknown: Vec<_> = in_row.iter().filter(|part| !parts.contains(*part)).collect();
        assert!(unknown.is_empty(), "the bound has no {unknown:?}: {row}");
        named.extend(in_row);
    }
    assert!(rows > 40, "only {rows} rows");
    let unnamed: Vec<_> = parts.difference(&named).collect();
    assert!(unnamed.is_empty(), "parts of the bound that no queue has: {unnamed:?}");
}

#[test]
fn names_with_omitted_parts_match_whole_names() {
    assert!(stands_for("delivery_redis_up", "delivery_redis_up"));
    assert!(!stands_for("delivery_redis", "delivery_redis_up"));
    assert!(stands_for("delivery_redis_…", "delivery_redis_up"));
    assert!(stands_for("a_…_total", "a_b_total"));
    assert!(!stands_for("a_…_total", "a_b"));
    assert!(stands_for("…_rate_total", "a_rate_total"));
}
