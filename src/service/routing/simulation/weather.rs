//! What a seed of the simulated cluster chooses once.

use rand::RngExt as _;
use rand::rngs::StdRng;

/// The circumstances of a run.
#[derive(Clone, Debug)]
pub(super) struct Weather {
    /// The longest step, ms.
    pub(super) step_ms: u64,
    /// Actions of nodes in one step.
    pub(super) acts: usize,
    /// Records that a node reads, stores or acknowledges at a time: below this.
    pub(super) amount_max: usize,
    /// How long a node may not renew its lease, ms.
    pub(super) node_timeout_ms: u64,
    /// The longest stall of a node, ms.
    pub(super) stall_ms: u64,
    /// How long hand-offs are retained, ms.
    pub(super) retention_ms: u64,
    /// When the sessions topic is compacted, ms. Above the age of the tails.
    pub(super) compaction_lag_ms: u64,
    pub(super) tail_age_ms: u64,
    pub(super) tail_bytes: u64,
    /// The largest record that the hand-off topic takes, bytes.
    pub(super) hand_off_bytes_max: usize,
    /// Routers of each node.
    pub(super) routers: usize,
    /// Whether members are asked for.
    pub(super) has_service: bool,
    /// Whether the last question is answered first.
    pub(super) latest_first: bool,
    /// One in so many times, a node forgets the members of all conversations before they are asked for; 0: never.
    pub(super) forgets_members: usize,
    /// Members from which on a conversation is large. All conversations of the simulation are, or none.
    pub(super) large_members: usize,
    /// The memory of the audiences of a router, bytes.
    pub(super) audience_bytes_max: usize,
    /// Users in the logs of beginnings.
    pub(super) beginnings_max: usize,
    /// Whether nodes lose their position in the sessions topic.
    pub(super) loses_position: bool,
    /// Whether events are deleted that were not read.
    pub(super) expires_events: bool,
    /// Whether nodes die and move partitions at all.
    pub(super) is_calm: bool,
    /// Whether Kafka can always be reached, and no node stalls for long.
    pub(super) is_mild: bool,
    /// Whether some clients keep a cursor.
    pub(super) has_cursors: bool,
    /// The longest time that passes for replays in one step, ms. Answers need some hundred steps, and are waited for
    /// for some seconds.
    pub(super) replays_ms: u64,
    /// One in so many times that such a client has got more, an owner ends; 0: never.
    pub(super) ends_owners: usize,
    /// One in so many times that it could, the conversation service answers.
    pub(super) answers_one_in: u32,
    /// One in so many times that it could, a node commits.
    pub(super) commits_one_in: u32,
}

/// Longer than any run.
pub(super) const FOREVER_MS: u64 = 1 << 40;

impl Weather {
    pub(super) fn new(random: &mut StdRng) -> Self {
        let mut one = |of: &[u64]| of[random.random_range(0..of.len())];
        let tail_age_ms = one(&[FOREVER_MS, FOREVER_MS, 60_000, 20_000]);
        let tail_bytes = one(&[u64::MAX, u64::MAX, 100_000]);
        let step_ms = one(&[10, 40, 120, 400]);
        let hand_off_bytes_max = one(&[u64::MAX, u64::MAX, u64::MAX, 400, 130]) as usize;
        let weather = Self {
            step_ms,
            acts: 1 + step_ms as usize / 100 * one(&[1, 2]) as usize,
            amount_max: one(&[6, 6, 40]) as usize,
            node_timeout_ms: one(&[60_000, 20_000]),
            stall_ms: one(&[10_000, 70_000, 200_000]),
            retention_ms: one(&[FOREVER_MS, 120_000, 15_000]),
            compaction_lag_ms: if tail_age_ms == FOREVER_MS { FOREVER_MS } else { 2 * tail_age_ms },
            tail_age_ms,
            tail_bytes,
            hand_off_bytes_max,
            routers: one(&[1, 2, 3]) as usize,
            has_service: one(&[0, 1]) == 1,
            forgets_members: one(&[0, 40, 10]) as usize,
            loses_position: one(&[0, 0, 1]) == 1,
            is_calm: one(&[0, 0, 0, 0, 1]) == 1,
            expires_events: one(&[0, 0, 1]) == 1,
            latest_first: one(&[0, 1]) == 1,
            large_members: one(&[1, 1, u64::MAX]) as usize,
            audience_bytes_max: one(&[128 << 20, 8_000]) as usize,
            beginnings_max: one(&[65_536, 4, 1]) as usize,
            // Their requests are larger than the smallest bounds.
            has_cursors: one(&[0, 1, 1]) == 1 && hand_off_bytes_max == usize::MAX,
            replays_ms: one(&[3, 10, 100]),
            ends_owners: one(&[0, 0, 12, 4]) as usize,
            answers_one_in: one(&[1, 1, 8]) as u32,
            commits_one_in: one(&[1, 1, 20]) as u32,
            is_mild: false,
        };
        // In the others most sessions end before they have caught up.
        if one(&[0, 0, 1]) == 1 { weather.mild() } else { weather }
    }

    /// Sessions last, and come back with their cursors: owners change, but nothing expires.
    fn mild(self) -> Self {
        Self {
            stall_ms: 10_000,
            retention_ms: FOREVER_MS,
            compaction_lag_ms: FOREVER_MS,
            tail_age_ms: FOREVER_MS,
            tail_bytes: u64::MAX,
            hand_off_bytes_max: usize::MAX,
            loses_position: false,
            expires_events: false,
            has_cursors: true,
            is_mild: true,
            ..self
        }
    }

    /// Nothing expires, fails or moves, and all members are known.
    #[cfg(test)]
    pub(super) fn calm(random: &mut StdRng) -> Self {
        Self {
            retention_ms: FOREVER_MS,
            compaction_lag_ms: FOREVER_MS,
            tail_age_ms: FOREVER_MS,
            tail_bytes: u64::MAX,
            hand_off_bytes_max: usize::MAX,
            has_service: false,
            forgets_members: 0,
            loses_position: false,
            expires_events: false,
            is_calm: true,
            has_cursors: false,
            ..Self::new(random)
        }
    }

    /// Whether a single session can miss events, and is closed.
    pub(super) fn has_gaps(&self) -> bool {
        self.tail_age_ms < FOREVER_MS
            || self.tail_bytes < u64::MAX
            || self.hand_off_bytes_max < usize::MAX
            || self.expires_events
    }
}
