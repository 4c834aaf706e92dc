//! The model of a session: what the service side has sent to it, and what it may therefore receive.

use std::collections::{BTreeSet, VecDeque};

use crate::domain::close::EndReason;
use crate::domain::command::DeliveryClass;
use crate::domain::ids::{ConnectionKey, ConversationPosition};

/// An event of the model.
#[derive(Clone, Debug)]
pub(super) struct ModelEvent {
    pub(super) number: u64,
    pub(super) class: DeliveryClass,
    pub(super) position: Option<ConversationPosition>,
    /// Whether it can be encoded for the session.
    pub(super) expressible: bool,
    /// Its offset in the log of its router; only of live events.
    pub(super) offset: Option<i64>,
}

/// The shard's deadlines that affect what a session may receive, ms.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) resume_grace_ms: u64,
    pub(super) dedupe_ms: u64,
}

/// The model of one session.
#[derive(Debug, Default)]
pub(super) struct Session {
    pub(super) key: Option<ConnectionKey>,
    pub(super) admitted_at_ms: Option<u64>,
    pub(super) refused: bool,
    pub(super) closed_by_service: bool,
    pub(super) live_at_ms: Option<u64>,
    pub(super) grace_expired: bool,
    pub(super) ended: Option<EndReason>,
    /// Per peer, the events that were addressed to it and not received, in order.
    pub(super) addressed: Vec<VecDeque<ModelEvent>>,
    pub(super) seen: u64,
    /// Texts of the service that must arrive.
    pub(super) texts: VecDeque<String>,
    /// What catch-up delivered: conversations and sequences.
    filter: BTreeSet<(u64, i64)>,
    /// An event is missing that only the filter can have dropped.
    relied_on_filter: bool,
    /// It received something that only the end of the grace period explains.
    presumes_grace_expired: bool,
    pub(super) close_seen: Option<u16>,
    /// Caught-up messages that wait for earlier ones to be done.
    pub(super) catch_up: VecDeque<ModelEvent>,
    pub(super) catch_up_in_flight: usize,
    pub(super) delivered: Vec<ConversationPosition>,
    pub(super) resume_asked: bool,
    /// Events reported done before they were received: correct only if the session has ended.
    presumed: BTreeSet<u64>,
    /// The client has asked for cursors.
    pub(super) wants_cursors: bool,
    /// The client has asked for cursors, and the shard was told.
    pub(super) cursors: bool,
    /// It has left the directory: the next offset of each router at that time.
    pub(super) left_at: Option<Vec<i64>>,
    /// The positions of its last cursor, by router.
    pub(super) cursor: Vec<i64>,
    /// One of them was received later: correct only if the session was closing with a send in
    /// flight.
    done_early: bool,
}

impl Session {
    pub(super) fn address(&mut self, peer: usize, event: ModelEvent) {
        if self.addressed.len() <= peer {
            self.addressed.resize_with(peer + 1, VecDeque::new);
        }
        self.addressed[peer].push_back(event);
    }

    pub(super) fn release(&mut self, now_ms: u64) {
        self.live_at_ms = Some(now_ms);
        let delivered = self.delivered.iter().map(|at| (at.conversation.0, at.sequence));
        self.filter.extend(delivered);
    }

    /// Whether the filter drops this event.
    pub(super) fn covers(&self, event: &ModelEvent) -> bool {
        let Some(position) =
            event.position.filter(|_| event.class == DeliveryClass::Live && event.expressible)
        else {
            return false;
        };
        self.filter.contains(&(position.conversation.0, position.sequence))
    }

    /// The session received this event. It must have been addressed to it, in this order, with
    /// nothing missing before it.
    pub(super) fn receives(&mut self, peer: usize, number: u64, now_ms: u64, limits: Limits) {
        self.seen += 1;
        loop {
            let event = self.addressed.get_mut(peer).and_then(VecDeque::pop_front);
            let event =
                event.expect("an event that was not addressed to the session, or a duplicate");
            let covered = self.covers(&event);
            if event.number != number {
                self.misses(&event, covered);
                continue;
            }
            assert!(event.expressible, "an event without a frame");
            self.done_early |= self.presumed.remove(&number);
            if event.class == DeliveryClass::Live {
                self.receives_live(covered, now_ms, limits);
            }
            return;
        }
    }

