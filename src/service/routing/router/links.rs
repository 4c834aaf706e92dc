//! The ring pairs to the shards, and the recipients of one event while they are gathered.

use std::sync::Arc;

use crate::domain::command::{DeliveryClass, Recipients, ShardCommand, ShardReport, Ticket};
use crate::domain::encoding::{Encoding, EncodingSet};
use crate::domain::event::Event;
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use crate::handoff::{Consumer, Producer, Pushed};

/// The ring to one shard and the ring from it.
#[derive(Debug)]
pub struct ShardLink {
    /// Commands to the shard.
    pub commands: Producer<ShardCommand>,
    /// Its reports.
    pub reports: Consumer<ShardReport>,
}

/// See the module. What is gathered for one event is forgotten with the next.
#[derive(Debug)]
pub(super) struct RouterLinks {
    links: Vec<ShardLink>,
    /// Per shard the recipients of the event at hand; the room is kept.
    gathered: Vec<Vec<(ConnectionKey, Encoding)>>,
    /// Shards with recipients.
    concerned: Vec<ShardId>,
    encodings: EncodingSet,
    recipients: usize,
}

impl RouterLinks {
    pub(super) fn new(links: Vec<ShardLink>) -> Self {
        let gathered = links.iter().map(|_| Vec::new()).collect();
        Self {
            links,
            gathered,
            concerned: Vec::new(),
            encodings: EncodingSet::default(),
            recipients: 0,
        }
    }

    /// Begins a new event.
    pub(super) fn clear(&mut self) {
        for shard in self.concerned.drain(..) {
            self.gathered[shard.index()].clear();
        }
        self.encodings = EncodingSet::default();
        self.recipients = 0;
    }

    /// Adds a session; none twice.
    pub(super) fn gather(&mut self, session: SessionAddress) {
        let gathered = &mut self.gathered[session.shard.index()];
        if gathered.is_empty() {
            self.concerned.push(session.shard);
        }
        gathered.push((session.connection, session.encoding));
        self.encodings.insert(session.encoding);
        self.recipients += 1;
    }

    /// What the gathered sessions want between them.
    pub(super) fn encodings(&self) -> EncodingSet {
        self.encodings
    }

    /// How many sessions are gathered.
    pub(super) fn recipients(&self) -> usize {
        self.recipients
    }

    /// Memory of the lists of recipients, bytes.
    pub(super) fn recipients_bytes(&self) -> u64 {
        (self.recipients * size_of::<(ConnectionKey, Encoding)>()) as u64
    }

    /// Shards among the gathered sessions.
    pub(super) fn concerned(&self) -> usize {
        self.concerned.len()
    }

    /// A shard concerned whose ring is full.
    pub(super) fn full(&self) -> Option<ShardId> {
        self.concerned.iter().copied().find(|shard| !self.has_room(*shard))
    }

    /// Whether the ring to a shard has room.
    pub(super) fn has_room(&self, shard: ShardId) -> bool {
        self.links[shard.index()].commands.free() > 0
    }

    /// Pushes the event to the shards concerned, each of which has room. Returns how many took
    /// it: a shard that has ended has no sessions left to deliver to.
    pub(super) fn deliver(&mut self, event: &Arc<Event>, ticket: Option<Ticket>) -> u32 {
        let mut taken = 0;
        for shard in &self.concerned {
            let recipients = match self.gathered[shard.index()][..] {
                [(connection, encoding)] => Recipients::One(connection, encoding),
                ref many => Recipients::Many(many.into()),
            };
            let command = ShardCommand::Deliver {
                event: Arc::clone(event),
                recipients,
                class: DeliveryClass::Live,
                ticket,
            };
            match self.links[shard.index()].commands.push(command) {
                Pushed::Accepted => taken += 1,
                Pushed::Closed(_) => {}
                Pushed::Full(_) => unreachable!("the only producer has seen room"),
            }
        }
        taken
    }

    /// Wakes the shards that were given something.
    pub(super) fn publish(&mut self) {
        for link in &mut self.links {
            link.commands.publish();
        }
    }

    /// The next report of any shard that concerns a router.
    pub(super) fn next_done(&mut self) -> Option<Ticket> {
        for link in &mut self.links {
            while let Some(report) = link.reports.pop() {
                match report {
                    ShardReport::Done { ticket } => return Some(ticket),
                    // What concerns connections goes to the session manager.
                    ShardReport::Stopped
                    | ShardReport::Opened { .. }
                    | ShardReport::Message { .. }
                    | ShardReport::Resume { .. }
                    | ShardReport::GraceExpired { .. }
                    | ShardReport::Ended { .. } => {}
                }
            }
        }
        None
    }
}
