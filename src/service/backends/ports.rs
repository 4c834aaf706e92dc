//! What the parts of the service side ask of each other, so that each can be tested alone.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;

use crate::handoff::Pushed;
use crate::service::events::proto::conversation::v1::Conversation;
use crate::service::events::proto::message::v1::Message;

/// A boxed future, for traits that are used as objects.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send + 'static>>;

/// Why a neighbour's answer did not come.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NeighbourError {
    /// It does not know what it was asked for: asking again will not help.
    #[error("not found")]
    NotFound,
    /// It failed, refused or did not answer in time: asking again may help.
    #[error("{0}")]
    Unavailable(String),
}

/// Who belongs to a conversation (the conversation service; contract §1).
pub trait ConversationSource: Send + Sync + 'static {
    /// The complete member list of one conversation.
    fn members(&self, conversation: Arc<str>) -> BoxFuture<Result<Vec<Arc<str>>, NeighbourError>>;
}

/// Told of every change of membership that is read or handed over. Must not block.
pub trait MembershipChanges: Send + Sync + 'static {
    /// This user was added to a conversation or removed from one.
    fn changed(&self, user: &str);
}

/// Which conversations a user belongs to (the conversation service; contract §1).
pub trait ConversationListing: Send + Sync + 'static {
    /// All conversations of one user, as the service reports them.
    fn conversations_of(
        &self,
        user: Arc<str>,
    ) -> BoxFuture<Result<Vec<Conversation>, NeighbourError>>;
}

/// What was said in a conversation (the message service; contract §1).
pub trait MessageSource: Send + Sync + 'static {
    /// The messages of one conversation after a sequence, ascending, at most `page_size`; a
    /// shorter page is the last. Asked on behalf of `user`.
    fn messages_after(
        &self,
        user: Arc<str>,
        conversation: Arc<str>,
        after: i64,
        page_size: u16,
    ) -> BoxFuture<Result<Vec<Message>, NeighbourError>>;
}

/// What comes to a router from elsewhere than Kafka: delivered to sessions here, never forwarded,
/// without an offset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouterInput {
    /// Another node handed over a record's value: for the members of its conversation.
    Remote {
        /// A serialized `EventEnvelope`.
        value: Bytes,
    },
    /// For exactly these users.
    ToUsers {
        /// A serialized `EventEnvelope`.
        value: Bytes,
        /// Whom it is for; no user twice.
        users: Vec<Arc<str>>,
    },
}

impl RouterInput {
    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        size_of::<Self>()
            + match self {
                Self::Remote { value } => value.len(),
                Self::ToUsers { value, users } => value.len() + size_of_val(&users[..]),
            }
    }
}

/// The way into a router.
pub trait RouterInbox: Send + Sync + 'static {
    /// Never blocks. What is handed over by one caller is routed in the order it came.
    fn send(&self, input: RouterInput) -> Pushed<RouterInput>;
}

/// How a hand-off to other nodes began.
#[must_use = "an event not handed over must be counted"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarding {
    /// Nothing to wait for: none of these users is known to be on another node.
    Nobody,
    /// Under way: [`crate::service::backends::ports::ForwardDone`] will be called once.
    Pending,
    /// Too much is under way already; counted, and not to be waited for.
    Refused,
}

/// Called once when a pending hand-off has ended, well or not (what failed is counted there).
pub type ForwardDone = Box<dyn FnOnce() + Send + 'static>;

/// Users connected to other nodes (contract §4).
pub trait RemoteNodes: Send + Sync + 'static {
    /// Hands a record's value to each node that holds one of these users, once per node. `users`
    /// is every member: one who is here may have a second device elsewhere. Never blocks; values
    /// reach one node in the order of the calls.
    fn forward(&self, value: &[u8], users: &[Arc<str>], done: ForwardDone) -> Forwarding;

    /// Whether the next value may be offered now. `false` only while those before it take all the
    /// room and get on: what is away or stands still is not waited for.
    fn has_room(&self) -> bool;
}
