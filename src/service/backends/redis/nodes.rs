//! Handing records to the nodes of users who are elsewhere (contract §4).
//!
//! ```text
//!  forward ── all known, none elsewhere ──► Nobody            one task, one batch at a time:
//!     │
//!     └─ else ─► bounded queue ─► look up who is not known ─► PUBLISH ─► nobody listened?
//!                                 (once per user and batch)              look up again, once
//! ```
//!
//! One task takes the queue batch by batch, each to its end before the next begins: so one user is
//! asked for once however many records wait for the answer, and what is published to one instance
//! keeps the order in which it was handed in, also where a first attempt reached nobody.
//!
//! A full queue that gets on is waited for ([`RemoteNodes::has_room`]): a backlog is handed over at
//! the pace of Redis. A record that cannot be handed over is counted and let go: a Redis that is away
//! or stands still must not hold back the partition of users who are right here.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use redis::{FromRedisValue, cmd};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::link::{RedisFault, RedisLink};
use super::locations::{Instances, Locations, LocationsConfig};
use super::pace::Pace;
use super::registry::{Registry, USERS_AT_ONCE};
use crate::counters;
use crate::service::backends::ports::{ForwardDone, Forwarding, RemoteNodes};

/// Records taken from the queue together.
const BATCH_RECORDS_MAX: usize = 512;
/// Places of the queue kept for the routers that find room at the same moment.
const PLACES_KEPT: usize = 64;
/// `PUBLISH` commands sent together.
const PUBLISHES_AT_ONCE: usize = 512;
/// Their bytes; one record may exceed it alone.
const PUBLISH_BYTES_AT_ONCE: usize = 4 << 20;

/// Settings of the hand-off.
#[derive(Clone, Debug)]
pub struct NodesConfig {
    /// This node's own instance id.
    pub instance: Arc<str>,
    /// How long locations are believed in.
    pub locations: LocationsConfig,
    /// Records that may wait for their hand-off.
    pub records_max: usize,
    /// Their bytes, with 16 for each user they are for.
    pub bytes_max: usize,
}

impl NodesConfig {
    /// The defaults for an instance: 4,096 records or 32 MiB.
    pub fn new(instance: Arc<str>) -> Self {
        Self {
            instance,
            locations: LocationsConfig::default(),
            records_max: 4_096,
            bytes_max: 32 << 20,
        }
    }
}

counters! {
    /// What became of records for users on other nodes.
    pub struct NodesCounters of SharedCounter {
        Counter redis_forwards_local: "Records that no other node had to be asked or told about",
        Counter redis_forwards: "Records taken in for other nodes",
        Counter redis_forwards_refused_down: "Records not taken in because Redis was away",
        Counter redis_forwards_refused_full: "Records not taken in because too many waited",
        Counter redis_forwards_failed: "Records that could not be handed over in full: Redis failed or was late",
        Gauge redis_forwards_waiting: "Records that wait for their hand-off",
        Gauge redis_forwards_bytes: "Bytes of these records",
        Counter redis_lookups: "Users looked up in the registry",
        Counter redis_lookups_failed: "Users whose place could not be found out",
        Counter redis_publishes: "Records published to another instance",
        Counter redis_publishes_failed: "Publishes without an answer",
        Counter redis_publishes_unheard: "Publishes that reached nobody: that instance was not listening",
        Counter redis_publishes_again: "Publishes to where a user was found at the second look-up",
        Counter redis_moves_announced: "Users whose registration here the other nodes were told of",
        Counter redis_moves_unannounced: "Users of whom they were not told because Redis failed or was away",
    }
}

/// Tells its caller once, whatever happens to the record.
struct Done(Option<ForwardDone>);

impl Drop for Done {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done();
        }
    }
}

struct Job {
    value: Bytes,
    users: Vec<Arc<str>>,
    shared: Arc<Shared>,
}

impl Job {
    fn weight(value: &[u8], users: &[Arc<str>]) -> usize {
        value.len() + size_of_val(users)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let weight = Self::weight(&self.value, &self.users);
        self.shared.waiting_bytes.fetch_sub(weight, Ordering::Relaxed);
        self.shared.counters.redis_forwards_bytes.sub(weight as u64);
        self.shared.counters.redis_forwards_waiting.sub(1);
    }
}

struct Shared {
    link: RedisLink,
    locations: Arc<Locations>,
    counters: Arc<NodesCounters>,
    waiting_bytes: AtomicUsize,
    pace: Pace,
}

/// The nodes beside this one, through Redis.
pub struct Nodes {
    shared: Arc<Shared>,
    jobs: mpsc::Sender<(Job, Done)>,
    bytes_max: usize,
    forwarder: AbortHandle,
}

