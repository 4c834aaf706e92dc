//! Finds the primary that Redis Sentinel names, as
//! <https://redis.io/docs/latest/develop/reference/sentinel-clients/> describes.
//!
//! All configured Sentinels are asked at the same time, and the newest of a majority of answers
//! counts: the one with the highest `config-epoch`, which grows with each failover. The Sentinel
//! client of the library takes the first usable answer in the order of the list instead: it waits
//! for a Sentinel that does not answer, and believes one that a partition left behind.
//!
//! Whether the named server is a primary is checked by the link's write probe.

use std::collections::HashMap;

use redis::{ConnectionInfo, FromRedisValue, Value, cmd};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::address::{SentinelAddress, at};
use super::config::RedisConfig;
use super::refusal::reason;

/// What a Sentinel says about the primary.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Primary {
    epoch: u64,
    host: String,
    port: u16,
}

/// The current primary. Takes at most [`RedisConfig::connect_timeout`].
///
/// # Errors
/// No Sentinel answered with an address; the reason for the log.
pub(super) async fn primary(
    config: &RedisConfig,
    address: &SentinelAddress,
) -> Result<ConnectionInfo, String> {
    let mut asking = JoinSet::new();
    for sentinel in &address.sentinels {
        let question = ask(config.clone(), sentinel.clone(), address.primary.clone());
        let patience = config.connect_timeout;
        asking.spawn(async move {
            timeout(patience, question)
                .await
                .unwrap_or_else(|_| Err("no answer in time".to_owned()))
        });
    }
    let majority = address.sentinels.len() / 2 + 1;
    let mut answers = Vec::with_capacity(majority);
    let mut why = String::new();
    while answers.len() < majority
        && let Some(answer) = asking.join_next().await
    {
        match answer {
            Ok(Ok(primary)) => answers.push(primary),
            Ok(Err(error)) => why = error,
            Err(_) => {}
        }
    }
    match newest(answers) {
        Some(Primary { host, port, .. }) => Ok(at(&address.server, &host, port)),
        None => Err(format!("no Sentinel names the primary: {why}")),
    }
}

fn newest(answers: Vec<Primary>) -> Option<Primary> {
    answers.into_iter().max_by_key(|primary| primary.epoch)
}

async fn ask(
    config: RedisConfig,
    sentinel: ConnectionInfo,
    name: String,
) -> Result<Primary, String> {
    let client = config.client(sentinel).map_err(|error| reason(&error))?;
    let settings = config.connection_settings();
    let mut connection = client
        .get_multiplexed_async_connection_with_config(&settings)
        .await
        .map_err(|error| reason(&error))?;
    let mut question = cmd("SENTINEL");
    question.arg("MASTER").arg(&name);
    let answer: Value =
        question.query_async(&mut connection).await.map_err(|error| match error.detail() {
            Some(detail) if detail.contains("No such master") => {
                format!("it does not monitor a primary of the name {name}")
            }
            _ => reason(&error),
        })?;
    read(answer).ok_or_else(|| "unreadable answer".to_owned())
}

/// Reads an answer to `SENTINEL MASTER`: field names and values in turn.
fn read(answer: Value) -> Option<Primary> {
    let fields: HashMap<String, String> = FromRedisValue::from_redis_value(answer).ok()?;
    Some(Primary {
        epoch: fields.get("config-epoch")?.parse().ok()?,
        host: fields.get("ip").filter(|host| !host.is_empty())?.clone(),
        port: fields.get("port")?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(fields: &[(&str, &str)]) -> Value {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        Value::Array(fields.iter().flat_map(|(name, value)| [text(name), text(value)]).collect())
    }

    #[test]
    fn newest_answer_counts() {
        let primary = |epoch, port| Primary { epoch, host: "a".to_owned(), port };
        assert_eq!(newest(vec![primary(3, 1), primary(7, 2), primary(4, 3)]), Some(primary(7, 2)));
        assert_eq!(newest(Vec::new()), None);
    }

    #[test]
    fn address_and_epoch_are_read() {
        let fields =
            [("name", "main"), ("ip", "10.0.0.7"), ("port", "6380"), ("config-epoch", "12")];
        let expected = Primary { epoch: 12, host: "10.0.0.7".to_owned(), port: 6380 };
        assert_eq!(read(answer(&fields)), Some(expected));
        assert_eq!(read(answer(&fields[..3])), None);
        assert_eq!(read(answer(&[("ip", ""), ("port", "1"), ("config-epoch", "1")])), None);
        assert_eq!(read(Value::Nil), None);
    }
}
