//! The shard on a simulated kernel, with clients, a session manager and routers around it. One seed
//! drives everything, and time passes only when the simulation moves it. After every step the state
//! of the shard is checked for consistency ([`Shard::audit`]), against the kernel and against the
//! model.
//!
//! A failing seed always fails in the same way; [`trace`] prints the last steps.

mod bystanders;
mod check;
mod client;
mod clients;
pub mod kernel;
mod manager;
pub mod random;
mod rest;
mod service;
mod session;
mod setup;
mod tls;
pub mod trace;
pub(in crate::reactor) mod wire;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use hashbrown::HashMap;

use crate::domain::capacity::Capacity;
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::{Refusal, ShardCommand};
use crate::domain::counters::{CounterSet as _, MetricKind};
use crate::domain::encoding::Encoding;
use crate::domain::ids::ConnectionKey;
use crate::domain::limiter::{AddressPermit, ConnectionLimiter};
use crate::handoff::Doorbell;
use crate::reactor::counters::ShardCounters;
use crate::reactor::shard::{SESSION_MANAGER, Shard, ShardLinks, Turn};
use crate::reactor::simulation::kernel::{Faults, SimulatedKernel};
use crate::reactor::wheel::TICK_MS;
use bystanders::Bystanders;
use client::{Client, ClientKind, Reading};
use random::Random;
use service::{PEERS, Service};
use session::Limits;
use setup::Setup;
use tls::{ClientTls, HandshakeThread};
use trace::{TraceEvent, note};

/// Every so many seeds, clients speak TLS.
const TLS_SEEDS: u64 = 4;
/// Steps after which a simulation that does not come to rest counts as stuck. Clients that seal each byte by itself, and
/// a shard with few buffers, need the most.
const REST_STEPS_MAX: usize = 1_000_000;

/// The totals of a run. They show that it did something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Steps, including those at the end.
    pub steps: u64,
    /// Client connections.
    pub clients: u64,
    /// Sessions admitted.
    pub admitted: u64,
    /// Events that sessions received.
    pub received: u64,
    /// Those of them that had to reach a bystander in time.
    pub to_bystanders: u64,
    /// The longest that one of these took in the shard and its ring, ms and turns.
    pub latest: (u64, u64),
    /// Virtual time, ms.
    pub passed_ms: u64,
    /// The shard's counters, and the number of ended connections by reason.
    pub counts: BTreeMap<&'static str, u64>,
}

impl Summary {
    /// Adds the summary of another run.
    pub fn add(&mut self, other: &Summary) {
        self.steps += other.steps;
        self.clients += other.clients;
        self.admitted += other.admitted;
        self.received += other.received;
        self.to_bystanders += other.to_bystanders;
        self.latest.0 = self.latest.0.max(other.latest.0);
        self.latest.1 = self.latest.1.max(other.latest.1);
        self.passed_ms += other.passed_ms;
        for (name, count) in &other.counts {
            *self.counts.entry(name).or_default() += count;
        }
    }

    fn take_faults(&mut self, kernel: &SimulatedKernel) {
        self.counts.extend(kernel.occurred());
    }

    fn take_counts(&mut self, counters: &ShardCounters) {
        counters.counts.visit(&mut |kind, name, _, value| {
            if kind == MetricKind::Counter {
                self.counts.insert(name, value);
            }
        });
        for why in EndReason::ALL {
            self.counts.insert(why.label(), counters.ended[why as usize].get());
        }
    }
}

/// One shard and its surroundings.
struct Simulation {
    random: Random,
    setup: Setup,
    limits: Limits,
    /// `None`: it has stopped.
    shard: Option<Shard<SimulatedKernel>>,
    counters: Arc<ShardCounters>,
    limiter: Arc<ConnectionLimiter>,
    capacity: Arc<Capacity>,
    /// Connections of other shards.
    elsewhere: Vec<AddressPermit>,
    /// The latest second of any shard's clock in which a client was admitted, and how many were.
    handshakes: (u64, u64),
    /// Clients refused for another reason than a lack of room, up to the last turn.
    other_refusals: u64,
    /// No shard has had room at some time.
    was_full: bool,
    service: Service,
    /// Clients speak TLS.
    handshaker: Option<HandshakeThread>,
    clients: Vec<Client>,
    active: Vec<usize>,
    by_key: HashMap<ConnectionKey, usize>,
    /// Sessions that events may be addressed to. Some have ended without a report so far.
    directory: Vec<usize>,
    /// Keys of ended connections.
    dead_keys: Vec<ConnectionKey>,
    /// Sessions that have left the directory on another thread, and of which the shard does not know.
    missed: Vec<usize>,
    bystanders: Bystanders,
    /// Requests that the session manager has not decided on.
    undecided: Vec<usize>,
    stopping: bool,
    /// The shard was stopped before the run came to rest.
    stopped_early: bool,
    /// The session manager has died: its reports are not taken.
    abandoned: bool,
    /// Clients take no more actions and read everything.
    resting: bool,
    summary: Summary,
    /// Events that arrived whole on a wire.
    wire_events: u64,
    reports_opened: u64,
    reports_ended: u64,
    reports_message: u64,
    reports_grace: u64,
}

