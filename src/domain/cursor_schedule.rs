//! When which session gets a cursor. One schedule per shard; it reads no clock and sends nothing.
//!
//! ```text
//!            Routed            fence                 fence answered
//!  positions ──────► round ──────────► (waits) ──────────────────► frame ──► due sessions
//! ```
//!
//! A cursor says what a session has been given, so it must not cover a record that the routers have not sent to the
//! session because it had left the directory. The shard learns of that from the session manager, over another ring
//! than the one that brings positions. So each *round* takes the positions, asks the session manager, and uses these
//! positions when the answer has come: by then every session that had left has been withdrawn.
//!
//! A round is due when a session wants a cursor (it went live, or a burst has drained for [`BURST_SETTLES_MS`], so that
//! the positions cover it), and [`STEPS`] times per interval if something was routed. Then it also serves one of
//! [`STEPS`] parts of the sessions, so that they do not all get their cursors at once, and the last frame is never much
//! older than a step.

use std::collections::VecDeque;

use crate::domain::cursor::{Cursor, LogPosition, RoutedPositions};
use crate::domain::ids::ConnectionKey;

/// Rounds per interval.
pub const STEPS: u64 = 16;

/// Time between two rounds in which a router gives the shards its positions, ms.
pub const POSITIONS_INTERVAL_MS: u64 = 250;
/// How long after a burst a cursor is made for it, ms, if that is not longer than the interval: until then the
/// positions have been told that cover the burst, in `group` mode those of other nodes as well.
pub const BURST_SETTLES_MS: u64 = 2_000;

/// Below this number of sessions, those that have ended are not looked for.
const SESSIONS_KEPT: usize = 64;

/// A session that gets cursors.
#[derive(Debug)]
struct CursorSession {
    key: ConnectionKey,
    /// The version of the positions that its part was last served with.
    version: u64,
}

/// Positions and the frame that was made of them.
#[derive(Debug)]
struct Made<F> {
    version: u64,
    frame: F,
}

/// A round under way.
#[derive(Debug)]
struct Round<F> {
    /// `None`: nothing was routed since the last round.
    made: Option<Made<F>>,
    wanted: Vec<ConnectionKey>,
    /// Serves a part of all sessions too.
    is_step: bool,
}

/// The cursors of a shard's sessions. `F`: a frame that many sessions share.
#[derive(Debug)]
pub struct CursorSchedule<F> {
    routed: RoutedPositions,
    step_ms: u64,
    burst_settles_ms: u64,
    /// Some have ended.
    sessions: Vec<CursorSession>,
    /// At this number of sessions, those that have ended are removed.
    sessions_next: usize,
    /// These want a cursor as soon as possible.
    wanted: Vec<ConnectionKey>,
    /// These want one at this time, ascending.
    settling: VecDeque<(u64, ConnectionKey)>,
    round: Option<Round<F>>,
    /// Of the last complete round: valid for every session that is live and has not left the directory.
    last: Option<Made<F>>,
    /// These get the last frame, in order.
    due: VecDeque<ConnectionKey>,
    next_step_ms: u64,
    step: u64,
    /// Steps since the positions or the places of sessions last changed: after [`STEPS`] of them all sessions have the
    /// last frame.
    quiet_steps: u64,
}

/// Memory of one session that gets cursors, bytes, at most: its entry, twice as many because ended ones are removed
/// late, and its places in the lists of those that want one, will want one after a burst, or are due. All of them grow
/// by doubling.
pub const CURSOR_SESSION_BYTES_MAX: usize = 2
    * (2 * size_of::<CursorSession>()
        + 3 * size_of::<ConnectionKey>()
        + 2 * size_of::<(u64, ConnectionKey)>());

impl<F> CursorSchedule<F> {
    /// Without sessions and positions. Each session gets a cursor every `interval_ms`.
    pub fn new(interval_ms: u64) -> Self {
        Self {
            routed: RoutedPositions::default(),
            step_ms: (interval_ms / STEPS).max(1),
            burst_settles_ms: BURST_SETTLES_MS.min(interval_ms),
            sessions: Vec::new(),
            sessions_next: SESSIONS_KEPT,
            wanted: Vec::new(),
            settling: VecDeque::new(),
            round: None,
            last: None,
            due: VecDeque::new(),
            next_step_ms: 0,
            step: 0,
            quiet_steps: 0,
        }
    }

    /// Notes positions of a router.
    pub fn routed(&mut self, positions: &[LogPosition]) {
        self.routed.update(positions);
    }

