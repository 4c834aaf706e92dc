//! The encodings of a session's events.

/// The encoding of a session's events. Fixed at the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Encoding {
    /// `realchat.v1`: a binary WebSocket message, the serialized `EventEnvelope`.
    Binary = 0,
    /// The same with permessage-deflate (RFC 7692), without context takeover.
    BinaryDeflate = 1,
    /// `realchat.v1.json`: a text WebSocket message, proto3 JSON with the inner event decoded.
    Json = 2,
    /// The same with permessage-deflate.
    JsonDeflate = 3,
    /// gRPC `Connect`: a serialized `DeliveryEvent` without any frame around it.
    Stream = 4,
}

impl Encoding {
    /// Number of encodings.
    pub const COUNT: usize = 5;

    /// All encodings, in the order of their numbers.
    pub const ALL: [Encoding; Self::COUNT] =
        [Self::Binary, Self::BinaryDeflate, Self::Json, Self::JsonDeflate, Self::Stream];

    /// Index into per-encoding tables.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The encoding that replaces this one where compression does not pay: a session with
    /// permessage-deflate may receive any single message uncompressed (RFC 7692 §6).
    pub fn uncompressed(self) -> Encoding {
        match self {
            Self::Binary | Self::BinaryDeflate => Self::Binary,
            Self::Json | Self::JsonDeflate => Self::Json,
            Self::Stream => Self::Stream,
        }
    }
}

/// A set of encodings, such as those among the recipients of one event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodingSet(u8);

impl EncodingSet {
    /// Adds an encoding.
    pub fn insert(&mut self, encoding: Encoding) {
        self.0 |= 1 << encoding.index();
    }

    /// Whether the set contains an encoding.
    pub fn contains(self, encoding: Encoding) -> bool {
        self.0 & (1 << encoding.index()) != 0
    }

    /// Whether the set is empty.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoding_set_distinguishes_its_members() {
        for one in Encoding::ALL {
            let mut set = EncodingSet::default();
            assert!(set.is_empty());
            set.insert(one);
            for other in Encoding::ALL {
                assert_eq!(set.contains(other), one == other);
            }
        }
    }
}
