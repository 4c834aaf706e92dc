//! The nodes of the cluster, as their leases say, and the clock that all of them derive from the log.
//!
//! # The clock
//!
//! A lease is renewed every 2 s. All nodes derive one clock from the append times in the sessions topic: it advances by
//! the difference between two records, but never by more than two renewal intervals at once, and never backwards. A
//! lease whose last renewal is `NODE_TIMEOUT` behind this clock is dead, for every reader at the same position of the
//! log. So neither an outage of Kafka nor a jump of a broker's clock ends a lease, and a node learns of its own death
//! where all others do: it closes the sessions of the dead epoch with 4409 and takes a new epoch. A tombstone of a
//! lease ends the epoch at once.
//!
//! An epoch without a lease is not silent. Compaction keeps the last lease of a node, behind its sessions, so a reader
//! that starts late meets sessions first. Until it has met the leases of all, its table is not whole, and no owner uses
//! it. Only from then on silence counts, because leases of a living node can be compacted ahead of a slow reader.
//!
//! So a reader in its first pass can take a node for alive that was silent, if that goes on later. The others see a
//! lease of an epoch that has ended for them, and answer it with a tombstone, so that it ends for all.
//!
//! # Names in use
//!
//! A node that finds a lease of its own `INSTANCE_ID` waits for three renewal intervals. If the other one renews, it
//! refuses to start and names it. Otherwise its leases say which epoch it `replaces`, and that epoch is dead.
//!
//! Readers decide between two epochs of one instance from the leases alone, which say who knew whom, because compaction
//! leaves only the last lease of each, in any order:
//!
//! 1. Of two epochs of one process the later one (`number`) lives.
//! 2. The one that `replaces` the other lives. So does the one that had read the first lease of the other (`since`)
//!    when its epoch began (`as_of`): it knew of the other one, and that it was gone. (The last lease says nothing: a
//!    node that was gone can store one late.)
//! 3. Otherwise they began at the same time: the one whose first lease has the lower offset (`since`) lives. The other
//!    one is refused, and stops.

use std::collections::HashMap;

use super::ports::NodeEpoch;
use super::wire::Lease;

/// Time between two renewals of a lease, ms.
pub const RENEWAL_MS: i64 = 2_000;
/// The clock advances by at most this much between two records, ms: no record for longer means that no
/// node could write.
const STEP_MAX_MS: i64 = 2 * RENEWAL_MS;

/// A small number for a node, which table entries hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeIndex(pub u16);

/// Why an epoch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EpochEnd {
    /// The node has stopped.
    Stopped,
    /// The node has not renewed its lease in time.
    Silent,
    /// Another process with the same instance has taken its place.
    Replaced,
    /// Another process with the same instance was there before.
    Refused,
    /// The node does not know what happened to it: records were removed before it read them.
    Lost,
}

/// What is known of an epoch.
#[derive(Clone, Debug)]
pub struct NodeInfo {
    /// Its index.
    pub index: NodeIndex,
    /// Its lease. `None` before it is read: compaction moves leases behind sessions.
    pub lease: Option<Lease>,
    /// Leases that were read.
    pub renewals: u64,
    /// The offset of its first lease.
    since: i64,
    /// The clock of the log at the last renewal, ms.
    renewed_at_ms: i64,
}

impl NodeInfo {
    /// The offset of its first lease.
    pub fn since(&self) -> i64 {
        self.since
    }
}

/// The living nodes.
#[derive(Debug, Default)]
pub struct LivingNodes {
    clock_ms: i64,
    last_append_ms: Option<i64>,
    living: HashMap<NodeEpoch, NodeInfo>,
    /// Epochs that have ended; what a stalled node still writes under them is ignored.
    ended: HashMap<NodeEpoch, EpochEnd>,
    /// Indices that can be used again.
    free: Vec<NodeIndex>,
    indices: u16,
}

impl LivingNodes {
    /// Takes the append time of the next record.
    pub fn tick(&mut self, appended_at_ms: i64) {
        if let Some(last) = self.last_append_ms {
            self.clock_ms += (appended_at_ms - last).clamp(0, STEP_MAX_MS);
        }
        self.last_append_ms = Some(appended_at_ms);
    }

    /// The clock of the log, ms since the first record read.
    pub fn clock_ms(&self) -> i64 {
        self.clock_ms
    }

    /// A living epoch.
    pub fn get(&self, epoch: NodeEpoch) -> Option<&NodeInfo> {
        self.living.get(&epoch)
    }

    /// All living epochs.
    pub fn living(&self) -> impl Iterator<Item = (NodeEpoch, &NodeInfo)> {
        self.living.iter().map(|(epoch, info)| (*epoch, info))
    }

    /// How an epoch has ended.
    pub fn ended(&self, epoch: NodeEpoch) -> Option<EpochEnd> {
        self.ended.get(&epoch).copied()
    }

