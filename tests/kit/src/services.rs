//! gRPC servers of the conversation, message and presence services. What they answer comes from an
//! implementation of [`Neighbours`].

use std::net::TcpListener;
use std::sync::Arc;

use tonic::transport::server::TcpIncoming;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

use crate::proto::conversation::v1::conversation_api_server::{
    ConversationApi, ConversationApiServer,
};
use crate::proto::conversation::v1::{
    Conversation, GetConversationRequest, GetConversationResponse, ListConversationsRequest,
    ListConversationsResponse,
};
use crate::proto::message::v1::message_api_server::{MessageApi, MessageApiServer};
use crate::proto::message::v1::{Message, SyncMessagesRequest, SyncMessagesResponse};
use crate::proto::presence::v1::presence_api_server::{PresenceApi, PresenceApiServer};
use crate::proto::presence::v1::{
    DeviceInfo, GetPresenceRequest, GetPresenceResponse, GetUserDevicesRequest,
    GetUserDevicesResponse, RefreshSessionRequest, RefreshSessionResponse, RegisterSessionRequest,
    RegisterSessionResponse, UnregisterSessionRequest, UnregisterSessionResponse, UserPresence,
};

/// A method of the three services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Method {
    Register,
    Unregister,
    Refresh,
    Devices,
    Presence,
    Members,
    List,
    Sync,
}

/// One call as it was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Register { user: String, device: String, instance: String },
    Unregister { user: String, device: String },
    Refresh { user: String, device: String },
    Devices { user: String },
    Presence { users: Vec<String> },
    Members { conversation: String },
    List { user: String, on_behalf_of: Option<String> },
    Sync { conversation: String, after: i64, page_size: i32 },
}

impl Call {
    /// Which method was called.
    pub fn method(&self) -> Method {
        match self {
            Self::Register { .. } => Method::Register,
            Self::Unregister { .. } => Method::Unregister,
            Self::Refresh { .. } => Method::Refresh,
            Self::Devices { .. } => Method::Devices,
            Self::Presence { .. } => Method::Presence,
            Self::Members { .. } => Method::Members,
            Self::List { .. } => Method::List,
            Self::Sync { .. } => Method::Sync,
        }
    }
}

/// The answer to a [`Call`].
#[derive(Debug)]
pub enum Answer {
    /// To `Register`, `Unregister` and `Refresh`.
    Done,
    Devices(Vec<DeviceInfo>),
    Presence(Vec<UserPresence>),
    Members(Vec<String>),
    Conversations(Vec<Conversation>),
    Messages(Vec<Message>),
}

/// Answers the calls to the three services.
pub trait Neighbours: Send + Sync + 'static {
    /// Answers one call with the [`Answer`] of its method, or with an error status.
    fn answer(&self, call: Call) -> impl Future<Output = Result<Answer, Status>> + Send;
}

/// Serves the three services, over TLS if `identity` has a certificate and key (PEM). Dropping the
/// runtime that runs it closes every connection at once, as a crash would.
///
/// # Errors
/// The certificate is unusable, or the listener failed.
pub async fn serve(
    neighbours: Arc<impl Neighbours>,
    listener: TcpListener,
    identity: Option<(String, String)>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let mut server = Server::builder();
    if let Some((certificate, key)) = identity {
        let identity = Identity::from_pem(certificate, key);
        server = server.tls_config(ServerTlsConfig::new().identity(identity))?;
    }
    server
        .add_service(PresenceApiServer::new(Services(Arc::clone(&neighbours))))
        .add_service(ConversationApiServer::new(Services(Arc::clone(&neighbours))))
        .add_service(MessageApiServer::new(Services(neighbours)))
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
        .await?;
    Ok(())
}

struct Services<N>(Arc<N>);

impl<N: Neighbours> Services<N> {
    /// Answers `call` with a response that `respond` makes of the answer; `None`: the answer is not
    /// one to this method.
    async fn respond<R>(
        &self,
        call: Call,
        respond: impl FnOnce(Answer) -> Option<R>,
    ) -> Result<Response<R>, Status> {
        let answer = self.0.answer(call).await?;
        respond(answer)
            .map(Response::new)
            .ok_or_else(|| Status::internal("answer to another method"))
    }
}

