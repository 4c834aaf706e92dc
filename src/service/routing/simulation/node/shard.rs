//! The shard of a simulated node, and what its sessions have missed.

use prost::Message as _;

use super::{SimulatedNode, address};
use crate::domain::command::{ShardCommand, ShardReport};
use crate::domain::cursor::{Cursor, RoutedPositions};
use crate::domain::encoding::Encoding;
use crate::handoff::{Pushed, ShardEnd};
use crate::service::events::proto::message::v1::MessageSentEvent;
use crate::service::events::proto::shared::v1::EventEnvelope;
use crate::service::routing::replays::{ReplayReader, TailReplays as _};
use crate::service::routing::simulation::logs::{Device, PARTITIONS, user_name};

impl SimulatedNode {
    /// The shard takes what the routers have pushed.
    pub(in crate::service::routing::simulation) fn turn_shards(&mut self) {
        for router in &mut self.routers {
            Self::take_commands(&mut self.delivered, &mut self.shard_positions, &mut router.shard);
        }
    }

    /// A cursor for the live sessions. `None`: nothing is known to be routed.
    pub(in crate::service::routing::simulation) fn cursor(&self) -> Option<Cursor> {
        self.shard_positions.cursor()
    }

    /// What a session has missed since a cursor.
    pub(in crate::service::routing::simulation) fn replay(
        &self,
        slot: u32,
        device: Device,
        since: Option<Cursor>,
    ) -> ReplayReader {
        self.replays.replay(address(slot), user_name(device.0).into(), since)
    }

    fn take_commands(
        delivered: &mut Vec<(u32, usize, i64)>,
        positions: &mut RoutedPositions,
        shard: &mut ShardEnd,
    ) {
        while let Some(command) = shard.commands.pop() {
            let (event, recipients, ticket) = match command {
                ShardCommand::Deliver { event, recipients, ticket, .. } => {
                    (event, recipients, ticket)
                }
                ShardCommand::Routed { positions: newer } => {
                    positions.update(&newer);
                    continue;
                }
                _ => continue,
            };
            let frame = event.frame(Encoding::Binary).expect("encoded for its recipients");
            // A short frame has a header of two bytes, a longer one of four.
            let value = if frame[1] < 126 { &frame[2..] } else { &frame[4..] };
            let envelope = EventEnvelope::decode(value).expect("the value of a record");
            let event = MessageSentEvent::decode(envelope.payload).expect("a message");
            let message = event.message.expect("present");
            let name = message.conversation_id.strip_prefix("conversation-").expect("ours");
            let conversation: usize = name.parse().expect("a number");
            for (connection, _) in recipients.iter() {
                delivered.push((connection.slot, conversation % PARTITIONS, message.sequence));
            }
            if let Some(ticket) = ticket {
                let reported = shard.reports.push(ShardReport::Done { ticket });
                assert!(matches!(reported, Pushed::Accepted));
            }
        }
        shard.reports.publish();
    }
}
