//! The end of a run: everything comes to rest, the shard stops, and nothing may be left.

use super::*;

/// Turns of a busy shard in a millisecond.
const BUSY_STEPS: u64 = 20;

impl Simulation {
    /// Clients take no more actions, and everything is read and taken until nothing moves. Then
    /// each session that has not ended must have received everything.
    pub(super) fn rest(&mut self) {
        self.resting = true;
        if self.shard.is_some() {
            self.kernel().faults = Faults::default();
        }
        let mut steps = 0;
        while self.shard.is_some() && !self.stopping {
            let Some(unrest) = self.unrest() else { return };
            steps += 1;
            assert!(steps < REST_STEPS_MAX, "stuck: {unrest}");
            self.rest_step();
        }
    }

    pub(super) fn rest_step(&mut self) {
        for index in 0..self.active.len() {
            self.read_all(self.active[index]);
        }
        for peer in 0..PEERS {
            if peer != SESSION_MANAGER && self.service.peers[peer].backlog.is_empty() {
                self.service.push_routed(peer);
            }
            self.service.push_backlog(peer);
            self.take_reports(peer, usize::MAX);
        }
        while !self.undecided.is_empty() {
            self.decide();
        }
        self.handshakes_advance(usize::MAX);
        for index in 0..self.directory.len() {
            self.catch_up_one(self.directory[index]);
        }
        let config = &self.setup.config;
        if self.shard.as_ref().is_some_and(|shard| shard.admitted() >= config.connections_max)
            && self.kernel().backlog_len() > 0
            && self.capacity.take()
        {
            self.accept_elsewhere();
        }
        self.turn();
        if self.shard.as_ref().is_some_and(|shard| !shard.kernel().is_awake()) {
            // If the shard waits for a deadline, it has passed it to the kernel.
            let until = self.kernel().sleeps_until_ms();
            let now_ms = self.now_ms();
            self.pass(until.map_or(1, |at_ms| (at_ms - now_ms).min(100)));
        } else if self.shard.is_some() && self.summary.steps.is_multiple_of(BUSY_STEPS) {
            self.pass(1);
        }
    }

    /// The reason why the simulation is not at rest, if any.
    pub(super) fn unrest(&mut self) -> Option<&'static str> {
        let unread = (0..self.active.len()).any(|index| {
            let socket = self.clients[self.active[index]].socket;
            let client = &self.clients[self.active[index]];
            let is_silent = client.tls.as_ref().is_none_or(ClientTls::is_silent);
            let unsaid = !client.outbox.is_empty() || !is_silent;
            let kernel = self.kernel();
            kernel.is_open(socket)
                && (unsaid || kernel.unread(socket) > 0 || kernel.unreceived(socket) > 0)
        });
        let not_at_rest =
            self.by_key.values().any(|number| !self.clients[*number].session.is_at_rest());
        let routed = self.service.routed();
        let lacks_cursor = self.by_key.values().any(|number| {
            let session = &self.clients[*number].session;
            session.awaits_cursors() && session.cursor != routed
        });
        let conditions = [
            (self.kernel().backlog_len() > 0, "a client waits to be accepted"),
            (unread, "a client has bytes to read or to send"),
            (!self.service.outstanding.is_empty(), "a delivery is not done"),
            (!self.service.is_idle(), "a ring is not empty"),
            (self.handshaker.as_ref().is_some_and(|it| !it.is_idle()), "a handshake is not made"),
            (!self.undecided.is_empty(), "a request is not decided on"),
            (self.counters.counts.frames_queued.get() > 0, "a queue is not empty"),
            (lacks_cursor, "a session lacks the newest cursor"),
            (not_at_rest, "a session is neither live nor ended"),
        ];
        conditions.into_iter().find(|(moves, _)| *moves).map(|(_, what)| what)
    }

    /// Orders the shard to stop, or drops its session manager.
    pub(super) fn begin_to_stop(&mut self) {
        if std::mem::replace(&mut self.stopping, true) {
            return;
        }
        self.stopped_early = !self.resting;
        self.abandoned = self.random.chance(64);
        if self.abandoned {
            self.service.abandon(SESSION_MANAGER);
        } else {
            let close = Close::new(CloseCode::GOING_AWAY, "server closing");
            self.service.command(SESSION_MANAGER, ShardCommand::Stop { close });
        }
    }

    /// Stops the shard, unless that has happened already, and takes the last reports.
    pub(super) fn stop(&mut self) {
        if !self.stopping {
            self.by_key.values().for_each(|number| self.clients[*number].session.check_complete());
        }
        self.begin_to_stop();
        let mut steps = 0;
        while self.shard.is_some() || !self.service.is_idle() {
            steps += 1;
            assert!(steps < REST_STEPS_MAX, "does not stop");
            if self.shard.is_some() {
                self.rest_step();
            } else {
                (0..PEERS).for_each(|peer| self.service.push_backlog(peer));
                (0..PEERS).for_each(|peer| self.take_reports(peer, usize::MAX));
            }
        }
    }
}