/// Runs one seed for `steps` steps, lets everything come to rest and stops the shard.
///
/// # Panics
/// If a guarantee is violated.
pub fn run(seed: u64, steps: u64) -> Summary {
    trace::begin(seed);
    let mut world = Simulation::new(seed);
    let stop_at = world.setup.stops_early.then(|| world.random.below(steps as usize + 1) as u64);
    for step in 0..steps {
        trace::step(step);
        if stop_at == Some(step) {
            world.begin_to_stop();
        }
        world.step();
    }
    world.rest();
    world.stop();
    world.check_end();
    world.summary.take_counts(&world.counters);
    world.summary
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut setup = Setup::draw(&mut random);
        let mut kernel =
            SimulatedKernel::new(random.draw(), usize::from(setup.config.receive_buffers));
        kernel.faults = setup.faults;
        kernel.completions_max = usize::from(setup.config.completions_max);
        kernel.pass(setup.start_ms);
        let bell = Arc::new(Doorbell::new().expect("a descriptor"));
        let (service, peers) = Service::new(setup.ring_slots, &bell);
        let counters = Arc::new(ShardCounters::default());
        let limiter = Arc::new(ConnectionLimiter::new(setup.limits));
        let room = setup.config.connections_max + setup.room_elsewhere;
        let capacity = Arc::new(Capacity::new(room));
        let thread = seed.is_multiple_of(TLS_SEEDS).then(|| {
            setup.config.handshakes_max = random.pick(&[1, 4, 512]);
            let failing = random.pick(&[0, 20]);
            HandshakeThread::new(&bell, failing)
        });
        let (thread, handshaker) = thread.unzip();
        let links = ShardLinks {
            peers,
            bell,
            limiter: Arc::clone(&limiter),
            capacity: Arc::clone(&capacity),
            counters: Arc::clone(&counters),
            handshaker,
        };
        let limits = Limits {
            // Deadlines are counted in whole ticks, from the current one.
            resume_grace_ms: setup.config.resume_grace_ms - TICK_MS,
            dedupe_ms: setup.config.dedupe_ms - TICK_MS,
        };
        Self {
            shard: Some(Shard::new(kernel, setup.config.clone(), links)),
            random,
            setup,
            limits,
            counters,
            limiter,
            capacity,
            elsewhere: Vec::new(),
            handshakes: (0, 0),
            other_refusals: 0,
            was_full: false,
            service,
            handshaker: thread,
            clients: Vec::new(),
            active: Vec::new(),
            by_key: HashMap::new(),
            directory: Vec::new(),
            dead_keys: Vec::new(),
            missed: Vec::new(),
            bystanders: Bystanders::default(),
            undecided: Vec::new(),
            stopping: false,
            stopped_early: false,
            abandoned: false,
            resting: false,
            summary: Summary::default(),
            wire_events: 0,
            reports_opened: 0,
            reports_ended: 0,
            reports_message: 0,
            reports_grace: 0,
        }
    }

    fn kernel(&mut self) -> &mut SimulatedKernel {
        self.shard.as_mut().expect("running").kernel_mut()
    }

    fn now_ms(&self) -> u64 {
        use crate::uring::Kernel as _;
        self.shard.as_ref().expect("running").kernel().now_ms()
    }

    fn unix_ms(&self) -> u64 {
        use crate::uring::Kernel as _;
        self.shard.as_ref().expect("running").kernel().unix_ms()
    }

    /// One action, then the shard's turn if it is awake.
    fn step(&mut self) {
        match self.random.below(100) {
            0 if self.random.chance(self.setup.stops_accepting) => {
                self.service.command(SESSION_MANAGER, ShardCommand::StopAccepting);
            }
            0..=5 => self.connect(),
            6..=7 if self.random.chance(self.setup.storm) => {
                for _ in 0..20 {
                    self.connect();
                }
            }
            6..=49 => self.client_acts(),
            50..=64 => self.router_acts(),
            65..=84 => self.manager_acts(),
            85 => self.other_shards_act(),
            86..=87 => {
                let router = 1 + self.random.below(PEERS - 1);
                self.take_reports(router, 8);
            }
            _ => self.time_passes(),
        }
        if self.handshaker.is_some() {
            let limit = self.random.below(4);
            self.handshakes_advance(limit);
        }
        self.turn();
    }

    /// The shard's turn, if anything would wake it, and all checks.
    fn turn(&mut self) {
        self.summary.steps += 1;
        let Some(shard) = self.shard.as_mut() else { return };
        shard.kernel_mut().progress();
        if !std::mem::take(&mut self.service.rang) && !shard.kernel().is_awake() {
            let waits = shard.kernel().backlog_len() > 0 && shard.would_accept();
            assert!(!waits, "it sleeps while a client waits");
            return;
        }
        note(TraceEvent::Turn);
        let counts = &self.counters.counts;
        let now_ms = crate::uring::Kernel::now_ms(shard.kernel());
        let before = (
            now_ms,
            self.capacity.free(),
            shard.admitted(),
            counts.accepted.get(),
            counts.refused_full.get(),
        );
        let turn = shard.turn().expect("a simulated ring does not fail");
        shard.audit();
        self.check_refusals(before);
        self.check_kernel();
        self.check_pings();
        self.read_wires();
        self.check_counters();
        self.check_bystanders();
        if turn == Turn::Stopped {
            self.check_stopped();
            self.summary.take_faults(self.shard.as_ref().expect("has just stopped").kernel());
            self.shard = None;
        }
    }

    fn router_acts(&mut self) {
        let peer = 1 + self.random.below(PEERS - 1);
        if !self.service.peers[peer].backlog.is_empty() {
            return self.service.push_backlog(peer);
        }
        if self.directory.is_empty() || self.resting || self.shard.is_none() {
            return;
        }
        for _ in 0..=self.random.below(self.setup.burst) {
            let event = self.service.live_event(peer, &mut self.random);
            let recipients = self.recipients(peer, &event);
            let unix_ms = self.unix_ms();
            self.service.deliver(peer, &event, &recipients, unix_ms, &mut self.random);
            if self.service.peers[peer].backlog.is_empty() {
                self.await_at_bystanders(&event, &recipients);
            }
        }
        if self.random.chance(128) {
            self.service.push_routed(peer);
        }
    }

    /// One, some or all sessions of the directory, and now and then an ended one.
    fn recipients(
        &mut self,
        peer: usize,
        event: &session::ModelEvent,
    ) -> Vec<(ConnectionKey, Encoding)> {
        let mut recipients = Vec::new();
        let of_256 = self.random.pick(&[10, 60, 255]);
        for index in 0..self.directory.len() {
            let number = self.directory[index];
            let client = &mut self.clients[number];
            let Some(key) = client.session.key else { continue };
            if self.random.chance(of_256) {
                client.session.address(peer, event.clone());
                recipients.push((key, encoding(client.kind)));
            }
        }
        if !self.dead_keys.is_empty() && self.random.chance(20) {
            recipients.push((self.random.pick(&self.dead_keys), Encoding::Binary));
        }
        recipients
    }

    fn time_passes(&mut self) {
        let ms = match self.random.below(64) {
            0 if self.random.chance(self.setup.clock_jumps) => self.random.between(60_000, 600_000),
            1 if self.random.chance(self.setup.clock_jumps) => {
                let ms = self.random.between(0, 7_200_000) as i64 - 3_600_000;
                note(TraceEvent::Steps(ms));
                if self.shard.is_some() {
                    self.kernel().step_unix_clock(ms);
                }
                return;
            }
            2..=9 => self.random.between(100, self.setup.pace_ms),
            _ => self.random.between(0, 30),
        };
        self.pass(ms);
    }

    fn pass(&mut self, ms: u64) {
        note(TraceEvent::Pass(ms));
        self.count_sleep(ms);
        if self.shard.is_some() {
            self.kernel().pass(ms);
        }
        self.summary.passed_ms += ms;
    }
}

