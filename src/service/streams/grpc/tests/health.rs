//! The standard services beside `DeliveryApi`.

use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use super::*;

#[tokio::test]
async fn health_reports_whether_sessions_are_accepted() {
    let mut port = Port::default().await;
    let mut health = HealthClient::new(port.channel.clone());
    let request = HealthCheckRequest { service: "realchat.delivery.v1.DeliveryApi".into() };
    let mut updates = health.watch(request).await.unwrap().into_inner();
    assert_eq!(updates.next().await.unwrap().unwrap().status, ServingStatus::Serving as i32);
    port.manager.send(ShardCommand::StopAccepting);
    assert_eq!(updates.next().await.unwrap().unwrap().status, ServingStatus::NotServing as i32);
    let call = port.call(None);
    call.send("alice", "desk", "", 0).await;
    assert_eq!(call.refused().await.code(), Code::Unavailable);
}

#[tokio::test]
async fn health_turns_off_with_the_drain_and_not_with_the_last_session() {
    let port = Port::default().await;
    let mut health = HealthClient::new(port.channel.clone());
    for service in ["", "realchat.delivery.v1.DeliveryApi"] {
        port.drain.send_replace(false);
        let request = HealthCheckRequest { service: service.into() };
        let mut updates = health.watch(request).await.unwrap().into_inner();
        assert_eq!(updates.next().await.unwrap().unwrap().status, ServingStatus::Serving as i32);
        port.drain.send_replace(true);
        assert_eq!(updates.next().await.unwrap().unwrap().status, ServingStatus::NotServing as i32);
        port.drain.send_replace(false);
        assert_eq!(updates.next().await.unwrap().unwrap().status, ServingStatus::Serving as i32);
    }
}

#[tokio::test]
async fn reflection_lists_only_the_served_services() {
    let port = Port::default().await;
    let mut reflection = ServerReflectionClient::new(port.channel.clone());
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = reflection.server_reflection_info(tokio_stream::once(request)).await.unwrap();
    let answer = answers.into_inner().next().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("not a list");
    };
    let mut names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "realchat.delivery.v1.DeliveryApi"
        ]
    );
}
