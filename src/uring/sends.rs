//! The buffers of the sends in flight.

use slab::Slab;

use super::send_buffer::SendBuffer;
use crate::domain::ids::{ConnectionKey, GENERATION_MAX};

#[derive(Debug)]
struct InFlight {
    connection: ConnectionKey,
    buffer: SendBuffer,
    /// Detects a completion that belongs to another use of this entry. There must be none.
    serial: u32,
}

/// One entry per send in flight, none per connection: an idle connection needs no memory here.
#[derive(Debug)]
pub(super) struct Sends {
    places: Slab<InFlight>,
    serial: u32,
}

impl Sends {
    pub(super) fn new() -> Self {
        Self { places: Slab::new(), serial: 0 }
    }

    /// Keeps the buffer and returns the key under which its completion comes.
    pub(super) fn keep(&mut self, connection: ConnectionKey, buffer: SendBuffer) -> ConnectionKey {
        self.serial = (self.serial + 1) & GENERATION_MAX;
        let place = self.places.insert(InFlight { connection, buffer, serial: self.serial });
        let slot = u32::try_from(place).expect("fewer sends than connections");
        ConnectionKey { slot, generation: self.serial }
    }

    /// The buffer under a key that [`Sends::keep`] returned.
    pub(super) fn buffer(&self, key: ConnectionKey) -> &SendBuffer {
        &self.places[key.slot as usize].buffer
    }

    /// Removes the buffer of a completed send.
    pub(super) fn release(&mut self, key: ConnectionKey) -> (ConnectionKey, SendBuffer) {
        let in_flight = self.places.remove(key.slot as usize);
        assert_eq!(in_flight.serial, key.generation, "a send completed twice");
        (in_flight.connection, in_flight.buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(byte: u8) -> SendBuffer {
        SendBuffer::batch(vec![byte])
    }

    #[test]
    fn each_send_gets_its_own_buffer_back() {
        let connection = |slot| ConnectionKey { slot, generation: 7 };
        let mut sends = Sends::new();
        let first = sends.keep(connection(10), buffer(1));
        let second = sends.keep(connection(11), buffer(2));
        assert_eq!(sends.buffer(first)[..], [1]);
        let (whose, back) = sends.release(second);
        assert_eq!((whose, &back[..]), (connection(11), &[2][..]));
        assert_eq!(sends.release(first).0, connection(10));
    }

    #[test]
    #[should_panic(expected = "completed twice")]
    fn late_completion_does_not_get_the_successors_buffer() {
        let connection = ConnectionKey { slot: 0, generation: 0 };
        let mut sends = Sends::new();
        let old = sends.keep(connection, buffer(1));
        sends.release(old);
        sends.keep(connection, buffer(2));
        sends.release(old);
    }
}
