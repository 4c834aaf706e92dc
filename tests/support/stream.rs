//! A gRPC session, for tests that go step by step.

use delivery_testkit::proto::delivery::v1::delivery_api_client::DeliveryApiClient;
use delivery_testkit::proto::delivery::v1::{DeliveryConnectRequest, DeliveryEvent};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::node::Node;
use super::wait::SOON;

/// The stream of one session, for tests without a runtime.
pub struct Stream {
    runtime: Runtime,
    requests: mpsc::Sender<DeliveryConnectRequest>,
    events: Streaming<DeliveryEvent>,
}

/// The first request of a session.
pub fn first(user: &str, device: &str) -> DeliveryConnectRequest {
    DeliveryConnectRequest { user_id: user.into(), device_id: device.into(), ..Default::default() }
}

/// What the health service says about `DeliveryApi`.
pub fn health(node: &Node) -> ServingStatus {
    let runtime = Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let mut client = HealthClient::new(channel(node).await);
        let request = HealthCheckRequest { service: "realchat.delivery.v1.DeliveryApi".into() };
        client.check(request).await.expect("answers").into_inner().status()
    })
}

/// A connection to the gRPC port.
async fn channel(node: &Node) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{}", node.grpc)).expect("an address");
    endpoint.connect().await.expect("the server accepts")
}

impl Stream {
    /// Calls, and sends the first request.
    pub fn connect(node: &Node, request: DeliveryConnectRequest) -> Result<Self, Status> {
        Self::connect_with(node, request, None)
    }

    /// The same with a token.
    pub fn connect_with(
        node: &Node,
        request: DeliveryConnectRequest,
        token: Option<&str>,
    ) -> Result<Self, Status> {
        let runtime = Runtime::new().expect("a runtime");
        let (requests, receiver) = mpsc::channel(16);
        let events = runtime.block_on(async {
            requests.send(request).await.expect("room");
            let mut client = DeliveryApiClient::new(channel(node).await);
            let mut call = Request::new(ReceiverStream::new(receiver));
            if let Some(token) = token {
                let value = format!("Bearer {token}").parse().expect("a header value");
                call.metadata_mut().insert("authorization", value);
            }
            client.connect(call).await
        })?;
        Ok(Self { runtime, requests, events: events.into_inner() })
    }

    /// Sends a further request.
    pub fn send(&self, request: DeliveryConnectRequest) {
        self.requests.blocking_send(request).expect("the stream is open");
    }

    /// The next event, or the status that ended the stream.
    pub fn receive(&mut self) -> Result<DeliveryEvent, Status> {
        let events = &mut self.events;
        let next = async { tokio::time::timeout(SOON, events.message()).await.expect("in time") };
        self.runtime.block_on(next).map(|event| event.expect("an event, not the end"))
    }
}
