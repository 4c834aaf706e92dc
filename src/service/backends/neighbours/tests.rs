use delivery_testkit::neighbours::{Behaviour, Call, FakeNeighbours, Method};

use std::time::Duration;

use tonic::Code;

use super::link::{RENEWAL_INTERVAL, UNANSWERED_CALLS_MAX};
use super::*;
use crate::service::events::proto::conversation::v1::Participant;

fn config(url: String) -> NeighbourConfig {
    NeighbourConfig { call_timeout: Duration::from_secs(20), ..NeighbourConfig::new(url) }
}

fn counters() -> Arc<NeighbourCounters> {
    Arc::new(NeighbourCounters::default())
}

#[tokio::test]
async fn requests_are_those_of_the_contract() {
    let fake = FakeNeighbours::start();
    fake.state().create("c", &["alice", "bob"], 3);
    let config = config(fake.url());
    let conversations = ConversationService::new(&config, counters()).unwrap();
    let messages = MessageService::new(&config, counters()).unwrap();
    let presence = PresenceService::new(&config, counters()).unwrap();

    let members = conversations.members("c".into()).await.unwrap();
    assert_eq!(members, ["alice", "bob"].into_iter().collect());
    let listed = conversations.conversations_of("bob".into()).await.unwrap();
    assert_eq!(listed[0].conversation_id, "c");
    let page = messages.messages_after("bob".into(), "c".into(), 1, 100).await.unwrap();
    assert_eq!(page.iter().map(|message| message.sequence).collect::<Vec<_>>(), [2, 3]);
    presence.register("bob", "phone", "node-1").await.unwrap();
    presence.refresh("bob", "phone").await.unwrap();
    assert_eq!(presence.devices("bob").await.unwrap()[0].instance_id, "node-1");
    presence.unregister("bob", "phone").await.unwrap();

    let (user, device) = ("bob".to_owned(), "phone".to_owned());
    let expected = [
        Call::Members { conversation: "c".into() },
        Call::List { user: user.clone(), on_behalf_of: Some("bob".into()) },
        Call::Sync { conversation: "c".into(), after: 1, page_size: 100 },
        Call::Register { user: user.clone(), device: device.clone(), instance: "node-1".into() },
        Call::Refresh { user: user.clone(), device: device.clone() },
        Call::Devices { user: user.clone() },
        Call::Unregister { user, device },
    ];
    assert_eq!(fake.state().calls, expected);
}

#[tokio::test]
async fn permanent_answer_differs_from_a_failure() {
    let fake = FakeNeighbours::start();
    let counters = counters();
    let service = ConversationService::new(&config(fake.url()), Arc::clone(&counters)).unwrap();
    assert_eq!(service.members("c".into()).await, Err(NeighbourError::NotFound));
    fake.set(Method::Members, Behaviour::Failing(Code::Internal));
    let failed = service.members("c".into()).await;
    assert_eq!(failed, Err(NeighbourError::Unavailable("Internal".into())));
    assert_eq!((counters.calls.get(), counters.failures.get()), (2, 2));
    assert_eq!(counters.in_flight.get(), 0);
}

#[tokio::test]
async fn members_are_those_of_all_lists_and_none_are_not_found() {
    let text = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
    let answer = |own: &[&str], inner: &[&str], roles: &[&str]| GetConversationResponse {
        conversation: Some(Conversation {
            participant_user_ids: text(inner),
            participants_with_roles: text(roles)
                .into_iter()
                .map(|user_id| Participant { user_id, role: 1 })
                .collect(),
            ..Conversation::default()
        }),
        participant_user_ids: text(own),
    };
    let all: Members = ["a", "b", "c"].iter().collect();
    assert_eq!(members_of(answer(&["a"], &["b", "a"], &["c", ""])), all);
    assert_eq!(members_of(answer(&[], &[], &["a", "b", "c"])), all);
    assert!(members_of(GetConversationResponse::default()).is_empty());
    let fake = FakeNeighbours::start();
    fake.state().create("empty", &[], 0);
    let service = ConversationService::new(&config(fake.url()), counters()).unwrap();
    assert_eq!(service.members("empty".into()).await, Err(NeighbourError::NotFound));
}

/// A service that refuses.
const REFUSALS: [Code; 7] = [
    Code::PermissionDenied,
    Code::Unauthenticated,
    Code::InvalidArgument,
    Code::FailedPrecondition,
    Code::Unimplemented,
    Code::ResourceExhausted,
    Code::OutOfRange,
];

#[tokio::test]
async fn refusal_is_no_empty_answer() {
    let fake = FakeNeighbours::start();
    let counters = counters();
    let config = config(fake.url());
    let conversations = ConversationService::new(&config, Arc::clone(&counters)).unwrap();
    let messages = MessageService::new(&config, Arc::clone(&counters)).unwrap();
    for code in REFUSALS {
        for method in [Method::Members, Method::List, Method::Sync] {
            fake.set(method, Behaviour::Failing(code));
        }
        let members = conversations.members("c".into()).await.map(drop);
        let listed = conversations.conversations_of("alice".into()).await.map(drop);
        let page = messages.messages_after("alice".into(), "c".into(), 0, 100).await.map(drop);
        for answer in [members, listed, page] {
            assert!(!matches!(answer, Ok(()) | Err(NeighbourError::NotFound)), "{code:?}");
        }
    }
    assert_eq!(
        (counters.denied.get(), counters.invalid.get(), counters.too_large.get()),
        (6, 9, 6)
    );
    assert_eq!((counters.not_found.get(), counters.unavailable.get()), (0, 0));
}

