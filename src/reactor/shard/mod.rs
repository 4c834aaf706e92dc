//! A shard: its event loop and its state. The loop only dispatches; the work is in the submodules:
//!
//! - `accept`: new connections and their limits;
//! - `secure`: TLS;
//! - `upgrade`: from the upgrade request to the session;
//! - `receive`: from bytes to messages;
//! - `intake`: from the rings to the send queues;
//! - `send`: from the send queues to the sockets;
//! - `clock`: deadlines;
//! - `closing`: all ways to end a connection;
//! - `cursors`: the positions that clients return with;
//! - `reports`: reports to the service side.

mod accept;
#[cfg(any(test, feature = "simulation"))]
mod audit;
mod clock;
mod closing;
mod cursors;
mod intake;
mod receive;
mod reports;
mod secure;
mod send;
mod tally;
#[cfg(test)]
mod tests;
mod upgrade;

use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use crate::domain::capacity::Capacity;
use crate::domain::close::Close;
use crate::domain::command::ShardCommand;
use crate::domain::cursor_schedule::CursorSchedule;
use crate::domain::ids::ConnectionKey;
use crate::domain::limiter::ConnectionLimiter;
use crate::domain::outgoing::Outgoing;
use crate::domain::wait_allowance::WaitAllowance;
use crate::handoff::{Consumer, Doorbell, ShardEnd};
use crate::protocol::frame;
use crate::protocol::receiver::Scratch;
use crate::reactor::config::ShardConfig;
use crate::reactor::connection::{Connection, Lifecycle, RequestSet};
use crate::reactor::counters::ShardCounters;
use crate::reactor::queue::FramePool;
use crate::reactor::slab::Slab;
use crate::reactor::tls::{ShardHandshakeEnd, TlsTable};
use crate::reactor::wheel::{TICK_MS, Tick, TimerWheel};
use crate::uring::{Completion, Kernel, Wait};
use reports::Reports;
use secure::HandshakeLink;
use tally::Tally;

pub use reports::PENDING_REPORTS_MAX;

/// Index of the session manager among the peers. It gets the reports about connections. Its ring is
/// read even when too many events are queued.
pub const SESSION_MANAGER: usize = 0;

/// Interval of retries while a report ring is full, ms: the peers do not ring when they take a
/// report.
const REPORT_RETRY_MS: u64 = 2;

/// The connections of a shard to the rest of the program.
pub struct ShardLinks {
    /// The session manager first, then the routers.
    pub peers: Vec<ShardEnd>,
    /// The shard's doorbell: peers ring it when the shard sleeps.
    pub bell: Arc<Doorbell>,
    /// Limits shared by all shards.
    pub limiter: Arc<ConnectionLimiter>,
    /// Room for connections, shared by all shards: at most the sum of their
    /// [`connections_max`](ShardConfig::connections_max).
    pub capacity: Arc<Capacity>,
    /// The shard's counters.
    pub counters: Arc<ShardCounters>,
    /// The thread that makes TLS handshakes for this shard; `None`: clients speak plaintext.
    pub handshaker: Option<ShardHandshakeEnd>,
}

/// The outcome of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The shard continues.
    Done,
    /// All connections have ended, and all reports are delivered.
    Stopped,
}

/// One shard. Its thread, or the simulation, calls [`Shard::turn`] repeatedly.
pub struct Shard<K: Kernel> {
    kernel: K,
    config: ShardConfig,
    slab: Slab<Connection>,
    nodes: FramePool,
    wheel: TimerWheel,
    now: Tick,
    commands: Vec<Consumer<ShardCommand>>,
    reports: Reports,
    tally: Tally,
    bell: Arc<Doorbell>,
    limiter: Arc<ConnectionLimiter>,
    capacity: Arc<Capacity>,
    counters: Arc<ShardCounters>,
    scratch: Scratch,
    handshaker: Option<HandshakeLink>,
    /// The keys of TLS sessions.
    tls: TlsTable,
    /// The ping frame, shared by all connections.
    ping: Rc<Outgoing>,
    /// Connections with something to send; each at most once
    /// ([`Flags::DIRTY`](crate::reactor::connection::Flags::DIRTY)).
    dirty: VecDeque<ConnectionKey>,
    /// Connections that wait to receive; each at most once.
    waiting: VecDeque<ConnectionKey>,
    receives_in_flight: usize,
    staging: send::Staging,
    fired: Vec<u32>,
    /// Completions of this turn that are not handled yet.
    reaped: VecDeque<Completion<K::Lease>>,
    accepting: accept::AcceptState,
    /// Connections that the limiter has admitted and whose slot is not free yet.
    admitted: u32,
    /// Connections that were refused at once, the oldest first. Some have ended.
    refused: VecDeque<ConnectionKey>,
    first_peer: usize,
    /// The sessions with almost full queues that the routers' rings wait for; each at most once
    /// ([`Flags::AWAITED`](crate::reactor::connection::Flags::AWAITED)).
    awaited: Vec<ConnectionKey>,
    /// How long they may wait for such queues whose sockets are full.
    queue_waits: WaitAllowance,
    /// There was little room for events after the last intake.
    was_crowded: bool,
    /// How long that may last while it is due to full sockets.
    room_waits: WaitAllowance,
    /// The sessions that get cursors, and the positions for these.
    cursors: CursorSchedule<Rc<Outgoing>>,
    stopping: Option<Stopping>,
}

