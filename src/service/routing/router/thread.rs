//! The router's loop: takes turns among its lanes and sleeps on its bell when none can move.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;

use slab::Slab;

use crate::domain::budget::EventBudget;
use crate::service::backends::ports::RouterInput;
use crate::service::events::encode::Encoder;
use crate::service::events::timestamp::unix_ms;
use crate::service::routing::offsets::OffsetWindow;
use crate::service::routing::router::core::{ReturnedTicket, RouterCore};
use crate::service::routing::router::in_flight::{InFlight, LaneKey, RecordId, ReportOutcome};
use crate::service::routing::router::lane::{
    Assignment, Blocked, Intake, Lane, PartitionLane, Revocation, TopicPartition, WaitingRecord,
};
use crate::service::routing::router::links::RouterLinks;
use crate::service::routing::router::record::OwnedRecord;
use crate::service::routing::router::{
    ControlReceivers, LaneCommand, RouterControl, RouterParts, control, order_of,
};

/// Lanes for what does not come from a partition: one that waits holds up few others.
const INBOX_LANES: usize = 16;
/// Records that may wait in one of them.
const INBOX_LANE_MAX: usize = 256;
/// The longest sleep, ms: a source whose bell was missed is found again.
const SLEEP_MS_MAX: u32 = 100;
/// The longest sleep while something waits for the clock, ms.
const RETRY_SLEEP_MS: u32 = 10;

/// One router, before its thread is started.
pub struct Router {
    core: RouterCore,
    lanes: Slab<Lane>,
    inbox_lanes: Vec<Lane>,
    commands: Receiver<LaneCommand>,
    inbox: Receiver<RouterInput>,
    inbox_bytes: Arc<AtomicUsize>,
    returned: Receiver<ReturnedTicket>,
}

impl Router {
    /// A router and the way to reach it.
    pub fn new(parts: RouterParts) -> (Self, RouterControl) {
        let (control, ControlReceivers { lanes: commands, inbox, inbox_bytes }) =
            control(Arc::clone(&parts.bell), &parts.config);
        let (returned_sender, returned) = channel();
        parts.membership.wake(Arc::clone(&parts.bell));
        let core = RouterCore {
            config: parts.config,
            counters: parts.counters,
            links: RouterLinks::new(parts.links),
            in_flight: InFlight::default(),
            directory: parts.directory,
            membership: parts.membership,
            remote: parts.remote,
            dead_letters: parts.dead_letters,
            encoder: Encoder::new(parts.config.compression),
            budget: EventBudget::new(parts.config.event_bytes_max),
            returned: returned_sender,
            bell: parts.bell,
            warned: None,
            lane_serial: 0,
        };
        let inbox_lanes = (0..INBOX_LANES).map(|_| Lane::new(LaneKey(u64::MAX), None)).collect();
        let router =
            Self { core, lanes: Slab::new(), inbox_lanes, commands, inbox, inbox_bytes, returned };
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
            match self.turn(unix_ms()) {
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
            let found = self.turn(unix_ms());
            if found == ControlFlow::Continue(false) {
                bell.wait(self.sleep_ms());
            }
            bell.awake();
            if found.is_break() {
                return;
            }
        }
    }

    /// Does a bounded part of what there is to do. Returns whether there was anything.
    pub(super) fn turn(&mut self, now_ms: u64) -> ControlFlow<(), bool> {
        let mut moved = self.take_commands()?;
        moved |= self.take_reports();
        moved |= self.expire(now_ms);
        moved |= self.take_inbox(now_ms);
        moved |= self.turn_lanes(now_ms);
        self.core.links.publish();
        self.release_revoked(now_ms);
        let counters = &self.core.counters;
        counters.records_under_way.set(self.core.in_flight.len() as u64);
        let waiting = self.lanes.iter().map(|(_, lane)| lane).chain(&self.inbox_lanes);
        counters.event_bytes.set(self.core.budget.held());
        counters.records_waiting.set(waiting.map(|lane| lane.len() as u64).sum());
        ControlFlow::Continue(moved)
    }

    /// Something waits for the clock or for a ring to drain: look soon. Else the bell rings.
    fn sleep_ms(&self) -> u32 {
        let timed = self.core.in_flight.next_deadline_ms().is_some();
        let waits = self.lanes.iter().any(|(_, lane)| {
            lane.blocked.is_some() || lane.log.as_ref().is_some_and(|log| log.revoked.is_some())
        });
        let inbox_waits = self.inbox_lanes.iter().any(|lane| lane.blocked.is_some());
        // Events without a ticket (from other nodes, presence) report to nobody when they are gone.
        let full = !self.core.budget.has_room();
        if timed || waits || inbox_waits || full { RETRY_SLEEP_MS } else { SLEEP_MS_MAX }
    }

    /// Whether a report may let anything move: a record that waits for room in a ring, a partition
    /// with too much under way, one that is to be given up. Otherwise it only moves an offset, which
    /// is early enough when the router wakes for the next record or after [`SLEEP_MS_MAX`].
    fn waits_for_reports(&self) -> bool {
        let held_up = |lane: &Lane| {
            let log = lane.log.as_ref();
            !lane.is_empty()
                || log.is_some_and(|log| log.revoked.is_some() || !log.window.has_room())
        };
        self.lanes.iter().any(|(_, lane)| held_up(lane)) || self.inbox_lanes.iter().any(held_up)
    }

