//! What all sessions got, compared with what was published.

use std::collections::BTreeMap;

use crate::support::tally::Totals;

use super::{Scene, Session};

impl Scene {
    fn published(&self) -> BTreeMap<String, i64> {
        self.conversations.iter().cloned().zip(self.last.iter().copied()).collect()
    }

    pub(super) fn totals(&self) -> Totals {
        self.totals_of(|_| true)
    }

    pub(super) fn totals_of(&self, which: impl Fn(&Session) -> bool) -> Totals {
        let published = self.published();
        let by_user = self.world.by_user();
        let mut totals = Totals::default();
        for session in self.sessions.iter().filter(|session| which(session)) {
            let mine = by_user.get(session.user.as_str()).into_iter().flatten();
            let mine = mine.map(|id| ((*id).to_owned(), published[*id])).collect();
            session.tally.add_to(&mut totals, &mine);
        }
        totals
    }
}