impl Drop for Nodes {
    fn drop(&mut self) {
        self.forwarder.abort();
    }
}

impl Nodes {
    /// Starts the task that hands over. Needs a tokio runtime.
    pub fn new(config: NodesConfig, link: RedisLink, counters: Arc<NodesCounters>) -> Self {
        let shared = Arc::new(Shared {
            locations: Arc::new(Locations::new(config.locations)),
            link: link.clone(),
            counters,
            waiting_bytes: AtomicUsize::new(0),
            pace: Pace::new(Instant::now()),
        });
        let (jobs, queue) = mpsc::channel(config.records_max);
        let registry = Registry::new(link, config.instance);
        let forwarder = Forwarder { shared: Arc::clone(&shared), registry };
        let forwarder = tokio::spawn(forwarder.run(queue)).abort_handle();
        Self { shared, jobs, bytes_max: config.bytes_max, forwarder }
    }

    /// What is remembered of users' places: to be told of changes.
    pub fn locations(&self) -> &Arc<Locations> {
        &self.shared.locations
    }
}

impl RemoteNodes for Nodes {
    fn forward(&self, value: &[u8], users: &[Arc<str>], done: ForwardDone) -> Forwarding {
        let (shared, now) = (&self.shared, Instant::now());
        let counters = &shared.counters;
        let concerned = |user: &&Arc<str>| {
            shared.locations.find(user, now).is_none_or(|instances| !instances.is_empty())
        };
        let users: Vec<_> = users.iter().filter(concerned).map(Arc::clone).collect();
        if users.is_empty() {
            counters.redis_forwards_local.add(1);
            return Forwarding::Nobody;
        }
        if !shared.link.is_up() {
            counters.redis_forwards_refused_down.add(1);
            return Forwarding::Refused;
        }
        let weight = Job::weight(value, &users);
        let waiting = shared.waiting_bytes.fetch_add(weight, Ordering::Relaxed);
        let Ok(place) = self.jobs.try_reserve() else {
            shared.waiting_bytes.fetch_sub(weight, Ordering::Relaxed);
            counters.redis_forwards_refused_full.add(1);
            return Forwarding::Refused;
        };
        if waiting > 0 && waiting + weight > self.bytes_max {
            shared.waiting_bytes.fetch_sub(weight, Ordering::Relaxed);
            counters.redis_forwards_refused_full.add(1);
            return Forwarding::Refused;
        }
        counters.redis_forwards.add(1);
        counters.redis_forwards_bytes.add(weight as u64);
        counters.redis_forwards_waiting.add(1);
        let value = Bytes::copy_from_slice(value);
        place.send((Job { value, users, shared: Arc::clone(shared) }, Done(Some(done))));
        Forwarding::Pending
    }

    fn has_room(&self) -> bool {
        let shared = &self.shared;
        let kept = PLACES_KEPT.min(self.jobs.max_capacity() / 2);
        let has_room = self.jobs.capacity() > kept
            && shared.waiting_bytes.load(Ordering::Relaxed) < self.bytes_max;
        has_room || !shared.link.is_up() || !shared.pace.gets_on(Instant::now())
    }
}

/// Where the users of a batch are, as far as known.
type Places = HashMap<Arc<str>, Instances>;

/// One record for one instance.
struct Publish<'a> {
    job: &'a Job,
    record: usize,
    instance: Arc<str>,
}

struct Forwarder {
    shared: Arc<Shared>,
    registry: Registry,
}

impl Forwarder {
    async fn run(mut self, mut queue: mpsc::Receiver<(Job, Done)>) {
        let mut taken = Vec::with_capacity(BATCH_RECORDS_MAX);
        while queue.recv_many(&mut taken, BATCH_RECORDS_MAX).await > 0 {
            let (batch, done): (Vec<_>, Vec<_>) = taken.drain(..).unzip();
            self.shared.pace.begins(Instant::now());
            let handed_over = self.hand_over(&batch).await;
            self.shared.pace.ends(handed_over.is_ok(), Instant::now());
            if handed_over.is_err() {
                self.shared.counters.redis_forwards_failed.add(batch.len() as u64);
            }
            drop(done);
        }
    }

