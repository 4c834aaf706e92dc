//! Collects the counters of all components, and exports the metrics that existing dashboards use
//! (contract §6).

use std::sync::Arc;

use tokio::sync::watch;

use crate::app::admin::{Collector, MetricsPage, number};
use crate::domain::close::EndReason;
use crate::domain::counters::{CounterSet, LATENCY_BUCKETS_MS, LatencyHistogram, MetricKind};
use crate::domain::cursor::CursorExpired;
use crate::reactor::counters::ShardCounters;
use crate::service::sessions::catch_up::CatchUpService;
use crate::service::sessions::manager::SessionCounters;
use crate::service::streams::hub::HubMetrics;

/// New counters of a component, each field exported as `delivery_<prefix><field>`.
pub(super) fn register<C: CounterSet>(
    prefix: &'static str,
    collectors: &mut Vec<Collector>,
) -> Arc<C> {
    let counters = Arc::new(C::default());
    collectors.push(component(prefix, Arc::clone(&counters)));
    counters
}

/// `delivery_resume_cursors_expired_total`.
pub(super) fn cursors_expired(catch_up: CatchUpService) -> Collector {
    Box::new(move |page| {
        let help = "Cursors of clients that could not be used, by reason.";
        for why in CursorExpired::ALL {
            let (labels, value) =
                ([("reason", why.label())], number(catch_up.cursors_expired(why)));
            let name = "delivery_resume_cursors_expired_total";
            page.sample(MetricKind::Counter, name, help, &labels, value);
        }
    })
}

/// `delivery_draining`.
pub(super) fn draining(drained: watch::Receiver<bool>) -> Collector {
    Box::new(move |page| {
        let help = "1 from the request to drain or stop until the exit, otherwise 0.";
        let value = number(u64::from(*drained.borrow()));
        page.sample(MetricKind::Gauge, "delivery_draining", help, &[], value);
    })
}

/// The metrics of one component: each field of its counters as `delivery_<prefix><field>`.
pub(super) fn component(prefix: &'static str, counters: Arc<impl CounterSet>) -> Collector {
    Box::new(move |page| export(page, prefix, &*counters, &[]))
}

/// The metrics of one of several equal components, with its number as a label.
pub(super) fn numbered(
    prefix: &'static str,
    label: &'static str,
    number: usize,
    counters: Arc<impl CounterSet>,
) -> Collector {
    let number = number.to_string();
    Box::new(move |page| export(page, prefix, &*counters, &[(label, &number)]))
}

fn export(
    page: &mut MetricsPage,
    prefix: &str,
    counters: &impl CounterSet,
    labels: &[(&str, &str)],
) {
    counters.visit(&mut |kind, field, help, value| {
        let suffix = match kind {
            MetricKind::Counter => "_total",
            MetricKind::Gauge => "",
        };
        let name = format!("delivery_{prefix}{field}{suffix}");
        page.sample(kind, &name, help, labels, number(value));
    });
}

/// The metrics of each shard, and those of all shards and the gRPC hub together.
pub(super) fn shards(
    all: Vec<Arc<ShardCounters>>,
    hub: Option<Arc<HubMetrics>>,
    sessions: Arc<SessionCounters>,
) -> Collector {
    Box::new(move |page| {
        for (shard, counters) in all.iter().enumerate() {
            let shard = shard.to_string();
            let labels = [("shard", shard.as_str())];
            export(page, "shard_", &counters.counts, &labels);
            let help = "Connections that have ended, by reason.";
            for why in EndReason::ALL {
                let labels = [labels[0], ("reason", why.label())];
                let value = number(counters.ended[why as usize].get());
                page.sample(MetricKind::Counter, ENDED, help, &labels, value);
            }
        }
        if let Some(hub) = &hub {
            export(page, "", &hub.counters, &[]);
            for why in EndReason::ALL {
                let value = number(hub.ended[why as usize].get());
                let (help, labels) =
                    ("gRPC sessions that have ended, by reason.", [("reason", why.label())]);
                let name = "delivery_stream_ended_total";
                page.sample(MetricKind::Counter, name, help, &labels, value);
            }
        }
        active(page, &all);
        let histograms = all.iter().map(|shard| &shard.latency);
        latency(page, histograms.chain(hub.as_ref().map(|hub| &hub.latency)));
        upgrades(page, &all, &sessions, hub.as_deref());
    })
}

const ENDED: &str = "delivery_shard_ended_total";

fn sum(all: &[Arc<ShardCounters>], field: impl Fn(&ShardCounters) -> u64) -> u64 {
    all.iter().map(|counters| field(counters)).sum()
}

fn active(page: &mut MetricsPage, all: &[Arc<ShardCounters>]) {
    let open = number(sum(all, |c| c.counts.sessions.get()));
    let help = "Open WebSocket sessions.";
    page.sample(MetricKind::Gauge, "websocket_connections_active", help, &[], open);
}

fn latency<'a>(page: &mut MetricsPage, all: impl Iterator<Item = &'a LatencyHistogram>) {
    let mut counts = [0; LATENCY_BUCKETS_MS.len() + 1];
    let mut sum_ms = 0;
    for histogram in all {
        let (buckets, sum) = histogram.read();
        counts.iter_mut().zip(buckets).for_each(|(total, bucket)| *total += bucket);
        sum_ms += sum;
    }
    let bounds = LATENCY_BUCKETS_MS.map(|ms| number(ms) / 1000.0);
    let help = "Time from the append of an event to the Kafka log to its completed send.";
    let name = "message_delivery_latency_seconds";
    page.histogram(name, help, &[], &bounds, &counts, number(sum_ms) / 1000.0);
}

/// Upgrade requests on the public port, by status of the response, and refused gRPC calls by the one that corresponds.
fn upgrades(
    page: &mut MetricsPage,
    all: &[Arc<ShardCounters>],
    sessions: &SessionCounters,
    hub: Option<&HubMetrics>,
) {
    let shards = |field: fn(&ShardCounters) -> u64| sum(all, field);
    let answers = [
        ("101", shards(|c| c.counts.upgraded.get())),
        ("400", sessions.refused_bad_request.get()),
        ("401", sessions.refused_unauthorized.get()),
        ("403", sessions.refused_forbidden.get()),
        ("404", 0),
        ("408", shards(|c| c.counts.handshake_timeouts.get())),
        (
            "429",
            shards(|c| c.counts.refused_address_rate.get() + c.counts.refused_address_count.get())
                + sessions.refused_user_limit.get(),
        ),
        // The parser responds with one of several statuses from 400 to 431; one counter covers them.
        ("4xx", shards(|c| c.counts.requests_refused.get())),
        ("500", 0),
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
        let calls = hub.into_iter().flat_map(HubMetrics::refused);
        let refused: u64 = calls.filter(|(of, _)| of.to_string() == status).map(|(_, n)| n).sum();
        crate::app::admin::answered(page, "GET", "/ws", status, count + refused);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_and_names_of_the_contract_are_exported() {
        let shard = Arc::new(ShardCounters::default());
        shard.counts.sessions.set(3);
        shard.counts.upgraded.add(4);
        shard.count_end(EndReason::PeerSilent);
        shard.latency.record(7, 2);
        let sessions = Arc::new(SessionCounters::default());
        sessions.refused_forbidden.add(5);

        let mut page = MetricsPage::new("push");
        shards(vec![Arc::clone(&shard), Arc::default()], None, Arc::clone(&sessions))(&mut page);
        component("session_", sessions)(&mut page);
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
