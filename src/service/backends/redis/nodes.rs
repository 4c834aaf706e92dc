//! Hands records over to the nodes of users who are connected elsewhere (contract §4).
//!
//! ```text
//!  forward ── no member elsewhere ──► Nobody                  one task, one batch at a time:
//!     │
//!     └─ else ─► bounded queue ─► look up unknown locations ─► PUBLISH ─► no listener?
//!                                 (once per user and batch)               look up again, once
//! ```
//!
//! One task handles the queue batch by batch, and completes one batch before it takes the next. So
//! a user is looked up once for all records that wait for the answer, and records reach an instance
//! in the order of the calls, even when a first attempt had no listener.
//!
//! Routers wait for a full queue that is draining ([`RemoteNodes::has_room`]), so a backlog is
//! handed over at the pace of Redis. A record that cannot be handed over is counted and dropped,
//! because an unreachable or hanging Redis must not block the partition for users on this node. The
//! sessions of its recipients on other nodes are closed with 4409 (`gaps`).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use redis::{FromRedisValue, cmd};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::counters::NodesCounters;
use super::gaps::{Gaps, Teller};
use super::link::{RedisFault, RedisLink};
use super::locations::{Instances, Locations, LocationsConfig};
use super::progress::Progress;
use super::registry::{Registry, USERS_AT_ONCE};
use crate::service::backends::ports::{ForwardDone, Forwarding, LogNodes, RemoteNodes};

/// Records taken from the queue together.
const BATCH_RECORDS_MAX: usize = 512;
/// Places of the queue that are kept free, for routers that find room at the same moment.
const PLACES_RESERVED: usize = 64;
/// `PUBLISH` commands sent together.
const PUBLISHES_AT_ONCE: usize = 512;
/// Maximum bytes of such commands; a single larger record is sent alone.
const PUBLISH_BYTES_AT_ONCE: usize = 4 << 20;

/// Settings of the hand-off.
#[derive(Clone, Debug)]
pub struct NodesConfig {
    /// This node's own instance id.
    pub instance: Arc<str>,
    /// Lifetimes and bound of the location cache.
    pub locations: LocationsConfig,
    /// Maximum number of records waiting for their hand-off.
    pub records_max: usize,
    /// Maximum bytes of these records; each recipient counts 16.
    pub bytes_max: usize,
}

impl NodesConfig {
    /// Defaults: 4,096 records or 32 MiB.
    pub fn new(instance: Arc<str>) -> Self {
        Self {
            instance,
            locations: LocationsConfig::default(),
            records_max: 4_096,
            bytes_max: 32 << 20,
        }
    }
}

/// Calls back when dropped, in every outcome of the hand-off.
struct CallOnDrop(Option<ForwardDone>);

impl Drop for CallOnDrop {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done();
        }
    }
}

/// One record waiting for its hand-off.
struct HandOff {
    value: Bytes,
    users: Vec<Arc<str>>,
    shared: Arc<HandOffs>,
}

impl HandOff {
    fn weight(value: &[u8], users: &[Arc<str>]) -> usize {
        value.len() + size_of_val(users)
    }
}

impl Drop for HandOff {
    fn drop(&mut self) {
        let weight = Self::weight(&self.value, &self.users);
        self.shared.waiting_bytes.fetch_sub(weight, Ordering::Relaxed);
        self.shared.counters.redis_forwards_bytes.sub(weight as u64);
        self.shared.counters.redis_forwards_waiting.sub(1);
    }
}

/// What the routers and the forwarding task share.
struct HandOffs {
    link: RedisLink,
    locations: Arc<Locations>,
    counters: Arc<NodesCounters>,
    waiting_bytes: AtomicUsize,
    progress: Progress,
    gaps: Arc<Gaps>,
}

/// The other nodes, reached through Redis. Dropping it stops the forwarding task.
pub struct Nodes {
    shared: Arc<HandOffs>,
    queue: mpsc::Sender<(HandOff, CallOnDrop)>,
    bytes_max: usize,
    _forwarder: JoinSet<()>,
}

impl Nodes {
    /// Starts the forwarding task. Needs a tokio runtime.
    pub fn new(config: NodesConfig, link: RedisLink, counters: Arc<NodesCounters>) -> Self {
        Self::except(config, link, counters, None)
    }