/// State of a stopping shard.
#[derive(Debug)]
struct Stopping {
    close: Close,
    /// Slots below this have been closed.
    cursor: u32,
}

/// Work that is left at the end of a turn.
#[derive(Clone, Copy, Debug, Default)]
struct Leftover {
    work: bool,
    /// Too many events are queued: the routers' rings are not a reason to stay awake.
    intake_paused: bool,
    /// The intake waits for a queue: the same until a socket has taken something.
    intake_waits: bool,
}

impl<K: Kernel> Shard<K> {
    /// A shard without connections.
    ///
    /// # Panics
    /// If the configuration is invalid, or there is no session manager among the peers.
    pub fn new(kernel: K, config: ShardConfig, links: ShardLinks) -> Self {
        assert_eq!(config.validate(), Ok(()));
        assert!(links.peers.len() > SESSION_MANAGER);
        let (commands, producers) =
            links.peers.into_iter().map(|peer| (peer.commands, peer.reports)).unzip();
        Self {
            slab: Slab::new(config.slots_max() as usize),
            nodes: FramePool::default(),
            wheel: TimerWheel::new(kernel.now_ms() / TICK_MS),
            now: kernel.now_ms() / TICK_MS,
            commands,
            reports: Reports::new(producers, Arc::clone(&links.counters)),
            tally: Tally::new(Arc::clone(&links.counters)),
            bell: links.bell,
            limiter: links.limiter,
            capacity: links.capacity,
            counters: links.counters,
            scratch: Scratch::default(),
            handshaker: links.handshaker.map(HandshakeLink::new),
            tls: TlsTable::default(),
            ping: Outgoing::own(frame::encode_ping(&[])),
            dirty: VecDeque::new(),
            waiting: VecDeque::new(),
            receives_in_flight: 0,
            staging: send::Staging::default(),
            fired: Vec::new(),
            reaped: VecDeque::new(),
            accepting: accept::AcceptState::default(),
            admitted: 0,
            refused: VecDeque::new(),
            first_peer: 0,
            awaited: Vec::new(),
            queue_waits: WaitAllowance::new(kernel.now_ms()),
            was_crowded: false,
            room_waits: WaitAllowance::new(kernel.now_ms()),
            cursors: CursorSchedule::new(config.cursor_interval_ms),
            stopping: None,
            kernel,
            config,
        }
    }

    /// One turn: handles completions, commands and timers, then makes one system call that submits
    /// all requests and waits if there is nothing left to do. Each part is bounded.
    ///
    /// # Errors
    /// The kernel interface has failed; the shard cannot continue.
    pub fn turn(&mut self) -> io::Result<Turn> {
        self.read_clock();
        self.count_waits();
        let completions_left = self.handle_completions();
        let mut left = self.take_commands();
        left.work |= completions_left;
        left.work |= self.take_handshakes();
        left.work |= self.run_timers();
        left.work |= self.close_some();
        left.work |= self.send_cursors();
        self.arm_accepts();
        self.start_receives();
        left.work |= self.start_sends();
        self.report_done();
        let was_backlogged = self.reports.is_backlogged();
        self.reports.publish();
        // Accepts and receives have waited for it.
        left.work |= was_backlogged && !self.reports.is_backlogged();
        self.publish_handshakes();
        self.publish_gauges();
        if self.stop_if_over() {
            return Ok(Turn::Stopped);
        }
        self.enter(left)?;
        Ok(Turn::Done)
    }