    /// Hands over a batch as far as possible.
    ///
    /// # Errors
    /// Redis failed on the way; some of it may have been handed over.
    async fn hand_over(&mut self, batch: &[Job]) -> Result<(), RedisFault> {
        let mut places = Places::new();
        let users = batch.iter().flat_map(|job| &job.users);
        self.resolve(users, &mut places).await?;
        let mut publishes = Vec::new();
        for (record, job) in batch.iter().enumerate() {
            let mut told: Vec<&Arc<str>> = Vec::new();
            for instance in instances_of(job, &places) {
                if !told.contains(&instance) {
                    told.push(instance);
                }
            }
            publishes.extend(told.into_iter().map(|instance| Publish {
                job,
                record,
                instance: instance.clone(),
            }));
        }
        let unheard = self.publish(&publishes).await?;
        if unheard.is_empty() {
            return Ok(());
        }
        let again = self.look_again(&publishes, &unheard, &places).await?;
        self.shared.counters.redis_publishes_again.add(again.len() as u64);
        self.publish(&again).await.map(drop)
    }

    /// Finds out where these users are who are not in `places` yet.
    async fn resolve(
        &mut self,
        users: impl Iterator<Item = &Arc<str>>,
        places: &mut Places,
    ) -> Result<(), RedisFault> {
        let now = Instant::now();
        let mut unknown = Vec::new();
        let mut seen = HashSet::new();
        for user in users {
            if places.contains_key(user) || !seen.insert(Arc::clone(user)) {
                continue;
            }
            match self.shared.locations.find(user, now) {
                Some(instances) => {
                    places.insert(Arc::clone(user), instances);
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
                let locations = &self.shared.locations;
                locations.remember(Arc::clone(user), asked, Arc::clone(&instances));
                places.insert(Arc::clone(user), instances);
            }
        }
        Ok(())
    }

    /// Publishes in order; returns those that nobody heard, by index.
    async fn publish(&self, publishes: &[Publish<'_>]) -> Result<Vec<usize>, RedisFault> {
        let counters = &self.shared.counters;
        let mut unheard = Vec::new();
        let mut next = 0;
        while next < publishes.len() {
            let first = next;
            let (mut commands, mut bytes) = (Vec::new(), 0);
            while let Some(Publish { job, instance, .. }) = publishes.get(next)
                && commands.len() < PUBLISHES_AT_ONCE
                && (bytes == 0 || bytes + job.value.len() <= PUBLISH_BYTES_AT_ONCE)
            {
                let mut publish = cmd("PUBLISH");
                publish.arg(super::channel_of(instance)).arg(&job.value[..]);
                bytes += job.value.len();
                commands.push(publish);
                next += 1;
            }
            let count = commands.len() as u64;
            counters.redis_publishes.add(count);
            let answers = self.shared.link.run(commands).await.inspect_err(|_| {
                counters.redis_publishes_failed.add(count);
            })?;
            for (index, answer) in (first..).zip(answers) {
                match answer.and_then(|value| Ok(u64::from_redis_value(value)?)) {
                    Ok(0) => unheard.push(index),
                    Ok(_) => {}
                    Err(_) => counters.redis_publishes_failed.add(1),
                }
            }
        }
        Ok(unheard)
    }

    /// What nobody heard, for where its users are according to a second look-up, if that is another
    /// place. An instance that is still registered there but does not listen is down or between two
    /// connections; telling it again at once would be as vain.
    async fn look_again<'a>(
        &mut self,
        publishes: &[Publish<'a>],
        unheard: &[usize],
        places: &Places,
    ) -> Result<Vec<Publish<'a>>, RedisFault> {
        let now = Instant::now();
        self.shared.counters.redis_publishes_unheard.add(unheard.len() as u64);
        for index in unheard {
            self.shared.locations.instance_gone(&publishes[*index].instance, now);
        }
        let told: HashSet<(usize, Arc<str>)> = publishes
            .iter()
            .map(|publish| (publish.record, Arc::clone(&publish.instance)))
            .collect();
        let mut places_now = Places::new();
        let mut again = Vec::new();
        let mut again_told = HashSet::new();
        for index in unheard {
            let Publish { job, record, instance } = &publishes[*index];
            let lost = |user: &&Arc<str>| {
                places.get(*user).is_some_and(|instances| instances.contains(instance))
            };
            let users: Vec<_> = job.users.iter().filter(lost).collect();
            self.resolve(users.iter().copied(), &mut places_now).await?;
            for user in users {
                for instance in places_now.get(user).iter().flat_map(|instances| instances.iter()) {
                    let address = (*record, Arc::clone(instance));
                    if !told.contains(&address) && again_told.insert(address) {
                        again.push(Publish {
                            job,
                            record: *record,
                            instance: Arc::clone(instance),
                        });
                    }
                }
            }
        }
        Ok(again)
    }
}

fn instances_of<'a>(job: &'a Job, places: &'a Places) -> impl Iterator<Item = &'a Arc<str>> {
    job.users.iter().filter_map(|user| places.get(user)).flat_map(|instances| instances.iter())
}
