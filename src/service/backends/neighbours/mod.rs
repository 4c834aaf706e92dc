//! gRPC clients of the neighbours: the conversation, message and presence services (contract §1).
//!
//! Each has one HTTP/2 channel. It connects at the first call and reconnects by itself. Every call
//! has a deadline. There are no retries: only the caller can judge whether one is worthwhile. If a
//! peer disappears without a reset, TCP keeps the dead connection for as long as it retransmits. So
//! a new channel replaces it after a few calls in a row without an answer. `answers` says what each
//! failure means, and `link` how large answers are bounded.

mod answers;
mod counters;
mod link;

use std::marker::PhantomData;
use std::sync::Arc;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Request, Status};

use self::link::NeighbourLink;
use crate::domain::members::Members;
use crate::service::backends::ports::{
    BoxFuture, ConversationListing, ConversationSource, MessageSource, NeighbourError,
};
use crate::service::events::proto::conversation::v1::conversation_api_client::ConversationApiClient;
use crate::service::events::proto::conversation::v1::{
    Conversation, GetConversationRequest, GetConversationResponse, ListConversationsRequest,
};
use crate::service::events::proto::message::v1::message_api_client::MessageApiClient;
use crate::service::events::proto::message::v1::{Message, SyncMessagesRequest};
use crate::service::events::proto::presence::v1::presence_api_client::PresenceApiClient;
use crate::service::events::proto::presence::v1::{
    DeviceInfo, GetUserDevicesRequest, RefreshSessionRequest, RegisterSessionRequest,
    UnregisterSessionRequest,
};

pub use self::counters::NeighbourCounters;
pub use self::link::{COMMON_ANSWER_BYTES_MAX, LARGE_ANSWERS_MAX, NeighbourConfig};

/// Sets `x-user-id`, the user on whose behalf the call is made (contract §3). An id that is not a
/// valid header value is sent in the message only.
fn on_behalf<Q>(user: &str, mut request: Request<Q>) -> Request<Q> {
    if let Ok(value) = MetadataValue::<Ascii>::try_from(user) {
        request.metadata_mut().insert("x-user-id", value);
    }
    request
}

/// The client of one neighbour; clones share the connection. `Api`: the client that tonic
/// generates.
#[derive(Clone)]
pub struct Neighbour<Api> {
    link: Arc<NeighbourLink>,
    api: PhantomData<Api>,
}

impl<Api> Neighbour<Api> {
    /// Connects at the first call. Needs a tokio runtime.
    ///
    /// # Errors
    /// The URL or the certificates are malformed.
    pub fn new(
        config: &NeighbourConfig,
        counters: Arc<NeighbourCounters>,
    ) -> Result<Self, tonic::transport::Error> {
        let link = Arc::new(NeighbourLink::new(config, counters)?);
        Ok(Self { link, api: PhantomData })
    }
}

/// The conversation service.
pub type ConversationService = Neighbour<ConversationApiClient<Channel>>;

impl ConversationSource for ConversationService {
    fn members(&self, conversation: Arc<str>) -> BoxFuture<Result<Members, NeighbourError>> {
        let link = Arc::clone(&self.link);
        Box::pin(async move {
            let question = GetConversationRequest { conversation_id: conversation.to_string() };
            let ask = |channel, request, limit| async move {
                let mut client =
                    ConversationApiClient::new(channel).max_decoding_message_size(limit);
                client.get_conversation(request).await
            };
            let members = link.call_sized(question, ask, members_of).await?;
            // Nobody would get its events, and nobody would notice: it counts as a conversation that is not there
            // (yet), which is asked for once more, and counted.
            if members.is_empty() { Err(NeighbourError::NotFound) } else { Ok(members) }
        })
    }
}

