//! The router's loop: serves its lanes in turn, and sleeps on its doorbell when all are idle or blocked.

mod upkeep;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;

use slab::Slab;

use crate::domain::cursor::UNCHECKED;
use crate::domain::cursor_schedule::POSITIONS_INTERVAL_MS;
use crate::service::backends::ports::RouterInput;
use crate::service::cluster::ports::{ArrivedHandOffs, IncomingHandOff, NodeEpoch};
use crate::service::cluster::wire::hand_off_header::Content;
use crate::service::events::encode::Encoder;
use crate::service::routing::offsets::OffsetWindow;
use crate::service::routing::router::audience::Audiences;
use crate::service::routing::router::claim::LaneClaim;
use crate::service::routing::router::core::RouterCore;
use crate::service::routing::router::holding::{HandOffInput, ReadTo};
use crate::service::routing::router::in_flight::{
    InFlight, LaneKey, ReportOutcome, ReturnedTicket,
};
use crate::service::routing::router::lane::{Assignment, Blocked, Lane, PartitionLane, Revocation};
use crate::service::routing::router::lane_tail::LaneTail;
use crate::service::routing::router::links::RouterLinks;
use crate::service::routing::router::owner::OwnerSide;
use crate::service::routing::router::partition::TopicPartition;
use crate::service::routing::router::record::{Intake, OwnedRecord, WaitingRecord};
use crate::service::routing::router::replay_requests::AnswerTo;
use crate::service::routing::router::returning::{ReplayInput, Returning};
use crate::service::routing::router::{
    ControlReceivers, LaneCommand, RouterControl, RouterParts, control, order_of,
};
use crate::service::runtime::clock::steady_ms;

/// Lanes for the inbox. Several, so that a blocked one delays few conversations.
const INBOX_LANES: usize = 16;
/// Records that may wait in one of these lanes.
const INBOX_LANE_MAX: usize = 256;
/// The longest sleep, ms. Bounds the delay if a doorbell is ever missed.
const SLEEP_MS_MAX: u32 = 100;
/// The longest sleep while something waits for time to pass or for a ring to drain, ms.
const RETRY_SLEEP_MS: u32 = 10;

/// One router, before its thread is started.
pub struct Router {
    core: RouterCore,
    lanes: Slab<Lane>,
    inbox_lanes: Vec<Lane>,
    commands: Receiver<LaneCommand>,
    hand_offs: Receiver<HandOffInput>,
    hand_off_bytes: Arc<AtomicUsize>,
    read_to: Arc<ReadTo>,
    /// Where hand-offs are taken from. `None`: another thread takes them.
    hand_off_log: Option<Arc<dyn ArrivedHandOffs>>,
    /// A hand-off that waits for room in a ring, or for the table.
    hand_off: Option<IncomingHandOff>,
    /// Every hand-off to this node below this offset was delivered.
    handed_to: i64,
    inbox: Receiver<RouterInput>,
    inbox_bytes: Arc<AtomicUsize>,
    returned: Receiver<ReturnedTicket>,
    replays: Receiver<ReplayInput>,
    returning: Returning,
    /// When the shards are given positions next, steady time in ms.
    routed_at_ms: u64,
    /// When the tails are trimmed next, steady time in ms.
    trimmed_at_ms: u64,
}

