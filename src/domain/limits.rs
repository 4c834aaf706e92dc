//! Every bound that is not a setting, with its unit. Relations between them are checked at compile
//! time. Settings and their defaults are in `app::config`.

/// Payload of a control frame, bytes (RFC 6455 §5.5).
pub const CONTROL_PAYLOAD_BYTES_MAX: usize = 125;
/// Close reason, bytes: a control payload minus two bytes for the code (RFC 6455 §5.5.1).
pub const CLOSE_REASON_BYTES_MAX: usize = CONTROL_PAYLOAD_BYTES_MAX - 2;
/// Header of a server frame, bytes: no mask (RFC 6455 §5.2).
pub const SERVER_HEADER_BYTES_MAX: usize = 10;
/// Header of a client frame, bytes: with mask (RFC 6455 §5.2).
pub const CLIENT_HEADER_BYTES_MAX: usize = 14;
/// Connections of one shard: a token has 32 bits for the slot, and a fixed-file table holds at most
/// this many files on any kernel.
pub const CONNECTIONS_PER_SHARD_MAX: u32 = 1 << 20;
/// Accepts that one shard has in flight at a time, each into its own slot. So many connections can
/// be accepted in one turn of the loop.
pub const ACCEPTS_IN_FLIGHT_MAX: usize = 64;
/// One kernel-filled receive buffer, bytes.
pub const RECEIVE_BUFFER_BYTES: usize = 4096;
/// Frames copied together for one send, bytes.
pub const SEND_BATCH_BYTES: usize = 16 * 1024;
/// User and device ids, bytes after percent-decoding.
pub const ID_BYTES_MAX: usize = 256;
/// A bearer token, bytes, wherever it is given: many times the size that the auth service issues,
/// and half of an upgrade request's head.
pub const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// What a client may send after it was refused or has violated the protocol, bytes: it is dropped, because closing a
/// socket with unread bytes would destroy the answer. A client that sends more does not read the answer.
pub const DROPPED_BYTES_MAX: u32 = 64 * 1024;
/// Slots of a ring between a peer of the service side and a shard.
pub const HANDOFF_RING_SLOTS: usize = 4096;
/// Of the events that a shard or the gRPC hub may have, one in so many may be held for sessions that catch up, and the
/// others may be queued. So sessions that catch up make no others wait.
pub const HELD_SHARE: u64 = 4;

/// The part that may be held, of a bound in events or bytes.
pub fn held_share(all: u64) -> u64 {
    (all / HELD_SHARE).max(1)
}

/// The part that may be queued.
pub fn queued_share(all: u64) -> u64 {
    (all - all / HELD_SHARE).max(1)
}

/// Items that a shard takes from one ring per turn, so that sockets do not starve.
pub const HANDOFF_BATCH_MAX: usize = 256;

const _: () = {
    assert!(CLOSE_REASON_BYTES_MAX == 123);
    assert!(HANDOFF_BATCH_MAX <= HANDOFF_RING_SLOTS);
    assert!(RECEIVE_BUFFER_BYTES > CLIENT_HEADER_BYTES_MAX + CONTROL_PAYLOAD_BYTES_MAX);
    assert!(SEND_BATCH_BYTES > SERVER_HEADER_BYTES_MAX + CONTROL_PAYLOAD_BYTES_MAX);
};
