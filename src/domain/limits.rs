//! Every bound that is not a setting, with its unit, related to the others at compile time.
//! Settings and their defaults are in `app::config`.

/// Payload of a control frame, bytes (RFC 6455 §5.5).
pub const CONTROL_PAYLOAD_BYTES_MAX: usize = 125;
/// Close reason, bytes: a control payload less the two bytes of the code (RFC 6455 §5.5.1).
pub const CLOSE_REASON_BYTES_MAX: usize = CONTROL_PAYLOAD_BYTES_MAX - 2;
/// Header of a server frame, bytes: no mask (RFC 6455 §5.2).
pub const SERVER_HEADER_BYTES_MAX: usize = 10;
/// Header of a client frame, bytes: with mask (RFC 6455 §5.2).
pub const CLIENT_HEADER_BYTES_MAX: usize = 14;
/// Connections of one shard: the slot travels in 32 bits of a token, and a fixed-file table holds
/// at most this many on any kernel.
pub const CONNECTIONS_PER_SHARD_MAX: u32 = 1 << 20;
/// Accepts that one shard has in flight at the same time, each into a slot of its own: as many
/// connections can be taken in one turn of the loop.
pub const ACCEPTS_IN_FLIGHT_MAX: usize = 64;
/// One kernel-filled receive buffer, bytes.
pub const RECEIVE_BUFFER_BYTES: usize = 4096;
/// A batch of queued frames copied together for one send, bytes.
pub const SEND_BATCH_BYTES: usize = 16 * 1024;
/// User and device ids, bytes after percent-decoding.
pub const ID_BYTES_MAX: usize = 256;
/// A bearer token, bytes, wherever it is given: many times what the auth service issues, and half of
/// an upgrade request's head.
pub const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// Slots of a ring between a service peer and a shard.
pub const HANDOFF_RING_SLOTS: usize = 4096;
/// Items a shard takes from one ring in one turn, so that sockets are not starved.
pub const HANDOFF_BATCH_MAX: usize = 256;

const _: () = {
    assert!(CLOSE_REASON_BYTES_MAX == 123);
    assert!(HANDOFF_BATCH_MAX <= HANDOFF_RING_SLOTS);
    assert!(RECEIVE_BUFFER_BYTES > CLIENT_HEADER_BYTES_MAX + CONTROL_PAYLOAD_BYTES_MAX);
    assert!(SEND_BATCH_BYTES > SERVER_HEADER_BYTES_MAX + CONTROL_PAYLOAD_BYTES_MAX);
};
