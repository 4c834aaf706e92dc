//! The gRPC streams as one more shard: the same commands and reports over the same rings, with a
//! tokio task in the place of a reactor.
//!
//! ```text
//!  session manager, routers          hub task                one of each per stream
//!  ════ ShardCommand ════►  slots, who ends and why  ──►  outbox ──► writer ──► HTTP/2
//!  ◄═══ ShardReport ══════                           ◄── inputs ◄── reader ◄── HTTP/2
//! ```
//!
//! A delivery is reported done when the writer of its last stream has taken it, or that stream has
//! ended. The writer takes an event only while the client's HTTP/2 window for the stream is open,
//! and hands its bytes to the HTTP/2 connection in the same breath.

mod delivery;
mod outbox;
mod slots;
mod status;
mod task;

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tonic::Status;

use crate::counters;
use crate::domain::close::EndReason;
use crate::domain::command::{Hello, ShardCommand, ShardReport};
use crate::domain::counters::{LatencyHistogram, SharedCounter};
use crate::domain::event::Event;
use crate::domain::ids::ConnectionKey;
use crate::handoff::{Consumer, Doorbell, Producer};
use crate::service::events::timestamp::unix_ms;

pub(crate) use delivery::Delivery;
pub use outbox::OutboxLimits;
pub(crate) use outbox::{Mention, Outbox};
pub use task::Hub;

use delivery::{Signal, Signals};

/// Requests of all streams that wait for the hub's task; readers wait when it is full.
pub const INPUTS_MAX: usize = 1024;

/// Settings of the hub.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// Bounds of each stream.
    pub outbox: OutboxLimits,
    /// Streams at a time.
    pub streams_max: usize,
    /// Deliveries under way at a time; at the bound no more commands are taken from the rings.
    pub deliveries_max: usize,
    /// Their bytes, likewise; one may exceed it.
    pub deliveries_bytes_max: usize,
    /// A stream of which nothing was read for this long while something waited is ended.
    pub stall_timeout: Duration,
    /// A stream of whose conversations none was caught up for this long is ended.
    pub catch_up_timeout: Duration,
    /// For a stream that is being ended to take what is queued and its status.
    pub close_timeout: Duration,
}

impl Default for HubConfig {
    /// 10,000 streams, 262,144 deliveries or 256 MiB, 30 s without progress, 5 min to catch up, 5 s
    /// to end.
    fn default() -> Self {
        Self {
            outbox: OutboxLimits::default(),
            streams_max: 10_000,
            deliveries_max: 1 << 18,
            deliveries_bytes_max: 256 << 20,
            stall_timeout: Duration::from_secs(30),
            catch_up_timeout: Duration::from_secs(300),
            close_timeout: Duration::from_secs(5),
        }
    }
}

counters! {
    /// What the hub does.
    pub struct HubCounters of SharedCounter {
        Gauge stream_sessions: "gRPC sessions that are admitted and open",
        Counter stream_sessions_opened: "gRPC sessions that were admitted",
        Counter stream_sessions_refused: "gRPC sessions that were refused",
        Counter stream_events_sent: "Events handed to the HTTP/2 stream of a session",
        Counter stream_bytes_sent: "Bytes of these events",
        Counter stream_events_held: "Live events that waited for the catch-up of their conversation",
        Counter stream_events_duplicate: "Live events not sent because catch-up had delivered them",
        Counter stream_events_unsent: "Events given up because their stream ended before they were sent",
        Counter stream_events_stale: "Events for streams that had ended",
        Counter stream_events_inexpressible: "Events without a form on a stream (receipts, membership, presence)",
        Counter stream_commands_stale: "Commands for streams that had ended",
        Counter stream_texts_discarded: "Control answers that a stream has no form for",
        Counter stream_resumes: "Conversations whose catch-up a stream asked for",
        Counter stream_acknowledgements: "Later mentions of a conversation: acknowledgements",
        Counter stream_overflows: "Streams ended because too much waited",
        Counter stream_catch_up_timeouts: "Streams ended because their catch-up got nowhere",
        Counter stream_stalls: "Streams ended because nothing was read from them",
        Gauge stream_deliveries: "Deliveries that some stream still holds",
    }
}

/// Counters, endings by their reason, and the latency from Kafka to HTTP/2.
#[derive(Debug, Default)]
pub struct HubMetrics {
    /// The plain counters.
    pub counters: HubCounters,
    /// Ended sessions by [`EndReason`].
    pub ended: [SharedCounter; EndReason::COUNT],
    /// From the append to the log until the writer took the event.
    pub latency: LatencyHistogram,
    /// The histogram has one writer at a time.
    latency_writer: Mutex<()>,
}

impl HubMetrics {
    /// An event was taken by the writer of a stream.
    fn sent(&self, event: &Event, bytes: usize) {
        self.counters.stream_events_sent.add(1);
        self.counters.stream_bytes_sent.add(bytes as u64);
        if event.appended_at_ms == 0 {
            return;
        }
        let latency_ms = unix_ms().saturating_sub(event.appended_at_ms);
        let _writer = self.latency_writer.lock().expect("no holder panics");
        self.latency.record(latency_ms, 1);
    }
}

/// The hub's end of the rings to one peer.
#[derive(Debug)]
pub struct HubPeer {
    /// From the peer.
    pub commands: Consumer<ShardCommand>,
    /// To it.
    pub reports: Producer<ShardReport>,
}

