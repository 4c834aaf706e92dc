//! A hierarchical timer wheel over the slots of a slab; it owns no memory per timer. Setting,
//! moving and unsetting a timer costs a few writes, however many there are.
//!
//! ```text
//! level 0: 64 buckets of 1 tick       |■□□□…□|   the next 64 ticks
//! level 1: 64 buckets of 64 ticks     |□■□□…□|   the next 4,096
//! level 2: 64 buckets of 4,096 ticks  |□□□□…■|   …
//! level 3: 64 buckets of 262,144 ticks
//! ```
//!
//! The level of a timer is the highest six-bit digit in which its tick differs from now; its bucket
//! is that digit. When time reaches the bucket, its timers move to lower levels. A timer beyond the
//! wheel's reach is put at its end and fires early. Its owner then checks the time and sets it
//! again, as it does for deadlines that have moved.

use crate::domain::limits::CONNECTIONS_PER_SHARD_MAX;

/// One tick, ms: a deadline may be noticed this late.
pub const TICK_MS: u64 = 16;

const BUCKET_BITS: u32 = 6;
const BUCKETS: usize = 1 << BUCKET_BITS;
const LEVELS: usize = 4;
/// Largest distance of a timer from now, ticks: a day and a half.
const REACH_TICKS: Tick = (1 << (BUCKET_BITS * LEVELS as u32 - 1)) - 1;
const NONE: u32 = u32::MAX;
/// Set in the `previous` of the first timer of a bucket; the other bits are level and bucket.
const FIRST: u32 = 1 << 31;
const _: () = assert!(CONNECTIONS_PER_SHARD_MAX < FIRST, "slots and buckets have distinct values");

/// A time of [`Kernel::now_ms`](crate::uring::Kernel::now_ms), in ticks.
pub type Tick = u64;

/// The low half of a [`Tick`]: all that a slot keeps of one. It means the tick nearest to now, so it must be read less
/// than 2^31 ticks (397 days) from the tick that was stored. All that are read are within a day, however long their
/// connection lives: a deadline is at most a setting ahead ([`SETTING_MS_MAX`](super::config::SETTING_MS_MAX)) and is
/// handled when it has passed, and a client that sends nothing for `idle_ms_max` is terminated. Other values are not
/// read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShortTick(u32);

impl From<Tick> for ShortTick {
    fn from(tick: Tick) -> Self {
        Self(tick as u32)
    }
}

impl ShortTick {
    /// The tick that was stored.
    pub fn near(self, now: Tick) -> Tick {
        let distance = self.0.wrapping_sub(now as u32).cast_signed();
        now.wrapping_add_signed(distance.into())
    }
}

/// The link that the wheel keeps in each slot.
#[derive(Debug)]
pub struct TimerLink {
    /// When it fires: at most [`REACH_TICKS`] after the wheel's time.
    due: ShortTick,
    next: u32,
    /// The previous slot, or the bucket (see [`FIRST`]), or [`NONE`] if the timer is not set.
    previous: u32,
}

impl Default for TimerLink {
    fn default() -> Self {
        Self { due: ShortTick::default(), next: NONE, previous: NONE }
    }
}

/// Access to the links of the slots.
pub trait TimerSlots {
    /// The link of a slot in use.
    fn timer(&mut self, slot: u32) -> &mut TimerLink;
}

/// The wheel of one shard.
#[derive(Debug)]
pub struct TimerWheel {
    now: Tick,
    buckets: [[u32; BUCKETS]; LEVELS],
    occupied: [u64; LEVELS],
}

impl TimerWheel {
    /// A wheel without timers.
    pub fn new(now: Tick) -> Self {
        Self { now, buckets: [[NONE; BUCKETS]; LEVELS], occupied: [0; LEVELS] }
    }

    /// When a timer fires; `None` if it is not set.
    pub fn due(&self, timer: &TimerLink) -> Option<Tick> {
        (timer.previous != NONE).then(|| timer.due.near(self.now))
    }

    /// The tick up to which all timers have fired.
    pub fn now(&self) -> Tick {
        self.now
    }

    #[cfg(any(test, feature = "simulation"))]
    /// Number of timers that are set. Walks all lists.
    pub fn set_timers(&self, slots: &mut impl TimerSlots) -> usize {
        let mut count = 0;
        for first in self.buckets.as_flattened() {
            let mut slot = *first;
            while slot != NONE {
                count += 1;
                slot = slots.timer(slot).next;
            }
        }
        count
    }

    /// Sets the timer of `slot` to `due`, or to the next tick if that is past.
    pub fn set(&mut self, slots: &mut impl TimerSlots, slot: u32, due: Tick) {
        self.unset(slots, slot);
        self.link(slots, slot, due.clamp(self.now + 1, self.now + REACH_TICKS));
    }

    /// Unsets the timer of `slot`, if it is set.
    pub fn unset(&mut self, slots: &mut impl TimerSlots, slot: u32) {
        let link = slots.timer(slot);
        if link.previous == NONE {
            return;
        }
        let (next, previous) = (link.next, link.previous);
        *link = TimerLink::default();
        if next != NONE {
            slots.timer(next).previous = previous;
        }
        if previous & FIRST != 0 {
            let place = (previous & !FIRST) as usize;
            let (level, bucket) = (place / BUCKETS, place % BUCKETS);
            self.buckets[level][bucket] = next;
            if next == NONE {
                self.occupied[level] &= !(1 << bucket);
            }
        } else {
            slots.timer(previous).next = next;
        }
    }

