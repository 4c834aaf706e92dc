//! The ring pairs to the shards, and the recipients of the current event.

use std::sync::Arc;

use crate::domain::budget::EventBudget;
use crate::domain::command::{DeliveryClass, Recipients, ShardCommand, ShardReport, Ticket};
use crate::domain::cursor::LogPosition;
use crate::domain::encoding::{Encoding, EncodingSet};
use crate::domain::event::Event;
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use crate::handoff::{PeerEnd, Pushed};

/// A router's rings to all shards, and the recipients gathered for the current event.
#[derive(Debug)]
pub(super) struct RouterLinks {
    links: Vec<PeerEnd>,
    /// Slots of each ring.
    slots: Vec<usize>,
    /// Commands pushed to each shard.
    pushed: Vec<u64>,
    /// Recipients of the current event, per shard. The allocations are reused.
    gathered: Vec<Vec<(ConnectionKey, Encoding)>>,
    /// Shards with recipients.
    concerned: Vec<ShardId>,
    encodings: EncodingSet,
    recipients: usize,
}

impl RouterLinks {
    pub(super) fn new(links: Vec<PeerEnd>) -> Self {
        let gathered = links.iter().map(|_| Vec::new()).collect();
        // Nothing was pushed yet.
        let slots = links.iter().map(|link| link.commands.free()).collect();
        Self {
            pushed: vec![0; links.len()],
            links,
            slots,
            gathered,
            concerned: Vec::new(),
            encodings: EncodingSet::default(),
            recipients: 0,
        }
    }

    /// Removes all recipients, for a new event.
    pub(super) fn clear(&mut self) {
        for shard in self.concerned.drain(..) {
            self.gathered[shard.index()].clear();
        }
        self.encodings = EncodingSet::default();
        self.recipients = 0;
    }

    /// Adds a recipient. The caller adds each one only once.
    pub(super) fn gather(&mut self, session: SessionAddress) {
        let gathered = &mut self.gathered[session.shard.index()];
        if gathered.is_empty() {
            self.concerned.push(session.shard);
        }
        gathered.push((session.connection, session.encoding));
        self.encodings.insert(session.encoding);
        self.recipients += 1;
    }

    /// The recipients gathered.
    pub(super) fn sessions(&self) -> impl Iterator<Item = SessionAddress> {
        self.concerned.iter().flat_map(|shard| {
            self.gathered[shard.index()].iter().map(|&(connection, encoding)| SessionAddress {
                shard: *shard,
                encoding,
                connection,
            })
        })
    }

    /// Encodings of the recipients.
    pub(super) fn encodings(&self) -> EncodingSet {
        self.encodings
    }

    /// Number of recipients.
    pub(super) fn recipients(&self) -> usize {
        self.recipients
    }

    /// Number of shards with recipients.
    pub(super) fn concerned(&self) -> usize {
        self.concerned.len()
    }

    /// A shard with recipients whose ring is full.
    pub(super) fn full(&self) -> Option<ShardId> {
        self.concerned.iter().copied().find(|shard| !self.has_room(*shard))
    }

    /// Whether the ring to a shard has room.
    pub(super) fn has_room(&self, shard: ShardId) -> bool {
        self.links[shard.index()].commands.free() > 0
    }

    /// Pushes the event to every shard with recipients. The caller has checked that each ring has
    /// room. Returns the number of shards that accepted: a stopped shard has no sessions left.
    pub(super) fn deliver(
        &mut self,
        event: &Arc<Event>,
        ticket: Option<Ticket>,
        budget: &Arc<EventBudget>,
    ) -> u32 {
        let mut taken = 0;
        for shard in &self.concerned {
            let recipients = Recipients::new(&self.gathered[shard.index()], Some(budget));
            let command = ShardCommand::Deliver {
                event: Arc::clone(event),
                recipients,
                class: DeliveryClass::Live,
                ticket,
            };
            match self.links[shard.index()].commands.push(command) {
                Pushed::Accepted => {
                    self.pushed[shard.index()] += 1;
                    taken += 1;
                }
                Pushed::Closed(_) => {}
                Pushed::Full(_) => {
                    unreachable!("this is the only producer, and it checked for room")
                }
            }
        }
        taken
    }

    /// Gives these positions to all shards. Returns false if a ring is full: its shard has not got them.
    pub(super) fn tell_routed(&mut self, positions: &[LogPosition]) -> bool {
        let mut all_got = true;
        for (link, pushed) in self.links.iter_mut().zip(&mut self.pushed) {
            if link.commands.free() == 0 {
                all_got = false;
                continue;
            }
            match link.commands.push(ShardCommand::Routed { positions: positions.into() }) {
                Pushed::Accepted => *pushed += 1,
                // A stopped shard has no sessions left.
                Pushed::Closed(_) => {}
                Pushed::Full(_) => {
                    unreachable!("this is the only producer, and it checked for room")
                }
            }
        }
        all_got
    }

    /// Commands that were pushed to a shard.
    pub(super) fn pushed(&self, shard: ShardId) -> u64 {
        self.pushed[shard.index()]
    }

    /// Commands that a shard has taken. It handles each one before it takes the next.
    pub(super) fn taken(&self, shard: ShardId) -> u64 {
        let waiting = self.slots[shard.index()] - self.links[shard.index()].commands.free();
        self.pushed[shard.index()] - waiting as u64
    }

    /// Publishes what was pushed and wakes those shards.
    pub(super) fn publish(&mut self) {
        for link in &mut self.links {
            link.commands.publish();
        }
    }

    /// The ticket of the next delivery that a shard reports done.
    pub(super) fn next_done(&mut self) -> Option<Ticket> {
        for link in &mut self.links {
            while let Some(report) = link.reports.pop() {
                match report {
                    ShardReport::Done { ticket } => return Some(ticket),
                    // Sent to the session manager only.
                    ShardReport::Stopped
                    | ShardReport::Opened { .. }
                    | ShardReport::Message { .. }
                    | ShardReport::Resume { .. }
                    | ShardReport::GraceExpired { .. }
                    | ShardReport::ResumeSince { .. }
                    | ShardReport::Fence
                    | ShardReport::Ended { .. } => {}
                }
            }
        }
        None
    }
}
