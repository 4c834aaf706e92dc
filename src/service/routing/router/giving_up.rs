//! Records that cannot be routed.

use std::sync::Arc;
use std::time::Instant;

use crate::service::routing::router::WARNING_INTERVAL;
use crate::service::routing::router::core::{Arrival, RouteOutcome, RouterCore};
use crate::service::routing::router::dead_letter::{DeadLetter, DeadLetterReason};
use crate::service::routing::router::in_flight::ReturnedTicket;
use crate::service::routing::router::lane::Blocked;
use crate::service::routing::router::partition::TopicPartition;
use crate::service::routing::router::record::RawRecord;

impl RouterCore {
    /// Gives a record up: sends it to the dead-letter topic, or counts and skips it.
    pub(super) fn give_up(
        &mut self,
        raw: RawRecord<'_>,
        arrival: Arrival<'_>,
        reason: DeadLetterReason,
        now_ms: u64,
    ) -> RouteOutcome {
        let Arrival::Partition { log, record, .. } = arrival else {
            self.counters.remote_given_up.add(1);
            return RouteOutcome::Done;
        };
        let Some(dead_letters) = &self.dead_letters else {
            self.count_given_up(reason);
            self.warn(log, raw.offset, reason);
            return RouteOutcome::Done;
        };
        let ticket = self.in_flight.open(record, now_ms);
        let (returned, bell) = (self.returned.clone(), Arc::clone(&self.bell));
        let done = Box::new(move || {
            let _ = returned.send(ReturnedTicket::DeadLetter(ticket));
            bell.ring();
        });
        let letter = DeadLetter { log, raw, reason };
        if !dead_letters.send(letter, done) {
            let sealed = self.in_flight.seal(ticket);
            debug_assert!(sealed.is_some());
            return RouteOutcome::Blocked(Blocked::DeadLetter);
        }
        self.in_flight.expect_elsewhere(ticket);
        self.counters.dead_letters.add(1);
        self.count_given_up(reason);
        self.warn(log, raw.offset, reason);
        RouteOutcome::InFlight(ticket)
    }

    fn count_given_up(&self, reason: DeadLetterReason) {
        match reason {
            DeadLetterReason::Undecodable(_) => self.counters.records_undecodable.add(1),
            DeadLetterReason::NoConversation => self.counters.records_without_conversation.add(1),
            DeadLetterReason::NoSuchConversation => {
                self.counters.records_conversation_absent.add(1)
            }
            DeadLetterReason::MembersUnknown => self.counters.records_members_unknown.add(1),
            DeadLetterReason::MembersUnavailable => {
                self.counters.records_members_unavailable.add(1)
            }
        }
    }

    fn warn(&mut self, log: &TopicPartition, offset: i64, reason: DeadLetterReason) {
        let now = Instant::now();
        if self.warned.is_some_and(|at| now.duration_since(at) < WARNING_INTERVAL) {
            return;
        }
        self.warned = Some(now);
        tracing::warn!(
            topic = &*log.topic,
            partition = log.partition,
            offset,
            %reason,
            "record not routed (at most one such line per second; the metrics count all)"
        );
    }
}
