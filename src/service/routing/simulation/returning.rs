//! Clients of the simulated cluster that keep a cursor, and the promise: *everything for this user before these
//! positions of the log was sent to the sessions of this client before this cursor*.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};

use super::Cluster;
use super::logs::{Device, Logs, PARTITIONS, TOPIC};
use crate::domain::cursor::{Cursor, CursorExpired, TopicId};
use crate::service::routing::replays::{ReplayReader, ReplayedChunk};

/// What a client has, over all its sessions.
#[derive(Debug, Default)]
pub(super) struct CursorKeeper {
    /// The last cursor. `None`: the next session begins without.
    pub(super) cursor: Option<Cursor>,
    /// From here on the client has everything below its cursor: the ends of the partitions at the 101 of the first
    /// session, or of the one whose cursor had expired.
    pub(super) base: [i64; PARTITIONS],
    pub(super) had: [BTreeSet<i64>; PARTITIONS],
}

/// A session of such a client.
pub(super) struct ReturningSession {
    /// Whether it has come with a cursor.
    has_cursor: bool,
    /// `None`: it is complete, and the session is live.
    replay: Option<Receiver<ReplayedChunk>>,
    /// Live events, until then.
    held: Vec<(usize, i64)>,
    /// The last record of each partition that was replayed.
    replayed_to: [i64; PARTITIONS],
}

/// What a step of a session has brought.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ReplayStep {
    Waits,
    Records(usize),
    Live,
    Expired(CursorExpired),
}

impl ReturningSession {
    /// Reads the replay in a task of this runtime.
    pub(super) fn new(
        mut reader: ReplayReader,
        has_cursor: bool,
        runtime: &tokio::runtime::Runtime,
    ) -> Self {
        let (sender, replay) = sync_channel(1_000);
        runtime.spawn(async move {
            loop {
                let chunk = reader.next().await;
                let is_last = !matches!(chunk, Ok(Some(_)));
                // The session may have ended.
                if sender.send(chunk).is_err() || is_last {
                    return;
                }
            }
        });
        let (held, replayed_to) = (Vec::new(), [-1; PARTITIONS]);
        Self { has_cursor, replay: Some(replay), held, replayed_to }
    }

    /// The session has held events during another replay.
    pub(super) fn holds_as(&mut self, former: Option<Self>) {
        self.held = former.map(|former| former.held).unwrap_or_default();
    }

    pub(super) fn is_live(&self) -> bool {
        self.replay.is_none()
    }

    /// A live event has come.
    pub(super) fn got(&mut self, client: &mut CursorKeeper, partition: usize, offset: i64) {
        match self.replay {
            Some(_) => self.held.push((partition, offset)),
            None => drop(client.had[partition].insert(offset)),
        }
    }

    /// Takes the next chunk, if it is there.
    pub(super) fn step(&mut self, client: &mut CursorKeeper) -> ReplayStep {
        let Some(replay) = &self.replay else { return ReplayStep::Waits };
        match replay.try_recv() {
            Err(TryRecvError::Empty) => ReplayStep::Waits,
            Err(TryRecvError::Disconnected) => panic!("a replay ended without an answer"),
            Ok(Ok(Some(records))) => {
                for record in &records {
                    let partition = record.partition as usize;
                    let before = std::mem::replace(&mut self.replayed_to[partition], record.offset);
                    assert!(before < record.offset, "replayed {} after {before}", record.offset);
                    client.had[partition].insert(record.offset);
                }
                ReplayStep::Records(records.len())
            }
            Ok(Ok(None)) => {
                self.replay = None;
                for (partition, offset) in self.held.drain(..) {
                    client.had[partition].insert(offset);
                }
                ReplayStep::Live
            }
            Ok(Err(why)) => ReplayStep::Expired(why),
        }
    }
}

