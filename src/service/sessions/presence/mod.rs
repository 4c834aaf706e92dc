//! Presence: who is online, on which device, through which node (contract §4).
//!
//! The session manager reports admitted and ended sessions; a task registers them with the presence
//! service (`PRESENCE_MODE=service`) or directly in Redis (`redis`). Only the newest state of a session
//! is sent. While the backend is unreachable at most [`PresenceConfig::sessions_waiting_max`]
//! registrations and [`PresenceConfig::ends_waiting_max`] unregistrations wait; the refresh sweep
//! registers the other sessions later. Nothing here delays a delivery.
//!
//! # One session, two nodes
//! A client may move from node A to node B, and register with B while A still holds its dead
//! connection. A must neither replace nor remove B's registration, also if its calls are late:
//!
//! - **redis**: every write is fenced by a number that grows with each session
//!   (`backends::redis::fence`). A write of A's session does nothing once B's is registered. If B's
//!   registration is lost, its next refresh makes it again.
//! - **service**: the calls name no number and `UnregisterSession` no instance, so nothing can be fenced.
//!   A calls `GetUserDevices` before it unregisters and at each check, and does not touch a
//!   registration that names another instance. `RegisterSession` is called without asking, because a
//!   registration that is found may be older as well as newer. What remains: a `RegisterSession` of A that
//!   is carried out after B's, because presence was slow or unreachable, counts as the newer one; and
//!   some milliseconds between `GetUserDevices` and `UnregisterSession`, which B repairs when it checks.
//!
//! The registration of each session is checked at its first refresh, at every third from then on, and
//! when another node announces that it has registered the user (`ROUTING_MODE=group`). A missing
//! registration is made again. If a newer one is found (**service**: one of another instance), the
//! session was replaced there, and is closed with 4000 like one that was replaced on this node.

mod grpc;
mod queue;
mod redis;
mod reserved;
#[cfg(test)]
mod tests;
mod visibility;

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use self::queue::{
    FenceStanding, NextOperation, OperationOutcome, OperationQueue, PresenceOperation, QueueLimits,
};
pub use self::reserved::ReservedIn;
use self::visibility::VisibilityNotifier;
pub use self::visibility::{Visibility, VisibilityConfig, VisibilityState};
use crate::domain::counters::SharedCounter;
use crate::service::backends::neighbours::PresenceService;
use crate::service::backends::ports::BoxFuture;
use crate::service::backends::redis::{Announcer, Fence, RedisLink};
use crate::service::members::directory::SessionIds;

/// How often registrations are refreshed (contract §4).
pub const REFRESH_INTERVAL: Duration = Duration::from_secs(20);
/// The registration of a session is checked at its first refresh and at every n-th after it.
const CHECK_EVERY: u8 = 3;

/// Memory per registered session with `PRESENCE_MODE=redis`, bytes: its number, in a table that is half
/// full. The ids are shared.
pub const FENCE_BYTES: usize = 2 * (size_of::<(SessionIds, Fence)>() + 1);

/// Settings of presence.
#[derive(Clone, Debug)]
pub struct PresenceConfig {
    /// This node's name in registrations.
    pub instance: Arc<str>,
    /// How often each session's registration is refreshed: well below its lifetime of 60 s.
    pub refresh_interval: Duration,
    /// Registrations and refreshes that may wait, about 300 bytes each.
    pub sessions_waiting_max: usize,
    /// Unregistrations that may wait in addition. At least the sessions of this node, so that all of
    /// them can end at once.
    pub ends_waiting_max: usize,
    /// Concurrent calls to the presence service.
    pub calls_max: usize,
    /// Announces registrations to the other nodes (`ROUTING_MODE=group`), if they use the registry.
    pub announcer: Option<Announcer>,
    /// When other nodes hand over a session's events (`ROUTING_MODE=group`), if they use the registry.
    pub visibility: Option<VisibilityConfig>,
}

