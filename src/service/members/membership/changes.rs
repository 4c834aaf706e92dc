//! The membership changes that this node has read lately, by conversation and in the order of the log.
//!
//! Routers and the follower read the same partitions at their own pace, so a change can arrive twice, and a
//! later one first. Each is kept once, at its place in the log. Two changes in different partitions have no
//! order there; they keep the order in which they were read.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hashbrown::DefaultHashBuilder;

use crate::domain::members::Members;

/// How far a replica of the conversation service may lag. Changes that were read within this time before a
/// request are applied to its answer, because the answer may not contain them.
pub(super) const REPLICA_LAG_MAX: Duration = Duration::from_secs(30);

/// Position of a record in Kafka.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordPosition {
    /// Index of the topic among the topics of this node.
    pub topic: u16,
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
}

impl RecordPosition {
    /// The partition, without the offset.
    pub(super) fn log(self) -> (u16, i32) {
        (self.topic, self.partition)
    }

    /// Whether this is later than `other` in the same partition. Partitions have no common order.
    pub(super) fn is_after(self, other: RecordPosition) -> bool {
        self.log() == other.log() && self.offset > other.offset
    }
}

/// One user joined or left.
#[derive(Clone, Debug)]
pub(super) struct MemberChange {
    pub(super) user: Arc<str>,
    /// `true`: joined; `false`: left.
    pub(super) added: bool,
    pub(super) position: RecordPosition,
    /// Numbers the changes in the order in which they were read.
    serial: u64,
    read_at: Instant,
    /// Whether the user was a member before the change.
    was_member: bool,
}

/// When a request was made.
#[derive(Clone, Copy, Debug)]
pub struct RequestTime {
    /// The first change that was read afterwards has this serial or a later one.
    serial: u64,
    at: Instant,
}

/// Whether a change is the last one of its user, so that it decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inserted {
    Last,
    /// A later one of this user was read before.
    Superseded,
    /// It was read before.
    Known,
}

/// The serial and the conversation of a change.
type OfUser = (u64, Arc<str>);

/// Recent changes, the oldest evicted first.
#[derive(Debug)]
pub(super) struct RecentChanges {
    by_conversation: HashMap<Arc<str>, Vec<MemberChange>, DefaultHashBuilder>,
    /// Serials and conversations of the changes of each user.
    by_user: HashMap<Arc<str>, Vec<OfUser>, DefaultHashBuilder>,
    /// Every change, in the order in which it was read.
    order: VecDeque<(Arc<str>, u64)>,
    changes_max: usize,
    next_serial: u64,
    /// Changes with a lower serial may have been evicted.
    evicted_below: u64,
}

impl RecentChanges {
    /// Memory of one change, bytes: itself, its places in the order and among those of its user, the id of its
    /// user, and its share of the entries of its conversation and user.
    pub(super) const CHANGE_BYTES: usize =
        2 * (size_of::<MemberChange>() + 2 * size_of::<(Arc<str>, u64)>()) + 300;

    pub(super) fn new(changes_max: usize) -> Self {
        Self {
            by_conversation: HashMap::default(),
            by_user: HashMap::default(),
            order: VecDeque::new(),
            changes_max,
            next_serial: 0,
            evicted_below: 0,
        }
    }

    /// The time of a request made now.
    pub(super) fn request_time(&self, now: Instant) -> RequestTime {
        RequestTime { serial: self.next_serial, at: now }
    }

    /// The changes of a conversation, in the order of the log.
    pub(super) fn of(&self, conversation: &str) -> &[MemberChange] {
        self.by_conversation.get(conversation).map_or(&[], |changes| changes)
    }