    /// A session that asked for cursors is live, and wants its first one. The caller adds it once. `is_open`: whether a
    /// session still gets cursors.
    pub fn add(&mut self, key: ConnectionKey, is_open: impl Fn(ConnectionKey) -> bool) {
        if self.sessions.len() >= self.sessions_next {
            self.forget_ended(is_open);
        }
        self.sessions.push(CursorSession { key, version: 0 });
        self.want(key);
    }

    /// The session wants a cursor that covers what it was given until now. It is due once for each call, so a caller
    /// that bounds the calls bounds the list.
    pub fn want(&mut self, key: ConnectionKey) {
        self.wanted.push(key);
    }

    /// A burst has drained at `now_ms`: the session wants a cursor that covers it. As for [`CursorSchedule::want`], the
    /// caller bounds the calls.
    pub fn want_after_burst(&mut self, key: ConnectionKey, now_ms: u64) {
        self.settling.push_back((now_ms + self.burst_settles_ms, key));
    }

    fn forget_ended(&mut self, is_open: impl Fn(ConnectionKey) -> bool) {
        let before = self.sessions.len();
        self.sessions.retain(|session| is_open(session.key));
        if self.sessions.len() < before {
            // A session that is not served yet may be in a part now that has been.
            self.quiet_steps = 0;
        }
        self.sessions_next = 2 * self.sessions.len() + SESSIONS_KEPT;
    }

    /// The last frame: valid for every session that went live and has not been withdrawn.
    pub fn last(&self) -> Option<&F> {
        self.last.as_ref().map(|made| &made.frame)
    }

    fn is_step_due(&self, now_ms: u64) -> bool {
        now_ms >= self.next_step_ms && self.has_more_steps()
    }

    fn has_more_steps(&self) -> bool {
        let is_new = self.last.as_ref().is_none_or(|made| made.version != self.routed.version());
        !self.sessions.is_empty()
            && self.routed.version() > 0
            && (is_new || self.quiet_steps < STEPS)
    }

    /// Begins a round if one is due. Returns whether the caller has to ask the session manager now, and to call
    /// [`CursorSchedule::fence_answered`] later. `is_open`: whether a session still gets cursors. `make` turns the
    /// positions into a frame, once for all sessions.
    pub fn begin_round(
        &mut self,
        now_ms: u64,
        is_open: impl Fn(ConnectionKey) -> bool,
        make: impl FnOnce(&Cursor) -> F,
    ) -> bool {
        while let Some(&(at_ms, key)) = self.settling.front()
            && at_ms <= now_ms
        {
            self.settling.pop_front();
            // It may have ended since its burst.
            self.wanted.extend(is_open(key).then_some(key));
        }
        let is_step = self.is_step_due(now_ms);
        let is_due = is_step || !self.wanted.is_empty();
        if self.round.is_some() || !self.due.is_empty() || !is_due {
            return false;
        }
        if is_step {
            self.next_step_ms = now_ms + self.step_ms;
            self.step = (self.step + 1) % STEPS;
            if self.step == 0 {
                self.forget_ended(is_open);
            }
        }
        let version = self.routed.version();
        let is_new = self.last.as_ref().is_none_or(|last| last.version != version);
        let made = match self.routed.cursor().filter(|_| is_new) {
            Some(cursor) => Some(Made { version, frame: make(&cursor) }),
            None => None,
        };
        let asks = made.is_some();
        if asks || self.last.is_some() {
            self.round = Some(Round { made, wanted: std::mem::take(&mut self.wanted), is_step });
        }
        if !asks {
            self.complete_round();
        }
        asks
    }

    /// The session manager has answered: every session that had left the directory before the positions of this round
    /// came has been withdrawn.
    pub fn fence_answered(&mut self) {
        self.complete_round();
    }

    fn complete_round(&mut self) {
        let Some(Round { made, wanted, is_step }) = self.round.take() else { return };
        if let Some(made) = made {
            self.last = Some(made);
            self.quiet_steps = 0;
        }
        self.due.extend(wanted);
        let Some(last) = self.last.as_ref().filter(|_| is_step) else { return };
        self.quiet_steps += 1;
        let sessions = self.sessions.len() as u64;
        let part = |step: u64| (sessions * step / STEPS) as usize;
        for session in &mut self.sessions[part(self.step)..part(self.step + 1)] {
            if session.version != last.version {
                session.version = last.version;
                self.due.push_back(session.key);
            }
        }
    }

    /// The next session that gets [`CursorSchedule::last`]. The caller skips those that are not live or were
    /// withdrawn.
    pub fn next_due(&mut self) -> Option<ConnectionKey> {
        self.due.pop_front()
    }