impl Router {
    /// A router and its control.
    pub fn new(parts: RouterParts) -> (Self, RouterControl) {
        let (control, receivers) = control(Arc::clone(&parts.bell), &parts.config);
        let ControlReceivers {
            lanes: commands,
            hand_offs,
            hand_off_bytes,
            read_to,
            inbox,
            inbox_bytes,
            replays,
        } = receivers;
        let (returned_sender, returned) = channel();
        let owner = parts.cluster.map(|cluster| {
            let (counters, bell) = (Arc::clone(&parts.counters), Arc::clone(&parts.bell));
            OwnerSide::new(cluster, counters, returned_sender.clone(), bell)
        });
        parts.membership.wake(Arc::clone(&parts.bell));
        let core = RouterCore {
            config: parts.config,
            counters: parts.counters,
            links: RouterLinks::new(parts.links),
            in_flight: InFlight::default(),
            directory: parts.directory,
            audiences: Audiences::new(parts.config.large_members, parts.config.audience_bytes_max),
            membership: parts.membership,
            user_lists: parts.user_lists,
            remote: parts.remote,
            owner,
            tails: parts.tails,
            routed_audience: None,
            dead_letters: parts.dead_letters,
            encoder: Encoder::new(parts.config.compression),
            budget: parts.budget,
            returned: returned_sender,
            bell: parts.bell,
            warned: None,
            positions: Default::default(),
            lane_serial: 0,
        };
        let inbox_lanes = (0..INBOX_LANES).map(|_| Lane::new(LaneKey(u64::MAX), None)).collect();
        let router = Self {
            core,
            lanes: Slab::new(),
            inbox_lanes,
            commands,
            hand_offs,
            hand_off_bytes,
            read_to,
            hand_off_log: None,
            hand_off: None,
            handed_to: 0,
            inbox,
            inbox_bytes,
            returned,
            replays,
            returning: Returning::default(),
            routed_at_ms: 0,
            trimmed_at_ms: 0,
        };
        (router, control)
    }

