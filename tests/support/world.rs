//! Generated users, devices and conversations; the same seed gives the same world.

use std::collections::BTreeMap;

/// A random number generator (xorshift64*) that never changes, so that a seed always gives the same world.
#[derive(Clone, Debug)]
pub struct Chance(u64);

impl Chance {
    /// From any seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }
}

/// The conversations and the sessions.
#[derive(Clone, Debug)]
pub struct World {
    /// Conversation id → members.
    pub conversations: BTreeMap<String, Vec<String>>,
    /// User and device of each session.
    pub sessions: Vec<(String, String)>,
}

impl World {
    /// `conversations` of 2 to `members_max` members, most of them small, and `sessions` sessions:
    /// every fourth user has three devices, the others have one.
    pub fn new(seed: u64, conversations: usize, members_max: usize, sessions: usize) -> Self {
        let mut chance = Chance::new(seed);
        let mut all = Vec::with_capacity(sessions);
        let mut users = Vec::new();
        while all.len() < sessions {
            let user = format!("user-{}", users.len());
            let devices = if users.len() % 4 == 3 { 3 } else { 1 };
            for device in ["phone", "desk", "tablet"].iter().take(devices.min(sessions - all.len()))
            {
                all.push((user.clone(), (*device).to_owned()));
            }
            users.push(user);
        }
        assert!(members_max <= users.len());
        let conversations = (0..conversations)
            .map(|number| {
                // The first has the minimum, the second the maximum; the rest are mostly small.
                let size = match number {
                    0 => 2,
                    1 => members_max,
                    _ => 2 + chance.below(members_max - 1) * (1 + chance.below(100)) / 100,
                };
                let mut members = Vec::with_capacity(size);
                while members.len() < size {
                    let user = &users[chance.below(users.len())];
                    if !members.contains(user) {
                        members.push(user.clone());
                    }
                }
                (format!("conversation-{number}"), members)
            })
            .collect();
        Self { conversations, sessions: all }
    }

    /// The conversations of each user.
    pub fn by_user(&self) -> BTreeMap<&str, Vec<&str>> {
        let mut by_user: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (conversation, members) in &self.conversations {
            for member in members {
                by_user.entry(member).or_default().push(conversation);
            }
        }
        by_user
    }

    /// Sessions of each user.
    pub fn devices(&self) -> BTreeMap<&str, usize> {
        let mut devices: BTreeMap<&str, usize> = BTreeMap::new();
        for (user, _) in &self.sessions {
            *devices.entry(user).or_default() += 1;
        }
        devices
    }
}
