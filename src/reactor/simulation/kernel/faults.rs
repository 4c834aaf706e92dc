//! The faults that the simulated kernel injects, and how often each has occurred.

use super::*;

/// Probability of each fault, out of 256.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// A request does not complete yet.
    pub late: u8,
    /// A send takes a part of the buffer.
    pub short_send: u8,
    /// A send takes nothing.
    pub zero_send: u8,
    /// A receive takes a part of what fits.
    pub short_receive: u8,
    /// A receive finds no buffer.
    pub no_buffer: u8,
    /// An accept fails.
    pub accept_failure: u8,
    /// A poll for data ends by itself.
    pub poll_ends: u8,
    /// A poll completes although nothing has happened.
    pub spurious: u8,
    /// A request completes when it is made, in the middle of a turn: the submission queue was full.
    pub eager: u8,
    /// A send fails for lack of memory. The connection is sound.
    pub send_memory: u8,
    /// An `enter` returns early (EINTR, EAGAIN, EBUSY): it has submitted a part of the requests, and waited for
    /// nothing.
    pub early_return: u8,
    /// A turn takes long: time has passed when its `enter` is called.
    pub slow_turn: u8,
    /// Size of the completion queue. What does not fit comes after the next `enter`, and ends the poll that it is of.
    /// 0: no bound.
    pub completion_slots: u8,
    /// A socket has room again only when a third of its buffer is free, as in Linux (`sk_stream_is_writeable`).
    pub room_is_a_third: bool,
}

impl SimulatedKernel {
    /// Whether the fault of this name occurs, whose probability is `of_256` / 256. Counts it.
    pub(super) fn fault(&mut self, name: &'static str, of_256: u8) -> bool {
        let occurs = self.random.chance(of_256);
        self.count(name, occurs);
        occurs
    }

    pub(super) fn count(&mut self, name: &'static str, occurs: bool) {
        *self.occurred.entry(name).or_default() += u64::from(occurs);
    }

    /// How often each fault has occurred, by name.
    pub fn occurred(&self) -> &BTreeMap<&'static str, u64> {
        &self.occurred
    }
}
