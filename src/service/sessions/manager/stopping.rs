//! Shuts the node down: at once (1001), or gradually (1012).

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Shutdown;
use super::drain::Drain;
use super::node_state::NodeState;
use super::state::SessionManager;
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::ShardCommand;
use crate::domain::ids::ShardId;

/// Closes all sessions when the node stops without a drain.
const STOPPED: Close = Close::new(CloseCode::GOING_AWAY, "server stopping");
/// Closes the sessions that are left at the end of a drain.
const DRAINED: Close = Close::new(CloseCode::SERVICE_RESTART, "draining; reconnect in 0 ms");

impl SessionManager {
    pub(super) fn on_shut_down(
        &mut self,
        shutdown: Shutdown,
        stopped: oneshot::Sender<()>,
        now: Instant,
    ) {
        self.shutdown_waiters.push(stopped);
        match (self.state(), shutdown) {
            (NodeState::Serving | NodeState::Draining, Shutdown::Stop) => self.stop_shards(STOPPED),
            (NodeState::Serving, Shutdown::Drain(period)) => {
                self.node_state.send_replace(NodeState::Draining);
                for link in &mut self.links {
                    link.send(ShardCommand::StopAccepting);
                }
                self.begin_drain(period, now);
            }
            (NodeState::Draining, Shutdown::Drain(period)) => self.begin_drain(period, now),
            (NodeState::Stopping | NodeState::Stopped, Shutdown::Stop | Shutdown::Drain(_)) => {}
        }
        self.check_stopped();
    }

    fn begin_drain(&mut self, period: Duration, now: Instant) {
        self.drain = Some(Drain::new(now, period, self.open_sessions()));
        self.advance_drain(now);
    }

    /// Closes as many sessions as are due by now.
    pub(super) fn advance_drain(&mut self, now: Instant) {
        let Some(mut drain) = self.drain.take() else { return };
        if drain.is_over(now) || self.open_sessions() == 0 {
            return self.stop_shards(DRAINED);
        }
        let (due, slots) = (drain.due(now), self.slots_max());
        while drain.closed < due && drain.slot < slots {
            self.drain_slot(&mut drain);
            drain.slot += 1;
        }
        self.drain = Some(drain);
    }

    /// Closes the sessions in the drain's slot: at most one per shard.
    fn drain_slot(&mut self, drain: &mut Drain) {
        for shard in 0..self.records.len() {
            let Some((address, record)) = self.records[shard].at(drain.slot) else { continue };
            if record.is_open() {
                let wait_ms = drain.reconnect_wait_ms(self.config.reconnect_spread);
                let reason = format!("draining; reconnect in {wait_ms} ms").into();
                let close = Close { code: CloseCode::SERVICE_RESTART, reason };
                self.close(address, close, EndReason::Draining);
                drain.closed += 1;
            }
        }
    }

    fn stop_shards(&mut self, close: Close) {
        let accepting = self.state() == NodeState::Serving;
        self.node_state.send_replace(NodeState::Stopping);
        self.drain = None;
        for link in &mut self.links {
            if accepting {
                link.send(ShardCommand::StopAccepting);
            }
            link.send(ShardCommand::Stop { close: close.clone() });
        }
    }

    /// A shard has stopped. Sessions whose end it did not report have ended with it.
    pub(super) fn on_stopped(&mut self, shard: ShardId) {
        let link = &mut self.links[shard.index()];
        if std::mem::replace(&mut link.stopped, true) {
            return;
        }
        self.catch_ups.drop_chunks_of(shard);
        for slot in 0..self.records[shard.index()].len() {
            let held = self.records[shard.index()].at(slot).map(|(address, _)| address);
            if let Some(address) = held {
                self.on_ended(address);
            }
        }
        self.check_stopped();
    }

    /// Completes the shutdown when the last shard has stopped.
    fn check_stopped(&mut self) {
        if self.state() == NodeState::Stopping && self.links.iter().all(|link| link.stopped) {
            self.node_state.send_replace(NodeState::Stopped);
            for waiter in self.shutdown_waiters.drain(..) {
                let _ = waiter.send(()); // The caller may have given up.
            }
        }
    }
}
