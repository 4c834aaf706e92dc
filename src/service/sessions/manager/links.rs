//! The session manager's end of the rings to one shard.

use std::collections::VecDeque;

use crate::domain::command::{ShardCommand, ShardReport};
use crate::handoff::{Consumer, Producer, Pushed};

/// The rings between the session manager and one shard (or the gRPC hub).
#[derive(Debug)]
pub struct ShardPort {
    /// To the shard.
    pub commands: Producer<ShardCommand>,
    /// From it; its bell is the one of [`super::SessionPorts`].
    pub reports: Consumer<ShardReport>,
}

/// A port, and what waits while its ring is full.
///
/// The waiting queue needs no bound of its own: what enters it is bounded where it comes from. A
/// connection is sent at most one answer to its handshake, one close, one release and one answer
/// for each of its own messages (whose rate the shard bounds); catch-up has a chunk of one page for
/// each page under way (`catch_up::CatchUpConfig`); orders to the shard are two.
#[derive(Debug)]
pub(super) struct ShardLink {
    port: ShardPort,
    waiting: VecDeque<ShardCommand>,
    /// The shard has said that it ends, or its rings are gone.
    pub(super) stopped: bool,
}

impl ShardLink {
    pub(super) fn new(port: ShardPort) -> Self {
        Self { port, waiting: VecDeque::new(), stopped: false }
    }

    /// Sends in order, now or when there is room. What is sent to a shard that has ended concerns
    /// connections that have ended, and goes.
    pub(super) fn send(&mut self, command: ShardCommand) {
        if self.stopped {
            return;
        }
        if !self.waiting.is_empty() {
            self.waiting.push_back(command);
            return;
        }
        match self.port.commands.push(command) {
            Pushed::Accepted | Pushed::Closed(_) => {}
            Pushed::Full(command) => self.waiting.push_back(command),
        }
    }

    /// Pushes what waits as far as there is room, and wakes the shard.
    pub(super) fn flush(&mut self) {
        while let Some(command) = self.waiting.pop_front() {
            match self.port.commands.push(command) {
                Pushed::Accepted => {}
                Pushed::Full(command) => {
                    self.waiting.push_front(command);
                    break;
                }
                Pushed::Closed(_) => self.waiting.clear(),
            }
        }
        if self.waiting.is_empty() && self.waiting.capacity() > WAITING_KEPT {
            self.waiting.shrink_to(WAITING_KEPT);
        }
        self.port.commands.publish();
    }

    /// The oldest report.
    pub(super) fn report(&mut self) -> Option<ShardReport> {
        self.port.reports.pop()
    }

    /// Whether a report waits, or the shard went without a word.
    pub(super) fn is_ready(&self) -> bool {
        !self.stopped && (!self.port.reports.is_empty() || self.port.reports.is_abandoned())
    }

    /// Whether the shard is gone and has nothing more to say.
    pub(super) fn is_lost(&self) -> bool {
        !self.stopped && self.port.reports.is_abandoned() && self.port.reports.is_empty()
    }

    /// Commands that wait for room.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

/// Capacity of a waiting queue that is kept after a storm, commands.
const WAITING_KEPT: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::ConnectionKey;
    use crate::handoff::{Doorbell, ring};
    use std::sync::Arc;

    #[test]
    fn commands_keep_their_order_over_a_full_ring() {
        let bell = Arc::new(Doorbell::new().unwrap());
        let (commands, mut shard) = ring(2, Arc::clone(&bell));
        let (_reports, reports) = ring(2, bell);
        let mut link = ShardLink::new(ShardPort { commands, reports });
        let mut seen = Vec::new();
        for slot in 0..10 {
            link.send(ShardCommand::Admit { connection: ConnectionKey { slot, generation: 0 } });
        }
        assert_eq!(link.waiting(), 8);
        while seen.len() < 10 {
            link.flush();
            while let Some(ShardCommand::Admit { connection }) = shard.pop() {
                seen.push(connection.slot);
            }
        }
        assert_eq!(seen, (0..10).collect::<Vec<_>>());
        assert_eq!(link.waiting(), 0);
    }

    #[test]
    fn shard_that_went_silently_is_noticed_after_its_last_words() {
        let bell = Arc::new(Doorbell::new().unwrap());
        let (commands, _shard) = ring(2, Arc::clone(&bell));
        let (mut shard, reports) = ring(2, bell);
        let mut link = ShardLink::new(ShardPort { commands, reports });
        assert!(!link.is_ready());
        assert!(matches!(shard.push(ShardReport::Stopped), Pushed::Accepted));
        drop(shard);
        assert!(link.is_ready() && !link.is_lost());
        assert!(link.report().is_some());
        assert!(link.is_lost());
    }
}
