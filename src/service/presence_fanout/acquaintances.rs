//! Who shares a conversation with whom, remembered for a short time and within a bound.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

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
}

impl Acquaintances {
    pub(super) fn new(lifetime: Duration, weight_max: usize) -> Self {
        Self { lifetime, weight_max, entries: HashMap::new(), ages: VecDeque::new(), weight: 0 }
    }

    pub(super) fn find(&self, user: &str, now: Instant) -> Option<Users> {
        let (found, since) = self.entries.get(user)?;
        (now.duration_since(*since) < self.lifetime).then(|| Arc::clone(found))
    }

    /// Remembers it, unless it is more than all that may be remembered.
    pub(super) fn remember(&mut self, user: Arc<str>, found: Users, now: Instant) {
        if let Some((old, _)) = self.entries.remove(&user) {
            self.weight -= weight(&old);
        }
        if weight(&found) > self.weight_max {
            return;
        }
        self.weight += weight(&found);
        self.entries.insert(Arc::clone(&user), (found, now));
        self.ages.push_back((user, now));
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
        remembered.remember("a".into(), of(4), at(0));
        remembered.remember("b".into(), of(4), at(1));
        assert_eq!(remembered.weight(), 10);
        remembered.remember("c".into(), of(0), at(2));
        assert!(remembered.find("a", at(2)).is_none());
        assert!(remembered.find("b", at(10)).is_some());
        assert!(remembered.find("b", at(11)).is_none());
        remembered.remember("d".into(), of(0), at(11));
        assert_eq!((remembered.weight(), remembered.ages.len()), (2, 2));
    }

    #[test]
    fn replaced_entry_counts_once() {
        let now = Instant::now();
        let mut remembered = Acquaintances::new(Duration::from_secs(10), 100);
        for second in 0..50 {
            remembered.remember("a".into(), of(3), now + Duration::from_secs(second) / 10);
        }
        assert_eq!(remembered.weight(), 4);
        assert_eq!(remembered.ages.len(), 1);
    }

    #[test]
    fn what_is_larger_than_everything_is_not_kept() {
        let now = Instant::now();
        let mut remembered = Acquaintances::new(Duration::from_secs(10), 10);
        remembered.remember("a".into(), of(3), now);
        remembered.remember("a".into(), of(10), now);
        assert_eq!((remembered.weight(), remembered.find("a", now)), (0, None));
    }
}