    /// Advances time to `now` at most. Due timers are unset and appended to `fired`, in the order
    /// of their ticks. Stops after `limit` timers; call again for the rest. Returns whether `now`
    /// was reached.
    pub fn advance(
        &mut self,
        slots: &mut impl TimerSlots,
        now: Tick,
        limit: usize,
        fired: &mut Vec<u32>,
    ) -> bool {
        // Each round fires one bucket or moves one down. A timer moves at most LEVELS times.
        while let Some((at, level, bucket)) = self.next_bucket() {
            if at > now {
                break;
            }
            self.now = at.max(self.now);
            while self.buckets[level][bucket] != NONE {
                let slot = self.buckets[level][bucket];
                let due = slots.timer(slot).due.near(self.now);
                if level == 0 {
                    if fired.len() >= limit {
                        return false;
                    }
                    assert_eq!(due, at, "a timer in the bucket of another tick");
                    self.unset(slots, slot);
                    fired.push(slot);
                } else {
                    self.unset(slots, slot);
                    self.link(slots, slot, due);
                }
            }
        }
        self.now = self.now.max(now);
        true
    }

    /// No timer fires before this tick. The tick may be early: then timers move to a lower level.
    pub fn next_due(&self) -> Option<Tick> {
        self.next_bucket().map(|(at, ..)| at)
    }

    /// The first occupied bucket in time order: its first tick, its level, its index.
    fn next_bucket(&self) -> Option<(Tick, usize, usize)> {
        (0..LEVELS)
            .filter(|level| self.occupied[*level] != 0)
            .map(|level| {
                let shift = BUCKET_BITS * level as u32;
                let digit = (self.now >> shift) as usize % BUCKETS;
                // Buckets before the digit belong to the next round of this level.
                let ahead = self.occupied[level].rotate_right(digit as u32).trailing_zeros();
                let bucket = (digit + ahead as usize) % BUCKETS;
                let first = ((self.now >> shift) + Tick::from(ahead)) << shift;
                (first, level, bucket)
            })
            // If two begin at the same tick, the higher level goes first: its timers move to the
            // lower.
            .min_by_key(|(at, level, _)| (*at, LEVELS - level))
    }

    fn link(&mut self, slots: &mut impl TimerSlots, slot: u32, due: Tick) {
        let differ = due ^ self.now;
        let level = if differ == 0 { 0 } else { differ.ilog2() / BUCKET_BITS };
        // After a carry, a digit above the highest level may differ although the distance is within
        // reach.
        let level = (level as usize).min(LEVELS - 1);
        let bucket = (due >> (BUCKET_BITS * level as u32)) as usize % BUCKETS;
        let first = std::mem::replace(&mut self.buckets[level][bucket], slot);
        self.occupied[level] |= 1 << bucket;
        if first != NONE {
            slots.timer(first).previous = slot;
        }
        let previous = FIRST | (level * BUCKETS + bucket) as u32;
        *slots.timer(slot) = TimerLink { due: due.into(), next: first, previous };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    impl TimerSlots for Vec<TimerLink> {
        fn timer(&mut self, slot: u32) -> &mut TimerLink {
            &mut self[slot as usize]
        }
    }

    #[test]
    fn a_short_tick_means_the_one_nearest_to_now() {
        for now in [0_u64, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 50] {
            for tick in [now, now + 1, now + 0x7fff_ffff, now.saturating_sub(1 << 31)] {
                assert_eq!(ShortTick::from(tick).near(now), tick);
            }
        }
    }

    proptest! {
        /// Checked against a sorted map: each timer fires once, at its tick, not earlier, in order.
        #[test]
        fn fires_like_a_sorted_map(
            // Also before each wrap: of a level of the wheel, of the distance and of the stored half.
            start in (12..40u32, 0..10_000u64).prop_map(|(bits, before)| (1u64 << bits).saturating_sub(before)),
            steps in prop::collection::vec((0..40u32, 0..5u8, 0..400_000u64), 1..300),
        ) {
            let mut slots: Vec<_> = (0..40).map(|_| TimerLink::default()).collect();
            let mut wheel = TimerWheel::new(start);
            let mut oracle: BTreeMap<u32, Tick> = BTreeMap::new();
            for (slot, action, amount) in steps {
                match action {
                    0 | 1 => {
                        wheel.set(&mut slots, slot, wheel.now() + amount);
                        oracle.insert(slot, (wheel.now() + amount).max(wheel.now() + 1));
                    }
                    2 => {
                        wheel.unset(&mut slots, slot);
                        oracle.remove(&slot);
                    }
                    _ => {
                        let now = wheel.now() + if action == 3 { amount } else { amount % 100 };
                        let mut fired = Vec::new();
                        while !wheel.advance(&mut slots, now, 3, &mut fired) {
                            let first = oracle.values().min().copied();
                            prop_assert!(fired.iter().all(|slot| oracle[slot] <= now));
                            prop_assert_eq!(fired.iter().map(|slot| oracle[slot]).min(), first);
                            fired.drain(..).for_each(|slot| { oracle.remove(&slot); });
                        }
                        fired.drain(..).for_each(|slot| assert!(oracle.remove(&slot).unwrap() <= now));
                        prop_assert!(oracle.values().all(|due| *due > now));
                        prop_assert_eq!(wheel.now(), now);
                    }
                }
                prop_assert_eq!(wheel.set_timers(&mut slots), oracle.len());
                let first = oracle.values().min().copied();
                prop_assert!(wheel.next_due() <= first.or(wheel.next_due()));
                prop_assert_eq!(wheel.next_due().is_some(), first.is_some());
                for (slot, due) in &oracle {
                    prop_assert_eq!(wheel.due(&slots[*slot as usize]), Some(*due));
                }
            }
        }
    }
}
