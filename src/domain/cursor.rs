//! Cursors: positions of the log that a client gets, and returns with.
//!
//! A cursor means: everything for its user before these positions was sent to the session before the
//! cursor. For a client it is opaque: text without padding in base64url, or the bytes themselves (gRPC).
//!
//! ```text
//!  version 1 │ per topic: id 4 │ partitions, varint │ per partition: next offset, varint │ check 4 │ … │ CRC-32C 4
//! ```
//!
//! Topics ascend by id; partitions are those from 0 without a hole. Numbers of four bytes are big-endian, a
//! varint is LEB128 in its shortest form. So each cursor has exactly one encoding.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use crc::{CRC_32_ISCSI, Crc};

/// Positions in one cursor. As text it then has at most 25 kB, with usual offsets 14 kB, and fits into a
/// client message beside the sequences of several hundred conversations.
pub const POSITIONS_MAX: usize = 1024;
/// The longest encoded cursor, bytes.
pub const CURSOR_BYTES_MAX: usize = 1 + POSITIONS_MAX * (4 + 1 + 9 + 4) + 4;

const VERSION: u8 = 1;

/// A topic in a cursor: a hash of its name, the same on every node and in every build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicId(pub u32);

impl TopicId {
    /// The id of the topic of this name.
    pub fn of(name: &str) -> Self {
        Self(crc32c(&[name.as_bytes()]))
    }
}

/// A position in one partition of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogPosition {
    /// The topic.
    pub topic: TopicId,
    /// The partition.
    pub partition: u32,
    /// The first offset that is not covered, 0 or more. Every record below it was given to all shards.
    pub next: i64,
    /// [`record_check`] of the record right before `next`; for `next` 0 [`start_check`]. Or [`UNCHECKED`].
    pub check: u32,
}

/// The check of a position whose preceding record is not known.
pub const UNCHECKED: u32 = 0;

/// Recognises a record: a hash of its append time (Unix time in ms) and its key. A topic that was deleted
/// and created again has another record at the same offset. Never [`UNCHECKED`].
pub fn record_check(appended_at_ms: u64, key: Option<&[u8]>) -> u32 {
    let has_key = [u8::from(key.is_some())];
    crc32c(&[&appended_at_ms.to_be_bytes(), &has_key, key.unwrap_or_default()]).max(1)
}

/// The check of position 0, which no record precedes: it recognises the node that has been reading the partition since
/// this time (Unix time in ms), and would have noticed if its topic had been created again. Never [`UNCHECKED`].
pub fn start_check(read_since_ms: u64) -> u32 {
    record_check(read_since_ms, Some(b"start"))
}

/// Whether a position is of the log of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verified {
    /// It is.
    Yes,
    /// Nothing shows it. Another position of the same topic may: all partitions of a topic are created together.
    NotKnown,
    /// Nothing shows it, but the partition was empty and still is.
    Needless,
    /// It is of another log.
    No,
}

impl Verified {
    /// Compares the check of a cursor for the position `next` with that of a node, which has read the partition up to
    /// `end`.
    pub fn of(next: i64, theirs: u32, ours: u32, end: i64) -> Self {
        match (theirs, ours) {
            (theirs, ours) if theirs == ours && theirs != UNCHECKED => Self::Yes,
            _ if end == 0 => Self::Needless,
            (UNCHECKED, _) | (_, UNCHECKED) => Self::NotKnown,
            // Of another node, or of one that has been restarted since.
            _ if next == 0 => Self::NotKnown,
            _ => Self::No,
        }
    }
}

/// Why a cursor cannot be used. The client is told, and caught up by `last_sequences`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CursorExpired {
    /// It is no cursor, or was changed on its way.
    Malformed,
    /// Another version of this program made it.
    OtherVersion,
    /// It begins before the records that the nodes keep in memory.
    TooOld,
    /// Its topic was deleted and created again, or its log was truncated: another record is before a position.
    OtherLog,
    /// A topic is read now that is not in it.
    NewTopic,
    /// This node keeps no records in memory.
    NotSupported,
    /// A node of the cluster runs an older version that does not know cursors.
    OlderNode,
    /// The nodes dropped records while the session was taking them: its client reads too slowly, or too
    /// much was missed.
    Overtaken,
    /// This node has just started, and the members of the conversations that it did not route itself cannot be
    /// fetched.
    MembersUnknown,
    /// Nothing shows that it is of this log: in no partition of a topic does the node know the record before the
    /// position, or its log ends before a position.
    Unverified,
}

