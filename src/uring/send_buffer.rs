//! The buffer of a send.

use std::ops::Deref;
use std::rc::Rc;

use crate::domain::encoding::Encoding;
use crate::domain::outgoing::Outgoing;

/// Bytes that the kernel may read while the value is moved. Only this folder implements it.
///
/// # Safety
/// Until the value is dropped or borrowed exclusively, it dereferences to the same bytes at the same address: they
/// neither move with it nor change, whatever safe code does with other references to them.
pub(super) unsafe trait StableBytes: Deref<Target = [u8]> {}

/// The bytes of one send. The kernel owns it from the request to the completion, which returns it.
#[derive(Debug)]
pub struct SendBuffer {
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// One frame, read directly from the memory that all recipients share.
    Shared { outgoing: Rc<Outgoing>, encoding: Encoding, from: usize },
    /// Several frames, copied together.
    Batch(Vec<u8>),
}

impl SendBuffer {
    /// The frame for `encoding` without its first `from` bytes, which were sent before. At least
    /// one byte is left.
    pub fn shared(outgoing: Rc<Outgoing>, encoding: Encoding, from: usize) -> Self {
        let length = outgoing.bytes(encoding).map_or(0, <[u8]>::len);
        assert!(from < length, "nothing to send: {from} of {length}");
        Self { source: Source::Shared { outgoing, encoding, from } }
    }

    /// Several frames, copied together; not empty.
    pub fn batch(bytes: Vec<u8>) -> Self {
        assert!(!bytes.is_empty());
        Self { source: Source::Batch(bytes) }
    }

    /// The batch buffer, if this is one, for reuse.
    pub fn into_batch(self) -> Option<Vec<u8>> {
        match self.source {
            Source::Shared { .. } => None,
            Source::Batch(bytes) => Some(bytes),
        }
    }
}

impl Deref for SendBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.source {
            Source::Shared { outgoing, encoding, from } => {
                &outgoing.bytes(*encoding).unwrap_or_default()[*from..]
            }
            Source::Batch(bytes) => bytes,
        }
    }
}

// SAFETY:
// - They do not move: a batch is in the allocation of its `Vec`, a frame in a `Box` behind the `Rc` (and the `Arc` of
//   an event). Moving the value moves only the pointers to them.
// - A batch does not change: `source` is private, and nothing here borrows it exclusively.
// - A frame does not change: it is reached through a shared reference, the fields of `Outgoing` and `Event` that lead
//   to it are private and have no interior mutability, and `domain` may contain no unsafe code (`tests/tree`). While
//   this `Rc` exists, no other holder gets an exclusive reference. `encoding` and `from` are never assigned.
unsafe impl StableBytes for SendBuffer {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stay_when_the_value_moves_and_others_let_go() {
        let outgoing = Outgoing::own([1, 2, 3].into());
        let buffers = [
            SendBuffer::shared(Rc::clone(&outgoing), Encoding::Binary, 1),
            SendBuffer::batch(vec![2, 3]),
        ];
        let addresses = buffers.each_ref().map(|buffer| buffer.as_ptr());
        drop(outgoing);
        for (buffer, address) in buffers.map(Box::new).iter().zip(addresses) {
            assert_eq!((&buffer[..], buffer.as_ptr()), (&[2, 3][..], address));
        }
    }
}
