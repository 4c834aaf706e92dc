//! A node that goes in good order, and what the others see of it.

use std::time::{Duration, Instant};

use super::{CONNECTED_WITHIN, Scene, Session};

/// Over which a draining node spreads the returns of its clients (`docs/guarantees.md`).
const RECONNECT_SPREAD: Duration = Duration::from_secs(5);

/// What became of the sessions of a node that was drained.
#[derive(Debug)]
pub(in super::super) struct Drained {
    /// That it had.
    pub(in super::super) sessions: usize,
    /// Most handshakes in any second at all the other nodes together, from the order to drain until
    /// everybody was back.
    pub(in super::super) handshakes_per_s: usize,
    /// What the page allows them: see `docs/guarantees.md`.
    pub(in super::super) budget_per_s: usize,
}

impl Scene {
    /// SIGTERM to a node that drains over `period`, load until it has ended and everybody is back,
    /// and what the others saw of it.
    pub(in super::super) fn drain_node(&mut self, number: usize, period: Duration) {
        let of_node = |session: &&Session| session.client.is_some() && session.node == number;
        let sessions = self.sessions.iter().filter(of_node).count();
        let before = self.handshakes.len();
        let upgraded = self.upgraded_elsewhere(number);
        self.stop_node(number, period + Duration::from_secs(30));
        let deadline = Instant::now() + CONNECTED_WITHIN;
        while !self.all_open() {
            assert!(Instant::now() < deadline, "not everybody came back: {:?}", self.endings);
            self.run(Duration::from_millis(100));
        }
        let new = &self.handshakes[before..];
        assert!(new.iter().all(|(_, node)| *node != number), "it took sessions while draining");
        // The nodes count at least those (an answer that a client did not wait for is one more).
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

/// How long the reason of a 1012 says to wait.
pub(super) fn told_to_wait(reason: &str) -> Option<Duration> {
    let ms = reason.strip_prefix("draining; reconnect in ")?.strip_suffix(" ms")?.parse().ok()?;
    Some(Duration::from_millis(ms))
}
