use std::collections::BTreeSet;

use tokio::sync::{Semaphore, mpsc};

use super::*;
use crate::domain::encoding::Encoding;
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use crate::domain::members::Members;
use crate::service::backends::ports::BoxFuture;
use crate::service::events::envelope::{EventBody, decode};
use crate::service::events::proto::conversation::v1::{Conversation, Participant};
use crate::service::events::proto::presence::v1::PresenceStatus;
use crate::service::members::directory::SessionIds;

/// A conversation service that answers once it gets a permit.
struct Service {
    conversations: Vec<Conversation>,
    members: Vec<&'static str>,
    answers: Arc<Semaphore>,
    fails: bool,
}

impl ConversationListing for Service {
    fn conversations_of(
        &self,
        _user: Arc<str>,
    ) -> BoxFuture<Result<Vec<Conversation>, NeighbourError>> {
        let (answers, fails) = (Arc::clone(&self.answers), self.fails);
        let conversations = self.conversations.clone();
        Box::pin(async move {
            answers.acquire().await.unwrap().forget();
            if fails { Err(NeighbourError::Unavailable("down".into())) } else { Ok(conversations) }
        })
    }
}

impl ConversationSource for Service {
    fn members(&self, _: Arc<str>) -> BoxFuture<Result<Members, NeighbourError>> {
        let members = self.members.iter().collect();
        Box::pin(async move { Ok(members) })
    }
}

struct Router(mpsc::UnboundedSender<RouterInput>);

impl RouterInbox for Router {
    fn send(&self, input: RouterInput) -> Pushed<RouterInput> {
        self.0.send(input).unwrap();
        Pushed::Accepted
    }
}

struct Bench {
    fanout: PresenceFanout,
    counters: Arc<PresenceFanoutCounters>,
    answers: Arc<Semaphore>,
    pushed: mpsc::UnboundedReceiver<RouterInput>,
}

impl Bench {
    fn new(connected: &[&str], config: PresenceFanoutConfig, fails: bool) -> Self {
        let directory = Arc::new(Directory::new());
        for (slot, user) in (0..).zip(connected) {
            let address = SessionAddress {
                shard: ShardId(0),
                encoding: Encoding::Binary,
                connection: ConnectionKey { slot, generation: 0 },
            };
            directory.insert(SessionIds::new(user, "phone"), address);
        }
        let answers = Arc::new(Semaphore::new(0));
        let named = |members: &[&str]| Conversation {
            participant_user_ids: members.iter().map(|member| (*member).to_owned()).collect(),
            ..Conversation::default()
        };
        let with_roles = Conversation {
            participants_with_roles: vec![Participant { user_id: "dave".into(), role: 1 }],
            ..Conversation::default()
        };
        let service = Arc::new(Service {
            conversations: vec![
                named(&["alice", "bob", "carol"]),
                named(&["alice", "bob"]),
                with_roles,
                Conversation::default(),
            ],
            members: vec!["alice", "erin"],
            answers: Arc::clone(&answers),
            fails,
        });
        let (router, pushed) = mpsc::unbounded_channel();
        let counters = Arc::new(PresenceFanoutCounters::default());
        let parts = PresenceFanoutParts {
            directory,
            listing: service.clone(),
            source: service,
            router: Arc::new(Router(router)),
        };
        let fanout = PresenceFanout::new(config, parts, Arc::clone(&counters));
        Self { fanout, counters, answers, pushed }
    }

    fn change(&self, user: &str, status: PresenceStatus, occurred_at: i64) {
        let event =
            PresenceUpdateEvent { user_id: user.into(), status: status.into(), occurred_at };
        self.fanout.updated(&event.encode_to_vec());
    }

    /// The next event: its recipients and its content.
    async fn pushed(&mut self) -> (BTreeSet<String>, PresenceUpdateEvent) {
        let Some(RouterInput::ToUsers { value, users }) = self.pushed.recv().await else {
            panic!("not for users");
        };
        let record = decode(&value).unwrap();
        assert!(matches!(record.body, EventBody::PresenceUpdated { .. }));
        let event = PresenceUpdateEvent::decode(record.payload).unwrap();
        assert_eq!(users.iter().collect::<BTreeSet<_>>().len(), users.len(), "once each");
        (users.iter().map(|user| user.to_string()).collect(), event)
    }
}

fn set(users: &[&str]) -> BTreeSet<String> {
    users.iter().map(|user| (*user).to_owned()).collect()
}

#[tokio::test]
async fn each_connected_contact_receives_a_change_once() {
    let connected = ["alice", "bob", "dave", "erin", "stranger"];
    let mut bench = Bench::new(&connected, PresenceFanoutConfig::default(), false);
    bench.answers.add_permits(1);
    bench.change("alice", PresenceStatus::Online, 5);
    let (users, event) = bench.pushed().await;
    assert_eq!(users, set(&["bob", "dave", "erin"]));
    assert_eq!((event.user_id.as_str(), event.occurred_at), ("alice", 5));
    // The contacts are cached for the next change.
    bench.change("alice", PresenceStatus::Offline, 6);
    assert_eq!(bench.pushed().await.1.status(), PresenceStatus::Offline);
    assert_eq!(bench.counters.presence_look_ups.get(), 1);
}

