//! Registers sessions directly in Redis, with the keys and the channel of the presence service
//! (contract §4).
//!
//! | key or channel | what |
//! | --- | --- |
//! | `session:{user}:{device}` | the instance, for 60 s |
//! | `delivery:fence:{session:{user}:{device}}` | which session is the newest (`backends::redis::fence`), for 120 s |
//! | `presence:user:{user}:devices` | set of devices, for an hour after a registration or check of one of them |
//! | `presence:updates` | a `PresenceUpdateEvent` when a session is registered that was not registered before (online), and when the last live session of a user ends (offline) |
//!
//! Every key expires, so a node that crashes or drops unregistrations leaves nothing in Redis for good.
//!
//! Each command or script uses the keys of one slot, so that it works in a Redis cluster. The commands of
//! a batch are pipelined; commands that depend on answers follow in another round.
//!
//! | round | register | refresh | unregister |
//! | --- | --- | --- | --- |
//! | 1 | add the device, draw a number | renew the registration; a check adds the device | remove the registration |
//! | 2 | write the registration | | remove the device |
//! | 3 | add the device again, announce the user | | look for a registration; announce the user |

mod devices;

use std::sync::Arc;

use redis::{Cmd, RedisResult, Value};
use tokio::time::Instant;

use self::devices::KEEP_COMMANDS;
use super::queue::OperationOutcome::{self, Done, Elsewhere, Failed, Vanished};
use super::queue::PresenceOperation::{Refresh, Register, Unregister};
use super::{OperationBatch, OperationResult, PendingOperation, PresenceBackend};
use crate::service::backends::ports::BoxFuture;
use crate::service::backends::redis::{
    Fence, FencedWrite, REGISTRATION_LIFETIME_S, RedisFault, RedisLink, RegistrationKeys,
};
use crate::service::events::proto::presence::v1::PresenceStatus;

/// Operations per batch.
const BATCH_MAX: usize = 256;
/// Concurrent batches.
pub(super) const BATCHES_MAX: usize = 4;

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
    fn perform(&self, operations: OperationBatch) -> BoxFuture<Vec<OperationResult>> {
        let link = self.link.clone();
        let instance = Arc::clone(&self.instance);
        Box::pin(async move {
            let mut batch = Batch::new(&link, &instance, &operations);
            // Some commands may have been carried out; all of them can be repeated. The numbers that
            // were drawn are kept.
            if batch.perform().await.is_err() {
                batch.outcomes.fill(Failed);
            }
            let results = batch.outcomes.into_iter().zip(batch.fences);
            results.map(|(outcome, fence)| OperationResult { outcome, fence }).collect()
        })
    }

    fn batch_max(&self) -> usize {
        BATCH_MAX
    }
}

/// One batch, and what is known of it so far.
struct Batch<'a> {
    link: &'a RedisLink,
    instance: &'a str,
    operations: &'a [PendingOperation],
    /// The number of each session, if it has drawn one.
    fences: Vec<Option<Fence>>,
    outcomes: Vec<OperationOutcome>,
}

impl<'a> Batch<'a> {
    fn new(link: &'a RedisLink, instance: &'a str, operations: &'a [PendingOperation]) -> Self {
        let fences = operations.iter().map(|operation| operation.standing.fence).collect();
        Self { link, instance, operations, fences, outcomes: vec![Failed; operations.len()] }
    }

    async fn perform(&mut self) -> Result<(), RedisFault> {
        let ready = self.first_round().await?;
        let registered = self.register(&ready).await?;
        let ended: Vec<_> = self
            .operations
            .iter()
            .zip(&self.outcomes)
            .filter(|(operation, outcome)| {
                operation.operation == Unregister && matches!(outcome, Done | Vanished)
            })
            .map(|(operation, _)| &operation.ids)
            .collect();
        if !registered.is_empty() {
            self.link.run(registered).await?;
        }
        devices::remove(self.link, &ended).await
    }