    /// [`Nodes::new`], for all nodes except those that take hand-offs through the log.
    pub(super) fn except(
        config: NodesConfig,
        link: RedisLink,
        counters: Arc<NodesCounters>,
        log_nodes: Option<Arc<dyn LogNodes>>,
    ) -> Self {
        let shared = Arc::new(HandOffs {
            locations: Arc::new(Locations::new(config.locations)),
            link: link.clone(),
            gaps: Arc::new(Gaps::new(Arc::clone(&counters))),
            counters,
            waiting_bytes: AtomicUsize::new(0),
            progress: Progress::new(Instant::now()),
        });
        let (sender, receiver) = mpsc::channel(config.records_max);
        let gaps = Arc::clone(&shared.gaps);
        let teller = Teller::new(Arc::clone(&config.instance), gaps, link.clone());
        let registry = Registry::new(link, config.instance, log_nodes);
        let forwarder = Forwarder { shared: Arc::clone(&shared), registry, teller };
        let mut task = JoinSet::new();
        task.spawn(forwarder.run(receiver));
        Self { shared, queue: sender, bytes_max: config.bytes_max, _forwarder: task }
    }

    /// The location cache, which must be informed of changes.
    pub fn locations(&self) -> &Arc<Locations> {
        &self.shared.locations
    }
}

impl RemoteNodes for Nodes {
    fn forward(&self, value: &[u8], users: &[&str], done: ForwardDone) -> Forwarding {
        let (shared, now) = (&self.shared, Instant::now());
        let counters = &shared.counters;
        let may_be_elsewhere = |user: &&&str| {
            shared.locations.find(user, now).is_none_or(|instances| !instances.is_empty())
        };
        let users: Vec<Arc<str>> =
            users.iter().filter(may_be_elsewhere).map(|user| Arc::from(*user)).collect();
        if users.is_empty() {
            counters.redis_forwards_local.add(1);
            return Forwarding::Nobody;
        }
        if !shared.link.is_connected() {
            counters.redis_forwards_refused_down.add(1);
            shared.gaps.lost(&users);
            return Forwarding::Refused;
        }
        let weight = HandOff::weight(value, &users);
        let waiting = shared.waiting_bytes.fetch_add(weight, Ordering::Relaxed);
        let fits = waiting == 0 || waiting + weight <= self.bytes_max;
        let Some(place) = self.queue.try_reserve().ok().filter(|_| fits) else {
            shared.waiting_bytes.fetch_sub(weight, Ordering::Relaxed);
            counters.redis_forwards_refused_full.add(1);
            shared.gaps.lost(&users);
            return Forwarding::Refused;
        };
        counters.redis_forwards.add(1);
        counters.redis_forwards_bytes.add(weight as u64);
        counters.redis_forwards_waiting.add(1);
        let value = Bytes::copy_from_slice(value);
        place.send((HandOff { value, users, shared: Arc::clone(shared) }, CallOnDrop(Some(done))));
        Forwarding::Pending
    }

    fn lost(&self, users: &[&str]) {
        let users: Vec<Arc<str>> = users.iter().map(|user| Arc::from(*user)).collect();
        self.shared.gaps.lost(&users);
    }

    fn lost_by_all(&self) {
        self.shared.gaps.lost_by_all();
    }

    fn has_room(&self) -> bool {
        let shared = &self.shared;
        let reserved = PLACES_RESERVED.min(self.queue.max_capacity() / 2);
        let has_room = self.queue.capacity() > reserved
            && shared.waiting_bytes.load(Ordering::Relaxed) < self.bytes_max;
        has_room || !shared.link.is_connected() || !shared.progress.is_progressing(Instant::now())
    }
}

/// Known locations of the users of a batch.
type BatchLocations = HashMap<Arc<str>, Instances>;

/// One record for one instance.
struct Publish<'a> {
    hand_off: &'a HandOff,
    record: usize,
    instance: Arc<str>,
}

impl Publish<'_> {
    /// The users for whom the record is sent there.
    fn users<'a>(&'a self, locations: &'a BatchLocations) -> impl Iterator<Item = &'a Arc<str>> {
        let is_there = |user: &&Arc<str>| {
            locations.get(*user).is_some_and(|instances| instances.contains(&self.instance))
        };
        self.hand_off.users.iter().filter(is_there)
    }
}

/// Result of publishing; the indices of the publishes concerned.
#[derive(Default)]
struct Published {
    /// Nobody listened.
    unheard: Vec<usize>,
    /// Refused, without an answer, or not sent because an earlier one had no answer.
    lost: Vec<usize>,
    /// Redis did not answer.
    fault: Option<RedisFault>,
}

struct Forwarder {
    shared: Arc<HandOffs>,
    registry: Registry,
    teller: Teller,
}