/// Promise: “A change of presence reaches the members of a conversation that was created a moment ago.”
#[tokio::test]
async fn change_reaches_the_members_of_a_conversation_that_was_just_created() {
    let mut bench = Bench::new(&["alice", "bob", "new"], PresenceFanoutConfig::default(), false);
    bench.answers.add_permits(10);
    bench.change("alice", PresenceStatus::Online, 1);
    assert_eq!(bench.pushed().await.0, set(&["bob"]));
    // The service does not list it: its replica lags. The contacts are cached, too.
    bench.fanout.created("created", &["alice", "new"].iter().collect());
    bench.change("alice", PresenceStatus::Offline, 2);
    assert_eq!(bench.pushed().await.0, set(&["bob", "new"]));
    bench.change("new", PresenceStatus::Online, 3);
    assert!(bench.pushed().await.0.contains("alice"));
    // Who is removed receives nothing more.
    bench.fanout.changed("created", "new", false, None);
    bench.change("alice", PresenceStatus::Online, 4);
    assert_eq!(bench.pushed().await.0, set(&["bob"]));
    // Who joins is a contact of all members, and they are theirs.
    let joined = ["alice", "bob", "new"].iter().collect();
    bench.fanout.changed("joined", "new", true, Some(&joined));
    bench.change("new", PresenceStatus::Offline, 5);
    assert_eq!(bench.pushed().await.0, set(&["alice", "bob"]));
    bench.change("alice", PresenceStatus::Offline, 6);
    assert_eq!(bench.pushed().await.0, set(&["bob", "new"]));
}

#[tokio::test]
async fn burst_of_one_user_costs_one_look_up_and_brings_the_newest() {
    let mut bench = Bench::new(&["bob"], PresenceFanoutConfig::default(), false);
    bench.change("alice", PresenceStatus::Online, 1);
    while bench.counters.presence_look_ups.get() == 0 {
        tokio::task::yield_now().await;
    }
    bench.change("alice", PresenceStatus::Offline, 3);
    bench.change("alice", PresenceStatus::Online, 2); // older, arrives late
    bench.answers.add_permits(1);
    let (_, event) = bench.pushed().await;
    assert_eq!((event.status(), event.occurred_at), (PresenceStatus::Offline, 3));
    assert_eq!(bench.counters.presence_changes_coalesced.get(), 2);
    assert_eq!(bench.counters.presence_look_ups.get(), 1);
    // Nothing else is pending.
    bench.change("alice", PresenceStatus::Online, 4);
    assert_eq!(bench.pushed().await.1.occurred_at, 4);
}

#[tokio::test]
async fn no_look_up_without_connected_sessions() {
    let bench = Bench::new(&[], PresenceFanoutConfig::default(), false);
    bench.change("alice", PresenceStatus::Online, 1);
    assert_eq!(bench.counters.presence_changes_unconcerning.get(), 1);
    assert!(bench.fanout.shared.pending().changes.is_empty());
}

#[tokio::test]
async fn change_without_a_connected_recipient_is_not_pushed() {
    let mut bench = Bench::new(&["alice", "stranger"], PresenceFanoutConfig::default(), false);
    bench.answers.add_permits(1);
    bench.change("alice", PresenceStatus::Online, 1);
    while bench.counters.presence_changes_unconcerning.get() == 0 {
        tokio::task::yield_now().await;
    }
    assert!(bench.pushed.try_recv().is_err());
}

#[tokio::test]
async fn look_up_is_retried_and_then_the_change_is_dropped() {
    let config = PresenceFanoutConfig {
        backoff: Backoff::new(Duration::from_millis(1), Duration::MAX),
        ..PresenceFanoutConfig::default()
    };
    let bench = Bench::new(&["bob"], config, true);
    bench.answers.add_permits(100);
    bench.change("alice", PresenceStatus::Online, 1);
    while bench.counters.presence_changes_dropped_unknown.get() == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.counters.presence_look_ups_failed.get(), 3);
}

/// Promise: “A change of presence reaches the members of a conversation that was created a moment ago.”
///
/// The log knows them, also while the conversation service is down.
#[tokio::test]
async fn change_reaches_a_conversation_that_was_created_while_the_service_is_down() {
    let config = PresenceFanoutConfig {
        backoff: Backoff::new(Duration::from_millis(1), Duration::MAX),
        ..PresenceFanoutConfig::default()
    };
    let mut bench = Bench::new(&["alice", "bob", "new"], config, true);
    bench.answers.add_permits(100);
    bench.fanout.created("created", &["alice", "new"].iter().collect());
    bench.change("alice", PresenceStatus::Online, 1);
    assert_eq!(bench.pushed().await.0, set(&["new"]));
    assert_eq!(bench.counters.presence_changes_dropped_unknown.get(), 1, "bob did not get it");
    bench.fanout.changed("created", "new", false, None);
    bench.change("alice", PresenceStatus::Offline, 2);
    while bench.counters.presence_changes_dropped_unknown.get() < 2 {
        tokio::task::yield_now().await;
    }
    assert!(bench.pushed.try_recv().is_err());
}

#[tokio::test]
async fn pending_users_and_look_ups_are_bounded() {
    let config = PresenceFanoutConfig {
        users_waiting_max: 4,
        look_ups_max: 2,
        ..PresenceFanoutConfig::default()
    };
    let mut bench = Bench::new(&["bob"], config, false);
    for n in 0..10 {
        bench.change(&format!("user-{n}"), PresenceStatus::Online, 1);
    }
    assert_eq!(bench.counters.presence_changes_dropped_full.get(), 6);
    while bench.counters.presence_look_ups.get() < 2 {
        tokio::task::yield_now().await;
    }
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.counters.presence_look_ups.get(), 2);
    bench.answers.add_permits(4);
    for _ in 0..4 {
        bench.pushed().await;
    }
    assert_eq!(bench.counters.presence_look_ups.get(), 4);
}

#[tokio::test]
async fn malformed_changes_are_counted() {
    let bench = Bench::new(&["bob"], PresenceFanoutConfig::default(), false);
    bench.fanout.updated(b"\xff");
    bench.change("", PresenceStatus::Online, 1);
    assert_eq!(bench.counters.presence_changes_malformed.get(), 2);
}