#[tonic::async_trait]
impl<N: Neighbours> PresenceApi for Services<N> {
    async fn register_session(
        &self,
        request: Request<RegisterSessionRequest>,
    ) -> Result<Response<RegisterSessionResponse>, Status> {
        let RegisterSessionRequest { user_id: user, device_id: device, instance_id: instance } =
            request.into_inner();
        let call = Call::Register { user, device, instance };
        self.respond(call, |_| Some(RegisterSessionResponse {})).await
    }

    async fn unregister_session(
        &self,
        request: Request<UnregisterSessionRequest>,
    ) -> Result<Response<UnregisterSessionResponse>, Status> {
        let UnregisterSessionRequest { user_id: user, device_id: device } = request.into_inner();
        let call = Call::Unregister { user, device };
        self.respond(call, |_| Some(UnregisterSessionResponse {})).await
    }

    async fn refresh_session(
        &self,
        request: Request<RefreshSessionRequest>,
    ) -> Result<Response<RefreshSessionResponse>, Status> {
        let RefreshSessionRequest { user_id: user, device_id: device } = request.into_inner();
        let call = Call::Refresh { user, device };
        self.respond(call, |_| Some(RefreshSessionResponse {})).await
    }

    async fn get_user_devices(
        &self,
        request: Request<GetUserDevicesRequest>,
    ) -> Result<Response<GetUserDevicesResponse>, Status> {
        let call = Call::Devices { user: request.into_inner().user_id };
        self.respond(call, |answer| match answer {
            Answer::Devices(devices) => Some(GetUserDevicesResponse { devices }),
            _ => None,
        })
        .await
    }

    async fn get_presence(
        &self,
        request: Request<GetPresenceRequest>,
    ) -> Result<Response<GetPresenceResponse>, Status> {
        let call = Call::Presence { users: request.into_inner().user_ids };
        self.respond(call, |answer| match answer {
            Answer::Presence(presences) => Some(GetPresenceResponse { presences }),
            _ => None,
        })
        .await
    }
}

#[tonic::async_trait]
impl<N: Neighbours> ConversationApi for Services<N> {
    async fn get_conversation(
        &self,
        request: Request<GetConversationRequest>,
    ) -> Result<Response<GetConversationResponse>, Status> {
        let conversation_id = request.into_inner().conversation_id;
        let call = Call::Members { conversation: conversation_id.clone() };
        self.respond(call, |answer| match answer {
            Answer::Members(participant_user_ids) => Some(GetConversationResponse {
                conversation: Some(Conversation { conversation_id, ..Conversation::default() }),
                participant_user_ids,
            }),
            _ => None,
        })
        .await
    }

    async fn list_conversations(
        &self,
        request: Request<ListConversationsRequest>,
    ) -> Result<Response<ListConversationsResponse>, Status> {
        let on_behalf_of = request.metadata().get("x-user-id");
        let on_behalf_of = on_behalf_of.and_then(|value| value.to_str().ok()).map(str::to_owned);
        let call = Call::List { user: request.into_inner().user_id, on_behalf_of };
        self.respond(call, |answer| match answer {
            Answer::Conversations(conversations) => {
                Some(ListConversationsResponse { conversations })
            }
            _ => None,
        })
        .await
    }
}

#[tonic::async_trait]
impl<N: Neighbours> MessageApi for Services<N> {
    async fn sync_messages(
        &self,
        request: Request<SyncMessagesRequest>,
    ) -> Result<Response<SyncMessagesResponse>, Status> {
        let SyncMessagesRequest { conversation_id: conversation, after_sequence: after, page_size } =
            request.into_inner();
        let call = Call::Sync { conversation, after, page_size };
        self.respond(call, |answer| match answer {
            Answer::Messages(messages) => Some(SyncMessagesResponse { messages }),
            _ => None,
        })
        .await
    }
}