/// Promise: “A conversation of 100,000 members is fetched.”
#[tokio::test]
async fn answers_up_to_the_limit_arrive_and_larger_ones_are_refused() {
    const MEMBERS: usize = 100_000;
    let fake = FakeNeighbours::start();
    let id = |n: usize| format!("{n:08x}-0000-4000-8000-000000000000");
    let ids: Vec<_> = (0..MEMBERS).map(id).collect();
    let ids: Vec<_> = ids.iter().map(String::as_str).collect();
    for conversation in ["one", "two"] {
        fake.state().create(conversation, &ids, 0);
    }
    fake.state().lists_members = true;
    let counters = counters();
    let default = config(fake.url());
    let service = ConversationService::new(&default, Arc::clone(&counters)).unwrap();
    assert_eq!(service.members("one".into()).await.unwrap().len(), MEMBERS);
    let listed = service.conversations_of(id(7).into()).await.unwrap();
    let named = listed.iter().map(|conversation| conversation.participant_user_ids.len());
    assert_eq!(named.collect::<Vec<_>>(), [MEMBERS; 2]);
    let bytes: usize = listed.iter().map(prost::Message::encoded_len).sum();
    assert!(bytes < COMMON_ANSWER_BYTES_MAX && counters.large_answers.get() == 0, "{bytes}");
    // Each conversation of the list names its members twice: with their roles, too.
    fake.state().lists_roles = true;
    let listed = service.conversations_of(id(7).into()).await.unwrap();
    assert_eq!(listed[1].participants_with_roles.len(), MEMBERS);
    assert_eq!(counters.large_answers.get(), 1, "more than 8 MiB");
    assert_eq!(counters.failures.get(), 0, "the attempt with the smaller limit is no failure");

    let small = NeighbourConfig { answer_bytes_max: 1 << 20, ..default };
    let service = ConversationService::new(&small, Arc::clone(&counters)).unwrap();
    let refused = service.members("one".into()).await;
    assert_eq!(refused, Err(NeighbourError::TooLarge("OutOfRange".into())));
    assert_eq!(counters.too_large.get(), 1);
}

#[tokio::test]
async fn hanging_neighbour_costs_the_deadline_and_finally_the_connection() {
    let fake = FakeNeighbours::start();
    fake.state().create("c", &["alice"], 0);
    fake.set(Method::Members, Behaviour::Hanging);
    let counters = counters();
    let config = NeighbourConfig { call_timeout: Duration::from_millis(50), ..config(fake.url()) };
    let service = ConversationService::new(&config, Arc::clone(&counters)).unwrap();
    *service.link.renewed.lock().unwrap() -= RENEWAL_INTERVAL;
    for _ in 0..UNANSWERED_CALLS_MAX {
        let late = service.members("c".into()).await;
        assert_eq!(late, Err(NeighbourError::Unavailable("DeadlineExceeded".into())));
    }
    assert_eq!(counters.timeouts.get(), u64::from(UNANSWERED_CALLS_MAX));
    assert_eq!(counters.renewals.get(), 1);
    assert_eq!(counters.in_flight.get(), 0);
    // The fake notices that the calls are cancelled.
    fake.until(|known| known.in_flight[&Method::Members] == 0).await;
}

#[tokio::test]
async fn cancelled_call_leaves_the_gauge() {
    let fake = FakeNeighbours::start();
    fake.set(Method::Members, Behaviour::Hanging);
    let counters = counters();
    let service = ConversationService::new(&config(fake.url()), Arc::clone(&counters)).unwrap();
    let call = tokio::spawn(service.members("c".into()));
    fake.until(|known| known.count(Method::Members) == 1).await;
    assert_eq!(counters.in_flight.get(), 1);
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    assert_eq!(counters.in_flight.get(), 0);
}

#[tokio::test]
async fn neighbour_that_restarts_is_reached_again() {
    let mut fake = FakeNeighbours::start();
    fake.state().create("c", &["alice"], 0);
    let service = ConversationService::new(&config(fake.url()), counters()).unwrap();
    assert!(service.members("c".into()).await.is_ok());
    fake.stop();
    assert!(service.members("c".into()).await.is_err());
    fake.restart();
    // The broken connection may cost one more call.
    let again = match service.members("c".into()).await {
        Err(_) => service.members("c".into()).await,
        members => members,
    };
    assert!(again.is_ok());
}

#[tokio::test]
async fn https_means_tls_and_a_trusted_certificate() {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let certificate = certified.cert.pem();
    let key = certified.signing_key.serialize_pem();
    let fake = FakeNeighbours::with_tls(Some((certificate.clone(), key)));
    fake.state().create("c", &["alice"], 0);
    let url = format!("https://localhost:{}", fake.address().port());
    let trusting = NeighbourConfig {
        root_certificates: Some(certificate.into_bytes()),
        ..config(url.clone())
    };
    let service = ConversationService::new(&trusting, counters()).unwrap();
    assert!(service.members("c".into()).await.is_ok());
    let untrusting = ConversationService::new(&config(url), counters()).unwrap();
    assert!(untrusting.members("c".into()).await.is_err());
}

#[test]
fn user_id_that_is_no_header_value_gets_no_header() {
    let asked = on_behalf("al\u{ef}ce\n", Request::new(()));
    assert!(asked.metadata().get("x-user-id").is_none());
}
