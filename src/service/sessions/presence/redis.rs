//! Registers sessions directly in Redis, with the keys and the channel of the presence service
//! (contract §4).
//!
//! | key or channel | what |
//! | --- | --- |
//! | `session:{user}:{device}` | the instance, for 60 s |
//! | `presence:user:{user}:devices` | set of devices, for an hour after a registration or check of one of them |
//! | `presence:updates` | a `PresenceUpdateEvent` when a session is registered that was not registered before (online), and when the last live session of a user ends (offline) |
//!
//! Every key expires, so a node that crashes or drops unregistrations leaves nothing in Redis for good.
//!
//! Each command or script uses one key, so that it works in a Redis cluster. The commands of a batch are
//! pipelined; commands that depend on answers follow in another round.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message as _;
use redis::{Cmd, FromRedisValue, RedisResult, Value};

use super::queue::OperationOutcome::{self, Done, Elsewhere, Failed, Vanished};
use super::queue::PresenceOperation::{self, Refresh, Register, Unregister};
use super::{OperationBatch, PresenceBackend};
use crate::service::backends::ports::BoxFuture;
use crate::service::backends::redis::{RedisFault, RedisLink};
use crate::service::events::proto::presence::v1::{PresenceStatus, PresenceUpdateEvent};
use crate::service::members::directory::SessionIds;

/// Operations per batch.
const BATCH_MAX: usize = 256;
/// Concurrent batches.
pub(super) const BATCHES_MAX: usize = 4;

/// Lifetime of a registration, seconds (contract §4).
const LIFETIME_S: u32 = 60;
/// Lifetime of a set of devices, seconds. Registrations and checks renew it. A check comes with every
/// third refresh, at worst 55 s apart, so only the set of a user without sessions expires.
const DEVICES_LIFETIME_S: u32 = 3_600;
const _: () = assert!(DEVICES_LIFETIME_S > 10 * 3 * LIFETIME_S);
/// Where changes are published (contract §4).
const UPDATES: &str = "presence:updates";

/// Extends a registration if it names this instance; returns the instance that it names.
const EXTEND: &str = "local holder = redis.call('GET', KEYS[1]) \
                      if holder == ARGV[1] then redis.call('EXPIRE', KEYS[1], ARGV[2]) end \
                      return holder";
/// Removes a registration if it names this instance; returns the instance that it named.
const REMOVE: &str = "local holder = redis.call('GET', KEYS[1]) \
                      if holder == ARGV[1] then redis.call('DEL', KEYS[1]) end \
                      return holder";

/// Redis in place of the presence service.
pub(super) struct RedisPresence {
    link: RedisLink,
    instance: Arc<str>,
}

impl RedisPresence {
    pub(super) fn new(link: RedisLink, instance: Arc<str>) -> Self {
        Self { link, instance }
    }
}

impl PresenceBackend for RedisPresence {
    fn perform(&self, operations: OperationBatch) -> BoxFuture<Vec<OperationOutcome>> {
        let link = self.link.clone();
        let instance = Arc::clone(&self.instance);
        Box::pin(async move {
            match batch(&link, &instance, &operations).await {
                Ok(outcomes) => outcomes,
                // Some commands may have been carried out; all of them can be repeated.
                Err(_) => vec![Failed; operations.len()],
            }
        })
    }

    fn batch_max(&self) -> usize {
        BATCH_MAX
    }
}

fn session_key(ids: &SessionIds) -> String {
    format!("session:{}:{}", ids.user(), ids.device())
}

fn devices_key(user: &str) -> String {
    format!("presence:user:{user}:devices")
}

fn script(source: &str, ids: &SessionIds, instance: &str) -> Cmd {
    let mut command = redis::cmd("EVAL");
    command.arg(source).arg(1).arg(session_key(ids)).arg(instance).arg(LIFETIME_S);
    command
}

fn update(user: &str, status: PresenceStatus) -> Cmd {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let event = PresenceUpdateEvent {
        user_id: user.to_owned(),
        status: status.into(),
        occurred_at: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
    };
    let mut command = redis::cmd("PUBLISH");
    command.arg(UPDATES).arg(event.encode_to_vec());
    command
}

fn devices(name: &str, ids: &SessionIds) -> Cmd {
    let mut command = redis::cmd(name);
    command.arg(devices_key(ids.user())).arg(ids.device());
    command
}

/// Adds the device to its user's set, and renews the set's lifetime.
fn keep_device(ids: &SessionIds) -> [Cmd; KEEP_COMMANDS] {
    let mut expire = redis::cmd("EXPIRE");
    expire.arg(devices_key(ids.user())).arg(DEVICES_LIFETIME_S);
    [devices("SADD", ids), expire]
}

/// Commands of [`keep_device`].
const KEEP_COMMANDS: usize = 2;

