//! Checks of what reaches the service side and the clients against the model.

use std::collections::VecDeque;

use super::client::{ClientKind, Reading, number_of};
use super::trace::{TraceEvent, note};
use super::wire::{self, WireEvent};
use super::{Faults, PEERS, Simulation};
use crate::domain::close::EndReason;
use crate::domain::command::ShardReport;
use crate::domain::cursor::Cursor;
use crate::domain::ids::ConnectionKey;
use crate::domain::limits::{DROPPED_BYTES_MAX, RECEIVE_BUFFER_BYTES};
use crate::reactor::shard::SESSION_MANAGER;
use crate::reactor::wheel::TICK_MS;

/// What is received at most of a client that sends without pause: the rest of a request (16 KiB), what is dropped after
/// the violation, and one receive of each that ends it.
const FLOODED_MAX: isize =
    16 * 1024 + DROPPED_BYTES_MAX as isize + 3 * RECEIVE_BUFFER_BYTES as isize;

impl Simulation {
    /// A peer takes some of its reports.
    pub(super) fn take_reports(&mut self, peer: usize, limit: usize) {
        for _ in 0..limit {
            let Some(report) = self.service.report(peer) else { return };
            self.take_report(peer, report);
        }
    }

    fn take_report(&mut self, peer: usize, report: ShardReport) {
        assert!(!self.service.peers[peer].stopped, "a report after the last: {report:?}");
        match report {
            ShardReport::Done { ticket } => self.done(peer, ticket.0.get()),
            ShardReport::Stopped => self.service.peers[peer].stopped = true,
            report => {
                assert_eq!(peer, SESSION_MANAGER, "not for a router: {report:?}");
                self.take_session_report(report);
            }
        }
    }

    fn take_session_report(&mut self, report: ShardReport) {
        match report {
            ShardReport::Opened { connection, hello } => {
                let number = number_of(&hello.user_id);
                note(TraceEvent::Report(number, "Opened", connection.slot as usize));
                let client = &mut self.clients[number];
                assert!(
                    matches!(client.kind, ClientKind::Session { .. })
                        && client.session.key.is_none()
                );
                client.session.key = Some(connection);
                assert!(self.by_key.insert(connection, number).is_none(), "a key is used again");
                self.undecided.push(number);
                self.directory.push(number);
                self.reports_opened += 1;
            }
            ShardReport::Message { connection, text } => {
                let number = self.open_session(connection);
                note(TraceEvent::Report(number, "Message", text.len()));
                let expected = self.clients[number].texts.pop_front();
                assert_eq!(expected.as_deref(), Some(&*text), "a message out of order or altered");
                self.reports_message += 1;
                self.resume(number);
            }
            ShardReport::GraceExpired { connection } => {
                let number = self.open_session(connection);
                note(TraceEvent::Report(number, "GraceExpired", 0));
                let session = &mut self.clients[number].session;
                assert!(session.admitted_at_ms.is_some() && !session.grace_expired);
                session.grace_expired = true;
                self.reports_grace += 1;
            }
            ShardReport::Ended { connection, why } => {
                let number = self.open_session(connection);
                note(TraceEvent::Report(number, why.label(), 0));
                self.check_reason(number, why);
                self.clients[number].session.ended = Some(why);
                self.clients[number].session.check_complete();
                self.directory.retain(|other| *other != number);
                self.undecided.retain(|other| *other != number);
                self.missed.retain(|other| *other != number);
                self.dead_keys.push(connection);
                self.reports_ended += 1;
            }
            ShardReport::Fence => self.answer_fence(),
            ShardReport::Resume { .. } | ShardReport::ResumeSince { .. } => {
                panic!("only the stream hub sends this report")
            }
            ShardReport::Done { .. } | ShardReport::Stopped => unreachable!("handled before"),
        }
    }

    /// The client of a key that was opened and has not ended.
    fn open_session(&self, connection: ConnectionKey) -> usize {
        let number = *self.by_key.get(&connection).expect("a report about an unknown connection");
        assert!(self.clients[number].session.ended.is_none(), "a report after the end");
        number
    }

    /// Handles the first message: draws the messages that the session missed.
    fn resume(&mut self, number: usize) {
        if !std::mem::replace(&mut self.clients[number].session.resume_asked, true) {
            self.clients[number].session.wants_cursors = self.random.chance(128);
            for _ in 0..self.random.below(4) {
                let missed = self.service.catch_up(&mut self.random);
                self.clients[number].session.catch_up.extend(missed);
            }
        }
    }

