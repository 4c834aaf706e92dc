//! Hub of the gRPC streams. To the service it is one more shard: the same commands and reports over
//! the same rings, handled by a tokio task instead of a reactor.
//!
//! ```text
//!  session manager, routers        hub task               one of each per stream
//!  ════ ShardCommand ════►  slots, end reasons  ────►  outbox ──► writer ──► HTTP/2
//!  ◄═══ ShardReport ══════                      ◄── requests ◄── reader ◄── HTTP/2
//! ```
//!
//! A delivery is done when for each of its streams the writer has taken it or the stream has ended.
//! The writer takes an event only while the client's HTTP/2 window of the stream is open, and passes
//! its bytes to the HTTP/2 connection immediately.

mod delivery;
mod outbox;
#[cfg(any(test, feature = "simulation"))]
pub mod simulation;
mod slot_map;
mod status;
mod task;

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::counters;
use crate::domain::close::EndReason;
use crate::domain::command::Hello;
use crate::domain::counters::{LatencyHistogram, SharedCounter};
use crate::domain::event::Event;
use crate::domain::ids::ConnectionKey;
use crate::service::events::conversation_key::conversation_key;
use crate::service::events::timestamp::unix_ms;

pub(crate) use delivery::Delivery;
pub use outbox::OutboxLimits;
pub(crate) use outbox::{Outbox, PositionReport};
pub(crate) use status::of_refusal;
pub use task::Hub;

use delivery::{Notice, Notices};

/// Queued requests of all streams to the hub's task. Readers wait while the queue is full.
pub const HUB_REQUESTS_MAX: usize = 256;

/// Settings of the hub.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// Limits of each stream.
    pub outbox: OutboxLimits,
    /// Concurrent streams.
    pub streams_max: usize,
    /// Live events in the streams. One in [`HELD_SHARE`](crate::domain::limits::HELD_SHARE) may be held for catch-ups.
    /// At the rest the hub takes no more from the routers' rings.
    pub deliveries_max: usize,
    /// What these events cost, bytes ([`Event::cost`]), divided in the same way. One event may exceed the limit.
    pub deliveries_bytes_max: usize,
    /// The hub closes a stream if its client's window lets out no byte for this long although events wait.
    pub stall_timeout: Duration,
    /// The hub closes a stream if none of its catch-ups completes for this long.
    pub catch_up_timeout: Duration,
    /// Time for a closing stream to send its queue and its status. Then it is reset.
    pub close_timeout: Duration,
    /// How often a stream that asked for cursors gets one while something is routed.
    pub cursor_interval: Duration,
    /// How long a stream remembers the messages that catch-up delivered, so that they are not sent
    /// again live.
    pub dedupe: Duration,
}

impl Default for HubConfig {
    /// 10,000 streams; 262,144 deliveries or 256 MiB; 30 s stall, 5 min catch-up and 5 s close timeout;
    /// a cursor every 15 s and 5 min to recognise duplicates of a catch-up, as for WebSocket.
    fn default() -> Self {
        Self {
            outbox: OutboxLimits::default(),
            streams_max: 10_000,
            deliveries_max: 1 << 18,
            deliveries_bytes_max: 256 << 20,
            stall_timeout: Duration::from_secs(30),
            catch_up_timeout: Duration::from_secs(300),
            close_timeout: Duration::from_secs(5),
            cursor_interval: Duration::from_secs(15),
            dedupe: Duration::from_secs(300),
        }
    }
}

