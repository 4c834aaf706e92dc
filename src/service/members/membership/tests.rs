use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::domain::members::Members;
use crate::service::backends::ports::BoxFuture;

/// A conversation service with every conversation: its members are its own name and "b".
#[derive(Default)]
struct FakeService {
    requested: AtomicUsize,
    /// The next answers.
    failures: Mutex<VecDeque<NeighbourError>>,
    gate: Option<tokio::sync::Semaphore>,
}

struct FakeSource(Arc<FakeService>);

impl ConversationSource for FakeSource {
    fn members(&self, conversation: Arc<str>) -> BoxFuture<Result<Members, NeighbourError>> {
        let service = Arc::clone(&self.0);
        Box::pin(async move {
            service.requested.fetch_add(1, Ordering::Relaxed);
            if let Some(gate) = &service.gate {
                gate.acquire().await.expect("open").forget();
            }
            if let Some(failure) = service.failures.lock().unwrap().pop_front() {
                return Err(failure);
            }
            Ok(["b", &*conversation, "b", ""].into_iter().collect())
        })
    }
}

struct CacheNode {
    membership: Arc<Membership>,
    counters: Arc<MembershipCounters>,
    service: Arc<FakeService>,
    bell: Arc<Doorbell>,
    _runtime: tokio::runtime::Runtime,
}

impl CacheNode {
    fn new(config: MembershipConfig, gated: bool) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_time()
            .build()
            .unwrap();
        let gate = gated.then(|| tokio::sync::Semaphore::new(0));
        let service = Arc::new(FakeService { gate, ..FakeService::default() });
        let counters = Arc::<MembershipCounters>::default();
        let membership = Membership::new(
            config,
            Some(Arc::new(FakeSource(Arc::clone(&service)))),
            runtime.handle().clone(),
            Arc::clone(&counters),
        );
        let bell = Arc::new(Doorbell::new().unwrap());
        membership.wake(Arc::clone(&bell));
        Self { membership, counters, service, bell, _runtime: runtime }
    }

    /// The members, waited for on the bell as a router does.
    fn members(&self, conversation: &str, now_ms: u64) -> Vec<String> {
        for _ in 0..1000 {
            self.bell.about_to_sleep();
            match self.membership.lookup(conversation, None, now_ms) {
                Lookup::Members(members) => {
                    self.bell.awake();
                    return members.iter().map(String::from).collect();
                }
                Lookup::Pending => self.bell.wait(1000),
                other => panic!("{other:?}"),
            }
            self.bell.awake();
        }
        panic!("never answered");
    }
}

#[test]
fn one_request_serves_all_callers() {
    let node = CacheNode::new(MembershipConfig::default(), true);
    node.membership.follow();
    let now = steady_ms();
    for _ in 0..100 {
        assert!(matches!(node.membership.lookup("a", None, now), Lookup::Pending));
    }
    node.service.gate.as_ref().unwrap().add_permits(10);
    assert_eq!(node.members("a", now), ["a", "b"]);
    assert_eq!(node.service.requested.load(Ordering::Relaxed), 1);
    assert_eq!(node.counters.members.get(), 2);
}

impl CacheNode {
    /// The look-up once it is not pending.
    fn outcome(&self, conversation: &str, now_ms: u64) -> Lookup {
        loop {
            self.bell.about_to_sleep();
            match self.membership.lookup(conversation, None, now_ms) {
                Lookup::Pending => self.bell.wait(1000),
                outcome => {
                    self.bell.awake();
                    return outcome;
                }
            }
            self.bell.awake();
        }
    }
}