/// The members in an answer: those of all its lists, as of a creation event. Services differ in which they fill.
fn members_of(answer: GetConversationResponse) -> Members {
    let conversation = answer.conversation.unwrap_or_default();
    let with_roles = conversation.participants_with_roles.into_iter().map(|it| it.user_id);
    let named = answer.participant_user_ids.into_iter().chain(conversation.participant_user_ids);
    named.chain(with_roles).filter(|user| !user.is_empty()).collect()
}

impl ConversationListing for ConversationService {
    fn conversations_of(
        &self,
        user: Arc<str>,
    ) -> BoxFuture<Result<Vec<Conversation>, NeighbourError>> {
        let link = Arc::clone(&self.link);
        Box::pin(async move {
            let question = ListConversationsRequest { user_id: user.to_string() };
            let ask = |channel, request, limit| {
                let mut client =
                    ConversationApiClient::new(channel).max_decoding_message_size(limit);
                let request = on_behalf(&user, request);
                async move { client.list_conversations(request).await }
            };
            Ok(link.call_sized(question, ask, |answer| answer.conversations).await?)
        })
    }
}

/// The message service.
pub type MessageService = Neighbour<MessageApiClient<Channel>>;

impl MessageSource for MessageService {
    fn messages_after(
        &self,
        user: Arc<str>,
        conversation: Arc<str>,
        after: i64,
        page_size: u16,
    ) -> BoxFuture<Result<Vec<Message>, NeighbourError>> {
        let link = Arc::clone(&self.link);
        Box::pin(async move {
            let question = SyncMessagesRequest {
                conversation_id: conversation.to_string(),
                after_sequence: after,
                page_size: i32::from(page_size),
            };
            let ask = |channel, request, limit| {
                let mut client = MessageApiClient::new(channel).max_decoding_message_size(limit);
                let request = on_behalf(&user, request);
                async move { client.sync_messages(request).await }
            };
            Ok(link.call_sized(question, ask, |answer| answer.messages).await?)
        })
    }
}

/// The presence service.
pub type PresenceService = Neighbour<PresenceApiClient<Channel>>;

impl PresenceService {
    /// `RegisterSession`.
    ///
    /// # Errors
    /// The status of the service, or `DEADLINE_EXCEEDED`.
    pub async fn register(&self, user: &str, device: &str, instance: &str) -> Result<(), Status> {
        let question = RegisterSessionRequest {
            user_id: user.to_owned(),
            device_id: device.to_owned(),
            instance_id: instance.to_owned(),
        };
        let ask = |channel, request| async move {
            PresenceApiClient::new(channel).register_session(request).await
        };
        self.link.call(question, ask).await.map(drop)
    }

    /// `UnregisterSession`.
    ///
    /// # Errors
    /// See [`PresenceService::register`].
    pub async fn unregister(&self, user: &str, device: &str) -> Result<(), Status> {
        let question =
            UnregisterSessionRequest { user_id: user.to_owned(), device_id: device.to_owned() };
        let ask = |channel, request| async move {
            PresenceApiClient::new(channel).unregister_session(request).await
        };
        self.link.call(question, ask).await.map(drop)
    }

    /// `RefreshSession`.
    ///
    /// # Errors
    /// See [`PresenceService::register`].
    pub async fn refresh(&self, user: &str, device: &str) -> Result<(), Status> {
        let question =
            RefreshSessionRequest { user_id: user.to_owned(), device_id: device.to_owned() };
        let ask = |channel, request| async move {
            PresenceApiClient::new(channel).refresh_session(request).await
        };
        self.link.call(question, ask).await.map(drop)
    }

    /// `GetUserDevices`.
    ///
    /// # Errors
    /// See [`PresenceService::register`].
    pub async fn devices(&self, user: &str) -> Result<Vec<DeviceInfo>, Status> {
        let question = GetUserDevicesRequest { user_id: user.to_owned() };
        let ask = |channel, request| async move {
            PresenceApiClient::new(channel).get_user_devices(request).await
        };
        self.link.call(question, ask).await.map(|answer| answer.devices)
    }
}

#[cfg(test)]
mod tests;