counters! {
    /// Counters of the hub.
    pub struct HubCounters of SharedCounter {
        Gauge stream_sessions: "Open gRPC sessions",
        Counter stream_sessions_opened: "gRPC sessions admitted",
        Counter stream_sessions_refused: "gRPC sessions refused",
        Counter stream_events_sent: "Events passed to the HTTP/2 stream of a session",
        Counter stream_bytes_sent: "Bytes of these events",
        Counter stream_events_held: "Live events held until the catch-up of their conversation completed",
        Counter stream_events_duplicate: "Live events not sent because catch-up had delivered them",
        Counter stream_events_unsent: "Events dropped because their stream ended before they were sent",
        Counter stream_events_stale: "Events for streams that had already ended",
        Counter stream_events_inexpressible: "Events without a gRPC encoding (read receipts, presence)",
        Counter stream_commands_stale: "Commands for streams that had already ended",
        Counter stream_texts_discarded: "Control answers without a gRPC encoding",
        Counter stream_resumes: "Catch-ups requested by clients",
        Counter stream_cursors_sent: "Cursors queued for streams that asked for them",
        Counter stream_acknowledgements: "Acknowledgements received from clients",
        Counter stream_overflows: "Streams closed because a queue was full",
        Counter stream_closed_for_room: "Streams closed because too many events were queued and their clients' windows were closed",
        Counter stream_closed_in_catch_up_for_room: "Streams closed because too many events were held for all that catch up",
        Counter stream_catch_up_timeouts: "Streams closed because their catch-up made no progress",
        Counter stream_stalls: "Streams closed because the window of the client let no byte out",
        Gauge stream_deliveries: "Live events in the streams",
        Gauge stream_deliveries_held: "Those of them that are held for streams that catch up",
    }
}

/// Counters, ended sessions by reason, and the latency from Kafka to HTTP/2.
#[derive(Debug, Default)]
pub struct HubMetrics {
    /// Counters.
    pub counters: HubCounters,
    /// Ended sessions by [`EndReason`].
    pub ended: [SharedCounter; EndReason::COUNT],
    /// From the append to the Kafka log until the writer takes the event, ms.
    pub latency: LatencyHistogram,
    refused: [SharedCounter; status::HTTP_STATUSES.len()],
    /// Held while writing to the histogram, which allows one writer at a time.
    latency_writer: Mutex<()>,
}

impl HubMetrics {
    /// Counts a call that ended without a session, unless the session manager has refused it and counted it.
    pub(crate) fn count_refused(&self, code: Code) {
        let http = status::http_status(code);
        let at = status::HTTP_STATUSES.iter().position(|known| *known == http);
        self.refused[at.expect("all are listed")].add(1);
    }

    /// Refused requests, by the HTTP status that corresponds.
    pub fn refused(&self) -> impl Iterator<Item = (u16, u64)> {
        status::HTTP_STATUSES.into_iter().zip(self.refused.iter().map(SharedCounter::get))
    }

    /// Counts an event that the writer of a stream has taken.
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

/// A request from a stream to the hub's task.
enum HubRequest {
    Open { hello: Box<Hello>, outbox: Arc<Outbox>, reply: AdmissionReply },
    CatchUp { connection: ConnectionKey, conversation: Box<str>, after: i64 },
    ResumeSince { connection: ConnectionKey, cursor: Box<[u8]> },
}

/// Answers [`HubHandle::open`]. If the receiver is gone, the hub reports the session as ended.
type AdmissionReply = oneshot::Sender<Result<ConnectionKey, NotAdmitted>>;

/// Why there is no session, as the status for the client.
#[derive(Debug)]
pub(crate) enum NotAdmitted {
    /// The session manager has refused it, and has counted that.
    Refused(Status),
    /// The hub takes no session, or not this one.
    ByHub(Status),
}

impl NotAdmitted {
    fn new(status: Status, why: EndReason) -> Self {
        match why {
            EndReason::Refused => Self::Refused(status),
            _ => Self::ByHub(status),
        }
    }
}

impl From<NotAdmitted> for Status {
    fn from((NotAdmitted::Refused(status) | NotAdmitted::ByHub(status)): NotAdmitted) -> Self {
        status
    }
}

/// Interface of the hub for the gRPC service.
#[derive(Clone)]
pub struct HubHandle {
    requests: mpsc::Sender<HubRequest>,
    notices: Arc<Notices>,
    metrics: Arc<HubMetrics>,
    limits: OutboxLimits,
    accepting: watch::Receiver<bool>,
}

impl HubHandle {
    /// Requests a session from the session manager. Cancel-safe: dropping the future ends the session.
    ///
    /// # Errors
    /// The session is refused.
    pub(crate) async fn open(&self, hello: Box<Hello>) -> Result<StreamSession, NotAdmitted> {
        let gone = || NotAdmitted::ByHub(status::not_serving());
        let outbox = Arc::new(Outbox::new(&self.limits));
        let (reply, answer) = oneshot::channel();
        let request = HubRequest::Open { hello, outbox: Arc::clone(&outbox), reply };
        self.requests.send(request).await.map_err(|_| gone())?;
        // Ends the session if this future is dropped after the hub answers and before the answer is read.
        let mut pending = PendingAdmission { hub: self, answer };
        let connection = (&mut pending.answer).await.map_err(|_| gone())??;
        Ok(StreamSession { connection, outbox, hub: self.clone(), why: OnceLock::new() })
    }