/// Makes the hub. `peers`: the session manager first, then the routers; `bell` is the one their
/// producers ring. The [`Hub`] is to be run on the current runtime.
///
/// # Errors
/// The runtime's poller refuses the bell.
pub fn hub(
    config: HubConfig,
    peers: Vec<HubPeer>,
    bell: Arc<Doorbell>,
    metrics: Arc<HubMetrics>,
) -> io::Result<(HubHandle, Hub)> {
    assert!(!peers.is_empty(), "the session manager is the first peer");
    let (inputs, requests) = mpsc::channel(INPUTS_MAX);
    let signals = Arc::new(Signals::default());
    let limits = config.outbox.clone();
    let (accepting, is_accepting) = watch::channel(true);
    let handle = HubHandle {
        inputs,
        signals: Arc::clone(&signals),
        metrics: Arc::clone(&metrics),
        limits,
        accepting: is_accepting,
    };
    let hub = Hub::new(config, peers, bell, requests, signals, metrics, accepting)?;
    Ok((handle, hub))
}

/// From the streams to the hub's task.
enum Input {
    Open { hello: Box<Hello>, outbox: Arc<Outbox>, reply: Reply },
    Resume { connection: ConnectionKey, conversation: Box<str>, after: i64 },
}

/// Tells the waiting request what became of it. The hub reports the session's end itself if the
/// reply finds nobody.
type Reply = oneshot::Sender<Result<ConnectionKey, Status>>;

/// The way into the hub for the gRPC service.
#[derive(Clone)]
pub struct HubHandle {
    inputs: mpsc::Sender<Input>,
    signals: Arc<Signals>,
    metrics: Arc<HubMetrics>,
    limits: OutboxLimits,
    accepting: watch::Receiver<bool>,
}

impl HubHandle {
    /// Asks the session manager for a session. Safe to drop at any point: the session ends.
    ///
    /// # Errors
    /// The status that tells the client why not.
    pub(crate) async fn open(&self, hello: Box<Hello>) -> Result<Admitted, Status> {
        let outbox = Arc::new(Outbox::new(self.limits.clone()));
        let (reply, answer) = oneshot::channel();
        let input = Input::Open { hello, outbox: Arc::clone(&outbox), reply };
        self.inputs.send(input).await.map_err(|_| status::not_serving())?;
        // Keeps the answer, if this future is dropped between its coming and its being read.
        let mut answer = Answer { hub: self, answer };
        let connection = (&mut answer.answer).await.map_err(|_| status::not_serving())??;
        Ok(Admitted { connection, outbox, hub: self.clone(), why: AtomicU8::new(WHY_UNKNOWN) })
    }

    /// Whether new sessions are taken; false for good once the hub has ended.
    pub fn accepting(&self) -> watch::Receiver<bool> {
        self.accepting.clone()
    }

    /// The counters.
    pub fn metrics(&self) -> &Arc<HubMetrics> {
        &self.metrics
    }
}

struct Answer<'a> {
    hub: &'a HubHandle,
    answer: oneshot::Receiver<Result<ConnectionKey, Status>>,
}

impl Drop for Answer<'_> {
    fn drop(&mut self) {
        // What was read is gone from the channel; what was not read is an admission nobody took.
        self.answer.close();
        if let Ok(Ok(connection)) = self.answer.try_recv() {
            self.hub.signals.send(Signal::Gone(connection, EndReason::PeerGone));
        }
    }
}

/// Nobody has said how the stream ended.
const WHY_UNKNOWN: u8 = u8::MAX;

/// An open session. Shared by its writer and its reader; when both are gone the session has ended.
pub(crate) struct Admitted {
    connection: ConnectionKey,
    /// What is to be sent.
    pub(crate) outbox: Arc<Outbox>,
    hub: HubHandle,
    why: AtomicU8,
}

impl Admitted {
    /// Has the client's mention of a conversation acted on. Waits while the hub is busy.
    pub(crate) async fn mention(&self, conversation: String, sequence: i64) -> Mention {
        let stream = crate::service::events::conversation_key::conversation_key(&conversation);
        let counters = &self.hub.metrics.counters;
        let mention = self.outbox.mention(stream, sequence, Instant::now());
        match mention {
            Mention::Acknowledged => counters.stream_acknowledgements.add(1),
            Mention::TooMany => {}
            Mention::Resume => {
                counters.stream_resumes.add(1);
                let resume = Input::Resume {
                    connection: self.connection,
                    conversation: conversation.into_boxed_str(),
                    after: sequence,
                };
                // An error means that the hub has ended, and every stream with it.
                let _ = self.hub.inputs.send(resume).await;
            }
        }
        mention
    }

    /// An event was taken by the writer.
    pub(crate) fn sent(&self, delivery: &Delivery) {
        self.hub.metrics.sent(delivery.event(), delivery.bytes().len());
    }

    /// Ends the stream with this status instead of what is queued.
    pub(crate) fn end(&self, status: Status) {
        let unsent = self.outbox.end(status, true);
        self.hub.metrics.counters.stream_events_unsent.add(unsent as u64);
    }

    /// How the client's side ended; the first word counts.
    pub(crate) fn ended(&self, why: EndReason) {
        let _ =
            self.why.compare_exchange(WHY_UNKNOWN, why as u8, Ordering::Relaxed, Ordering::Relaxed);
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let why = usize::from(self.why.load(Ordering::Relaxed));
        let why = EndReason::ALL.get(why).copied().unwrap_or(EndReason::PeerGone);
        self.hub.signals.send(Signal::Gone(self.connection, why));
    }
}

#[cfg(test)]
pub(crate) mod testing;