fn encoding(kind: ClientKind) -> Encoding {
    match kind {
        ClientKind::Session { json: true } => Encoding::Json,
        ClientKind::Session { json: false }
        | ClientKind::Echo
        | ClientKind::Bad
        | ClientKind::Endless => Encoding::Binary,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fixed seeds, so that a failure is caused by a change of the code. `simulate` runs new ones.
    const FIRST_SEED: u64 = 1;
    /// Seeds per run; a step takes some microseconds without optimisation.
    const SEEDS: u64 = 100;
    const STEPS: u64 = 10_000;

    #[test]
    fn a_million_steps() {
        trace::print_on_panic();
        println!("simulating seeds {FIRST_SEED} to {}", FIRST_SEED + SEEDS - 1);
        let mut total = Summary::default();
        (FIRST_SEED..FIRST_SEED + SEEDS).for_each(|seed| total.add(&run(seed, STEPS)));
        assert!(total.steps >= SEEDS * STEPS);
        assert!(total.to_bystanders > 10_000, "{total:?}");
        println!("the slowest event to a bystander: {:?}", total.latest);
        // The runs must reach every counter and every end reason.
        for (name, count) in total.counts {
            assert!(count > 0, "{name} never happened");
        }
    }

    #[test]
    fn a_seed_replays_exactly() {
        assert_eq!(run(7, 3_000), run(7, 3_000));
    }
}
