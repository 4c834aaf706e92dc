//! What operators do with the sessions of this node: list them, close them, revoke tokens.
//!
//! Each request looks at a bounded number of sessions, so that handshakes and catch-ups go on beside it. The handle repeats
//! it for the rest.

use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::sleep;

use super::records::{CatchUpState, SessionRecord, SessionState};
use super::revocations::{RevocationsFull, RevokedTokens};
use super::state::SessionManager;
use super::{ManagerRequest, SessionHandle};
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::encoding::Encoding;
use crate::domain::ids::SessionAddress;
use crate::service::members::directory::SessionIds;

/// Places looked at for one request.
const PLACES_PER_REQUEST_MAX: usize = 4_096;
/// Requests for one list. A list that needs more ends early, and says where it continues.
const REQUESTS_PER_LIST_MAX: usize = 256;

/// Between the parts of a paced close.
const PAUSE: Duration = Duration::from_millis(100);

const CLOSED: Close = Close::new(CloseCode::GOING_AWAY, "closed by the operator");
const REVOKED: Close = Close::new(CloseCode::TOKEN_EXPIRED, "token revoked");

/// An open session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionView {
    /// The user.
    pub user: String,
    /// The device.
    pub device: String,
    /// The client's address.
    pub client: IpAddr,
    /// When it was admitted, Unix time in seconds.
    pub since_s: u64,
    /// The encoding of its events.
    pub encoding: Encoding,
    /// What it gets at present: `waiting` (for its first message), `catching_up`, `live`, or `missed_events` (it will be
    /// closed for them).
    pub state: &'static str,
    /// Whether it gets cursors.
    pub has_cursors: bool,
    /// When its token was issued, Unix time in seconds, if it has one that says so.
    pub token_issued_s: Option<u64>,
    /// When its token expires, including the leeway.
    pub token_expires_s: Option<u64>,
}

/// A place in the list of all sessions, which is ordered by slot, then by shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ListPlace {
    /// The slot.
    pub slot: u32,
    /// The shard.
    pub shard: u16,
}

impl ListPlace {
    fn of(address: SessionAddress) -> Self {
        Self { slot: address.connection.slot, shard: address.shard.0 }
    }
}

/// A part of the list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionList {
    /// The sessions.
    pub sessions: Vec<SessionView>,
    /// Where the list continues; `None`: it is complete.
    pub next: Option<ListPlace>,
}

/// A request of an operator. It is dropped if nobody waits for the answer any more.
pub(super) enum OperatorRequest {
    /// The sessions of one user, or of all, from this place on: at most `max`.
    List {
        user: Option<Box<str>>,
        from: ListPlace,
        max: usize,
        answer: oneshot::Sender<SessionList>,
    },
    /// Close the session of this device, or of all devices. The answer is their number.
    Close { user: Box<str>, device: Option<Box<str>>, answer: oneshot::Sender<usize> },
    /// Revoke tokens.
    Revoke { revoked: RevokedTokens, answer: oneshot::Sender<Result<(), RevocationsFull>> },
    /// Close the sessions whose token is revoked, of one user or of all, from this place on: at most `max`. The answer is
    /// their number, and where to continue.
    CloseRevoked {
        user: Option<Box<str>>,
        from: ListPlace,
        max: usize,
        answer: oneshot::Sender<(usize, Option<ListPlace>)>,
    },
}

impl SessionManager {
    pub(super) fn on_operator_request(&mut self, request: OperatorRequest) {
        // An error means that the client of the operator has gone.
        match request {
            OperatorRequest::List { user, from, max, answer } => {
                let _ = answer.send(self.list(user.as_deref(), from, max));
            }
            OperatorRequest::Close { user, device, answer } => {
                let _ = answer.send(self.close_for_operator(&user, device.as_deref()));
            }
            OperatorRequest::Revoke { revoked, answer } => {
                let _ = answer.send(self.revocations.add(&revoked, self.unix_s));
            }
            OperatorRequest::CloseRevoked { user, from, max, answer } => {
                let _ = answer.send(self.close_revoked(user.as_deref(), from, max));
            }
        }
    }

    /// The addresses of one user's sessions, or of all open ones, in their order from this place on: at most `max`. With
    /// where they continue.
    fn open_from(
        &mut self,
        user: Option<&str>,
        from: ListPlace,
        max: usize,
    ) -> (Vec<SessionAddress>, Option<ListPlace>) {
        let mut found = Vec::new();
        if let Some(user) = user {
            self.directory.sessions_of(user, |address| found.push(address));
            found.retain(|address| {
                let is_open = self.record(*address).is_some_and(|record| record.is_open());
                is_open && ListPlace::of(*address) >= from
            });
            found.sort_unstable_by_key(|address| ListPlace::of(*address));
            let next = found.get(max).map(|address| ListPlace::of(*address));
            found.truncate(max);
            return (found, next);
        }
        let slots = self.slots_max();
        let mut place = from;
        for _ in 0..PLACES_PER_REQUEST_MAX {
            if usize::from(place.shard) >= self.records.len() {
                place = ListPlace { slot: place.slot.saturating_add(1), shard: 0 };
            }
            if place.slot as usize >= slots {
                return (found, None);
            }
            if found.len() == max {
                break;
            }
            let held = self.records[usize::from(place.shard)].at(place.slot as usize);
            found.extend(held.filter(|(_, record)| record.is_open()).map(|(address, _)| address));
            place.shard += 1;
        }
        (found, Some(place))
    }