    fn done(&mut self, peer: usize, ticket: u64) {
        note(TraceEvent::Report(peer, "Done", ticket as usize));
        let done = self.service.outstanding.remove(&ticket).expect("done once, with a ticket");
        assert_eq!(done.peer, peer, "another peer's ticket");
        if peer == SESSION_MANAGER {
            let number = self.by_key[&done.recipients[0]];
            self.clients[number].session.catch_up_in_flight -= 1;
        }
        // A recipient that has not ended and still lacks the event shows a report that came too
        // early.
        for key in done.recipients {
            let Some(number) = self.by_key.get(&key) else { continue };
            self.clients[*number].session.presume_done(peer, done.number);
        }
    }

    /// Reads everything that the shard has put on the wires.
    pub(super) fn read_wires(&mut self) {
        let mut index = 0;
        while index < self.active.len() {
            let number = self.active[index];
            let socket = self.clients[number].socket;
            let sent = self.client_hears(number);
            if !sent.is_empty() {
                self.clients[number].wire.push(&sent);
                while let Some(item) = self.clients[number].wire.next() {
                    self.received(number, item);
                }
            }
            let flooded = self.kernel().flooded(socket);
            assert!(flooded <= FLOODED_MAX, "{flooded} bytes of a flood were received");
            if self.kernel().is_closed(socket) {
                self.clients[number].over = true;
                self.active.swap_remove(index);
            } else {
                index += 1;
            }
        }
    }

    fn received(&mut self, number: usize, item: WireEvent) {
        match item {
            WireEvent::Answer(status) => {
                note(TraceEvent::Wire(number, "answer", status.into()));
                let client = &mut self.clients[number];
                let lawful = match client.kind {
                    ClientKind::Session { .. } => {
                        status != 101 || client.session.admitted_at_ms.is_some()
                    }
                    ClientKind::Echo => true,
                    ClientKind::Bad | ClientKind::Endless => status != 101,
                };
                assert!(lawful, "answered {status}");
                client.answered = Some(status);
            }
            WireEvent::Frame(wire::CLOSE, payload) => {
                let code = payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                note(TraceEvent::Wire(number, "close", code.into()));
                self.check_close(number, code);
                self.clients[number].session.close_seen = Some(code);
            }
            WireEvent::Frame(wire::PING, payload) => {
                note(TraceEvent::Wire(number, "ping", 0));
                assert!(payload.is_empty());
                let client = &mut self.clients[number];
                if client.may_send() && (client.reading == Reading::Prompt || self.resting) {
                    client.queue_pong(&mut self.random);
                }
            }
            WireEvent::Frame(wire::PONG, payload) => {
                note(TraceEvent::Wire(number, "pong", 0));
                let pings = &mut self.clients[number].pings;
                while pings.pop_front().expect("a pong without a ping") != payload {}
            }
            WireEvent::Frame(opcode, payload) if self.clients[number].kind == ClientKind::Echo => {
                assert_eq!(opcode, wire::BINARY);
                let expected = self.clients[number].echoes.pop_front();
                assert_eq!(expected, Some(payload), "not what was sent to /echo");
            }
            WireEvent::Frame(wire::TEXT, payload) if payload.first() == Some(&b't') => {
                let expected = self.clients[number].session.texts.pop_front();
                assert_eq!(expected.map(String::into_bytes), Some(payload), "the wrong text");
            }
            WireEvent::Frame(wire::TEXT, payload) if payload.starts_with(b"{\"cursor\":\"") => {
                let text = payload[11..].strip_suffix(b"\"}").expect("a cursor and nothing else");
                let text = std::str::from_utf8(text).expect("JSON");
                let cursor = Cursor::from_text(text).expect("a cursor");
                let positions: Vec<i64> = cursor.positions().iter().map(|it| it.next).collect();
                note(TraceEvent::Wire(number, "cursor", positions.iter().sum::<i64>() as u64));
                self.clients[number].session.receives_cursor(positions);
            }
            WireEvent::Frame(opcode, payload) => self.received_event(number, opcode, &payload),
        }
    }

    fn received_event(&mut self, number: usize, opcode: u8, payload: &[u8]) {
        let event = wire::event_number(payload);
        note(TraceEvent::Wire(number, "event", event));
        let now_ms = self.now_ms();
        let client = &mut self.clients[number];
        let json = client.kind == ClientKind::Session { json: true };
        assert_eq!(
            opcode,
            if json { wire::TEXT } else { wire::BINARY },
            "an event in the wrong encoding"
        );
        // Its sender is the peer from which the session awaits it.
        let session = &mut client.session;
        let has = |queue: &std::collections::VecDeque<super::session::ModelEvent>| {
            queue.iter().any(|model| model.number == event)
        };
        let peer = session.addressed.iter().position(has);
        let peer = peer.expect("an event that was not addressed to the session, or a duplicate");
        session.receives(peer, event, now_ms, self.limits);
        self.reached_bystander(number, event);
        self.wire_events += 1;
        self.summary.received += 1;
    }