impl CursorExpired {
    /// Number of reasons.
    pub const COUNT: usize = 10;

    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Malformed,
        Self::OtherVersion,
        Self::TooOld,
        Self::OtherLog,
        Self::NewTopic,
        Self::NotSupported,
        Self::OlderNode,
        Self::Overtaken,
        Self::MembersUnknown,
        Self::Unverified,
    ];

    /// The metric label, and the text for the client.
    pub fn label(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::OtherVersion => "other_version",
            Self::TooOld => "too_old",
            Self::OtherLog => "other_log",
            Self::NewTopic => "new_topic",
            Self::NotSupported => "not_supported",
            Self::OlderNode => "older_node",
            Self::Overtaken => "overtaken",
            Self::MembersUnknown => "members_unknown",
            Self::Unverified => "unverified",
        }
    }
}

/// Positions of all partitions of all topics, sorted by topic and partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor(Box<[LogPosition]>);

impl Cursor {
    /// A cursor of these positions, sorted by topic and partition, none twice. Positions behind a missing
    /// partition are left out: their records are replayed from the beginning of the partition, or the
    /// cursor counts as expired. `None`: there are no positions, or more than [`POSITIONS_MAX`].
    pub fn of_sorted(positions: &[LogPosition]) -> Option<Self> {
        let by_topic = positions.chunk_by(|a, b| a.topic == b.topic);
        let without_holes = by_topic.flat_map(|partitions| {
            let numbered = (0..).zip(partitions);
            numbered.take_while(|(number, it)| it.partition == *number).map(|(_, it)| *it)
        });
        let kept: Box<[LogPosition]> = without_holes.collect();
        (1..=POSITIONS_MAX).contains(&kept.len()).then_some(Self(kept))
    }

    /// The positions, sorted by topic and partition.
    pub fn positions(&self) -> &[LogPosition] {
        &self.0
    }

    /// Whether it has positions of this topic.
    pub fn has_topic(&self, topic: TopicId) -> bool {
        self.0.binary_search_by_key(&(topic, 0), |it| (it.topic, it.partition)).is_ok()
    }

    /// The position of a partition. `None`: its records are wanted from offset 0, if the cursor has the
    /// topic at all.
    pub fn get(&self, topic: TopicId, partition: u32) -> Option<LogPosition> {
        let found = self.0.binary_search_by_key(&(topic, partition), |it| (it.topic, it.partition));
        found.ok().map(|index| self.0[index])
    }

    /// The bytes of a cursor.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        for partitions in self.0.chunk_by(|a, b| a.topic == b.topic) {
            bytes.extend_from_slice(&partitions[0].topic.0.to_be_bytes());
            put_varint(&mut bytes, partitions.len() as u64);
            for position in partitions {
                put_varint(&mut bytes, position.next as u64);
                bytes.extend_from_slice(&position.check.to_be_bytes());
            }
        }
        let sum = crc32c(&[&bytes]);
        bytes.extend_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// Decodes the bytes of a cursor. Accepts only what [`Cursor::encode`] returns.
    ///
    /// # Errors
    /// [`CursorExpired::Malformed`] or [`CursorExpired::OtherVersion`].
    pub fn decode(bytes: &[u8]) -> Result<Self, CursorExpired> {
        match bytes.first() {
            None => return Err(CursorExpired::Malformed),
            Some(&VERSION) => {}
            Some(_) => return Err(CursorExpired::OtherVersion),
        }
        decode_version_1(bytes).ok_or(CursorExpired::Malformed)
    }

    /// The text of a cursor: base64url without padding.
    pub fn to_text(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.encode())
    }

    /// Decodes the text of a cursor.
    ///
    /// # Errors
    /// As for [`Cursor::decode`].
    pub fn from_text(text: &str) -> Result<Self, CursorExpired> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| CursorExpired::Malformed)?;
        Self::decode(&bytes)
    }
}

