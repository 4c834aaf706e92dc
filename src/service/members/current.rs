//! The conversation service, corrected by the log.
//!
//! A replica of the service may lag behind the log that this node has read. Whoever asks it who may read what
//! would send a removed user what was said after the removal, and an added one nothing. So its answers get
//! what this node has read since the request or within `REPLICA_LAG_MAX` before it, as the lists of the
//! routers do (`membership`).

use std::sync::Arc;
use std::time::Instant;

use crate::domain::members::Members;
use crate::service::backends::ports::{
    BoxFuture, ConversationListing, ConversationSource, NeighbourError,
};
use crate::service::events::proto::conversation::v1::Conversation;
use crate::service::members::membership::Membership;

/// A conversation service whose answers are never behind the log that was read.
#[derive(Clone)]
pub struct CurrentConversations {
    source: Arc<dyn ConversationSource>,
    listing: Arc<dyn ConversationListing>,
    membership: Arc<Membership>,
}

impl CurrentConversations {
    /// Corrects the answers of `service`.
    pub fn new<S: ConversationSource + ConversationListing>(
        service: Arc<S>,
        membership: Arc<Membership>,
    ) -> Self {
        Self { source: service.clone(), listing: service, membership }
    }
}

impl ConversationSource for CurrentConversations {
    fn members(&self, conversation: Arc<str>) -> BoxFuture<Result<Members, NeighbourError>> {
        let membership = Arc::clone(&self.membership);
        let asked = membership.asked(&conversation);
        let answer = self.source.members(Arc::clone(&conversation));
        Box::pin(async move {
            match answer.await {
                Ok(list) => membership.corrected(&conversation, &list, asked).ok_or_else(|| {
                    NeighbourError::Unavailable("its members change too fast".into())
                }),
                // The log knows it already.
                Err(error @ (NeighbourError::NotFound | NeighbourError::Invalid(_))) => {
                    membership.known(&conversation).ok_or(error)
                }
                Err(error) => Err(error),
            }
        })
    }
}

impl ConversationListing for CurrentConversations {
    fn conversations_of(
        &self,
        user: Arc<str>,
    ) -> BoxFuture<Result<Vec<Conversation>, NeighbourError>> {
        let membership = Arc::clone(&self.membership);
        let asked_at = Instant::now();
        let answer = self.listing.conversations_of(Arc::clone(&user));
        Box::pin(async move {
            let answer = answer.await;
            let mut lately = membership.lately(&user, asked_at);
            let mut listed = match answer {
                Err(NeighbourError::NotFound) if !lately.is_empty() => Vec::new(),
                answer => answer?,
            };
            listed.retain(|one| lately.remove(&*one.conversation_id) != Some(false));
            let missing = lately.into_iter().filter(|(_, is_member)| *is_member);
            listed.extend(missing.map(|(id, _)| Conversation {
                conversation_id: id.to_string(),
                ..Conversation::default()
            }));
            Ok(listed)
        })
    }
}

#[cfg(test)]
mod tests;
