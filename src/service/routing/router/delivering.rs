//! Pushes an event to the shards of its recipients.

use std::sync::Arc;

use crate::domain::command::Ticket;
use crate::domain::ids::ConversationPosition;
use crate::service::events::envelope::DecodedEvent;
use crate::service::routing::router::core::RouterCore;

impl RouterCore {
    /// Encodes the event for the gathered recipients and pushes it. `at`: its
    /// [`log_position`](crate::service::events::conversation_key::log_position). Returns the number of shards that will
    /// report.
    pub(super) fn deliver(
        &mut self,
        record: &DecodedEvent<'_>,
        at: Option<ConversationPosition>,
        appended_at_ms: u64,
        ticket: Option<Ticket>,
    ) -> u32 {
        if self.links.concerned() == 0 {
            return 0;
        }
        let mut event = self.encoder.encode(record, self.links.encodings(), appended_at_ms);
        event.log_position = at;
        self.count_reduced(record);
        let event = event.charged_to(&self.budget);
        self.counters.deliveries.add(self.links.concerned() as u64);
        self.counters.recipients.add(self.links.recipients() as u64);
        self.links.deliver(&Arc::new(event), ticket, &self.budget)
    }

    /// Counts an event that JSON or `DeliveryEvent` could not hold, and logs the first ones.
    fn count_reduced(&mut self, record: &DecodedEvent<'_>) {
        let reduced = self.encoder.take_reduced();
        if reduced == 0 {
            return;
        }
        self.counters.events_reduced.add(reduced);
        let events = self.counters.events_reduced.get();
        // Each line after twice as many.
        if events.is_power_of_two() {
            tracing::warn!(
                conversation = record.conversation().unwrap_or_default(),
                event_type = record.event_type,
                events,
                "an event has a text that is not UTF-8 or a time outside the years 1 to 9999: JSON clients get its \
                 payload as base64, gRPC clients only its position"
            );
        }
    }
}
