//! A consumer group, as its broker sees it.

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};

use super::wait::SOON;

/// An observer of a group. It is no member itself.
pub struct Group {
    client: BaseConsumer,
    name: String,
}

impl Group {
    /// Observes the group of this name.
    pub fn new(brokers: &str, name: &str) -> Self {
        let client = ClientConfig::new().set("bootstrap.servers", brokers).create();
        Self { client: client.expect("a client"), name: name.into() }
    }

    /// The `client.id` of each member, sorted.
    pub fn members(&self) -> Vec<String> {
        let list =
            self.client.fetch_group_list(Some(&self.name), SOON).expect("the broker answers");
        let group = list.groups().iter().find(|group| group.name() == self.name);
        let members = group.map_or(&[][..], |group| group.members());
        let mut ids: Vec<_> = members.iter().map(|member| member.client_id().to_owned()).collect();
        ids.sort_unstable();
        ids
    }
}
