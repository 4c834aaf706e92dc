//! The model of the service side: a session manager and two routers with their rings, slow or fast
//! depending on the seed.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::sync::Arc;

use hashbrown::HashMap;

use super::session::ModelEvent;
use super::trace::{TraceEvent, note};
use super::wire;
use crate::domain::command::{DeliveryClass, Recipients, ShardCommand, ShardReport, Ticket};
use crate::domain::cursor::{LogPosition, TopicId, UNCHECKED};
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::ids::{ConnectionKey, ConversationKey, ConversationPosition};
use crate::handoff::{Doorbell, PeerEnd, Pushed, ShardEnd, connect};
use crate::protocol::frame::{self, Opcode};
use crate::reactor::simulation::random::Random;

/// Session manager and routers.
pub(super) const PEERS: usize = 3;
/// The topic of the routers: each has a partition.
pub(super) const LOG: TopicId = TopicId(1);
/// Conversations per router.
const CONVERSATIONS: u64 = 4;

/// A peer's ends of its rings.
#[derive(Debug)]
pub(super) struct ModelPeer {
    end: PeerEnd,
    /// Commands that found the ring full, in order.
    pub(super) backlog: VecDeque<ShardCommand>,
    /// The last sequence of each conversation.
    sequences: [i64; CONVERSATIONS as usize],
    /// The offset of the router's next event.
    pub(super) next_offset: i64,
    /// The position that it pushed last.
    pub(super) routed: i64,
    pub(super) stopped: bool,
}

/// A delivery that has not been reported done.
#[derive(Debug)]
pub(super) struct Outstanding {
    pub(super) peer: usize,
    pub(super) recipients: Vec<ConnectionKey>,
    pub(super) number: u64,
}

#[derive(Debug)]
pub(super) struct Service {
    pub(super) peers: Vec<ModelPeer>,
    pub(super) outstanding: HashMap<u64, Outstanding>,
    next_number: u64,
    /// Something was published since the shard's last turn.
    pub(super) rang: bool,
    /// Number of deliveries pushed, and of their recipients.
    pub(super) pushed: (u64, u64),
}

impl Service {
    /// The service side, and the shard's ends of the rings.
    pub(super) fn new(slots: usize, shard_bell: &Arc<Doorbell>) -> (Self, Vec<ShardEnd>) {
        let bell = Arc::new(Doorbell::new().expect("a descriptor"));
        let (peers, rings) = (0..PEERS)
            .map(|_| {
                let (end, shard_end) = connect([slots; 2], shard_bell, &bell);
                let peer = ModelPeer {
                    end,
                    backlog: VecDeque::new(),
                    sequences: [0; CONVERSATIONS as usize],
                    next_offset: 0,
                    routed: -1,
                    stopped: false,
                };
                (peer, shard_end)
            })
            .unzip();
        let service = Self {
            peers,
            outstanding: HashMap::new(),
            next_number: 0,
            rang: false,
            pushed: (0, 0),
        };
        (service, rings)
    }

    /// Pushes in order. What does not fit waits in the backlog, as it would in a paused partition.
    pub(super) fn command(&mut self, peer: usize, command: ShardCommand) {
        self.peers[peer].backlog.push_back(command);
        self.push_backlog(peer);
    }

    pub(super) fn push_backlog(&mut self, peer: usize) {
        let ModelPeer { end: PeerEnd { commands, .. }, backlog, .. } = &mut self.peers[peer];
        while let Some(command) = backlog.pop_front() {
            match commands.push(command) {
                Pushed::Accepted => self.rang = true,
                Pushed::Full(command) => {
                    backlog.push_front(command);
                    break;
                }
                Pushed::Closed(_) => {}
            }
        }
        commands.publish();
    }

    /// Simulates the death of a peer's thread: its ends of the rings are dropped.
    pub(super) fn abandon(&mut self, peer: usize) {
        let bell = Arc::new(Doorbell::new().expect("a descriptor"));
        let peer = &mut self.peers[peer];
        peer.end = connect([1; 2], &bell, &bell).0;
        peer.backlog.clear();
        self.rang = true;
    }

    pub(super) fn report(&mut self, peer: usize) -> Option<ShardReport> {
        self.peers[peer].end.reports.pop()
    }

    /// Whether all commands and reports have been taken.
    pub(super) fn is_idle(&self) -> bool {
        let quiet = |peer: &ModelPeer| peer.backlog.is_empty() && peer.end.reports.is_empty();
        self.peers.iter().all(quiet)
    }

