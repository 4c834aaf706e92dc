//! Presence: who is online, on which device, through which node (contract §4).
//!
//! The session manager says what happens to sessions; a task of its own tells the presence service
//! (`PRESENCE_MODE=service`), or writes the same to Redis directly (`redis`). What is told is always
//! the newest state; while the other side is away at most [`PresenceConfig::sessions_waiting_max`]
//! sessions and [`PresenceConfig::ends_waiting_max`] ends wait; the rest of the sessions is found again
//! by the refresh sweep. Nothing here delays a delivery.
//!
//! # One session, two nodes
//! A client that moves from node A to node B is registered by B while A may still hold its dead
//! connection. So that A's end does not unregister B's session:
//!
//! - **redis**: A removes the registration only if it still names A, in one script.
//! - **service**: `UnregisterSession` has no instance, so A asks `GetUserDevices` first and leaves a
//!   registration that names another instance alone. What remains is the time between the answer
//!   and the call, some milliseconds; B finds it out when it checks its registration.
//!
//! Each session's registration is checked at its first refresh, at every third from then on, and when
//! another node announces that it has registered the user (`ROUTING_MODE=group`): one that is gone is
//! made again, one that names another instance means that the session was replaced there, and ends
//! here with 4000 as if it had been replaced here.

mod grpc;
mod queue;
mod redis;
#[cfg(test)]
mod tests;
mod visibility;

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use self::queue::{
    NextOperation, OperationOutcome, OperationQueue, PresenceOperation, QueueLimits,
};
use self::visibility::VisibilityNotifier;
pub use self::visibility::{Visibility, VisibilityConfig, VisibilityState};
use crate::service::backends::neighbours::PresenceService;
use crate::service::backends::ports::BoxFuture;
use crate::service::backends::redis::{Announcer, RedisLink};
use crate::service::members::directory::SessionIds;

/// How often registrations are refreshed (contract §4).
pub const REFRESH_INTERVAL: Duration = Duration::from_secs(20);
/// The registration of a session is checked at its first refresh and at every n-th after it.
const CHECK_EVERY: u8 = 3;

/// Settings of presence.
#[derive(Clone, Debug)]
pub struct PresenceConfig {
    /// This node's name in registrations.
    pub instance: Arc<str>,
    /// How often each session's registration is refreshed: well below its lifetime of 60 s.
    pub refresh_interval: Duration,
    /// Sessions that may wait to be registered or refreshed; some 300 bytes each.
    pub sessions_waiting_max: usize,
    /// Ends that may wait beside them: not fewer than the sessions of this node, so that all of them
    /// can leave at once.
    pub ends_waiting_max: usize,
    /// Calls to the presence service under way at once.
    pub calls_max: usize,
    /// Who tells the other nodes of a registration (`ROUTING_MODE=group`).
    pub announcer: Option<Announcer>,
    /// When the other nodes know of it (`ROUTING_MODE=group`).
    pub visibility: Option<VisibilityConfig>,
}

impl PresenceConfig {
    /// The defaults for an instance: every 20 s, 100,000 and 100,000 ends waiting, 64 calls.
    pub fn new(instance: Arc<str>) -> Self {
        Self {
            instance,
            refresh_interval: REFRESH_INTERVAL,
            sessions_waiting_max: 100_000,
            ends_waiting_max: 100_000,
            calls_max: 64,
            announcer: None,
            visibility: None,
        }
    }
}

crate::counters! {
    /// What presence was told.
    pub struct PresenceCounters of SharedCounter {
        Counter registered: "Sessions registered with presence",
        Counter refreshed: "Registrations refreshed",
        Counter unregistered: "Sessions unregistered, or found to be registered no longer by this node",
        Counter failures: "Attempts that failed and are tried again",
        Counter rejected: "Sessions that presence refused for good",
        Counter vanished: "Registrations that were gone when they were checked, and made again",
        Counter replaced_elsewhere: "Sessions found to be held by another node",
        Counter overflowed_registrations: "Registrations put off to the next refresh: too many sessions waited",
        Counter overflowed_refreshes: "Refreshes left out: too many sessions waited",
        Counter overflowed_ends: "Ends left to the 60 s lifetime of a registration: too many sessions waited",
        Counter abandoned: "Ends not told at shutdown: the time for it was over",
        Gauge waiting: "Sessions that presence is still to be told of",
        Gauge under_way: "Sessions that presence is being told of",
    }
}

/// What is carried out together.
type OperationBatch = Vec<(SessionIds, PresenceOperation)>;

