//! The manager with presence: which ids it registers, who replaces whom, when it refreshes.

use std::sync::Arc;
use std::time::Duration;

use delivery_testkit::neighbours::{FakeNeighbours, Method, NeighbourState};
use tokio::time::Instant;

use super::with_dependencies::{auth, hs256, now_s, secret};
use super::*;
use crate::service::backends::neighbours::{NeighbourConfig, NeighbourCounters, PresenceService};
use crate::service::sessions::presence::{PresenceConfig, PresenceTarget};

/// Presence through a presence service.
fn presence_of(fake: &FakeNeighbours, instance: &str) -> Presence {
    let service = NeighbourConfig::new(fake.url());
    let service = PresenceService::new(&service, Arc::<NeighbourCounters>::default()).unwrap();
    let config = PresenceConfig::new(instance.into());
    Presence::spawn(config, PresenceTarget::Service(service), Arc::default())
}

/// A node with a presence service.
fn with_presence(fake: &FakeNeighbours, instance: &str) -> Bench {
    let presence = presence_of(fake, instance);
    let dependencies = Dependencies { presence, ..Dependencies::default() };
    Bench::with_dependencies(dependencies, 1, SessionConfig::default())
}

/// Whether alice's phone is registered with this instance.
fn registered(instance: &str) -> impl Fn(&NeighbourState) -> bool {
    let wanted = instance.to_owned();
    move |state| {
        let held = state.registrations.get(&("alice".to_owned(), "phone".to_owned()));
        held.is_some_and(|held| *held == wanted)
    }
}

#[tokio::test]
async fn ids_that_could_share_a_registry_key_are_refused_if_there_is_a_registry() {
    let fake = FakeNeighbours::start();
    let mut bench = with_presence(&fake, "node-1");
    let colliding = [("a:b", "c", "user_id"), ("a", "b:c", "device_id")];
    for (slot, (user, device, named)) in (0..).zip(colliding) {
        bench.open(0, key(slot, 0), user, device);
        let (status, body) = bench.refused(0);
        assert_eq!(status, 400);
        assert!(body.starts_with(&format!("{named} must not contain ':'")), "{body}");
        bench.end(0, key(slot, 0));
    }
    assert_eq!(bench.counters.refused_reserved_ids.get(), 2);
    assert_eq!(bench.counters.refused_bad_request.get(), 2);
    assert!(bench.directory.is_empty());
    bench.admitted(0, key(0, 1), "alice", "phone");
    fake.until(registered("node-1")).await;
    assert_eq!(fake.state().count(Method::Register), 1);

    let mut alone = Bench::new(1);
    for (slot, (user, device, _)) in (0..).zip(colliding) {
        alone.admitted(0, key(slot, 0), user, device);
    }
    assert_eq!(alone.counters.replaced.get(), 0);
}

#[tokio::test]
async fn user_of_a_token_is_held_to_the_same_rule() {
    let fake = FakeNeighbours::start();
    let dependencies = Dependencies { presence: presence_of(&fake, "node-1"), ..auth(&secret()) };
    let mut bench = Bench::with_dependencies(dependencies, 1, SessionConfig::default());
    bench.open_with(0, key(0, 0), ("", "phone"), Some(hs256("a:b", now_s() + 600)));
    assert_eq!(bench.refused(0).0, 400);
    assert_eq!(bench.counters.refused_reserved_ids.get(), 1);
}

#[tokio::test]
async fn end_of_a_replaced_session_unregisters_nobody() {
    let fake = FakeNeighbours::start();
    let mut bench = with_presence(&fake, "node-1");
    bench.admitted(0, key(0, 0), "alice", "phone");
    fake.until(registered("node-1")).await;
    bench.open(0, key(1, 0), "alice", "phone");
    bench.end(0, key(0, 0));
    fake.until(|state| state.count(Method::Register) == 2).await;
    bench.end(0, key(1, 0));
    fake.until(|state| state.registrations.is_empty()).await;
    assert_eq!(fake.state().count(Method::Unregister), 1);
}

#[tokio::test]
async fn session_that_moved_to_another_node_is_closed_here_and_stays_registered_there() {
    let fake = FakeNeighbours::start();
    let (mut one, mut two) = (with_presence(&fake, "node-1"), with_presence(&fake, "node-2"));
    one.admitted(0, key(0, 0), "alice", "phone");
    fake.until(registered("node-1")).await;
    two.admitted(0, key(0, 0), "alice", "phone");
    fake.until(registered("node-2")).await;

    one.manager.on_request(ManagerRequest::MovedElsewhere("alice".into()));
    let closed = loop {
        // The check finds the other node's name; the next tick closes the session.
        fake.until(|state| state.count(Method::Devices) > 0).await;
        tokio::task::yield_now().await;
        one.manager.tick(one.clock, 0);
        let closed = closes(&one.commands(0));
        if !closed.is_empty() {
            break closed;
        }
    };
    assert_eq!(closed, [(key(0, 0), CloseCode::SESSION_REPLACED, "session_replaced".into())]);
    assert!(one.directory.is_empty());
    assert_eq!(one.counters.replaced_elsewhere.get(), 1);
    one.end(0, key(0, 0));
    assert_eq!(fake.state().count(Method::Unregister), 0);
    assert!(registered("node-2")(&fake.state()));
}

#[tokio::test]
async fn refreshes_are_spread_over_the_interval() {
    const SESSIONS: u32 = 200;
    let fake = FakeNeighbours::start();
    let mut bench = with_presence(&fake, "node-1");
    for slot in 0..SESSIONS {
        bench.admitted(0, key(slot, 0), &format!("user-{slot}"), "phone");
    }
    fake.until(|state| state.count(Method::Register) == SESSIONS as usize).await;
    let begun = Instant::now();
    bench.manager.tick(begun, 0);
    for quarter in 1..=4_u32 {
        bench.manager.tick(begun + Duration::from_secs(5) * quarter, 0);
        let due = (SESSIONS / 4 * quarter) as usize;
        fake.until(|state| state.count(Method::Refresh) == due).await;
    }
}
