//! Finds out whether Redis serves. `PING` does not: a full Redis and a demoted primary answer it.
//!
//! The probe is `SET session::probe-N "" XX EX 1`. Redis checks a `SET` like any other write: role,
//! replicas, memory, disk, cluster state, access rules. With `XX` it then writes nothing, because
//! the key never exists: no session has an empty user id. The name begins like those of the
//! registry, so that access rules that allow the registry allow the probe.
//!
//! A user who may not write at all (the presence service writes the registry) gets `NOPERM`. Such
//! a link probes with `GET` of the same key. It then notices a full Redis or a demoted primary only
//! if a command is refused.

use redis::{Cmd, RedisResult, Value, cmd};

use super::refusal::{RedisRefusal, reason};

/// Keys of a probe in a cluster. Each hashes to some slot, so that every node with a good part of
/// the slots is probed: one that owns a third of them is missed by fewer than 1 of 400,000 sets.
pub(super) const CLUSTER_KEYS: usize = 32;

/// Result of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Health {
    /// All keys can be written, or read.
    Serves,
    /// Redis answers, but refuses.
    Refuses(RedisRefusal, String),
    /// Some nodes of a cluster do not answer.
    Partial(String),
    /// Nothing answers.
    Lost(String),
}

/// The commands of a probe.
pub(super) fn commands(keys: usize, write: bool) -> Vec<Cmd> {
    let command = |index| {
        let key = format!("session::probe-{index}");
        if write {
            let mut set = cmd("SET");
            set.arg(key).arg("").arg("XX").arg("EX").arg(1);
            set
        } else {
            let mut get = cmd("GET");
            get.arg(key);
            get
        }
    };
    (0..keys).map(command).collect()
}

/// Judges the answers to [`commands`]. Every error answer counts, because the commands are correct.
pub(super) fn judge(answers: &[RedisResult<Value>]) -> Health {
    let mut lost = None;
    let mut answered = false;
    for answer in answers {
        match answer {
            Ok(_) => answered = true,
            Err(error) => match (RedisRefusal::of(error), error.code()) {
                (Some(refusal), _) => return Health::Refuses(refusal, reason(error)),
                (None, Some(code)) => {
                    return Health::Refuses(
                        RedisRefusal::Other,
                        format!("it answers a SET with {code}"),
                    );
                }
                (None, None) => lost = Some(reason(error)),
            },
        }
    }
    match lost {
        None => Health::Serves,
        Some(why) if answered => Health::Partial(why),
        Some(why) => Health::Lost(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use redis::{ErrorKind, RedisError};

    #[test]
    fn one_refused_key_is_a_refusal_and_one_lost_node_a_part() {
        let refused = || {
            let value = redis::parse_redis_value(b"-OOM full\r\n").unwrap();
            Err(value.extract_error().unwrap_err())
        };
        let lost = || Err(RedisError::from((ErrorKind::Io, "cut")));
        assert_eq!(judge(&[Ok(Value::Nil), Ok(Value::Nil)]), Health::Serves);
        let why = RedisRefusal::Memory.to_string();
        assert_eq!(
            judge(&[Ok(Value::Nil), lost(), refused()]),
            Health::Refuses(RedisRefusal::Memory, why)
        );
        assert_eq!(judge(&[Ok(Value::Nil), lost()]), Health::Partial("I/O error".into()));
        assert_eq!(judge(&[lost(), lost()]), Health::Lost("I/O error".into()));
    }
}
