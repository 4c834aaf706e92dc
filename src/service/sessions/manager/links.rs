//! The session manager's end of the rings to one shard.

use std::collections::VecDeque;

use crate::domain::command::{ShardCommand, ShardReport};
use crate::handoff::{PeerEnd, Pushed};

/// Capacity of the overflow queue that is kept after a storm, commands.
const CAPACITY_KEPT: usize = 1024;

/// A port, and an overflow queue for commands while the ring is full.
///
/// The queue has no bound of its own because its inputs are bounded. Per connection there is at
/// most one answer to its handshake, one close, one command to go live, and one answer for each of
/// its own messages (the shard limits their rate). Catch-up has one chunk per page in flight
/// (`catch_up::CatchUpConfig`). Per shard there are two more commands: to stop accepting, and to
/// stop.
#[derive(Debug)]
pub(super) struct ControlLink {
    port: PeerEnd,
    waiting: VecDeque<ShardCommand>,
    /// The shard has reported that it stopped, or is lost.
    pub(super) stopped: bool,
}

impl ControlLink {
    pub(super) fn new(port: PeerEnd) -> Self {
        Self { port, waiting: VecDeque::new(), stopped: false }
    }

    /// Sends commands in order, now or when there is room. Drops them if the shard has stopped:
    /// its connections have ended.
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

    /// Moves waiting commands into the ring as far as there is room, and wakes the shard.
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
        if self.waiting.is_empty() && self.waiting.capacity() > CAPACITY_KEPT {
            self.waiting.shrink_to(CAPACITY_KEPT);
        }
        self.port.commands.publish();
    }

    /// Takes the oldest report.
    pub(super) fn report(&mut self) -> Option<ShardReport> {
        self.port.reports.pop()
    }

    /// Whether there is a report to take, or the loss of the shard to handle.
    pub(super) fn is_ready(&self) -> bool {
        !self.stopped && (!self.port.reports.is_empty() || self.port.reports.is_abandoned())
    }

    /// Whether the shard ended without reporting that it stopped, and all its reports are taken.
    pub(super) fn is_lost(&self) -> bool {
        !self.stopped && self.port.reports.is_abandoned() && self.port.reports.is_empty()
    }

    /// Commands that wait for room.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::ConnectionKey;
    use crate::handoff::{Doorbell, connect};
    use std::sync::Arc;

    #[test]
    fn commands_keep_their_order_over_a_full_ring() {
        let bell = Arc::new(Doorbell::new().unwrap());
        let (port, mut shard) = connect([2; 2], &bell, &bell);
        let mut link = ControlLink::new(port);
        let mut seen = Vec::new();
        for slot in 0..10 {
            link.send(ShardCommand::Admit { connection: ConnectionKey { slot, generation: 0 } });
        }
        assert_eq!(link.waiting(), 8);
        while seen.len() < 10 {
            link.flush();
            while let Some(ShardCommand::Admit { connection }) = shard.commands.pop() {
                seen.push(connection.slot);
            }
        }
        assert_eq!(seen, (0..10).collect::<Vec<_>>());
        assert_eq!(link.waiting(), 0);
    }

    #[test]
    fn lost_shard_is_noticed_after_its_last_report() {
        let bell = Arc::new(Doorbell::new().unwrap());
        let (port, mut shard) = connect([2; 2], &bell, &bell);
        let mut link = ControlLink::new(port);
        assert!(!link.is_ready());
        assert!(matches!(shard.reports.push(ShardReport::Stopped), Pushed::Accepted));
        drop(shard);
        assert!(link.is_ready() && !link.is_lost());
        assert!(link.report().is_some());
        assert!(link.is_lost());
    }
}