/// What a client that wants cursors says of the one that it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CursorRequest {
    /// It has none yet.
    First,
    /// It has everything before this one.
    Since(Cursor),
    /// It has one that cannot be decoded.
    Unusable(CursorExpired),
}

impl CursorRequest {
    /// The request with this text. An empty text is none, for clients that cannot send `null`.
    pub fn of_text(text: Option<&str>) -> Self {
        match text {
            None | Some("") => Self::First,
            Some(text) => Cursor::from_text(text).map_or_else(Self::Unusable, Self::Since),
        }
    }

    /// The request with these bytes. Empty bytes are none.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        match bytes {
            [] => Self::First,
            bytes => Cursor::decode(bytes).map_or_else(Self::Unusable, Self::Since),
        }
    }
}

fn decode_version_1(bytes: &[u8]) -> Option<Cursor> {
    if bytes.len() > CURSOR_BYTES_MAX {
        return None;
    }
    let (body, sum) = bytes.split_last_chunk::<4>()?;
    if crc32c(&[body]) != u32::from_be_bytes(*sum) {
        return None;
    }
    let mut rest = body.split_first()?.1;
    let mut positions: Vec<LogPosition> = Vec::new();
    while !rest.is_empty() {
        let topic = TopicId(take_u32(&mut rest)?);
        let partitions = usize::try_from(take_varint(&mut rest)?).ok()?;
        let ascends = positions.last().is_none_or(|last| last.topic < topic);
        if !ascends || partitions == 0 || partitions > POSITIONS_MAX - positions.len() {
            return None;
        }
        for partition in 0..partitions as u32 {
            let next = i64::try_from(take_varint(&mut rest)?).ok()?;
            let check = take_u32(&mut rest)?;
            positions.push(LogPosition { topic, partition, next, check });
        }
    }
    Cursor::of_sorted(&positions)
}

/// The newest position of each partition that the routers have given to a shard.
#[derive(Debug, Default)]
pub struct RoutedPositions {
    /// Sorted by topic and partition.
    positions: Vec<LogPosition>,
    version: u64,
}

impl RoutedPositions {
    /// Notes positions. Each replaces an earlier one of its partition.
    ///
    /// # Panics
    /// If an offset is negative.
    pub fn update(&mut self, newer: &[LogPosition]) {
        for position in newer {
            assert!(position.next >= 0, "offsets begin at 0");
            let key = (position.topic, position.partition);
            match self.positions.binary_search_by_key(&key, |it| (it.topic, it.partition)) {
                Ok(index) if self.positions[index] == *position => continue,
                Ok(index) => self.positions[index] = *position,
                Err(index) => self.positions.insert(index, *position),
            }
            self.version += 1;
        }
    }

    /// Changes with every change of a position; 0: there are none yet.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The cursor of these positions. `None`: there are none, or more than [`POSITIONS_MAX`].
    pub fn cursor(&self) -> Option<Cursor> {
        Cursor::of_sorted(&self.positions)
    }
}

fn take_u32(rest: &mut &[u8]) -> Option<u32> {
    let (number, after) = rest.split_first_chunk::<4>()?;
    *rest = after;
    Some(u32::from_be_bytes(*number))
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// `None`: it is incomplete, has more than 63 bits, or is not in its shortest form.
fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for index in 0..9 {
        let (byte, after) = rest.split_first()?;
        *rest = after;
        value |= u64::from(byte & 0x7F) << (7 * index);
        if byte & 0x80 == 0 {
            return (index == 0 || *byte != 0).then_some(value);
        }
    }
    None
}