impl PresenceConfig {
    /// The defaults: refresh every 20 s, 100,000 waiting of each kind, 64 calls.
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
    /// Counters of presence.
    pub struct PresenceCounters of SharedCounter {
        Counter registered: "Sessions registered with presence",
        Counter refreshed: "Registrations refreshed",
        Counter unregistered: "Sessions unregistered, or found to be no longer registered with this node",
        Counter failures: "Calls that failed and are retried",
        Counter rejected: "Calls that presence rejected for good",
        Counter vanished: "Registrations found missing, and made again",
        Counter lapsed: "Sessions that were live without a registration for a time, so that other nodes could not hand events over; closed with 4409 once registered",
        Counter replaced_elsewhere: "Sessions found to be registered with another node",
        Counter overflowed_registrations: "Registrations deferred to the next refresh: too many were waiting",
        Counter overflowed_refreshes: "Refreshes skipped: too many were waiting",
        Counter overflowed_ends: "Unregistrations dropped, so that the registrations expire after 60 s: too many were waiting",
        Counter abandoned: "Unregistrations not done at shutdown within its time limit",
        Gauge waiting: "Sessions with a pending operation",
        Gauge under_way: "Sessions with a call in flight",
    }
}

/// An operation to carry out.
#[derive(Clone, Debug)]
struct PendingOperation {
    ids: SessionIds,
    operation: PresenceOperation,
    standing: FenceStanding,
}

/// What came of an operation.
#[derive(Clone, Copy, Debug)]
struct OperationResult {
    outcome: OperationOutcome,
    /// The number of the session, if it has drawn one, whatever the outcome.
    fence: Option<Fence>,
}

/// Operations that are carried out together.
type OperationBatch = Vec<PendingOperation>;

/// Carries operations out: by gRPC or in Redis.
trait PresenceBackend: Send + Sync + 'static {
    /// Returns one result per operation, in the same order.
    fn perform(&self, operations: OperationBatch) -> BoxFuture<Vec<OperationResult>>;

    /// Operations per call of [`PresenceBackend::perform`], at most.
    fn batch_max(&self) -> usize;
}

/// Where sessions are registered.
pub enum PresenceTarget {
    /// The presence service.
    Service(PresenceService),
    /// Redis, without a presence service.
    Redis(RedisLink),
}

/// The queue, shared by [`Presence`] and its task.
struct SharedQueue {
    queue: Mutex<OperationQueue>,
    wake: Notify,
    completed: Notify,
    counters: Arc<PresenceCounters>,
    announcer: Option<Announcer>,
}

impl SharedQueue {
    fn lock(&self) -> MutexGuard<'_, OperationQueue> {
        self.queue.lock().expect("no holder panics")
    }
}

/// Registers and unregisters sessions. Clones share one queue.
#[derive(Clone)]
pub struct Presence {
    shared: Option<Arc<SharedQueue>>,
    refresh_interval: Duration,
    visibility: Option<VisibilityConfig>,
}

impl Presence {
    /// Registers nothing (`PRESENCE_MODE=off`).
    pub fn off() -> Self {
        Self { shared: None, refresh_interval: REFRESH_INTERVAL, visibility: None }
    }