impl CursorKeeper {
    /// The client gets this cursor.
    pub(super) fn check(&self, cursor: &Cursor, (user, device): Device, logs: &Logs) {
        let names = |cursor: &Cursor, partition: usize| {
            cursor.get(TopicId::of(TOPIC), partition as u32).is_some()
        };
        if let Some(former) = &self.cursor {
            let lost = (0..PARTITIONS).find(|it| names(former, *it) && !names(cursor, *it));
            assert!(
                lost.is_none(),
                "user {user}, device {device}: a cursor without partition {lost:?}"
            );
        }
        for partition in 0..PARTITIONS {
            let Some(position) = cursor.get(TopicId::of(TOPIC), partition as u32) else { continue };
            let needed = logs.concerned(partition, self.base[partition], user);
            let below = needed.iter().take_while(|offset| **offset < position.next);
            let missed: Vec<_> =
                below.filter(|offset| !self.had[partition].contains(offset)).collect();
            assert!(
                missed.is_empty(),
                "user {user}, device {device}: the cursor {} of partition {partition} covers {missed:?}, which the \
                 client has not got",
                position.next
            );
        }
    }
}

impl Cluster {
    /// The live sessions of a node get a cursor.
    pub(super) fn send_cursor(&mut self, life: u64, cursor: &Cursor) {
        let mut sent = 0;
        for (device, client) in self.clients.iter().filter(|(_, it)| it.life == life) {
            if client.returning.as_ref().is_some_and(ReturningSession::is_live) {
                let returning = self.returning.entry(*device).or_default();
                returning.check(cursor, *device, &self.logs);
                returning.cursor = Some(cursor.clone());
                sent += 1;
            }
        }
        self.summary.count_many("cursors", sent);
    }

    /// Time passes for the replays, and the clients take what is there. Returns whether a client got on.
    pub(super) fn drive_replays(&mut self, for_ms: u64) -> bool {
        self.runtime.block_on(async {
            tokio::time::advance(std::time::Duration::from_millis(for_ms)).await;
            for _ in 0..8 {
                tokio::task::yield_now().await;
            }
        });
        let (mut expired, mut progressed) = (Vec::new(), false);
        for (device, client) in &mut self.clients {
            let Some(session) = &mut client.returning else { continue };
            let returning = self.returning.entry(*device).or_default();
            loop {
                match session.step(returning) {
                    ReplayStep::Waits => break,
                    ReplayStep::Records(count) => {
                        progressed = true;
                        self.summary.count_many("records replayed from cursors", count as u64);
                        // The clients wait for them.
                        self.summary.count_many("deliveries", count as u64);
                    }
                    ReplayStep::Live => {
                        progressed = true;
                        self.summary.count(if session.has_cursor {
                            "sessions resumed from cursors"
                        } else {
                            "sessions without a cursor that may get some"
                        });
                        self.summary.count("deliveries");
                    }
                    ReplayStep::Expired(why) => {
                        expired.push((*device, why));
                        break;
                    }
                }
            }
        }
        for (device, why) in expired {
            self.cursor_expired(device, why);
        }
        progressed
    }

    /// The session is caught up by sequences, and waits until it may get cursors.
    fn cursor_expired(&mut self, device: Device, why: CursorExpired) {
        let Some(client) = self.clients.get_mut(&device) else { return };
        if client.returning.as_ref().is_some_and(|session| session.has_cursor) {
            self.summary.count(match why {
                CursorExpired::TooOld => "cursors too old",
                CursorExpired::Overtaken => "cursors overtaken",
                _ => "cursors of another log",
            });
        }
        let returning = self.returning.entry(device).or_default();
        (returning.base, returning.cursor) = (client.ends, None);
        let node = self.nodes.iter().flatten().find(|node| node.life() == client.life);
        let reader = node.map(|node| node.replay(client.slot, device, None));
        let runtime = &self.runtime;
        let former = client.returning.take();
        client.returning = reader.map(|reader| {
            let mut session = ReturningSession::new(reader, false, runtime);
            session.holds_as(former);
            session
        });
    }
}
