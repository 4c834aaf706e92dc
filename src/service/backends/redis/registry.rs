//! Looks up users' locations in the registry of the presence service (contract §4).

use std::collections::HashSet;
use std::sync::Arc;

use redis::{FromRedisValue, RedisResult, Value, cmd};

use super::link::{RedisFault, RedisLink};
use super::locations::Instances;
use crate::service::backends::ports::LogNodes;

/// Maximum devices per user that are looked up; further ones are ignored.
const DEVICES_MAX: usize = 64;
/// Maximum number of interned instance names.
const NAMES_MAX: usize = 1024;
/// Maximum users per lookup.
pub(super) const USERS_AT_ONCE: usize = 1024;

/// A reader of the registry, with interned instance names.
pub(super) struct Registry {
    link: RedisLink,
    own: Arc<str>,
    /// These nodes are left out.
    log_nodes: Option<Arc<dyn LogNodes>>,
    names: HashSet<Arc<str>>,
    none: Instances,
}

impl Registry {
    pub(super) fn new(
        link: RedisLink,
        own: Arc<str>,
        log_nodes: Option<Arc<dyn LogNodes>>,
    ) -> Self {
        Self { link, own, log_nodes, names: HashSet::new(), none: Arc::from([]) }
    }

    /// For each of at most [`USERS_AT_ONCE`] users, the other instances that hold sessions of the
    /// user. Two round trips: the users' devices, then the instance of each device. `None`: the
    /// user's keys could not be read.
    pub(super) async fn look_up(
        &mut self,
        users: &[Arc<str>],
    ) -> Result<Vec<Option<Instances>>, RedisFault> {
        assert!(users.len() <= USERS_AT_ONCE);
        let mut commands = Vec::with_capacity(users.len());
        for user in users {
            let mut members = cmd("SMEMBERS");
            members.arg(format!("presence:user:{user}:devices"));
            commands.push(members);
        }
        let devices: Vec<Option<Vec<String>>> =
            self.link.run(commands).await?.into_iter().map(value).collect();

        let mut commands = Vec::new();
        for (user, devices) in users.iter().zip(&devices) {
            for device in devices.iter().flatten().take(DEVICES_MAX) {
                let mut get = cmd("GET");
                get.arg(format!("session:{user}:{device}"));
                commands.push(get);
            }
        }
        let holders =
            if commands.is_empty() { Vec::new() } else { self.link.run(commands).await? };

        let mut holders = holders.into_iter();
        let mut found = Vec::with_capacity(users.len());
        for devices in devices {
            let Some(devices) = devices else {
                found.push(None);
                continue;
            };
            let own = holders.by_ref().take(devices.len().min(DEVICES_MAX));
            // A missing key is a session that was not refreshed: no instance holds it.
            let holders: Option<Vec<Option<String>>> = own.map(value).collect();
            found.push(holders.map(|holders| self.others(holders.into_iter().flatten())));
        }
        Ok(found)
    }

    fn is_left_out(&self, instance: &str) -> bool {
        self.log_nodes.as_ref().is_some_and(|nodes| nodes.has_lease(instance))
    }

    /// All instances except this one and those that are left out, without duplicates.
    fn others(&mut self, holders: impl Iterator<Item = String>) -> Instances {
        let mut others: Vec<Arc<str>> = Vec::new();
        for holder in holders {
            let known = others.iter().any(|other| **other == *holder);
            if !holder.is_empty() && *holder != *self.own && !known && !self.is_left_out(&holder) {
                others.push(self.name(holder));
            }
        }
        if others.is_empty() { Arc::clone(&self.none) } else { others.into() }
    }

    fn name(&mut self, instance: String) -> Arc<str> {
        if let Some(known) = self.names.get(instance.as_str()) {
            return Arc::clone(known);
        }
        if self.names.len() >= NAMES_MAX {
            self.names.clear();
        }
        let name: Arc<str> = instance.into();
        self.names.insert(Arc::clone(&name));
        name
    }
}

/// `None`: an error, or a value of another type.
fn value<T: FromRedisValue>(answer: RedisResult<Value>) -> Option<T> {
    answer.ok().and_then(|value| T::from_redis_value(value).ok())
}