    /// The index of an epoch, which is new if none of its records was read before. `None`: it has ended,
    /// or there are 65,535 nodes.
    pub fn index(&mut self, epoch: NodeEpoch) -> Option<NodeIndex> {
        if let Some(info) = self.living.get(&epoch) {
            return Some(info.index);
        }
        if self.ended.contains_key(&epoch) {
            return None;
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let index = NodeIndex(self.indices);
                self.indices = self.indices.checked_add(1)?;
                index
            }
        };
        let info =
            NodeInfo { index, lease: None, renewals: 0, since: 0, renewed_at_ms: self.clock_ms };
        self.living.insert(epoch, info);
        Some(index)
    }

    /// The lease at this offset was read. Returns the epoch that it ends: another one of the same instance, or
    /// its own.
    pub fn renewed(
        &mut self,
        epoch: NodeEpoch,
        offset: i64,
        lease: Lease,
    ) -> Option<(NodeEpoch, EpochEnd)> {
        self.index(epoch)?;
        let since = if lease.since == 0 { offset } else { lease.since };
        let mut ends = None;
        if self.living[&epoch].lease.is_none()
            && let Some((rival, why)) = self.rival(epoch, &lease, since)
        {
            if rival == epoch {
                return Some((epoch, why));
            }
            ends = Some((rival, why));
        }
        let clock_ms = self.clock_ms;
        let info = self.living.get_mut(&epoch).expect("indexed above");
        info.lease = Some(lease);
        info.since = since;
        info.renewals += 1;
        info.renewed_at_ms = clock_ms;
        ends
    }

    /// Which of two epochs of one instance ends, now that the first lease of one is read. It need not be the
    /// first that was stored: compaction leaves only the last. So the leases themselves say who knew whom, and
    /// who was first.
    fn rival(&self, epoch: NodeEpoch, lease: &Lease, since: i64) -> Option<(NodeEpoch, EpochEnd)> {
        let (other, info, its) = self.living().find_map(|(other, info)| {
            let its = info.lease.as_ref().filter(|its| its.instance == lease.instance)?;
            (other != epoch).then_some((other, info, its))
        })?;
        if lease.process != 0 && lease.process == its.process {
            // Leases of the former epoch can be stored after the next one has begun.
            let former = if its.number < lease.number { other } else { epoch };
            return Some((former, EpochEnd::Replaced));
        }
        Some(if lease.replaces == other.0 || info.since < lease.as_of {
            // The node knew of the other one, and that it was gone.
            (other, EpochEnd::Replaced)
        } else if its.replaces == epoch.0 || since < its.as_of {
            (epoch, EpochEnd::Replaced)
        } else if since < info.since {
            (other, EpochEnd::Refused)
        } else {
            (epoch, EpochEnd::Refused)
        })
    }

    /// The first pass is at its end: from now on all nodes have to renew their leases.
    pub fn renew_all(&mut self) {
        let clock_ms = self.clock_ms;
        self.living.values_mut().for_each(|info| info.renewed_at_ms = clock_ms);
    }

    /// The epochs of which sessions were read, but no lease.
    pub fn unleased(&self) -> impl Iterator<Item = NodeEpoch> {
        self.living().filter(|(_, info)| info.lease.is_none()).map(|(epoch, _)| epoch)
    }

    /// The epochs whose last renewal is longer ago than `timeout_ms`. Those without a lease are not among
    /// them: compaction has removed their earlier leases, and the last one is still to come.
    pub fn silent(&self, timeout_ms: i64) -> Vec<(NodeEpoch, EpochEnd)> {
        let limit = self.clock_ms - timeout_ms;
        let is_silent = |info: &NodeInfo| info.lease.is_some() && info.renewed_at_ms < limit;
        let silent = self.living().filter(|(_, info)| is_silent(info));
        let mut silent: Vec<_> = silent.map(|(epoch, _)| (epoch, EpochEnd::Silent)).collect();
        silent.sort_unstable_by_key(|(epoch, _)| *epoch);
        silent
    }

    /// Until this clock no epoch can become silent, ms.
    pub fn none_silent_until(&self, timeout_ms: i64) -> i64 {
        let renewed = self.living().filter(|(_, info)| info.lease.is_some());
        let first = renewed.map(|(_, info)| info.renewed_at_ms).min().unwrap_or(self.clock_ms);
        first + timeout_ms
    }

    /// Ends an epoch. Returns what was known of it, if it was alive. Its index is not used again before
    /// [`LivingNodes::free`].
    pub fn end(&mut self, epoch: NodeEpoch, why: EpochEnd) -> Option<NodeInfo> {
        self.ended.entry(epoch).or_insert(why);
        self.living.remove(&epoch)
    }

    /// No table entry holds the index any more.
    pub fn free(&mut self, index: NodeIndex) {
        self.free.push(index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(instance: &str, replaces: u64) -> Lease {
        Lease { instance: instance.into(), replaces, ..Lease::default() }
    }

    const A: NodeEpoch = NodeEpoch(1);
    const B: NodeEpoch = NodeEpoch(2);
    const TIMEOUT: i64 = 60_000;

    #[test]
    fn silent_node_ends_by_the_time_of_the_others() {
        let mut nodes = LivingNodes::default();
        nodes.tick(0);
        assert_eq!(nodes.renewed(A, 0, lease("a", 0)), None);
        for second in (0..=60).step_by(2) {
            nodes.tick(second * 1_000);
            assert_eq!(nodes.renewed(B, 1, lease("b", 0)), None);
            assert!(nodes.silent(TIMEOUT).is_empty(), "second {second}");
        }
        nodes.tick(62_000);
        assert_eq!(nodes.silent(TIMEOUT), [(A, EpochEnd::Silent)]);
    }

    /// Promise: “An outage of Kafka ends no lease, and neither does a jump of a clock.”
    #[test]
    fn outage_of_the_log_and_jumps_of_its_clock_end_no_lease() {
        let mut nodes = LivingNodes::default();
        let mut now = 1_000_000;
        for round in 0..10 {
            for epoch in [A, B] {
                nodes.tick(now);
                assert_eq!(nodes.renewed(epoch, 0, lease(&epoch.0.to_string(), 0)), None);
                assert!(nodes.silent(TIMEOUT).is_empty(), "round {round}");
                now += 10;
            }
            now += if round % 2 == 0 { 600_000 } else { -900_000 };
        }
    }

    #[test]
    fn second_node_of_an_instance_is_refused_unless_it_replaces_the_first() {
        let mut nodes = LivingNodes::default();
        assert_eq!(nodes.renewed(A, 5, lease("a", 0)), None);
        assert_eq!(nodes.renewed(B, 6, lease("a", 0)), Some((B, EpochEnd::Refused)));
        nodes.end(B, EpochEnd::Refused);
        assert_eq!(nodes.renewed(B, 7, lease("a", A.0)), None, "an ended epoch is ignored");
        let third = NodeEpoch(3);
        assert_eq!(nodes.renewed(third, 8, lease("a", A.0)), Some((A, EpochEnd::Replaced)));
        nodes.end(A, EpochEnd::Replaced);
        assert_eq!(nodes.ended(A), Some(EpochEnd::Replaced));
        assert_eq!(nodes.renewed(third, 9, lease("a", A.0)), None);
    }

    /// Of each epoch only the last lease is left.
    #[test]
    fn compaction_does_not_change_who_has_an_instance() {
        let renewed = |replaces, as_of, since| Lease { as_of, since, ..lease("a", replaces) };
        let end_of = |first: (NodeEpoch, i64, Lease), second: (NodeEpoch, i64, Lease)| {
            let mut nodes = LivingNodes::default();
            assert_eq!(nodes.renewed(first.0, first.1, first.2), None);
            nodes.renewed(second.0, second.1, second.2)
        };
        let replaced = end_of((A, 50, renewed(0, 1, 2)), (B, 90, renewed(A.0, 60, 61)));
        assert_eq!(replaced, Some((A, EpochEnd::Replaced)));
        // The one between them has left nothing: it stopped in good order.
        let stale = end_of((A, 50, renewed(0, 1, 2)), (B, 90, renewed(0, 80, 81)));
        assert_eq!(stale, Some((A, EpochEnd::Replaced)));
        // Both began at the same time. The later one gave up, and its only lease is read first.
        let first = end_of((B, 12, renewed(0, 9, 0)), (A, 90, renewed(0, 9, 11)));
        assert_eq!(first, Some((B, EpochEnd::Refused)));
        // Of one process. The last lease of the former epoch is stored last.
        let of_process = |number, lease| Lease { process: A.0, number, ..lease };
        let former = of_process(1, renewed(0, 1, 2));
        let late = end_of((B, 90, of_process(2, renewed(0, 60, 61))), (A, 91, former.clone()));
        assert_eq!(late, Some((A, EpochEnd::Replaced)));
        let early = end_of((A, 70, former), (B, 71, of_process(2, renewed(0, 60, 0))));
        assert_eq!(early, Some((A, EpochEnd::Replaced)));
        // A woken node has stored a late lease behind the first one of its successor, which did not find it
        // in its table any more.
        let late = end_of((B, 60, renewed(0, 50, 0)), (A, 61, renewed(0, 1, 2)));
        assert_eq!(late, Some((A, EpochEnd::Replaced)));
        let woken = end_of((B, 90, renewed(A.0, 60, 61)), (A, 91, renewed(0, 1, 2)));
        assert_eq!(woken, Some((A, EpochEnd::Replaced)));
    }

    #[test]
    fn index_is_used_again_only_when_it_is_free() {
        let mut nodes = LivingNodes::default();
        let first = nodes.index(A).unwrap();
        nodes.end(A, EpochEnd::Stopped);
        assert_eq!(nodes.index(A), None);
        assert_ne!(nodes.index(B), Some(first));
        nodes.free(first);
        assert_eq!(nodes.index(NodeEpoch(3)), Some(first));
    }
}
