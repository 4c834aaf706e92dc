//! The completion token: the operation and the connection, encoded in `user_data`. Only this file
//! shifts bits.

use crate::domain::ids::{ConnectionKey, GENERATION_MAX};

/// The operation of a submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Operation {
    Accept = 1,
    PollReadable = 2,
    Receive = 3,
    Send = 4,
    PollWritable = 5,
    CancelPollReadable = 6,
    Shutdown = 7,
    Close = 8,
    WatchDoorbell = 9,
    CancelAccepts = 10,
    CancelEverything = 11,
    Disconnect = 12,
    CancelPollWritable = 13,
}

impl Operation {
    fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Accept,
            2 => Self::PollReadable,
            3 => Self::Receive,
            4 => Self::Send,
            5 => Self::PollWritable,
            6 => Self::CancelPollReadable,
            7 => Self::Shutdown,
            8 => Self::Close,
            9 => Self::WatchDoorbell,
            10 => Self::CancelAccepts,
            11 => Self::CancelEverything,
            12 => Self::Disconnect,
            13 => Self::CancelPollWritable,
            _ => return None,
        })
    }

    /// Whether one submission gets any number of completions.
    pub(super) fn is_multishot(self) -> bool {
        matches!(self, Self::PollReadable | Self::WatchDoorbell)
    }
}

/// `user_data`: `| operation: 8 | generation: 24 | slot: 32 |`
///
/// For [`Operation::Send`] the key is an entry of the ring's table of buffers in flight, which holds
/// the connection. Operations on no connection carry [`Token::NO_CONNECTION`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) operation: Operation,
    pub(super) key: ConnectionKey,
}

impl Token {
    /// The key of an operation that is not about a connection.
    pub(super) const NO_CONNECTION: ConnectionKey = ConnectionKey { slot: u32::MAX, generation: 0 };

    pub(super) fn encode(self) -> u64 {
        assert!(self.key.generation <= GENERATION_MAX);
        (u64::from(self.operation as u8) << 56)
            | (u64::from(self.key.generation) << 32)
            | u64::from(self.key.slot)
    }

    /// `None`: not a token of this program.
    pub(super) fn decode(raw: u64) -> Option<Self> {
        let operation = Operation::from_number((raw >> 56) as u8)?;
        let generation = (raw >> 32) as u32 & GENERATION_MAX;
        Some(Self { operation, key: ConnectionKey { slot: raw as u32, generation } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn layout_matches_the_diagram() {
        let key = ConnectionKey { slot: 0x89ab_cdef, generation: 0x12_3456 };
        let token = Token { operation: Operation::Close, key };
        assert_eq!(token.encode(), 0x0812_3456_89ab_cdef);
        assert_eq!(Token::decode(0), None);
        assert_eq!(Token::decode(u64::MAX), None);
    }

    proptest! {
        #[test]
        fn decode_inverts_encode(number in 1_u8..=13, slot: u32, generation in 0..=GENERATION_MAX) {
            let operation = Operation::from_number(number).unwrap();
            prop_assert_eq!(operation as u8, number);
            let token = Token { operation, key: ConnectionKey { slot, generation } };
            prop_assert_eq!(Token::decode(token.encode()), Some(token));
        }
    }
}