    /// No client is pinged that has just sent something (contract §3). Checked when the ping is
    /// queued, because it may wait behind other frames while the client sends.
    pub(super) fn check_pings(&mut self) {
        let config = &self.setup.config;
        let least_ms = config.ping_after_ms - config.ping_spread_ms - 2 * TICK_MS;
        let shard = self.shard.as_ref().expect("running");
        let now_ms = self.now_ms();
        for index in 0..self.active.len() {
            let client = &self.clients[self.active[index]];
            let Some(key) = client.session.key else { continue };
            let (socket, pinged) = (client.socket, shard.is_pinged(key));
            if pinged && !client.pinged {
                let silent_ms = now_ms - shard.kernel().received_at_ms(socket);
                assert!(silent_ms >= least_ms, "pinged after {silent_ms} ms");
                let unread = shard.kernel().unreceived(socket);
                assert!(
                    unread == 0 || self.notices_late(),
                    "pinged although it has unreceived bytes"
                );
            }
            self.clients[self.active[index]].pinged = pinged;
        }
    }

    /// Whether the shard may not know yet what a client has sent: the kernel keeps it, or a turn has not handled it.
    fn notices_late(&self) -> bool {
        let Faults { late, early_return, completion_slots, .. } = self.setup.faults;
        late > 0
            || early_return > 0
            || completion_slots > 0
            || self.setup.config.completions_max < 1_024
    }

    /// Whether a client has exceeded a rate, or might not have completed a message in time.
    fn is_at_fault(&self, number: usize) -> bool {
        let (client, config) = (&self.clients[number], &self.setup.config);
        let frames = client.frames + client.tls.as_ref().map_or(0, |tls| tls.key_updates);
        frames > config.inbound_frames_per_s_max.into()
            || self.notices_late()
            || client.is_slow(self.now_ms(), config.message_ms_max)
    }

    /// Checks that each close code has its cause.
    fn check_close(&self, number: usize, code: u16) {
        let client = &self.clients[number];
        let (acts, session) = (client.acts, &client.session);
        let lawful = match code {
            1000 | 1005 => acts.closed,
            1001 => self.stopping,
            1002 | 1007 | 1009 => acts.broke_protocol,
            1008 => self.is_at_fault(number),
            // Caught-up messages do not wait for room: the catch-up paces them.
            1011 => {
                let caught_up = session.addressed.get(SESSION_MANAGER);
                let all_came = caught_up.is_none_or(VecDeque::is_empty);
                let may_overflow = !self.is_bystander(number) || !all_came;
                client.kind != ClientKind::Echo && may_overflow
            }
            1013 => session.admitted_at_ms.is_some(),
            4000 => session.closed_by_service && session.left_at.is_some(),
            4401 => session.closed_by_service,
            _ => false,
        };
        assert!(lawful, "closed with {code}");
    }

    /// Checks that each end reason has its cause.
    fn check_reason(&self, number: usize, why: EndReason) {
        let Some(shard) = &self.shard else { return assert!(self.stopping) };
        let now_ms = self.now_ms();
        let heard_at_ms = shard.kernel().received_at_ms(self.clients[number].socket);
        let client = &self.clients[number];
        let (acts, session) = (client.acts, &client.session);
        let lawful = match why {
            EndReason::ClosedByPeer => acts.closed,
            EndReason::PeerGone => acts.ended,
            EndReason::PeerReset => acts.reset,
            EndReason::PeerSilent => {
                self.notices_late()
                    || now_ms - heard_at_ms >= self.setup.config.idle_ms_max - TICK_MS
            }
            EndReason::PeerAtFault => acts.broke_protocol || self.is_at_fault(number),
            EndReason::QueueOverflow => true,
            EndReason::WriteTimeout => session.admitted_at_ms.is_some(),
            // An admission may have crossed the timeout.
            EndReason::HandshakeTimeout => !session.resume_asked,
            EndReason::Refused => session.refused,
            EndReason::ClosedByService => session.closed_by_service,
            EndReason::Draining => self.stopping,
            // Catch-up took too long.
            EndReason::ServerFault => session.live_at_ms.is_none_or(|at| at <= now_ms),
        };
        assert!(lawful, "ended as {}", why.label());
    }

    /// The shard and the kernel agree on the requests in flight.
    pub(super) fn check_kernel(&mut self) {
        let shard = self.shard.as_ref().expect("running");
        let mut slots = 0;
        for (key, believed) in shard.requests_in_flight() {
            slots += 1;
            // The kernel may have completed requests whose completions the shard has not reaped.
            assert!(shard.kernel().in_flight(key).is_within(believed), "{key:?}: {believed:?}");
        }
        assert_eq!(slots, shard.slots_used());
        for key in shard.kernel().unasked() {
            assert!(
                shard.has_noticed_input(key),
                "{key:?} has sent something that nobody will read"
            );
        }
        assert_eq!(shard.kernel().buffers_lent(), shard.kernel().leases_waiting());
    }

