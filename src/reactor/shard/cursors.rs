//! Cursors: the positions of the log that clients return with (`domain::cursor_schedule`). A session gets them only
//! after its client has asked for them, and only while it is live, so that no held event is behind one.

use std::rc::Rc;

use super::{SESSION_MANAGER, Shard};
use crate::domain::command::ShardReport;
use crate::domain::cursor::Cursor;
use crate::domain::ids::ConnectionKey;
use crate::domain::outgoing::Outgoing;
use crate::protocol::frame::{self, Opcode};
use crate::reactor::connection::{Connection, Flags, Lifecycle};
use crate::reactor::slab::Slab;
use crate::uring::Kernel;

/// Cursors queued per turn.
const CURSORS_PER_TURN_MAX: usize = 256;
/// A session whose queue becomes empty gets a cursor some time later if this many frames were sent since the last one.
const BURST_FRAMES: u8 = 64;

impl<K: Kernel> Shard<K> {
    /// The client has asked for cursors, and the service knows that they will be right.
    pub(super) fn begin_cursors(&mut self, key: ConnectionKey) {
        let Some(connection) = self.slab.get_mut(key).filter(|it| it.lifecycle.is_open()) else {
            return self.counters.counts.commands_stale.add(1);
        };
        connection.flags.set(Flags::CURSORS);
        self.add_for_cursors(key);
    }

    /// Lists a session that has gone live, or has asked for cursors while it is live.
    pub(super) fn add_for_cursors(&mut self, key: ConnectionKey) {
        if gets_cursors(&self.slab, key) {
            self.slab[key].flags.set(Flags::CURSOR_WANTED);
            self.cursors.add(key, |key| gets_cursors(&self.slab, key));
        }
    }

    /// The session is not given every event any more.
    pub(super) fn stop_cursors(&mut self, key: ConnectionKey) {
        match self.slab.get_mut(key) {
            Some(connection) => drop(connection.flags.clear(Flags::CURSORS)),
            None => self.counters.counts.commands_stale.add(1),
        }
    }

    /// Counts frames that were sent. When a burst has drained, the session wants a cursor.
    pub(super) fn count_for_cursor(&mut self, key: ConnectionKey, frames: usize) {
        let connection = &mut self.slab[key];
        if !connection.flags.has(Flags::CURSORS) {
            return;
        }
        let frames = u8::try_from(frames).unwrap_or(u8::MAX);
        let queue = &mut connection.queue;
        queue.since_cursor = queue.since_cursor.saturating_add(frames);
        let is_drained = queue.is_empty() && queue.since_cursor >= BURST_FRAMES;
        if is_drained && is_live(connection) && !connection.flags.set(Flags::CURSOR_WANTED) {
            connection.queue.since_cursor = 0;
            self.cursors.want_after_burst(key, self.kernel.now_ms());
        }
    }

    /// Queues the cursors that are due, and asks the session manager before the next ones. Returns whether some are
    /// left for the next turn.
    pub(super) fn send_cursors(&mut self) -> bool {
        if self.has_no_sessions_left() {
            return false;
        }
        let now_ms = self.kernel.now_ms();
        let slab = &self.slab;
        if self.cursors.begin_round(now_ms, |key| gets_cursors(slab, key), cursor_frame) {
            self.reports.push(SESSION_MANAGER, ShardReport::Fence);
        }
        for _ in 0..CURSORS_PER_TURN_MAX {
            let Some(key) = self.cursors.next_due() else { return false };
            let Some(connection) = self.slab.get_mut(key) else { continue };
            let was_wanted = connection.flags.clear(Flags::CURSOR_WANTED);
            // An almost full queue has no room for a cursor. Its session gets one when the queue has drained.
            if connection.queue.frames() >= usize::from(self.config.queue_frames_max / 2) {
                connection.queue.since_cursor = BURST_FRAMES;
                continue;
            }
            let queue = &mut connection.queue;
            if !was_wanted {
                queue.since_cursor = 0;
            } else if queue.is_empty() && queue.since_cursor >= BURST_FRAMES {
                // Another burst has drained since it wanted this one, which may be before it.
                queue.since_cursor = 0;
                connection.flags.set(Flags::CURSOR_WANTED);
                self.cursors.want_after_burst(key, now_ms);
            }
            self.push_last_cursor(key);
        }
        true
    }

    /// Queues the last cursor, if the session gets cursors and there is one.
    pub(super) fn push_last_cursor(&mut self, key: ConnectionKey) {
        let Some(frame) = self.cursors.last().map(Rc::clone) else { return };
        if gets_cursors(&self.slab, key) {
            self.counters.counts.cursors_sent.add(1);
            self.push(key, frame);
        }
    }

    /// When a cursor is due next.
    pub(super) fn next_cursor_ms(&self) -> Option<u64> {
        self.cursors.next_ms(self.kernel.now_ms()).filter(|_| !self.has_no_sessions_left())
    }
}

fn is_live(connection: &Connection) -> bool {
    matches!(connection.lifecycle, Lifecycle::Live | Lifecycle::Filtering(_))
}

fn gets_cursors(slab: &Slab<Connection>, key: ConnectionKey) -> bool {
    slab.get(key).is_some_and(|it| it.flags.has(Flags::CURSORS) && is_live(it))
}

/// The text of `docs/websocket.md`, the same for sessions of all encodings.
fn cursor_frame(cursor: &Cursor) -> Rc<Outgoing> {
    let text = format!(r#"{{"cursor":"{}"}}"#, cursor.to_text());
    Outgoing::own(frame::encode(Opcode::Text, false, text.as_bytes()))
}
