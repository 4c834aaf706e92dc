//! Draining of a node, and its effect on the other nodes.

use std::time::{Duration, Instant};

use crate::support::wait::SOON;

use super::{Scene, Session};

/// Period over which a draining node spreads the reconnects of its clients (`docs/guarantees.md`).
const RECONNECT_SPREAD: Duration = Duration::from_secs(5);

/// The sessions of a drained node after its drain.
#[derive(Debug)]
pub(in super::super) struct Drained {
    /// Sessions that the node had.
    pub(in super::super) sessions: usize,
    /// Most handshakes per second at all other nodes together, from the order to drain until all
    /// sessions were back.
    pub(in super::super) handshakes_per_s: usize,
    /// Handshakes per second that `docs/guarantees.md` allows.
    pub(in super::super) budget_per_s: usize,
}

impl Scene {
    /// Sends SIGTERM to a node that drains over `period`, keeps up the load until it has exited and all
    /// sessions are back, and returns what the other nodes measured.
    pub(in super::super) fn drain_node(&mut self, number: usize, period: Duration) {
        let of_node = |session: &&Session| session.client.is_some() && session.node == number;
        let sessions = self.sessions.iter().filter(of_node).count();
        let before = self.handshakes.len();
        let upgraded = self.upgraded_elsewhere(number);
        self.stop_node(number, period + Duration::from_secs(30));
        let deadline = Instant::now() + SOON;
        while !self.all_open() {
            assert!(Instant::now() < deadline, "not all sessions reconnected: {:?}", self.endings);
            self.run(Duration::from_millis(100));
        }
        let new = &self.handshakes[before..];
        assert!(new.iter().all(|(_, node)| *node != number), "it took sessions while draining");
        // The nodes count at least these: an answer that a client did not wait for is one more.
        assert!(self.upgraded_elsewhere(number) - upgraded >= new.len() as f64);
        let in_second = |(from, _): &(Instant, usize)| {
            let within = |at: Instant| at >= *from && at - *from < Duration::from_secs(1);
            new.iter().filter(|(at, _)| within(*at)).count()
        };
        let handshakes_per_s = new.iter().map(in_second).max().unwrap_or(0);
        let pace = sessions as f64 / period.max(RECONNECT_SPREAD).as_secs_f64();
        let budget_per_s = (pace * 1.25).ceil() as usize;
        self.drains.push(Drained { sessions, handshakes_per_s, budget_per_s });
    }

    fn upgraded_elsewhere(&self, number: usize) -> f64 {
        let others = self.nodes.iter().enumerate().filter(|(other, _)| *other != number);
        let running = others.filter_map(|(_, node)| node.as_ref());
        running.map(|node| node.metrics().sum("delivery_shard_upgraded_total", &[])).sum()
    }
}

/// The waiting time in the reason of a 1012.
pub(super) fn waiting_time(reason: &str) -> Option<Duration> {
    let ms = reason.strip_prefix("draining; reconnect in ")?.strip_suffix(" ms")?.parse().ok()?;
    Some(Duration::from_millis(ms))
}
