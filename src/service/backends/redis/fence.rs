//! Fenced writes of a session's registration: the older session of a device never wins over the newer.
//!
//! The value of a registration is fixed by the contract (§4: the instance id), so what orders two
//! registrations is kept in a second key, the fence. Every write of a registration is one script over both:
//!
//! | key | what |
//! | --- | --- |
//! | `session:{user}:{device}` | the instance (contract §4) |
//! | `delivery:fence:{session:{user}:{device}}` | a hash, see below |
//!
//! The braces of the fence are a hash tag of Redis Cluster. The ids contain none, so both keys are in one
//! slot, and a script may use both.
//!
//! | field | what |
//! | --- | --- |
//! | `d` | the highest number drawn |
//! | `n` | the highest number that was registered or removed |
//! | `b` | the instance that registered `n` |
//! | `r` | set: the session of `n` was removed |
//!
//! # Two steps
//! A session first draws a number, then registers with it. An answer to the draw that comes too late is
//! thrown away with its number, so a command that waited in a stalled connection orders nothing. A late
//! or repeated write carries a number that was drawn in time, and loses to every higher one.
//!
//! # Numbers
//! A number is the server's time in µs, or one more than the last number if that is higher. So numbers
//! grow also after Redis has lost the fence. They order sessions as their draws reached the server, and
//! no clock of a node is used.
//!
//! # A session that draws late
//! A node may have been cut off from Redis when its session was admitted. A number that it draws later
//! would be higher than that of a session which was admitted meanwhile on another node. So a session that
//! draws more than [`DRAWN_AT_ONCE`] after its admission takes the time of the draw minus its age: about
//! the number that it would have drawn at once. The age is a duration, so clocks that differ between
//! nodes do not matter here either. Clocks that differ between two Redis servers do, but only for
//! sessions that were admitted while their node could not reach Redis.

use std::time::Duration;

use redis::{Cmd, FromRedisValue, RedisResult, Value, cmd};
use tokio::time::Instant;

/// Lifetime of a registration, seconds (contract §4).
pub const REGISTRATION_LIFETIME_S: u32 = 60;
/// Lifetime of a fence, seconds. Each draw and each write renews it. It must outlive the registration
/// that it protects; once that is gone, there is no newer session to protect.
pub const FENCE_LIFETIME_S: u32 = 2 * REGISTRATION_LIFETIME_S;
/// Age up to which a session that draws a number is ordered by the number alone.
pub const DRAWN_AT_ONCE: Duration = Duration::from_millis(100);

/// `KEYS`: fence. `ARGV`: its lifetime. Returns the number and the time.
const DRAW: &str = "\
    local t = redis.call('TIME') \
    local now = t[1] * 1000000 + t[2] \
    local last = tonumber(redis.call('HGET', KEYS[1], 'd')) or 0 \
    local n = string.format('%.0f', math.max(now, last + 1)) \
    redis.call('HSET', KEYS[1], 'd', n) \
    redis.call('EXPIRE', KEYS[1], ARGV[1]) \
    return {n, string.format('%.0f', now)}";

/// `KEYS`: session, fence. `ARGV`: lifetimes of both, instance, number. With its own number registered
/// already, it restores a lost registration, but does not replace that of another instance: only a writer
/// without a fence, later than this session, can have written it.
const REGISTER: &str = "\
    local f = redis.call('HMGET', KEYS[2], 'n', 'r') \
    local held, n = tonumber(f[1]) or 0, tonumber(ARGV[4]) \
    local holder = redis.call('GET', KEYS[1]) \
    if held > n then return 'newer' end \
    if held == n and (f[2] or (holder and holder ~= ARGV[3])) then return 'newer' end \
    redis.call('SET', KEYS[1], ARGV[3], 'EX', ARGV[1]) \
    redis.call('HSET', KEYS[2], 'n', ARGV[4], 'b', ARGV[3]) \
    redis.call('HDEL', KEYS[2], 'r') \
    redis.call('EXPIRE', KEYS[2], ARGV[2]) \
    return holder and 'done' or 'new'";

/// `KEYS`: session, fence. `ARGV`: lifetimes of both, instance, number. `missing`: the registration is
/// gone, or that of an older session is back because Redis lost the newer write.
const REFRESH: &str = "\
    local f = redis.call('HMGET', KEYS[2], 'n', 'b') \
    local held, n = tonumber(f[1]) or 0, tonumber(ARGV[4]) \
    if held > n then return 'newer' end \
    local holder = redis.call('GET', KEYS[1]) \
    if holder == ARGV[3] and held == n then \
        redis.call('EXPIRE', KEYS[1], ARGV[1]) \
        redis.call('EXPIRE', KEYS[2], ARGV[2]) \
        return 'done' \
    end \
    if holder and holder ~= ARGV[3] and (held == n or holder ~= f[2]) then return 'newer' end \
    return 'missing'";

/// `KEYS`: session, fence. `ARGV`: lifetime of the fence, instance, number. Marks the number as removed,
/// so that a late registration with it is void. Removes an older session's registration too, because this
/// session had replaced it, but not that of a writer without a fence.
const REMOVE: &str = "\
    local f = redis.call('HMGET', KEYS[2], 'n', 'b') \
    local held, n = tonumber(f[1]) or 0, tonumber(ARGV[3]) \
    if held > n then return 'newer' end \
    redis.call('HSET', KEYS[2], 'n', ARGV[3], 'r', 1) \
    redis.call('EXPIRE', KEYS[2], ARGV[1]) \
    local holder = redis.call('GET', KEYS[1]) \
    if not holder then return 'missing' end \
    if holder ~= ARGV[2] and (held == n or holder ~= f[2]) then return 'newer' end \
    redis.call('DEL', KEYS[1]) \
    return 'done'";