    /// Puts a change at its place in the log. Whether the user was a member before it says the change before, or
    /// else the change itself: who joins was no member. The list does not, because it may be newer than the log.
    pub(super) fn insert(
        &mut self,
        conversation: &str,
        (user, added): (&str, bool),
        position: RecordPosition,
        now: Instant,
    ) -> Inserted {
        let conversation = match self.by_conversation.get_key_value(conversation) {
            Some((known, _)) => Arc::clone(known),
            None => Arc::from(conversation),
        };
        let changes = self.by_conversation.entry(Arc::clone(&conversation)).or_default();
        let is_newest = changes.last().is_none_or(|last| position.is_after(last.position));
        if !is_newest && changes.iter().any(|change| change.position == position) {
            return Inserted::Known;
        }
        let later = changes.iter().position(|change| change.position.is_after(position));
        let at = if is_newest { changes.len() } else { later.unwrap_or(changes.len()) };
        let user_id = match self.by_user.get_key_value(user) {
            Some((known, _)) => Arc::clone(known),
            None => Arc::from(user),
        };
        let was_added =
            || changes[..at].iter().rev().find(|it| *it.user == *user).map(|it| it.added);
        let change = MemberChange {
            user: Arc::clone(&user_id),
            added,
            position,
            serial: self.next_serial,
            read_at: now,
            was_member: was_added().unwrap_or(!added),
        };
        self.next_serial += 1;
        let next = changes[at..].iter_mut().find(|later| *later.user == *user);
        let inserted = if next.is_some() { Inserted::Superseded } else { Inserted::Last };
        if let Some(next) = next {
            next.was_member = added;
        }
        let of_user = self.by_user.entry(user_id).or_default();
        of_user.push((change.serial, Arc::clone(&conversation)));
        self.order.push_back((conversation, change.serial));
        changes.insert(at, change);
        self.evict();
        inserted
    }

    fn evict(&mut self) {
        while self.order.len() > self.changes_max {
            let Some((conversation, serial)) = self.order.pop_front() else { return };
            self.evicted_below = serial + 1;
            let Some(changes) = self.by_conversation.get_mut(&conversation) else { continue };
            let Some(at) = changes.iter().position(|change| change.serial == serial) else {
                continue;
            };
            let user = changes.remove(at).user;
            if let Some(of_user) = self.by_user.get_mut(&user) {
                of_user.retain(|(of, _)| *of != serial);
                if of_user.is_empty() {
                    self.by_user.remove(&user);
                }
            }
            if changes.is_empty() {
                self.by_conversation.remove(&conversation);
            }
        }
    }

    /// The conversations of which this user was added or removed within [`REPLICA_LAG_MAX`] before `asked_at` or
    /// later, and whether the user is a member now.
    pub(super) fn of_user(
        &self,
        user: &str,
        asked_at: Instant,
    ) -> impl Iterator<Item = (Arc<str>, bool)> {
        let conversations = self.by_user.get(user).map_or(&[][..], |all| all);
        conversations.iter().filter_map(move |(serial, conversation)| {
            let mut of_user = self.of(conversation).iter().filter(|change| *change.user == *user);
            let is_recent = |change: &MemberChange| {
                change.serial == *serial
                    && asked_at.saturating_duration_since(change.read_at) <= REPLICA_LAG_MAX
            };
            let last = of_user.clone().next_back()?;
            of_user.any(is_recent).then(|| (Arc::clone(conversation), last.added))
        })
    }

    /// Whether this user may have joined or left a conversation since the first change was read.
    pub(super) fn may_have_changed(&self, user: &str) -> bool {
        self.evicted_below > 0 || self.by_user.contains_key(user)
    }

    /// Whether every change that was read since the request is still here.
    pub(super) fn reaches_back_to(&self, request: RequestTime) -> bool {
        self.evicted_below <= request.serial
    }

    /// The answer to a request, with the changes that it may not contain: those read since the request, and
    /// those read within [`REPLICA_LAG_MAX`] before it. The last change of each user wins.
    pub(super) fn apply_to_answer(
        &self,
        conversation: &str,
        answer: &Members,
        request: RequestTime,
    ) -> Members {
        let mut users: HashMap<&str, (bool, bool)> = HashMap::new();
        for change in self.of(conversation) {
            let age = request.at.saturating_duration_since(change.read_at);
            let may_be_missing = change.serial >= request.serial || age <= REPLICA_LAG_MAX;
            let (added, applies) = users.entry(&change.user).or_default();
            *added = change.added;
            *applies |= may_be_missing;
        }
        let applied = users.into_iter().filter(|(_, (_, applies))| *applies);
        answer.changed_all(applied.map(|(user, (added, _))| (user, added)))
    }

    /// The list of a creation event, with the changes after it.
    pub(super) fn apply_to_creation(
        &self,
        conversation: &str,
        list: &Members,
        position: RecordPosition,
    ) -> Members {
        let before = |change: &&MemberChange| position.is_after(change.position);
        let later = self.of(conversation).iter().filter(|change| !before(change));
        list.changed_all(later.map(|change| (&*change.user, change.added)))
    }

    /// Whether a change of the conversation stands before this position in the same partition.
    pub(super) fn has_before(&self, conversation: &str, position: RecordPosition) -> bool {
        self.of(conversation).iter().any(|change| position.is_after(change.position))
    }