    /// When the caller has to call [`CursorSchedule::begin_round`] again, if nothing else happens. `None`: not before
    /// something happens.
    pub fn next_ms(&self, now_ms: u64) -> Option<u64> {
        if !self.due.is_empty() {
            return Some(now_ms);
        }
        if self.round.is_some() || self.routed.version() == 0 {
            return None;
        }
        if !self.wanted.is_empty() {
            return Some(now_ms);
        }
        let step_ms = self.has_more_steps().then_some(self.next_step_ms);
        let settled_ms = self.settling.front().map(|(at_ms, _)| *at_ms);
        step_ms.into_iter().chain(settled_ms).min()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;
    use crate::domain::cursor::TopicId;
    use proptest::prelude::*;

    fn key(slot: u32) -> ConnectionKey {
        ConnectionKey { slot, generation: 0 }
    }

    fn at(next: i64) -> [LogPosition; 1] {
        [LogPosition { topic: TopicId(1), partition: 0, next, check: 0 }]
    }

    /// A schedule whose frames are the offset of their only position.
    struct Shard(CursorSchedule<i64>);

    impl Shard {
        fn new(sessions: u32) -> Self {
            let mut shard = Self(CursorSchedule::new(1_600));
            (0..sessions).for_each(|slot| shard.0.add(key(slot), |_| true));
            shard
        }

        fn begins(&mut self, now_ms: u64) -> bool {
            self.0.begin_round(now_ms, |_| true, |cursor| cursor.positions()[0].next)
        }

        /// The sessions that get a cursor now, and the cursor.
        fn due(&mut self) -> (Vec<u32>, Option<i64>) {
            let slots = std::iter::from_fn(|| self.0.next_due()).map(|key| key.slot).collect();
            (slots, self.0.last().copied())
        }
    }

    #[test]
    fn first_cursor_waits_for_positions_and_for_the_fence() {
        let mut shard = Shard::new(2);
        assert!(!shard.begins(0), "there are no positions");
        assert_eq!(shard.0.next_ms(0), None);
        shard.0.routed(&at(5));
        assert_eq!(shard.0.next_ms(0), Some(0));
        assert!(shard.begins(0));
        shard.0.routed(&at(6));
        assert!(!shard.begins(0), "one round at a time");
        assert_eq!(shard.due(), (vec![], None), "the fence is not answered");
        shard.0.fence_answered();
        assert_eq!(shard.due(), (vec![0, 1], Some(5)), "not 6: it came behind the fence");
    }

    #[test]
    fn session_that_goes_live_while_nothing_is_routed_gets_the_last_cursor() {
        let mut shard = Shard::new(1);
        shard.0.routed(&at(5));
        assert!(shard.begins(0));
        shard.0.fence_answered();
        assert_eq!(shard.due(), (vec![0], Some(5)));
        shard.0.add(key(7), |_| true);
        assert!(!shard.begins(1), "the frame is the same: nobody has to be asked");
        assert_eq!(shard.due(), (vec![7], Some(5)));
    }

    proptest! {
        /// Sessions that end move the others to earlier places.
        #[test]
        fn sessions_that_stay_get_the_newest_cursor_although_others_end(
            ended in prop::collection::vec((0..200_u32, 0..2 * STEPS), 0..200),
            routed_at in 0..STEPS,
        ) {
            let mut shard = Shard::new(200);
            shard.0.routed(&at(1));
            let mut newest: HashMap<u32, i64> = HashMap::new();
            let (mut now_ms, mut steps) = (0, 0);
            while let Some(at_ms) = shard.0.next_ms(now_ms) {
                now_ms = now_ms.max(at_ms);
                if steps == routed_at {
                    shard.0.routed(&at(2));
                }
                let is_open = |key: ConnectionKey| !ended.iter().any(|(slot, at)| *slot == key.slot && *at <= steps);
                if shard.0.begin_round(now_ms, is_open, |cursor| cursor.positions()[0].next) {
                    shard.0.fence_answered();
                }
                let (due, last) = shard.due();
                newest.extend(due.into_iter().map(|slot| (slot, last.expect("made"))));
                steps += 1;
            }
            prop_assume!(steps > routed_at);
            for slot in 0..200 {
                let stays = !ended.iter().any(|(other, _)| *other == slot);
                prop_assert!(!stays || newest[&slot] == 2, "{slot}");
            }
        }
    }

    #[test]
    fn all_sessions_get_one_cursor_per_interval_if_something_was_routed() {
        let mut shard = Shard::new(100);
        let (mut now_ms, mut rounds) = (0, 0);
        let mut counts: HashMap<u32, u32> = HashMap::new();
        let mut run = |shard: &mut Shard, counts: &mut HashMap<u32, u32>| {
            while let Some(at_ms) = shard.0.next_ms(now_ms) {
                now_ms = now_ms.max(at_ms);
                rounds += u32::from(shard.begins(now_ms));
                shard.0.fence_answered();
                shard.due().0.into_iter().for_each(|slot| *counts.entry(slot).or_default() += 1);
            }
            std::mem::take(&mut rounds)
        };
        shard.0.routed(&at(1));
        run(&mut shard, &mut counts);
        counts.clear();
        shard.0.routed(&at(2));
        assert_eq!(run(&mut shard, &mut counts), 1, "one frame for all");
        assert_eq!(counts.len(), 100);
        assert!(counts.values().all(|count| *count == 1), "{counts:?}");
        assert_eq!(shard.0.next_ms(now_ms), None, "nothing was routed: no timer");
    }

    /// The sentence of docs/websocket.md: “It covers the burst”.
    #[test]
    fn cursor_after_a_burst_covers_it() {
        let mut shard = Shard(CursorSchedule::new(15_000));
        shard.0.add(key(0), |_| true);
        shard.0.routed(&at(5));
        let mut now_ms = 0;
        let round = |shard: &mut Shard, now_ms: u64| {
            if shard.begins(now_ms) {
                shard.0.fence_answered();
            }
            shard.due()
        };
        assert_eq!(round(&mut shard, now_ms), (vec![0], Some(5)));
        // A hundred events, which drain before the router tells its next positions.
        now_ms += 10;
        shard.0.want_after_burst(key(0), now_ms);
        assert_eq!(round(&mut shard, now_ms).0, [0; 0], "a cursor of now is before the burst");
        shard.0.routed(&at(105));
        let mut cursors = Vec::new();
        while let Some(next_ms) = shard.0.next_ms(now_ms).filter(|at_ms| *at_ms <= 2_010) {
            now_ms = now_ms.max(next_ms);
            let (due, cursor) = round(&mut shard, now_ms);
            cursors.extend(due.into_iter().map(|_| cursor));
        }
        assert!(!cursors.is_empty() && cursors.iter().all(|it| *it == Some(105)), "{cursors:?}");
        assert_eq!(now_ms, 2_010, "nothing is due later than that");
    }

    #[test]
    fn ended_sessions_are_forgotten_although_nothing_is_routed() {
        let mut shard = Shard::new(0);
        for slot in 0..10_000 {
            shard.0.add(key(slot), |key| key.slot + 10 > slot);
            shard.0.wanted.clear();
            assert!(shard.0.sessions.len() <= 2 * SESSIONS_KEPT + 20, "{}", shard.0.sessions.len());
        }
    }

    proptest! {
        /// An oracle: a session that was withdrawn before an event, behind a fence or not, never gets a cursor that
        /// covers the event; and every session that stays gets the newest one in the end.
        #[test]
        fn no_cursor_covers_what_its_session_was_not_given(
            acts in prop::collection::vec((0..7u8, 0..8u32), 1..200),
        ) {
            let mut shard = Shard::new(8);
            let (mut log, mut now_ms) = (0, 0);
            // Offsets at which sessions left, and those that the shard knows of.
            let mut left: HashMap<u32, i64> = HashMap::new();
            let mut withdrawn = HashSet::new();
            let mut got: HashMap<u32, i64> = HashMap::new();
            let mut asked = false;
            for (act, slot) in acts {
                match act {
                    0 => {
                        log += 1;
                        shard.0.routed(&at(log));
                    }
                    1 => _ = left.entry(slot).or_insert(log),
                    2 if !withdrawn.contains(&slot) => shard.0.want(key(slot)),
                    5 if !withdrawn.contains(&slot) => shard.0.want_after_burst(key(slot), now_ms),
                    3 => asked |= shard.begins(now_ms),
                    4 if std::mem::take(&mut asked) => {
                        withdrawn.extend(left.keys().copied());
                        shard.0.fence_answered();
                    }
                    _ => now_ms += 60,
                }
                let (due, cursor) = shard.due();
                for slot in due.into_iter().filter(|slot| !withdrawn.contains(slot)) {
                    let cursor = cursor.expect("a frame");
                    let given = left.get(&slot).copied().unwrap_or(log);
                    prop_assert!(cursor <= given, "{cursor} covers what came after {given}");
                    got.insert(slot, cursor);
                }
            }
            for _ in 0..3 * STEPS {
                now_ms += 100;
                if asked | shard.begins(now_ms) {
                    asked = false;
                    withdrawn.extend(left.keys().copied());
                    shard.0.fence_answered();
                }
                let (due, cursor) = shard.due();
                got.extend(due.into_iter().map(|slot| (slot, cursor.expect("a frame"))));
            }
            for slot in (0..8).filter(|slot| !left.contains_key(slot)) {
                prop_assert_eq!(got.get(&slot).copied().unwrap_or(0), log);
            }
        }
    }
}