/// The instance named in an answer, if any.
fn holder(answer: RedisResult<Value>) -> RedisResult<Option<String>> {
    Ok(FromRedisValue::from_redis_value(answer?)?)
}

async fn batch(
    link: &RedisLink,
    instance: &str,
    operations: &[(SessionIds, PresenceOperation)],
) -> Result<Vec<OperationOutcome>, RedisFault> {
    let mut commands = Vec::with_capacity((1 + KEEP_COMMANDS) * operations.len());
    for (ids, operation) in operations {
        match operation {
            Register => {
                let mut set = redis::cmd("SET");
                set.arg(session_key(ids)).arg(instance).arg("EX").arg(LIFETIME_S).arg("GET");
                commands.push(set);
                commands.extend(keep_device(ids));
            }
            Refresh { check } => {
                commands.push(script(EXTEND, ids, instance));
                // Another node may have removed the device when its session of the same device ended.
                if *check {
                    commands.extend(keep_device(ids));
                }
            }
            Unregister => commands.push(script(REMOVE, ids, instance)),
        }
    }
    let mut answers = link.run(commands).await?.into_iter();
    let mut outcomes = Vec::with_capacity(operations.len());
    let mut updates = Vec::new();
    let mut unregistered = Vec::new();
    for (ids, operation) in operations {
        let Some(first) = answers.next() else {
            return Ok(vec![Failed; operations.len()]);
        };
        let kept = match operation {
            Register | Refresh { check: true } => KEEP_COMMANDS,
            Refresh { check: false } | Unregister => 0,
        };
        let well = answers.by_ref().take(kept).filter(Result::is_ok).count() == kept;
        let was = match holder(first) {
            Ok(was) if well => was,
            Ok(_) | Err(_) => {
                outcomes.push(Failed);
                continue;
            }
        };
        outcomes.push(match (operation, was) {
            (Register, was) => {
                if was.is_none() {
                    updates.push(update(ids.user(), PresenceStatus::Online));
                }
                Done
            }
            (Refresh { .. }, None) => Vanished,
            // It had expired, or an earlier attempt removed it and then failed.
            (Unregister, None) => {
                unregistered.push(ids);
                Vanished
            }
            (Refresh { .. } | Unregister, Some(holder)) if holder != instance => Elsewhere,
            (Refresh { .. }, Some(_)) => Done,
            (Unregister, Some(_)) => {
                unregistered.push(ids);
                Done
            }
        });
    }
    updates.extend(remove_devices(link, &unregistered).await?);
    if !updates.is_empty() {
        link.run(updates).await?;
    }
    Ok(outcomes)
}

/// Removes unregistered devices from their users' sets. Returns the updates of users who have no live
/// session left, and the removal of other devices whose registration has expired.
async fn remove_devices(
    link: &RedisLink,
    unregistered: &[&SessionIds],
) -> Result<Vec<Cmd>, RedisFault> {
    if unregistered.is_empty() {
        return Ok(Vec::new());
    }
    let mut commands = Vec::with_capacity(2 * unregistered.len());
    for ids in unregistered {
        commands.push(devices("SREM", ids));
        let mut rest = redis::cmd("SMEMBERS");
        rest.arg(devices_key(ids.user()));
        commands.push(rest);
    }
    let answers = link.run(commands).await?;
    let mut others: Vec<SessionIds> = Vec::new();
    let mut left = Vec::with_capacity(unregistered.len());
    for (ids, answer) in unregistered.iter().zip(answers.into_iter().skip(1).step_by(2)) {
        let names: Vec<String> =
            answer.and_then(|rest| Ok(Vec::from_redis_value(rest)?)).unwrap_or_default();
        let from = others.len();
        // A user has a handful of devices, and their names are bounded.
        others.extend(names.iter().map(|device| SessionIds::new(ids.user(), device)));
        left.push((*ids, from..others.len()));
    }

    // After a crash of its node a device stays in the set: only a registration shows that it is live.
    let mut alive = Vec::new();
    if !others.is_empty() {
        let exists = |ids: &SessionIds| {
            let mut command = redis::cmd("EXISTS");
            command.arg(session_key(ids));
            command
        };
        for answer in link.run(others.iter().map(exists).collect()).await? {
            // If in doubt, the user is not reported offline.
            alive.push(answer.and_then(|found| Ok(bool::from_redis_value(found)?)).unwrap_or(true));
        }
    }
    let mut commands = Vec::new();
    for (ids, range) in left {
        if !alive[range.clone()].contains(&true) {
            commands.push(update(ids.user(), PresenceStatus::Offline));
        }
        for index in range.filter(|index| !alive[*index]) {
            commands.push(devices("SREM", &others[index]));
        }
    }
    Ok(commands)
}