    /// Starts the thread. It ends after [`RouterControl::stop`].
    ///
    /// # Errors
    /// The process cannot have another thread.
    pub fn spawn(self, name: String) -> std::io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name(name).spawn(move || self.run())
    }

    fn run(mut self) {
        loop {
            match self.turn(steady_ms()) {
                ControlFlow::Break(()) => return,
                ControlFlow::Continue(true) => continue,
                ControlFlow::Continue(false) => {}
            }
            let bell = Arc::clone(&self.core.bell);
            if self.waits_for_reports() {
                bell.about_to_sleep();
            } else {
                bell.about_to_sleep_soundly();
            }
            let found = self.turn(steady_ms());
            if found == ControlFlow::Continue(false) {
                bell.wait(self.sleep_ms(steady_ms()));
            }
            bell.awake();
            if found.is_break() {
                return;
            }
        }
    }

    /// One bounded turn of the loop. Returns whether anything progressed.
    pub(in crate::service::routing) fn turn(&mut self, now_ms: u64) -> ControlFlow<(), bool> {
        let mut progressed = self.take_commands(now_ms)?;
        progressed |= self.take_reports();
        progressed |= self.expire(now_ms);
        progressed |= self.take_hand_offs(now_ms);
        progressed |= self.take_inbox(now_ms);
        progressed |= self.turn_lanes(now_ms);
        progressed |= self.turn_replays(now_ms);
        self.tell_routed(now_ms);
        self.trim_tails(now_ms);
        self.core.links.publish();
        self.release_revoked(now_ms);
        let counters = &self.core.counters;
        counters.records_under_way.set(self.core.in_flight.len() as u64);
        let waiting = self.lanes.iter().map(|(_, lane)| lane).chain(&self.inbox_lanes);
        counters.records_waiting.set(waiting.map(|lane| lane.len() as u64).sum());
        let parked = self.lanes.iter().map(|(_, lane)| lane.parked.conversations() as u64);
        counters.conversations_waiting.set(parked.sum());
        let partitions = self.lanes.iter().filter_map(|(_, lane)| lane.partition.as_ref());
        let tails = partitions.filter_map(|partition| Some(partition.tail.as_ref()?.tail.len()));
        counters.tail_records.set(tails.sum::<usize>() as u64);
        counters.sessions_replaying.set(self.returning.waiting() as u64);
        ControlFlow::Continue(progressed)
    }

    /// How long to sleep at most. Short while something waits that does not ring the doorbell.
    fn sleep_ms(&self, now_ms: u64) -> u32 {
        let timed = self.core.in_flight.next_deadline_ms().is_some();
        let cannot_take =
            |lane: &Lane| lane.partition.as_ref().is_some_and(|partition| !partition.may_take());
        let waits = self.lanes.iter().any(|(_, lane)| lane.blocked.is_some() || cannot_take(lane));
        let inbox_waits =
            self.hand_off.is_some() || self.inbox_lanes.iter().any(|lane| lane.blocked.is_some());
        // Events without a ticket (from other nodes, presence) are freed without a report.
        let full = !self.core.budget.has_room();
        let replays = self.returning.waiting() > 0;
        if timed || waits || inbox_waits || full || replays {
            return RETRY_SLEEP_MS;
        }
        let retry_ms = self.lanes.iter().filter_map(|(_, lane)| lane.parked.retry_ms()).min();
        let until_ms = retry_ms.map_or(u64::MAX, |retry_ms| retry_ms.saturating_sub(now_ms));
        (until_ms.min(u64::from(SLEEP_MS_MAX)) as u32).max(RETRY_SLEEP_MS)
    }

    /// Whether a report may unblock anything: a record that waits for room in a ring, a full window,
    /// a revoked partition. Otherwise a report only moves an offset, which can wait until the next
    /// record or [`SLEEP_MS_MAX`].
    fn waits_for_reports(&self) -> bool {
        let waits = |lane: &Lane| {
            !lane.is_empty() || lane.partition.as_ref().is_some_and(|it| !it.may_take())
        };
        self.lanes.iter().any(|(_, lane)| waits(lane)) || self.inbox_lanes.iter().any(waits)
    }

    fn take_commands(&mut self, now_ms: u64) -> ControlFlow<(), bool> {
        let mut progressed = false;
        while let Ok(command) = self.commands.try_recv() {
            progressed = true;
            match command {
                LaneCommand::Assign(assignment) => self.assign(assignment, now_ms),
                LaneCommand::Revoke(log, revocation) => self.revoke(&log, revocation),
                LaneCommand::TakeHandOffs(log) => self.hand_off_log = Some(log),
                LaneCommand::Stop => return ControlFlow::Break(()),
            }
        }
        ControlFlow::Continue(progressed)
    }

    fn assign(&mut self, assignment: Assignment, now_ms: u64) {
        let Assignment { log, source, start, fill, committable, ownership } = assignment;
        self.core.membership.lane_starts(log.position(start.unwrap_or(i64::MAX)));
        let window = OffsetWindow::new(start.unwrap_or(0), self.core.config.window_records_max);
        let key = self.core.next_lane_key(self.lanes.vacant_key());
        let claim = ownership.and_then(|ownership| {
            let owner = self.core.owner.as_ref()?;
            Some(LaneClaim::new(ownership, owner.holder().latest()))
        });
        if let Some(lists) = &self.core.user_lists {
            lists.assigned();
        }
        let tail = self.core.tails.as_ref().zip(start);
        let tail = tail.map(|(tails, start)| LaneTail::new(&log, fill, start, tails, now_ms));
        let partition =
            PartitionLane { log, source, window, committable, revocation: None, claim, tail };
        self.lanes.insert(Lane::new(key, Some(partition)));
    }

    fn revoke(&mut self, log: &TopicPartition, revocation: Revocation) {
        let partition = self
            .lanes
            .iter_mut()
            .filter_map(|(_, lane)| lane.partition.as_mut())
            .find(|partition| partition.log == *log && partition.revocation.is_none());
        match partition {
            Some(partition) => partition.revocation = Some(revocation),
            None => drop(revocation.released.try_send(true)),
        }
    }

    /// Removes revoked partitions that have no records in flight or are past their deadline. Records
    /// that are not done stay uncommitted, for the next owner.
    fn release_revoked(&mut self, now_ms: u64) {
        self.lanes.retain(|_, lane| {
            let waiting = lane.len();
            let partition = lane.partition.take_if(|partition| {
                partition.revocation.as_ref().is_some_and(|revocation| {
                    // Records that wait in the lane are in the window, but not in flight.
                    partition.window.open() <= waiting || revocation.deadline_ms <= now_ms
                })
            });
            let Some(PartitionLane { source, window, revocation: Some(revocation), .. }) =
                partition
            else {
                return true;
            };
            // The source first: the receiver may close the consumer it belongs to.
            drop(source);
            let _ = revocation.released.try_send(window.open() <= waiting);
            false
        });
        self.core.counters.partitions.set(self.lanes.len() as u64);
    }

    fn take_reports(&mut self) -> bool {
        let mut progressed = false;
        while let Some(ticket) = self.core.links.next_done() {
            progressed = true;
            let outcome = self.core.in_flight.report(ticket);
            self.reported(outcome);
        }
        while let Ok(returned) = self.returned.try_recv() {
            progressed = true;
            let outcome = match returned {
                ReturnedTicket::Forward(ticket) => self.core.in_flight.report_forward(ticket),
                ReturnedTicket::HandOff(ticket) | ReturnedTicket::DeadLetter(ticket) => {
                    self.core.in_flight.report_elsewhere(ticket)
                }
                ReturnedTicket::Replay(key) => {
                    self.replay_stored(key);
                    continue;
                }
                ReturnedTicket::Loss(key) => {
                    self.loss_stored(key);
                    continue;
                }
            };
            self.reported(outcome);
        }
        progressed
    }

    fn expire(&mut self, now_ms: u64) -> bool {
        let mut progressed = false;
        while let Some(ticket) = self.core.in_flight.expired(now_ms) {
            progressed = true;
            self.core.counters.forwards_expired.add(1);
            let outcome = self.core.in_flight.report_forward(ticket);
            self.reported(outcome);
        }
        progressed
    }

    fn reported(&mut self, outcome: ReportOutcome) {
        let ReportOutcome::Done(record) = outcome else { return };
        // The partition may have been released meanwhile; its next owner handles the record.
        let lane = self.lanes.get_mut(record.lane.slot());
        if let Some(lane) = lane.filter(|lane| lane.key == record.lane)
            && let Some(partition) = &mut lane.partition
        {
            partition.done(record);
        }
    }

    fn take_inbox(&mut self, now_ms: u64) -> bool {
        let mut progressed = false;
        for _ in 0..self.core.config.batch_max {
            let bytes_max = self.core.config.inbox_bytes_max / INBOX_LANES;
            let full = |lane: &Lane| lane.len() >= INBOX_LANE_MAX || lane.bytes() >= bytes_max;
            if let Some(lane) = self.inbox_lanes.iter_mut().find(|lane| full(lane)) {
                match lane.blocked {
                    // Drops the front record, so that it does not block other conversations.
                    Some(Blocked::Members) => {
                        lane.pop();
                        lane.blocked = None;
                        self.core.counters.remote_given_up.add(1);
                    }
                    Some(Blocked::RingFull(_) | Blocked::HandOffs | Blocked::DeadLetter) | None => {
                        break;
                    }
                }
            }
            let Ok(input) = self.inbox.try_recv() else { break };
            self.inbox_bytes.fetch_sub(input.bytes(), Ordering::Relaxed);
            progressed = true;
            let lane = &mut self.inbox_lanes[order_of(&input) % INBOX_LANES];
            let (value, intake) = match input {
                RouterInput::Remote { value } => {
                    self.core.counters.remote_records.add(1);
                    (value, Intake::OtherNode)
                }
                RouterInput::ToUsers { value, users } => {
                    self.core.counters.user_events.add(1);
                    (value, Intake::ToUsers(users))
                }
            };
            let record = OwnedRecord::of_value(value);
            lane.push(WaitingRecord { record, intake, since_ms: None });
            while self.core.turn_front(lane, now_ms) {}
        }
        progressed
    }

    fn turn_lanes(&mut self, now_ms: u64) -> bool {
        let mut progressed = false;
        for lane in &mut self.inbox_lanes {
            while self.core.turn_front(lane, now_ms) {
                progressed = true;
            }
        }
        progressed |= self.core.owner.as_mut().is_some_and(OwnerSide::flush);
        for (_, lane) in &mut self.lanes {
            progressed |= self.core.apply_newcomers(lane, self.handed_to, now_ms);
            progressed |= self.core.turn_parked(lane, now_ms);
            progressed |= self.core.give_up_sockets(lane, now_ms);
            for _ in 0..self.core.config.batch_max {
                if !self.core.turn_lane(lane, self.handed_to, now_ms) {
                    break;
                }
                progressed = true;
            }
        }
        self.tell_passed(now_ms);
        progressed
    }

    /// Delivers what owners have handed over to this node, in the order of the log.
    fn take_hand_offs(&mut self, now_ms: u64) -> bool {
        let batch_max = self.core.config.batch_max;
        let mut progressed = self.hand_off_log.as_ref().is_some_and(|log| log.take(batch_max));
        // Before the queue is found empty.
        let latest = self.read_to.latest();
        for _ in 0..self.core.config.batch_max {
            let hand_off = match self.hand_off.take() {
                Some(waiting) => waiting,
                None => match self.hand_offs.try_recv() {
                    Ok(HandOffInput::Record(hand_off)) => {
                        self.hand_off_bytes.fetch_sub(hand_off.bytes(), Ordering::Relaxed);
                        self.core.counters.hand_offs_received.add(1);
                        hand_off
                    }
                    Ok(HandOffInput::ReadTo(next)) => {
                        self.read_to.taken();
                        self.handed_to = next;
                        progressed = true;
                        continue;
                    }
                    Err(_) => {
                        progressed |= self.handed_to != latest;
                        self.handed_to = latest;
                        break;
                    }
                },
            };
            if let Some(Content::ReplayRequest(request)) = &hand_off.header.content {
                let holder = NodeEpoch(request.holder);
                if let Some(owner) = &mut self.core.owner {
                    owner.uses_cursors(holder, now_ms);
                }
                let (request, to) = (request.clone(), AnswerTo::Node(holder));
                let input = ReplayInput::Request { request, to };
                self.returning.add(input, now_ms);
                progressed = true;
                continue;
            }
            if !self.core.has_memory() || !self.core.take_hand_off(&hand_off) {
                self.hand_off = Some(hand_off);
                break;
            }
            progressed = true;
        }
        progressed
    }

    /// Serves the sessions that return with a cursor.
    fn turn_replays(&mut self, now_ms: u64) -> bool {
        let mut progressed = false;
        while let Ok(input) = self.replays.try_recv() {
            self.returning.add(input, now_ms);
            progressed = true;
        }
        progressed | self.returning.turn(&mut self.core, &mut self.lanes, self.handed_to, now_ms)
    }

    /// Gives the shards the positions that have moved, behind the records below them, if it is time or a session waits
    /// for it.
    fn tell_routed(&mut self, now_ms: u64) {
        let is_due = now_ms >= self.routed_at_ms || self.returning.awaits_positions();
        if !is_due || self.core.tails.is_none() {
            return;
        }
        if self.core.tell_routed(&self.lanes, self.handed_to) {
            self.returning.positions_told(&self.core.links, &self.core.positions);
        }
        // A position costs a shard and a router about 50 ns; without traffic nothing is sent.
        self.routed_at_ms = now_ms + POSITIONS_INTERVAL_MS;
    }

    /// Tells the nodes of newcomers what has passed, if it is time.
    fn tell_passed(&mut self, now_ms: u64) {
        let Some(owner) = &mut self.core.owner else { return };
        if !owner.prepare_passed(now_ms) {
            return;
        }
        let mut table = i64::MAX;
        let mut positions = Vec::new();
        for (_, lane) in &self.lanes {
            let Some(next) = lane.next_offset() else { continue };
            let Some(partition) = &lane.partition else { continue };
            if let (Some(claim), Some(tail)) = (&partition.claim, &partition.tail)
                && tail.is_filled()
                // Nothing passes before what was lost.
                && !claim.owes_loss()
            {
                table = table.min(claim.applied);
                let parked = claim.parked().to_vec();
                // Of the position below the parked records, which is that of a cursor.
                let check = lane.position().map_or(UNCHECKED, |it| it.check);
                let generation = claim.ownership.generation;
                positions.push((partition.log.clone(), next, generation, parked, check));
            }
        }
        if !positions.is_empty() {
            owner.tell_passed(&positions, table, now_ms);
        }
    }
}
