//! Error answers with which Redis refuses to serve, as opposed to errors of a single command.
//!
//! `PING` succeeds in most of these states, so the link probes with a write (see `probe.rs`).
//!
//! | refusal | Redis answers | cause |
//! | --- | --- | --- |
//! | replica | `READONLY`, `MASTERDOWN` | the server is a replica: a failover demoted it, or the address is wrong |
//! | no replicas | `NOREPLICAS` | a primary with fewer replicas than `min-replicas-to-write`: often the old one after a failover |
//! | memory | `OOM` | `maxmemory` is reached and nothing may be evicted (`noeviction`) |
//! | disk | `MISCONF` | a snapshot or the append-only file could not be written |
//! | loading | `LOADING` | Redis started and reads its data |
//! | cluster down | `CLUSTERDOWN` | slots without an owner, or a minority of the cluster |
//! | moved | `MOVED`, `ASK`, `TRYAGAIN` | a node of a cluster is addressed as a single server, or slots are on the move |
//! | credentials | `NOAUTH`, `WRONGPASS`, `DENIED` | the password changed |
//! | permission | `NOPERM` | the access rules (ACL) of the user |
//! | busy | `BUSY`, `UNKILLABLE` | a script runs for too long |
//! | clients | `ERR max number of clients reached` | `maxclients` |
//! | other | any other code | |

use std::fmt;

use redis::{ErrorKind, RedisError};

use super::counters::RedisLinkCounters;
use crate::domain::counters::SharedCounter;

/// Why Redis does not serve although it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RedisRefusal {
    Replica,
    NoReplicas,
    Memory,
    Disk,
    Loading,
    ClusterDown,
    Moved,
    Credentials,
    Permission,
    Busy,
    Clients,
    Other,
}

/// Codes of errors that concern one command and say nothing about the state of Redis.
const COMMAND_ERRORS: &[&str] =
    &["ERR", "WRONGTYPE", "NOSCRIPT", "EXECABORT", "CROSSSLOT", "NOTBUSY", "NOSUB", "BUSYKEY"];

impl RedisRefusal {
    /// `None`: the connection failed, or the error concerns this command only.
    pub(super) fn of(error: &RedisError) -> Option<Self> {
        match error.kind() {
            ErrorKind::AuthenticationFailed => return Some(Self::of_login(error)),
            // The cluster client knows no node for the slot.
            ErrorKind::ClusterConnectionNotFound => return Some(Self::ClusterDown),
            _ => {}
        }
        Some(match error.code()? {
            "READONLY" | "MASTERDOWN" => Self::Replica,
            "NOREPLICAS" => Self::NoReplicas,
            "OOM" => Self::Memory,
            "MISCONF" => Self::Disk,
            "LOADING" => Self::Loading,
            "CLUSTERDOWN" => Self::ClusterDown,
            "MOVED" | "ASK" | "TRYAGAIN" => Self::Moved,
            "NOAUTH" | "WRONGPASS" | "DENIED" => Self::Credentials,
            "NOPERM" => Self::Permission,
            "BUSY" | "UNKILLABLE" => Self::Busy,
            "ERR" if error.detail().is_some_and(is_client_limit) => Self::Clients,
            code if COMMAND_ERRORS.contains(&code) => return None,
            _ => Self::Other,
        })
    }

    /// The client library reports any error answer to `AUTH` as a failed authentication.
    fn of_login(error: &RedisError) -> Self {
        let text = error.to_string();
        if is_client_limit(&text) {
            Self::Clients
        } else if text.contains("LOADING") {
            Self::Loading
        } else {
            Self::Credentials
        }
    }

    /// Whether this server cannot be the right one, or this connection cannot become usable:
    /// nothing that is sent on it reaches the other nodes.
    pub(super) fn needs_another_connection(self) -> bool {
        match self {
            Self::Replica | Self::Credentials | Self::Clients => true,
            Self::NoReplicas
            | Self::Memory
            | Self::Disk
            | Self::Loading
            | Self::ClusterDown
            | Self::Moved
            | Self::Permission
            | Self::Busy
            | Self::Other => false,
        }
    }

