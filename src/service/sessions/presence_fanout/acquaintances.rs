//! Who shares a conversation with whom, remembered for a short time and within a bound.
//!
//! A user who was added to a conversation or removed from one voids what is remembered of him, and
//! what names him: a removed member hears nothing more. Which entries name him is found out when
//! they are used, so that a change costs nothing but a note of it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

/// Notes of changes that are kept; when there are more everything is forgotten instead.
const CHANGES_MAX: usize = 10_000;

/// Users, none twice.
pub(super) type Users = Arc<[Arc<str>]>;

/// Oldest first out. An entry weighs one and as many as it names.
#[derive(Debug)]
pub(super) struct Acquaintances {
    lifetime: Duration,
    weight_max: usize,
    entries: HashMap<Arc<str>, (Users, Instant)>,
    /// In order of age; an entry that was replaced is here twice, and the older one is void.
    ages: VecDeque<(Arc<str>, Instant)>,
    weight: usize,
    /// Whose conversations changed, and when the last time: within the lifetime.
    changes: HashMap<Arc<str>, Instant>,
    /// What was asked for before is not remembered.
    forgotten: Option<Instant>,
}

impl Acquaintances {
    pub(super) fn new(lifetime: Duration, weight_max: usize) -> Self {
        Self {
            lifetime,
            weight_max,
            entries: HashMap::new(),
            ages: VecDeque::new(),
            weight: 0,
            changes: HashMap::new(),
            forgotten: None,
        }
    }

    /// The user was added to a conversation or removed from one.
    pub(super) fn changed(&mut self, user: &str, now: Instant) {
        if self.entries.is_empty() {
            // What is being asked for now may still be from before.
            self.changes.clear();
            self.forgotten = Some(now);
            return;
        }
        if self.changes.len() >= CHANGES_MAX {
            let lifetime = self.lifetime;
            self.changes.retain(|_, at| now.duration_since(*at) < lifetime);
        }
        if self.changes.len() >= CHANGES_MAX {
            *self = Self { forgotten: Some(now), ..Self::new(self.lifetime, self.weight_max) };
        } else {
            self.changes.insert(user.into(), now);
        }
    }

    fn has_changed(&self, user: &str, since: Instant) -> bool {
        self.changes.get(user).is_some_and(|at| *at >= since)
    }

    pub(super) fn find(&self, user: &str, now: Instant) -> Option<Users> {
        let (found, since) = self.entries.get(user)?;
        let good = now.duration_since(*since) < self.lifetime
            && (self.changes.is_empty()
                || !(self.has_changed(user, *since)
                    || found.iter().any(|named| self.has_changed(named, *since))));
        good.then(|| Arc::clone(found))
    }

    /// Remembers what was asked for at `asked`, unless it is more than all that may be remembered.
    pub(super) fn remember(&mut self, user: Arc<str>, found: Users, asked: Instant, now: Instant) {
        if self.forgotten.is_some_and(|at| at >= asked) {
            return;
        }
        if let Some((old, _)) = self.entries.remove(&user) {
            self.weight -= weight(&old);
        }
        if weight(&found) > self.weight_max {
            return;
        }
        self.weight += weight(&found);
        self.entries.insert(Arc::clone(&user), (found, asked));
        self.ages.push_back((user, asked));
        while let Some((user, since)) = self.ages.front() {
            let void = self.entries.get(user).is_none_or(|(_, current)| current != since);
            let over = now.duration_since(*since) >= self.lifetime;
            if !void && !over && self.weight <= self.weight_max {
                break;
            }
            if !void && let Some((old, _)) = self.entries.remove(user) {
                self.weight -= weight(&old);
            }
            self.ages.pop_front();
        }
    }

    pub(super) fn weight(&self) -> usize {
        self.weight
    }
}

