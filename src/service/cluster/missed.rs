//! The sessions of this node that have missed events: they get nothing more, and are closed.
//!
//! A client resumes from the highest sequence that it saw, so one later event would hide what it missed.
//! That is why such a session leaves the directory before the call that reports the gap returns. The
//! session manager sends the close frames afterwards, at its own pace.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};

use super::holder::Holder;
use crate::domain::ids::SessionAddress;
use crate::handoff::Doorbell;
use crate::service::backends::ports::MissedEvents;
use crate::service::members::directory::{Directory, SessionIds};

/// Sessions that have missed events, until the session manager takes them.
#[derive(Debug, Default)]
pub struct MissedBatch {
    /// These have left the directory already. Each was in it, so there are never more than sessions.
    pub left: Vec<(SessionIds, SessionAddress)>,
    /// These are known by their address only, and are still in the directory.
    pub named: HashSet<SessionAddress>,
}

/// Takes reports of gaps from any thread, for the session manager. Nothing that is reported is lost.
#[derive(Debug)]
pub struct MissedSessions {
    directory: Arc<Directory>,
    /// `None` without hand-off through the log.
    holder: Option<Arc<Mutex<Holder>>>,
    left: Mutex<Vec<(SessionIds, SessionAddress)>>,
    /// A lock of its own: reported with the holder locked, which is locked behind `left`.
    named: Mutex<HashSet<SessionAddress>>,
    bell: Arc<Doorbell>,
}

impl MissedSessions {
    /// `bell` wakes the session manager.
    pub fn new(
        directory: Arc<Directory>,
        holder: Option<Arc<Mutex<Holder>>>,
        bell: Arc<Doorbell>,
    ) -> Self {
        Self { directory, holder, left: Mutex::default(), named: Mutex::default(), bell }
    }

    fn named(&self) -> MutexGuard<'_, HashSet<SessionAddress>> {
        self.named.lock().expect("no holder panics")
    }

    /// Everything that was reported since the last call.
    pub fn take(&self) -> MissedBatch {
        let left = std::mem::take(&mut *self.left.lock().expect("no holder panics"));
        MissedBatch { left, named: std::mem::take(&mut *self.named()) }
    }

    /// Adds what `leave` takes out of the directory, under the lock: whoever finds a session missing in the
    /// directory finds it in the batch afterwards.
    fn add(&self, leave: impl FnOnce(&Directory, &mut Vec<(SessionIds, SessionAddress)>)) {
        let mut left = self.left.lock().expect("no holder panics");
        let before = left.len();
        leave(&self.directory, &mut left);
        if let Some(holder) = &self.holder {
            let mut holder = holder.lock().expect("no holder panics");
            left[before..].iter().for_each(|(_, address)| holder.ended(*address));
        }
        drop(left);
        self.bell.ring();
    }
}

impl MissedEvents for MissedSessions {
    fn missed(&self, session: SessionAddress) {
        self.named().insert(session);
        self.bell.ring();
    }

    fn missed_by_user(&self, user: &str) {
        self.add(|directory, left| directory.remove_user(user, left));
    }

    fn missed_by_all(&self) {
        self.add(Directory::remove_all);
    }
}