    /// The counter of these refusals.
    pub(super) fn counter(self, counters: &RedisLinkCounters) -> &SharedCounter {
        match self {
            Self::Replica => &counters.redis_refused_replica,
            Self::NoReplicas => &counters.redis_refused_no_replicas,
            Self::Memory => &counters.redis_refused_memory,
            Self::Disk => &counters.redis_refused_disk,
            Self::Loading => &counters.redis_refused_loading,
            Self::ClusterDown => &counters.redis_refused_cluster_down,
            Self::Moved => &counters.redis_refused_moved,
            Self::Credentials => &counters.redis_refused_credentials,
            Self::Permission => &counters.redis_refused_permission,
            Self::Busy => &counters.redis_refused_busy,
            Self::Clients => &counters.redis_refused_clients,
            Self::Other => &counters.redis_refused_other,
        }
    }
}

fn is_client_limit(text: &str) -> bool {
    text.contains("max number of clients")
}

impl fmt::Display for RedisRefusal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Replica => "the server is a read-only replica (READONLY)",
            Self::NoReplicas => "the primary has too few replicas (NOREPLICAS)",
            Self::Memory => "its memory is full: maxmemory with noeviction (OOM)",
            Self::Disk => "it cannot write to its disk (MISCONF)",
            Self::Loading => "it is loading its data (LOADING)",
            Self::ClusterDown => "the cluster is down (CLUSTERDOWN)",
            Self::Moved => "the key is on another node of a cluster (MOVED)",
            Self::Credentials => "it refuses user or password (NOAUTH, WRONGPASS)",
            Self::Permission => "its access rules forbid the command (NOPERM)",
            Self::Busy => "it is busy with a script (BUSY)",
            Self::Clients => "it has too many clients (maxclients)",
            Self::Other => "it answers with an error",
        })
    }
}

/// The reason of an error without the server's message, which may quote a command's arguments.
pub(super) fn reason(error: &RedisError) -> String {
    match (RedisRefusal::of(error), error.code()) {
        (Some(RedisRefusal::Other), Some(code)) => format!("it answers with the error {code}"),
        (Some(refusal), _) => refusal.to_string(),
        (None, Some(code)) => code.to_owned(),
        (None, None) => error.category().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use redis::{Value, parse_redis_value};

    /// The error that the library makes of an answer.
    fn answer(line: &str) -> RedisError {
        let value: Value = parse_redis_value(format!("-{line}\r\n").as_bytes()).unwrap();
        value.extract_error().unwrap_err()
    }

    #[test]
    fn answers_are_told_apart() {
        use RedisRefusal::*;
        let table = [
            ("READONLY You can't write against a read only replica.", Some(Replica)),
            ("MASTERDOWN Link with MASTER is down", Some(Replica)),
            ("NOREPLICAS Not enough good replicas to write.", Some(NoReplicas)),
            ("OOM command not allowed when used memory > 'maxmemory'.", Some(Memory)),
            ("MISCONF Redis is configured to save RDB snapshots", Some(Disk)),
            ("LOADING Redis is loading the dataset in memory", Some(Loading)),
            ("CLUSTERDOWN Hash slot not served", Some(ClusterDown)),
            ("MOVED 3999 127.0.0.1:6381", Some(Moved)),
            ("TRYAGAIN Multiple keys request during rehashing of slot", Some(Moved)),
            ("NOAUTH Authentication required.", Some(Credentials)),
            ("WRONGPASS invalid username-password pair", Some(Credentials)),
            ("DENIED Redis is running in protected mode", Some(Credentials)),
            ("NOPERM this user has no permissions to run the 'set' command", Some(Permission)),
            ("BUSY Redis is busy running a script.", Some(Busy)),
            ("ERR max number of clients reached", Some(Clients)),
            ("STRANGE answer of a proxy", Some(Other)),
            ("ERR wrong number of arguments for 'get' command", None),
            ("WRONGTYPE Operation against a key holding the wrong kind of value", None),
        ];
        for (line, refusal) in table {
            assert_eq!(RedisRefusal::of(&answer(line)), refusal, "{line}");
        }
        let io: RedisError = std::io::Error::from(std::io::ErrorKind::BrokenPipe).into();
        assert_eq!(RedisRefusal::of(&io), None);
    }

    #[test]
    fn reason_does_not_quote_the_message() {
        let error = answer("STRANGE hunter2");
        assert_eq!(reason(&error), "it answers with the error STRANGE");
        assert_eq!(reason(&answer("ERR hunter2")), "ERR");
    }
}