    /// The commands of the first round for one operation, the fenced one first.
    fn first_commands(&self, operation: &PendingOperation) -> Vec<Cmd> {
        let PendingOperation { ids, operation, standing } = operation;
        let keys = RegistrationKeys::new(ids.user(), ids.device());
        let (fenced, keep) = match operation {
            Register => (standing.fence.is_none().then(|| keys.draw()), true),
            Refresh { check } => {
                (standing.fence.map(|fence| keys.refresh(self.instance, fence)), *check)
            }
            Unregister => {
                let fence = standing.fence.or(standing.previous);
                (fence.map(|fence| keys.remove(self.instance, fence)), false)
            }
        };
        // Another node may have removed the device when its session of the same device ended.
        let keep = keep.then(|| devices::keep(ids));
        fenced.into_iter().chain(keep.into_iter().flatten()).collect()
    }

    /// Returns the operations that may register their session now.
    async fn first_round(&mut self) -> Result<Vec<usize>, RedisFault> {
        let each: Vec<_> = self.operations.iter().map(|it| self.first_commands(it)).collect();
        let counts: Vec<_> = each.iter().map(Vec::len).collect();
        let sent = Instant::now();
        let mut answers = self.link.run(each.into_iter().flatten().collect()).await?.into_iter();
        let mut ready = Vec::new();
        for (index, count) in counts.into_iter().enumerate() {
            let mut answers: Vec<_> = answers.by_ref().take(count).collect();
            let has_fenced = count % KEEP_COMMANDS == 1;
            let fenced = has_fenced.then(|| answers.remove(0));
            let kept = answers.iter().all(Result::is_ok);
            let PendingOperation { operation, standing, .. } = &self.operations[index];
            match (operation, fenced) {
                (Register, fenced) => {
                    if let Some(drawn) = fenced {
                        self.fences[index] = Fence::drawn(drawn, standing.admitted, sent).ok();
                    }
                    if kept && self.fences[index].is_some() {
                        ready.push(index);
                    }
                }
                // The session has no number, so nothing of it is registered.
                (Refresh { .. } | Unregister, None) => self.outcomes[index] = Vanished,
                (Refresh { .. } | Unregister, Some(answer)) if kept => {
                    self.outcomes[index] = written(answer).0;
                }
                (Refresh { .. } | Unregister, Some(_)) => {}
            }
        }
        Ok(ready)
    }

    /// Registers the sessions of these operations. Returns the commands that complete it.
    async fn register(&mut self, ready: &[usize]) -> Result<Vec<Cmd>, RedisFault> {
        if ready.is_empty() {
            return Ok(Vec::new());
        }
        let register = |index: &usize| {
            let ids = &self.operations[*index].ids;
            let fence = self.fences[*index].expect("only sessions with a number are ready");
            RegistrationKeys::new(ids.user(), ids.device()).register(self.instance, fence)
        };
        let answers = self.link.run(ready.iter().map(register).collect()).await?;
        let mut commands = Vec::new();
        for (index, answer) in ready.iter().zip(answers) {
            let ids = &self.operations[*index].ids;
            let (outcome, new) = written(answer);
            self.outcomes[*index] = outcome;
            if outcome == Done {
                commands.push(devices::add(ids));
            }
            if new {
                commands.push(devices::update(ids.user(), PresenceStatus::Online));
            }
        }
        Ok(commands)
    }
}

/// The outcome of a fenced write, and whether nothing was registered before.
fn written(answer: RedisResult<Value>) -> (OperationOutcome, bool) {
    match FencedWrite::answered(answer) {
        Ok(FencedWrite::Done) => (Done, false),
        Ok(FencedWrite::New) => (Done, true),
        Ok(FencedWrite::Missing) => (Vanished, false),
        Ok(FencedWrite::Newer) => (Elsewhere, false),
        Err(_) => (Failed, false),
    }
}
