//! Finds the node of a cluster that owns a channel.
//!
//! A cluster broadcasts every message to all its nodes, but `PUBLISH` counts only the listeners of
//! the node that executes it: the owner of the channel's slot. So the subscriber connects to that
//! node, and a count of 0 means "no listener", as it does with a single server.

use redis::cluster_routing::Slot;
use redis::{ConnectionInfo, FromRedisValue, Value, cmd};

use super::address::{RedisAddress, at, host_of};
use super::link::RedisLink;

/// The node to subscribe at: the server that the link uses, or the owner of the channel's slot.
/// `None`: no node owns it now, or Redis is unreachable.
pub(super) async fn home(link: &RedisLink, channel: &str) -> Option<ConnectionInfo> {
    let nodes = match &link.config().address {
        RedisAddress::Single(_) | RedisAddress::Sentinel(_) => return link.node(),
        RedisAddress::Cluster(nodes) => nodes,
    };
    let seed = nodes.first()?;
    let mut slots = cmd("CLUSTER");
    slots.arg("SLOTS");
    let answer = link.ask(vec![slots]).await.ok()?.pop()?.ok()?;
    let (host, port) = owner(&answer, Slot::for_key(channel))?;
    // A node reports an empty name for itself if it does not know its own.
    let host = if host.is_empty() || host == "?" { host_of(seed).to_owned() } else { host };
    Some(at(seed, &host, port))
}

/// The owner of a slot in an answer to `CLUSTER SLOTS`:
/// `[[first, last, [host, port, …], replica…]…]`.
fn owner(answer: &Value, slot: Slot) -> Option<(String, u16)> {
    let Value::Array(ranges) = answer else { return None };
    ranges.iter().find_map(|range| {
        let Value::Array(range) = range else { return None };
        let [first, last, Value::Array(node), ..] = &range[..] else { return None };
        let number = |value: &Value| u16::from_redis_value_ref(value).ok();
        // `Slot` does not expose its number, only equality.
        if !(number(first)?..=number(last)?).any(|number| Slot::new(number) == Some(slot)) {
            return None;
        }
        let [host, port, ..] = &node[..] else { return None };
        let host = match host {
            Value::Nil => String::new(),
            host => String::from_redis_value_ref(host).ok()?,
        };
        Some((host, number(port)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: i64, last: i64, host: Value, port: i64) -> Value {
        let node = Value::Array(vec![host, Value::Int(port), Value::BulkString(b"id".into())]);
        Value::Array(vec![Value::Int(first), Value::Int(last), node])
    }

    fn slot(number: u16) -> Slot {
        Slot::new(number).unwrap()
    }

    #[test]
    fn owner_is_found_by_slot() {
        let answer = Value::Array(vec![
            range(0, 8_191, Value::BulkString(b"a".into()), 7_000),
            range(8_192, 16_383, Value::Nil, 7_001),
        ]);
        assert_eq!(owner(&answer, slot(8_191)), Some(("a".into(), 7_000)));
        assert_eq!(owner(&answer, slot(8_192)), Some((String::new(), 7_001)));
        let half = Value::Array(vec![range(0, 1, Value::BulkString(b"a".into()), 7_000)]);
        assert_eq!(owner(&half, slot(2)), None);
        for malformed in [Value::Nil, Value::Array(vec![Value::Nil])] {
            assert_eq!(owner(&malformed, slot(0)), None);
        }
    }
}
