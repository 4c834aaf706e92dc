//! The session manager's end of the rings to one shard.

use crate::domain::command::{ShardCommand, ShardReport};
use crate::handoff::{Consumer, PeerEnd, SpillingProducer};

/// The rings of a shard. What waits while that of the commands is full has no bound of its own, because its inputs are
/// bounded. Per connection there is at most one answer to its handshake, one close, one command to go live, and one
/// answer for each of its own messages (the shard limits their rate). Catch-up has one chunk per page in flight
/// (`catch_up::CatchUpConfig`). Per shard there are two more commands: to stop accepting, and to stop.
#[derive(Debug)]
pub(super) struct ControlLink {
    commands: SpillingProducer<ShardCommand>,
    reports: Consumer<ShardReport>,
    /// The shard has reported that it stopped, or is lost.
    pub(super) stopped: bool,
}

impl ControlLink {
    pub(super) fn new(PeerEnd { commands, reports }: PeerEnd) -> Self {
        Self { commands: commands.into(), reports, stopped: false }
    }

    /// Sends commands in order, now or when there is room. Drops them if the shard has stopped:
    /// its connections have ended.
    pub(super) fn send(&mut self, command: ShardCommand) {
        if !self.stopped {
            self.commands.push(command);
        }
    }

    /// Moves waiting commands into the ring as far as there is room, and wakes the shard.
    pub(super) fn flush(&mut self) {
        self.commands.flush();
        self.commands.publish();
    }

    /// Takes the oldest report.
    pub(super) fn report(&mut self) -> Option<ShardReport> {
        self.reports.pop()
    }

    /// Whether there is a report to take, or the loss of the shard to handle.
    pub(super) fn is_ready(&self) -> bool {
        !self.stopped && (!self.reports.is_empty() || self.reports.is_abandoned())
    }

    /// Whether the shard ended without reporting that it stopped, and all its reports are taken.
    pub(super) fn is_lost(&self) -> bool {
        !self.stopped && self.reports.is_abandoned() && self.reports.is_empty()
    }

    /// Commands that wait for room.
    pub(super) fn waiting(&self) -> usize {
        self.commands.waiting()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handoff::{Doorbell, Pushed, connect};
    use std::sync::Arc;

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