    /// The session received a cursor with these positions, by router. It was given every event of its user below them.
    pub(super) fn receives_cursor(&mut self, positions: Vec<i64>) {
        assert!(self.cursors, "a cursor that nobody asked for");
        assert!(self.live_at_ms.is_some(), "a cursor during catch-up");
        let caught_up = self.addressed.first().is_none_or(VecDeque::is_empty);
        assert!(caught_up, "a cursor before a caught-up message");
        for (router, next) in positions.iter().enumerate() {
            let left_at = self.left_at.as_ref().map_or(i64::MAX, |at| at[router]);
            assert!(*next <= left_at, "a cursor covers what was routed after the session had left");
            let below = |event: &&ModelEvent| event.offset.is_some_and(|offset| offset < *next);
            let missing = self.addressed.get(router + 1).into_iter().flatten();
            let missing = missing.take_while(below).filter(|event| event.expressible);
            for event in missing {
                assert!(self.covers(event), "a cursor before an event below it: {event:?}");
            }
        }
        self.cursor = positions;
    }

    fn misses(&mut self, event: &ModelEvent, covered: bool) {
        if event.expressible {
            assert!(covered, "lost: {event:?}");
            self.relied_on_filter = true;
            self.presumed.remove(&event.number);
        }
    }

    fn receives_live(&mut self, covered: bool, now_ms: u64, limits: Limits) {
        let caught_up = self.addressed.first().is_none_or(VecDeque::is_empty);
        let lawful = self
            .live_at_ms
            .is_some_and(|at_ms| caught_up && (!covered || now_ms >= at_ms + limits.dedupe_ms));
        if !lawful && !self.grace_expired {
            // Only the end of the grace period explains this; its report must follow.
            let grace_over =
                self.admitted_at_ms.is_some_and(|at_ms| now_ms >= at_ms + limits.resume_grace_ms);
            assert!(grace_over, "a live event before the end of catch-up, or a duplicate of it");
            self.presumes_grace_expired = true;
        }
    }

    /// Nothing more will come: unless the session has ended, nothing may be missing.
    pub(super) fn check_complete(&mut self) {
        self.check_filter();
        if self.ended.is_some() || self.close_seen.is_some() || self.admitted_at_ms.is_none() {
            return;
        }
        for peer in 0..self.addressed.len() {
            while let Some(event) = self.addressed[peer].pop_front() {
                let covered = self.covers(&event);
                self.misses(&event, covered);
            }
        }
        self.check_filter();
        assert!(!self.done_early && self.presumed.is_empty(), "reported done too early");
        assert!(self.texts.is_empty(), "a text of the service is lost");
    }

    fn check_filter(&self) {
        assert!(!(self.relied_on_filter && self.grace_expired), "dropped without a filter");
        assert!(
            !self.presumes_grace_expired || self.grace_expired,
            "live before the end of the grace period"
        );
    }

    /// A delivery to this session was reported done.
    pub(super) fn presume_done(&mut self, peer: usize, number: u64) {
        let waits = self
            .addressed
            .get(peer)
            .and_then(|queue| queue.iter().find(|event| event.number == number));
        if waits.is_some_and(|event| event.expressible) {
            self.presumed.insert(number);
        }
    }

    /// Whether it gets a cursor whenever something was routed.
    pub(super) fn awaits_cursors(&self) -> bool {
        let stays = self.ended.is_none() && self.close_seen.is_none() && !self.closed_by_service;
        self.cursors && stays && self.left_at.is_none()
    }

    /// Whether nothing more is expected while everything is at rest.
    pub(super) fn is_at_rest(&self) -> bool {
        self.ended.is_some() || self.live_at_ms.is_some() || self.grace_expired
    }
}
