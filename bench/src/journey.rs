//! The path of an event through Kafka. The producer, a plain consumer and the client each record a part
//! of it; the conductor joins these.
//!
//! ```text
//! due ─► sent ─► appended ─► acknowledged
//!                   ├──────► consumed   (a plain consumer, with Delivery's settings, on its core)
//!                   └──────► arrived    (through Delivery, at the client)
//! ```

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
}

impl Part {
    /// All parts in order.
    pub const ALL: [Self; 7] = [
        Self::DueToSent,
        Self::SentToAppended,
        Self::SentToAcknowledged,
        Self::AppendedToConsumed,
        Self::AppendedToArrived,
        Self::AcknowledgedToArrived,
        Self::ConsumedToArrived,
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
        }
    }

    fn ns(self, passage: &Passage, arrived_ns: u64) -> i64 {
        let (from, to) = match self {
            Self::DueToSent => (passage.due_ns, passage.sent_ns),
            Self::SentToAppended => (passage.sent_ns, passage.appended_ns),
            Self::SentToAcknowledged => (passage.sent_ns, passage.acknowledged_ns),
            Self::AppendedToConsumed => (passage.appended_ns, passage.consumed_ns),
            Self::AppendedToArrived => (passage.appended_ns, arrived_ns),
            Self::AcknowledgedToArrived => (passage.acknowledged_ns, arrived_ns),
            Self::ConsumedToArrived => (passage.consumed_ns, arrived_ns),
        };
        to.cast_signed() - from.cast_signed()
    }
}

/// Durations of one part, sorted, ns.
pub struct Durations(Vec<i64>);

impl Durations {
    /// A quantile, µs; 0 if there are no durations.
    pub fn quantile_us(&self, share: f64) -> f64 {
        let rank = (self.0.len() as f64 * share).ceil() as usize;
        self.0.get(rank.saturating_sub(1)).map_or(0.0, |ns| *ns as f64 / 1000.0)
    }
}

/// Durations of every part, for the events that all three have recorded.
pub fn parts(passages: &[Passage], arrivals: &[Arrival]) -> Vec<(Part, Durations)> {
    let arrived: HashMap<(u32, u32), u64> = arrivals
        .iter()
        .map(|arrival| ((arrival.session, arrival.sequence), arrival.at_ns))
        .collect();
    let of = |part: Part| {
        let mut durations: Vec<i64> = passages
            .iter()
            .filter(|passage| passage.acknowledged_ns > 0 && passage.consumed_ns > 0)
            .filter_map(|passage| {
                let arrived_ns = *arrived.get(&(passage.session, passage.sequence))?;
                Some(part.ns(passage, arrived_ns))
            })
            .collect();
        durations.sort_unstable();
        (part, Durations(durations))
    };
    Part::ALL.into_iter().map(of).collect()
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
        }
    }

    fn arrival(sequence: u32, at_ns: u64) -> Arrival {
        Arrival { session: 7, sequence, at_ns }
    }

    #[test]
    fn parts_join_the_times_of_the_same_event() {
        let arrivals = [arrival(2, 17_000), arrival(1, 25_000), arrival(9, 1)];
        let parts = parts(&[passage(1), passage(2), passage(3)], &arrivals);
        let of = |wanted: Part, share| {
            let (_, durations) = parts.iter().find(|(part, _)| *part == wanted).unwrap();
            assert_eq!(durations.0.len(), 2);
            durations.quantile_us(share)
        };
        assert_eq!(of(Part::DueToSent, 0.5), 2.0);
        assert_eq!(of(Part::SentToAppended, 0.5), 7.0);
        assert_eq!(of(Part::SentToAcknowledged, 0.5), 17.0);
        assert_eq!(of(Part::AppendedToConsumed, 0.5), 8.0);
        assert_eq!(
            (of(Part::AppendedToArrived, 0.5), of(Part::AppendedToArrived, 0.99)),
            (7.0, 15.0)
        );
        assert_eq!(of(Part::AcknowledgedToArrived, 0.5), -3.0);
        assert_eq!(of(Part::ConsumedToArrived, 1.0), 7.0);
    }

    #[test]
    fn events_that_not_all_recorded_are_left_out() {
        let unseen = Passage { consumed_ns: 0, ..passage(1) };
        let parts = parts(&[unseen], &[arrival(1, 25_000)]);
        assert!(parts.iter().all(|(_, durations)| durations.quantile_us(0.99) == 0.0));
    }
}