    /// Takes a bounded number of completions, and handles them. These are two steps, because what is handled submits
    /// requests, and a full submission queue makes the kernel work in between: what that completes belongs to the next
    /// turn, or clients that send without pause would never let this one end. Returns whether some may be left.
    fn handle_completions(&mut self) -> bool {
        let limit = usize::from(self.config.completions_max);
        while self.reaped.len() < limit
            && let Some(completion) = self.kernel.next_completion()
        {
            self.reaped.push_back(completion);
        }
        let some_left = self.reaped.len() == limit;
        while let Some(completion) = self.reaped.pop_front() {
            self.complete(completion);
        }
        some_left
    }

    fn complete(&mut self, completion: Completion<K::Lease>) {
        match completion {
            Completion::Accepted { connection, peer } => self.accepted(connection, peer.ip()),
            Completion::AcceptFailed { connection, error } => self.accept_failed(connection, error),
            Completion::Readable { connection, armed, broken } => {
                self.readable(connection, armed, broken);
            }
            Completion::Received { connection, received } => self.received(connection, received),
            Completion::Writable { connection } => self.writable(connection),
            Completion::Sent { connection, buffer, result } => {
                self.sent(connection, buffer, result);
            }
            Completion::ShutDown { connection } => {
                self.request_completed(connection, RequestSet::SHUTDOWN)
            }
            Completion::Cancelled { connection } => {
                self.request_completed(connection, RequestSet::CANCEL)
            }
            Completion::Closed { connection } => self.free_slot(connection),
        }
    }

    /// Submits, and sleeps if no work is left. Before sleeping it announces the sleep to the
    /// doorbell and checks the rings once more, so that a concurrent push is either seen or rings.
    fn enter(&mut self, left: Leftover) -> io::Result<()> {
        self.counters.counts.turns.add(1);
        if left.work {
            return self.kernel.enter(Wait::No);
        }
        self.bell.about_to_sleep();
        let more =
            !self.reports.is_stopped() && (self.commands_wait(left) || self.handshakes_wait());
        let wait = if more { Wait::No } else { self.wait(left) };
        if wait != Wait::No {
            self.counters.counts.waits.add(1);
        }
        let entered = self.kernel.enter(wait);
        self.bell.awake();
        entered
    }

    fn wait(&self, left: Leftover) -> Wait {
        let timer = self.wheel.next_due().map(|tick| tick * TICK_MS);
        let retry = self.reports.has_pending().then(|| self.kernel.now_ms() + REPORT_RETRY_MS);
        let accept = self.accepting.retry_at_ms();
        let intake_stands = left.intake_waits || left.intake_paused;
        let intake = intake_stands.then(|| self.kernel.now_ms() + TICK_MS);
        let cursors = self.next_cursor_ms();
        match [timer, retry, accept, intake, cursors].into_iter().flatten().min() {
            Some(at) => Wait::UntilMs(at),
            None => Wait::Forever,
        }
    }

    fn read_clock(&mut self) {
        // Tolerates a clock that stands still or jumps ahead. A step back is ignored.
        self.now = self.now.max(self.kernel.now_ms() / TICK_MS);
        self.tally.unix_ms = self.kernel.unix_ms();
    }

    /// The tick that is at least `ms` from now.
    fn after(&self, ms: u64) -> Tick {
        self.now + clock::ticks(ms)
    }

    /// Changes a connection's lifecycle and updates the gauges. Returns the previous lifecycle.
    fn set_lifecycle(&mut self, key: ConnectionKey, to: Lifecycle) -> Lifecycle {
        let connection = &mut self.slab[key];
        let from = std::mem::replace(&mut connection.lifecycle, to);
        self.tally.lifecycle_changed(from.class(), connection.lifecycle.class());
        from
    }

    /// Publishes the gauges.
    fn publish_gauges(&mut self) {
        let counts = &self.counters.counts;
        counts.slots_used.set(self.slab.used() as u64);
        counts.slots_allocated.set(self.slab.allocated() as u64);
        counts.frames_queued.set(self.nodes.used() as u64);
        self.tally.publish_gauges();
    }

    /// Reports the end once no session is left. Returns whether all reports are in the rings.
    fn stop_if_over(&mut self) -> bool {
        self.has_no_sessions_left() && self.reports.stop()
    }

    /// It is stopping, and all connections have ended: the last report may have been pushed.
    fn has_no_sessions_left(&self) -> bool {
        self.stopping.is_some() && self.slab.used() == 0
    }
}
