//! A hub with the other ends of its rings in a test's hands.

use std::num::NonZeroU64;
use std::sync::Arc;

use super::{Hub, HubConfig, HubHandle, HubMetrics, HubPeer, hub};
use crate::domain::command::{DeliveryClass, Recipients, ShardCommand, ShardReport, Ticket};
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::ids::{ConnectionKey, ConversationKey, ConversationPosition};
use crate::handoff::{Consumer, Doorbell, Producer, Pushed, ring};
use crate::service::runtime::bell::AsyncBell;

/// What a peer of the hub holds.
pub(crate) struct Peer {
    commands: Producer<ShardCommand>,
    reports: Consumer<ShardReport>,
    bell: AsyncBell,
}

/// A hub that does not run yet, and its two peers: the session manager and a router.
pub(crate) fn rig(config: HubConfig, slots: usize) -> (HubHandle, Hub, [Peer; 2]) {
    let bell = Arc::new(Doorbell::new().unwrap());
    let (mut peers, mut hub_peers) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let (commands, commands_of_hub) = ring(slots, Arc::clone(&bell));
        let own_bell = Arc::new(Doorbell::new().unwrap());
        let (reports_of_hub, reports) = ring(slots, Arc::clone(&own_bell));
        peers.push(Peer { commands, reports, bell: AsyncBell::new(own_bell).unwrap() });
        hub_peers.push(HubPeer { commands: commands_of_hub, reports: reports_of_hub });
    }
    let metrics = Arc::new(HubMetrics::default());
    let (handle, hub) = hub(config, hub_peers, bell, metrics).unwrap();
    let Ok(peers) = <[Peer; 2]>::try_from(peers) else { unreachable!("two were made") };
    (handle, hub, peers)
}

impl Peer {
    pub(crate) fn send(&mut self, command: ShardCommand) {
        let Pushed::Accepted = self.commands.push(command) else {
            panic!("the ring is full or the hub has ended");
        };
        self.commands.publish();
    }

    pub(crate) fn try_report(&mut self) -> Option<ShardReport> {
        self.reports.pop()
    }

    pub(crate) async fn report(&mut self) -> ShardReport {
        loop {
            self.bell.about_to_sleep();
            if let Some(report) = self.reports.pop() {
                self.bell.awake();
                return report;
            }
            self.bell.rung().await;
            self.bell.awake();
        }
    }

    pub(crate) async fn opened(&mut self) -> ConnectionKey {
        match self.report().await {
            ShardReport::Opened { connection, .. } => connection,
            other => panic!("not an opening: {other:?}"),
        }
    }

    pub(crate) fn deliver(
        &mut self,
        to: ConnectionKey,
        event: Event,
        class: DeliveryClass,
        ticket: u64,
    ) {
        self.send(ShardCommand::Deliver {
            event: Arc::new(event),
            recipients: Recipients::One(to, Encoding::Stream),
            class,
            ticket: NonZeroU64::new(ticket).map(Ticket),
        });
    }

    pub(crate) fn release(&mut self, connection: ConnectionKey, position: ConversationPosition) {
        self.send(ShardCommand::GoLive { connection, delivered: Box::new([position]) });
    }
}

/// A message of a conversation as the router makes it.
pub(crate) fn event(conversation: ConversationKey, sequence: i64, bytes: &[u8]) -> Event {
    Event::new(Some(ConversationPosition { conversation, sequence }), 1)
        .with_frame(Encoding::Stream, bytes.into())
}