/// Records of the conversation wait as for a service that is unavailable.
#[test]
fn refused_request_is_retried_and_is_no_empty_list() {
    let refusals = [
        NeighbourError::Denied("PermissionDenied".into()),
        NeighbourError::Invalid("InvalidArgument".into()),
        NeighbourError::TooLarge("ResourceExhausted".into()),
        NeighbourError::Unavailable("Internal".into()),
    ];
    for refusal in refusals {
        let node = CacheNode::new(MembershipConfig::default(), false);
        node.membership.follow();
        *node.service.failures.lock().unwrap() = [refusal.clone()].into();
        let now = steady_ms();
        let Lookup::Failing { retry_at_ms } = node.outcome("a", now) else {
            panic!("{refusal:?} must not look like an answer");
        };
        assert_eq!(node.members("a", retry_at_ms), ["a", "b"]);
        assert_eq!(node.counters.conversations_absent.get(), 0);
    }
}

#[test]
fn conversation_is_absent_only_if_it_is_not_found_twice() {
    let node = CacheNode::new(MembershipConfig::default(), false);
    node.membership.follow();
    *node.service.failures.lock().unwrap() = [NeighbourError::NotFound].into();
    assert_eq!(node.members("a", steady_ms()), ["a", "b"], "the replica has caught up");
    *node.service.failures.lock().unwrap() = vec![NeighbourError::NotFound; 2].into();
    assert!(matches!(node.outcome("c", steady_ms()), Lookup::Absent));
    assert_eq!(node.service.requested.load(Ordering::Relaxed), 4);
}

#[test]
fn no_request_is_made_before_changes_are_followed() {
    let node = CacheNode::new(MembershipConfig::default(), false);
    assert!(matches!(node.membership.lookup("a", None, steady_ms()), Lookup::Pending));
    assert_eq!(node.counters.fetches_under_way.get(), 0);
    node.membership.follow();
    assert_eq!(node.members("a", steady_ms()), ["a", "b"]);
}

#[test]
fn requests_in_flight_are_bounded() {
    let node = CacheNode::new(MembershipConfig { fetches_max: 3, ..Default::default() }, true);
    node.membership.follow();
    let now = steady_ms();
    for conversation in 0..10 {
        assert!(matches!(
            node.membership.lookup(&conversation.to_string(), None, now),
            Lookup::Pending
        ));
    }
    assert_eq!(node.counters.fetches_under_way.get(), 3);
    node.service.gate.as_ref().unwrap().add_permits(10);
    for conversation in 0..10 {
        node.members(&conversation.to_string(), now);
    }
}

/// Repeated requests that are not answered, as many as there are, leave room for those of other conversations.
#[test]
fn conversations_that_cannot_be_fetched_do_not_hold_up_others() {
    let node = CacheNode::new(MembershipConfig { fetches_max: 4, ..Default::default() }, true);
    node.membership.follow();
    let look_up = |conversation: &str, now_ms| {
        let found = node.membership.lookup(conversation, None, now_ms);
        assert!(matches!(found, Lookup::Pending), "{found:?}");
    };
    let (now, names) = (steady_ms(), ["failing-1", "failing-2", "failing-3", "failing-4"]);
    names.iter().for_each(|name| look_up(name, now));
    assert_eq!(node.counters.fetches_under_way.get(), 4, "nothing has failed yet");
    let failure = NeighbourError::Unavailable("by order".into());
    *node.service.failures.lock().unwrap() = vec![failure; 4].into();
    node.service.gate.as_ref().unwrap().add_permits(4);
    for name in names {
        assert!(matches!(node.outcome(name, now), Lookup::Failing { .. }));
    }
    let under_way = || node.counters.fetches_under_way.get();
    wait_for("all requests have ended", || under_way() == 0);
    let later = now + 60_000;
    names.iter().for_each(|name| look_up(name, later));
    assert_eq!(under_way(), 2, "half of the requests");
    ["other-1", "other-2", "other-3"].iter().for_each(|name| look_up(name, later));
    assert_eq!(under_way(), 4);
    node.service.gate.as_ref().unwrap().add_permits(100);
    for name in names.iter().chain(&["other-1", "other-2", "other-3"]) {
        assert_eq!(node.members(name, later).len(), 2);
    }
}

