//! The events that were replayed to a session, within its bound.

use super::positions::RUNS_PER_SESSION_MAX;
use crate::domain::caught_up::{CaughtUp, SequenceRun};
use crate::domain::event::Event;

/// The events that were replayed.
#[derive(Debug, Default)]
pub(super) struct ReplayedRuns {
    /// Runs of sequences.
    messages: Vec<SequenceRun>,
    /// Runs of offsets, for the events that are no messages.
    others: Vec<SequenceRun>,
    forgotten: u64,
}

impl ReplayedRuns {
    pub(super) fn add(&mut self, event: &Event, is_message: bool) {
        let runs = if is_message { &mut self.messages } else { &mut self.others };
        runs.extend(event.position.map(SequenceRun::one));
        if self.len() > 2 * RUNS_PER_SESSION_MAX {
            self.compact();
        }
    }

    fn len(&self) -> usize {
        self.messages.len() + self.others.len()
    }

    /// Joins the runs. Beyond the bound those of the lowest sequences and offsets are forgotten, of both in proportion: what
    /// can be repeated is near the end of the log.
    fn compact(&mut self) {
        for runs in [&mut self.messages, &mut self.others] {
            *runs = CaughtUp::new(None, std::mem::take(runs)).runs().to_vec();
        }
        let all = self.len();
        if all <= RUNS_PER_SESSION_MAX {
            return;
        }
        for runs in [&mut self.messages, &mut self.others] {
            let over = runs.len() - runs.len() * RUNS_PER_SESSION_MAX / all;
            runs.sort_unstable_by_key(|run| run.last);
            runs.drain(..over);
            self.forgotten += over as u64;
        }
    }

    /// The runs within the bound of a session, and how many are forgotten.
    pub(super) fn into_runs(mut self) -> (Vec<SequenceRun>, u64) {
        self.compact();
        self.messages.append(&mut self.others);
        (self.messages, self.forgotten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::{ConversationKey, ConversationPosition};

    #[test]
    fn runs_of_a_long_replay_are_bounded() {
        let mut replayed = ReplayedRuns::default();
        for sequence in 0..10 * RUNS_PER_SESSION_MAX as i64 {
            let conversation = ConversationKey(sequence as u64 % 3);
            // Each second message is missing, so that no two runs can be joined.
            let position = ConversationPosition { conversation, sequence: 2 * sequence };
            replayed.add(&Event::new(Some(position), 0), true);
            // Offsets are far above sequences.
            let at = ConversationPosition {
                conversation: ConversationKey(9),
                sequence: (1 << 40) + 2 * sequence,
            };
            replayed.add(&Event::default().at_log_position(at), false);
            assert!(replayed.len() <= 2 * RUNS_PER_SESSION_MAX);
        }
        replayed.compact();
        let newest = 2 * (10 * RUNS_PER_SESSION_MAX as i64 - 1);
        for (runs, newest) in [(&replayed.messages, newest), (&replayed.others, (1 << 40) + newest)]
        {
            assert_eq!(runs.len(), RUNS_PER_SESSION_MAX / 2);
            assert_eq!(runs.last().expect("not empty").last, newest, "the newest are kept");
        }
        assert_eq!(replayed.forgotten, 19 * RUNS_PER_SESSION_MAX as u64);
    }
}