/// Carries operations out.
trait PresenceBackend: Send + Sync + 'static {
    /// Outcomes, one for each operation in its place.
    fn perform(&self, operations: OperationBatch) -> BoxFuture<Vec<OperationOutcome>>;

    /// OperationBatch it is given at once.
    fn batch(&self) -> usize;
}

/// Who is told.
pub enum PresenceTarget {
    /// The presence service.
    Service(PresenceService),
    /// Redis, in the presence service's place.
    Redis(RedisLink),
}

struct SharedQueue {
    queue: Mutex<OperationQueue>,
    news: Notify,
    settled: Notify,
    counters: Arc<PresenceCounters>,
    announcer: Option<Announcer>,
}

impl SharedQueue {
    fn lock(&self) -> MutexGuard<'_, OperationQueue> {
        self.queue.lock().expect("no holder panics")
    }
}

/// The session manager's way to presence; clones share it.
#[derive(Clone)]
pub struct Presence {
    shared: Option<Arc<SharedQueue>>,
    refresh_interval: Duration,
    visibility: Option<VisibilityConfig>,
}

impl Presence {
    /// Nobody is told (`PRESENCE_MODE=off`).
    pub fn off() -> Self {
        Self { shared: None, refresh_interval: REFRESH_INTERVAL, visibility: None }
    }

    /// Starts the task that tells the target, on the current runtime.
    pub fn spawn(
        config: PresenceConfig,
        target: PresenceTarget,
        counters: Arc<PresenceCounters>,
    ) -> Self {
        let limits = QueueLimits {
            sessions_max: config.sessions_waiting_max,
            ends_max: config.ends_waiting_max,
        };
        let shared = Arc::new(SharedQueue {
            queue: Mutex::new(OperationQueue::new(limits)),
            news: Notify::new(),
            settled: Notify::new(),
            counters,
            announcer: config.announcer,
        });
        let instance = Arc::clone(&config.instance);
        let (backend, calls): (Arc<dyn PresenceBackend>, usize) = match target {
            PresenceTarget::Service(service) => {
                (Arc::new(grpc::GrpcPresence::new(service, instance)), config.calls_max)
            }
            PresenceTarget::Redis(link) => {
                (Arc::new(redis::RedisPresence::new(link, instance)), redis::BATCHES_MAX)
            }
        };
        tokio::spawn(tell(Arc::clone(&shared), backend, calls));
        Self {
            shared: Some(shared),
            refresh_interval: config.refresh_interval,
            visibility: config.visibility,
        }
    }

    /// How often each session is to be refreshed.
    pub fn refresh_interval(&self) -> Duration {
        self.refresh_interval
    }

    /// A session was admitted; `replaced`: in the place of another one of this node. Returns false
    /// if presence has no room for it (offer it again at the next refresh), and how far other nodes
    /// know it, if there are any that hand events over.
    pub fn admitted(&self, ids: &SessionIds, replaced: bool) -> (bool, Option<Arc<Visibility>>) {
        let visibility =
            self.visibility.map(|config| Arc::new(Visibility::new(config, Instant::now())));
        let notifier = visibility.clone().map(VisibilityNotifier::new);
        (self.open(ids, replaced, notifier), visibility)
    }

    /// The same for a session for which there was no room before.
    pub fn opened(&self, ids: &SessionIds, replaced: bool) -> bool {
        self.open(ids, replaced, None)
    }

    fn open(&self, ids: &SessionIds, replaced: bool, notifier: Option<VisibilityNotifier>) -> bool {
        let Some(shared) = &self.shared else { return true };
        let mut queue = shared.lock();
        let accepted = queue.opened(ids, replaced, Instant::now());
        if let Some(notifier) = notifier {
            queue.notifier(ids, notifier);
        }
        drop(queue);
        if !accepted {
            shared.counters.overflowed_registrations.add(1);
        }
        shared.news.notify_one();
        accepted
    }

    /// A session ended, and no other of this node has taken its place.
    pub fn ended(&self, ids: &SessionIds) {
        let Some(shared) = &self.shared else { return };
        if !shared.lock().ended(ids, Instant::now()) {
            shared.counters.overflowed_ends.add(1);
        }
        shared.news.notify_one();
    }

    /// A session is to be refreshed for the `nth` time (from 0). Returns false if presence has no
    /// room for it: offer it as opened the next time, its registration may be gone by then.
    pub fn refresh(&self, ids: &SessionIds, nth: u8) -> bool {
        let Some(shared) = &self.shared else { return true };
        let accepted = shared.lock().refresh(ids, nth.is_multiple_of(CHECK_EVERY), Instant::now());
        if !accepted {
            shared.counters.overflowed_refreshes.add(1);
        }
        shared.news.notify_one();
        accepted
    }