/// The task of a request ends a moment after its answer is there.
fn wait_for(what: &str, reached: impl Fn() -> bool) {
    let from = Instant::now();
    while !reached() {
        assert!(from.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn cache_stays_within_its_bounds() {
    let config =
        MembershipConfig { conversations_max: 160, members_max: 1600, ..Default::default() };
    let node = CacheNode::new(config, false);
    let position = |offset| RecordPosition { topic: 0, partition: 0, offset };
    let now = steady_ms();
    let names: Vec<_> = (0..40).map(|n| format!("user-{n}")).collect();
    let members: Vec<_> = names.iter().map(String::as_str).collect();
    for offset in 0..2000 {
        let by = ReadBy::Follower(position(offset));
        node.membership.created(&format!("c-{offset}"), &members[..20], by, now);
        assert!(node.counters.conversations.get() <= 160);
        assert!(node.counters.members.get() <= 1600);
    }
    // As many as the member bound of each part allows.
    let held = node.counters.conversations.get();
    assert!((48..=80).contains(&held), "{held}");
    assert_eq!(node.counters.members.get(), held * 20);
    assert_eq!(node.counters.evictions.get(), 2000 - held);
    // A list that is larger than its part's share is cached too, alone in its part.
    let large: Vec<_> = (0..500).map(|n| format!("member-{n}")).collect();
    let large: Vec<_> = large.iter().map(String::as_str).collect();
    node.membership.created("large", &large, ReadBy::Follower(position(2000)), now);
    assert!(
        matches!(node.membership.lookup("large", None, now), Lookup::Members(m) if m.len() == 500)
    );
}

#[test]
fn what_is_used_outlives_what_is_not() {
    let config = MembershipConfig { conversations_max: 160, ..Default::default() };
    let node = CacheNode::new(config, false);
    let now = steady_ms();
    for offset in 0..500 {
        let position = RecordPosition { topic: 0, partition: 0, offset };
        let by = ReadBy::Follower(position);
        node.membership.created(&format!("c-{offset}"), &["a"], by, now);
        assert!(matches!(node.membership.lookup("c-0", None, now), Lookup::Members(_)), "{offset}");
    }
}

#[test]
fn expired_list_is_used_while_it_is_fetched_again() {
    let config = MembershipConfig { lifetime_ms: 1000, ..Default::default() };
    let node = CacheNode::new(config, true);
    node.membership.follow();
    let now = steady_ms();
    let position = RecordPosition { topic: 0, partition: 0, offset: 0 };
    node.membership.created("a", &["x"], ReadBy::Follower(position), now);
    assert_eq!(node.members("a", now + 749), ["x"]);
    assert_eq!(node.service.requested.load(Ordering::Relaxed), 0);
    assert_eq!(node.members("a", now + 1000), ["x"]);
    assert_eq!(node.counters.fetches_under_way.get(), 1);
    node.service.gate.as_ref().unwrap().add_permits(1);
    while node.counters.fetches_under_way.get() > 0 {
        node.bell.about_to_sleep();
        if node.counters.fetches_under_way.get() > 0 {
            node.bell.wait(1000);
        }
        node.bell.awake();
    }
    assert_eq!(node.members("a", now), ["a", "b"]);
}

#[test]
fn lost_log_drops_all_lists() {
    let node = CacheNode::new(MembershipConfig::default(), false);
    node.membership.follow();
    let now = steady_ms();
    let position = RecordPosition { topic: 0, partition: 0, offset: 7 };
    node.membership.created("a", &["x"], ReadBy::Follower(position), now);
    node.membership.clear();
    assert_eq!(node.counters.members.get(), 0);
    assert!(matches!(node.membership.lookup("a", None, now), Lookup::Pending));
    node.membership.follow();
    assert_eq!(node.members("a", now), ["a", "b"]);
}

/// What a watcher was told.
#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl MembershipChanges for Told {
    fn changed(&self, conversation: &str, user: &str, added: bool, members: Option<&Members>) {
        self.0.lock().unwrap().push(format!("{conversation} {user} {added} {members:?}"));
    }

    fn created(&self, conversation: &str, members: &Members) {
        self.0.lock().unwrap().push(format!("{conversation} {members:?}"));
    }
}

#[test]
fn watchers_are_told_of_each_change_with_the_list_after_it() {
    let node = CacheNode::new(MembershipConfig::default(), false);
    let told = Arc::new(Told::default());
    node.membership.watch(Arc::clone(&told) as Arc<dyn MembershipChanges>);
    let at = |offset| RecordPosition { topic: 0, partition: 0, offset };
    node.membership.follow_from(at(0));
    node.membership.lane_starts(at(0));
    let now = steady_ms();
    // The router first, then the follower.
    node.membership.created("c", &["a"], ReadBy::Router(at(0)), now);
    node.membership.changed("c", "b", true, ReadBy::Router(at(1)));
    node.membership.created("c", &["a"], ReadBy::Follower(at(0)), now);
    node.membership.followed(at(0));
    node.membership.changed("c", "b", true, ReadBy::Follower(at(1)));
    node.membership.followed(at(1));
    node.membership.changed("unknown", "b", false, ReadBy::Follower(at(2)));
    let expected = [
        r#"c {"a"}"#,
        r#"c b true Some({"a", "b"})"#,
        // Repeated, with the list as it is now.
        r#"c {"a", "b"}"#,
        "unknown b false None",
    ];
    assert_eq!(*told.0.lock().unwrap(), expected);
}

/// A record of a membership topic waits for the follower if its router started ahead of it.
#[test]
fn record_waits_for_the_changes_before_it_and_the_follower_wakes_its_router() {
    let node = CacheNode::new(MembershipConfig::default(), false);
    let at = |offset| RecordPosition { topic: 0, partition: 0, offset };
    let now = steady_ms();
    node.membership.follow_from(at(0));
    node.membership.follow();
    assert_eq!(node.members("c", now), ["b", "c"]);
    node.membership.lane_starts(at(2));
    node.membership.changed("c", "d", true, ReadBy::Router(at(2)));
    assert!(matches!(node.membership.lookup("c", Some(at(2)), now), Lookup::Pending));
    node.membership.changed("c", "b", false, ReadBy::Follower(at(0)));
    node.membership.followed(at(0));
    node.bell.about_to_sleep();
    assert!(matches!(node.membership.lookup("c", Some(at(2)), now), Lookup::Pending));
    assert_eq!(node.counters.waits_for_follower.get(), 2);
    node.membership.followed(at(1));
    // Returns at once, because the bell was rung.
    node.bell.wait(60_000);
    node.bell.awake();
    let Lookup::Members(members) = node.membership.lookup("c", Some(at(2)), now) else {
        panic!("the follower has read what is before it");
    };
    assert_eq!(members, ["c", "d"].iter().collect(), "b left before the record");
}

/// Without a conversation service the lists are read from the log again after it was lost: until then nothing
/// is unknown.
#[test]
fn records_wait_while_lists_are_read_again_without_a_service() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (config, handle) = (MembershipConfig::default(), runtime.handle().clone());
    let membership = Membership::new(config, None, handle, Arc::default());
    membership.follow();
    let lookup = || membership.lookup("c", None, steady_ms());
    assert!(matches!(lookup(), Lookup::Unknown));
    membership.clear();
    assert!(matches!(lookup(), Lookup::Pending));
    let by = ReadBy::Follower(RecordPosition { topic: 0, partition: 0, offset: 0 });
    membership.created("c", &["a"], by, steady_ms());
    membership.follow();
    assert!(matches!(lookup(), Lookup::Members(members) if members.contains("a")));
}