fn weight(found: &Users) -> usize {
    1 + found.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(count: usize) -> Users {
        (0..count).map(|n| Arc::from(n.to_string())).collect()
    }

    #[test]
    fn oldest_go_for_room_and_for_age() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut remembered = Acquaintances::new(Duration::from_secs(10), 10);
        remembered.remember("a".into(), of(4), at(0), at(0));
        remembered.remember("b".into(), of(4), at(1), at(1));
        assert_eq!(remembered.weight(), 10);
        remembered.remember("c".into(), of(0), at(2), at(2));
        assert!(remembered.find("a", at(2)).is_none());
        assert!(remembered.find("b", at(10)).is_some());
        assert!(remembered.find("b", at(11)).is_none());
        remembered.remember("d".into(), of(0), at(11), at(11));
        assert_eq!((remembered.weight(), remembered.ages.len()), (2, 2));
    }

    #[test]
    fn replaced_entry_counts_once() {
        let now = Instant::now();
        let mut remembered = Acquaintances::new(Duration::from_secs(10), 100);
        for second in 0..50 {
            remembered.remember(
                "a".into(),
                of(3),
                now + Duration::from_secs(second) / 10,
                now + Duration::from_secs(second) / 10,
            );
        }
        assert_eq!(remembered.weight(), 4);
        assert_eq!(remembered.ages.len(), 1);
    }

    #[test]
    fn what_is_larger_than_everything_is_not_kept() {
        let now = Instant::now();
        let mut remembered = Acquaintances::new(Duration::from_secs(10), 10);
        remembered.remember("a".into(), of(3), now, now);
        remembered.remember("a".into(), of(10), now, now);
        assert_eq!((remembered.weight(), remembered.find("a", now)), (0, None));
    }

    fn with(names: &[&str]) -> Users {
        names.iter().map(|name| Arc::from(*name)).collect()
    }

    #[test]
    fn change_voids_what_is_known_of_a_user_and_what_names_him() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut remembered = Acquaintances::new(Duration::from_secs(10), 100);
        remembered.remember("a".into(), with(&["b", "c"]), at(0), at(0));
        remembered.remember("b".into(), with(&["a"]), at(0), at(0));
        remembered.remember("d".into(), with(&["e"]), at(0), at(0));
        remembered.changed("b", at(1));
        assert!(remembered.find("a", at(1)).is_none(), "names him");
        assert!(remembered.find("b", at(1)).is_none(), "is of him");
        assert!(remembered.find("d", at(1)).is_some());
        // An answer to a question from before the change is as void.
        remembered.remember("a".into(), with(&["b", "c"]), at(1), at(2));
        assert!(remembered.find("a", at(2)).is_none());
        remembered.remember("a".into(), with(&["c"]), at(2), at(2));
        remembered.remember("b".into(), with(&[]), at(2), at(2));
        assert_eq!(remembered.find("a", at(2)), Some(with(&["c"])));
        assert!(remembered.find("b", at(2)).is_some());
    }

    #[test]
    fn answer_that_is_under_way_is_void_too_while_nothing_is_remembered() {
        let start = Instant::now();
        let later = start + Duration::from_secs(1);
        let mut remembered = Acquaintances::new(Duration::from_secs(10), 100);
        remembered.changed("b", later);
        remembered.remember("a".into(), with(&["b"]), start, later);
        assert!(remembered.find("a", later).is_none());
    }

    #[test]
    fn changes_are_bounded_and_too_many_forget_everything() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut remembered = Acquaintances::new(Duration::from_secs(10), 100);
        remembered.remember("a".into(), of(3), at(0), at(0));
        for user in 0..CHANGES_MAX {
            remembered.changed(&format!("stranger-{user}"), at(1));
        }
        assert!(remembered.find("a", at(1)).is_some());
        remembered.changed("one-more", at(2));
        assert!(remembered.find("a", at(2)).is_none());
        assert_eq!((remembered.weight(), remembered.changes.len()), (0, 0));
        remembered.remember("a".into(), of(3), at(2), at(3));
        assert!(remembered.find("a", at(3)).is_none(), "asked before");
        remembered.remember("a".into(), of(3), at(3), at(3));
        assert!(remembered.find("a", at(3)).is_some());
        // Those that are older than anything remembered can be are not in the way.
        for user in 0..=CHANGES_MAX {
            let ages = if user < CHANGES_MAX { 4 } else { 14 };
            remembered.remember("a".into(), of(3), at(ages), at(ages));
            remembered.changed(&format!("stranger-{user}"), at(ages));
        }
        assert_eq!(remembered.changes.len(), 1);
        assert!(remembered.find("a", at(14)).is_some());
    }
}