impl Forwarder {
    async fn run(mut self, mut queue: mpsc::Receiver<(HandOff, CallOnDrop)>) {
        let mut taken = Vec::with_capacity(BATCH_RECORDS_MAX);
        loop {
            tokio::select! {
                biased;
                count = queue.recv_many(&mut taken, BATCH_RECORDS_MAX) => {
                    if count == 0 {
                        return;
                    }
                }
                () = self.teller.due() => {
                    // Tried again, at the latest with the next batch.
                    let _ = self.teller.tell().await;
                    continue;
                }
            }
            let (batch, done): (Vec<_>, Vec<_>) = taken.drain(..).unzip();
            self.shared.progress.batch_started(Instant::now());
            let handed_over = self.hand_over(&batch).await;
            self.shared.progress.batch_ended(handed_over.is_ok(), Instant::now());
            if handed_over.is_err() {
                self.shared.counters.redis_forwards_failed.add(batch.len() as u64);
            }
            drop(done);
        }
    }

    /// Hands over one batch. Whoever misses a record is noted.
    ///
    /// # Errors
    /// Redis failed; part of the batch may have been handed over.
    async fn hand_over(&mut self, batch: &[HandOff]) -> Result<(), RedisFault> {
        let mut locations = BatchLocations::new();
        let users = || batch.iter().flat_map(|hand_off| &hand_off.users);
        let mut resolved = self.teller.tell().await;
        if resolved.is_ok() {
            resolved = self.resolve(users(), &mut locations).await;
        }
        let unresolved = users().filter(|user| !locations.contains_key(*user));
        self.shared.gaps.lost(unresolved);
        if resolved.is_ok() {
            // Before a record that some of them may still receive.
            resolved = self.teller.tell().await;
        }
        if let Err(fault) = resolved {
            let elsewhere = |user: &&Arc<str>| {
                locations.get(*user).is_some_and(|instances| !instances.is_empty())
            };
            self.shared.gaps.lost(users().filter(elsewhere));
            return Err(fault);
        }
        let publishes = publishes_of(batch, &locations);
        let Published { unheard, lost, fault } = self.publish(&publishes).await;
        self.lose(&publishes, &lost, &locations);
        let again = match fault {
            None if unheard.is_empty() => return Ok(()),
            None => self.relocated(&publishes, &unheard, &locations).await,
            Some(fault) => Err(fault),
        };
        let (again, locations) = again.inspect_err(|_| {
            self.lose(&publishes, &unheard, &locations);
        })?;
        self.shared.counters.redis_publishes_again.add(again.len() as u64);
        let Published { unheard, lost, fault } = self.publish(&again).await;
        self.lose(&again, &lost, &locations);
        self.doubt(&again, &unheard, &locations);
        fault.map_or(Ok(()), Err)
    }