    /// Clients were admitted by a clock that shows this time: within a second of the clock that is ahead, no more than
    /// the limit of all shards.
    pub(super) fn count_handshakes(&mut self, now_ms: u64, admitted: u64) {
        let second = now_ms / 1_000;
        if second > self.handshakes.0 && admitted > 0 {
            self.handshakes = (second, 0);
        }
        self.handshakes.1 += admitted;
        let limit = self.setup.limits.handshakes_per_s_max.into();
        assert!(self.handshakes.1 <= limit, "more handshakes in a second than the limit");
    }

    /// A client is told that no shard has room only if that is so. `before` the turn: the time, free places, own
    /// connections, clients that were accepted and such refusals.
    pub(super) fn check_refusals(&mut self, before: (u64, u32, u32, u64, u64)) {
        let (now_ms, free, had, accepted, refused) = before;
        let shard = self.shard.as_ref().expect("running");
        let config = &self.setup.config;
        let counts = &self.counters.counts;
        let (accepted, refused) =
            (counts.accepted.get() - accepted, counts.refused_full.get() - refused);
        // Within the turn it may have been full beyond its room, or others may have got the free places.
        let most = u64::from(had) + accepted - refused;
        let is_full = most >= u64::from(config.connections_max + config.accepts_max);
        let lawful = is_full || u64::from(free) + refused <= accepted;
        assert!(refused == 0 || lawful, "refused with room left");
        let other_refusals = counts.refused_total_rate.get()
            + counts.refused_address_rate.get()
            + counts.refused_address_count.get();
        let admitted = accepted - refused - (other_refusals - self.other_refusals);
        self.other_refusals = other_refusals;
        self.was_full |= self.capacity.free() == 0;
        let claimed = shard.admitted() + shard.accepts();
        assert!(
            self.was_full || claimed <= config.connections_max,
            "it accepts what others have room for"
        );
        if !self.stopping {
            self.count_handshakes(now_ms, admitted);
        }
    }

    pub(super) fn check_counters(&mut self) {
        let counts = &self.counters.counts;
        assert!(
            counts.deliveries_sent.get() <= self.wire_events,
            "more deliveries sent than received"
        );
        assert!(counts.events_taken.get() <= self.service.pushed.0);
        assert!(counts.deliveries.get() <= self.service.pushed.1);
        assert!(counts.messages_passed.get() >= self.reports_message);
        assert!(counts.grace_expired.get() >= self.reports_grace);
    }

    /// A stopped shard has released everything.
    pub(super) fn check_stopped(&mut self) {
        let shard = self.shard.as_ref().expect("has just stopped");
        assert_eq!(shard.slots_used(), 0, "slots leak");
        assert_eq!(shard.staging_out(), 0, "staging buffers leak");
        assert_eq!(shard.kernel().files_open(), 0, "files leak");
        assert_eq!(shard.kernel().buffers_lent(), 0, "receive buffers leak");
        assert_eq!(shard.kernel().pending(), 0, "requests leak");
        assert_eq!(
            self.limiter.connections(),
            self.elsewhere.len() as u64,
            "the limiter counts an ended connection"
        );
        let room = self.setup.config.connections_max + self.setup.room_elsewhere;
        assert_eq!(self.capacity.free() + self.elsewhere.len() as u32, room, "a place is lost");
        let counts = &self.counters.counts;
        for gauge in [
            &counts.sessions,
            &counts.echoes,
            &counts.handshakes,
            &counts.events_held,
            &counts.event_bytes_held,
            &counts.frames_queued,
            &counts.slots_used,
        ] {
            assert_eq!(gauge.get(), 0);
        }
        let ended: u64 = self.counters.ended.iter().map(|counter| counter.get()).sum();
        assert_eq!(ended, counts.accepted.get(), "one end for each accepted connection");
    }

    /// Checks of the totals, after the whole run.
    pub(super) fn check_end(&mut self) {
        let routers = SESSION_MANAGER + 1..PEERS;
        assert!(
            routers.clone().all(|peer| self.service.peers[peer].stopped),
            "a router did not get the last report"
        );
        let counts = &self.counters.counts;
        let never_taken = self.service.pushed.0 - counts.events_taken.get();
        if !self.stopped_early && !self.abandoned {
            assert_eq!(never_taken, 0);
            assert_eq!(counts.deliveries.get(), self.service.pushed.1);
        }
        if self.abandoned {
            return;
        }
        assert!(self.service.peers[SESSION_MANAGER].stopped);
        assert!(self.service.outstanding.len() as u64 <= never_taken, "a ticket is lost");
        assert_eq!(self.reports_opened, self.reports_ended);
        assert_eq!(counts.messages_passed.get(), self.reports_message);
        assert_eq!(counts.grace_expired.get(), self.reports_grace);
    }
}