    fn take_commands(&mut self) -> ControlFlow<(), bool> {
        let mut moved = false;
        while let Ok(command) = self.commands.try_recv() {
            moved = true;
            match command {
                LaneCommand::Assign(assignment) => self.assign(assignment),
                LaneCommand::Revoke(log, revoked) => self.revoke(&log, revoked),
                LaneCommand::Stop => return ControlFlow::Break(()),
            }
        }
        ControlFlow::Continue(moved)
    }

    fn assign(&mut self, assignment: Assignment) {
        let Assignment { log, source, start, committable } = assignment;
        let window = OffsetWindow::new(start.unwrap_or(0), self.core.config.window_records_max);
        let key = self.core.next_lane_key(self.lanes.vacant_key());
        let log = PartitionLane { log, source, window, committable, revoked: None };
        self.lanes.insert(Lane::new(key, Some(log)));
        self.core.counters.partitions.set(self.lanes.len() as u64);
    }

    fn revoke(&mut self, log: &TopicPartition, revoked: Revocation) {
        let lane = self.lanes.iter_mut().map(|(_, lane)| lane).find(|lane| {
            lane.log.as_ref().is_some_and(|lane| lane.log == *log && lane.revoked.is_none())
        });
        match lane.and_then(|lane| lane.log.as_mut()) {
            Some(lane) => lane.revoked = Some(revoked),
            None => drop(revoked.done.try_send(true)),
        }
    }

    /// Lets go of revoked partitions of which nothing is under way, or whose time is over. What is
    /// then not done stays uncommitted, for the next owner.
    fn release_revoked(&mut self, now_ms: u64) {
        let finished: Vec<_> = self
            .lanes
            .iter()
            .filter(|(_, lane)| {
                lane.log.as_ref().is_some_and(|log| {
                    log.revoked.as_ref().is_some_and(|revoked| {
                        // What waits in the lane was taken, but nothing is under way for it.
                        log.window.len() <= lane.len() || revoked.deadline_ms <= now_ms
                    })
                })
            })
            .map(|(slot, _)| slot)
            .collect();
        for slot in finished {
            let lane = self.lanes.remove(slot);
            let waiting = lane.len();
            if let Some(PartitionLane { source, window, revoked: Some(revoked), .. }) = lane.log {
                // The source goes first: who is released may close what it belongs to.
                drop(source);
                let _ = revoked.done.try_send(window.len() <= waiting);
            }
            self.core.counters.partitions.set(self.lanes.len() as u64);
        }
    }

    fn take_reports(&mut self) -> bool {
        let mut moved = false;
        while let Some(ticket) = self.core.links.next_done() {
            moved = true;
            if let ReportOutcome::Done(record) = self.core.in_flight.report(ticket) {
                self.done(record);
            }
        }
        while let Ok(returned) = self.returned.try_recv() {
            moved = true;
            let reported = match returned {
                ReturnedTicket::Forward(ticket) => self.core.in_flight.report_forward(ticket),
                ReturnedTicket::DeadLetter(ticket) => self.core.in_flight.report(ticket),
            };
            if let ReportOutcome::Done(record) = reported {
                self.done(record);
            }
        }
        moved
    }

    fn expire(&mut self, now_ms: u64) -> bool {
        let mut moved = false;
        while let Some(ticket) = self.core.in_flight.expired(now_ms) {
            moved = true;
            self.core.counters.forwards_expired.add(1);
            if let ReportOutcome::Done(record) = self.core.in_flight.report_forward(ticket) {
                self.done(record);
            }
        }
        moved
    }

    fn done(&mut self, record: RecordId) {
        let slot = record.lane.slot();
        // A partition that was given up meanwhile: its record counts for its next owner.
        let Some(lane) = self.lanes.get_mut(slot).filter(|lane| lane.key == record.lane) else {
            return;
        };
        if let Some(log) = &mut lane.log {
            log.done(record);
        }
    }

    fn take_inbox(&mut self, now_ms: u64) -> bool {
        let mut moved = false;
        for _ in 0..self.core.config.batch_max {
            let bytes_max = self.core.config.inbox_bytes_max / INBOX_LANES;
            let full = |lane: &Lane| lane.len() >= INBOX_LANE_MAX || lane.bytes() >= bytes_max;
            if let Some(lane) = self.inbox_lanes.iter_mut().find(|lane| full(lane)) {
                match lane.blocked {
                    // Others must not wait for a conversation that cannot be routed.
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
            moved = true;
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
        moved
    }

    fn turn_lanes(&mut self, now_ms: u64) -> bool {
        let mut moved = false;
        for lane in &mut self.inbox_lanes {
            while self.core.turn_front(lane, now_ms) {
                moved = true;
            }
        }
        for (_, lane) in &mut self.lanes {
            for _ in 0..self.core.config.batch_max {
                if !self.core.turn_lane(lane, now_ms) {
                    break;
                }
                moved = true;
            }
        }
        moved
    }
}
