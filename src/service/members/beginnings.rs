//! The users whose sessions began lately, for those who remember which users are connected.
//!
//! A reader remembers the users whom it has found, and the position up to which it has read this log. Whoever connects
//! later is in the log from there on, because writers keep an order: first the session can be found, then its user is
//! pushed. So a reader that reads the log and then looks users up misses nobody, and may forget a user of whom it finds
//! no session: a session that it has not found yet is pushed later.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Users copied while the log is locked, so that a reader that is far behind does not stop the writer.
const COPIED_MAX: usize = 1_024;

/// A bounded log of users. A position counts the users before it.
#[derive(Debug)]
pub struct Beginnings {
    kept: Mutex<VecDeque<Arc<str>>>,
    /// The position behind the last user.
    next: AtomicU64,
    kept_max: usize,
}

impl Default for Beginnings {
    fn default() -> Self {
        Self::new(Self::KEPT_MAX)
    }
}

impl Beginnings {
    /// Users kept by default. A reader that is further behind has to look everybody up, which costs less than as many
    /// changes, unless there are 200,000 members.
    pub const KEPT_MAX: usize = 65_536;

    /// An empty log that keeps this many users.
    pub fn new(kept_max: usize) -> Self {
        Self { kept: Mutex::default(), next: AtomicU64::new(0), kept_max }
    }

    /// The position of the next user.
    pub fn next(&self) -> u64 {
        self.next.load(Ordering::Acquire)
    }

    /// A session of this user has begun, and can be found.
    pub fn push(&self, user: Arc<str>) {
        let mut kept = self.kept.lock().expect("no holder panics");
        kept.push_back(user);
        if kept.len() > self.kept_max {
            kept.pop_front();
        }
        self.next.fetch_add(1, Ordering::Release);
    }

    /// Calls `visit` for the users at or above the position, and moves it behind them. Returns false if some of them
    /// are not kept any more.
    pub fn read(&self, position: &mut u64, mut visit: impl FnMut(&Arc<str>)) -> bool {
        let mut copied = Vec::new();
        while *position < self.next() {
            {
                let kept = self.kept.lock().expect("no holder panics");
                let oldest = self.next() - kept.len() as u64;
                let Some(skipped) = position.checked_sub(oldest) else { return false };
                copied.extend(kept.range(skipped as usize..).take(COPIED_MAX).cloned());
            }
            *position += copied.len() as u64;
            copied.drain(..).for_each(|user| visit(&user));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(log: &Beginnings, position: &mut u64) -> Option<Vec<String>> {
        let mut users = Vec::new();
        log.read(position, |user| users.push(user.to_string())).then_some(users)
    }

    #[test]
    fn reader_gets_each_user_once() {
        let log = Beginnings::default();
        let mut position = log.next();
        assert_eq!(read(&log, &mut position), Some(vec![]));
        let users: Vec<String> = (0..3 * COPIED_MAX).map(|n| n.to_string()).collect();
        users.iter().for_each(|user| log.push(user.as_str().into()));
        assert_eq!(read(&log, &mut position), Some(users));
        assert_eq!(read(&log, &mut position), Some(vec![]));
        log.push("last".into());
        assert_eq!(read(&log, &mut position), Some(vec!["last".to_owned()]));
    }

    #[test]
    fn reader_that_is_too_far_behind_learns_that() {
        let log = Beginnings::new(2);
        let (mut first, mut second) = (0, 1);
        ["a", "b", "c"].iter().for_each(|user| log.push((*user).into()));
        assert_eq!(read(&log, &mut first), None);
        assert_eq!(read(&log, &mut second), Some(vec!["b".to_owned(), "c".to_owned()]));
        assert_eq!(log.kept.lock().unwrap().len(), 2);
    }
}
