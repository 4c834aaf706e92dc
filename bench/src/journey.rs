//! The path of an event through Kafka. The producer, a plain consumer and the client each record a part
//! of it; the conductor joins these.
//!
//! ```text
//! due ─► sent ─► appended ─► acknowledged
//!                   ├──────► consumed   (a plain consumer, with Delivery's settings, on its core)
//!                   ├──────► arrived    (through Delivery, at the client)
//!                   └──────► elsewhere  (the same, handed over to another node, at the client of that node)
//! ```
//!
//! With two nodes, `arrived` is at the client of the node that owns the partition. A plain round trip runs beside
//! each event: a record of the size of a hand-off, from before its producer to a plain consumer.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

/// The arrival of one event at the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// The session.
    pub session: u32,
    /// Sequence of the event in that session.
    pub sequence: u32,
    /// Time of the read, [`now_ns`](crate::clock::now_ns).
    pub at_ns: u64,
}

/// The times that the producer and the plain consumer recorded for one event, as
/// [`now_ns`](crate::clock::now_ns).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passage {
    /// The recipient.
    pub session: u32,
    /// Sequence of the event in that session.
    pub sequence: u32,
    /// Time at which it was due.
    pub due_ns: u64,
    /// Time at which it entered the producer's queue.
    pub sent_ns: u64,
    /// Time of the append by the broker's clock (`LogAppendTime`). The broker reads it before the append
    /// and rounds it down to a millisecond, so durations from here are never too short.
    pub appended_ns: u64,
    /// Time of the producer's callback, which is after the append. Durations from here are too short by
    /// the time of the answer, and may be negative.
    pub acknowledged_ns: u64,
    /// Time at which the plain consumer received it.
    pub consumed_ns: u64,
    /// Its partition.
    pub partition: i32,
    /// Number of the node that owns the partition.
    pub owner: u8,
    /// Duration of the plain round trip that began next; 0: none.
    pub round_trip_ns: u64,
}

/// A part of the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Delay of the generator.
    DueToSent,
    /// The producer until the append: linger time, queue, request.
    SentToAppended,
    /// The producer and the broker until the answer.
    SentToAcknowledged,
    /// A plain consumer.
    AppendedToConsumed,
    /// Delivery, up to the client's read.
    AppendedToArrived,
    /// The same, counted from the answer.
    AcknowledgedToArrived,
    /// Delivery and the client compared with the plain consumer; negative if they were earlier.
    ConsumedToArrived,
    /// Delivery, handed over, up to the read of the client on the other node.
    AppendedToElsewhere,
    /// What the hand-off adds for the same event.
    ArrivedToElsewhere,
    /// A plain round trip.
    RoundTrip,
    /// `AppendedToArrived` and the round trip that began next, added for each event.
    ArrivedAndRoundTrip,
}

impl Part {
    /// All parts in order.
    pub const ALL: [Self; 11] = [
        Self::DueToSent,
        Self::SentToAppended,
        Self::SentToAcknowledged,
        Self::AppendedToConsumed,
        Self::AppendedToArrived,
        Self::AcknowledgedToArrived,
        Self::ConsumedToArrived,
        Self::AppendedToElsewhere,
        Self::ArrivedToElsewhere,
        Self::RoundTrip,
        Self::ArrivedAndRoundTrip,
    ];

