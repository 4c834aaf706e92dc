//! The set of a user's devices, which names the sessions to look for.
//!
//! It is in another slot of a cluster than the registrations, so no script covers both. A device without
//! a registration is harmless: readers find no session. A registration whose device is missing is not
//! found. So a device is added before its registration is written and once more after it. Whoever removes
//! a device looks for its registration afterwards, and adds the device again if there is one. Of two nodes
//! that do this at the same time, in any order, the second sees what the first has done. A node that
//! crashes in between leaves a device too many, or one that the next check of the session adds again.

use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message as _;
use redis::{Cmd, FromRedisValue as _};

use super::REGISTRATION_LIFETIME_S;
use crate::service::backends::redis::{RedisFault, RedisLink, RegistrationKeys};
use crate::service::events::proto::presence::v1::{PresenceStatus, PresenceUpdateEvent};
use crate::service::members::directory::SessionIds;

/// Lifetime of a set of devices, seconds. Registrations and checks renew it. A check comes with every
/// third refresh, at worst 55 s apart, so only the set of a user without sessions expires.
const DEVICES_LIFETIME_S: u32 = 3_600;
const _: () = assert!(DEVICES_LIFETIME_S > 10 * 3 * REGISTRATION_LIFETIME_S);
/// Where changes are published (contract §4).
const UPDATES: &str = "presence:updates";

/// Announces a change of a user's presence (contract §4).
pub(super) fn update(user: &str, status: PresenceStatus) -> Cmd {
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

fn key(user: &str) -> String {
    format!("presence:user:{user}:devices")
}

fn command(name: &str, ids: &SessionIds) -> Cmd {
    let mut command = redis::cmd(name);
    command.arg(key(ids.user())).arg(ids.device());
    command
}

/// Adds the device to its user's set.
pub(super) fn add(ids: &SessionIds) -> Cmd {
    command("SADD", ids)
}

/// Adds the device to its user's set, and renews the set's lifetime.
pub(super) fn keep(ids: &SessionIds) -> [Cmd; KEEP_COMMANDS] {
    let mut expire = redis::cmd("EXPIRE");
    expire.arg(key(ids.user())).arg(DEVICES_LIFETIME_S);
    [add(ids), expire]
}

/// Commands of [`keep`].
pub(super) const KEEP_COMMANDS: usize = 2;

/// Removes the devices of sessions that were unregistered, and other devices of the same users whose
/// registration has expired. Announces the users who have no live session left.
pub(super) async fn remove(
    link: &RedisLink,
    unregistered: &[&SessionIds],
) -> Result<(), RedisFault> {
    if unregistered.is_empty() {
        return Ok(());
    }
    let mut commands = Vec::with_capacity(2 * unregistered.len());
    for ids in unregistered {
        commands.push(command("SREM", ids));
        let mut rest = redis::cmd("SMEMBERS");
        rest.arg(key(ids.user()));
        commands.push(rest);
    }
    let answers = link.run(commands).await?;
    // Of each user: the device itself, which may have been registered again, and the others. A user has
    // a handful of devices, and their names are bounded.
    let mut sessions: Vec<SessionIds> = Vec::new();
    let mut of_users = Vec::with_capacity(unregistered.len());
    for (ids, answer) in unregistered.iter().zip(answers.into_iter().skip(1).step_by(2)) {
        let names: Vec<String> =
            answer.and_then(|rest| Ok(Vec::from_redis_value(rest)?)).unwrap_or_default();
        let from = sessions.len();
        sessions.push((*ids).clone());
        let others = names.iter().filter(|name| **name != ids.device());
        sessions.extend(others.map(|device| SessionIds::new(ids.user(), device)));
        of_users.push(from..sessions.len());
    }
    // After a crash of its node a device stays in the set: only a registration shows that it is live.
    let live = are_live(link, &sessions).await?;
    let mut commands = Vec::new();
    let mut forgotten = Vec::new();
    for range in of_users {
        if !live[range.clone()].contains(&true) {
            commands.push(update(sessions[range.start].user(), PresenceStatus::Offline));
        }
        if live[range.start] {
            commands.push(add(&sessions[range.start]));
        }
        for index in (range.start + 1..range.end).filter(|index| !live[*index]) {
            commands.push(command("SREM", &sessions[index]));
            forgotten.push(sessions[index].clone());
        }
    }
    link.run(commands).await?;
    add_live_again(link, &forgotten).await
}

/// Adds the devices that were registered while they were removed from the set.
async fn add_live_again(link: &RedisLink, forgotten: &[SessionIds]) -> Result<(), RedisFault> {
    if forgotten.is_empty() {
        return Ok(());
    }
    let live = are_live(link, forgotten).await?;
    let again: Vec<Cmd> =
        forgotten.iter().zip(live).filter(|(_, live)| *live).map(|(ids, _)| add(ids)).collect();
    if !again.is_empty() {
        link.run(again).await?;
    }
    Ok(())
}

/// Whether these sessions are registered. If in doubt, they are: no user is reported offline by mistake.
async fn are_live(link: &RedisLink, sessions: &[SessionIds]) -> Result<Vec<bool>, RedisFault> {
    let exists = |ids: &SessionIds| {
        let mut command = redis::cmd("EXISTS");
        command.arg(RegistrationKeys::new(ids.user(), ids.device()).session());
        command
    };
    let answers = link.run(sessions.iter().map(exists).collect()).await?;
    let live = |answer: redis::RedisResult<redis::Value>| {
        answer.and_then(|found| Ok(bool::from_redis_value(found)?)).unwrap_or(true)
    };
    Ok(answers.into_iter().map(live).collect())
}
