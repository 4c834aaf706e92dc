//! Actions of the session manager: decisions, catch-up, closes.

use super::*;
use crate::domain::caught_up::{CaughtUp, SequenceRun};

/// What happens to a session that leaves the directory before its close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Departure {
    /// The session manager replaces it, and closes it at once.
    Replaced,
    /// It has missed events: another thread takes it out of the directory, and its close comes much later.
    Missed,
}

impl Simulation {
    /// A session leaves the directory: routers send it nothing more.
    pub(super) fn depart(&mut self, number: usize, departure: Departure) {
        let session = &mut self.clients[number].session;
        let Some(connection) = session.key else { return };
        self.directory.retain(|other| *other != number);
        session.left_at = Some(self.service.ends());
        note(TraceEvent::Pushes(number, "departure", 0));
        match departure {
            Departure::Missed => self.missed.push(number),
            Departure::Replaced => {
                session.closed_by_service = true;
                let close = Close::new(CloseCode::SESSION_REPLACED, "session_replaced");
                let command =
                    ShardCommand::Close { connection, close, why: EndReason::ClosedByService };
                self.service.command(SESSION_MANAGER, command);
            }
        }
    }

    /// The shard wants to send cursors: the session manager first withdraws the sessions that have left.
    pub(super) fn answer_fence(&mut self) {
        for number in std::mem::take(&mut self.missed) {
            let session = &self.clients[number].session;
            let Some(connection) = session.key.filter(|_| session.ended.is_none()) else {
                continue;
            };
            self.service.command(SESSION_MANAGER, ShardCommand::StopCursors { connection });
        }
        self.service.command(SESSION_MANAGER, ShardCommand::Fence);
    }

    /// The shard may send cursors to this session.
    fn send_cursors(&mut self, number: usize) {
        let session = &mut self.clients[number].session;
        let Some(connection) = session.key else { return };
        session.cursors = true;
        note(TraceEvent::Pushes(number, "SendCursors", 0));
        self.service.command(SESSION_MANAGER, ShardCommand::SendCursors { connection });
    }

    pub(super) fn manager_acts(&mut self) {
        if self.shard.is_none() {
            return;
        }
        self.service.push_backlog(SESSION_MANAGER);
        match self.random.below(8) {
            0..=3 => self.take_reports(SESSION_MANAGER, 4),
            4..=5 => (0..3).for_each(|_| self.decide()),
            6 => self.catch_up(),
            _ => self.service_acts(),
        }
    }

    /// Texts and closes sent by the service.
    fn service_acts(&mut self) {
        if self.directory.is_empty() || self.resting {
            return;
        }
        let number = self.directory[self.random.below(self.directory.len())];
        let is_bystander = self.clients[number].stands_by;
        let session = &mut self.clients[number].session;
        let is_admitted = session.admitted_at_ms.is_some();
        let Some(connection) = session.key.filter(|_| is_admitted && !is_bystander) else {
            return;
        };
        let command = if self.random.chance(self.setup.service_closes) {
            match self.random.below(4) {
                0 => return self.depart(number, Departure::Replaced),
                1 => return self.depart(number, Departure::Missed),
                _ => {}
            }
            session.closed_by_service = true;
            let close = Close::new(CloseCode::TOKEN_EXPIRED, "token expired");
            ShardCommand::Close { connection, close, why: EndReason::ClosedByService }
        } else {
            let text = format!("t{}", self.random.draw());
            session.texts.push_back(text.clone());
            ShardCommand::SendText { connection, text: text.into() }
        };
        note(TraceEvent::Pushes(number, "Close or SendText", 0));
        self.service.command(SESSION_MANAGER, command);
    }

    /// Decides on one request.
    pub(super) fn decide(&mut self) {
        if self.undecided.is_empty() {
            return;
        }
        let number = self.undecided.swap_remove(self.random.below(self.undecided.len()));
        let now_ms = self.now_ms();
        let session = &mut self.clients[number].session;
        let Some(connection) = session.key else { return };
        let command = match self.random.below(16) {
            0 => return,
            1 => {
                session.refused = true;
                let body = "not you".into();
                let refusal = Refusal { status: 401, body, retry_after_s: None };
                ShardCommand::Refuse { connection, refusal }
            }
            _ => {
                session.admitted_at_ms = Some(now_ms);
                self.summary.admitted += 1;
                ShardCommand::Admit { connection }
            }
        };
        note(TraceEvent::Pushes(number, "decision", 0));
        self.service.command(SESSION_MANAGER, command);
    }

    /// Continues catch-up of some sessions.
    pub(super) fn catch_up(&mut self) {
        for index in 0..self.directory.len() {
            let number = self.directory[index];
            if self.random.chance(64) {
                self.catch_up_one(number);
            }
        }
    }

    /// Sends a session more of what it missed, within the window of deliveries in flight; at the
    /// end, lets it go live.
    pub(super) fn catch_up_one(&mut self, number: usize) {
        let unix_ms = self.unix_ms();
        let now_ms = self.now_ms();
        let client = &mut self.clients[number];
        let session = &mut client.session;
        let Some(key) = session.key else { return };
        if !session.resume_asked || session.live_at_ms.is_some() {
            return;
        }
        let mut window = self.setup.catch_up_window;
        if client.stands_by {
            // As in production, its catch-up alone does not fill its queue.
            window = window.min(usize::from(self.setup.config.queue_frames_max) / 2);
        }
        while session.catch_up_in_flight < window {
            let Some(event) = session.catch_up.pop_front() else { break };
            session.catch_up_in_flight += 1;
            session.delivered.extend(event.position);
            session.address(SESSION_MANAGER, event.clone());
            let to = [(key, encoding(client.kind))];
            self.service.deliver(SESSION_MANAGER, &event, &to, unix_ms, &mut self.random);
        }
        if session.catch_up.is_empty() {
            session.release(now_ms);
            let (wants, early) = (session.wants_cursors, self.random.chance(128));
            if wants && early {
                self.send_cursors(number);
            }
            let session = &mut self.clients[number].session;
            note(TraceEvent::Pushes(number, "Release", session.delivered.len()));
            let runs = session.delivered.iter().copied().map(SequenceRun::one).collect();
            let delivered = Box::new(CaughtUp::new(None, runs));
            let command = ShardCommand::GoLive { connection: key, delivered };
            self.service.command(SESSION_MANAGER, command);
            if wants && !early {
                self.send_cursors(number);
            }
        }
    }
}
