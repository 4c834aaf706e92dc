//! Sessions with several conversations: what each has of each one, and the cursors that it was given.

use super::tally::Tally;
use crate::clock::now_ns;
use crate::generator::conversation;
use crate::payload::{Stamp, conversation_id, conversation_in};

/// What the sessions of a client have, 4 bytes for each session and conversation.
#[derive(Debug)]
pub(super) struct Rooms {
    /// Number of the first session.
    first: usize,
    group: usize,
    each: usize,
    /// The last sequence of each conversation of each session; 0: none.
    marks: Vec<u32>,
    /// The last cursor of each session; empty if the client does not use them.
    cursors: Vec<Option<Box<str>>>,
}

impl Rooms {
    /// Sessions in groups of `group` with `each` conversations.
    pub(super) fn new(
        first: usize,
        sessions: usize,
        (group, each): (usize, usize),
        with_cursors: bool,
    ) -> Self {
        let cursors = if with_cursors { vec![None; sessions] } else { Vec::new() };
        Self { first, group, each, marks: vec![0; sessions * each], cursors }
    }

    /// The first message of a session: what it has of each conversation, and its cursor.
    pub(super) fn hello(&self, index: usize) -> String {
        let at = (self.first + index) / self.group * self.each;
        let named = self.marks[index * self.each..][..self.each].iter().enumerate();
        let named: Vec<_> = named
            .map(|(n, mark)| {
                format!(r#""{}":{mark}"#, conversation_id(conversation(self.group, at + n)))
            })
            .collect();
        let named = format!(r#""last_sequences":{{{}}}"#, named.join(","));
        match self.cursors.get(index) {
            None => format!("{{{named}}}"),
            Some(None) => format!(r#"{{"cursor":null,{named}}}"#),
            Some(Some(cursor)) => format!(r#"{{"cursor":"{cursor}",{named}}}"#),
        }
    }

    /// Takes what a session received: a text of the server about cursors, or an event.
    pub(super) fn receive(&mut self, index: usize, payload: &[u8], tally: &mut Tally) {
        if payload.starts_with(br#"{"cursor_expired""#) {
            tally.expired += 1;
        } else if let Some(cursor) = cursor_of(payload) {
            tally.cursors += 1;
            tally.last_cursor_ns = now_ns();
            self.cursors[index] = Some(cursor.into());
        } else {
            self.event(index, payload, tally);
        }
    }

    fn event(&mut self, index: usize, payload: &[u8], tally: &mut Tally) {
        let now = now_ns();
        tally.messages += 1;
        tally.first_ns.get_or_insert(now);
        tally.last_ns = now;
        let (Some(stamp), Some(number)) = (Stamp::find(payload), conversation_in(payload)) else {
            tally.unstamped += 1;
            return;
        };
        let room = (number - conversation(self.group, 0)) % self.each;
        let (mark, sequence) = (&mut self.marks[index * self.each + room], stamp.sequence as u32);
        if sequence <= *mark {
            tally.repeated += 1;
            return;
        }
        tally.gaps += u64::from(sequence - *mark - 1);
        tally.distinct += 1;
        *mark = sequence;
        tally.latency.record(now.saturating_sub(stamp.intended_ns));
    }
}

fn cursor_of(payload: &[u8]) -> Option<&str> {
    let text = payload.strip_prefix(br#"{"cursor":""#)?.strip_suffix(br#""}"#)?;
    std::str::from_utf8(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::payload::Template;

    #[test]
    fn what_a_session_has_is_what_it_names() {
        let mut rooms = Rooms::new(2, 2, (2, 3), true);
        let mut tally = Tally::default();
        let template = Template::new(128);
        // Sessions 2 and 3 have the conversations 3, 4 and 5 of this size.
        for (at, sequence) in [(4, 1), (4, 2), (5, 1), (4, 2), (5, 4)] {
            let stamp = Stamp { sequence, intended_ns: 0 };
            rooms.receive(1, &template.envelope(conversation(2, at), stamp), &mut tally);
        }
        assert_eq!((tally.distinct, tally.repeated, tally.gaps), (4, 1, 2));
        let named = r#""last_sequences":{"c0020003":0,"c0020004":2,"c0020005":4}"#;
        assert_eq!(rooms.hello(1), format!(r#"{{"cursor":null,{named}}}"#));
        rooms.receive(1, br#"{"cursor":"AQ"}"#, &mut tally);
        assert_eq!(rooms.hello(1), format!(r#"{{"cursor":"AQ",{named}}}"#));
        rooms.receive(1, br#"{"cursor_expired":"too old"}"#, &mut tally);
        assert_eq!((tally.cursors, tally.expired, tally.messages), (1, 1, 5));
    }
}