    /// Whether the hub accepts new sessions. Stays false once the hub has ended.
    pub fn accepting(&self) -> watch::Receiver<bool> {
        self.accepting.clone()
    }

    /// The hub's metrics.
    pub fn metrics(&self) -> &Arc<HubMetrics> {
        &self.metrics
    }
}

struct PendingAdmission<'a> {
    hub: &'a HubHandle,
    answer: oneshot::Receiver<Result<ConnectionKey, NotAdmitted>>,
}

impl Drop for PendingAdmission<'_> {
    fn drop(&mut self) {
        // The channel contains an answer only if `open` has not read it.
        self.answer.close();
        if let Ok(Ok(connection)) = self.answer.try_recv() {
            self.hub.notices.send(Notice::StreamEnded(connection, EndReason::PeerGone));
        }
    }
}

/// An open session, shared by its writer and its reader. The session has ended when both are dropped.
pub(crate) struct StreamSession {
    connection: ConnectionKey,
    /// Queue of events to send.
    pub(crate) outbox: Arc<Outbox>,
    hub: HubHandle,
    why: OnceLock<EndReason>,
}

impl StreamSession {
    /// Handles the client's cursor: everything since then comes before any live event. To be called before the opening
    /// is done. Empty: it has none yet. Waits while the hub's request queue is full.
    pub(crate) async fn resume_since(&self, cursor: Box<[u8]>) {
        self.outbox.resume_since_cursor(Instant::now());
        let request = HubRequest::ResumeSince { connection: self.connection, cursor };
        // An error means that the hub and therefore this stream has ended.
        let _ = self.hub.requests.send(request).await;
    }

    /// Handles the client's position in a conversation: starts its catch-up, or counts an
    /// acknowledgement.
    /// Waits while the hub's request queue is full.
    pub(crate) async fn report_position(
        &self,
        conversation: String,
        sequence: i64,
    ) -> PositionReport {
        let key = conversation_key(&conversation);
        let counters = &self.hub.metrics.counters;
        let report = self.outbox.report_position(key, Instant::now());
        match report {
            PositionReport::Acknowledged => counters.stream_acknowledgements.add(1),
            PositionReport::TooMany => {}
            PositionReport::CatchUp => {
                counters.stream_resumes.add(1);
                let request = HubRequest::CatchUp {
                    connection: self.connection,
                    conversation: conversation.into_boxed_str(),
                    after: sequence,
                };
                // An error means that the hub and therefore this stream has ended.
                let _ = self.hub.requests.send(request).await;
            }
        }
        report
    }

    /// Counts an event that the writer has taken.
    pub(crate) fn sent(&self, delivery: &Delivery) {
        self.hub.metrics.sent(delivery.event(), delivery.bytes().len());
        let drained = self.outbox.drained();
        if drained.ends_wait {
            self.hub.notices.wake.notify_one();
        }
        if drained.burst {
            self.hub.notices.send(Notice::BurstDrained(self.connection));
        }
    }

    /// The client broke a rule: discards the queue and closes the stream with this status.
    pub(crate) fn close_at_fault(&self, status: Status) {
        self.hub.notices.send(Notice::AtFault(self.connection, status));
    }

    /// Records why the client's side ended. The first reason counts.
    pub(crate) fn ended(&self, why: EndReason) {
        let _ = self.why.set(why);
    }
}

impl Drop for StreamSession {
    fn drop(&mut self) {
        let why = self.why.get().copied().unwrap_or(EndReason::PeerGone);
        self.hub.notices.send(Notice::StreamEnded(self.connection, why));
    }
}

#[cfg(test)]
pub(crate) mod testing;