    fn list(&mut self, user: Option<&str>, from: ListPlace, max: usize) -> SessionList {
        let (addresses, next) = self.open_from(user, from, max);
        let view = |address| self.record(address).and_then(|record| view(record));
        SessionList { sessions: addresses.into_iter().filter_map(view).collect(), next }
    }

    fn close_for_operator(&mut self, user: &str, device: Option<&str>) -> usize {
        let addresses = match device {
            Some(device) => Vec::from_iter(self.directory.find(&SessionIds::new(user, device))),
            None => self.open_from(Some(user), ListPlace::default(), usize::MAX).0,
        };
        let close =
            |address: &SessionAddress| self.close(*address, CLOSED, EndReason::ClosedByService);
        let closed = addresses.into_iter().filter(close).count();
        self.counters.closed_by_operator.add(closed as u64);
        closed
    }

    fn close_revoked(
        &mut self,
        user: Option<&str>,
        from: ListPlace,
        max: usize,
    ) -> (usize, Option<ListPlace>) {
        let (addresses, mut next) = self.open_from(user, from, PLACES_PER_REQUEST_MAX);
        let mut closed = 0;
        for address in addresses {
            if closed == max {
                next = Some(ListPlace::of(address));
                break;
            }
            let Some(record) = self.record(address) else { continue };
            let (ids, issued_s) = (record.ids.clone(), record.issued_s);
            if ids.is_some_and(|ids| self.revocations.cover(ids.user(), issued_s))
                && self.close(address, REVOKED, EndReason::ClosedByService)
            {
                closed += 1;
            }
        }
        self.counters.tokens_revoked.add(closed as u64);
        (closed, next)
    }
}

fn view(record: &SessionRecord) -> Option<SessionView> {
    let ids = record.ids.as_ref()?;
    let state = match (record.state, record.catch_up) {
        (SessionState::Missed, _) => "missed_events",
        (_, CatchUpState::Awaited) => "waiting",
        (_, CatchUpState::Running) => "catching_up",
        (_, CatchUpState::Done | CatchUpState::TooLate) => "live",
    };
    Some(SessionView {
        user: ids.user().to_owned(),
        device: ids.device().to_owned(),
        client: record.client.to_canonical(),
        since_s: record.since_s.into(),
        encoding: record.encoding,
        state,
        has_cursors: record.cursors,
        token_issued_s: (record.issued_s != 0).then_some(record.issued_s.into()),
        token_expires_s: record.token_expires_s(),
    })
}

impl SessionHandle {
    /// The sessions of one user, or of all, from this place on: at most `max`, and fewer if many places are free. `None`: the
    /// node has stopped.
    pub async fn list(
        &self,
        user: Option<&str>,
        from: ListPlace,
        max: usize,
    ) -> Option<SessionList> {
        let mut all = SessionList { sessions: Vec::new(), next: Some(from) };
        for _ in 0..REQUESTS_PER_LIST_MAX {
            let (Some(from), true) = (all.next, all.sessions.len() < max) else { break };
            let (user, max) = (user.map(Box::from), max - all.sessions.len());
            let part = self.ask(|answer| OperatorRequest::List { user, from, max, answer }).await?;
            all.sessions.extend(part.sessions);
            all.next = part.next;
        }
        Some(all)
    }

    /// Closes the session of this device, or those of all devices of the user, with 1001. Returns their number. `None`: the
    /// node has stopped.
    pub async fn close(&self, user: &str, device: Option<&str>) -> Option<usize> {
        let (user, device) = (user.into(), device.map(Box::from));
        self.ask(|answer| OperatorRequest::Close { user, device, answer }).await
    }

    /// Refuses these tokens from now on. The sessions that have one stay open, until they are closed by
    /// [`SessionHandle::close_revoked`]. `None`: the node has stopped.
    pub async fn revoke(&self, revoked: RevokedTokens) -> Option<Result<(), RevocationsFull>> {
        self.ask(|answer| OperatorRequest::Revoke { revoked, answer }).await
    }

    /// Closes the sessions of the user, or of all, whose token is revoked, with 4401: so many at a time, with a pause of 100 ms
    /// between, or all at once. Returns their number. `None`: the node has stopped.
    ///
    /// If the caller gives up, some of these sessions stay open.
    pub async fn close_revoked(
        &self,
        user: Option<&str>,
        at_a_time: Option<usize>,
    ) -> Option<usize> {
        let max = at_a_time.unwrap_or(usize::MAX);
        let (mut closed, mut next) = (0, Some(ListPlace::default()));
        while let Some(from) = next {
            let user = user.map(Box::from);
            let request = |answer| OperatorRequest::CloseRevoked { user, from, max, answer };
            let (more, rest) = self.ask(request).await?;
            if rest.is_some() && more == max {
                sleep(PAUSE).await;
            }
            (closed, next) = (closed + more, rest);
        }
        Some(closed)
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> OperatorRequest,
    ) -> Option<T> {
        let (answer, wait) = oneshot::channel();
        self.requests.send(ManagerRequest::Operator(request(answer))).await.ok()?;
        wait.await.ok()
    }
}