    /// Title in the table.
    pub fn title(self) -> &'static str {
        match self {
            Self::DueToSent => "due → in the producer's queue",
            Self::SentToAppended => "→ appended",
            Self::SentToAcknowledged => "in the producer's queue → acknowledged",
            Self::AppendedToConsumed => "appended → read by a plain consumer",
            Self::AppendedToArrived => "appended → read by the client, through Delivery",
            Self::AcknowledgedToArrived => "acknowledged → read by the client, through Delivery",
            Self::ConsumedToArrived => "plain consumer → client, through Delivery",
            Self::AppendedToElsewhere => "appended → read by the client on the other node",
            Self::ArrivedToElsewhere => "client on the owner → client on the other node",
            Self::RoundTrip => {
                "plain round trip: in the producer's queue → read by a plain consumer"
            }
            Self::ArrivedAndRoundTrip => {
                "appended → client on the owner, and a round trip: added event by event"
            }
        }
    }

    /// `None`: there is one node, so the part does not exist.
    fn ns(self, passage: &Passage, arrived_ns: u64, elsewhere_ns: Option<u64>) -> Option<i64> {
        let (from, to) = match self {
            Self::DueToSent => (passage.due_ns, passage.sent_ns),
            Self::SentToAppended => (passage.sent_ns, passage.appended_ns),
            Self::SentToAcknowledged => (passage.sent_ns, passage.acknowledged_ns),
            Self::AppendedToConsumed => (passage.appended_ns, passage.consumed_ns),
            Self::AppendedToArrived => (passage.appended_ns, arrived_ns),
            Self::AcknowledgedToArrived => (passage.acknowledged_ns, arrived_ns),
            Self::ConsumedToArrived => (passage.consumed_ns, arrived_ns),
            Self::AppendedToElsewhere => (passage.appended_ns, elsewhere_ns?),
            Self::ArrivedToElsewhere => (arrived_ns, elsewhere_ns?),
            Self::RoundTrip => elsewhere_ns.map(|_| (0, passage.round_trip_ns))?,
            Self::ArrivedAndRoundTrip => {
                elsewhere_ns.map(|_| (passage.appended_ns, arrived_ns + passage.round_trip_ns))?
            }
        };
        Some(to.cast_signed() - from.cast_signed())
    }
}

/// A reported quantile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Quantile {
    /// Median.
    P50,
    /// 90th percentile.
    P90,
    /// 99th percentile.
    P99,
}

impl Quantile {
    /// All in ascending order.
    pub const ALL: [Self; 3] = [Self::P50, Self::P90, Self::P99];

    fn share(self) -> f64 {
        match self {
            Self::P50 => 0.5,
            Self::P90 => 0.9,
            Self::P99 => 0.99,
        }
    }
}

/// Durations of one part, sorted, ns.
pub struct Durations(Vec<i64>);

impl Durations {
    /// A quantile, µs; 0 if there are no durations.
    pub fn quantile_us(&self, quantile: Quantile) -> f64 {
        let rank = (self.0.len() as f64 * quantile.share()).ceil() as usize;
        self.0.get(rank.saturating_sub(1)).map_or(0.0, |ns| *ns as f64 / 1000.0)
    }
}

