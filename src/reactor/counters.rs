//! The counters of a shard. The shard writes them; the metrics page reads them.

use crate::domain::close::EndReason;
use crate::domain::counters::{Counter, LatencyHistogram};

crate::counters! {
    /// The counts of one shard.
    pub struct ShardCounts of Counter {
        Gauge slots_used: "Slots in use: accepts in flight, handshakes, sessions, connections that are closing.",
        Gauge slots_allocated: "Slots that memory is allocated for.",
        Gauge sessions: "Admitted sessions that have not ended.",
        Gauge echoes: "Connections to /echo.",
        Gauge handshakes: "Connections without a completed upgrade.",
        Counter accepted: "Connections accepted.",
        Counter accept_failures: "Accepts that failed.",
        Counter refused_full: "Connections answered 503: no shard has room.",
        Counter refusals_cut: "Refused connections closed early, so that further clients could be answered.",
        Counter refused_total_rate: "Connections answered 503: too many handshakes per second in total.",
        Counter refused_address_rate: "Connections answered 429: too many handshakes per second from the address.",
        Counter refused_address_count: "Connections answered 429: too many connections from the address.",
        Counter requests_refused: "Upgrade requests refused by the protocol (400 to 431).",
        Counter requests_refused_by_service: "Upgrade requests refused by the session manager.",
        Counter handshake_timeouts: "Connections without a complete request in time (408), or without a TLS handshake.",
        Counter tls_handshakes_flooded: "TLS handshakes given up because the client sent too much, or in too many parts.",
        Counter tls_handshakes_delayed: "TLS handshakes that found too many others under way, and waited.",
        Counter tls_refused_plaintext: "Clients that spoke HTTP on a TLS port (400).",
        Counter tls_errors: "TLS sessions ended because a client violated RFC 8446.",
        Counter admission_timeouts: "Requests without a decision of the session manager in time (503).",
        Counter upgraded: "Upgrades answered 101.",
        Counter bytes_received: "Bytes received.",
        Counter messages_received: "Client messages received.",
        Counter messages_passed: "Client messages passed to the session manager.",
        Counter messages_discarded: "Client messages discarded because they have no meaning (contract §3).",
        Counter pings_received: "Pings received.",
        Counter pongs_skipped: "Pings not answered because too many frames were queued or a close frame was sent (RFC 6455 §5.5.3).",
        Counter pings_sent: "Pings sent.",
        Counter inbound_rate_exceeded: "Connections closed for too many messages or bytes per second.",
        Counter message_timeouts: "Connections closed because a message was not complete in time.",
        Counter protocol_errors: "Connections closed for violating RFC 6455.",
        Counter dropped_too_much: "Connections reset because the client sent more than 64 KiB after it was refused or had violated the protocol.",
        Counter receive_buffers_exhausted: "Receives delayed because all buffers were lent.",
        Counter sends: "Sends completed.",
        Counter sends_short: "Sends that the socket took only in part, or not at all.",
        Counter bytes_sent: "Bytes sent.",
        Counter frames_batched: "Frames that were copied together with others for one send.",
        Counter events_taken: "Events taken from the rings.",
        Counter deliveries: "Recipients of those events.",
        Counter deliveries_sent: "Deliveries whose send has completed.",
        Counter deliveries_stale: "Deliveries for a connection that had ended.",
        Counter deliveries_ended: "Deliveries dropped because their connection ended.",
        Counter deliveries_duplicate: "Deliveries dropped because catch-up had delivered them.",
        Counter deliveries_skipped: "Deliveries that cannot be expressed in the session's encoding.",
        Counter queue_overflows: "Connections closed because their queue was full (1011).",
        Counter closed_for_room: "Connections closed (1011) because too many events were queued and their sockets took nothing or little.",
        Counter hold_overflows: "Sessions closed because too many live events came during catch-up (1013).",
        Counter closed_in_catch_up_for_room: "Sessions closed during catch-up (1013) because too many live events were held for all that catch up.",
        Counter grace_expired: "Sessions that went live without a resume request.",
        Counter commands_stale: "Commands for a connection that had ended.",
        Counter reports_delayed: "Reports that found their ring full.",
        Gauge events_held: "Events queued for at least one recipient.",
        Gauge event_bytes_held: "Bytes of their frames.",
        Gauge events_in_catch_up: "Those of them that are held for sessions that catch up.",
        Gauge frames_queued: "Frames in all send queues.",
        Counter intake_waits: "Turns in which the rings waited for the queue of a session that keeps up.",
        Counter intake_paused: "Turns in which the routers' rings were not read because too many events were queued.",
        Counter cursors_sent: "Cursors queued for sessions that asked for them.",
        Counter turns: "Turns of the loop.",
        Counter waits: "Turns that waited for a completion, a command or a deadline.",
    }
}

/// All counters of a shard.
#[derive(Debug, Default)]
pub struct ShardCounters {
    /// The counts.
    pub counts: ShardCounts,
    /// Ended connections, by [`EndReason`].
    pub ended: [Counter; EndReason::COUNT],
    /// Time from the append to the log to the completed send.
    pub latency: LatencyHistogram,
}

impl ShardCounters {
    /// Counts an ended connection.
    pub fn count_end(&self, why: EndReason) {
        self.ended[why as usize].add(1);
    }
}
