//! A hub for tests, with the peers' ends of its rings.

use std::num::NonZeroU64;
use std::sync::Arc;

use super::{Hub, HubConfig, HubHandle, HubMetrics};
use crate::domain::caught_up::{CaughtUp, SequenceRun};
use crate::domain::command::{DeliveryClass, Recipients, ShardCommand, ShardReport, Ticket};
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::ids::{ConnectionKey, ConversationKey, ConversationPosition};
use crate::handoff::{Doorbell, PeerEnd, Pushed, connect};
use crate::service::runtime::bell::AsyncBell;

/// A test's end of the rings to and from the hub.
pub(crate) struct TestPeer {
    end: PeerEnd,
    bell: AsyncBell,
}

/// A hub that is not running yet, and its peers: the session manager and one router.
pub(crate) fn hub_with_peers(
    config: HubConfig,
    ring_slots: usize,
) -> (HubHandle, Hub, [TestPeer; 2]) {
    let bell = Arc::new(Doorbell::new().unwrap());
    let (mut peers, mut hub_peers) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let peer_bell = Arc::new(Doorbell::new().unwrap());
        let (end, hub_end) = connect([ring_slots; 2], &bell, &peer_bell);
        peers.push(TestPeer { end, bell: AsyncBell::new(peer_bell).unwrap() });
        hub_peers.push(hub_end);
    }
    let metrics = Arc::new(HubMetrics::default());
    let (handle, hub) = Hub::new(config, hub_peers, bell, metrics).unwrap();
    let Ok(peers) = <[TestPeer; 2]>::try_from(peers) else { unreachable!("the loop made two") };
    (handle, hub, peers)
}

impl TestPeer {
    pub(crate) fn send(&mut self, command: ShardCommand) {
        let Pushed::Accepted = self.end.commands.push(command) else {
            panic!("the ring is full or the hub has ended");
        };
        self.end.commands.publish();
    }

    pub(crate) fn has_room(&self) -> bool {
        self.end.commands.free() > 0
    }

    pub(crate) fn try_report(&mut self) -> Option<ShardReport> {
        self.end.reports.pop()
    }

    pub(crate) async fn report(&mut self) -> ShardReport {
        loop {
            self.bell.about_to_sleep();
            if let Some(report) = self.end.reports.pop() {
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
            other => panic!("expected an opening: {other:?}"),
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
            recipients: Recipients::One((to, Encoding::Stream)),
            class,
            ticket: NonZeroU64::new(ticket).map(Ticket),
        });
    }

    /// Completes the catch-up of a conversation, which has delivered these runs of sequences.
    pub(crate) fn go_live(
        &mut self,
        connection: ConnectionKey,
        conversation: ConversationKey,
        runs: &[(i64, i64)],
    ) {
        let run =
            |(first, last): &(i64, i64)| SequenceRun { conversation, first: *first, last: *last };
        let delivered = CaughtUp::new(Some(conversation), runs.iter().map(run).collect());
        self.send(ShardCommand::GoLive { connection, delivered: Box::new(delivered) });
    }
}

/// A message event of a conversation.
pub(crate) fn event(conversation: ConversationKey, sequence: i64, bytes: &[u8]) -> Event {
    Event::new(Some(ConversationPosition { conversation, sequence }), 1)
        .with_frame(Encoding::Stream, bytes.into())
}