/// CRC-32C, RFC 3720 §12.1.
static CRC_32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// CRC-32C of these pieces, one after the other.
fn crc32c(pieces: &[&[u8]]) -> u32 {
    let mut digest = CRC_32C.digest();
    pieces.iter().for_each(|piece| digest.update(piece));
    digest.finalize()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use proptest::prelude::*;

    fn at(topic: u32, partition: u32, next: i64) -> LogPosition {
        LogPosition { topic: TopicId(topic), partition, next, check: next as u32 ^ 0xABCD }
    }

    /// RFC 3720 §B.4.
    #[test]
    fn checksum_is_crc_32c() {
        assert_eq!(crc32c(&[b"123456789"]), 0xE306_9283);
        assert_eq!(crc32c(&[&[0; 32]]), 0x8A91_36AA);
        assert_eq!(crc32c(&[b"1234", b"", b"56789"]), crc32c(&[b"123456789"]));
    }

    #[test]
    fn golden_bytes() {
        let topic = TopicId::of("message.events");
        assert_eq!(topic, TopicId(0xF7CA_6744));
        let first = LogPosition { topic, partition: 0, next: 300, check: 0x0102_0304 };
        let second = LogPosition { topic, partition: 1, next: 0, check: UNCHECKED };
        let cursor = Cursor::of_sorted(&[first, second]).unwrap();
        let body = b"\x01\xF7\xCA\x67\x44\x02\xAC\x02\x01\x02\x03\x04\x00\x00\x00\x00\x00";
        let bytes = cursor.encode();
        assert_eq!(bytes[..body.len()], body[..]);
        assert_eq!(cursor.to_text(), "AffKZ0QCrAIBAgMEAAAAAAB3JqXs");
        assert_eq!(Cursor::from_text("AffKZ0QCrAIBAgMEAAAAAAB3JqXs"), Ok(cursor));
    }

    /// RFC 0002: “64 partitions: 586 bytes, as base64url 782”.
    #[test]
    fn size_is_as_documented() {
        for (partitions, bytes, text) in [(64, 586, 782), (256, 2_315, 3_087)] {
            let positions: Vec<_> = (0..partitions).map(|it| at(1, it, 1_000_000_000)).collect();
            let cursor = Cursor::of_sorted(&positions).unwrap();
            assert_eq!((cursor.encode().len(), cursor.to_text().len()), (bytes, text));
        }
        let most: Vec<_> = (0..POSITIONS_MAX as u32).map(|it| at(it, 0, i64::MAX)).collect();
        let longest = Cursor::of_sorted(&most).unwrap();
        assert_eq!(longest.encode().len(), CURSOR_BYTES_MAX);
        assert_eq!(Cursor::decode(&longest.encode()), Ok(longest));
        let more: Vec<_> = (0..=POSITIONS_MAX as u32).map(|it| at(it, 0, 1)).collect();
        assert_eq!(Cursor::of_sorted(&more), None);
    }

    #[test]
    fn anything_else_is_malformed() {
        let cursor = Cursor::of_sorted(&[at(1, 0, 5), at(2, 0, 6)]).unwrap();
        let bytes = cursor.encode();
        for end in 0..bytes.len() {
            assert_eq!(Cursor::decode(&bytes[..end]), Err(CursorExpired::Malformed), "{end}");
        }
        for (index, bit) in (0..bytes.len()).flat_map(|index| (0..8).map(move |bit| (index, bit))) {
            let mut changed = bytes.clone();
            changed[index] ^= 1 << bit;
            assert!(Cursor::decode(&changed).is_err(), "bit {bit} of byte {index}");
        }
        for text in ["", "x", "AQ", "?", "A Q", &format!("{}=", cursor.to_text())] {
            assert_eq!(Cursor::from_text(text), Err(CursorExpired::Malformed), "{text}");
        }
        assert_eq!(Cursor::decode(&[2, 1, 2, 3]), Err(CursorExpired::OtherVersion));
    }

    #[test]
    fn body_that_is_not_canonical_is_malformed() {
        let bodies: [&[u8]; 7] = [
            b"\x01",                                                               // no topic
            b"\x01\0\0\0\x01\0",                                                   // no partition
            b"\x01\0\0\0\x01\x01\x80\0\0\0\0\0", // a longer form of 0
            b"\x01\0\0\0\x01\x01\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01\0\0\0\0", // 64 bits
            b"\x01\0\0\0\x02\x01\x05\0\0\0\0\0\0\0\x01\x01\x05\0\0\0\0", // topics descend
            b"\x01\0\0\0\x01\x01\x05\0\0\0\0\0\0\0\x01\x01\x05\0\0\0\0", // a topic twice
            b"\x01\0\0\0\x01\xFF\xFF\xFF\xFF\x0F\x05\0\0\0\0", // too many partitions
        ];
        for body in bodies {
            let bytes = [body, &crc32c(&[body]).to_be_bytes()].concat();
            assert_eq!(Cursor::decode(&bytes), Err(CursorExpired::Malformed), "{body:?}");
        }
    }

    #[test]
    fn positions_behind_a_missing_partition_are_left_out() {
        let mut routed = RoutedPositions::default();
        assert_eq!((routed.cursor(), routed.version()), (None, 0));
        routed.update(&[at(2, 2, 9), at(2, 0, 5), at(1, 1, 3)]);
        let cursor = routed.cursor().unwrap();
        assert_eq!(cursor.positions(), [at(2, 0, 5)]);
        assert!(cursor.has_topic(TopicId(2)) && !cursor.has_topic(TopicId(1)));
        routed.update(&[at(2, 1, 1), at(1, 0, 1)]);
        let all = [at(1, 0, 1), at(1, 1, 3), at(2, 0, 5), at(2, 1, 1), at(2, 2, 9)];
        assert_eq!(routed.cursor().unwrap().positions(), all);
        let version = routed.version();
        routed.update(&[at(2, 1, 1)]);
        assert_eq!(routed.version(), version, "nothing has changed");
    }

    #[test]
    fn record_is_recognised_by_its_time_and_key() {
        let check = record_check(1_000, Some(b"c"));
        assert_eq!(check, record_check(1_000, Some(b"c")));
        let others = [record_check(1_001, Some(b"c")), record_check(1_000, Some(b"d"))];
        assert!(!others.contains(&check));
        assert_ne!(record_check(1_000, None), record_check(1_000, Some(b"")));
    }

    #[test]
    fn reasons_are_in_the_order_of_their_numbers() {
        for (number, reason) in CursorExpired::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, number);
        }
    }

    fn any_positions() -> impl Strategy<Value = Vec<LogPosition>> {
        let topic = prop::collection::vec((0..=i64::MAX, any::<u32>()), 1..20);
        prop::collection::btree_map(any::<u32>(), topic, 1..8).prop_map(|topics| {
            let of_topic =
                |(topic, all): (u32, Vec<(i64, u32)>)| {
                    let numbered = (0..).zip(all).map(move |(partition, (next, check))| {
                        LogPosition { topic: TopicId(topic), partition, next, check }
                    });
                    numbered.collect::<Vec<_>>()
                };
            topics.into_iter().flat_map(of_topic).collect()
        })
    }

    proptest! {
        #[test]
        fn any_cursor_is_decoded_back(positions in any_positions()) {
            let cursor = Cursor::of_sorted(&positions).unwrap();
            prop_assert_eq!(cursor.positions(), &positions);
            prop_assert_eq!(Cursor::decode(&cursor.encode()), Ok(cursor.clone()));
            prop_assert_eq!(Cursor::from_text(&cursor.to_text()), Ok(cursor));
        }

        #[test]
        fn no_bytes_cause_a_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Cursor::decode(&bytes);
            bytes.insert(0, VERSION);
            bytes.extend(crc32c(&[&bytes]).to_be_bytes());
            if let Ok(cursor) = Cursor::decode(&bytes) {
                prop_assert_eq!(cursor.encode(), bytes);
            }
        }

        #[test]
        fn newest_position_of_each_partition_counts(
            all in prop::collection::vec((0..3u32, 0..4u32, 0..100i64), 1..60),
        ) {
            let mut routed = RoutedPositions::default();
            let mut oracle = BTreeMap::new();
            for (topic, partition, next) in all {
                routed.update(&[at(topic, partition, next)]);
                oracle.insert((topic, partition), next);
            }
            for (&(topic, partition), &next) in &oracle {
                let is_behind_hole = (0..partition).any(|it| !oracle.contains_key(&(topic, it)));
                let expected = (!is_behind_hole).then_some(at(topic, partition, next));
                let cursor = routed.cursor();
                let found = cursor.and_then(|it| it.get(TopicId(topic), partition));
                prop_assert_eq!(found, expected);
            }
        }
    }
}
