//! The clients of the simulated cluster, and the promise: a session gets every record that concerns it and
//! was appended from its 101 on, once, in the order of its conversation, and nothing of a conversation after one that
//! it missed.

use std::collections::BTreeMap;

use super::logs::{Device, Logs, PARTITIONS};
use super::returning::ReturningSession;

/// A client, while it is connected.
pub(super) struct ClusterClient {
    /// The process that it is connected to.
    pub(super) life: u64,
    pub(super) slot: u32,
    /// The ends of the partitions at its 101.
    pub(super) ends: [i64; PARTITIONS],
    pub(super) got: [Vec<i64>; PARTITIONS],
    /// If it keeps a cursor.
    pub(super) returning: Option<ReturningSession>,
}

impl ClusterClient {
    /// Checks what the client got until now. Returns the first record that it has not got, by partition.
    pub(super) fn check(&self, (user, device): Device, logs: &Logs) -> [Option<i64>; PARTITIONS] {
        std::array::from_fn(|partition| {
            let (got, end) = (&self.got[partition], self.ends[partition]);
            let name = || {
                format!(
                    "user {user}, device {device} in slot {} of process {}, partition {partition} \
                     (101 at {end})",
                    self.slot, self.life
                )
            };
            let all = logs.concerned(partition, 0, user);
            let foreign = got.iter().find(|offset| all.binary_search(offset).is_err());
            assert!(foreign.is_none(), "{}: {foreign:?} does not concern it", name());
            let by_conversation = |offsets: &[i64]| -> BTreeMap<usize, Vec<i64>> {
                let mut found = BTreeMap::<usize, Vec<i64>>::new();
                for (offset, conversation) in logs.conversations_of(partition, offsets) {
                    found.entry(conversation).or_default().push(offset);
                }
                found
            };
            let needed = by_conversation(logs.concerned(partition, end, user));
            let got = by_conversation(got);
            for got in got.values() {
                let order = got.windows(2).find(|pair| pair[0] >= pair[1]);
                assert!(order.is_none(), "{}: {order:?} out of order or twice", name());
            }
            let missed = needed.iter().filter_map(|(conversation, needed)| {
                let got = got.get(conversation).map_or(&[][..], |got| got);
                let got = &got[got.partition_point(|offset| *offset < end)..];
                let hole = got.iter().zip(needed).find(|(got, needed)| got != needed);
                assert!(
                    hole.is_none(),
                    "{}: got {:?} without {:?}",
                    name(),
                    hole.unwrap().0,
                    hole.unwrap().1
                );
                needed.get(got.len()).copied()
            });
            missed.min()
        })
    }
}
