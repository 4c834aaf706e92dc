//! What a completion says of itself: which operation, on which connection. Only this file shifts
//! bits.

use crate::domain::ids::{ConnectionKey, GENERATION_MAX};

/// What was asked of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Operation {
    Accept = 1,
    Watch = 2,
    Receive = 3,
    Send = 4,
    AwaitWritable = 5,
    CancelWatch = 6,
    Shutdown = 7,
    Close = 8,
    WatchDoorbell = 9,
    CancelAccepts = 10,
    CancelEverything = 11,
    Dissolve = 12,
    CancelWait = 13,
}

impl Operation {
    fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Accept,
            2 => Self::Watch,
            3 => Self::Receive,
            4 => Self::Send,
            5 => Self::AwaitWritable,
            6 => Self::CancelWatch,
            7 => Self::Shutdown,
            8 => Self::Close,
            9 => Self::WatchDoorbell,
            10 => Self::CancelAccepts,
            11 => Self::CancelEverything,
            12 => Self::Dissolve,
            13 => Self::CancelWait,
            _ => return None,
        })
    }

    /// Whether one submission is answered by any number of completions.
    pub(super) fn is_multishot(self) -> bool {
        matches!(self, Self::Watch | Self::WatchDoorbell)
    }
}

/// `user_data`: `| operation: 8 | generation: 24 | slot: 32 |`
///
/// For a [`Operation::Send`] the key names a place in the ring's table of buffers in flight, which
/// knows the connection. Operations on no connection carry [`Token::NOBODY`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) operation: Operation,
    pub(super) key: ConnectionKey,
}

impl Token {
    /// The key of an operation that concerns no connection.
    pub(super) const NOBODY: ConnectionKey = ConnectionKey { slot: u32::MAX, generation: 0 };

    pub(super) fn encode(self) -> u64 {
        assert!(self.key.generation <= GENERATION_MAX);
        (u64::from(self.operation as u8) << 56)
            | (u64::from(self.key.generation) << 32)
            | u64::from(self.key.slot)
    }

    /// `None`: a token this program never issued.
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
    fn layout_is_what_the_diagram_says() {
        let key = ConnectionKey { slot: 0x89ab_cdef, generation: 0x12_3456 };
        let token = Token { operation: Operation::Close, key };
        assert_eq!(token.encode(), 0x0812_3456_89ab_cdef);
        assert_eq!(Token::decode(0), None);
        assert_eq!(Token::decode(u64::MAX), None);
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(number in 1_u8..=13, slot: u32, generation in 0..=GENERATION_MAX) {
            let operation = Operation::from_number(number).unwrap();
            prop_assert_eq!(operation as u8, number);
            let token = Token { operation, key: ConnectionKey { slot, generation } };
            prop_assert_eq!(Token::decode(token.encode()), Some(token));
        }
    }
}