/// Durations of every part, for the events that all have recorded: producer, plain consumer, and the client of
/// each node. With two nodes, the plain round trip as well.
pub fn parts(passages: &[Passage], arrivals: &[Vec<Arrival>]) -> Vec<(Part, Durations)> {
    let by_node: Vec<HashMap<(u32, u32), u64>> = arrivals
        .iter()
        .map(|arrivals| {
            let of = |arrival: &Arrival| ((arrival.session, arrival.sequence), arrival.at_ns);
            arrivals.iter().map(of).collect()
        })
        .collect();
    let is_whole = |passage: &&Passage| {
        let tripped = by_node.len() == 1 || passage.round_trip_ns > 0;
        passage.acknowledged_ns > 0 && passage.consumed_ns > 0 && tripped
    };
    let mut observed = Vec::new();
    for passage in passages.iter().filter(is_whole) {
        let at = |node: &HashMap<_, u64>| node.get(&(passage.session, passage.sequence)).copied();
        let Some(mut times) = by_node.iter().map(at).collect::<Option<Vec<u64>>>() else {
            continue;
        };
        let arrived_ns = times.remove(usize::from(passage.owner));
        observed.push((passage, arrived_ns, times.first().copied()));
    }
    let of = |part: Part| {
        let ns = |&(passage, arrived_ns, elsewhere_ns)| part.ns(passage, arrived_ns, elsewhere_ns);
        let mut durations: Vec<i64> = observed.iter().filter_map(ns).collect();
        durations.sort_unstable();
        (part, Durations(durations))
    };
    Part::ALL.into_iter().map(of).filter(|(_, durations)| !durations.0.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passage(sequence: u32) -> Passage {
        Passage {
            session: 7,
            sequence,
            due_ns: 1_000,
            sent_ns: 3_000,
            appended_ns: 10_000,
            acknowledged_ns: 20_000,
            consumed_ns: 18_000,
            ..Passage::default()
        }
    }

    fn arrival(sequence: u32, at_ns: u64) -> Arrival {
        Arrival { session: 7, sequence, at_ns }
    }

    fn quantile(parts: &[(Part, Durations)], wanted: Part, quantile: Quantile) -> f64 {
        let (_, durations) = parts.iter().find(|(part, _)| *part == wanted).unwrap();
        assert_eq!(durations.0.len(), 2);
        durations.quantile_us(quantile)
    }

    #[test]
    fn parts_join_the_times_of_the_same_event() {
        let arrivals = vec![arrival(2, 17_000), arrival(1, 25_000), arrival(9, 1)];
        let parts = parts(&[passage(1), passage(2), passage(3)], &[arrivals]);
        let median = |wanted: Part| quantile(&parts, wanted, Quantile::P50);
        assert_eq!(median(Part::DueToSent), 2.0);
        assert_eq!(median(Part::SentToAppended), 7.0);
        assert_eq!(median(Part::SentToAcknowledged), 17.0);
        assert_eq!(median(Part::AppendedToConsumed), 8.0);
        assert_eq!(median(Part::AppendedToArrived), 7.0);
        assert_eq!(quantile(&parts, Part::AppendedToArrived, Quantile::P99), 15.0);
        assert_eq!(median(Part::AcknowledgedToArrived), -3.0);
        assert_eq!(quantile(&parts, Part::ConsumedToArrived, Quantile::P90), 7.0);
        assert!(parts.iter().all(|(part, _)| *part < Part::AppendedToElsewhere));
    }

    #[test]
    fn an_event_arrives_at_the_client_of_its_owner_and_elsewhere() {
        // Node 1 owns the partition of the first event, node 0 that of the second.
        let first = Passage { owner: 1, round_trip_ns: 2_000, ..passage(1) };
        let second = Passage { owner: 0, round_trip_ns: 4_000, ..passage(2) };
        let at_node_0 = vec![arrival(1, 31_000), arrival(2, 22_000)];
        let at_node_1 = vec![arrival(1, 21_000), arrival(2, 33_000)];
        let parts = parts(&[first, second], &[at_node_0, at_node_1]);
        let both = |wanted| [Quantile::P50, Quantile::P99].map(|at| quantile(&parts, wanted, at));
        assert_eq!(both(Part::AppendedToArrived), [11.0, 12.0]);
        assert_eq!(both(Part::AppendedToElsewhere), [21.0, 23.0]);
        assert_eq!(both(Part::ArrivedToElsewhere), [10.0, 11.0]);
        assert_eq!(both(Part::RoundTrip), [2.0, 4.0]);
        assert_eq!(both(Part::ArrivedAndRoundTrip), [13.0, 16.0]);
    }

    #[test]
    fn events_that_not_all_recorded_are_left_out() {
        let unseen = Passage { consumed_ns: 0, ..passage(1) };
        assert!(parts(&[unseen], &[vec![arrival(1, 25_000)]]).is_empty());
        let untripped = [Passage { round_trip_ns: 0, ..passage(1) }];
        assert!(!parts(&untripped, &[vec![arrival(1, 25_000)]]).is_empty());
        assert!(
            parts(&untripped, &[vec![arrival(1, 25_000)], vec![arrival(1, 26_000)]]).is_empty()
        );
        let tripped = [Passage { round_trip_ns: 1, ..passage(1) }];
        assert!(parts(&tripped, &[vec![arrival(1, 25_000)], Vec::new()]).is_empty());
    }
}
