//! Constructors of submission queue entries, one per operation. Entries are built nowhere else.

use io_uring::opcode;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{CancelBuilder, DestinationSlot, Fixed};

use super::accepts::AddressCell;
use super::buffers::BUFFER_GROUP;
use super::send_buffer::StableBytes;
use super::token::{Operation, Token};
use crate::domain::ids::ConnectionKey;

/// The half of the stream that a shutdown ends: ours.
const SHUTDOWN_WRITE: i32 = libc::SHUT_WR;

/// The address that dissolves a connection: `AF_UNSPEC` (`connect(2)`), all zeros.
static NO_ADDRESS: [u8; size_of::<libc::sockaddr>()] = [0; size_of::<libc::sockaddr>()];

const _: () = assert!(libc::AF_UNSPEC == 0);

fn token(operation: Operation, key: ConnectionKey) -> u64 {
    Token { operation, key }.encode()
}

/// Accepts one connection from the listener in file `listener` into the file of the key's slot, and
/// writes the peer's address into the cell.
pub(super) fn accept(listener: u32, key: ConnectionKey, cell: &AddressCell) -> Entry {
    let (address, address_len) = cell.pointers();
    let slot =
        DestinationSlot::try_from_slot_target(key.slot).expect("slots are far below the limit");
    opcode::Accept::new(Fixed(listener), address, address_len)
        .file_index(Some(slot))
        .build()
        .user_data(token(Operation::Accept, key))
}

/// Completes each time the socket becomes readable, reaches its end of stream or fails.
pub(super) fn poll_readable(key: ConnectionKey) -> Entry {
    opcode::PollAdd::new(Fixed(key.slot), libc::POLLIN as u32)
        .multi(true)
        .build()
        .user_data(token(Operation::PollReadable, key))
}

/// Receives available bytes into a buffer of the kernel's choice, at most a buffer full.
pub(super) fn receive(key: ConnectionKey) -> Entry {
    opcode::Recv::new(Fixed(key.slot), std::ptr::null_mut(), 0)
        .buf_group(BUFFER_GROUP)
        .flags(libc::MSG_DONTWAIT)
        .build()
        .flags(Flags::BUFFER_SELECT)
        .user_data(token(Operation::Receive, key))
}

/// Sends as much as fits into the socket's buffer. `send` is the key under which `bytes` are kept.
pub(super) fn send(file: u32, send: ConnectionKey, bytes: &impl StableBytes) -> Entry {
    // A longer buffer is sent in part, as any send may be.
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    opcode::Send::new(Fixed(file), bytes.as_ptr(), len)
        .flags(libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        .build()
        .user_data(token(Operation::Send, send))
}

/// Completes once, when the socket has room again or has failed.
pub(super) fn poll_writable(key: ConnectionKey) -> Entry {
    opcode::PollAdd::new(Fixed(key.slot), libc::POLLOUT as u32)
        .build()
        .user_data(token(Operation::PollWritable, key))
}

/// Cancels the connection's poll for data, if it is armed. Cancels by token: the kernel finds that by
/// hash, but walks all pending requests of the ring to find a file.
pub(super) fn cancel_poll_readable(key: ConnectionKey) -> Entry {
    opcode::AsyncCancel::new(token(Operation::PollReadable, key))
        .build()
        .user_data(token(Operation::CancelPollReadable, key))
}

/// Cancels the connection's poll for room, if there is one.
pub(super) fn cancel_poll_writable(key: ConnectionKey) -> Entry {
    opcode::AsyncCancel::new(token(Operation::PollWritable, key))
        .build()
        .user_data(token(Operation::CancelPollWritable, key))
}

/// Shuts down our half of the stream.
pub(super) fn shutdown(key: ConnectionKey) -> Entry {
    opcode::Shutdown::new(Fixed(key.slot), SHUTDOWN_WRITE)
        .build()
        .user_data(token(Operation::Shutdown, key))
}

/// Dissolves the connection: unsent bytes are discarded and the peer gets a reset. `SO_LINGER` on the
/// listener would reset every connection, and setting it on a fixed file needs Linux 6.7.
pub(super) fn disconnect(key: ConnectionKey) -> Entry {
    let address = NO_ADDRESS.as_ptr().cast();
    opcode::Connect::new(Fixed(key.slot), address, NO_ADDRESS.len() as libc::socklen_t)
        .build()
        .user_data(token(Operation::Disconnect, key))
}

/// Closes the socket and empties its file.
pub(super) fn close(key: ConnectionKey) -> Entry {
    opcode::Close::new(Fixed(key.slot)).build().user_data(token(Operation::Close, key))
}

/// Completes each time the doorbell in file `file` is rung.
pub(super) fn watch_doorbell(file: u32) -> Entry {
    opcode::PollAdd::new(Fixed(file), libc::POLLIN as u32)
        .multi(true)
        .build()
        .user_data(token(Operation::WatchDoorbell, Token::NO_CONNECTION))
}

/// Cancels every accept on the listener in file `file`.
pub(super) fn cancel_accepts(file: u32) -> Entry {
    opcode::AsyncCancel2::new(CancelBuilder::fd(Fixed(file)).all())
        .build()
        .user_data(token(Operation::CancelAccepts, Token::NO_CONNECTION))
}

/// Cancels everything in the ring.
pub(super) fn cancel_everything() -> Entry {
    opcode::AsyncCancel2::new(CancelBuilder::any().all())
        .build()
        .user_data(token(Operation::CancelEverything, Token::NO_CONNECTION))
}

/// Required operations, by number and name.
pub(super) const NEEDED: [(u8, &str); 8] = [
    (opcode::Accept::CODE, "IORING_OP_ACCEPT"),
    (opcode::AsyncCancel::CODE, "IORING_OP_ASYNC_CANCEL"),
    (opcode::Close::CODE, "IORING_OP_CLOSE"),
    (opcode::Connect::CODE, "IORING_OP_CONNECT"),
    (opcode::PollAdd::CODE, "IORING_OP_POLL_ADD"),
    (opcode::Recv::CODE, "IORING_OP_RECV"),
    (opcode::Send::CODE, "IORING_OP_SEND"),
    (opcode::Shutdown::CODE, "IORING_OP_SHUTDOWN"),
];