    /// Another node may have taken this session over: its registration is to be looked at now.
    pub fn recheck(&self, ids: &SessionIds) {
        let Some(shared) = &self.shared else { return };
        // Without room it is looked at with a later refresh.
        let _ = shared.lock().refresh(ids, true, Instant::now());
        shared.news.notify_one();
    }

    /// The sessions found to be held by another node since the last time.
    pub fn take_replaced(&self) -> Vec<SessionIds> {
        let Some(shared) = &self.shared else { return Vec::new() };
        let replaced = shared.lock().take_replaced();
        shared.counters.replaced_elsewhere.add(replaced.len() as u64);
        replaced
    }

    /// Tells the ends that are still untold, for at most `limit`; call it when all sessions have
    /// ended. Registrations that are left then end by themselves within 60 s.
    pub async fn close(&self, limit: Duration) {
        let Some(shared) = &self.shared else { return };
        shared.lock().close();
        shared.news.notify_one();
        let told = async {
            while shared.lock().has_ends_untold() {
                shared.settled.notified().await;
            }
        };
        if timeout(limit, told).await.is_err() {
            let abandoned = shared.lock().ends_untold() as u64;
            shared.counters.abandoned.add(abandoned);
            tracing::warn!(abandoned, "presence was not told of all ends");
        }
    }
}

/// The task: keeps up to `calls_max` calls under way.
async fn tell(shared: Arc<SharedQueue>, backend: Arc<dyn PresenceBackend>, calls_max: usize) {
    let mut calls: JoinSet<(OperationBatch, Vec<OperationOutcome>)> = JoinSet::new();
    loop {
        let mut wake = None;
        while calls.len() < calls_max {
            let operations;
            (operations, wake) = take(&shared, backend.batch());
            if operations.is_empty() {
                break;
            }
            let outcomes = backend.perform(operations.clone());
            calls.spawn(async move { (operations, outcomes.await) });
        }
        shared.counters.waiting.set(shared.lock().len() as u64);
        let asleep = async {
            match wake {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(done) = calls.join_next() => match done {
                Ok((operations, outcomes)) => settle(&shared, operations, outcomes),
                // Nothing aborts these, and the backends do not panic.
                Err(error) => tracing::error!(%error, "a call to presence was lost"),
            },
            () = shared.news.notified() => {}
            () = asleep => {}
        }
    }
}

/// Up to `batch` operations, and when to look again if there are none.
fn take(shared: &SharedQueue, batch: usize) -> (OperationBatch, Option<Instant>) {
    let mut queue = shared.lock();
    let now = Instant::now();
    let mut operations = Vec::new();
    let mut wake = None;
    while operations.len() < batch {
        match queue.next(now) {
            NextOperation::Start(ids, operation) => operations.push((ids, operation)),
            NextOperation::NotBefore(at) => {
                wake = Some(at);
                break;
            }
            NextOperation::Idle => break,
        }
    }
    shared.counters.under_way.add(operations.len() as u64);
    (operations, wake)
}

fn settle(shared: &SharedQueue, operations: OperationBatch, outcomes: Vec<OperationOutcome>) {
    assert_eq!(operations.len(), outcomes.len(), "an outcome for each operation");
    let counters = &shared.counters;
    counters.under_way.sub(operations.len() as u64);
    let mut queue = shared.lock();
    for ((ids, operation), outcome) in operations.into_iter().zip(outcomes) {
        match (outcome, operation) {
            (OperationOutcome::Done, PresenceOperation::Register) => {
                counters.registered.add(1);
                if let Some(announcer) = &shared.announcer {
                    announcer.registered(ids.user());
                }
            }
            (OperationOutcome::Done, PresenceOperation::Refresh { .. }) => {
                counters.refreshed.add(1)
            }
            (
                OperationOutcome::Done | OperationOutcome::Elsewhere | OperationOutcome::Vanished,
                PresenceOperation::Unregister,
            ) => {
                counters.unregistered.add(1);
            }
            (
                OperationOutcome::Vanished,
                PresenceOperation::Register | PresenceOperation::Refresh { .. },
            ) => counters.vanished.add(1),
            (
                OperationOutcome::Elsewhere,
                PresenceOperation::Register | PresenceOperation::Refresh { .. },
            ) => {}
            (OperationOutcome::Failed, _) => counters.failures.add(1),
            (OperationOutcome::Rejected, _) => counters.rejected.add(1),
        }
        queue.finish(ids, operation, outcome, rand::random_range(0.0..=1.0), Instant::now());
    }
    drop(queue);
    shared.settled.notify_one();
}