    fn lose(&self, publishes: &[Publish<'_>], lost: &[usize], locations: &BatchLocations) {
        let users = lost.iter().flat_map(|index| publishes[*index].users(locations));
        self.shared.gaps.lost(users);
    }

    fn doubt(&self, publishes: &[Publish<'_>], unheard: &[usize], locations: &BatchLocations) {
        let users = unheard.iter().flat_map(|index| publishes[*index].users(locations));
        self.shared.gaps.unheard(users);
    }

    /// Adds the locations of these users to `locations`, from the cache or the registry.
    async fn resolve(
        &mut self,
        users: impl Iterator<Item = &Arc<str>>,
        locations: &mut BatchLocations,
    ) -> Result<(), RedisFault> {
        let now = Instant::now();
        let mut unknown = Vec::new();
        let mut seen = HashSet::new();
        for user in users {
            if locations.contains_key(user) || !seen.insert(Arc::clone(user)) {
                continue;
            }
            match self.shared.locations.find(user, now) {
                Some(instances) => {
                    locations.insert(Arc::clone(user), instances);
                }
                None => unknown.push(Arc::clone(user)),
            }
        }
        for users in unknown.chunks(USERS_AT_ONCE) {
            self.shared.counters.redis_lookups.add(users.len() as u64);
            let now = Instant::now();
            let asked: Vec<_> =
                users.iter().map(|user| self.shared.locations.ask(user, now)).collect();
            let found = self.registry.look_up(users).await.inspect_err(|_| {
                self.shared.counters.redis_lookups_failed.add(users.len() as u64);
            })?;
            for ((user, asked), instances) in users.iter().zip(asked).zip(found) {
                let Some(instances) = instances else {
                    self.shared.counters.redis_lookups_failed.add(1);
                    continue;
                };
                let cache = &self.shared.locations;
                cache.remember(Arc::clone(user), asked, Arc::clone(&instances));
                locations.insert(Arc::clone(user), instances);
            }
        }
        Ok(())
    }

    /// Publishes in order, until one has no answer.
    async fn publish(&self, publishes: &[Publish<'_>]) -> Published {
        let counters = &self.shared.counters;
        let mut published = Published::default();
        let mut next = 0;
        while next < publishes.len() {
            let first = next;
            let (mut commands, mut bytes) = (Vec::new(), 0);
            while let Some(Publish { hand_off, instance, .. }) = publishes.get(next)
                && commands.len() < PUBLISHES_AT_ONCE
                && (bytes == 0 || bytes + hand_off.value.len() <= PUBLISH_BYTES_AT_ONCE)
            {
                let mut publish = cmd("PUBLISH");
                publish.arg(super::channel_of(instance)).arg(&hand_off.value[..]);
                bytes += hand_off.value.len();
                commands.push(publish);
                next += 1;
            }
            let count = commands.len() as u64;
            counters.redis_publishes.add(count);
            let answers = match self.shared.link.run(commands).await {
                Ok(answers) => answers,
                Err(fault) => {
                    counters.redis_publishes_failed.add(count);
                    published.lost.extend(first..publishes.len());
                    published.fault = Some(fault);
                    break;
                }
            };
            for (index, answer) in (first..).zip(answers) {
                match answer.and_then(|value| Ok(u64::from_redis_value(value)?)) {
                    Ok(0) => published.unheard.push(index),
                    Ok(_) => {}
                    Err(_) => {
                        counters.redis_publishes_failed.add(1);
                        published.lost.push(index);
                    }
                }
            }
        }
        published
    }

    /// The publishes that repeat those without a listener, for the locations of a second lookup. An
    /// instance that was addressed already is left out: it is down or reconnecting, and a repetition
    /// at once would fail too.
    async fn relocated<'a>(
        &mut self,
        publishes: &[Publish<'a>],
        unheard: &[usize],
        locations: &BatchLocations,
    ) -> Result<(Vec<Publish<'a>>, BatchLocations), RedisFault> {
        let now = Instant::now();
        self.shared.counters.redis_publishes_unheard.add(unheard.len() as u64);
        for index in unheard {
            self.shared.locations.instance_gone(&publishes[*index].instance, now);
        }
        let addressed: HashSet<(usize, Arc<str>)> = publishes
            .iter()
            .map(|publish| (publish.record, Arc::clone(&publish.instance)))
            .collect();
        let mut locations_now = BatchLocations::new();
        let mut again = Vec::new();
        let mut repeated = HashSet::new();
        let users = || unheard.iter().flat_map(|index| publishes[*index].users(locations));
        self.resolve(users(), &mut locations_now).await?;
        self.shared.gaps.lost(users().filter(|user| !locations_now.contains_key(*user)));
        for index in unheard {
            let publish = &publishes[*index];
            let Publish { hand_off, record, instance } = publish;
            for user in publish.users(locations) {
                for now in locations_now.get(user).iter().flat_map(|instances| instances.iter()) {
                    if now == instance {
                        self.shared.gaps.unheard([user]);
                    }
                    let address = (*record, Arc::clone(now));
                    if !addressed.contains(&address) && repeated.insert(address) {
                        again.push(Publish {
                            hand_off,
                            record: *record,
                            instance: Arc::clone(now),
                        });
                    }
                }
            }
        }
        Ok((again, locations_now))
    }
}

/// Each record once for each instance that holds a session of one of its users.
fn publishes_of<'a>(batch: &'a [HandOff], locations: &BatchLocations) -> Vec<Publish<'a>> {
    let mut publishes = Vec::new();
    for (record, hand_off) in batch.iter().enumerate() {
        let mut addressed: Vec<&Arc<str>> = Vec::new();
        for instance in instances_of(hand_off, locations) {
            if !addressed.contains(&instance) {
                addressed.push(instance);
            }
        }
        publishes.extend(addressed.into_iter().map(|instance| Publish {
            hand_off,
            record,
            instance: Arc::clone(instance),
        }));
    }
    publishes
}

fn instances_of<'a>(
    hand_off: &'a HandOff,
    locations: &'a BatchLocations,
) -> impl Iterator<Item = &'a Arc<str>> {
    hand_off
        .users
        .iter()
        .filter_map(|user| locations.get(user))
        .flat_map(|instances| instances.iter())
}
