//! Clients that return with cursors (docs/websocket.md, *Cursors*).

use serde_json::{Value, json};

use crate::support::tally::{Tally, Totals};

/// What a client with cursors keeps, and what its sessions got.
#[derive(Debug, Default)]
pub(super) struct CursorUser {
    cursor: Option<String>,
    /// Of the session that is connected.
    session: Tally,
    /// Of all sessions before.
    repeated: Totals,
}

impl CursorUser {
    /// The first message of its next session.
    pub(super) fn first_message(&mut self) -> String {
        self.session_ended();
        json!({ "cursor": self.cursor, "last_sequences": {} }).to_string()
    }

    pub(super) fn received(&mut self, payload: &[u8]) {
        self.session.saw(payload);
    }

    pub(super) fn text(&mut self, text: &str) {
        let text: Value = serde_json::from_str(text).expect("JSON");
        if let Some(cursor) = text.get("cursor").and_then(Value::as_str) {
            self.cursor = Some(cursor.to_owned());
        }
    }

    fn session_ended(&mut self) {
        for stream in std::mem::take(&mut self.session).streams.into_values() {
            self.repeated.duplicates += stream.duplicates;
            self.repeated.out_of_order += stream.out_of_order;
        }
    }

    /// Messages that came twice within one session, or behind a later one.
    pub(super) fn within_sessions(mut self) -> Totals {
        self.session_ended();
        self.repeated
    }
}
