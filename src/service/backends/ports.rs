//! Traits between the modules of the service side, so that each can be tested alone.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::domain::ids::SessionAddress;
use crate::domain::members::Members;
use crate::handoff::Pushed;
use crate::service::events::proto::conversation::v1::Conversation;
use crate::service::events::proto::message::v1::Message;

/// A boxed future, for traits used as trait objects.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send + 'static>>;

/// Why a call to a neighbour failed. Only [`NeighbourError::NotFound`] says that something does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NeighbourError {
    /// The requested object does not exist. Replicas lag, so it is asked for once more, after
    /// [`NOT_FOUND_RETRY`]; then it is final.
    #[error("not found")]
    NotFound,
    /// The service does not let this node call it.
    #[error("denied: {0}")]
    Denied(String),
    /// The service calls the request invalid.
    #[error("invalid: {0}")]
    Invalid(String),
    /// The service does not have this call, or is not in a state for it.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// The answer exceeds a limit of this node or of the service.
    #[error("too large: {0}")]
    TooLarge(String),
    /// The neighbour failed or did not answer in time.
    #[error("{0}")]
    Unavailable(String),
}

/// Delay before something that was not found is asked for once more. A replica that lags by more says
/// "not found" twice.
pub const NOT_FOUND_RETRY: Duration = Duration::from_millis(250);

/// Member lists of conversations (the conversation service; contract §1).
pub trait ConversationSource: Send + Sync + 'static {
    /// The complete member list of one conversation.
    fn members(&self, conversation: Arc<str>) -> BoxFuture<Result<Members, NeighbourError>>;
}

/// Receives every membership change that is consumed or handed over. Must not block.
pub trait MembershipChanges: Send + Sync + 'static {
    /// The user was added to a conversation or removed from one. `members`: the list after it, if it is known.
    fn changed(&self, conversation: &str, user: &str, added: bool, members: Option<&Members>);

    /// A conversation was created. It may be reported twice.
    fn created(&self, conversation: &str, members: &Members);
}

/// Conversations of a user (the conversation service; contract §1).
pub trait ConversationListing: Send + Sync + 'static {
    /// All conversations of the user, as the service reports them.
    fn conversations_of(
        &self,
        user: Arc<str>,
    ) -> BoxFuture<Result<Vec<Conversation>, NeighbourError>>;
}

/// Messages of a conversation (the message service; contract §1).
pub trait MessageSource: Send + Sync + 'static {
    /// The messages of the conversation after a sequence, ascending, at most `page_size`; a shorter
    /// page is the last. The call is made on behalf of `user`.
    fn messages_after(
        &self,
        user: Arc<str>,
        conversation: Arc<str>,
        after: i64,
        page_size: u16,
    ) -> BoxFuture<Result<Vec<Message>, NeighbourError>>;
}

/// Input of a router that does not come from Kafka: delivered to sessions on this node only,
/// without an offset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouterInput {
    /// A record handed over by another node, for the members of its conversation.
    Remote {
        /// A serialized `EventEnvelope`.
        value: Bytes,
    },
    /// An event for exactly these users.
    ToUsers {
        /// A serialized `EventEnvelope`.
        value: Bytes,
        /// The recipients, without duplicates.
        users: Vec<Arc<str>>,
    },
}

impl RouterInput {
    /// Memory it holds, bytes.
    pub fn bytes(&self) -> usize {
        size_of::<Self>()
            + match self {
                Self::Remote { value } => value.len(),
                Self::ToUsers { value, users } => value.len() + size_of_val(&users[..]),
            }
    }
}

/// The inbox of a router.
pub trait RouterInbox: Send + Sync + 'static {
    /// Never blocks. The inputs of one caller are routed in the order of its calls.
    fn send(&self, input: RouterInput) -> Pushed<RouterInput>;
}

/// Immediate result of a hand-off to other nodes.
#[must_use = "an event not handed over must be counted"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarding {
    /// None of the users is on another node.
    Nobody,
    /// In progress: [`ForwardDone`] will be called once.
    Pending,
    /// Not accepted, and counted: Redis is unreachable or the queue is full. The other nodes are told that
    /// these users miss it.
    Refused,
}

/// Called once when a pending hand-off has ended. Failures are counted by the callee.
pub type ForwardDone = Box<dyn FnOnce() + Send + 'static>;

/// The nodes of the group that take hand-offs through the log (`HANDOFF=log`).
pub trait LogNodes: Send + Sync + 'static {
    /// Whether the living node of this instance has a lease.
    fn has_lease(&self, instance: &str) -> bool;

    /// Leases of the current epoch of this node that were read. `None`: it has none.
    fn own_renewals(&self) -> Option<u64>;
}

/// Users connected to other nodes (contract §4).
pub trait RemoteNodes: Send + Sync + 'static {
    /// Whether such nodes may exist. If not, nothing needs to be offered.
    fn may_exist(&self) -> bool {
        true
    }

    /// Hands a record's value over to each node that holds a session of one of these users, once
    /// per node. `users` are all members: a user on this node may have a second device on another.
    /// Never blocks; values reach one node in the order of the calls.
    fn forward(&self, value: &[u8], users: &[&str], done: ForwardDone) -> Forwarding;

    /// A value for these users is not offered: those on other nodes miss it.
    fn lost(&self, users: &[&str]);

    /// Values may be gone before they could be offered, and nobody knows for whom: all users on other nodes may
    /// miss one.
    fn lost_by_all(&self);

    /// Whether to offer the next value now. `false` only while the queue is full and draining; the
    /// caller does not wait for a Redis that is unreachable or stalled.
    fn has_room(&self) -> bool;
}

/// Receives the sessions of this node that have missed events. They are closed with 4409, so that their
/// clients resume. Callable from any thread; never waits for the session manager.
pub trait MissedEvents: Send + Sync + 'static {
    /// This session has missed events. The caller, a router, has already ended it in its `Holder`, so that it
    /// gets nothing more. Callable with the holder locked.
    fn missed(&self, session: SessionAddress);

    /// Every session of the user has missed events. When the call returns, no router finds them any more. Not
    /// to be called with the holder locked.
    fn missed_by_user(&self, user: &str);

    /// Every session of this node has missed events. When the call returns, no router finds them any more. A
    /// session that is admitted later is not concerned. Not to be called with the holder locked.
    fn missed_by_all(&self);
}
