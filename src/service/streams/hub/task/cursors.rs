//! Cursors of the streams, as in a shard (`domain::cursor_schedule`).

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tokio::time::Instant;

use super::{CursorState, Hub, MANAGER, StreamRecord, StreamState};
use crate::domain::command::ShardReport;
use crate::domain::cursor::Cursor;
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::ids::ConnectionKey;
use crate::service::events::proto::delivery::v1::DeliveryEvent;
use crate::service::streams::hub::delivery::Delivery;
use crate::service::streams::hub::slot_map::SlotMap;

/// Cursors queued per turn.
const CURSORS_PER_TURN_MAX: usize = 256;

impl Hub {
    /// The client has asked for cursors, and the service knows that they will be right.
    pub(super) fn begin_cursors(&mut self, connection: ConnectionKey) {
        match self.streams.get_mut(connection) {
            Some(stream) if stream.cursors == CursorState::Off => stream.cursors = CursorState::On,
            _ => return self.metrics.counters.stream_commands_stale.add(1),
        }
        self.cursors.add(connection, |key| gets_cursors(&self.streams, key));
    }

    /// The stream is not given every event any more.
    pub(super) fn stop_cursors(&mut self, connection: ConnectionKey) {
        match self.streams.get_mut(connection) {
            Some(stream) => stream.cursors = CursorState::Off,
            None => self.metrics.counters.stream_commands_stale.add(1),
        }
    }

    /// A burst has drained.
    pub(super) fn want_cursor(&mut self, connection: ConnectionKey) {
        if !gets_cursors(&self.streams, connection) {
            return;
        }
        let stream = self.streams.get_mut(connection).expect("it was there just now");
        stream.bursts = stream.bursts.saturating_add(1);
        if stream.bursts == 1 {
            let now_ms = self.now_ms();
            self.cursors.want_after_burst(connection, now_ms);
        }
    }

    /// Queues the cursors that are due, and asks the session manager before the next ones.
    pub(super) fn send_cursors(&mut self) {
        let now_ms = self.now_ms();
        let streams = &self.streams;
        if self.cursors.begin_round(now_ms, |key| gets_cursors(streams, key), cursor_event) {
            self.report(MANAGER, ShardReport::Fence);
        }
        for _ in 0..CURSORS_PER_TURN_MAX {
            let Some(connection) = self.cursors.next_due() else { return };
            if let Some(stream) = self.streams.get_mut(connection) {
                // Another one has drained since it wanted this cursor, which may be before it.
                if std::mem::take(&mut stream.bursts) > 1 {
                    stream.bursts = 1;
                    self.cursors.want_after_burst(connection, now_ms);
                }
            }
            if !self.push_last_cursor(connection)
                && let Some(stream) = self.streams.get_mut(connection)
                && stream.cursors == CursorState::On
            {
                stream.cursors = CursorState::Owed;
            }
        }
    }

    /// Queues the last cursor, if the stream gets cursors and there is one. Returns whether it was queued.
    pub(super) fn push_last_cursor(&mut self, connection: ConnectionKey) -> bool {
        let Some(event) = self.cursors.last().map(Arc::clone) else { return false };
        if !gets_cursors(&self.streams, connection) {
            return false;
        }
        let Some(cursor) = Delivery::new(event, None, None, &self.notices) else { return false };
        let stream = self.streams.get(connection).expect("it was there just now");
        let queued = stream.outbox.push_cursor(&cursor, Instant::now());
        self.metrics.counters.stream_cursors_sent.add(u64::from(queued));
        queued
    }

    /// When a cursor is due next.
    pub(super) fn next_cursor(&self) -> Option<Instant> {
        let at_ms = self.cursors.next_ms(self.now_ms())?;
        self.began.checked_add(Duration::from_millis(at_ms))
    }

    /// Time since the hub began.
    pub(super) fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

fn gets_cursors(streams: &SlotMap<StreamRecord>, connection: ConnectionKey) -> bool {
    streams.get(connection).is_some_and(|stream| {
        stream.cursors != CursorState::Off && matches!(stream.state, StreamState::Live)
    })
}

/// An event with only a cursor.
fn cursor_event(cursor: &Cursor) -> Arc<Event> {
    let event = DeliveryEvent { cursor: cursor.encode(), ..DeliveryEvent::default() };
    let bytes = event.encode_to_vec().into_boxed_slice();
    Arc::new(Event::new(None, 0).with_frame(Encoding::Stream, bytes))
}