    /// The list as it was for the record at this position: with users who left later in its partition, and
    /// without users who joined later.
    pub(super) fn list_at(
        &self,
        conversation: &str,
        list: &Members,
        position: RecordPosition,
    ) -> Members {
        let later = self.of(conversation).iter().rev();
        let later = later.filter(|change| change.position.is_after(position));
        // The earliest of each user comes last, and decides.
        list.changed_all(later.map(|change| (&*change.user, change.was_member)))
    }

    pub(super) fn clear(&mut self) {
        self.by_conversation.clear();
        self.by_user.clear();
        self.order.clear();
        self.evicted_below = self.next_serial;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: i64) -> RecordPosition {
        RecordPosition { topic: 0, partition: 3, offset }
    }

    fn list(ids: &[&str]) -> Members {
        ids.iter().collect()
    }

    #[test]
    fn changes_are_kept_once_and_in_the_order_of_the_log() {
        let (mut changes, now) = (RecentChanges::new(100), Instant::now());
        let mut insert = |user, added, offset| changes.insert("c", (user, added), at(offset), now);
        assert_eq!(insert("b", true, 10), Inserted::Last);
        assert_eq!(insert("b", false, 8), Inserted::Superseded);
        assert_eq!(insert("a", false, 9), Inserted::Last);
        assert_eq!(insert("b", true, 10), Inserted::Known);
        assert_eq!(insert("b", false, 8), Inserted::Known);
        let offsets: Vec<_> = changes.of("c").iter().map(|it| it.position.offset).collect();
        assert_eq!(offsets, [8, 9, 10]);
    }

    /// A record that waits for its members is routed by the list of its position, although all changes were read
    /// before the list was known.
    #[test]
    fn list_at_a_position_needs_no_list_known_at_the_changes() {
        let (mut changes, now) = (RecentChanges::new(100), Instant::now());
        let read =
            [(5, "c", true), (6, "b", false), (7, "c", true), (8, "b", true), (9, "b", false)];
        for (offset, user, added) in read {
            changes.insert("x", (user, added), at(offset), now);
        }
        let then = |offset| changes.list_at("x", &list(&["a", "c"]), at(offset));
        assert_eq!(then(4), list(&["a", "b"]));
        assert_eq!(then(5), list(&["a", "b", "c"]));
        assert_eq!(then(6), list(&["a", "c"]));
        assert_eq!(then(7), list(&["a", "c"]));
        assert_eq!(then(8), list(&["a", "b", "c"]));
        assert_eq!(then(9), list(&["a", "c"]));
    }

    #[test]
    fn oldest_changes_are_evicted_and_that_is_known() {
        let (mut changes, now) = (RecentChanges::new(2), Instant::now());
        let request = changes.request_time(now);
        for offset in 0..3 {
            changes.insert("c", ("a", true), at(offset), now);
            assert_eq!(changes.reaches_back_to(request), offset < 2);
        }
        assert_eq!(changes.of("c").len(), 2);
        changes.insert("d", ("a", true), at(3), now);
        changes.insert("d", ("a", true), at(4), now);
        assert!(changes.of("c").is_empty() && changes.by_conversation.len() == 1);
    }

    #[test]
    fn answer_gets_what_was_read_since_the_request_or_shortly_before() {
        let (mut changes, start) = (RecentChanges::new(100), Instant::now());
        let later = start + REPLICA_LAG_MAX + Duration::from_secs(1);
        changes.insert("c", ("old", false), at(1), start);
        changes.insert("c", ("lagging", true), at(2), later);
        let request = changes.request_time(later);
        changes.insert("c", ("new", true), at(3), later);
        let answer = changes.apply_to_answer("c", &list(&["old", "x"]), request);
        assert_eq!(answer, list(&["lagging", "new", "old", "x"]));
    }

    #[test]
    fn list_at_a_position_has_the_members_of_then() {
        let (mut changes, now) = (RecentChanges::new(100), Instant::now());
        let mut members = list(&["a", "b"]);
        for (offset, user, added) in [(5, "b", false), (6, "c", true), (7, "c", true)] {
            changes.insert("x", (user, added), at(offset), now);
            members = members.changed(user, added);
        }
        let then = |position| changes.list_at("x", &members, position);
        assert_eq!(then(at(4)), list(&["a", "b"]));
        assert_eq!(then(at(5)), list(&["a"]));
        assert_eq!(then(at(6)), list(&["a", "c"]));
        assert_eq!(then(at(7)), list(&["a", "c"]));
        // Partitions have no common order.
        assert_eq!(then(RecordPosition { partition: 9, ..at(0) }), list(&["a", "c"]));
    }
}
