//! How a node goes: at once (`1001`), or by and by (`1012`) so that the others are not stormed.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Stage;
use super::manager::Manager;
use super::records::Phase;
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::ShardCommand;

/// How all sessions are to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Close everything at once with 1001.
    Stop,
    /// Tell sessions to go with 1012, at a steady pace over this period; then close what is left.
    Drain(Duration),
}

/// What sessions are told that are closed at once.
const STOPPED: Close = Close::new(CloseCode::GOING_AWAY, "server stopping");
/// What sessions are told that a drain did not come to.
const DRAINED: Close = Close::new(CloseCode::SERVICE_RESTART, "draining; reconnect in 0 ms");

/// The state of a departure.
#[derive(Debug, Default)]
pub(super) struct Departure {
    /// Who waits for the last shard to stop.
    waiting: Vec<oneshot::Sender<()>>,
    drain: Option<Drain>,
}

#[derive(Debug)]
struct Drain {
    begun: Instant,
    period: Duration,
    /// Sessions there were when it began.
    total: usize,
    /// Sessions told to go.
    told: usize,
    /// The next slot to look at, in every shard at once so that they empty evenly.
    slot: usize,
}

impl Manager {
    pub(super) fn on_end(&mut self, ending: Ending, ended: oneshot::Sender<()>, now: Instant) {
        self.departure.waiting.push(ended);
        match (self.stage(), ending) {
            (Stage::Serving | Stage::Draining, Ending::Stop) => self.stop_shards(STOPPED),
            (Stage::Serving, Ending::Drain(period)) => {
                self.set_stage(Stage::Draining);
                for link in &mut self.links {
                    link.send(ShardCommand::StopAccepting);
                }
                self.begin_drain(period, now);
            }
            (Stage::Draining, Ending::Drain(period)) => self.begin_drain(period, now),
            (Stage::Stopping | Stage::Stopped, Ending::Stop | Ending::Drain(_)) => {}
        }
        self.after_stop();
    }

    fn begin_drain(&mut self, period: Duration, now: Instant) {
        let total = self.directory.len();
        self.departure.drain = Some(Drain { begun: now, period, total, told: 0, slot: 0 });
        self.depart(now);
    }

    /// Tells as many sessions to go as the pace asks for by now.
    pub(super) fn depart(&mut self, now: Instant) {
        let Some(mut drain) = self.departure.drain.take() else { return };
        let elapsed = now.saturating_duration_since(drain.begun);
        if elapsed >= drain.period || self.directory.is_empty() {
            return self.stop_shards(DRAINED);
        }
        let due = drain.total as f64 * elapsed.as_secs_f64() / drain.period.as_secs_f64();
        let last_slot = self.records.iter().map(|records| records.len()).max().unwrap_or(0);
        while drain.told < due as usize && drain.slot < last_slot {
            drain.told += self.tell_to_go(drain.slot);
            drain.slot += 1;
        }
        self.departure.drain = Some(drain);
    }

    /// Closes the sessions that have this slot, one in each shard at most.
    fn tell_to_go(&mut self, slot: usize) -> usize {
        let spread_ms = u64::try_from(self.config.reconnect_spread.as_millis()).unwrap_or(u64::MAX);
        let mut told = 0;
        for shard in 0..self.records.len() {
            let Some((address, record)) = self.records[shard].at(slot) else { continue };
            if record.phase == Phase::Live {
                let wait_ms = rand::random_range(0..=spread_ms);
                let reason = format!("draining; reconnect in {wait_ms} ms").into();
                let close = Close { code: CloseCode::SERVICE_RESTART, reason };
                self.close(address.shard, address.connection, close, EndReason::Draining);
                told += 1;
            }
        }
        told
    }

    fn stop_shards(&mut self, close: Close) {
        let accepting = self.stage() == Stage::Serving;
        self.set_stage(Stage::Stopping);
        self.departure.drain = None;
        for link in &mut self.links {
            if accepting {
                link.send(ShardCommand::StopAccepting);
            }
            link.send(ShardCommand::Stop { close: close.clone() });
        }
    }

    /// Ends the manager when it was told to and no shard is left.
    pub(super) fn after_stop(&mut self) {
        if self.stage() == Stage::Stopping && self.links.iter().all(|link| link.stopped) {
            self.set_stage(Stage::Stopped);
            for waiting in self.departure.waiting.drain(..) {
                let _ = waiting.send(()); // Who asked may have given up.
            }
        }
    }
}