    /// A live event of one of this router's conversations; now and then a repeated one.
    pub(super) fn live_event(&mut self, peer: usize, random: &mut Random) -> ModelEvent {
        let stream = random.below(CONVERSATIONS as usize);
        let sequence = &mut self.peers[peer].sequences[stream];
        let again = random.chance(8);
        if !again {
            *sequence += 1;
        }
        let position = ConversationPosition {
            conversation: ConversationKey(peer as u64 * CONVERSATIONS + stream as u64),
            sequence: if again { (*sequence - random.below(5) as i64).max(1) } else { *sequence },
        };
        let position = Some(position).filter(|_| !random.chance(40));
        let mut event = self.event(DeliveryClass::Live, position, random);
        event.offset = Some(self.peers[peer].next_offset);
        self.peers[peer].next_offset += 1;
        event
    }

    /// A router pushes its position, behind its events.
    pub(super) fn push_routed(&mut self, peer: usize) {
        let next = self.peers[peer].next_offset;
        if self.peers[peer].routed == next {
            return;
        }
        self.peers[peer].routed = next;
        let partition = peer as u32 - 1;
        let position = LogPosition { topic: LOG, partition, next, check: UNCHECKED };
        note(TraceEvent::Pushes(0, "Routed", next as usize));
        self.command(peer, ShardCommand::Routed { positions: Box::new([position]) });
    }

    /// The next offset of each router.
    pub(super) fn ends(&self) -> Vec<i64> {
        self.peers[1..].iter().map(|peer| peer.next_offset).collect()
    }

    /// The positions that the routers pushed last.
    pub(super) fn routed(&self) -> Vec<i64> {
        self.peers[1..].iter().map(|peer| peer.routed).collect()
    }

    /// Caught-up messages of one conversation: from some messages back to perhaps a little beyond
    /// the router's last. Some are missing: the message service commits them later.
    pub(super) fn catch_up(&mut self, random: &mut Random) -> Vec<ModelEvent> {
        let peer = 1 + random.below(PEERS - 1);
        let stream = random.below(CONVERSATIONS as usize);
        let last = self.peers[peer].sequences[stream] + random.below(3) as i64;
        let first = (last - random.below(6) as i64).max(1);
        (first..=last)
            .filter(|_| !random.chance(64))
            .collect::<Vec<_>>()
            .into_iter()
            .map(|sequence| {
                let conversation = ConversationKey(peer as u64 * CONVERSATIONS + stream as u64);
                let position = ConversationPosition { conversation, sequence };
                self.event(DeliveryClass::CatchUp, Some(position), random)
            })
            .collect()
    }

    fn event(
        &mut self,
        class: DeliveryClass,
        position: Option<ConversationPosition>,
        random: &mut Random,
    ) -> ModelEvent {
        self.next_number += 1;
        // Caught-up messages can always be encoded; some live events not in every encoding.
        let expressible = class == DeliveryClass::CatchUp || !random.chance(12);
        ModelEvent { number: self.next_number, class, position, expressible, offset: None }
    }

    /// Delivers an event to these recipients at once.
    pub(super) fn deliver(
        &mut self,
        peer: usize,
        event: &ModelEvent,
        recipients: &[(ConnectionKey, Encoding)],
        unix_ms: u64,
        random: &mut Random,
    ) {
        let padding = match random.below(64) {
            0 => random.below(40_000),
            1..=8 => random.below(3_000),
            _ => random.below(200),
        };
        let payload = wire::event_payload(event.number, padding);
        let mut ready = Event::new(event.position, unix_ms);
        if event.expressible {
            ready = ready
                .with_frame(Encoding::Binary, frame::encode(Opcode::Binary, false, &payload))
                .with_frame(Encoding::Json, frame::encode(Opcode::Text, false, &payload));
        }
        let ticket = (event.class == DeliveryClass::CatchUp || random.chance(230))
            .then(|| Ticket(NonZeroU64::new(event.number).expect("event numbers start at 1")));
        if ticket.is_some() {
            let recipients = recipients.iter().map(|(key, _)| *key).collect();
            let outstanding = Outstanding { peer, recipients, number: event.number };
            self.outstanding.insert(event.number, outstanding);
        }
        note(TraceEvent::Pushes(recipients.len(), "Deliver", event.number as usize));
        self.pushed.0 += 1;
        self.pushed.1 += recipients.len() as u64;
        let recipients = Recipients::new(recipients, None);
        let command = ShardCommand::Deliver {
            event: Arc::new(ready),
            recipients,
            class: event.class,
            ticket,
        };
        self.command(peer, command);
    }
}
