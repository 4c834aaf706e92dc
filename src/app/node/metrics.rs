//! Every component's counters on one page, and the names that dashboards already use (contract §6).

use std::sync::Arc;

use crate::app::admin::{FamilyKind, Page, Samples, number};
use crate::domain::close::EndReason;
use crate::domain::counters::{LATENCY_BUCKETS_MS, LatencyHistogram, MetricKind};
use crate::reactor::counters::ShardCounters;
use crate::service::sessions::manager::SessionCounters;
use crate::service::streams::hub::HubMetrics;

/// What the `counters!` macro calls for each field.
type Visit<'a> = &'a mut dyn FnMut(MetricKind, &'static str, &'static str, u64);

/// The samples of one component: each field of its counters as `delivery_<prefix><field>`.
pub(super) fn component(
    prefix: &'static str,
    visit: impl Fn(Visit<'_>) + Send + Sync + 'static,
) -> Samples {
    Box::new(move |page| {
        visit(&mut |kind, field, help, value| sample(page, kind, prefix, field, help, &[], value));
    })
}

fn sample(
    page: &mut Page,
    kind: MetricKind,
    prefix: &str,
    field: &str,
    help: &str,
    labels: &[(&str, &str)],
    value: u64,
) {
    let (kind, suffix) = match kind {
        MetricKind::Counter => (FamilyKind::Counter, "_total"),
        MetricKind::Gauge => (FamilyKind::Gauge, ""),
    };
    page.sample(kind, &format!("delivery_{prefix}{field}{suffix}"), help, labels, number(value));
}

/// The samples of one of several: each field with a label that says which.
pub(super) fn numbered(
    prefix: &'static str,
    label: &'static str,
    number: usize,
    visit: impl Fn(Visit<'_>) + Send + Sync + 'static,
) -> Samples {
    let number = number.to_string();
    Box::new(move |page| {
        let labels = [(label, number.as_str())];
        visit(&mut |kind, field, help, value| {
            sample(page, kind, prefix, field, help, &labels, value);
        });
    })
}

/// The shards, one by one, and what they are together.
pub(super) fn shards(
    all: Vec<Arc<ShardCounters>>,
    hub: Option<Arc<HubMetrics>>,
    sessions: Arc<SessionCounters>,
) -> Samples {
    Box::new(move |page| {
        for (shard, counters) in all.iter().enumerate() {
            let shard = shard.to_string();
            let labels = [("shard", shard.as_str())];
            counters.counts.visit(&mut |kind, field, help, value| {
                sample(page, kind, "shard_", field, help, &labels, value);
            });
            for why in EndReason::ALL {
                let labels = [("shard", shard.as_str()), ("reason", why.label())];
                let value = number(counters.ended[why as usize].get());
                page.sample(FamilyKind::Counter, ENDED, "Connections that ended.", &labels, value);
            }
        }
        if let Some(hub) = &hub {
            for why in EndReason::ALL {
                let value = number(hub.ended[why as usize].get());
                let (help, labels) = ("gRPC sessions that ended.", [("reason", why.label())]);
                let name = "delivery_stream_ended_total";
                page.sample(FamilyKind::Counter, name, help, &labels, value);
            }
        }
        active(page, &all);
        let histograms = all.iter().map(|shard| &shard.latency);
        latency(page, histograms.chain(hub.as_ref().map(|hub| &hub.latency)));
        upgrades(page, &all, &sessions);
    })
}

const ENDED: &str = "delivery_shard_ended_total";

fn sum(all: &[Arc<ShardCounters>], field: impl Fn(&ShardCounters) -> u64) -> u64 {
    all.iter().map(|counters| field(counters)).sum()
}

fn active(page: &mut Page, all: &[Arc<ShardCounters>]) {
    let open = number(sum(all, |c| c.counts.sessions.get()));
    let help = "Sessions over WebSocket.";
    page.sample(FamilyKind::Gauge, "websocket_connections_active", help, &[], open);
}

fn latency<'a>(page: &mut Page, all: impl Iterator<Item = &'a LatencyHistogram>) {
    let mut counts = [0; LATENCY_BUCKETS_MS.len() + 1];
    let mut sum_ms = 0;
    for histogram in all {
        let (buckets, sum) = histogram.read();
        counts.iter_mut().zip(buckets).for_each(|(total, bucket)| *total += bucket);
        sum_ms += sum;
    }
    let bounds = LATENCY_BUCKETS_MS.map(|ms| number(ms) / 1000.0);
    let help = "From the append of an event to its Kafka log to its completed send.";
    let name = "message_delivery_latency_seconds";
    page.histogram(name, help, &[], &bounds, &counts, number(sum_ms) / 1000.0);
}

/// Upgrade requests on the public port, by the status of the answer.
fn upgrades(page: &mut Page, all: &[Arc<ShardCounters>], sessions: &SessionCounters) {
    let shards = |field: fn(&ShardCounters) -> u64| sum(all, field);
    let answers = [
        ("101", shards(|c| c.counts.upgraded.get())),
        ("400", sessions.refused_bad_request.get()),
        ("401", sessions.refused_unauthorized.get()),
        ("403", sessions.refused_forbidden.get()),
        ("408", shards(|c| c.counts.handshake_timeouts.get())),
        (
            "429",
            shards(|c| c.counts.refused_address_rate.get() + c.counts.refused_address_count.get())
                + sessions.refused_user_limit.get(),
        ),
        // Which of 400 to 431 it was the parser knows: the answer's body says it.
        ("4xx", shards(|c| c.counts.requests_refused.get())),
        (
            "503",
            shards(|c| {
                let counts = &c.counts;
                counts.refused_full.get()
                    + counts.refused_total_rate.get()
                    + counts.admission_timeouts.get()
            }) + sessions.refused_unavailable.get(),
        ),
    ];
    for (status, count) in answers {
        crate::app::admin::answered(page, "GET", "/ws", status, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_and_the_contracts_names_are_on_the_page() {
        let shard = Arc::new(ShardCounters::default());
        shard.counts.sessions.set(3);
        shard.counts.upgraded.add(4);
        shard.count_end(EndReason::PeerSilent);
        shard.latency.record(7, 2);
        let sessions = Arc::new(SessionCounters::default());
        sessions.refused_forbidden.add(5);

        let mut page = Page::new("push");
        shards(vec![Arc::clone(&shard), Arc::default()], None, Arc::clone(&sessions))(&mut page);
        component("session_", move |visit| sessions.visit(visit))(&mut page);
        let text = page.render();
        for line in [
            "websocket_connections_active{service=\"push\"} 3",
            "delivery_shard_sessions{service=\"push\",shard=\"0\"} 3",
            "delivery_shard_sessions{service=\"push\",shard=\"1\"} 0",
            "delivery_shard_ended_total{service=\"push\",shard=\"0\",reason=\"peer_silent\"} 1",
            "delivery_session_refused_forbidden_total{service=\"push\"} 5",
            "message_delivery_latency_seconds_bucket{service=\"push\",le=\"0.005\"} 0",
            "message_delivery_latency_seconds_bucket{service=\"push\",le=\"0.01\"} 2",
            "message_delivery_latency_seconds_sum{service=\"push\"} 0.014",
            "http_requests_total{service=\"push\",method=\"GET\",path=\"/ws\",status=\"101\"} 4",
            "http_requests_total{service=\"push\",method=\"GET\",path=\"/ws\",status=\"403\"} 5",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