    /// Starts the task on the current runtime.
    pub fn spawn(
        config: PresenceConfig,
        target: PresenceTarget,
        counters: Arc<PresenceCounters>,
    ) -> Self {
        let limits = QueueLimits {
            sessions_max: config.sessions_waiting_max,
            ends_max: config.ends_waiting_max,
        };
        let mut queue = OperationQueue::new(limits);
        if config.visibility.is_some() {
            queue.note_lapses();
        }
        let shared = Arc::new(SharedQueue {
            queue: Mutex::new(queue),
            wake: Notify::new(),
            completed: Notify::new(),
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
        tokio::spawn(run(Arc::clone(&shared), backend, calls));
        Self {
            shared: Some(shared),
            refresh_interval: config.refresh_interval,
            visibility: config.visibility,
        }
    }

    /// Why a session with these ids cannot be registered. `None`: it can be, or there is no registry.
    pub fn reserved(&self, user: &str, device: &str) -> Option<ReservedIn> {
        self.shared.as_ref().and_then(|_| ReservedIn::find(user, device))
    }

    /// Whether other nodes use the registry to find the sessions of this node.
    fn is_registry_used(&self) -> bool {
        let announcer = self.shared.as_ref().and_then(|shared| shared.announcer.as_ref());
        announcer.is_none_or(Announcer::is_needed)
    }

    /// How often each session's registration is refreshed.
    pub fn refresh_interval(&self) -> Duration {
        self.refresh_interval
    }

    /// Registers a session that was just admitted. `replaced`: it replaces another session of this
    /// node. Returns false if there is no room (call [`Presence::register_again`] at the next refresh),
    /// and its visibility if other nodes hand over events.
    pub fn register_admitted(
        &self,
        ids: &SessionIds,
        replaced: bool,
    ) -> (bool, Option<Arc<Visibility>>) {
        let visibility = self.visibility.filter(|_| self.is_registry_used());
        let visibility = visibility.map(|config| Arc::new(Visibility::new(config, Instant::now())));
        let notifier = visibility.clone().map(VisibilityNotifier::new);
        let accepted = self.enqueue(
            |queue| {
                let accepted = queue.register(ids, replaced, Instant::now());
                if let Some(notifier) = notifier {
                    queue.notify_registered(ids, notifier);
                }
                accepted
            },
            |counters| &counters.overflowed_registrations,
        );
        (accepted, visibility)
    }

    /// Registers a session that was just admitted, without its visibility.
    pub fn register(&self, ids: &SessionIds, replaced: bool) -> bool {
        self.enqueue(
            |queue| queue.register(ids, replaced, Instant::now()),
            |counters| &counters.overflowed_registrations,
        )
    }

    /// Registers a session for which there was no room before. It keeps its place among the sessions of
    /// its device.
    pub fn register_again(&self, ids: &SessionIds) -> bool {
        self.enqueue(
            |queue| queue.register_again(ids, Instant::now()),
            |counters| &counters.overflowed_registrations,
        )
    }

    /// Unregisters a session that ended without a successor on this node.
    pub fn unregister(&self, ids: &SessionIds) {
        self.enqueue(
            |queue| queue.unregister(ids, Instant::now()),
            |counters| &counters.overflowed_ends,
        );
    }

    /// Refreshes a session's registration for the `nth` time (from 0). Returns false if there is no
    /// room: call [`Presence::register_again`] the next time, the registration may have expired by then.
    pub fn refresh(&self, ids: &SessionIds, nth: u8) -> bool {
        self.enqueue(
            |queue| queue.refresh(ids, nth.is_multiple_of(CHECK_EVERY), Instant::now()),
            |counters| &counters.overflowed_refreshes,
        )
    }

    /// Checks a session's registration now: another node may have taken it over.
    pub fn check(&self, ids: &SessionIds) {
        let Some(shared) = &self.shared else { return };
        // Without room a later refresh checks it.
        let _ = shared.lock().refresh(ids, true, Instant::now());
        shared.wake.notify_one();
    }

    fn enqueue(
        &self,
        change: impl FnOnce(&mut OperationQueue) -> bool,
        overflowed: fn(&PresenceCounters) -> &SharedCounter,
    ) -> bool {
        let Some(shared) = &self.shared else { return true };
        let accepted = change(&mut shared.lock());
        if !accepted {
            overflowed(&shared.counters).add(1);
        }
        shared.wake.notify_one();
        accepted
    }

    /// The sessions found to be registered with another node since the last call.
    pub fn take_replaced(&self) -> Vec<SessionIds> {
        let Some(shared) = &self.shared else { return Vec::new() };
        let replaced = shared.lock().take_replaced();
        shared.counters.replaced_elsewhere.add(replaced.len() as u64);
        replaced
    }

    /// The live sessions that other nodes could not find for a time, although they looked for them. They
    /// are registered again since the last call.
    pub fn take_lapsed(&self) -> Vec<SessionIds> {
        let Some(shared) = &self.shared else { return Vec::new() };
        let mut lapsed = shared.lock().take_lapsed();
        if !self.is_registry_used() {
            lapsed.clear();
        }
        shared.counters.lapsed.add(lapsed.len() as u64);
        lapsed
    }

    /// Completes the pending unregistrations, for at most `limit`. To be called when all sessions
    /// have ended. Registrations that remain expire within 60 s.
    pub async fn shut_down(&self, limit: Duration) {
        let Some(shared) = &self.shared else { return };
        shared.lock().shut_down();
        shared.wake.notify_one();
        let unregistered = async {
            while shared.lock().has_pending_unregistrations() {
                shared.completed.notified().await;
            }
        };
        if timeout(limit, unregistered).await.is_err() {
            let abandoned = shared.lock().pending_unregistrations() as u64;
            shared.counters.abandoned.add(abandoned);
            tracing::warn!(abandoned, "some sessions are still registered with presence");
        }
    }
}

/// The task: keeps up to `calls_max` calls in flight.
async fn run(shared: Arc<SharedQueue>, backend: Arc<dyn PresenceBackend>, calls_max: usize) {
    let mut calls: JoinSet<(OperationBatch, Vec<OperationResult>)> = JoinSet::new();
    loop {
        let mut wake = None;
        while calls.len() < calls_max {
            let operations;
            (operations, wake) = take(&shared, backend.batch_max());
            if operations.is_empty() {
                break;
            }
            let results = backend.perform(operations.clone());
            calls.spawn(async move { (operations, results.await) });
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
                Ok((operations, results)) => complete(&shared, operations, results),
                // Does not happen: nothing aborts the calls, and the backends do not panic.
                Err(error) => tracing::error!(%error, "a call to presence panicked or was aborted"),
            },
            () = shared.wake.notified() => {}
            () = asleep => {}
        }
    }
}

/// Up to `batch_max` operations, and when the next one may start if there are fewer.
fn take(shared: &SharedQueue, batch_max: usize) -> (OperationBatch, Option<Instant>) {
    let mut queue = shared.lock();
    let now = Instant::now();
    let mut operations = Vec::new();
    let mut wake = None;
    while operations.len() < batch_max {
        match queue.next(now) {
            NextOperation::Start(ids, operation) => {
                let standing = queue.standing(&ids, now);
                operations.push(PendingOperation { ids, operation, standing });
            }
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

fn complete(shared: &SharedQueue, operations: OperationBatch, results: Vec<OperationResult>) {
    use OperationOutcome::{Done, Elsewhere, Failed, Rejected, Vanished};
    use PresenceOperation::{Refresh, Register, Unregister};
    assert_eq!(operations.len(), results.len(), "one result per operation");
    let counters = &shared.counters;
    counters.under_way.sub(operations.len() as u64);
    let mut queue = shared.lock();
    for (pending, result) in operations.into_iter().zip(results) {
        let PendingOperation { ids, operation, .. } = pending;
        let outcome = result.outcome;
        match (outcome, operation) {
            (Done, Register) => {
                counters.registered.add(1);
                if let Some(announcer) = &shared.announcer {
                    announcer.registered(ids.user());
                }
            }
            (Done, Refresh { .. }) => counters.refreshed.add(1),
            (Done | Elsewhere | Vanished, Unregister) => counters.unregistered.add(1),
            (Vanished, Register | Refresh { .. }) => counters.vanished.add(1),
            (Elsewhere, Register | Refresh { .. }) => {}
            (Failed, _) => counters.failures.add(1),
            (Rejected, _) => counters.rejected.add(1),
        }
        if let Some(fence) = result.fence {
            queue.drawn(&ids, fence);
        }
        queue.complete(ids, operation, outcome, rand::random_range(0.0..=1.0), Instant::now());
    }
    drop(queue);
    shared.completed.notify_one();
}