/// The place of a session in the order of the sessions of its user and device: higher is newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fence(u64);

impl Fence {
    /// The number.
    pub fn number(self) -> u64 {
        self.0
    }

    /// Takes the answer to [`RegistrationKeys::draw`], which was sent at this time.
    ///
    /// # Errors
    /// The server's, or it answered with something else.
    pub fn drawn(
        answer: RedisResult<Value>,
        admitted: Instant,
        sent: Instant,
    ) -> RedisResult<Self> {
        let (number, now): (u64, u64) = FromRedisValue::from_redis_value(answer?)?;
        let age = sent.saturating_duration_since(admitted);
        if age <= DRAWN_AT_ONCE {
            return Ok(Self(number));
        }
        Ok(Self(now.saturating_sub(u64::try_from(age.as_micros()).unwrap_or(u64::MAX)).max(1)))
    }
}

/// Outcome of a fenced write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FencedWrite {
    /// Done.
    Done,
    /// Registered, and no session of the device was registered before.
    New,
    /// There is no registration of this session.
    Missing,
    /// A newer session is registered, or was: nothing was written.
    Newer,
}

impl FencedWrite {
    /// Takes the answer of the server.
    ///
    /// # Errors
    /// The server's, or it answered with something else.
    pub fn answered(answer: RedisResult<Value>) -> RedisResult<Self> {
        let text: String = FromRedisValue::from_redis_value(answer?)?;
        match text.as_str() {
            "done" => Ok(Self::Done),
            "new" => Ok(Self::New),
            "missing" => Ok(Self::Missing),
            "newer" => Ok(Self::Newer),
            _ => Err((redis::ErrorKind::UnexpectedReturnType, "not an answer of the fence").into()),
        }
    }
}

/// The two keys of one session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistrationKeys {
    session: String,
    fence: String,
}

impl RegistrationKeys {
    /// The ids must contain neither `:` nor braces: the session manager refuses such sessions.
    pub fn new(user: &str, device: &str) -> Self {
        let session = format!("session:{user}:{device}");
        let fence = format!("delivery:fence:{{{session}}}");
        Self { session, fence }
    }

    /// The key of the contract.
    pub fn session(&self) -> &str {
        &self.session
    }

    /// Draws a number: see [`Fence::drawn`].
    pub fn draw(&self) -> Cmd {
        let mut command = cmd("EVAL");
        command.arg(DRAW).arg(1).arg(&self.fence).arg(FENCE_LIFETIME_S);
        command
    }

    fn script(&self, source: &str) -> Cmd {
        let mut command = cmd("EVAL");
        command.arg(source).arg(2).arg(&self.session).arg(&self.fence);
        command
    }

    /// Registers the session, unless a newer one is or was registered. Can be repeated.
    pub fn register(&self, instance: &str, fence: Fence) -> Cmd {
        let mut command = self.script(REGISTER);
        command.arg(REGISTRATION_LIFETIME_S).arg(FENCE_LIFETIME_S).arg(instance);
        command.arg(fence.number());
        command
    }

    /// Renews the registration of the session if it is still there.
    pub fn refresh(&self, instance: &str, fence: Fence) -> Cmd {
        let mut command = self.script(REFRESH);
        command.arg(REGISTRATION_LIFETIME_S).arg(FENCE_LIFETIME_S).arg(instance);
        command.arg(fence.number());
        command
    }

    /// Removes the registration of the session, or of its predecessors on this instance, unless a newer
    /// session's has taken its place. Can be repeated.
    pub fn remove(&self, instance: &str, fence: Fence) -> Cmd {
        let mut command = self.script(REMOVE);
        command.arg(FENCE_LIFETIME_S).arg(instance).arg(fence.number());
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(age: Duration) -> u64 {
        let admitted = Instant::now();
        let answer = Value::Array(vec![
            Value::BulkString(b"1764390000000007".to_vec()),
            Value::BulkString(b"1764390000000000".to_vec()),
        ]);
        Fence::drawn(Ok(answer), admitted, admitted + age).unwrap().number()
    }

    #[test]
    fn session_that_draws_late_takes_the_number_of_its_admission() {
        assert_eq!(drawn(Duration::ZERO), 1_764_390_000_000_007);
        assert_eq!(drawn(DRAWN_AT_ONCE), 1_764_390_000_000_007);
        assert_eq!(drawn(Duration::from_secs(9)), 1_764_390_000_000_000 - 9_000_000);
        assert_eq!(drawn(Duration::from_secs(u64::MAX >> 30)), 1, "not below the first");
    }

    #[test]
    fn both_keys_are_in_one_slot_of_a_cluster() {
        let keys = RegistrationKeys::new("alice", "phone");
        assert_eq!(keys.session, "session:alice:phone");
        let (_, tagged) = keys.fence.split_once('{').unwrap();
        // Redis Cluster hashes what is between the first brace and the next closing one.
        assert_eq!(tagged.split_once('}').unwrap(), ("session:alice:phone", ""));
    }

    #[test]
    fn other_answers_are_errors() {
        let text = |text: &str| FencedWrite::answered(Ok(Value::BulkString(text.into())));
        assert_eq!(text("newer").unwrap(), FencedWrite::Newer);
        assert!(text("older").is_err());
        assert!(FencedWrite::answered(Ok(Value::Nil)).is_err());
    }
}
